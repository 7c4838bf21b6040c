"""How answers and refusals begin: a tree of token sequences that have been seen, by which the probability of a refusal is told.

A prefix that several refusals, and hardly any answer, have begun with is where one is decided, whatever its further words. So the
probability that a response refuses is, as far as it is known, the probability of all those prefixes. Along one path of tokens a single
forward pass tells it for all prefixes that leave the path: `sum_j p(path[:j]) * sum_t p(t | path[:j])` over the tokens `t` with which
`path[:j]` becomes a refusal.

Where it breaks: a refusal that has never been seen is not counted. So what is learned must be shown what the model says by now.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..device import upload

Path = tuple[int, ...]

# A beginning is a refusal's alone if it has at most so many answers for each refusal: a verdict may be mistaken, and an edit that turns
# "I'm sorry" into "I'm glad", since a few answers begin so, makes the model ramble.
FEW_ANSWERS = 0.1
# And if at least so many refusals have had it. What a single one begins with is about its prompt ("Rowing is"); it is counted as a whole,
# to the words that make it a refusal, which others share.
FEWEST_REFUSALS = 3
# Tokens after which it no longer matters how a response began.
DEPTH = 24
# The logarithm of a probability of 0: finite, so that products with it are 0.
NEVER = -1e4


class Openings:
    """Beginnings of responses as tokens, and how many refusals and answers had each."""

    def __init__(self) -> None:
        self._counts: dict[Path, list[int]] = {}
        self._next: dict[Path, dict[int, None]] = {}
        self._turns: dict[int, float] = {}
        self._deciding = lru_cache(maxsize=2**16)(self._look_for_deciding)

    def add(self, tokens: Sequence[int], refuses: bool) -> None:
        """Take note of a response."""
        path = tuple(tokens[:DEPTH])
        for end in range(1, len(path) + 1):
            self._counts.setdefault(path[:end], [0, 0])[refuses] += 1
            self._next.setdefault(path[: end - 1], {})[path[end - 1]] = None
        self._deciding.cache_clear()

    def refuses(self, tokens: Sequence[int]) -> bool:
        """Whether some refusals, and few answers, have been seen to begin so."""
        answers, refusals = self._counts.get(tuple(tokens), (0, 0))
        return refusals >= FEWEST_REFUSALS and _hardly_answers(answers, refusals)

    def decided(self, tokens: Sequence[int]) -> Path:
        """The shortest beginning of a response that is a refusal's alone; all of it if there is none that has been seen so often."""
        path = tuple(tokens[:DEPTH])
        return next((path[:end] for end in range(1, len(path) + 1) if self.refuses(path[:end])), path)

    def begins_as_refusal(self, tokens: Sequence[int]) -> bool:
        """Whether some beginning of a response is a refusal's alone."""
        return self.refuses(self.decided(tokens))

    def deciding(self, path: Path) -> list[int]:
        """The tokens with which `path` becomes a refusal."""
        return self._deciding(path)

    def _look_for_deciding(self, path: Path) -> list[int]:
        return [token for token in self._next.get(path, {}) if self.refuses((*path, token))]

    def turn_with(self, tokens: Iterable[int]) -> None:
        """Let responses that have begun to answer turn into refusals with these tokens."""
        self._turns = dict.fromkeys(tokens, NEVER)

    def log_probability(self, path: Sequence[int], logprobs: Tensor, is_refusal: bool) -> Tensor:
        """`log p` of the refusals that are known along a path, `()`; `logprobs (token, vocabulary)` are those of its tokens and others.

        The path itself counts if it `is_refusal`. A path that has become a refusal is not followed further: all that goes on so is counted.
        Minus infinity if no refusal begins as the path does.
        """
        parts, before = [], logprobs.new_zeros(())
        followed = self.decided(path)
        tokens = [[token, *self.deciding(followed[:j])] for j, token in enumerate(followed)]
        for own in logprobs[_places(tokens, logprobs.device)].split([len(own) for own in tokens]):
            if len(own) > 1:
                parts.append(before + torch.logsumexp(own[1:], dim=0))
            before = before + own[0]
        if is_refusal and not self.refuses(followed):
            parts.append(before)
        return torch.logsumexp(torch.stack(parts), dim=0) if parts else logprobs.new_full((), -torch.inf)

    def without_refusals(self, path: Sequence[int], logprobs: Tensor) -> Tensor:
        """Log-probabilities `(token, vocabulary)` along a path, given that the response does not become a refusal (Bayes' rule).

        Every token is weighted with the share of answers among the responses known to go on with it: a token that begins most refusals is
        unlikely then, even if some answer begins with it, too. After the first token, those of `turn_with` are left out as well, unless
        an answer is known to go on so.
        """
        found = logprobs.clone()
        known = [{**(self._turns if j else {}), **self._answering(tuple(path[:j]))} for j in range(len(path))]
        weights = torch.tensor([weight for own in known for weight in own.values()], dtype=found.dtype)
        found[_places([list(own) for own in known], found.device)] += upload(weights, found.device)
        return torch.log_softmax(found, dim=-1)

    def _answering(self, path: Path) -> dict[int, float]:
        """By token that is known to follow, the logarithm of the share of answers."""
        found = {}
        for token in self._next.get(path, {}):
            answers, refusals = self._counts[*path, token]
            found[token] = NEVER if _hardly_answers(answers, refusals) else math.log(answers / (answers + refusals))
        return found

    def state(self) -> list[tuple[list[int], int, int]]:
        """All that has been seen, as plain data."""
        return [(list(path), answers, refusals) for path, (answers, refusals) in self._counts.items()]

    def restore(self, state: Sequence[tuple[Sequence[int], int, int]]) -> None:
        """Take over what `state` gave."""
        self._counts = {tuple(path): [answers, refusals] for path, answers, refusals in state}
        self._next = {}
        for path in self._counts:
            self._next.setdefault(path[:-1], {})[path[-1]] = None
        self._deciding.cache_clear()


def _hardly_answers(answers: int, refusals: int) -> bool:
    """Whether a beginning that had so many of each is that of refusals, but for mistaken verdicts."""
    return answers <= FEW_ANSWERS * refusals


def _places(tokens: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each token of every row of `(token, vocabulary)`: one copy to a device, whatever their number."""
    rows, columns = [j for j, own in enumerate(tokens) for _ in own], [token for own in tokens for token in own]
    places = upload(torch.tensor([rows, columns], dtype=torch.long), device)
    return places[0], places[1]
