"""`bench/search_ranges.py`: its arithmetic, what its variants search, and that a run can be summed up."""

import importlib
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from heretic.config import Settings
from heretic.study.space import search_space
from test_search import COMPONENTS, scaled, score

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("search_ranges")


def subject(bench: Any, separating_layer: int) -> Any:
    """A model of 11 layers whose scores are made up."""
    model = SimpleNamespace(architecture=SimpleNamespace(layers=range(11), components=dict.fromkeys(COMPONENTS, 11)))
    evaluator = SimpleNamespace(model=model, score_trials=score, objectives=scaled, original=SimpleNamespace(refusals=20))
    return bench.Subject("m", evaluator, separating_layer)


@pytest.mark.parametrize("reference", [0.02, 0.5])
def test_hypervolume_is_the_share_of_points_that_are_beaten(bench: Any, reference: float) -> None:
    """Against counting the points of a grid. One point of the front is beyond the reference, one is beaten by another."""
    points = [(0.0, 0.75), (0.1, 0.6), (0.3, 0.2), (0.35, 0.3), (0.5, 1.5), (1.0, 0.0)]
    n = 1000
    refusals, kl = np.meshgrid((np.arange(n) + 0.5) / n, (np.arange(n) + 0.5) / n)
    beaten = np.zeros_like(refusals, dtype=bool)
    for x, y in points:
        beaten |= (refusals >= x) & (kl >= y)
    scaled_points = [(x, y * reference) for x, y in points]
    assert bench.hypervolume(scaled_points, reference) == pytest.approx(beaten.mean(), abs=2e-3)
    assert bench.hypervolume([], reference) == bench.hypervolume([(1.0, 0.001), (0.2, 2 * reference)], reference) == 0


def test_variants_differ_in_what_they_are_named_for(bench: Any) -> None:
    s = subject(bench, 8)
    spaces = {
        name: search_space(Settings.model_validate({"model": "m", **make(s)}), COMPONENTS, 10, s.separating_layer)
        for name, make in bench.VARIANTS.items()
    }
    usual = search_space(Settings(model="m"), COMPONENTS, 10, s.separating_layer)
    assert spaces["narrow first"] == spaces["narrow first, first trials"] == usual, "the program's default"
    assert usual.start == spaces["narrow"] and spaces["narrow"].start is None
    assert spaces["wide"] == usual.model_copy(update={"start": None})


def test_runs_are_summed_up(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "N_STARTUP", 2)
    monkeypatch.setattr(bench, "N_TRIALS", (4, 6))
    s = subject(bench, 2)
    runs = [bench.one_run(s, variant, seed) for seed in (0, 1, 2) for variant in ("narrow", "narrow first, first trials")]
    (tmp_path / "a").write_text("".join(json.dumps(run) + "\n" for run in runs[:3]))
    (tmp_path / "b").write_text("".join(json.dumps(run) + "\n" for run in runs[3:5]))
    monkeypatch.setattr("sys.argv", ["search_ranges.py", "--summary", str(tmp_path / "a"), str(tmp_path / "b")])
    bench.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["m"]["6 trials, R = 0.5"]
    volume = [bench.hypervolume(run["fronts"]["6"], 0.5) for run in runs]
    assert result["narrow"] == pytest.approx([statistics.fmean(volume[:5:2]), 0, 0, 3], abs=6e-4)
    differences = [volume[1] - volume[0], volume[3] - volume[2]]
    expected = [(volume[1] + volume[3]) / 2, statistics.fmean(differences), statistics.stdev(differences) / 2**0.5, 2]
    assert result["narrow first, first trials"] == pytest.approx(expected, abs=6e-4)
