"""KL divergences of an edited model at every token of the original's own responses to harmless prompts.

The responses are generated once. An edited model gets prompt and response in one pass (teacher forcing). Position 0 predicts the first
token of the response, so this includes the first-token divergence.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding.rows import Row
from ..device import free_memory, upload
from ..editing.ablation import Ablation
from ..errors import EvaluationError, TrialError
from ..model import NOT_FINITE, Model
from ..prompts import Prompt
from ..utils import Progress, format_size

# Rows of log-probabilities compared at once: limits memory to a few vocabularies.
KL_SLICE = 64
# The original's logits are kept on the model's device, or in main memory, if they take at most this share of the free memory there.
DEVICE_SHARE = 0.1
MEMORY_SHARE = 0.5


def kl_divergence(original: Tensor, edited: Tensor) -> Tensor:
    """`KL(original || edited)` of each row of log-probabilities `(prompt, vocabulary)`, in nats, `(prompt,)` float32."""
    parts = zip(original.split(KL_SLICE), edited.split(KL_SLICE), strict=True)
    return torch.cat([F.kl_div(e, o, log_target=True, reduction="none").sum(dim=-1) for o, e in parts])


@dataclass(frozen=True)
class Divergences:
    """KL divergences of one model from the original, in nats: `values (prompt, token)` float64, NaN after the end of a response.

    Token 0 is the first one of the response; the end-of-sequence token is included.
    """

    values: np.ndarray

    @property
    def first_token(self) -> np.ndarray:
        """At the first token, `(prompt,)`."""
        first: np.ndarray = self.values[:, 0]
        return first

    @property
    def n_tokens(self) -> np.ndarray:
        """Number of tokens compared in each response, `(prompt,)`."""
        counts: np.ndarray = (~np.isnan(self.values)).sum(axis=1)
        return counts

    @property
    def sums(self) -> np.ndarray:
        """The sum over each response's tokens, `(prompt,)`."""
        sums: np.ndarray = np.nansum(self.values, axis=1)
        return sums


def _on_disk(folder: Path, n_bytes: int) -> np.ndarray:
    """A buffer in an unnamed temporary file, which disappears with it. Raises `OSError` if the disk is full."""
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # else a full disk would kill the process when it writes
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        return np.memmap(file, dtype=np.uint8, mode="r+", shape=(n_bytes,))


def statistics(values: np.ndarray) -> dict[str, float]:
    """Median, 95th percentile and maximum besides the mean, which hides heavy tails."""
    return {
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": float(np.max(values)),
    }


class OriginalAnswers:
    """The original model's responses to `prompts`, `n_tokens` of each, and its logits along them, computed on construction.

    Logits are stored in the model's dtype, without loss, with each row's logsumexp in float32. For 100 prompts, 16 tokens and a vocabulary
    of 128k they take 410 MB in bfloat16. If that is more than a tenth of the free memory of the model's device, they are stored in main
    memory; if it is more than half of that, in a file in `folder`. Raises `TrialError` if logits are not finite, and `EvaluationError` if
    they do not fit anywhere. `name`: what the model is called in messages.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        n_tokens: int,
        description: str | None = None,
        folder: Path = Path(),
        name: str = "original",
    ) -> None:
        self.prompts = list(prompts)
        self.folder = folder
        self.name = name
        self.n_tokens = n_tokens
        # The first token needs no response: it is predicted at the prompt's last position.
        self.answers: list[list[int]] = [[] for _ in prompts] if n_tokens == 1 else self._answer(model, description)
        self.n_positions = [len(answer) + 1 for answer in self.answers]
        self._starts = np.cumsum([0, *self.n_positions])

    def _answer(self, model: Model, description: str | None) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in self.prompts]
        rows = model.rows_of(self.prompts, 1)
        for row in model.responses_of_trials(rows, self.n_tokens, [], description=description):
            if not row.finite:
                raise TrialError(NOT_FINITE)
            answers[row.prompt] = row.generated[: self.n_tokens - 1]  # the last token is predicted, not input
        return answers

    def record(self, model: Model, description: str | None = None, ablation: Ablation | None = None) -> None:
        """Store the logits of the original, or of an ablation that takes its place, along its responses."""
        self._logits = self._normalizers = torch.empty(0)
        ablations = [] if ablation is None else [ablation]
        for rows, logits in model.logits_along(self.prompts, self.answers, ablations, description):
            if not torch.isfinite(logits).all():
                raise TrialError(NOT_FINITE)
            if not len(self._logits):
                self._logits = self._room_for(logits, model.progress)
                self._normalizers = torch.empty(len(self._logits), device=logits.device)
            for row, own in zip(rows, logits.split([self.n_positions[row.prompt] for row in rows]), strict=True):
                place = slice(self._starts[row.prompt], self._starts[row.prompt + 1])
                self._logits[place] = own.to(self._logits.device)
                self._normalizers[place] = torch.cat([torch.logsumexp(part.float(), dim=-1) for part in own.split(KL_SLICE)])

    def _room_for(self, logits: Tensor, progress: Progress) -> Tensor:
        """An empty buffer `(position, vocabulary)` for all logits: on their device, in main memory, or on the disk."""
        n, width = int(self._starts[-1]), logits.shape[-1]
        n_bytes = n * width * logits.element_size()
        if n_bytes <= DEVICE_SHARE * free_memory(logits.device):
            return torch.empty(n, width, dtype=logits.dtype, device=logits.device)
        if n_bytes <= MEMORY_SHARE * free_memory(torch.device("cpu")):
            return torch.empty(n, width, dtype=logits.dtype)
        size = format_size(n_bytes)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = _on_disk(self.folder, n_bytes)
        except OSError as error:
            fewer = ", or decrease kl_tokens" if self.n_tokens > 1 else ""
            raise EvaluationError(
                f"The {self.name}'s logits, which others are compared with, take {size}. They fit neither in memory nor in "
                f"{self.folder}: {error.strerror}. Use fewer good_evaluation_prompts{fewer}."
            ) from error
        progress.message(
            f"The {self.name}'s logits take {size}, too much for memory. They are stored in a temporary file in {self.folder}."
        )
        return torch.from_numpy(content).view(logits.dtype).view(n, width)

    @property
    def vocabulary_size(self) -> int:
        """Number of logits at each token."""
        return self._logits.shape[-1]

    def _logprobs(self, index: Tensor) -> Tensor:
        """Log-probabilities `(len(index), vocabulary)` in float32 at the given positions (a CPU tensor)."""
        device = self._normalizers.device
        here = upload(index, device)
        logits = self._logits[here] if self._logits.device == device else upload(self._logits[index], device)
        return logits.float() - self._normalizers[here, None]

    def first_token_logprobs(self) -> Tensor:
        """Log-probabilities `(prompt, vocabulary)` of the first tokens, float32."""
        return self._logprobs(torch.from_numpy(self._starts[:-1]))

    def divergences(self, model: Model, ablations: Sequence[Ablation], description: str | None = None) -> list[Divergences]:
        """Divergences of each ablation (none: the unedited model), in one pass. NaN at the first token marks non-finite logits."""
        n_trials, n_prompts = max(1, len(ablations)), len(self.prompts)
        values = np.full((n_trials, n_prompts, max(self.n_positions)), np.nan)
        found_rows: list[Row] = []
        found: list[Tensor] = []
        for rows, logits in model.logits_along(self.prompts, self.answers, ablations, description):
            index = np.concatenate([np.arange(self._starts[row.prompt], self._starts[row.prompt + 1]) for row in rows])
            parts = zip(torch.from_numpy(index).split(KL_SLICE), logits.split(KL_SLICE), strict=True)
            found_rows += rows
            found += [self._slice(positions, part) for positions, part in parts]
        flat = torch.cat(found).cpu().double().numpy()  # one synchronization for all passes; not every accelerator has float64
        ends = np.cumsum([self.n_positions[row.prompt] for row in found_rows])
        for row, own in zip(found_rows, np.split(flat, ends[:-1]), strict=True):
            # Rounding can make a zero divergence slightly negative.
            values[row.trial, row.prompt, : len(own)] = np.maximum(own, 0) if np.isfinite(own).all() else np.nan
        return [Divergences(trial) for trial in values]

    def _slice(self, positions: Tensor, logits: Tensor) -> Tensor:
        original = self._logprobs(positions).to(logits.device)
        return kl_divergence(original, torch.log_softmax(logits.float(), dim=-1))
