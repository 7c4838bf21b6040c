"""Tables for the terminal: the search space, the front, the finalists, residuals."""

from collections.abc import Sequence
from dataclasses import astuple

from optuna.trial import FrozenTrial
from rich.markup import escape
from rich.table import Table

from ..editing.ablation import Ablation
from ..parameters import Choice, Range
from ..scoring.score_tables import Baseline, finalist_rows, format_figure, title_of, verdict_columns
from ..specifications import DEFAULT_OBJECTIVES, Objectives
from ..study.front import ablation_of, components_of, is_learned, score_of
from ..study.space import SearchSpace
from ..utils import JsonObject
from .learned import learned_cells
from .residual_geometry import LayerGeometry

_GEOMETRY_HEADERS = "S(g,b) S(g*,b*) S(g,r) S(g*,r*) S(b,r) S(b*,r*) |g| |g*| |b| |b*| |r| |r*| Silhouette".split()
_GEOMETRY_CAPTION = (
    "g, b: means of the residuals of harmless and harmful prompts; g*, b*: their geometric medians; r = b - g, r* = b* - g*; "
    "S: cosine similarity; |.|: norm; Silhouette: 1 separated, 0 mixed."
)


def describe_direction(ablation: Ablation, last_layer: int | None) -> str:
    """`learned`, `per layer`, or the direction index with the layer in brackets."""
    if ablation.learned is not None:
        return "learned"
    index = ablation.direction_index
    if index is None:
        return "per layer"
    return f"{index:.2f}" + ("" if last_layer is None else f" (layer {index * last_layer:.1f})")


def kernel_cells(ablation: Ablation, last_layer: int | None) -> list[str]:
    """The cells that describe an ablation: the direction, then each component's kernel, as fractions with layers in brackets.

    A kernel is written as its maximum weight at its position, and its minimum weight at its distance.
    """
    cells = [describe_direction(ablation, last_layer)]
    for p in ablation.parameters.values():
        place, reach = f"{p.max_weight_position:.2f}", f"{p.min_weight_distance:.2f}"
        if last_layer is not None:
            place += f" (layer {p.max_weight_position * last_layer:.1f})"
            reach += f" ({p.min_weight_distance * last_layer:.1f} layers)"
        cells.append(f"{p.max_weight:.2f} at {place}, {p.min_weight:.2f} at ±{reach}")
    return cells


def edit_cells(trial: FrozenTrial, components: Sequence[str], last_layer: int | None) -> list[str]:
    """The cells that describe a trial's edit: the direction, then each component's strengths."""
    return learned_cells(trial, components) if is_learned(trial) else kernel_cells(ablation_of(trial), last_layer)


def space_text(space: SearchSpace, separating_layer: int, last_layer: int) -> str:
    """The search space as text: fractions with layers in brackets."""
    lines = [f"Search space (harmless and harmful prompts separate in layer {separating_layer}):", *_describe_space(space, last_layer)]
    if space.start is not None:
        lines += ["first trials:", *(f"  {line}" for line in _describe_space(space.start, last_layer) if line not in lines)]
    return "\n  ".join(lines)


def _describe_space(space: SearchSpace, last_layer: int) -> list[str]:
    """The lines of the search space: directions, then each component's kernel; components with the same kernel share a line."""
    texts = []
    if "global" in space.direction_scope:
        index = space.direction_index
        texts.append(f"directions at {_between(index)} (layer {_between(index, last_layer)})")
    kernels: dict[str, list[str]] = {}
    for component, kernel in space.components.items():
        place, reach = kernel.max_weight_position, kernel.min_weight_distance
        text = (
            f"{_between(kernel.max_weight)} at {_between(place)} (layer {_between(place, last_layer)}), "
            f"{_between(kernel.min_weight)} of it at ±{_between(reach)} ({_between(reach, last_layer)} layers)"
        )
        kernels.setdefault(text, []).append(component)
    return texts + [f"{', '.join(components)}: {kernel}" for kernel, components in kernels.items()]


def _between(choice: Choice, last_layer: int | None = None) -> str:
    """`0.60 to 1.00`, or a constant; converted to layers if the last layer's index is given."""
    ends = (choice.low, choice.high) if isinstance(choice, Range) else (choice,)
    return " to ".join(dict.fromkeys(f"{end:.2f}" if last_layer is None else f"{end * last_layer:.1f}" for end in ends))


def other_scores(trials: Sequence[FrozenTrial], objectives: Objectives) -> list[str]:
    """Scores shown besides the default objectives: the sequence KL divergence if all trials have it, and other objectives."""
    known = trials and all("sequence_kl_divergence" in trial.user_attrs for trial in trials)
    names = (["sequence_kl_divergence"] if known else []) + [name for name, _ in objectives]
    return [name for name in dict.fromkeys(names) if name not in ("refusals", "kl_divergence")]


def trial_rows(
    trials: Sequence[FrozenTrial], last_layer: int | None, baseline: Baseline, objectives: Objectives = DEFAULT_OBJECTIVES
) -> tuple[list[str], list[list[str]]]:
    """Headers and rows that describe trials: scores, then the edit."""
    others = other_scores(trials, objectives)
    components = components_of(trials)
    verdicts = verdict_columns(trials, baseline)
    headers = ["#", "Trial", *verdicts, "KL divergence", *map(title_of, others), "Direction", *components]
    rows = []
    for i, trial in enumerate(trials):
        verdict_cells = [cell(trial.user_attrs) for cell in verdicts.values()]
        scores = [str(i), str(trial.number), *verdict_cells, f"{trial.user_attrs['kl_divergence']:.4f}"]
        scores += [format_figure(score_of(trial, name)) for name in others]
        rows.append([*scores, *edit_cells(trial, components, last_layer)])
    return headers, rows


def front_table(
    front: Sequence[FrozenTrial], last_layer: int | None, baseline: Baseline, objectives: Objectives = DEFAULT_OBJECTIVES
) -> Table:
    """The Pareto front; the first column is what `--trial-index` counts."""
    headers, rows = trial_rows(front, last_layer, baseline, objectives)
    original = baseline.described()
    table = Table(title="Pareto front (# is the trial index" + (f"; the original {original})" if original else ")"), title_justify="left")
    numbers = headers[: headers.index("Direction")]
    for header in headers:
        table.add_column(escape(header), justify="right" if header in numbers else "left", no_wrap=header in numbers)
    for row in rows:
        table.add_row(*row)
    return table


def finalists_table(front: Sequence[FrozenTrial], known: JsonObject) -> Table | None:
    """Results of scoring trials of the front again (`finalists.known_finalists`); None if there are none."""
    headers, rows = finalist_rows(front, known)
    if not rows:
        return None
    conditions = known["conditions"]
    title = (
        f"Scored again on {known['n_bad_prompts']} harmful and {known['n_good_prompts']} harmless prompts, "
        f"at most {conditions['max_response_length']} tokens (95 % bootstrap intervals in brackets)"
    )
    table = Table(title=title, title_justify="left")
    for header in headers:
        table.add_column(escape(header), justify="right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def geometry_table(layers: Sequence[LayerGeometry], wraps: bool) -> Table:
    """The geometry of residuals per layer."""
    table = Table(title="Residual geometry", title_justify="left", caption=_GEOMETRY_CAPTION, caption_justify="left")
    for header in ("Layer", *_GEOMETRY_HEADERS):
        table.add_column(header, justify="right", no_wrap=not wraps)
    for layer in layers:
        _, *values = astuple(layer)
        cells = [
            f"{value:.4g}" if header.startswith("|") else f"{value:.3f}" for header, value in zip(_GEOMETRY_HEADERS, values, strict=True)
        ]
        table.add_row("embedding" if layer.layer is None else str(layer.layer), *cells)
    return table
