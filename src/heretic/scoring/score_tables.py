"""Scores as text: lines and tables about trials and finalists."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from optuna.trial import FrozenTrial

from ..prompts import Prompt
from ..utils import JsonObject

TITLES = {
    "refusals": "Refusals",
    "kl_divergence": "KL divergence",
    "sequence_kl_divergence": "Sequence KL",
    "harmless_refusals": "Harmless refusals",
}
STATISTICS = {"median": "median", "p95": "95th percentile", "max": "maximum"}
# Column with the numbers of refusals and degenerate responses by early verdicts, as the search counts them.
EARLY = "Early verdicts: refused and degenerate"
CLASSES = {"refusal": "refusal", "compliance": "compliance", "degenerate": "degenerate (empty, repetitive or cut short)"}


@dataclass(frozen=True)
class Baseline:
    """Kinds of the original's responses to the harmful prompts, as far as the study has them."""

    n_prompts: int | None = None
    refusals: int | None = None
    response_classes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, attributes: JsonObject) -> "Baseline":
        """From a study's attributes."""
        return cls(attributes.get("n_bad_prompts"), attributes.get("base_refusals"), attributes.get("base_response_classes", {}))

    def attributes(self) -> JsonObject:
        """As a study's attributes."""
        return {"n_bad_prompts": self.n_prompts, "base_refusals": self.refusals, "base_response_classes": dict(self.response_classes)}

    @property
    def degenerate(self) -> int:
        """The number of degenerate responses."""
        return self.response_classes.get("degenerate", 0)

    def described(self) -> str:
        """`refuses 30 of 100`, with the number of degenerate responses if there are any; empty if unknown."""
        if self.refusals is None:
            return ""
        of = "" if self.n_prompts is None else f" of {self.n_prompts}"
        return f"refuses {self.refusals}{of}" + (f", {self.degenerate} degenerate" if self.degenerate else "")


def title_of(name: str) -> str:
    """The title of a scorer."""
    return TITLES.get(name, name)


def format_figure(value: float) -> str:
    """Integers as they are, other numbers with four decimals."""
    return str(int(value)) if float(value).is_integer() else f"{value:.4f}"


def format_interval(value: float, interval: Sequence[float] | None) -> str:
    """A score with its interval in brackets, if it has one; for counts, the ends have one decimal."""
    if interval is None:
        return format_figure(value)
    low, high = (f"{end:.1f}".removesuffix(".0") if float(value).is_integer() else f"{end:.4f}" for end in interval)
    return f"{format_figure(value)} ({low} to {high})"


def refused(attributes: JsonObject) -> str:
    """The number of refusals of a trial; with `about` if it is an estimate, which includes degenerate responses."""
    if attributes.get("bounded"):
        return f"about {attributes['refusals']}"
    return str(attributes.get("response_classes", {}).get("refusal", attributes["refusals"]))


def degenerate(attributes: JsonObject) -> str:
    """The number of degenerate responses, and how many of them are new (not degenerate in the original). Empty if unknown."""
    classes = {} if attributes.get("bounded") else attributes.get("response_classes", {})
    if not classes:
        return ""
    n_new = attributes["refusals"] - classes["refusal"]
    return f"{classes['degenerate']}" + (f" ({n_new} new)" if n_new else "")


def verdicts_text(attributes: JsonObject, baseline: Baseline) -> str:
    """A trial's verdicts with the original's: `3 of 100 refused (original 30), 5 degenerate (original 5)`."""
    of = "" if baseline.n_prompts is None else f" of {baseline.n_prompts}"
    text = f"{refused(attributes)}{of} refused" + ("" if baseline.refusals is None else f" (original {baseline.refusals})")
    number, _, new = degenerate(attributes).partition(" ")
    if number == "" or (number == "0" and not baseline.degenerate):
        return text
    new = f"; {new.strip('()')}" if new else ""
    return f"{text}, {number} degenerate (original {baseline.degenerate}{new})"


def verdict_columns(trials: Sequence[FrozenTrial], baseline: Baseline) -> dict[str, Callable[[JsonObject], str]]:
    """The verdict columns of a table of trials: headers, and functions from a trial's attributes to the cell."""
    if baseline.degenerate or any(degenerate(trial.user_attrs) not in ("", "0") for trial in trials):
        return {"Refused": refused, "Degenerate": degenerate}
    return {"Refused": refused}


def finalist_rows(front: Sequence[FrozenTrial], known: JsonObject) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the trials of `front` that were scored again, the original first; empty if there are none."""
    scored = [(trial, known["trials"][str(trial.number)]) for trial in front if str(trial.number) in known.get("trials", {})]
    if not scored:
        return [], []
    names = list(known["base"]["scores"])
    rows = [["original", *_cells(known["base"], names)]]
    rows += [[str(trial.number), *_cells(entry, names)] for trial, entry in scored]
    return ["Trial", *map(title_of, names), "Degenerate", EARLY], rows


def _cells(entry: JsonObject, names: Sequence[str]) -> list[str]:
    if "failure" in entry:
        return [entry["failure"], *[""] * (len(names) + 1)]
    figures = [format_interval(entry["scores"][name], entry["intervals"].get(name)) for name in names]
    early = entry["early_response_classes"]
    return [*figures, str(entry["response_classes"]["degenerate"]), f"{early['refusal']} and {early['degenerate']}"]


def score_rows(trial: FrozenTrial, base: Mapping[str, float], known: JsonObject) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of all scores of a trial: of the original, in the search, and scored again with intervals."""
    original = dict(known.get("base", {}))
    # The search's scores come first and take precedence; those of finalists only follow.
    original = {**original, "scores": {**base, **original.get("scores", {}), **base}, "intervals": {}}
    usual = {name: trial.user_attrs[name] for name in ("refusals", "kl_divergence")}
    own = {**trial.user_attrs, "scores": usual | trial.user_attrs.get("scores", {})}
    again = known.get("trials", {}).get(str(trial.number), {})
    return ["", "Original", f"Trial {trial.number}", "Scored again (95 % interval)"], figure_rows([original, own, again])


def figure_rows(models: Sequence[JsonObject]) -> list[list[str]]:
    """A row for each score that any of the models has, and a column for each model, given as from `Score.described`."""

    def cell(model: JsonObject, group: str, name: str) -> str:
        value = model.get(group, {}).get(name)
        interval = model.get("intervals", {}).get(name) if group == "scores" else None
        return "" if value is None else format_interval(value, interval)

    titles = {name: title_of(name) for model in models for name in model.get("scores", {})}
    rows = [[title, *(cell(model, "scores", name) for model in models)] for name, title in titles.items()]
    groups = (
        ("kl_statistics", STATISTICS, "KL divergence, "),
        ("response_classes", CLASSES, "Responses: "),
        ("early_response_classes", CLASSES, "Early verdicts: "),
    )
    for group, names, heading in groups:
        for name, title in names.items():
            cells = [cell(model, group, name) for model in models]
            if any(cells):
                rows.append([heading + title, *cells])
    return rows


def divergent_rows(moved: Sequence[tuple[Prompt, float, float]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the prompts with the largest divergence (`Evaluator.most_divergent`)."""
    headers = ["Prompt", "KL divergence, first token", "mean along the response"]
    return headers, [[prompt.user, f"{first:.4f}", f"{mean:.4f}"] for prompt, first, mean in moved]
