"""Prompt sources: text files, dataset folders, slices, and the exact line for each that cannot be used."""

import codecs
import shutil
from pathlib import Path
from typing import Any

import pytest

from heretic import demo
from heretic.errors import PromptError
from heretic.prompts import Prompt, fingerprint, load_prompts
from heretic.specifications import PromptSpecification

HELP = "Check the name (hub id, folder or text file), the split, the commit, the network and the access rights."


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def datasets_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset folders as the datasets library writes them. Their names are those of the library's own readers."""
    from datasets import Dataset, DatasetDict

    folder = tmp_path_factory.mktemp("datasets")
    train = Dataset.from_dict({"text": ["a", "b", "c"], "n": [1, 2, 3], "gaps": ["x", None, "z"]})
    test = Dataset.from_dict({"text": ["d"], "n": [4], "gaps": ["y"]})
    train.save_to_disk(folder / "saved")
    DatasetDict(train=train, test=test).save_to_disk(folder / "dict")
    for kind in ("csv", "json", "parquet"):
        (folder / kind).mkdir()
        for name, part in (("train", train), ("test", test)):
            getattr(part, f"to_{kind}")(folder / kind / f"{name}.{kind}")
    return folder


def load(dataset: str, split: str | None = None, column: str | None = None, **more: Any) -> list[str]:
    specification = PromptSpecification(dataset=dataset, split=split, column=column, **more)
    return [prompt.user for prompt in load_prompts(specification, "general", "bad_prompts")]


def told(dataset: str, split: str | None = None, column: str | None = None) -> str:
    with pytest.raises(PromptError) as caught:
        load(dataset, split, column)
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_a_text_file_has_one_prompt_a_line() -> None:
    text = "one\r\n\r\n  \t\n two \x0c still two\u2028and two\nthree"
    Path("a.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    assert load("a.txt") == ["one", " two \x0c still two\u2028and two", "three"]


def test_a_text_file_may_lie_in_the_home_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    Path("a.list").write_text("one\n")
    assert load("~/a.list") == ["one"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("", "abcd"),
        ("[:2]", "ab"),
        ("train[1:3]", "bc"),
        ("[-1:]", "d"),
        ("[:50%]", "ab"),
        ("[:400]", "abcd"),
        ("train[:1]+train[3:]", "ad"),
    ],
)
def test_slices_of_a_text_file(split: str, expected: str) -> None:
    Path("a.txt").write_text("a\nb\nc\nd\n")
    assert load("a.txt", split, column="text") == list(expected)


def test_prefix_suffix_and_system_prompt() -> None:
    Path("a.txt").write_text("one\n")
    plain = PromptSpecification(dataset="a.txt", prefix="<", suffix=">")
    assert load_prompts(plain, "general", "x") == [Prompt(system="general", user="<one>")]
    own = plain.model_copy(update={"system_prompt": ""})
    assert load_prompts(own, "general", "x") == [Prompt(system="", user="<one>")]


@pytest.mark.parametrize("kind", ["saved", "dict", "csv", "json", "parquet"])
def test_dataset_folders(kind: str, datasets_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(datasets_folder)
    for dataset in (kind, f"./{kind}", str(datasets_folder / kind)):
        assert load(dataset, "train", "text") == ["a", "b", "c"]
    assert load(kind, "train[1:]", "text") == ["b", "c"]
    if kind != "saved":  # a single saved dataset has no splits
        assert load(kind, "train[:1]+test", "text") == ["a", "d"]
        assert told(kind, "dev[:1]", "text") == f"bad_prompts: {kind} has no split 'dev'; it has train, test. Set bad_prompts.split."
    assert told(kind, "train", "prompt") == f"bad_prompts: {kind} has no column 'prompt'; it has text, n, gaps. Set bad_prompts.column."
    assert told(kind, "train", "n") == f"bad_prompts: column 'n' of {kind} contains int, not text (row 0)."
    assert told(kind, "train", "gaps") == f"bad_prompts: column 'gaps' of {kind} contains NoneType, not text (row 1)."
    assert told(kind, column="text") == (
        f"bad_prompts: {kind} is a dataset, which needs a split; set bad_prompts.split (a text file needs neither; check the path if "
        "you meant one)."
    )
    assert told(kind, "train") == (
        f"bad_prompts: {kind} is a dataset, which needs a column; set bad_prompts.column (a text file needs neither; check the path if "
        "you meant one)."
    )


def test_wrong_slices(datasets_folder: Path) -> None:
    Path("a.txt").write_text("a\nb\n")
    csv = str(datasets_folder / "csv")
    assert told("a.txt", "[x]") == (
        "bad_prompts: '[x]' is not a split of a.txt with a valid slice: Unrecognized instruction format: train[x]. Set bad_prompts.split."
    )
    assert told("a.txt", "[:1").startswith("bad_prompts: '[:1' is not a split of a.txt with a valid slice")
    assert told(str(datasets_folder / "dict"), "train[x]", "text").startswith("bad_prompts: 'train[x]' is not a split of")
    assert told(csv, "train[x]", "text") == (
        f"bad_prompts: the dataset {csv} cannot be loaded: Unrecognized instruction format: train[x]. {HELP}"
    )


def test_no_prompts(datasets_folder: Path) -> None:
    Path("a.txt").write_text("\n  \n")
    assert told("a.txt") == "bad_prompts: a.txt contains no prompts. Check the file, or the slice of the split."
    Path("a.txt").write_text("a\n")
    assert told("a.txt", "[5:]") == "bad_prompts: a.txt ([5:]) contains no prompts. Check the file, or the slice of the split."
    saved, csv = datasets_folder / "saved", datasets_folder / "csv"
    assert told(str(saved), "train[5:]", "text") == (
        f"bad_prompts: {saved} (train[5:]) contains no prompts. Check the file, or the slice of the split."
    )
    assert told(str(csv), "train[5:]", "text") == (
        f'bad_prompts: the dataset {csv} cannot be loaded: Instruction "train[5:]" corresponds to no data. {HELP}'
    )


def test_files_that_are_not_utf8_text() -> None:
    Path("a.txt").write_bytes(codecs.BOM_UTF8 + b"one\ntwo\n\xe9t\xe9\n")
    assert told("a.txt") == "bad_prompts: a.txt is not UTF-8 text (line 3). Convert the file to UTF-8."
    Path("a.txt").write_text("one\ntwo\n", encoding="utf-16")
    assert told("a.txt") == "bad_prompts: a.txt is not UTF-8 text (line 1). Convert the file to UTF-8."


def test_sources_that_are_not_there() -> None:
    for path in ("prompts.txt", "./prompts", "/nowhere/prompts", "~nobody-of-this-name/prompts.txt"):
        expected = f"bad_prompts: the file or folder {path} does not exist. Check the path."
        assert told(path) == expected or path.startswith("~")
    assert told("owner/name", "train", "text") == (
        f"bad_prompts: the dataset owner/name cannot be loaded: Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled). {HELP}"
    )


def test_folders_and_files_that_are_no_dataset(folder: Path) -> None:
    Path("d").mkdir()
    assert told("d", "train", "text") == (
        f"bad_prompts: the dataset d cannot be loaded: The directory at {folder}/d doesn't contain any data files. {HELP}"
    )
    Path("d/train.jsonl").write_text('{"text": "a"}\n{"tex')
    assert told("d", "train", "text") == (
        "bad_prompts: the dataset d cannot be loaded: JSON parse error: Missing a closing quotation mark in string. in row 1. " + HELP
    )
    shutil.copy("d/train.jsonl", "d/TRAIN.JSONL")
    assert "d/TRAIN.JSONL is a data file" in told("d/TRAIN.JSONL")
    assert told("d/train.jsonl") == ("bad_prompts: d/train.jsonl is a data file; use its folder, with split and column, or a text file.")
    Path("broken").mkdir()
    Path("broken/state.json").write_text("{")
    assert told("broken", "train", "text") == (
        "bad_prompts: the dataset broken cannot be loaded: Directory broken is neither a `Dataset` directory nor a `DatasetDict` "
        f"directory. {HELP}"
    )


def test_the_fingerprint_follows_every_part_of_every_prompt() -> None:
    prompts = [Prompt("s", "a"), Prompt("s", "b")]
    assert fingerprint(prompts) == fingerprint(list(prompts))
    others = [[Prompt("s", "a")], prompts[::-1], [Prompt("t", "a"), Prompt("s", "b")], [Prompt("s", "a"), Prompt("s", "c")]]
    assert len({fingerprint(prompts), *map(fingerprint, others)}) == 5


def test_the_prompts_of_the_demonstration() -> None:
    kinds = {name: load_prompts(PromptSpecification.model_validate(values), "s", name) for name, values in demo.PROMPTS.items()}
    assert {name: len(prompts) for name, prompts in kinds.items() if "evaluation" in name} == {
        "good_evaluation_prompts": 100,
        "bad_evaluation_prompts": 100,
    }
    users = [prompt.user for prompts in kinds.values() for prompt in prompts]
    assert len(set(users)) == len(users), "evaluation prompts are not among those that the directions come from"
