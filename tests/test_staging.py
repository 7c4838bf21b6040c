"""Which folders are refused as targets, and what becomes of folders that are replaced, whoever comes in between."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Outcome
from heretic.errors import ExportError
from heretic.saving import staging
from heretic.saving.staging import Target, clean_up, open_target, replace_file, staged, workspace

Heretic = Callable[..., Outcome]
SAVE = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--overwrite", "--save-directory"]


def fill(target: Target, text: str = "new") -> None:
    with staged(target) as folder:
        (folder / "file").write_text(text)


@pytest.fixture(params=[True, False], ids=["swap", "two renames"])
def swaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the system swaps two folders at once, or not."""
    if not request.param:
        monkeypatch.setattr("heretic.saving.staging._swap", lambda a, b: False)
    return bool(request.param)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(target: Target) -> str:
    with pytest.raises(ExportError) as caught:
        target.check()
    return str(caught.value)


# Refused at the start


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("m", "m is the model, which must not be replaced."),
        ("m/../m", "m/../m is the model, which must not be replaced."),
        ("other_name", "other_name is a symbolic link. Choose the folder that it leads to, {here}/m, or another one."),
        ("dangling", "dangling is a symbolic link. Choose the folder that it leads to, {here}/nowhere, or another one."),
        ("m/tokenizer", "m/tokenizer is inside the model, which must not be replaced."),
        (".", "{here} contains the model, which must not be replaced."),
        ("..", "{above} contains the model, which must not be replaced."),
        ("studies", "studies is the folder of studies, which must not be replaced."),
        ("studies/artifacts", "studies/artifacts is inside the folder of studies, which must not be replaced."),
        ("home", "home contains your home directory, which must not be replaced."),
        ("cache", "cache is inside the hub's cache, which must not be replaced."),
        ("good.txt", "good.txt is a file."),
        ("good.txt/out", "good.txt/out cannot be created: {here}/good.txt is a file."),
        ("/proc", "/proc is a mount point, which cannot be replaced. Choose a folder in it, such as /proc/model."),
        ("n" * 300, "n" * 300 + " cannot be used: File name too long."),
        ("n" * 300 + "/out", "n" * 300 + "/out cannot be used: File name too long."),
    ],
)
def test_folders_that_are_refused_at_the_start(
    heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch, folder: str, told: str
) -> None:
    """Before the model is loaded, and with `--overwrite`."""
    for name in ("m/tokenizer", "studies/artifacts", "home/me", "cache"):
        Path(name).mkdir(parents=True)
        Path(name, "precious.txt").write_text("mine")
    Path("other_name").symlink_to("m")
    Path("dangling").symlink_to("nowhere")
    monkeypatch.setenv("HOME", str(workplace / "home" / "me"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(workplace / "cache" if folder == "cache" else workplace / "hub"))
    before = sorted(workplace.rglob("*"))
    outcome = heretic("--study-checkpoint-dir", "studies", *SAVE, folder)
    told = told.format(here=workplace, above=workplace.parent)
    if not told.endswith(("one.", "model.")):
        told += " Choose another --save-directory."
    if folder == "cache":
        told = told.replace("is inside", "is")
    assert (outcome.code, outcome.out, outcome.err) == (1, "", f"Error: {told}\n")
    assert sorted(workplace.rglob("*")) == before


def test_the_folder_of_a_gguf_file(heretic: Heretic, workplace: Path) -> None:
    Path("models").mkdir()
    Path("models", "my.gguf").write_text("weights")
    told = "Error: models contains the model, which must not be replaced. Choose another --save-directory.\n"
    assert heretic("models/my.gguf", *SAVE, "models") == Outcome(1, "", told)


def test_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model is elsewhere; also when it is empty, and by another name."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    told = f"{tmp_path / 'here'} is the working directory, which must not be replaced. Choose another --save-directory."
    with pytest.raises(ExportError) as caught:
        open_target(".", False)
    assert str(caught.value) == told
    assert refusal(Target(tmp_path / "here", True)) == told
    assert "contains the working directory" in refusal(Target(tmp_path, True))


def test_what_is_refused_only_with_something_in_it(tmp_path: Path) -> None:
    """A folder beside the model's files may be made, and replaced if it is an earlier result."""
    model = tmp_path / "m"
    model.mkdir()
    target = Target(model / "out", True, (("the model", model),))
    target.check()
    (model / "out").mkdir()
    target.check()
    (model / "out" / "weights").touch()
    assert refusal(target) == f"{model / 'out'} is inside the model, which must not be replaced. Choose another --save-directory."
    (model / "out" / "heretic.json").touch()
    target.check()


def test_a_folder_that_nobody_may_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may do everything
    told = f"{tmp_path / 'a' / 'out'} cannot be created: {tmp_path} is not writable. Choose another --save-directory."
    assert refusal(Target(tmp_path / "a" / "out")) == told


def test_mount_points(tmp_path: Path) -> None:
    """One that is bound to a second place of the same disk, which looks like any folder; and a folder that holds one."""
    for name in ("disk", "out/place"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "disk" / "precious.txt").write_text("mine")
    script = f"mount --bind {tmp_path}/disk {tmp_path}/out/place && exec {sys.executable} -c '{CHECK}' {tmp_path}/out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False, env=environment)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("this machine does not let processes mount a disk of their own")
    place = tmp_path / "out" / "place"
    assert done.stdout.splitlines() == [
        f"{tmp_path / 'out'} contains the mount point {place}. Choose another --save-directory.",
        f"{place} is a mount point, which cannot be replaced. Choose a folder in it, such as {place / 'model'}.",
    ], done


CHECK = """
import sys
from pathlib import Path
from heretic.errors import ExportError
from heretic.saving import staging
from heretic.saving.staging import Target
for path in (Path(sys.argv[1]), Path(sys.argv[1], "place")):
    try:
        Target(path, True).check()
    except ExportError as error:
        print(error)
"""


# Refused again just before the rename


def test_the_second_of_two_saves_into_one_folder_leaves_the_firsts_result(tmp_path: Path) -> None:
    target = Target(tmp_path / "out")
    with pytest.raises(ExportError) as caught, staged(target) as folder:
        (folder / "file").write_text("second")
        fill(target, "first")
    told = f"The folder {tmp_path / 'out'} is not empty. Choose another --save-directory, or add --overwrite."
    assert str(caught.value) == told
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_somebody_who_is_faster_than_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last check and the rename only the system can refuse."""
    target = Target(tmp_path / "out")
    check = Target.check

    def check_and_let_in(self: Target) -> None:
        check(self)
        if not self.path.exists():
            self.path.mkdir()
            (self.path / "file").write_text("theirs")

    monkeypatch.setattr(Target, "check", check_and_let_in)
    with pytest.raises(ExportError, match="is not empty"):
        fill(target)
    assert (tmp_path / "out" / "file").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_a_folder_that_becomes_a_link_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ExportError, match="is a symbolic link"), staged(Target(tmp_path / "out", True)):
        (tmp_path / "out").symlink_to("elsewhere")
    assert names(tmp_path) == ["elsewhere", "out"] and (tmp_path / "out").is_symlink()


def test_a_folder_is_replaced(tmp_path: Path, swaps: bool) -> None:
    target = Target(tmp_path / "out", True)
    for text in ("one", "two"):
        fill(target, text)
        assert (target.path / "file").read_text() == text
        assert names(tmp_path) == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(Target(tmp_path / "out"))
    assert (names(tmp_path), names(tmp_path / "out")) == (["out"], ["file"])


# What is left when it is cut off


@pytest.mark.parametrize("name", ["out", "out [1]*?"])
def test_an_interrupt_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    target = Target(tmp_path / name, True)
    fill(target, "old")
    rename = Path.rename
    monkeypatch.setattr("heretic.saving.staging._swap", lambda a, b: False)

    def interrupt(self: Path, to: Path) -> Path:
        moved = rename(self, to)
        if self == target.path:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fill(target)
    assert (target.path / "file").read_text() == "old"
    assert names(tmp_path) == [name]


def killed_between_renames(target: Target) -> Path:
    """Leave what a process does that was killed when the old folder was away and the new one not there; the workspace."""
    fill(target, "old")
    pid = os.fork()
    if pid == 0:
        with staged(target) as folder:
            (folder / "file").write_text("new")
            target.path.rename(folder.parent / "replaced")
            os._exit(0)
    os.waitpid(pid, 0)
    (place,) = (path for path in target.path.parent.iterdir() if path.name.startswith("."))
    return place


@pytest.mark.parametrize("name", ["out", "out [1]*?"])
def test_the_next_run_brings_the_old_folder_back(tmp_path: Path, name: str) -> None:
    target = Target(tmp_path / name, True)
    killed_between_renames(target)
    with pytest.raises(ExportError, match="is not empty"):
        open_target(str(target.path), False)
    assert (target.path / "file").read_text() == "old"
    assert names(tmp_path) == [name]


def test_an_old_folder_whose_place_is_taken_is_not_deleted(tmp_path: Path) -> None:
    target = Target(tmp_path / "out", True)
    place = killed_between_renames(target)
    target.path.mkdir()
    (target.path / "file").write_text("theirs")
    for _ in range(2):
        with pytest.raises(ExportError) as caught:
            open_target(str(target.path), True)
        assert str(caught.value) == (
            f"A save to {target.path} was interrupted; its previous contents are in {place / 'replaced'}. Move them where you want them, "
            f"delete {place}, then save again."
        )
    assert (place / "replaced" / "file").read_text() == "old"
    shutil.rmtree(target.path)
    target.path.mkdir()  # an empty one gives way
    clean_up(target.path)
    assert (target.path / "file").read_text() == "old" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", [".out.heretic-mine", ".out.heretic-"])
def test_a_folder_of_the_users_that_is_named_like_a_leftover_stays(tmp_path: Path, name: str) -> None:
    for file in ("new/precious.txt", "replaced/precious.txt", "lock", "heretic.txt"):
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_text("mine")
    before = sorted((tmp_path / name).rglob("*"))
    (tmp_path / ".out.heretic-link").symlink_to(tmp_path / name)
    (tmp_path / ".out.heretic-file").write_text("mine")
    fill(Target(tmp_path / "out"))
    clean_up(tmp_path / "out")
    assert sorted((tmp_path / name).rglob("*")) == before
    assert names(tmp_path) == sorted([".out.heretic-link", ".out.heretic-file", name, "out"])


def test_another_targets_workspace_stays(tmp_path: Path) -> None:
    """The one of `out.heretic-1` begins like those of `out`."""
    place = killed_between_renames(Target(tmp_path / "out.heretic-1", True))
    shutil.copytree(place, kept := tmp_path / "kept")
    fill(Target(tmp_path / "out"))
    assert names(place) == names(kept)
    clean_up(tmp_path / "out.heretic-1")
    assert (tmp_path / "out.heretic-1" / "file").read_text() == "old"


@pytest.mark.parametrize("marker", [None, "", "heretic writes"])
def test_a_workspace_that_was_just_begun_is_removed(tmp_path: Path, marker: str | None) -> None:
    place = tmp_path / ".out.heretic-abc"
    place.mkdir()
    (place / "lock").touch()
    if marker is not None:
        (place / "heretic.txt").write_text(marker)
    clean_up(tmp_path / "out")
    assert names(tmp_path) == []


# Flushed before the old one goes


def test_everything_is_on_the_disk_before_the_old_folder_goes(tmp_path: Path, swaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder of the new one before the first rename, and its place before anything is deleted."""
    target = Target(tmp_path / "a" / "b" / "out", True)
    fill(target, "old")
    events: list[tuple[str, int]] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def noted_fsync(descriptor: int) -> None:
        events.append(("flush", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def noted_rename(self: Path, to: Path) -> Path:
        events.append(("rename", self.stat().st_ino))
        return rename(self, to)

    def noted_rmtree(path: Path, *rest: object, **named: object) -> None:
        if Path(path).exists():
            events.append(("delete", os.stat(path).st_ino))  # noqa: PTH116
        rmtree(path, *rest, **named)  # type: ignore[arg-type]

    if swaps:
        swap = staging._swap

        def noted_swap(a: Path, b: Path) -> bool:
            events.append(("rename", a.stat().st_ino))
            return swap(a, b)

        monkeypatch.setattr(staging, "_swap", noted_swap)
    for place, name, function in ((os, "fsync", noted_fsync), (Path, "rename", noted_rename), (shutil, "rmtree", noted_rmtree)):
        monkeypatch.setattr(place, name, function)
    with staged(target) as folder:
        (folder / "sub").mkdir()
        for name in ("sub/small", "heretic.json"):
            (folder / name).write_text("new")
    kinds = [kind for kind, _ in events]
    first_rename, deletion = kinds.index("rename"), kinds.index("delete")
    flushed = {inode for kind, inode in events[:first_rename] if kind == "flush"}
    assert {path.stat().st_ino for path in (target.path, *target.path.rglob("*"))} <= flushed
    assert ("flush", target.path.parent.stat().st_ino) in events[first_rename:deletion]
    assert kinds.count("rename") == (1 if swaps else 2) and "rename" not in kinds[deletion:]


def test_folders_that_are_made_on_the_way_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    fill(Target(tmp_path / "a" / "b" / "out"))
    assert {path.stat().st_ino for path in (tmp_path, tmp_path / "a", tmp_path / "a" / "b")} <= flushed


def test_a_file_is_replaced_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "heretic.json"
    path.write_text("old")
    path.chmod(0o640)
    replace_file(path, b"new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o640)
    assert (names(tmp_path), names(tmp_path / "out")) == (["out"], ["heretic.json"])


def test_a_workspace_is_gone_when_it_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), workspace(tmp_path / "upload") as place:
        (place / "model").mkdir()
        (place / "model" / "weights").touch()
        clean_up(tmp_path / "upload")
        assert (place / "model" / "weights").exists(), "nobody clears away what is at work"
        raise ValueError("mine")
    assert names(tmp_path) == []
