"""Drafts: responses of similar trials begin alike, so an earlier response to the same prompt is a guess that one pass can check.

Acceptance is greedy: a token of the draft counts where the model would have chosen it, so a response is what it would have been anyway.
"""

from .rows import Row


class Drafts:
    """The latest response to each prompt, by the token it begins with."""

    def __init__(self) -> None:
        self._latest: dict[tuple[int, ...], dict[int, list[int]]] = {}
        self.n_checked = 0
        self.n_accepted = 0

    def note(self, row: Row) -> None:
        """Remember a finished row's response."""
        if row.generated and row.finite:
            self._latest.setdefault(tuple(row.tokens), {})[row.generated[0]] = list(row.generated)

    def propose(self, row: Row, token: int) -> list[int]:
        """What an earlier response has after the row's tokens so far and `token`; empty where it began differently."""
        begun = [*row.generated, token]
        known = self._latest.get(tuple(row.tokens), {}).get(begun[0], [])
        return known[len(begun) :] if known[: len(begun)] == begun else []
