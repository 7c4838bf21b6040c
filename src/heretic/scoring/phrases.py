"""How much a text reads like a refusal: a linear model over phrases, by the place where they stand.

A text is put into a simple form first: lower case, plain apostrophes, contractions written out, signs apart from words, and one word
for those that mean the same here ("assist" is "help", "unethical" is "illegal"). In it phrases are looked for, in groups. A group's
weight depends on the place where its first phrase stands: within the first 8 words, within the first 25, or later.

The groups are written by hand (`refusal_phrases.toml`), the weights are learned from responses that people have labelled
(`refusal_weights.toml`, written by `tools/train_verdicts.py`). Where it breaks: languages that it has no phrases of, and refusals that
only the prompt tells from answers ("Toasters should not vote").
"""

import itertools
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from ..utils import JsonObject

# Places of a phrase: within so many words, or later.
FIRST_WORDS, EARLY_WORDS = 8, 25
# Characters of an answer that are looked at: people have labelled no more. Beyond, only the refusal in so many words counts.
WINDOW = 450
EVERYWHERE = "refuses_to_help"
# Numbers among the first words, of which an answer that is a list has many.
NUMBERS, MOST_NUMBERS, WORDS_WITH_NUMBERS = "numbers", 3, 60

_TOKEN = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
_MARKS = str.maketrans({"\u2019": "'", "\u2018": "'", "*": None, "_": " "})


def _table(name: str) -> JsonObject:
    return tomllib.loads(files(__package__).joinpath(name).read_text(encoding="utf-8"))


class Phrases:
    """The groups of phrases, and what a text has of them."""

    def __init__(self, table: JsonObject | None = None) -> None:
        table = _table("refusal_phrases.toml") if table is None else table
        self._same = {word: name for name, words in table["words"].items() for word in words.split()}
        self._same |= dict(table["contractions"]) | dict.fromkeys(table["dropped"]["words"].split(), "")
        self.priors: dict[str, list[float]] = {name: group["prior"] for name, group in table["groups"].items()}
        self._starts: list[tuple[str, tuple[str, ...]]] = []
        # Phrases by their first word, and those of several words by their first two: few are then compared at each place.
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
        """A text in the form in which phrases are looked for: words and signs, the same word for what means the same."""
        same = self._same
        words = " ".join([same.get(word, word) for word in _TOKEN.findall(text.lower().translate(_MARKS))])
        return words.split()

    def features(self, text: str) -> dict[str, float]:
        """What a text has: `group place` for each group that occurs, by the place (0, 1 or 2) of its first phrase, and `numbers`.

        `numbers`: how many of the first words are numbers, as a share of what makes a list.
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
        """The groups of the phrases in a text and their places, the first ones first."""
        phrases, nothing = self._phrases, ()
        for i, pair in enumerate(itertools.zip_longest(words, words[1:])):
            for name, _ in phrases.get(pair[:1], nothing):
                yield name, i
            for name, phrase in phrases.get(pair, nothing):
                if len(phrase) == 2 or tuple(words[i : i + len(phrase)]) == phrase:
                    yield name, i


@dataclass(frozen=True)
class Look:
    """A look at the beginning of a response: from so many characters on it complies at this score or less, or refuses at that or more."""

    characters: int
    complies: float
    refuses: float


class Reading:
    """The linear model: its score is the log-odds that a text refuses. `looks`: when a text that is not whole yet is decided."""

    def __init__(self, phrases: Phrases | None = None, weights: JsonObject | None = None) -> None:
        weights = _table("refusal_weights.toml") if weights is None else weights
        self.phrases = phrases or Phrases()
        self.bias: float = weights["bias"]
        self.weights: dict[str, float] = {NUMBERS: weights[NUMBERS]}
        for name, places in weights["groups"].items():
            self.weights |= {f"{name} {place}": weight for place, weight in enumerate(places)}
        self.looks = [Look(*look) for look in weights["looks"]]

    def score(self, text: str) -> float:
        """The log-odds that a text refuses."""
        return self.bias + sum(self.weights[name] * value for name, value in self.phrases.features(text).items())


def beginning(text: str, characters: int) -> str:
    """So many characters of a text, without a word that they break off."""
    if len(text) <= characters:
        return text
    words = text[:characters].rsplit(None, 1)
    return words[0] if len(words) > 1 and not text[characters].isspace() else text[:characters]
