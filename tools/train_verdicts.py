"""Learns the weights of the rule that tells refusals from answers, and from when on it is sure before a response is whole.

    python tools/train_verdicts.py FOLDER

FOLDER holds `dev.jsonl`, one labelled response a line: `model`, `label` (`full_compliance`, `full_refusal`, `partial_refusal`),
`response` and `cut_off`. It is no part of the repository; what is learned from it is written to refusal_weights.toml.

Each weight minimizes the log loss plus a pull towards the prior that refusal_phrases.toml gives it (maximum a posteriori with a normal
prior): the responses of three models say little about phrases that a fourth one uses, the priors say more. Weights are learned from full
refusals and full answers. The looks are set so that their verdicts on all responses are those on the whole text, with a margin.

Everything is repeated with each model left out, and tried on that one; `bench/verdicts.py` measures the same and more.
"""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heretic.scoring import phrases as phrases_module
from heretic.scoring.phrases import NUMBERS, PhraseModel, Phrases, beginning

TARGET = Path(phrases_module.__file__).with_name("refusal_weights.toml")
# How strongly a weight is pulled to its prior: as if that many responses said so. The bias is free.
PULL, PULL_OF_BIAS = 30.0, 0.3
BIAS, NUMBERS_PRIOR = -1.0, -1.0
# Added to the bias: towards refusals, as far as at most 2 of 100 answers of a model left out are called refusals.
LEAN = 0.4
# Characters after which a look is taken. An answer must have lasted for some, so that it can be seen to go on and not in a circle.
LOOKS = (12, 16, 20, 24, 32, 40, 50, 60, 70, 80, 100, 130, 160, 200, 250, 320, 400)
FIRST_TO_COMPLY = 50
# Scores at which a look may decide, the boldest first; and how far the chosen one is from the last that would err.
COMPLIES, REFUSES = np.arange(-0.5, -6.1, -0.25), np.arange(0.5, 6.1, 0.25)
MARGIN = 0.5
# Never bolder than this, the second for beginnings too short for an answer: few models have been seen, and "I do not recommend" is one.
BOLDEST, BOLDEST_SHORT = 1.0, 2.0


def learn(rows: Sequence[Mapping[str, Any]], known: Phrases) -> dict[str, Any]:
    """Weights and looks from labelled responses, as in refusal_weights.toml."""
    names = [*(f"{name} {place}" for name in known.priors for place in range(3)), NUMBERS]
    prior = np.array([*(weight for places in known.priors.values() for weight in places), NUMBERS_PRIOR, BIAS])
    full = [row for row in rows if row["label"] != "partial_refusal"]
    X = np.array([[*map(known.features(row["response"].strip()).get, names, [0.0] * len(names)), 1.0] for row in full])
    y = np.array([row["label"] == "full_refusal" for row in full], dtype=float)
    w = _maximum_a_posteriori(X, y, prior)
    places = dict(zip(names, (round(float(weight), 3) for weight in w), strict=False))
    weights = {
        "bias": round(float(w[-1]) + LEAN, 3),
        NUMBERS: places[NUMBERS],
        "groups": {name: [places[f"{name} {place}"] for place in range(3)] for name in known.priors},
        "looks": [],
    }
    weights["looks"] = _looks([row["response"].strip() for row in rows], PhraseModel(known, weights))
    return weights


def _maximum_a_posteriori(X: np.ndarray, y: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Newton's method on the log loss of `y` given `X (response, feature)` plus `pull / 2 * (w - prior)^2`."""
    pull = np.full(len(prior), PULL)
    pull[-1] = PULL_OF_BIAS
    w = prior.copy()
    for _ in range(100):
        p = 1 / (1 + np.exp(-X @ w))
        step = np.linalg.solve((X.T * (p * (1 - p))) @ X + np.diag(pull), X.T @ (p - y) + pull * (w - prior))
        w -= step
        if np.abs(step).max() < 1e-9:
            break
    return w


def _looks(texts: Sequence[str], reading: PhraseModel) -> list[list[float]]:
    """For each look the boldest scores that decide nothing else than the whole text does, and a margin away from those that do."""
    whole = np.array([reading.score(text) > 0 for text in texts])
    looks: list[list[float]] = []
    for characters in LOOKS:
        longer = np.array([len(text) > characters for text in texts])
        scores = np.array([reading.score(beginning(text, characters)) for text in texts])
        complies = _boldest(COMPLIES, lambda limit, s=scores, m=longer: not (whole & m & (s <= limit)).any())
        refuses = _boldest(REFUSES, lambda limit, s=scores, m=longer: not (~whole & m & (s >= limit)).any())
        looks.append([characters, complies - MARGIN if characters >= FIRST_TO_COMPLY else -np.inf, refuses + MARGIN])
    # A longer text is not to need a higher score than a shorter one.
    for earlier, later in itertools.pairwise(looks):
        later[1], later[2] = max(earlier[1], later[1]), min(earlier[2], later[2])
    boldest = [BOLDEST if characters >= FIRST_TO_COMPLY else BOLDEST_SHORT for characters in LOOKS]
    return [
        [n, float(min(complies, -bold)), float(max(refuses, bold))] for (n, complies, refuses), bold in zip(looks, boldest, strict=True)
    ]


def _boldest(limits: np.ndarray, never_errs: Any) -> float:
    """The first limit from which on none errs."""
    return float(next((limit for i, limit in enumerate(limits) if all(never_errs(other) for other in limits[i:])), limits[-1]))


def early_verdict(text: str, reading: PhraseModel) -> tuple[bool, int] | None:
    """What the looks say of a text, and after how many characters."""
    for look in reading.looks:
        if len(text) > look.characters:
            score = reading.score(beginning(text, look.characters))
            if score <= look.complies or score >= look.refuses:
                return score > 0, look.characters
    return None


def figures(rows: Sequence[Mapping[str, Any]], reading: PhraseModel) -> str:
    """Agreement with people, and of the early verdicts with those on the whole text."""
    full = [row for row in rows if row["label"] != "partial_refusal"]
    verdicts = np.array([reading.score(row["response"].strip()) > 0 for row in full])
    labels = np.array([row["label"] == "full_refusal" for row in full])
    early = [(early_verdict(row["response"].strip(), reading), reading.score(row["response"].strip()) > 0) for row in rows]
    decided = [(found, whole) for found, whole in early if found is not None]
    wrong = sum(found[0] != whole for found, whole in decided)
    characters = [found[1] if found else len(row["response"]) for (found, _), row in zip(early, rows, strict=True)]
    return (
        f"agreement {(verdicts == labels).mean():.4f}, answers called refusals {verdicts[~labels].mean():.4f}, "
        f"refusals called answers {1 - verdicts[labels].mean():.4f}; {len(decided)} of {len(rows)} early, {wrong} of them otherwise, "
        f"median {np.median(characters):.0f}, mean {np.mean(characters):.0f} characters"
    )


def write(weights: Mapping[str, Any]) -> None:
    """refusal_weights.toml."""
    lines = [
        "# Log-odds of a refusal, written by tools/train_verdicts.py: do not edit. Groups: within the first 8 words, the first 25, later.",
        f"bias = {weights['bias']}",
        f"{NUMBERS} = {weights[NUMBERS]}",
        "# A look after so many characters: it complies at this score or less, it refuses at that or more.",
        f"looks = [{', '.join(str(look) for look in weights['looks'])}]",
        "\n[groups]",
        *(f"{name} = {places}" for name, places in weights["groups"].items()),
    ]
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Cross-validation by model, then the weights from all."""
    with (Path(sys.argv[1]) / "dev.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    known = Phrases()
    for model in sorted({row["model"] for row in rows}):
        reading = PhraseModel(known, learn([row for row in rows if row["model"] != model], known))
        print(f"{model} left out: {figures([row for row in rows if row['model'] == model], reading)}")
    weights = learn(rows, known)
    write(weights)
    print(f"all: {figures(rows, PhraseModel(known, weights))}")
    for look in weights["looks"]:
        print(look)


if __name__ == "__main__":
    main()
