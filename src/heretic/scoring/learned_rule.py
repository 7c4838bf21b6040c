"""The learned rule: what a response is by phrases and their places, most often told by its beginning.

It looks at a response after so many characters each (`Reading.looks`). A look decides where the score is so far to one side that on the
development set no further text changed it. An answer is not taken for one where it goes in a circle already. What never becomes clear
is judged whole.

Where it breaks: what comes after an early verdict is not seen, a loop or a late refusal say; finalists are therefore judged whole.
Languages without phrases in `refusal_phrases.toml` have no refusals.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

from .phrases import Look, Reading, beginning
from .responses import REMEMBERED_TEXTS, Kind, RefusalRule, Verdict, is_degenerate

# An answer that goes on has at least this share of different words; a circle is seen in so many words.
DIFFERENT_SHARE = 0.5
CIRCLE_WORDS = 6


class LearnedRule(RefusalRule):
    """Judges responses by a linear model over phrases. `markers` are the user's own; each makes a response a refusal wherever it stands.

    With markers no answer is decided early, since one may still come.
    """

    def __init__(
        self,
        markers: Sequence[str] = (),
        chain_of_thought_skips: Sequence[tuple[str, str]] = (),
        begins_inside: str | None = None,
        reading: Reading | None = None,
    ) -> None:
        super().__init__(markers, chain_of_thought_skips, begins_inside)
        self.reading = reading or Reading()
        self._look = lru_cache(REMEMBERED_TEXTS)(self._take_look)

    def is_decided(self, response: str) -> bool:
        """See `RefusalRule.is_decided`. Only the last look is taken: those before were, when there was less of the response."""
        if self.markers and super().is_decided(response):
            return True
        answer, is_open = self._split(response)
        if is_open:
            return False
        answer = answer.lstrip()
        n_looks = bisect_left(self.reading.looks, len(answer), key=lambda look: look.characters)
        return n_looks > 0 and self._verdict(answer, self.reading.looks[n_looks - 1]) is not None

    def early(self, response: str) -> Verdict | None:
        """By the first look that decides, or by a marker of the user's that stands before."""
        by_marker = super().early(response) if self.markers else None
        answer, is_open = self._split(response)
        if not is_open:
            answer = answer.lstrip()
            before = len(response) - len(answer)
            for look in self.reading.looks:
                if len(answer) <= look.characters or (by_marker and by_marker.decided_at <= before + look.characters):
                    break
                if (kind := self._verdict(answer, look)) is not None:
                    return Verdict(kind, before + look.characters)
        return by_marker

    def refuses(self, answer: str) -> bool:
        return (bool(self.markers) and super().refuses(answer)) or self.reading.score(answer.strip()) > 0

    def _verdict(self, answer: str, look: Look) -> Kind | None:
        return self._look(beginning(answer, look.characters), look)

    def _take_look(self, text: str, look: Look) -> Kind | None:
        score = self.reading.score(text)
        if score >= look.refuses:
            return "refusal"
        if score > look.complies or self.markers or is_degenerate(text, is_cut_off=True) or goes_in_a_circle(text):
            return None
        return "compliance"


def goes_in_a_circle(text: str) -> bool:
    """Whether the beginning of a response already repeats itself."""
    words = text.lower().split()
    return len(words) >= CIRCLE_WORDS and len(set(words)) < DIFFERENT_SHARE * len(words)
