"""Runs that are stopped, interrupted and killed, as real processes, and go on."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

import process
from conftest import Outcome
from heretic.evaluator import Evaluator
from heretic.session import stages

STOPPING = "Stopping: trials that do not finish within 5 seconds are left to the next run. Press Ctrl+C again to leave at once."


def complete(journal: Path) -> list[FrozenTrial]:
    """Complete trials as Optuna's own tools read them, from a copy, as a killed writer may have left half a line."""
    copy = journal.with_suffix(".copy")
    content = journal.read_bytes()
    copy.write_bytes(content[: content.rfind(b"\n") + 1])
    storage = JournalStorage(JournalFileBackend(str(copy)))
    studies = optuna.get_all_study_names(storage)
    if not studies:
        return []
    trials = optuna.load_study(study_name=None, storage=storage).trials
    return [trial for trial in trials if trial.state == TrialState.COMPLETE]


def facts(trials: list[FrozenTrial]) -> list[tuple[object, ...]]:
    return [(trial.params, trial.values, trial.user_attrs) for trial in trials]


def wait_for(text: str, n_times: int = 1, output: Path = Path("output.txt")) -> None:
    deadline = time.monotonic() + 120
    while not (output.exists() and output.read_text().count(text) >= n_times):
        assert time.monotonic() < deadline, f"{text!r} did not come"
        time.sleep(0.005)


def kill_and_resume(arguments: list[str], journal: Path, n_trials: int, n_kills: int, pause: float) -> list[FrozenTrial]:
    """Kill a study at random moments, start it again each time, then let it end. Checks that nothing finished is ever lost.

    A moment is up to `pause` seconds after up to four trials of this start: while it loads, in a trial, or between two.
    """
    generator = random.Random(0)
    output = Path("output.txt")
    before: list[FrozenTrial] = []
    for _ in range(n_kills):
        output.write_text("")
        pid = process.start(arguments, str(output))
        wait_for("\nTrial ", generator.randrange(5))
        time.sleep(generator.uniform(0, pause))
        os.kill(pid, signal.SIGKILL)
        assert process.wait(pid) == -signal.SIGKILL, "it was still at work"
        assert "Traceback" not in output.read_text() and "Error" not in output.read_text()
        after = complete(journal) if journal.exists() else []
        assert facts(after[: len(before)]) == facts(before)
        before = after
    assert 0 < len(before) < n_trials
    assert process.wait(process.start(arguments, str(output))) == 0, output.read_text()
    trials = complete(journal)
    assert facts(trials[: len(before)]) == facts(before)
    assert len(trials) == n_trials
    assert len({str(trial.params) for trial in trials}) == n_trials
    return trials


@pytest.mark.long
def test_killed_at_ten_random_moments(unhurried: Path) -> None:
    arguments = ["--n-trials", "60", "--n-startup-trials", "20", "--trials-per-batch", "1", "--max-response-length", "60"]
    trials = kill_and_resume(arguments, Path("checkpoints/m.jsonl"), 60, n_kills=10, pause=0.05)
    # With one trial at a time the sampler does not notice the interruptions.
    whole = ["--study-checkpoint-dir", "whole"]
    assert process.wait(process.start([*arguments, *whole], "output.txt")) == 0
    assert [trial.params for trial in complete(Path("whole/m.jsonl"))] == [trial.params for trial in trials]


@pytest.mark.slow
def test_the_demonstration_killed_at_five_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fewer = ["--good-evaluation-prompts.split=[:40]", "--bad-evaluation-prompts.split=[:40]", "--trials-per-batch", "4"]
    arguments = ["--demo", "--seed", "1", "--n-trials", "60", *fewer]
    trials = kill_and_resume(arguments, Path("checkpoints/heretic-demo.jsonl"), 60, n_kills=5, pause=0.5)
    assert min(trial.user_attrs["refusals"] for trial in trials) <= 8


def interrupted(moment: str, again: bool = False) -> tuple[int, str]:
    """Start the command, press Ctrl+C when a text has come (and again when that is acknowledged); exit code and output."""
    Path("output.txt").unlink(missing_ok=True)
    pid = process.start([], "output.txt")
    wait_for(moment)
    os.kill(pid, signal.SIGINT)
    if again:
        wait_for(STOPPING)
        os.kill(pid, signal.SIGINT)
    return process.wait(pid), Path("output.txt").read_text()


def test_one_interrupt_stops_the_search(unhurried: Path) -> None:
    code, output = interrupted("Trial 1/5000")
    assert code == 0, output
    assert STOPPING in output
    assert "Pareto front" in output and "To continue from here" in output
    trials = complete(Path("checkpoints/m.jsonl"))
    code, output = interrupted("Trial ")
    assert f"Continuing the study checkpoints/m.jsonl ({len(trials)} trials done)." in output
    assert facts(complete(Path("checkpoints/m.jsonl"))[: len(trials)]) == facts(trials)


def test_an_interrupt_while_something_is_printed() -> None:
    end, begin = os.pipe()

    def press_and_read() -> None:
        time.sleep(0.2)  # until the other thread waits for room in the pipe
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        while read := os.read(end, 2**16):
            found.append(read)

    found: list[bytes] = []
    terminal = threading.Thread(target=press_and_read)
    terminal.start()
    with os.fdopen(begin, "w") as output, stages.stop_on_interrupt(lambda: print("Stopping", file=output, flush=True)) as should_stop:
        output.write("x" * 2**20 + "\n")  # `print` writes a line and its end one after the other
        output.flush()
        assert should_stop()
    terminal.join()
    os.close(end)
    assert b"".join(found) == b"x" * 2**20 + b"\nStopping\n"


def test_running_trials_are_given_up_when_their_time_is_over(
    unhurried: Path, heretic: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--n-trials", 6, "--n-startup-trials", 2, "--trials-per-batch", 2]
    assert heretic(*arguments, "--study-checkpoint-dir", "whole").code == 0
    score_trials, calls = Evaluator.score_trials, []

    def interrupted(self: Evaluator, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return score_trials(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(stages, "GRACE_SECONDS", 0)
        patched.setattr(Evaluator, "score_trials", interrupted)
        outcome = heretic(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert STOPPING.replace("5", "0") in outcome.out and "Pareto front" in outcome.out
    assert len(calls) == 2, "nothing is scored alone after that"
    assert len(complete(Path("checkpoints/m.jsonl"))) == 2
    assert heretic(*arguments).code == 0
    trials, whole = (complete(Path(folder) / "m.jsonl") for folder in ("checkpoints", "whole"))
    assert [(trial.number, trial.params, trial.values) for trial in trials] == [(t.number, t.params, t.values) for t in whole]


def test_two_interrupts_leave_at_once(unhurried: Path) -> None:
    code, output = interrupted("Trial 1/5000", again=True)
    assert code == 130
    assert output.endswith("\nInterrupted.\n")
    assert len(complete(Path("checkpoints/m.jsonl"))) >= 1


def test_an_interrupt_before_any_trial(unhurried: Path) -> None:
    code, output = interrupted("Loading prompts")
    assert (code, output.splitlines()[-1]) == (130, "Interrupted.")
    assert "Traceback" not in output


def test_a_process_that_is_at_work_is_not_disturbed(unhurried: Path, heretic: Callable[..., object]) -> None:
    pid = process.start([], "output.txt")
    wait_for("Trial 1/5000")
    outcome = heretic()
    os.kill(pid, signal.SIGKILL)
    process.wait(pid)
    assert "Another process is working on the study checkpoints/m.jsonl." in str(outcome)
