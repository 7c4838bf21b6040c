"""Passes of the gradient: the loss of rows under an edit, as many at a time as fit in memory.

A row is given with what it adds to the loss (`Term`). Memory is bounded by the tokens of a pass; when it runs out, layers are computed
twice (gradient checkpointing), then rows are halved.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..device import empty_cache, free_memory, is_out_of_memory
from ..editing.learning import LearnableEdit
from ..errors import LearningError
from ..model import Model
from ..utils import first_line

# Tokens in a pass: bounds its activations.
PASS_TOKENS = {"cpu": 2048}
PASS_TOKENS_ACCELERATOR = 8192
# The share of free memory that the original's probabilities may take; others are computed again.
REMEMBERED_SHARE = 0.1

Key = tuple[tuple[int, ...], int]


@dataclass(frozen=True, eq=False)
class Term:
    """A row of a step: its input, how many logits at its end are looked at, and what it adds to the loss given log-probabilities
    `(n, vocabulary)` of the edited model and of the original: to what is held, and to the refusals."""

    tokens: tuple[int, ...]
    n: int
    loss: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
    needs_original: bool


@dataclass(frozen=True)
class Losses:
    """What an edit changes that is to be held, and how much it still refuses."""

    held: float
    refusing: float

    def weighted(self, weight: float) -> float:
        """The loss."""
        return self.held + weight * self.refusing


class Passes:
    """Passes of a model through the maps of an edit."""

    def __init__(self, model: Model, edit: LearnableEdit) -> None:
        self.model, self.edit = model, edit
        self.originals = Originals(self.original_logprobs, REMEMBERED_SHARE * free_memory(torch.device("cpu")))
        self.tokens = PASS_TOKENS.get(model.device.type, PASS_TOKENS_ACCELERATOR)
        self.checkpoints = any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in model.model.modules())

    def total(self, terms: Sequence[Term], weight: float | None = None) -> Losses:
        """The losses of some terms under the edit; or where its last step ended, with their gradients, if the refusals have a `weight`."""
        originals = self.originals.of([term for term in terms if term.needs_original])
        losses: list[Losses] = []
        self._in_passes(terms, lambda part: losses.append(self._pass(part, originals, weight)))
        return Losses(sum(loss.held for loss in losses), sum(loss.refusing for loss in losses))

    def _in_passes(self, terms: Sequence[Term], work: Callable[[Sequence[Term]], None]) -> None:
        """Do the work, as many rows at a time as fit."""
        waiting = sorted(terms, key=lambda term: -len(term.tokens))
        while waiting:
            n = self._rows_that_fit(waiting)
            part = waiting[:n] if self.model.pads else [term for term in waiting[:n] if len(term.tokens) == len(waiting[0].tokens)]
            try:
                work(part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._need_less(part, error)
            else:
                waiting = waiting[len(part) :]
                continue
            empty_cache()

    def _rows_that_fit(self, waiting: Sequence[Term]) -> int:
        """How many of these terms a pass may have, the longest first: packed, or padded to the first one's length."""
        longest = len(waiting[0].tokens)
        lengths = [len(term.tokens) if longest <= self.model.packed_length else longest for term in waiting]
        return max(1, sum(total <= self.tokens for total in accumulate(lengths)))

    def _need_less(self, part: Sequence[Term], error: BaseException) -> None:
        """Keep fewer activations after memory has run out: layers are computed twice, then rows are halved."""
        if not self.checkpoints:
            self.checkpoints = True
        elif len(part) == 1:
            raise LearningError("memory does not suffice for the gradient of a single prompt") from error
        else:
            self.tokens = sum(len(term.tokens) for term in part) // 2

    def _pass(self, terms: Sequence[Term], originals: dict[Term, Tensor], weight: float | None) -> Losses:
        assert self.model.hooks is not None
        before = [parameter.grad for parameter in (self.edit.directions, self.edit.strengths)]
        kept = [None if grad is None else grad.clone() for grad in before]
        try:
            with torch.set_grad_enabled(weight is not None), ExitStack() as stack:
                stack.enter_context(self.model.hooks.mapping(self.edit.maps(of_average=weight is None)))
                if self.checkpoints and weight is not None:
                    stack.enter_context(checkpointed(self.model.architecture.layers))
                losses = []
                for term, logits in zip(terms, self._logits(terms), strict=True):
                    edited = torch.log_softmax(logits.float(), dim=-1)
                    original = originals.get(term)
                    losses.append(term.loss(edited, None if original is None else original.to(edited.device)))
                held, refusing = (torch.stack(own).sum() for own in zip(*losses, strict=True))
                if weight is not None:
                    _backward(held + weight * refusing)
        except (RuntimeError, MemoryError):  # what a pass that was cut off has added would count twice
            self.edit.directions.grad, self.edit.strengths.grad = kept
            raise
        return Losses(held.item(), refusing.item())

    def _logits(self, terms: Sequence[Term]) -> list[Tensor]:
        """Logits `(n, vocabulary)` at the end of each term."""
        rows, counts = [term.tokens for term in terms], [term.n for term in terms]
        if max(map(len, rows)) <= self.model.packed_length:
            return self.model.packed_logits(rows, counts, by_row=not self.checkpoints)
        logits = self.model.logits_at_end(rows, max(counts))
        return [own[len(own) - n :] for own, n in zip(logits, counts, strict=True)]

    def original_logprobs(self, terms: Sequence[Term]) -> list[Tensor]:
        """Log-probabilities `(n, vocabulary)` of the original at the ends of the terms, float32 on the CPU."""
        found: dict[Term, Tensor] = {}

        def work(part: Sequence[Term]) -> None:
            with torch.no_grad():
                for term, logits in zip(part, self._logits(part), strict=True):
                    found[term] = torch.log_softmax(logits.float(), dim=-1).cpu()

        self._in_passes(terms, work)
        return [found[term] for term in terms]


class Originals:
    """The original's log-probabilities by row, remembered up to `max_bytes`, others computed again."""

    def __init__(self, compute: Callable[[Sequence[Term]], list[Tensor]], max_bytes: float) -> None:
        self._compute = compute
        self._max_bytes = max_bytes
        self._kept: dict[Key, Tensor] = {}
        self._bytes_per_logit = 0.0
        self.forget()

    def keep(self, terms: Sequence[Term]) -> None:
        """Compute those of rows that are always needed, unless they take more than half of the room."""
        first = self._compute(terms[:1])
        self._bytes_per_logit = first[0].nbytes / terms[0].n
        if sum(term.n for term in terms) * self._bytes_per_logit > self._max_bytes / 2:
            return
        self._kept = self._computed(terms)
        self.forget()

    def forget(self) -> None:
        """Forget all but what is kept."""
        self._room = self._max_bytes - sum(own.nbytes for own in self._kept.values())
        self._known = dict(self._kept)

    def remember(self, terms: Sequence[Term]) -> None:
        """Compute those of rows that are needed soon, all at once, which is faster than with each step; as many as there is room for."""
        missing = self._missing(terms)
        needed = accumulate(term.n * self._bytes_per_logit for term in missing)
        self._add(self._computed([term for term, total in zip(missing, needed, strict=True) if total <= self._room]))

    def of(self, terms: Sequence[Term]) -> dict[Term, Tensor]:
        """Log-probabilities `(n, vocabulary)` of each term."""
        found = self._computed(self._missing(terms))
        result = {term: found[key] if key in found else self._known[key] for term in terms for key in [_key(term)]}
        self._add(found)
        return result

    def _missing(self, terms: Sequence[Term]) -> list[Term]:
        return [term for key, term in {_key(term): term for term in terms}.items() if key not in self._known]

    def _computed(self, terms: Sequence[Term]) -> dict[Key, Tensor]:
        return {_key(term): own for term, own in zip(terms, self._compute(terms), strict=True)}

    def _add(self, found: dict[Key, Tensor]) -> None:
        for key, own in found.items():
            self._room -= own.nbytes
            if self._room >= 0:
                self._known[key] = own


def _key(term: Term) -> Key:
    return term.tokens, term.n


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within, layers keep their inputs only, and are computed again for their gradients."""

    def twice(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    originals = [(layer, layer.__dict__.get("forward"), layer.forward) for layer in layers]
    for layer, _, forward in originals:
        layer.forward = twice(forward)
    try:
        yield
    finally:
        for layer, own, _ in originals:
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _backward(loss: Tensor) -> None:
    """Take the gradient. Raises `LearningError` if some operation of the model has none."""
    try:
        torch.autograd.backward(loss)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise LearningError(f"the model has an operation without a gradient ({first_line(error)})") from error
