"""The report of a study: one self-contained HTML file, made from the journal alone.

`Facts` are read from the study, drawn by `charts.py`, and put into the page (`report.html`, a template). `report_plots.py` writes the
same plots as PNG files.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

import jinja2
import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .. import __version__
from ..errors import ReportError
from ..privacy import public_settings
from ..scoring.score_tables import Baseline, finalist_rows, title_of
from ..study.front import components_of, front_of, is_finished, is_learned, score_of, search_view
from ..utils import JsonObject, format_duration
from .axis import Axis, axis_for
from .charts import Frame, Line, Mark, chart
from .learned import cosine_curve, strength_curves
from .report_scores import score_table
from .tables import edit_cells

USUAL_OBJECTIVES = (("refusals", "minimize"), ("kl_divergence", "minimize"))
# With fewer trials than this, importances are meaningless.
MIN_TRIALS_FOR_IMPORTANCE = 10
WIDE, NARROW, PANEL = 860, 340, 400


@dataclass(frozen=True)
class Facts:
    """What a report needs to know of a study. Attributes that the study lacks are None or empty."""

    model: str
    trials: Sequence[FrozenTrial]  # complete ones, ordered by number
    n_failed: int
    front: Sequence[FrozenTrial]
    last_layer: int | None
    baseline: Baseline
    settings: JsonObject
    given: Sequence[str]
    samples: JsonObject
    importances: Mapping[str, Mapping[str, float]]  # by objective, then parameter
    objectives: Sequence[str]
    finalists: JsonObject  # results of scoring finalists again

    @property
    def seconds(self) -> float:
        """Total duration of the trials."""
        return math.fsum(trial.user_attrs.get("seconds", 0.0) for trial in self.trials)

    @property
    def components(self) -> list[str]:
        """The components that the trials edit."""
        return components_of(self.front)


def facts_of(study: Study) -> Facts:
    """Read the facts from a study, without local paths. Raises `ReportError` if no trial is complete."""
    trials = study.get_trials(deepcopy=False)
    front = front_of(study)
    if not front:
        raise ReportError("There is nothing to report: the study has no complete trial.")
    attributes = study.user_attrs
    settings = public_settings(attributes.get("settings", {}))
    objectives = [(name, direction) for name, direction in attributes.get("objectives", USUAL_OBJECTIVES)]
    return Facts(
        model=settings.get("model", study.study_name),
        trials=[trial for trial in trials if trial.state == TrialState.COMPLETE],
        n_failed=sum("failure" in trial.user_attrs for trial in trials),
        front=front,
        last_layer=attributes.get("last_layer"),
        baseline=Baseline.of(attributes),
        settings=settings,
        given=attributes.get("given", []),
        samples=attributes.get("samples", {}),
        importances=_importances(study, objectives),
        objectives=[name for name, _ in objectives],
        finalists=attributes.get("finalists", {}),
    )


def _importances(study: Study, objectives: Sequence[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Optuna's PED-ANOVA for each objective: how strongly a parameter determines whether a trial is among the best 10 %."""
    complete = search_view(study).get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < MIN_TRIALS_FOR_IMPORTANCE:
        return {}

    def of(name: str, direction: str) -> dict[str, float]:
        sign = 1 if direction == "minimize" else -1
        return get_param_importances(
            search_view(study), evaluator=PedAnovaImportanceEvaluator(), target=lambda trial: sign * score_of(trial, name)
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", category=UserWarning)  # about low values counting as good, which is intended
        return {title_of(name): of(name, direction) for name, direction in objectives}


def report_path(journal: Path) -> Path:
    """The path of a journal's report: in the same folder, with the same stem."""
    return journal.with_name(f"{journal.stem}.report.html")


def write_report(facts: Facts, path: Path) -> None:
    """Write the page atomically. Raises `ReportError` if it cannot be written."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # it does not exist yet for a study in a database
        temporary.write_text(render(facts), encoding="utf-8", errors="replace")
        temporary.replace(path)
    except OSError as error:
        raise ReportError(f"The report {path} cannot be written: {error.strerror}. The study itself is safe.") from error


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("heretic.reporting").joinpath("report.html").read_text(encoding="utf-8"))


def render(facts: Facts) -> str:
    """The page as text."""
    score_headers, score_rows = score_table(facts.front, facts.baseline.n_prompts)
    finalist_headers, finalists = finalist_rows(facts.front, facts.finalists)
    return _template().render(
        facts=facts,
        version=__version__,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        duration=format_duration(facts.seconds),
        objective_titles=" and ".join(title_of(name) for name in facts.objectives),
        tiles=tiles(facts),
        front_charts=[front_chart(facts, WIDE, 380, "wide"), front_chart(facts, NARROW, 320, "narrow")],
        score_headers=score_headers,
        score_rows=score_rows,
        finalist_headers=finalist_headers,
        finalist_rows=finalists,
        history_charts=history_charts(facts),
        importances=importance_rows(facts),
        kernel_charts=[*kernel_charts(facts), *cosine_charts(facts)],
        kernel_rows=[edit_cells(trial, facts.components, facts.last_layer) for trial in facts.front],
        samples=sample_rows(facts),
        settings=[(name, json.dumps(value, ensure_ascii=False), name in facts.given) for name, value in facts.settings.items()],
    )


def tiles(facts: Facts) -> list[tuple[str, str]]:
    """Key figures of the study: title and value."""
    best = min(facts.front, key=lambda trial: (_refusals(trial), _divergence(trial)))
    original = facts.baseline.described().removeprefix("refuses ")
    least = min(facts.front, key=_divergence)
    stopped = sum(not is_finished(trial) for trial in facts.trials)
    found = [
        ("Refusals of the original", original),
        ("Fewest refusals", f"{best.user_attrs['refusals']} at KL {best.user_attrs['kl_divergence']:.4f}"),
        ("Lowest KL divergence", f"{least.user_attrs['kl_divergence']:.4f} at {least.user_attrs['refusals']} refusals"),
        ("Trials", f"{len(facts.trials)}" + (f", {stopped} stopped early" if stopped else "")),
        ("Failed trials", f"{facts.n_failed}" if facts.n_failed else ""),
    ]
    return [(title, value) for title, value in found if value]


def describe(trial: FrozenTrial) -> str:
    """A trial in one line."""
    about = "about " if trial.user_attrs.get("bounded") else ""
    return f"Trial {trial.number}: {about}{trial.user_attrs['refusals']} refusals, KL divergence {trial.user_attrs['kl_divergence']:.4f}"


def _marks(facts: Facts, x: Callable[[FrozenTrial], float], y: Callable[[FrozenTrial], float]) -> list[Mark]:
    """Marks of all trials, those of the front drawn on top."""
    places = {trial.number: i for i, trial in enumerate(facts.front)}
    others = [trial for trial in facts.trials if trial.number not in places]
    marks = [Mark(x(t), y(t), "trial" if is_finished(t) else "trial stopped", describe(t)) for t in others]
    return marks + [Mark(x(t), y(t), "trial on-front", describe(t), places[t.number]) for t in facts.front]


def _divergence(trial: FrozenTrial) -> float:
    return float(trial.user_attrs["kl_divergence"])


def _refusals(trial: FrozenTrial) -> float:
    return float(trial.user_attrs["refusals"])


def refusal_axis(facts: Facts, start: float, end: float) -> Axis:
    """The axis of refusals, from none to all."""
    highest = max([facts.baseline.refusals or 1, *(trial.user_attrs["refusals"] for trial in facts.trials)])
    return Axis(-0.03 * highest, 1.03 * highest, start, end)


def front_chart(facts: Facts, width: int, height: int, kind: str) -> str:
    """All trials by KL divergence and refusals, the front as a staircase."""
    frame = Frame(width, height, "KL divergence (nats)", "Refusals", "Trials by KL divergence and refusals, with the Pareto front")
    x = axis_for([_divergence(trial) for trial in facts.trials], *frame.x_range)
    y = refusal_axis(facts, *frame.y_range)
    return chart(frame, x, y, [Line(staircase(facts.front, x.high), "front")], _marks(facts, _divergence, _refusals), kind)


def staircase(front: Sequence[FrozenTrial], end: float) -> list[tuple[float, float]]:
    """The boundary `(KL divergence, refusals)` of the region that the front dominates, from its lowest divergence to `end`."""
    points: list[tuple[float, float]] = []
    for trial in sorted(front, key=_divergence):
        if points:
            if _refusals(trial) >= points[-1][1]:
                continue  # on the front for another objective
            points.append((_divergence(trial), points[-1][1]))
        points.append((_divergence(trial), _refusals(trial)))
    return [*points, (end, points[-1][1])]


def history_charts(facts: Facts) -> list[str]:
    """Refusals, KL divergence and other objectives by trial number."""
    charts = []
    columns: list[tuple[str, Callable[[FrozenTrial], float]]] = [("Refusals", _refusals), ("KL divergence (nats)", _divergence)]
    usual = [name for name, _ in USUAL_OBJECTIVES]
    columns += [(title_of(name), partial(score_of, name=name)) for name in facts.objectives if name not in usual]
    for label, value in columns:
        frame = Frame(PANEL, 230, "Trial", label, f"{label} of the trials in their order")
        x = axis_for([trial.number for trial in facts.trials], *frame.x_range, log=False)
        y = refusal_axis(facts, *frame.y_range) if value is _refusals else axis_for([value(t) for t in facts.trials], *frame.y_range)
        charts.append(chart(frame, x, y, marks=_marks(facts, lambda trial: trial.number, value)))
    return charts


def importance_rows(facts: Facts) -> list[JsonObject]:
    """Parameters with their importance for each objective, the most important one first."""
    columns = list(facts.importances.values())
    greatest = max((value for values in columns for value in values.values()), default=0.0) or 1.0
    sums = {name: math.fsum(values.get(name, 0.0) for values in columns) for values in columns for name in values}
    return [
        {"name": name, "bars": [(100 * values.get(name, 0.0) / greatest, f"{values.get(name, 0.0):.2f}") for values in columns]}
        for name in sorted(sums, key=lambda name: (-sums[name], name))
    ]


def kernel_charts(facts: Facts) -> list[tuple[str, str]]:
    """For each component: its name, and a chart of the strengths over the layers in the trials of the front."""
    last_layer = facts.last_layer
    if last_layer is None:
        return []
    curves = [strength_curves(trial, last_layer) for trial in facts.front]
    strengths = [0.0, *(strength for own in curves for points in own.values() for _, strength in points)]
    charts = []
    for component in facts.components:
        frame = Frame(PANEL, 230, "Layer", "Strength", f"Strength of the edits of {component} over the layers")
        x, y = (
            Axis(0, max(1, last_layer), *frame.x_range, integer=True),
            Axis(1.08 * min(strengths), 1.08 * max(1e-9, *strengths), *frame.y_range),
        )
        lines = [
            Line(own.get(component, []), "kernel", describe(trial), i)
            for i, (trial, own) in enumerate(zip(facts.front, curves, strict=True))
        ]
        charts.append((component, chart(frame, x, y, lines)))
    return charts


def cosine_charts(facts: Facts) -> list[tuple[str, str]]:
    """By layer, the cosine between the directions of the front's learned trials and the difference of means."""
    learned = [(i, trial) for i, trial in enumerate(facts.front) if is_learned(trial)]
    if facts.last_layer is None or not learned:
        return []
    frame = Frame(PANEL, 230, "Layer", "Cosine", "Cosine between each layer's learned direction and its difference of means")
    curves = [cosine_curve(trial) for _, trial in learned]
    least = min(cosine for points in curves for _, cosine in points)
    x, y = Axis(0, max(1, facts.last_layer), *frame.x_range, integer=True), Axis(min(-0.05, 1.05 * least), 1.05, *frame.y_range)
    lines = [Line(points, "kernel", describe(trial), i) for points, (i, trial) in zip(curves, learned, strict=True)]
    return [("Learned directions", chart(frame, x, y, lines))]


def sample_rows(facts: Facts) -> list[JsonObject]:
    """Prompts with the responses of the original and of the trials of the front (None if not stored), and their verdicts."""
    kept, original, verdicts = (facts.samples.get(name, {}) for name in ("trials", "original", "verdicts"))

    def edited(number: str, i: int) -> tuple[str, str | None, str]:
        return number, kept[number][i] if number in kept else None, verdicts[number][i] if number in verdicts else ""

    return [
        {
            "prompt": prompt,
            "original": original[i],
            "verdict": verdicts["original"][i] if verdicts else "",
            "edited": [edited(str(trial.number), i) for trial in facts.front],
        }
        for i, prompt in enumerate(facts.samples.get("prompts", []))
    ]
