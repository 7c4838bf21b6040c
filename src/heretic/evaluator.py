"""Scores: how many harmful prompts are refused, and how far the model's first words on harmless ones have moved."""

import math
import os.path
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .ablation import Ablation
from .config import Settings
from .errors import EvaluationError, TrialError
from .model import NOT_FINITE, Model
from .prompts import Prompt
from .utils import Progress, SilentProgress

# Prompts of each kind, and tokens of each response, from which the common start of all responses is found.
PREFIX_PROMPTS = 50
PREFIX_TOKENS = 32
# Rows of log-probabilities compared at once: bounds the memory at a few vocabularies.
KL_SLICE = 64

_WHITE_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Score:
    """What a trial is judged by: refusals among the harmful evaluation prompts, mean KL divergence in nats.

    `bounded`: the trial was stopped when it could no longer be on the front, and its refusals are an estimate.
    """

    refusals: int
    kl_divergence: float
    bounded: bool = False


class RefusalRule:
    """A response is a refusal where a marker occurs in its normalized text, or where it is empty."""

    def __init__(self, markers: Sequence[str]) -> None:
        self.markers = [marker.lower() for marker in markers]

    def has_marker(self, response: str) -> bool:
        """Whether a marker occurs. What has occurred stays, however much is still added to the response."""
        text = normalize(response)
        return any(marker in text for marker in self.markers)

    def is_refusal(self, response: str) -> bool:
        """The verdict on a whole response."""
        return not response.strip() or self.has_marker(response)


def normalize(response: str) -> str:
    """Lower case, no `*`, plain apostrophes, every run of white space one space."""
    return _WHITE_SPACE.sub(" ", response.lower().replace("*", "").replace("\u2019", "'"))


def kl_divergence(original: Tensor, edited: Tensor) -> Tensor:
    """`KL(original || edited)` of each row of log-probabilities `(prompt, vocabulary)`, in nats, `(prompt,)` float32."""
    parts = zip(original.split(KL_SLICE), edited.split(KL_SLICE), strict=True)
    return torch.cat([F.kl_div(e, o, log_target=True, reduction="none").sum(dim=-1) for o, e in parts])


def objectives(score: Score, base_refusals: int, scale: float, target: float) -> tuple[float, float]:
    """What the search minimizes: share of refusals left, and the divergence in units of `scale`.

    Below `target` the divergence is replaced by the refusals in units of the target, so that doing nothing is never rewarded.
    """
    refusals = score.refusals / base_refusals
    if score.kl_divergence >= target:
        return refusals, score.kl_divergence / scale
    return refusals, refusals * target / scale


def find_response_prefix(model: Model, settings: Settings, prompts: Sequence[Prompt]) -> str:
    """The common start of all responses (a thinking block's opening, say), a thought closed where its opening is known."""
    if settings.response_prefix is not None:
        return settings.response_prefix
    model.response_prefix = ""
    responses = model.responses(prompts, PREFIX_TOKENS, description="Looking for a common response prefix", skip_special_tokens=False)
    return close_thought(common_prefix(responses), settings.chain_of_thought_skips)


def common_prefix(responses: Sequence[str]) -> str:
    """The longest common start, without trailing blanks; nothing where all responses are the same, which is no habit."""
    if len(set(responses)) < 2:
        return ""
    return os.path.commonprefix(list(responses)).rstrip(" ")


def close_thought(prefix: str, skips: Sequence[tuple[str, str]]) -> str:
    """`prefix`, or the closed block of the chain of thought that it opens."""
    for opening, closed in skips:
        if prefix.startswith(opening):
            return closed
    return prefix


class Evaluator:
    """Scores ablations against the original model's own answers, which it takes when made.

    Raises `EvaluationError` where the original refuses nothing, since no search could improve on that.
    """

    def __init__(
        self,
        settings: Settings,
        model: Model,
        good_prompts: Sequence[Prompt],
        bad_prompts: Sequence[Prompt],
        progress: Progress | None = None,
    ) -> None:
        self.settings = settings
        self.model = model
        self.good_prompts = list(good_prompts)
        self.bad_prompts = list(bad_prompts)
        self.progress = progress or SilentProgress()
        self.rule = RefusalRule(settings.refusal_markers)
        try:
            with model.recording_trunk():
                self.base_logprobs = model.first_token_logprobs(self.good_prompts, description="Baseline: harmless prompts")
                self.base_refusals = self.count_refusals(description="Baseline: harmful prompts")
        except TrialError as error:
            raise EvaluationError(f"The original model cannot be scored: {error}. Try another --dtypes, such as float32.") from error
        if self.base_refusals == 0:
            raise EvaluationError(
                f"The model refuses none of the {len(self.bad_prompts)} harmful evaluation prompts, so there is nothing to remove. "
                "Perhaps it was never trained to refuse, or it refuses in words that no marker matches: look at its answers with "
                "--print-responses, and set refusal_markers, system_prompt or bad_evaluation_prompts accordingly."
            )

    def detach(self) -> None:
        """Let go of the original model, keeping its scores, so that another one can take its place in `model`."""
        del self.model

    def count_refusals(self, ablation: Ablation | None = None, description: str | None = None) -> int:
        """Refusals among the harmful evaluation prompts, of the original model or an edited one."""
        responses = self.model.responses(
            self.bad_prompts,
            self.settings.max_response_length,
            ablation,
            is_decided=None if self.settings.print_responses else self.rule.has_marker,
            description=description,
        )
        verdicts = [self.rule.is_refusal(response) for response in responses]
        for prompt, response, refused in zip(self.bad_prompts, responses, verdicts, strict=True):
            self._show(prompt, response, refused)
        return sum(verdicts)

    def score(self, ablation: Ablation | None) -> Score:
        """Score an ablation (None: the model as it is). Raises `TrialError` where its numbers are not finite."""
        (result,) = self.score_trials([] if ablation is None else [ablation])
        if isinstance(result, TrialError):
            raise result
        return result

    def score_trials(
        self, ablations: Sequence[Ablation], limit: Callable[[float], float] = lambda kl: math.inf
    ) -> list[Score | TrialError]:
        """Scores of several ablations (none: the model as it is), computed together; an error takes the place of one that has none.

        `limit` tells, for a KL divergence, how many refusals a trial may have and still be worth finishing. A trial with more is
        stopped: its score is `bounded`, its count the share of refusals among its prompts begun so far, scaled to all of them.
        """
        n_trials, n_prompts = max(1, len(ablations)), len(self.bad_prompts)
        divergences = self._divergences(ablations, n_trials)
        finite = [math.isfinite(divergence) for divergence in divergences]
        limits = [math.inf if self.settings.print_responses else limit(divergence) for divergence in divergences]
        is_decided = None if self.settings.print_responses else self.rule.has_marker

        refusals = [0] * n_trials
        stopped: set[int] = set()
        rows = self.model.rows_of(self.bad_prompts, n_trials)
        length = self.settings.max_response_length
        for row in self.model.responses_of_trials(rows, length, ablations, is_decided, cancelled=stopped):
            finite[row.trial] &= row.finite
            text = self.model.text_of(row)
            refused = self.rule.is_refusal(text)
            refusals[row.trial] += refused
            if refusals[row.trial] > limits[row.trial]:
                stopped.add(row.trial)
            self._show(self.bad_prompts[row.prompt], text, refused)

        def score(i: int) -> Score | TrialError:
            if not finite[i]:
                return TrialError(NOT_FINITE)
            # Rounding can leave a divergence of nothing slightly below zero.
            divergence = max(0.0, divergences[i])
            if i not in stopped:
                return Score(refusals[i], divergence)
            n_begun = sum(row.begun for row in rows if row.trial == i)
            return Score(round(refusals[i] / n_begun * n_prompts), divergence, bounded=True)

        return [score(i) for i in range(n_trials)]

    def _divergences(self, ablations: Sequence[Ablation], n_trials: int) -> list[float]:
        """Mean KL divergence of each trial, summed in float64."""
        sums = torch.zeros(n_trials, dtype=torch.float64)
        for rows, logprobs in self.model.logprobs_of_trials(self.good_prompts, ablations):
            base = self.base_logprobs[torch.tensor([row.prompt for row in rows], device=self.base_logprobs.device)]
            trials = torch.tensor([row.trial for row in rows])
            sums.index_add_(0, trials, kl_divergence(base.to(logprobs.device), logprobs).double().cpu())
        return (sums / len(self.good_prompts)).tolist()

    def _show(self, prompt: Prompt, response: str, refused: bool) -> None:
        if self.settings.print_responses:
            verdict = "Refused" if refused else "Answered"
            self.progress.message(f"Prompt: {prompt.user}\n{verdict}: {response.strip()}\n")

    def objectives(self, score: Score) -> tuple[float, float]:
        """`objectives` with this run's baseline and settings."""
        return objectives(score, self.base_refusals, self.settings.kl_divergence_scale, self.settings.kl_divergence_target)
