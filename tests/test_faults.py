"""Faults at random moments of a whole run, from the search to the saved model: SIGKILL, SIGTERM, Ctrl+C, a full disk.

Each time the old folder or the new one is whole, no finished trial is lost, and the next run ends well and cleans up only what is its own.
"""

import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import process
from conftest import BAD, GOOD, SMALL
from heretic.saving.hashed_file import sha256
from test_resume import complete, facts

N_TRIALS = 3
RUN = ["--study-checkpoint-dir", "disk/studies", "--trials-per-batch", "1"]
SAVE = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "disk/out", "--overwrite"]
# Of what Python's interpreter tells about, what changes something on the disk.
WRITES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "shutil.rmtree")
# From Linux's sched.h.
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A working directory whose `disk` holds an earlier result in `out`, and a folder named like a leftover."""
    place = tmp_path_factory.mktemp("faults") / "template"
    shutil.copytree(tiny_model, place / "m")
    (place / "good.txt").write_text("\n".join(GOOD))
    (place / "bad.txt").write_text("\n".join(BAD))
    (place / "config.toml").write_text(SMALL.replace("n_trials = 3", f"n_trials = {N_TRIALS}"))
    (place / "disk" / ".out.heretic-mine" / "new").mkdir(parents=True)
    (place / "disk" / ".out.heretic-mine" / "new" / "precious.txt").write_text("mine")
    assert process.wait(process.start([*RUN, *SAVE], "output.txt", lambda: os.chdir(place))) == 0
    shutil.rmtree(place / "disk" / "studies")
    (place / "output.txt").unlink()
    (place / "disk" / "out" / "of before.txt").write_text("old")
    return place


@pytest.fixture
def fresh(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the working directory anew, as it was before any fault."""

    def make() -> None:
        os.chdir(tmp_path)
        shutil.rmtree(tmp_path / "now", ignore_errors=True)
        shutil.copytree(place, tmp_path / "now")
        os.chdir(tmp_path / "now")

    monkeypatch.chdir(tmp_path)
    return make


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def check(old: dict[str, str]) -> list[Any]:
    """Check what a fault left; the trials that are complete."""
    out = Path("disk/out")
    found = hashes(out)
    if found != old:
        recorded = json.loads((out / "heretic.json").read_bytes())["files"]
        assert {name: digest for name, digest in found.items() if name != "heretic.json"} == recorded
    assert Path("disk/.out.heretic-mine/new/precious.txt").read_text() == "mine"
    journal = Path("disk/studies/m.jsonl")
    if not journal.exists():
        return []
    copy = Path("copy.jsonl")
    shutil.copyfile(journal, copy)
    trials = complete(copy)
    # A trial is told on the screen when it is on the disk.
    assert len(trials) >= Path("output.txt").read_text().count("\nTrial ")
    return facts(trials)


def check_end(before: list[Any]) -> None:
    """Let the next run end, and check that it has everything, and has left nothing but it."""
    assert process.wait(process.start([*RUN, *SAVE], "output.txt")) == 0, Path("output.txt").read_text()
    trials = check({})
    assert trials[: len(before)] == before and len(trials) >= N_TRIALS
    assert sorted(path.name for path in Path("disk").iterdir()) == [".out.heretic-mine", "out", "studies"]
    assert sorted(path.name for path in Path("disk/studies").iterdir() if path.suffix not in (".lock", ".html")) == ["m.jsonl"]


def at_each_write(act: Callable[[], None]) -> None:
    """Have this process act before each change of a file or folder here. For its whole life."""
    pid, here = os.getpid(), str(Path.cwd())

    def hook(event: str, arguments: Any) -> None:
        if event not in WRITES or os.getpid() != pid or not str(arguments[0]).startswith(("disk", here)):
            return
        if event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            act()

    sys.addaudithook(hook)


def kill_at_write(number: int, signal_number: int) -> None:
    """Have this process get a signal before its `number`-th change of a file or folder here."""
    numbers = count()
    at_each_write(lambda: os.kill(os.getpid(), signal_number) if next(numbers) == number else None)


def count_writes() -> None:
    """Have this process note each change of a file or folder here."""
    file = os.open("writes", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    at_each_write(lambda: os.write(file, b".") and None)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["SIGKILL", "SIGTERM", "Ctrl+C"])
def test_a_signal_at_any_moment(place: Path, fresh: Callable[[], None], number: signal.Signals) -> None:
    """Half of the moments by the clock, half by the changes of files."""
    old, generator = hashes(place / "disk" / "out"), random.Random(int(number))
    fresh()
    before = time.perf_counter()
    assert process.wait(process.start([*RUN, *SAVE], "output.txt", count_writes)) == 0, Path("output.txt").read_text()
    seconds, n_writes = time.perf_counter() - before, Path("writes").stat().st_size
    codes = []
    for i in range(13):
        fresh()
        if i % 2:
            pid = process.start([*RUN, *SAVE], "output.txt")
            time.sleep(generator.uniform(0.1, 1) * seconds)
            os.kill(pid, number)
            if number == signal.SIGINT:  # the first one asks a search to stop, the second one leaves
                time.sleep(generator.uniform(0, 0.1))
                os.kill(pid, number)
        else:
            pid = process.start([*RUN, *SAVE], "output.txt", partial(kill_at_write, generator.randrange(n_writes), number))
        codes.append(process.wait(pid))
        check_end(check(old))
    expected = {signal.SIGINT: {0, 130}}.get(number, {0, -number})
    assert set(codes) <= expected and len(set(codes) - {0}) == 1, codes


def own_disk(folder: Path, size: int) -> None:
    """Mount a disk of a size in KiB that only this process and its children see. Raises `OSError` if that is not allowed."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", folder], capture_output=True, check=False).returncode:
        raise OSError("mount")


def in_a_fork(act: Callable[[], None]) -> str:
    """What goes wrong in a process that acts; nothing if nothing does."""
    report = Path("report.txt").absolute()
    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException:
            report.write_text(traceback.format_exc())
        finally:
            os._exit(0)
    process.wait(pid)
    return report.read_text() if report.exists() else ""


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_moment(place: Path, fresh: Callable[[], None]) -> None:
    old, generator = hashes(place / "disk" / "out"), random.Random(28)
    fresh()
    if in_a_fork(lambda: own_disk(Path("disk"), 64)):
        pytest.skip("this machine does not let processes mount a disk of their own")
    before = disk_size()
    assert process.wait(process.start([*RUN, *SAVE], "output.txt")) == 0
    needed = disk_size() + before  # the old result is there until the new one is
    codes = Path("../codes.txt").resolve()
    for _ in range(11):
        fresh()
        size = generator.randrange(before + 4, needed + 16)

        def act(size: int = size) -> None:
            own_disk(Path("disk"), size)
            shutil.copytree(place / "disk", "disk", dirs_exist_ok=True)
            code = process.wait(process.start([*RUN, *SAVE], "output.txt"))
            with codes.open("a") as file:
                file.write(f"{code}\n")
            told = Path("output.txt").read_text()
            assert code in (0, 1) and "Traceback" not in told and "bug in heretic" not in told, told
            assert (code == 1) == ("Error: " in told), told
            found = check(old)
            subprocess.run(["mount", "-o", "remount,size=64m", "disk"], check=True)
            check_end(found)

        assert in_a_fork(act) == ""
    assert "1" in codes.read_text().split()


def disk_size() -> int:
    """KiB that `disk` takes, in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4 if path.is_file() else 4 for path in Path("disk").rglob("*"))
