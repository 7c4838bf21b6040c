"""The scripts that learn the weights and measure the verdicts, on a few harmless responses of our own."""

import importlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from heretic.scoring.phrases import PhraseModel, Phrases
from test_learned_rule import ANSWERS, REFUSALS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Our examples as if three models had said them, with one partial refusal each."""
    entries: list[dict[str, Any]] = []
    for label, texts in (("full_refusal", REFUSALS), ("full_compliance", ANSWERS)):
        entries += [{"model": f"model {i % 3}", "label": label, "response": text, "cut_off": False} for i, text in enumerate(texts)]
    partial = "I cannot help with cakes. However, here is a recipe for bread: mix flour and water."
    entries += [{"model": f"model {i}", "label": "partial_refusal", "response": partial, "cut_off": False} for i in range(3)]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return tmp_path


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **patched: Any) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.syspath_prepend(ROOT / "bench")
    module = importlib.import_module(name)
    for key, value in patched.items():
        monkeypatch.setattr(module, key, value)
    monkeypatch.setattr("sys.argv", [f"{name}.py", str(folder)])
    module.main()


def test_weights_are_learned_and_can_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    target = folder / "weights.toml"
    run("train_verdicts", folder, monkeypatch, TARGET=target)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" left out: ")[0] for line in lines[:3]] == ["model 0", "model 1", "model 2"]
    assert lines[3].startswith("all: agreement ")
    learned = tomllib.loads(target.read_text(encoding="utf-8"))
    known = Phrases()
    assert learned["groups"].keys() == known.priors.keys()
    # What never occurs keeps its prior; what occurs in refusals only is worth more than that.
    assert learned["groups"]["french"] == known.priors["french"]
    assert learned["groups"]["refuses_to_help"][0] > known.priors["refuses_to_help"][0]
    reading = PhraseModel(known, learned)
    right = sum((reading.score(text) > 0) == expected for texts, expected in ((REFUSALS, True), (ANSWERS, False)) for text in texts)
    assert right >= len(REFUSALS) + len(ANSWERS) - 3


def test_the_stored_weights_are_in_that_form() -> None:
    stored = ROOT / "src" / "heretic" / "scoring" / "refusal_weights.toml"
    assert stored.read_text(encoding="utf-8").startswith("# Log-odds of a refusal, written by tools/train_verdicts.py: do not edit.")


def test_verdicts_are_measured(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("verdicts", folder, monkeypatch)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["responses"] == len(REFUSALS) + len(ANSWERS) + 3
    assert list(found["rules"]) == ["learned", "learned, model left out", "learned, model left out, early", "markers", "openings"]
    learned, markers = found["rules"]["learned"]["all"], found["rules"]["markers"]["all"]
    assert learned["agreement"] == 1 and learned["answers_called_refusals"] == learned["refusals_called_answers"] == 0
    assert learned["partial_called_refusals"] == 1
    # By hand, from the markers: test_learned_rule counts the same texts.
    wrong = markers["answers_called_refusals"] * len(ANSWERS) + markers["refusals_called_answers"] * len(REFUSALS)
    assert markers["agreement"] == pytest.approx(1 - wrong / (len(ANSWERS) + len(REFUSALS)))
    assert 0 < found["early"]["all"]["early"] <= 1 and 0 < found["early"]["all"]["median_characters"] < 100
    assert all(0 < seconds < 10 for seconds in found["seconds_per_1000"].values())
