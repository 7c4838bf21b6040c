"""How far an edited model's words have moved: KL divergences at every token of the original's own answers to harmless prompts.

The answers are made once. An edited model is given prompt and answer in one pass (teacher forcing); position 0 predicts the answer's first
token, so the first-token divergence comes with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import free_memory
from ..editing.ablation import Ablation
from ..errors import TrialError
from ..model import NOT_FINITE, Model
from ..prompts import Prompt

# Rows of log-probabilities compared at once: bounds the memory at a few vocabularies.
KL_SLICE = 64
# The original's logits stay on the model's device while they take no more than this share of what is free there.
DEVICE_SHARE = 0.1


def kl_divergence(original: Tensor, edited: Tensor) -> Tensor:
    """`KL(original || edited)` of each row of log-probabilities `(prompt, vocabulary)`, in nats, `(prompt,)` float32."""
    parts = zip(original.split(KL_SLICE), edited.split(KL_SLICE), strict=True)
    return torch.cat([F.kl_div(e, o, log_target=True, reduction="none").sum(dim=-1) for o, e in parts])


@dataclass(frozen=True)
class Divergences:
    """KL divergences of one model from the original, in nats: `values (prompt, token)` float64, NaN beyond an answer's end.

    Token 0 is the first of the answer; the token that ends an answer counts as one.
    """

    values: np.ndarray

    @property
    def first_token(self) -> np.ndarray:
        """At the first token, `(prompt,)`."""
        first: np.ndarray = self.values[:, 0]
        return first

    @property
    def n_tokens(self) -> np.ndarray:
        """How many tokens of each answer were looked at, `(prompt,)`."""
        counts: np.ndarray = (~np.isnan(self.values)).sum(axis=1)
        return counts

    @property
    def sums(self) -> np.ndarray:
        """The sum over each answer's tokens, `(prompt,)`."""
        sums: np.ndarray = np.nansum(self.values, axis=1)
        return sums


def statistics(values: np.ndarray) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum: the mean hides a heavy tail."""
    return {
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": float(np.max(values)),
    }


class OriginalAnswers:
    """The original model's answers to `prompts`, `n_tokens` of each, and its logits along them; both made when this is made.

    Logits are kept in the number format in which the model gives them, so nothing is lost, with the logarithm of each row's sum of
    exponentials in float32. For 100 prompts, 16 tokens and a vocabulary of 128k that is 410 MB in bfloat16; where it is more than a
    tenth of what is free on the model's device it lies in main memory. Raises `TrialError` where logits are not finite.
    """

    def __init__(self, model: Model, prompts: Sequence[Prompt], n_tokens: int, description: str | None = None) -> None:
        self.prompts = list(prompts)
        self.n_tokens = n_tokens
        # One token needs no answer: its position is the prompt's last.
        self.answers: list[list[int]] = [[] for _ in prompts] if n_tokens == 1 else self._answer(model, description)
        self.n_positions = [len(answer) + 1 for answer in self.answers]
        self._starts = np.cumsum([0, *self.n_positions])

    def _answer(self, model: Model, description: str | None) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in self.prompts]
        rows = model.rows_of(self.prompts, 1)
        for row in model.responses_of_trials(rows, self.n_tokens, [], description=description):
            if not row.finite:
                raise TrialError(NOT_FINITE)
            answers[row.prompt] = row.generated[: self.n_tokens - 1]  # the last token is predicted, and not given
        return answers

    def record(self, model: Model, description: str | None = None) -> None:
        """Take the original's logits along its answers."""
        parts: dict[int, Tensor] = {}
        for rows, logits in model.logits_along(self.prompts, self.answers, [], description):
            for row, own in zip(rows, logits.split([self.n_positions[row.prompt] for row in rows]), strict=True):
                parts[row.prompt] = own
        logits = torch.cat([parts[i] for i in range(len(self.prompts))])
        self._normalizers = torch.cat([torch.logsumexp(part.float(), dim=-1) for part in logits.split(KL_SLICE)])
        if not torch.isfinite(logits).all():
            raise TrialError(NOT_FINITE)
        n_bytes = logits.numel() * logits.element_size()
        self._logits = logits if n_bytes <= DEVICE_SHARE * free_memory(logits.device) else logits.cpu()

    def _logprobs(self, index: Tensor) -> Tensor:
        """Log-probabilities `(len(index), vocabulary)` in float32 at some of all positions."""
        logits = self._logits[index.to(self._logits.device)].to(self._normalizers.device)
        return logits.float() - self._normalizers[index.to(self._normalizers.device), None]

    def first_token_logprobs(self) -> Tensor:
        """Log-probabilities `(prompt, vocabulary)` of the first tokens, float32."""
        return self._logprobs(torch.from_numpy(self._starts[:-1]))

    def divergences(self, model: Model, ablations: Sequence[Ablation]) -> list[Divergences]:
        """Of each ablation (none: the model as it is), all of them in one pass; NaN at the first token marks logits that are not finite."""
        n_trials, n_prompts = max(1, len(ablations)), len(self.prompts)
        values = np.full((n_trials, n_prompts, max(self.n_positions)), np.nan)
        for rows, logits in model.logits_along(self.prompts, self.answers, ablations):
            index = np.concatenate([np.arange(self._starts[row.prompt], self._starts[row.prompt + 1]) for row in rows])
            parts = zip(torch.from_numpy(index).split(KL_SLICE), logits.split(KL_SLICE), strict=True)
            divergences = [self._slice(positions, part) for positions, part in parts]
            flat = torch.cat(divergences).double().cpu().numpy()
            for row, own in zip(rows, np.split(flat, np.cumsum([self.n_positions[row.prompt] for row in rows])[:-1]), strict=True):
                # Rounding can leave a divergence of nothing slightly below zero.
                values[row.trial, row.prompt, : len(own)] = np.maximum(own, 0) if np.isfinite(own).all() else np.nan
        return [Divergences(trial) for trial in values]

    def _slice(self, positions: Tensor, logits: Tensor) -> Tensor:
        original = self._logprobs(positions).to(logits.device)
        return kl_divergence(original, torch.log_softmax(logits.float(), dim=-1))
