"""The scripts under bench/: they run, what they print can be read by a program, and their arithmetic is right."""

import importlib
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from heretic.editing.ablation import Ablation
from heretic.evaluator import Score

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of bench/ as a module."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.mark.parametrize(("shape", "mix"), [("tiny", []), ("tiny", ["--mix"]), ("tiny-moe", [])])
def test_trial_speed_on_a_small_shape(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shape: str, mix: list[str]
) -> None:
    module = script("trial_speed")
    options = ["--model", shape, "--trials", "3", "--trials-per-batch", "2", "--prompts", "8", "--length", "20", *mix]
    monkeypatch.setattr("sys.argv", ["trial_speed.py", *options])
    module.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ratio"] == pytest.approx(result["reference_s"] / result["ours_s"])
    assert result["times_floor"] == pytest.approx(result["ours_s"] / result["floor_s"])
    assert result["floor_s"] == max(result["operations_s"], result["bytes_s"])
    assert result["largest_refusal_difference"] == 0 and 0 < result["largest_kl_difference"] < 1e-5
    # Prompts of 55 tokens, 20 new ones, of which generate computes all but the last; the reference's KL pass is not counted.
    assert result["tokens_reference"] == 8 * (module.SHAPE_PROMPT_TOKENS + 20)
    # Both sets once, and 19 steps: with the mix every other row leaves after 15 tokens, but goes on until enough have left.
    whole = 8 * (2 * module.SHAPE_PROMPT_TOKENS + 19)
    assert result["tokens_ours"] == whole if not mix else whole - 4 * 5 <= result["tokens_ours"] < whole
    for side in ("reference_shares", "ours_shares"):
        assert set(result[side]) == {"setup", "prefill", "decode", "host"}
        assert sum(result[side].values()) == pytest.approx(1, abs=1e-3)
    assert result["peak_memory_bytes"] > 0


def test_trial_speed_compares_like_with_like(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    """A model with prompts: no score that the reference does not have, the same verdicts and divergences, also without savings."""
    module = script("trial_speed")
    options = ["--model", "m", "--good", "good.txt", "--bad", "bad.txt", "--trials", "2", "--length", "6", "--savings"]
    monkeypatch.setattr("sys.argv", ["trial_speed.py", *options])
    monkeypatch.setattr(module, "SAVINGS", {name: module.SAVINGS[name] for name in ("none", "all")})
    kl_tokens: list[int] = []
    workload = module.real_workload
    rule = {"refusal_rule": "markers", "refusal_markers": ["a"]}  # what the model of random weights says holds no phrase
    monkeypatch.setattr(
        module, "real_workload", lambda settings: kl_tokens.append(settings.kl_tokens) or workload(settings.model_copy(update=rule))
    )
    module.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert kl_tokens == [1]
    assert result["largest_refusal_difference"] == 0 and 0 <= result["largest_kl_difference"] < 1e-4
    assert set(result["savings"]) == set(module.SAVINGS)
    assert all(saving["seconds"] > 0 for saving in result["savings"].values())


def test_summary_counts_the_seeds_that_are_complete(script: Any) -> None:
    module = script("search_quality")
    runs = [
        {
            "seed": seed,
            "trials_per_batch": n,
            "stop_dominated": stops,
            "after_50": seed / 10 + n / 100,
            "after_100": 0.5,
        }
        for seed in (1, 2, 4)
        for n, stops in module.RUNS
    ][:-1]
    result = module.summary(runs)
    assert result["seeds"] == 2  # the third lacks a run
    assert result["8 per batch, stopping, after_50"] == [
        pytest.approx(0.23),
        pytest.approx(statistics.stdev([0.18, 0.28]), abs=1e-4),
    ]
    assert result["4 per batch, to the end, after_100"] == [0.5, 0.0]


def test_scores_are_looked_up_only_where_the_trial_would_have_been_finished(script: Any) -> None:
    module = script("search_quality")
    asked: list[list[Ablation]] = []

    def score_trials(ablations: list[Ablation], limit: Any) -> list[Score]:
        asked.append(ablations)
        return [Score(40, 0.1) if limit(0.1) >= 40 else Score(60, 0.1, bounded=True) for _ in ablations]

    scores = module.Scores(SimpleNamespace(score_trials=score_trials))
    a, b = Ablation(0.5, {}), Ablation(None, {})
    assert scores([a], lambda kl: 50) == [Score(40, 0.1)]
    assert scores([b, a], lambda kl: 40) == [Score(40, 0.1)] * 2 and asked == [[a], [b]]
    assert scores([a], lambda kl: 39) == [Score(60, 0.1, bounded=True)] and asked[-1] == [a]
    assert scores([a], lambda kl: 40) == [Score(40, 0.1)] and len(asked) == 3 and scores.n_computed == 3


def test_transformers_decoding_finds_the_end(script: Any) -> None:
    module = script("transformers_decoding")
    model = SimpleNamespace(decoder=SimpleNamespace(end_tokens={2, 3}))
    assert module.cut([5, 6, 3, 7, 2], model) == [5, 6]
    assert module.cut([5, 6], model) == [5, 6]


@pytest.mark.long
def test_a_decode_step_waits_once_and_a_prefill_never(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many rows and trials there are, and layers."""
    module = script("host_syncs")
    monkeypatch.setattr(module, "CASES", [("full", 1, 5), ("full", 3, 10)])
    monkeypatch.setattr("sys.argv", ["host_syncs.py"])
    module.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for case in ("full, 1 trials, 5 prompts", "full, 3 trials, 10 prompts"):
        waits = [result[f"{part}, {case}"]["waits"] for part in ("decode step", "prefill", "divergences")]
        assert waits == [1, 0, 1]
        for part in ("decode step", "prefill", "divergences"):
            assert 1 < result[f"{part}, {case}"]["times_plain"] <= 1.3
        assert result[f"prefill, {case}"]["waits_more_layers"] == 0
