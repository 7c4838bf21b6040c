"""Batches scored by several processes of one thread each: the same scores, and nothing lost where a process is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import tiny
from heretic import lanes as lanes_module
from heretic.editing.ablation import Ablation, ComponentParameters
from heretic.evaluator import Evaluator, Score
from heretic.lanes import Lanes, n_lanes, scoring
from heretic.prompts import Prompt
from heretic.study.batches import Limit, Scoring
from heretic.study.search import unlimited
from heretic.utils import SilentProgress

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")

TRIALS = [
    Ablation(index, {name: ComponentParameters(weight, 0.5, 0.5 * weight, 1.0) for name in ("attn.o_proj", "mlp.down_proj")})
    for index, weight in ((None, 1.0), (0.5, 1.4), (None, 0.2), (0.9, 0.8), (0.3, 1.1))
]


class Told(SilentProgress):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def make_evaluator(folder: Path, **changes: Any) -> Evaluator:
    tiny.save(folder, tiny.build("llama"))
    model = tiny.load(folder)
    model.use_directions(tiny.unit_directions(3, 32), "full")
    prompts = [Prompt("You are a helpful assistant.", f"How do I bake {n} loaves?") for n in range(7)]
    settings = tiny.settings(folder, max_response_length=6, refusal_markers=["a"], **changes)
    return Evaluator(settings, model, prompts, prompts[::-1])


@pytest.fixture
def evaluator(tmp_path: Path) -> Iterator[Evaluator]:
    n_threads = torch.get_num_threads()
    yield make_evaluator(tmp_path / "m")
    torch.set_num_threads(n_threads)


def scored(lanes: Scoring, trials: list[Ablation], limit: Limit = unlimited) -> list[Any]:
    """Scores of trials in batches of two, all of them begun at once."""
    batches = [trials[i : i + 2] for i in range(0, len(trials), 2)]
    waits = [lanes.begin(batch, limit) for batch in batches]
    return [score for wait in waits for score in wait()]


def figures(results: Any) -> list[tuple[int, bool]]:
    return [(score.refusals, score.bounded) for score in results]


@pytest.mark.parametrize("n", [2, 3, 7])
def test_scores_are_those_of_one_process(evaluator: Evaluator, n: int) -> None:
    """More trials than processes and fewer, again and again; none is left afterwards."""
    alone = evaluator.score_trials(TRIALS)
    with Lanes(evaluator, n, SilentProgress()) as lanes:
        for trials in (TRIALS, TRIALS[:1], TRIALS):
            together = scored(lanes, trials)
            assert all(isinstance(score, Score) for score in together)
            assert figures(together) == figures(alone[: len(trials)])
            for a, b in zip(together, alone, strict=False):
                assert isinstance(a, Score) and isinstance(b, Score)
                assert a.kl_divergence == pytest.approx(b.kl_divergence, abs=1e-6)
                assert a.scores["sequence_kl_divergence"] == pytest.approx(b.scores["sequence_kl_divergence"], abs=1e-6)
        pids = [process.pid for process in lanes.processes]
    assert len(pids) == n and not any(psutil.pid_exists(pid) for pid in pids)


def test_dominated_trials_stop_as_in_one_process(evaluator: Evaluator) -> None:
    with Lanes(evaluator, 2, SilentProgress()) as lanes:
        stopped = scored(lanes, TRIALS, at_most_none)
    assert figures(stopped) == figures(evaluator.score_trials(TRIALS, at_most_none))
    assert any(score.bounded for score in stopped if isinstance(score, Score))


def at_most_none(kl: float) -> float:
    return 0.0


def test_what_crashes_is_raised_here_and_the_next_batch_is_scored(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Evaluator.score_trials

    def crash(self: Evaluator, ablations: Any, limit: Any) -> Any:
        if TRIALS[3] in ablations:
            raise ZeroDivisionError("a defect")
        return whole(self, ablations, limit)

    monkeypatch.setattr(Evaluator, "score_trials", crash)
    with Lanes(evaluator, 2, SilentProgress()) as lanes:
        with pytest.raises(ZeroDivisionError, match="a defect"):
            scored(lanes, TRIALS)
        found = scored(lanes, TRIALS[:3])
    assert figures(found) == figures(whole(evaluator, TRIALS[:3], unlimited))


def test_a_process_that_is_killed_costs_nothing(evaluator: Evaluator) -> None:
    told = Told()
    with Lanes(evaluator, 2, told) as lanes:
        os.kill(lanes.processes[1].pid, signal.SIGKILL)
        found = scored(lanes, TRIALS)
        assert figures(found) == figures(evaluator.score_trials(TRIALS))
        assert told.warnings == [
            "A process that scored trials was ended, perhaps for want of memory. The run goes on in this one alone, more slowly."
        ]
        assert figures(scored(lanes, TRIALS)) == figures(found)
    assert len(told.warnings) == 1


def test_another_c_library_than_glibc(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory cannot be told to stay, scores come all the same, from the processes."""
    told = Told()
    monkeypatch.setattr("heretic.lanes.ctypes.CDLL", lambda name: object())
    with Lanes(evaluator, 2, told) as lanes:
        found = scored(lanes, TRIALS)
    assert figures(found) == figures(evaluator.score_trials(TRIALS))
    assert not told.warnings


def test_small_models_on_several_threads_get_them(evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    assert [n_lanes(evaluator, n) for n in (1, 4, 8)] == [2, 2, 2]
    assert n_lanes(evaluator, 16) == 1, "more than 32 trials would be at work"
    torch.set_num_threads(1)
    assert n_lanes(evaluator, 4) == 1
    torch.set_num_threads(4)
    assert [n_lanes(evaluator, n) for n in (2, 4, 8)] == [4, 4, 3]
    torch.set_num_threads(2)
    showing = make_evaluator(tmp_path / "shown", print_responses=True)
    assert n_lanes(showing, 4) == 1, "responses are shown by one process only"
    monkeypatch.setattr(lanes_module, "MAX_PARAMETERS", 10)
    assert n_lanes(evaluator, 4) == 1
    with scoring(evaluator, 4, SilentProgress()) as alone:
        assert alone.n_processes == alone.n_at_work == 1
        assert figures(scored(alone, TRIALS)) == figures(evaluator.score_trials(TRIALS))


def test_they_end_with_their_parent(tmp_path: Path) -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_lanes import make_evaluator, scored, TRIALS
from heretic.lanes import Lanes
from heretic.utils import SilentProgress
with Lanes(make_evaluator(Path("m")), 3, SilentProgress()) as lanes:
    scored(lanes, TRIALS)
    print(*(process.pid for process in lanes.processes), flush=True)
    time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert parent.stdout is not None
    pids = list(map(int, parent.stdout.readline().split()))
    assert len(pids) == 3 and all(map(psutil.pid_exists, pids))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
