"""Responses of the original and of the front's trials to a few prompts, stored with the study for reports."""

from collections.abc import Callable, Sequence

from optuna.trial import FrozenTrial

from ..editing.ablation import Ablation
from ..model import NOT_FINITE, Model
from ..prompts import Prompt
from ..scoring.responses import RefusalRule
from ..utils import JsonObject

HARMFUL_SAMPLES, HARMLESS_SAMPLES = 3, 2
# Of a longer front, this many evenly spaced trials are sampled, including both ends.
SAMPLED_TRIALS = 8

# The study attribute `samples`: {"prompts": [...], "original": [...], "trials": {"25": [...]}, "verdicts": {"original": [...], ...}}.
# A verdict describes a response in words.
Samples = JsonObject


def sample_prompts(good: Sequence[Prompt], bad: Sequence[Prompt]) -> list[Prompt]:
    """The evaluation prompts whose responses are stored: some harmful ones, then some harmless ones."""
    return [*bad[:HARMFUL_SAMPLES], *good[:HARMLESS_SAMPLES]]


def sampled(front: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials of a front whose responses are stored: all, or `SAMPLED_TRIALS` evenly spaced ones."""
    if len(front) <= SAMPLED_TRIALS:
        return list(front)
    return [front[round(i * (len(front) - 1) / (SAMPLED_TRIALS - 1))] for i in range(SAMPLED_TRIALS)]


def take_samples(
    model: Model,
    rule: RefusalRule,
    prompts: Sequence[Prompt],
    front: Sequence[FrozenTrial],
    max_new_tokens: int,
    kept: Samples,
    ablation_of: Callable[[FrozenTrial], Ablation],
) -> Samples:
    """`kept`, completed with responses of the trials of `front`. Responses to other prompts are dropped."""
    texts = [prompt.user for prompt in prompts]
    if kept.get("prompts") != texts:
        kept = {}
    trials = dict(kept.get("trials", {}))
    missing = [trial for trial in sampled(front) if str(trial.number) not in trials]
    if kept and not missing:
        return kept
    original = kept.get("original") or _responses(model, prompts, [], max_new_tokens, "Responses of the original")[0]
    if missing:
        ablations = [ablation_of(trial) for trial in missing]
        told = "1 trial" if len(missing) == 1 else f"{len(missing)} trials"
        found = _responses(model, prompts, ablations, max_new_tokens, f"Responses of {told} of the front")
        trials |= {str(trial.number): responses for trial, responses in zip(missing, found, strict=True)}
    verdicts = {name: [rule.described(text, is_cut_off=True) for text in found] for name, found in {"original": original, **trials}.items()}
    return {"prompts": texts, "original": original, "trials": trials, "verdicts": verdicts}


def _responses(
    model: Model, prompts: Sequence[Prompt], ablations: Sequence[Ablation], max_new_tokens: int, description: str
) -> list[list[str]]:
    found = model.responses_by_trial(prompts, max_new_tokens, ablations, description)
    return [[f"({NOT_FINITE})" if text is None else text.strip() for text in texts] for texts in found]
