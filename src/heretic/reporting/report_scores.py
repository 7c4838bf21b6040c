"""Scores of the search as a table for the report."""

from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial

from ..scoring.figures import Figure
from ..scoring.score_tables import TITLES, format_interval

# Columns that are shown only if a trial has a value: title, attribute, and the key in it.
_OPTIONAL_SCORES = (
    ("KL median", "kl_statistics", "median"),
    ("KL 95th percentile", "kl_statistics", "p95"),
    ("KL maximum", "kl_statistics", "max"),
    ("Sequence KL", "sequence_kl_divergence", None),
    ("Harmless refusals", "harmless_refusals", None),
    ("Complied", "response_classes", "compliance"),
    ("Degenerate", "response_classes", "degenerate"),
)


def score_table(front: Sequence[FrozenTrial], n_bad_prompts: int | None) -> tuple[list[str], list[list[str]]]:
    """Headers and rows with the scores of each trial of the front. Optional columns are shown only if some trial has a value."""
    others = sorted({name for trial in front for name in trial.user_attrs.get("scores", {})} - TITLES.keys())
    optional = [column for column in _OPTIONAL_SCORES if any(_optional(trial, *column[1:]) is not None for trial in front)]
    headers = ["Refusals (95 % interval)" if n_bad_prompts else "Refusals", "KL divergence", *(title for title, _, _ in optional), *others]
    rows = []
    for trial in front:
        refusals = trial.user_attrs["refusals"]
        text = str(refusals)
        if n_bad_prompts:
            interval = Figure.count([i < refusals for i in range(n_bad_prompts)]).interval()
            text = f"{format_interval(refusals, interval)} of {n_bad_prompts}"
        cells = [text, f"{trial.user_attrs['kl_divergence']:.4f}"]
        cells += [_shown(_optional(trial, attribute, key)) for _, attribute, key in optional]
        rows.append(cells + [_shown(trial.user_attrs.get("scores", {}).get(name)) for name in others])
    return headers, rows


def _optional(trial: FrozenTrial, attribute: str, key: str | None) -> Any:
    value = trial.user_attrs.get(attribute)
    return value.get(key) if key is not None and isinstance(value, dict) else value


def _shown(value: float | str | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
