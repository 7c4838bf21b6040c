"""Scores of finalists as tables of texts: those of the search, and those of scoring again, with their intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

NORMAL_95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution

TITLES = {
    "refusals": "Refusals",
    "kl_divergence": "KL divergence",
    "sequence_kl_divergence": "Sequence KL",
    "harmless_refusals": "Harmless refusals",
}


def wilson_interval(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share `count / n` (Wilson 1927), from independent yes-or-no answers."""
    share, z = count / n, NORMAL_95
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


# Columns that stand only where a trial says something: title, attribute, and the key in it.
_OPTIONAL_SCORES = (
    ("KL median", "kl_statistics", "median"),
    ("KL 95th percentile", "kl_statistics", "p95"),
    ("KL maximum", "kl_statistics", "max"),
    ("Sequence KL", "sequence_kl_divergence", None),
    ("Harmless refusals", "harmless_refusals", None),
    ("Complied", "response_classes", "compliance"),
    ("Degenerate", "response_classes", "degenerate"),
)


def title_of(name: str) -> str:
    """A score's name as the title of a column."""
    return TITLES.get(name, name)


def score_table(front: Sequence[FrozenTrial], n_bad_prompts: int | None) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of what the search found of each finalist, in columns that stand only where some trial says something."""
    others = sorted({name for trial in front for name in trial.user_attrs.get("scores", {})} - TITLES.keys())
    optional = [column for column in _OPTIONAL_SCORES if any(_optional(trial, *column[1:]) is not None for trial in front)]
    interval = ["95 % interval"] if n_bad_prompts else []
    headers = ["Refusals", *interval, "KL divergence", *(title for title, _, _ in optional), *others]
    rows = []
    for trial in front:
        refusals = trial.user_attrs["refusals"]
        cells = [f"{refusals}" + (f" of {n_bad_prompts}" if n_bad_prompts else "")]
        if n_bad_prompts:
            low, high = wilson_interval(refusals, n_bad_prompts)
            cells.append(f"{low:.1%} to {high:.1%}")
        cells.append(f"{trial.user_attrs['kl_divergence']:.4f}")
        cells += [_shown(_optional(trial, attribute, key)) for _, attribute, key in optional]
        rows.append(cells + [_shown(trial.user_attrs.get("scores", {}).get(name)) for name in others])
    return headers, rows


def _optional(trial: FrozenTrial, attribute: str, key: str | None) -> Any:
    value = trial.user_attrs.get(attribute)
    return value.get(key) if key is not None and isinstance(value, dict) else value


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def finalist_table(front: Sequence[FrozenTrial], known: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the finalists that were scored again, the original first; no rows where none was.

    `known` is what the study holds under `finalists`: `{"base": {"scores", "intervals", "response_classes"}, "trials": {"25": the same}}`.
    A trial that could not be scored says why (`failure`).
    """
    trials = known.get("trials", {})
    scored = [(f"Trial {trial.number}", trials[str(trial.number)]) for trial in front if str(trial.number) in trials]
    if not scored:
        return [], []
    entries = [("Original", known.get("base", {})), *scored]
    names = list(dict.fromkeys(name for _, entry in entries for name in entry.get("scores", {})))
    rows = [[title, *_cells(entry, names)] for title, entry in entries]
    return ["", *map(title_of, names), "Degenerate"], rows


def _cells(entry: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    if "failure" in entry:
        return [entry["failure"], *[""] * len(names)]
    scores, intervals = entry.get("scores", {}), entry.get("intervals", {})
    degenerate = entry.get("response_classes", {}).get("degenerate")
    return [*(_with_interval(scores.get(name), intervals.get(name)) for name in names), _shown(degenerate)]


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """Counts as whole numbers, the ends of their intervals to one decimal; everything else to four."""
    if value is None:
        return "–"
    whole = float(value).is_integer()
    text = f"{value:.0f}" if whole else f"{value:.4f}"
    if interval is None:
        return text
    low, high = (f"{end:.1f}".removesuffix(".0") if whole else f"{end:.4f}" for end in interval)
    return f"{text} ({low} to {high})"
