"""A linear model over phrases and their positions, which scores how much a text reads like a refusal.

A text is normalized first: lower case, ASCII apostrophes, expanded contractions, punctuation separated from words, and synonyms replaced
by one word ("assist" is "help", "unethical" is "illegal"). Then phrases are searched for, in groups. A group's weight depends on the
position of its first phrase: within the first 8 words, within the first 25, or later.

The groups are written by hand (`refusal_phrases.toml`), the weights are learned from responses that people have labelled
(`refusal_weights.toml`, written by `tools/train_verdicts.py`). Where it breaks: languages without phrases, and refusals that can only be
recognized together with the prompt ("Toasters should not vote").
"""

import itertools
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from ..utils import JsonObject

# Positions of a phrase: within so many words, or later.
FIRST_WORDS, EARLY_WORDS = 8, 25
# Characters of a response that are scored: people have labelled no more. Later text counts only if it is an explicit refusal.
WINDOW = 450
EVERYWHERE = "refuses_to_help"
# Numbers among the first words; responses that are lists have many.
NUMBERS, MOST_NUMBERS, WORDS_WITH_NUMBERS = "numbers", 3, 60

_TOKEN = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
_MARKS = str.maketrans({"\u2019": "'", "\u2018": "'", "*": None, "_": " "})


def _table(name: str) -> JsonObject:
    return tomllib.loads(files(__package__).joinpath(name).read_text(encoding="utf-8"))


class Phrases:
    """The groups of phrases, and the features of a text."""

    def __init__(self, table: JsonObject | None = None) -> None:
        table = _table("refusal_phrases.toml") if table is None else table
        self._same = {word: name for name, words in table["words"].items() for word in words.split()}
        self._same |= dict(table["contractions"]) | dict.fromkeys(table["dropped"]["words"].split(), "")
        self.priors: dict[str, list[float]] = {name: group["prior"] for name, group in table["groups"].items()}
        self._starts: list[tuple[str, tuple[str, ...]]] = []
        # Index of phrases by their first word, or first two words, so that few are compared at each position.
        self._phrases: dict[tuple[str, ...], list[tuple[str, tuple[str, ...]]]] = {}
        for name, group in table["groups"].items():
            for phrase in group["phrases"]:
                for own in table["unable"] if "{unable}" in phrase else ("",):
                    words = tuple(self.words(phrase.replace("{unable}", own).removeprefix("^")))
                    if phrase.startswith("^"):
                        self._starts.append((name, words))
                    else:
                        self._phrases.setdefault(words[:2], []).append((name, words))

    def words(self, text: str) -> list[str]:
        """The normalized words and punctuation of a text, in which phrases are searched for."""
        same = self._same
        words = " ".join([same.get(word, word) for word in _TOKEN.findall(text.lower().translate(_MARKS))])
        return words.split()

    def features(self, text: str) -> dict[str, float]:
        """The features of a text: `group place` for each group that occurs, by position (0, 1 or 2) of its first phrase, and `numbers`.

        `numbers`: how many of the first words are numbers, relative to what makes a list.
        """
        words = self.words(text[:WINDOW])
        first: dict[str, int] = {name: 0 for name, start in self._starts if tuple(words[: len(start)]) == start}
        for name, place in self._found(words):
            first.setdefault(name, place)
        if len(text) > WINDOW and EVERYWHERE not in first and any(name == EVERYWHERE for name, _ in self._found(self.words(text[WINDOW:]))):
            first[EVERYWHERE] = len(words)
        found = {f"{name} {0 if place < FIRST_WORDS else 1 if place < EARLY_WORDS else 2}": 1.0 for name, place in first.items()}
        n_numbers = sum(map(str.isdigit, words[:WORDS_WITH_NUMBERS]))
        if n_numbers:
            found[NUMBERS] = min(MOST_NUMBERS, n_numbers) / MOST_NUMBERS
        return found

    def _found(self, words: list[str]) -> Iterator[tuple[str, int]]:
        """The groups of the phrases in a text and their positions, in order."""
        phrases, nothing = self._phrases, ()
        for i, pair in enumerate(itertools.zip_longest(words, words[1:])):
            for name, _ in phrases.get(pair[:1], nothing):
                yield name, i
            for name, phrase in phrases.get(pair, nothing):
                if len(phrase) == 2 or tuple(words[i : i + len(phrase)]) == phrase:
                    yield name, i


@dataclass(frozen=True)
class EarlyCheck:
    """Thresholds at a number of characters: at or below `complies` the response complies, at or above `refuses` it refuses."""

    characters: int
    complies: float
    refuses: float


class PhraseModel:
    """The linear model; its score is the log-odds of a refusal. `looks`: when and how incomplete responses are decided."""

    def __init__(self, phrases: Phrases | None = None, weights: JsonObject | None = None) -> None:
        weights = _table("refusal_weights.toml") if weights is None else weights
        self.phrases = phrases or Phrases()
        self.bias: float = weights["bias"]
        self.weights: dict[str, float] = {NUMBERS: weights[NUMBERS]}
        for name, places in weights["groups"].items():
            self.weights |= {f"{name} {place}": weight for place, weight in enumerate(places)}
        self.looks = [EarlyCheck(*look) for look in weights["looks"]]

    def score(self, text: str) -> float:
        """The log-odds of a refusal."""
        return self.bias + sum(self.weights[name] * value for name, value in self.phrases.features(text).items())


def beginning(text: str, characters: int) -> str:
    """The first characters of a text, without a truncated last word."""
    if len(text) <= characters:
        return text
    words = text[:characters].rsplit(None, 1)
    return words[0] if len(words) > 1 and not text[characters].isspace() else text[:characters]
