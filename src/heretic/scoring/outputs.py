"""Outputs of edited models: divergences and responses of a batch of trials, computed lazily and cached.

A scorer sees one trial at a time (`Outputs`). What it requests is computed for all trials of the batch together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from ..decoding.rows import Row
from ..editing.ablation import Ablation
from ..model import Model
from ..prompts import Prompt
from .divergence import Divergences, OriginalAnswers
from .responses import Kind, RefusalRule, Response, counts_against


@dataclass
class Batch:
    """Several trials, or the unedited model if there is no ablation. Trials that are `stopped` or not `finite` are not computed further.

    `original_kinds`: the kinds of the original's full responses to the harmful prompts; None if this is the original. `whole_verdicts`:
    responses are judged by their full text, not by their beginnings.
    """

    model: Model
    answers: OriginalAnswers
    rule: RefusalRule
    good_prompts: Sequence[Prompt]
    bad_prompts: Sequence[Prompt]
    max_response_length: int
    ablations: Sequence[Ablation]
    original_kinds: Sequence[Kind] | None = None
    whole_responses: bool = False
    whole_verdicts: bool = False
    show: Callable[[Prompt, Response], None] = lambda prompt, response: None
    description: str | None = None
    stopped: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.n_trials = max(1, len(self.ablations))
        self.finite = [True] * self.n_trials
        self.n_begun = [0] * self.n_trials
        self._harmful: list[list[Response]] | None = None
        self._responses: dict[tuple[tuple[Prompt, ...], int], dict[int, list[Response]]] = {}
        self._logprobs: dict[tuple[Prompt, ...], dict[int, torch.Tensor]] = {}

    @cached_property
    def divergences(self) -> list[Divergences]:
        """The divergences of every trial."""
        result = self.answers.divergences(self.model, self.ablations)
        for i, divergences in enumerate(result):
            self.finite[i] &= bool(np.isfinite(divergences.first_token).all())
        return result

    def harmful(self, limits: Sequence[float] | None = None) -> list[list[Response]]:
        """Responses to the harmful prompts, trial by trial, in the order of the prompts.

        A trial with more failures than its limit is stopped. Responses may end once they are decided, unless `whole_responses`.
        """
        if self._harmful is not None:
            return self._harmful
        limits = limits or [math.inf] * self.n_trials
        failures = [0] * self.n_trials
        found: list[list[Response]] = [[] for _ in range(self.n_trials)]
        rows = self.model.rows_of(self.bad_prompts, self.n_trials)
        is_decided = None if self.whole_responses else self.rule.is_decided
        length = self.max_response_length
        for row in self.model.responses_of_trials(rows, length, self.ablations, is_decided, self.description, cancelled=self.stopped):
            self.finite[row.trial] &= row.finite
            original = None if self.original_kinds is None else self.original_kinds[row.prompt]
            response = self._response(row, length, original)
            found[row.trial].append(response)
            failures[row.trial] += response.is_failure
            if failures[row.trial] > limits[row.trial]:
                self.stopped.add(row.trial)
            if self.ablations:
                self.show(self.bad_prompts[row.prompt], response)
        self.n_begun = [sum(row.begun for row in rows if row.trial == i) for i in range(self.n_trials)]
        self._harmful = [sorted(responses, key=lambda response: response.prompt) for responses in found]
        if not self.ablations:  # the original's are printed once, in order
            for response in self._harmful[0]:
                self.show(self.bad_prompts[response.prompt], response)
        return self._harmful

    def _response(self, row: Row, length: int, original: Kind | None, is_whole: bool = False) -> Response:
        """The response of a finished row. `original`: kind of the original's response to the prompt (None: unknown, or the original)."""
        text = self.model.text_of(row.generated)
        is_cut_off = len(row.generated) >= length
        early = self.rule.judge(text, is_cut_off).kind
        whole = self.rule.classify(text, is_cut_off) if self.whole_responses or is_whole else None
        kind = whole if whole is not None and (self.whole_verdicts or is_whole) else early
        return Response(row.prompt, text, kind, counts_against(kind, original or "degenerate"), early, whole)

    def _active_trials(self) -> list[int]:
        return [i for i in range(self.n_trials) if self.finite[i] and i not in self.stopped]

    def _ablations_of(self, trials: Sequence[int]) -> list[Ablation]:
        return [self.ablations[i] for i in trials] if self.ablations else []

    def responses(self, trial: int, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Response]:
        """Full responses of a trial to other prompts."""
        key = tuple(prompts), max_new_tokens
        if trial not in self._responses.get(key, {}):
            active = sorted({*self._active_trials(), trial})
            found: dict[int, list[Response]] = {i: [] for i in active}
            rows = self.model.rows_of(prompts, len(active))
            for row in self.model.responses_of_trials(rows, max_new_tokens, self._ablations_of(active)):
                self.finite[active[row.trial]] &= row.finite
                found[active[row.trial]].append(self._response(row, max_new_tokens, None, is_whole=True))
            self._responses[key] = {i: sorted(own, key=lambda response: response.prompt) for i, own in found.items()}
        return self._responses[key][trial]

    def logprobs(self, trial: int, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Log-probabilities `(prompt, vocabulary)` of a trial's first tokens after other prompts, float32."""
        key = tuple(prompts)
        if trial not in self._logprobs.get(key, {}):
            active = sorted({*self._active_trials(), trial})
            parts: dict[int, dict[int, torch.Tensor]] = {i: {} for i in active}
            for rows, logprobs in self.model.logprobs_of_trials(prompts, self._ablations_of(active)):
                for row, own in zip(rows, logprobs, strict=True):
                    parts[active[row.trial]][row.prompt] = own
            self._logprobs[key] = {i: torch.stack([own[j] for j in range(len(prompts))]) for i, own in parts.items()}
        return self._logprobs[key][trial]

    def outputs(self, trial: int = 0) -> "Outputs":
        """The outputs of one trial, for a scorer."""
        return Outputs(self, trial)


@dataclass(frozen=True)
class Outputs:
    """The outputs of one trial, or of the original, as scorers see them. They are computed by `batch` on request."""

    batch: Batch
    trial: int

    @property
    def good_prompts(self) -> Sequence[Prompt]:
        """The harmless evaluation prompts."""
        return self.batch.good_prompts

    @property
    def bad_prompts(self) -> Sequence[Prompt]:
        """The harmful evaluation prompts."""
        return self.batch.bad_prompts

    @property
    def divergences(self) -> Divergences:
        """KL divergences from the original along its responses to the harmless prompts."""
        return self.batch.divergences[self.trial]

    @property
    def harmful_responses(self) -> list[Response]:
        """Responses to the harmful prompts, in their order. They are complete for the original, and if a scorer `needs_whole_responses`."""
        return self.batch.harmful()[self.trial]

    @property
    def harmless_responses(self) -> list[Response]:
        """Full responses to the harmless prompts, in their order. They need a second generation, longer than for the harmful prompts."""
        return self.responses(self.good_prompts)

    def responses(self, prompts: Sequence[Prompt], max_new_tokens: int | None = None) -> list[Response]:
        """Full responses to other prompts."""
        return self.batch.responses(self.trial, prompts, max_new_tokens or self.batch.max_response_length)

    def logprobs(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Log-probabilities `(prompt, vocabulary)` of the first response token after other prompts, float32, on the model's device."""
        return self.batch.logprobs(self.trial, prompts)
