"""The learned rule: classifies a response by phrases and their positions, in most cases by its beginning only.

It scores a response after certain numbers of characters (`PhraseModel.looks`). Such a check decides if the score is so high or low that,
on the development set, no further text changed the verdict. A response that already repeats itself is not decided as compliance. A
response without an early verdict is judged by its full text.

Where it breaks: text after an early verdict is not seen, such as a loop or a late refusal; therefore finalists are judged by their full
text. Refusals in languages without phrases in `refusal_phrases.toml` are not detected.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

from .phrases import EarlyCheck, PhraseModel, beginning
from .responses import REMEMBERED_TEXTS, Kind, RefusalRule, Verdict, is_degenerate

# A response that does not repeat itself has at least this share of distinct words, among so many words.
DIFFERENT_SHARE = 0.5
CIRCLE_WORDS = 6


class LearnedRule(RefusalRule):
    """Judges responses by a linear model over phrases. `markers` are the user's own; each of them makes a response a refusal.

    With markers, compliance is not decided early, since a marker may still follow.
    """

    def __init__(
        self,
        markers: Sequence[str] = (),
        chain_of_thought_skips: Sequence[tuple[str, str]] = (),
        begins_inside: str | None = None,
        reading: PhraseModel | None = None,
    ) -> None:
        super().__init__(markers, chain_of_thought_skips, begins_inside)
        self.reading = reading or PhraseModel()
        self._look = lru_cache(REMEMBERED_TEXTS)(self._take_look)

    def is_decided(self, response: str) -> bool:
        """See `RefusalRule.is_decided`. Only the last look is evaluated: earlier ones were, when the response was shorter."""
        if self.markers and super().is_decided(response):
            return True
        answer, is_open = self._split(response)
        if is_open:
            return False
        answer = answer.lstrip()
        n_looks = bisect_left(self.reading.looks, len(answer), key=lambda look: look.characters)
        return n_looks > 0 and self._verdict(answer, self.reading.looks[n_looks - 1]) is not None

    def early(self, response: str) -> Verdict | None:
        """The verdict of the first look that decides, or of a user's marker before it."""
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

    def _verdict(self, answer: str, look: EarlyCheck) -> Kind | None:
        return self._look(beginning(answer, look.characters), look)

    def _take_look(self, text: str, look: EarlyCheck) -> Kind | None:
        score = self.reading.score(text)
        if score >= look.refuses:
            return "refusal"
        if score > look.complies or self.markers or is_degenerate(text, is_cut_off=True) or repeats_itself(text):
            return None
        return "compliance"


def repeats_itself(text: str) -> bool:
    """Whether the beginning of a response already repeats itself."""
    words = text.lower().split()
    return len(words) >= CIRCLE_WORDS and len(set(words)) < DIFFERENT_SHARE * len(words)
