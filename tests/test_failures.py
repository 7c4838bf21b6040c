"""What goes wrong in the middle of a run: it is told, nothing that was finished is lost, and the run goes on to its end."""

import errno
import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from safetensors import SafetensorError

from conftest import Outcome
from heretic.device import free_memory, is_out_of_memory, memory_limits
from heretic.errors import ModelError
from heretic.evaluator import Evaluator
from heretic.settings_sources import load_settings
from heretic.study.checkpoint import Checkpoint, read_study
from heretic.study.journal import JournalLock

Heretic = Callable[..., Outcome]
JOURNAL = Path("checkpoints/m.jsonl")
SAVE = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"]
ALONE = ["--n-finalists", "0", "--no-report", "--trials-per-batch", "1"]
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

SCORERS = """
from heretic.scoring.scorers import Scorer


class Odd(Scorer):
    def score(self, outputs):
        return float(len(outputs.harmful_responses[0].text))

    def objective(self, value, refusals):
        {body}
"""


def study() -> optuna.Study:
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(JOURNAL))))


# Trials


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return float('nan')", "the objective of the scorer odd is nan, which is not a finite number"),
        ("return -float('inf')", "the objective of the scorer odd is -inf, which is not a finite number"),
        ("return 'three'", "the objective of the scorer odd failed: ValueError: could not convert string to float: 'three'"),
        ("raise KeyError('mine')", "the objective of the scorer odd failed: KeyError: 'mine'"),
    ],
)
def test_an_objective_that_fails_is_a_failed_trial(heretic: Heretic, workplace: Path, body: str, told: str) -> None:
    """It counts, so that it is asked for once, and a resumed run finds it done."""
    Path("odd.py").write_text(SCORERS.format(body=body))
    scorers = {"odd": {"use": "odd.py:Odd", "direction": "minimize"}}
    arguments = ["--scorers", json.dumps(scorers), *ALONE]
    for _ in range(2):
        outcome = heretic(*arguments)
        last = f"Error: No trial could be scored: all 3 failed. The last one: TrialError: {told}\n"
        assert (outcome.code, outcome.err) == (1, last)
    trials = study().trials
    assert [trial.state.name for trial in trials] == ["FAIL"] * 3
    assert {trial.user_attrs["failure"] for trial in trials} == {f"TrialError: {told}"}


def break_trials(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    """Have the scoring of one trial (of those scored alone) raise an error."""
    score_trials, numbers = Evaluator.score_trials, iter(range(1000))

    def wrapped(self: Evaluator, ablations: Any, *rest: Any) -> Any:
        if next(numbers) == number:
            raise error
        return score_trials(self, ablations, *rest)

    monkeypatch.setattr(Evaluator, "score_trials", wrapped)


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_in_a_trial_is_told_as_one(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch, debug: bool) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    break_trials(monkeypatch, 1, KeyError("lost hf_secret"))
    outcome = heretic(*ALONE, *(["--debug"] if debug else []))
    told = "KeyError: 'lost [token]' (this is a bug in heretic; --debug shows where it happened)."
    assert outcome.code == 0
    assert study().trials[1].user_attrs["failure"] == told
    assert f"Warning: Trial 1 failed: {told}" in outcome.out
    assert ("Traceback (most recent call last)" in outcome.out) == debug
    if debug:
        shown = outcome.out[outcome.out.index("Trial 1:\nTraceback") :]
        assert "raise error" in shown and "KeyError: 'lost [token]'" in shown
    assert [trial.state.name for trial in study().trials] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_memory_that_runs_out_in_a_trial_is_no_bug(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_trials(monkeypatch, 0, NO_MEMORY)
    outcome = heretic(*ALONE, "--debug")
    told = "memory ran out (OutOfMemoryError: CUDA out of memory. Tried to allocate 9.00 GiB)."
    assert f"Warning: Trial 0 failed: {told}" in outcome.out and "Traceback" not in outcome.out
    assert study().trials[0].user_attrs["failure"] == told


def test_a_bug_that_only_several_trials_together_show_is_told(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score_trials = Evaluator.score_trials

    def crash(self: Evaluator, ablations: Any, *rest: Any) -> Any:
        if len(ablations) > 1:
            raise KeyError("mine")
        return score_trials(self, ablations, *rest)

    monkeypatch.setattr(Evaluator, "score_trials", crash)
    outcome = heretic("--n-finalists", "0", "--no-report", "--trials-per-batch", "3")
    told = "KeyError: 'mine' (this is a bug in heretic; --debug shows where it happened)."
    assert f"Warning: Trials are scored one by one, because scoring them together failed: {told}" in outcome.out
    assert [trial.state.name for trial in study().trials] == ["COMPLETE"] * 3


# Finalists and report


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NO_MEMORY, "memory ran out (OutOfMemoryError: CUDA out of memory. Tried to allocate 9.00 GiB)."),
        (KeyError("mine"), "KeyError: 'mine' (this is a bug in heretic; --debug shows where it happened)."),
    ],
)
def test_finalists_and_report_that_fail_do_not_keep_a_run_from_its_end(
    heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    """Nor do they a resumed one."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("heretic.study.finalists.Evaluator", fail)
    monkeypatch.setattr("heretic.session.stages.take_samples", fail)
    for overwrite in ([], ["--overwrite"]):
        outcome = heretic(*SAVE, *overwrite)
        assert outcome.code == 0, outcome.err
        assert f"Warning: The finalists were not scored again: {told}" in outcome.out
        assert f"Warning: The report contains no new responses: {told}" in outcome.out
        assert "Saved trial " in outcome.out and Path("checkpoints/m.report.html").is_file()
    monkeypatch.setattr("heretic.session.stages.write_report", fail)
    outcome = heretic(*SAVE, "--overwrite")
    assert outcome.code == 0 and f"Warning: No report was written: {told}" in outcome.out


def test_finalists_that_do_not_fit_together_are_scored_one_by_one(
    heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert heretic("--n-trials", "6", "--n-finalists", "0").code == 0
    score_trials = Evaluator.score_trials

    def too_many(self: Evaluator, ablations: Any, *rest: Any) -> Any:
        if len(ablations) > 1:
            raise NO_MEMORY
        return score_trials(self, ablations, *rest)

    monkeypatch.setattr(Evaluator, "score_trials", too_many)
    outcome = heretic("--n-trials", "6", "--n-finalists", "8", "--trials-per-batch", "4")
    told = "memory ran out (OutOfMemoryError: CUDA out of memory. Tried to allocate 9.00 GiB)."
    assert outcome.code == 0
    assert f"Warning: Trials are scored one by one, because scoring them together failed: {told}" in outcome.out
    found = study().user_attrs["finalists"]["trials"]
    assert len(found) > 1 and all("scores" in entry for entry in found.values())


# The check of what was saved


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NO_MEMORY, "memory ran out (OutOfMemoryError: CUDA out of memory. Tried to allocate 9.00 GiB)."),
        (ModelError("The model could not be loaded in any dtype."), "The model could not be loaded in any dtype."),
        (KeyError("mine"), "KeyError: 'mine' (this is a bug in heretic; --debug shows where it happened)."),
    ],
)
def test_a_check_that_cannot_be_made_leaves_the_saved_model(
    heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("heretic.saving.verify.load_model", fail)
    outcome = heretic(*SAVE)
    assert outcome.code == 0
    assert f"Warning: The saved model is kept, but could not be scored again: {told}" in outcome.out
    assert "saved_kl_divergence" not in json.loads(Path("out/heretic.json").read_text())
    assert Path("out/model.safetensors").is_file()


def test_an_interrupted_check_leaves_the_saved_model(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("heretic.saving.verify.load_model", interrupt)
    outcome = heretic(*SAVE)
    assert outcome.code == 0
    assert "Interrupted: the saved model is not scored again. You can score it with --evaluate-model." in outcome.out
    assert Path("out/model.safetensors").is_file()


def test_a_process_that_is_killed_in_the_check_has_saved_the_model(heretic: Heretic, workplace: Path) -> None:
    """As the system does it if memory runs out."""
    assert heretic(*ALONE).code == 0
    pid = os.fork()
    if pid == 0:
        import heretic.saving.verify

        heretic.saving.verify.load_model = lambda *_: os.kill(os.getpid(), 9)  # type: ignore[assignment]
        heretic_command(*SAVE, *ALONE)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    assert heretic("--evaluate-model", "out").code == 0


def heretic_command(*arguments: str) -> None:
    from heretic.main import run_command

    try:
        run_command(arguments)
    finally:
        os._exit(1)


def test_what_the_check_finds_is_in_the_record(heretic: Heretic, workplace: Path) -> None:
    """The saved model's divergence is the trial's up to the rounding of its weights, of which float32 has next to none."""
    outcome = heretic(*SAVE)
    assert outcome.code == 0
    record = json.loads(Path("out/heretic.json").read_text())
    assert record["saved_kl_divergence"] == pytest.approx(record["scores"]["kl_divergence"], rel=1e-3, abs=1e-6)
    assert list(record)[-1] == "files" and "model.safetensors" in record["files"]
    assert f"The saved model's KL divergence on harmless prompts is {record['saved_kl_divergence']:.4f}; the trial's was" in outcome.out
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith(".")) == []


# The journal


def test_a_line_that_is_just_being_written_is_waited_for(heretic: Heretic, workplace: Path) -> None:
    """By whoever opens the study to work on it; whoever only reads it leaves the line out."""
    assert heretic(*ALONE).code == 0
    whole = JOURNAL.read_bytes()
    begun = whole.rfind(b"\n", 0, -1) + 10
    JOURNAL.write_bytes(whole[:begun])
    context = multiprocessing.get_context("fork")
    holds, may_go_on = context.Event(), context.Event()

    def write_slowly() -> None:
        lock = JournalLock(JOURNAL)
        lock.acquire()
        holds.set()
        may_go_on.wait(30)
        with JOURNAL.open("ab") as file:
            file.write(whole[begun:])
        lock.release()

    writer = context.Process(target=write_slowly)
    writer.start()
    assert holds.wait(30)
    assert len(read_study(JOURNAL)[0].trials) == 3
    threading.Timer(0.5, may_go_on.set).start()
    with Checkpoint(load_settings([])) as checkpoint:
        assert (checkpoint.lost_bytes, checkpoint.n_done) == (0, 3)
    writer.join()
    assert JOURNAL.read_bytes() == whole


# Memory


@pytest.mark.parametrize(
    "error",
    [
        NO_MEMORY,
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("HIP error: out of memory"),
        RuntimeError("HIP error: hipErrorOutOfMemory"),
        RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB, other allocations: 1 GB, max allowed: 9 GB)."),
        RuntimeError("Invalid buffer size: 50.00 GiB"),
        RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        RuntimeError("NPU out of memory. NPUWorkspaceAllocator tried to allocate 9 GiB"),
        SafetensorError("Error while deserializing header: I/O error: Cannot allocate memory (os error 12)"),
    ],
)
def test_errors_that_mean_a_want_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("a text about being out of memory"),
    ],
)
def test_errors_that_do_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def process_in(folder: Path, cgroup: str, mountinfo: str) -> Path:
    group(folder, cgroup=cgroup, mountinfo=mountinfo)
    return folder


def test_limits_of_control_groups_version_2(tmp_path: Path) -> None:
    """Those of all groups above count as well; a cache of files that can be dropped does not."""
    top = tmp_path / "sys"
    group(top, cgroup__controllers="memory")  # the topmost group has no limit
    group(top / "slice", memory__max=8000, memory__high="max", memory__current=5000, memory__stat="anon 1000\ninactive_file 2000")
    group(top / "slice" / "job", memory__max="max", memory__high=6000, memory__current=1500, memory__stat="inactive_file 500")
    mounts = f"30 23 0:26 / {top} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n31 23 0:27 / /proc rw - proc proc rw"
    assert memory_limits(process_in(tmp_path / "p", "0::/slice/job", mounts)) == [(6000, 1000), (8000, 3000)]
    assert memory_limits(process_in(tmp_path / "p", "0::/", mounts)) == []


def test_limits_of_control_groups_version_1(tmp_path: Path) -> None:
    top = tmp_path / "memory"
    group(top, memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=9, memory__stat="total_inactive_file 0")
    files = {"memory__limit_in_bytes": 7000, "memory__usage_in_bytes": 4000, "memory__stat": "cache 3\ntotal_inactive_file 1000"}
    group(top / "slurm" / "job_7", **files)
    mounts = f"34 31 0:31 / {tmp_path / 'cpu'} rw - cgroup cgroup rw,cpu\n35 31 0:32 / {top} rw,relatime - cgroup cgroup rw,memory"
    own = "5:cpu,cpuacct:/slurm\n4:memory:/slurm/job_7\n0::/"
    assert memory_limits(process_in(tmp_path / "p", own, mounts)) == [(7000, 3000)]


def test_limits_in_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    """Its mount begins at the group that the process is in; without a namespace of its own, the process is told the host's path."""
    top = tmp_path / "memory"
    group(top, memory__limit_in_bytes=7000, memory__usage_in_bytes=4000, memory__stat="total_inactive_file 1000")
    mounts = f"35 31 0:32 /docker/abc {top} ro - cgroup cgroup rw,memory"
    assert memory_limits(process_in(tmp_path / "p", "4:memory:/docker/abc", mounts)) == [(7000, 3000)]
    assert memory_limits(process_in(tmp_path / "p", "4:memory:/", mounts)) == [(7000, 3000)]


def test_limits_where_there_are_none(tmp_path: Path) -> None:
    assert memory_limits(tmp_path / "nothing") == []


def test_free_memory_is_what_the_tightest_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("heretic.device.memory_limits", lambda: [(7000, 3000), (9000, 1000)])
    assert free_memory(cpu) == 4000
    monkeypatch.setattr("heretic.device.memory_limits", list)
    assert 0 < free_memory(cpu) < 2**60


def test_an_interrupted_report_leaves_the_front(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("heretic.session.stages.take_samples", interrupt)
    outcome = heretic()
    assert (outcome.code, outcome.err) == (0, "")
    assert "Interrupted: the report contains no new responses." in outcome.out and "Pareto front" in outcome.out
    assert Path("checkpoints/m.report.html").is_file()
