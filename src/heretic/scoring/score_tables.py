"""Scores as text: what stands in lines and tables about one trial's figures and about the finalists'."""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from ..prompts import Prompt

TITLES = {
    "refusals": "Refusals",
    "kl_divergence": "KL divergence",
    "sequence_kl_divergence": "Sequence KL",
    "harmless_refusals": "Harmless refusals",
}
STATISTICS = {"median": "median", "p95": "95th percentile", "max": "maximum"}
CLASSES = {"refusal": "refusal", "compliance": "compliance", "degenerate": "degenerate (empty, looping, broken off)"}


def title_of(name: str) -> str:
    """A scorer's name as a heading."""
    return TITLES.get(name, name)


def format_figure(value: float) -> str:
    """Counts as they are, everything else with four decimals."""
    return str(int(value)) if float(value).is_integer() else f"{value:.4f}"


def format_interval(value: float, interval: Sequence[float] | None) -> str:
    """A figure with its interval in brackets, where there is one; the ends of a count's to one decimal."""
    if interval is None:
        return format_figure(value)
    low, high = (f"{end:.1f}".removesuffix(".0") if float(value).is_integer() else f"{end:.4f}" for end in interval)
    return f"{format_figure(value)} ({low} to {high})"


def refusals_text(trial: FrozenTrial, base_refusals: int | None) -> str:
    """A trial's refusals beside the original's, and how many of them are degenerate where any is; `about` where they are an estimate."""
    about = "about " if trial.user_attrs.get("bounded") else ""
    degenerate = trial.user_attrs.get("response_classes", {}).get("degenerate", 0)
    text = f"{about}{trial.user_attrs['refusals']}" + (f"/{base_refusals}" if base_refusals else "")
    return text + (f" ({degenerate} degenerate)" if degenerate else "")


def finalist_rows(front: Sequence[FrozenTrial], known: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the trials of `front` that were scored again, the original first; no rows where none was."""
    scored = [(trial, known["trials"][str(trial.number)]) for trial in front if str(trial.number) in known.get("trials", {})]
    if not scored:
        return [], []
    names = list(known["base"]["scores"])
    rows = [["original", *_cells(known["base"], names)]]
    rows += [[str(trial.number), *_cells(entry, names)] for trial, entry in scored]
    return ["Trial", *map(title_of, names), "Degenerate"], rows


def _cells(entry: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    if "failure" in entry:
        return [entry["failure"], *[""] * len(names)]
    figures = [format_interval(entry["scores"][name], entry["intervals"].get(name)) for name in names]
    return [*figures, str(entry["response_classes"]["degenerate"])]


def score_rows(trial: FrozenTrial, base: Mapping[str, float], known: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of all that is known of a trial: each figure of the original, in the search, and scored again with its interval."""
    original = dict(known.get("base", {}))
    # The search's own figures come first, and win: what only finalists are scored by follows.
    original = {**original, "scores": {**base, **original.get("scores", {}), **base}, "intervals": {}}
    usual = {name: trial.user_attrs[name] for name in ("refusals", "kl_divergence")}
    own = {**trial.user_attrs, "scores": usual | trial.user_attrs.get("scores", {})}
    again = known.get("trials", {}).get(str(trial.number), {})
    return ["", "Original", f"Trial {trial.number}", "Scored again (95 % interval)"], figure_rows([original, own, again])


def figure_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each figure that any of several models has, a column for each model. They are described as by `Score.described`."""

    def cell(model: Mapping[str, Any], group: str, name: str) -> str:
        value = model.get(group, {}).get(name)
        interval = model.get("intervals", {}).get(name) if group == "scores" else None
        return "" if value is None else format_interval(value, interval)

    titles = {name: title_of(name) for model in models for name in model.get("scores", {})}
    rows = [[title, *(cell(model, "scores", name) for model in models)] for name, title in titles.items()]
    for group, names, heading in (("kl_statistics", STATISTICS, "KL divergence, "), ("response_classes", CLASSES, "Responses: ")):
        for name, title in names.items():
            cells = [cell(model, group, name) for model in models]
            if any(cells):
                rows.append([heading + title, *cells])
    return rows


def moved_rows(moved: Sequence[tuple[Prompt, float, float]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of prompts after which a model's words have moved (`Evaluator.most_moved`)."""
    headers = ["Prompt", "KL divergence, first token", "mean along the answer"]
    return headers, [[prompt.user, f"{first:.4f}", f"{mean:.4f}"] for prompt, first, mean in moved]
