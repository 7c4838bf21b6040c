"""Saving that is killed or runs out of disk: no target or a complete one, and nothing is left behind for long."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import process
from conftest import Outcome
from heretic.commands.read_record import open_record
from heretic.commands.rebuild import rebuild
from heretic.saving.hashed_file import sha256
from heretic.saving.staging import Target, clean_up, staged
from heretic.utils import SilentProgress
from test_faults import in_a_fork, own_disk
from test_rebuild import make
from tiny import build
from tiny import save as save_original

Heretic = Callable[..., Outcome]
N_RANDOM_KILLS = 12


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved result, large enough that writing it takes a while."""
    place = tmp_path_factory.mktemp("result")
    save_original(place / "m", build("llama", torch.bfloat16, hidden_size=256, intermediate_size=4096, num_hidden_layers=2))
    return make(place / "m", place / "out", size=256)


def is_complete(folder: Path, result: Path) -> bool:
    """Whether every file of a saved folder is there and holds what its record says, which is what the result's says."""
    files = json.loads((folder / "heretic.json").read_text())["files"]
    assert files == json.loads((result / "heretic.json").read_text())["files"]
    return all(sha256(folder / name) == digest for name, digest in files.items())


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_at_random_moments(tmp_path: Path, result: Path, replacing: bool, heretic: Heretic) -> None:
    target, generator, n_early = tmp_path / "out", random.Random(1), 0
    source = ["--export-from", str(result), "--model", str(result.parent / "m"), "--save-directory"]
    arguments = [*source, str(target), "--overwrite"]
    if replacing:
        target.mkdir()
        (target / "precious.txt").write_text("mine")
    start = time.perf_counter()
    assert process.wait(process.start([*source, str(tmp_path / "timing")])) == 0
    seconds = time.perf_counter() - start
    shutil.rmtree(tmp_path / "timing")
    for _ in range(N_RANDOM_KILLS):
        pid = process.start(arguments)
        time.sleep(generator.uniform(0, 1.2 * seconds))
        os.kill(pid, signal.SIGKILL)
        n_early += process.wait(pid) == -signal.SIGKILL
        if (target / "precious.txt").exists():
            assert os.listdir(target) == ["precious.txt"]  # noqa: PTH208
        elif target.exists():
            assert is_complete(target, result)
        assert len(leftovers(tmp_path)) <= 1  # each one cleans up after the one before
    assert n_early
    assert heretic(*arguments).code == 0
    assert is_complete(target, result)
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208


def killed_before(call: int, result: Path, target: Path) -> bool:
    """Rebuild in a process that is killed before its `call`-th flush or rename; whether it was."""
    pid = os.fork()
    if pid == 0:
        try:
            left = call

            def counted(function: Callable[..., Any]) -> Callable[..., Any]:
                def wrapper(*arguments: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments)

                return wrapper

            os.fsync = counted(os.fsync)
            type(target).rename = counted(type(target).rename)  # type: ignore[method-assign]
            with open_record(str(result)) as record:
                rebuild(record, str(target), True, str(result.parent / "m"), False, SilentProgress())
            os._exit(0)
        finally:
            os._exit(1)
    code = process.wait(pid)
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("swaps", [True, pytest.param(False, marks=pytest.mark.long)])
def test_killed_before_every_step(tmp_path: Path, result: Path, swaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder or the new one is there. Where the system swaps no folders, the old one is gone for a moment between two renames;
    the next run brings it back first."""
    if not swaps:
        monkeypatch.setattr("heretic.saving.staging._swap", lambda a, b: False)
    target, states = tmp_path / "out", []
    for call in range(100):
        target.mkdir()
        (target / "precious.txt").write_text("mine")
        was_killed = killed_before(call, result, target)
        states.append("old" if (target / "precious.txt").exists() else "new" if target.exists() else "none")
        if states[-1] == "new":
            assert is_complete(target, result)
        if states[-1] == "none":
            rebuild_again(result, tmp_path / "elsewhere")  # another target's run does not touch it
            assert len(leftovers(tmp_path)) == 1
            with pytest.raises(Exception, match="is not empty"):
                rebuild_again(result, target)
            assert (target / "precious.txt").read_text() == "mine"
        elif not was_killed:
            break
        else:
            rebuild_again(result, target, overwrite=True)
            assert is_complete(target, result)
        assert leftovers(tmp_path) == []
        shutil.rmtree(target)
    assert states[0] == "old" and states.count("none") == (not swaps) and states[-1] == "new" and len(states) > 8


def rebuild_again(result: Path, target: Path, overwrite: bool = False) -> None:
    with open_record(str(result)) as record:
        rebuild(record, str(target), overwrite or target.name == "elsewhere", str(result.parent / "m"), False, SilentProgress())


def test_two_at_the_same_time_leave_each_other_alone(tmp_path: Path, result: Path) -> None:
    """What another process is writing is not taken for a leftover."""
    with staged(Target(tmp_path / "out")) as folder:
        (folder / "half").touch()
        clean_up(tmp_path / "out")
        assert (folder / "half").exists()
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208


@pytest.mark.usefixtures("workplace")
def test_a_full_disk(heretic: Heretic) -> None:
    """A real one, of a few pages, in a process that may mount it for itself alone."""
    disk, output = Path("disk"), Path("output.txt")
    disk.mkdir()
    save = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory"]
    if in_a_fork(lambda: own_disk(disk, 48)):
        pytest.skip("this machine does not let processes mount a disk of their own")

    def act() -> None:
        own_disk(disk, 48)
        assert process.wait(process.start([*save, "disk/out"], str(output))) == 1
        assert list(disk.iterdir()) == []

    assert in_a_fork(act) == ""
    told = [line for line in output.read_text().splitlines() if line.startswith(("Error", "Traceback"))]
    assert told == [
        "Error: disk/out cannot be written: No space left on device. Nothing was left there; the study is safe. Free some space or choose "
        "another --save-directory, then save again."
    ]
    again = heretic(*save, "out")
    assert again.code == 0, again
    assert "(3 trials done)" in again.out and "Trial 1/3" not in again.out
    assert Path("out/model.safetensors").is_file()
