"""Loads lists of prompts from prompt specifications.

The datasets library is imported only if needed: that takes a second, and text files do not need it.
"""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from . import demo
from .config import Settings
from .errors import PromptError
from .loading.source import expand
from .specifications import PromptSpecification
from .utils import first_line

# Files for the datasets library. Read as text files, their markup would become prompts.
DATA_FILES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow")

_SLICE = re.compile(r"\[[^\]]*\]")

# Of a conversation: its role (system, user, assistant) and its content.
Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """The start of a conversation."""

    system: str
    user: str


def prompt_messages(prompt: Prompt) -> list[Message]:
    """The messages of a prompt; without a system message if the system prompt is empty."""
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": prompt.user}]


@dataclass(frozen=True)
class Prompts:
    """All prompts of a run, harmless (good) and harmful (bad): for the directions, for scoring trials, for scoring finalists."""

    good: list[Prompt]
    bad: list[Prompt]
    good_evaluation: list[Prompt]
    bad_evaluation: list[Prompt]
    final_good: list[Prompt]
    final_bad: list[Prompt]

    @property
    def of_study(self) -> dict[str, list[Prompt]]:
        """The prompts that trials depend on, by setting."""
        return {
            "good_prompts": self.good,
            "bad_prompts": self.bad,
            "good_evaluation_prompts": self.good_evaluation,
            "bad_evaluation_prompts": self.bad_evaluation,
        }

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of the prompts that trials depend on, by which a resumed run detects changes."""
        return {name: fingerprint(prompts) for name, prompts in self.of_study.items()}


def load_setting(settings: Settings, name: str) -> list[Prompt]:
    """The prompts of a setting, such as `good_prompts`. Errors as in `load_prompts`."""
    return load_prompts(getattr(settings, name), settings.system_prompt, name)


def load_all(settings: Settings) -> Prompts:
    """All prompts of the settings; finalists use those of the trials if no others are given. Errors as in `load_prompts`."""
    good, bad = load_setting(settings, "good_prompts"), load_setting(settings, "bad_prompts")
    good_evaluation, bad_evaluation = load_setting(settings, "good_evaluation_prompts"), load_setting(settings, "bad_evaluation_prompts")
    return Prompts(
        good,
        bad,
        good_evaluation,
        bad_evaluation,
        load_setting(settings, "final_good_prompts") if settings.final_good_prompts else good_evaluation,
        load_setting(settings, "final_bad_prompts") if settings.final_bad_prompts else bad_evaluation,
    )


def check_paths(settings: Settings) -> None:
    """Raise `PromptError` if prompts are to be read from a path that does not exist, or from a file that is not text."""
    for name in (
        "good_prompts",
        "bad_prompts",
        "good_evaluation_prompts",
        "bad_evaluation_prompts",
        "final_good_prompts",
        "final_bad_prompts",
    ):
        specification = getattr(settings, name)
        if specification is not None and not specification.dataset.startswith(demo.PREFIX):
            _check_path(specification, name)


def load_prompts(specification: PromptSpecification, system_prompt: str, setting: str) -> list[Prompt]:
    """The prompts of a specification, in order, its prefix, suffix and system prompt applied.

    `system_prompt` is used if the specification has none; `setting` is the name of the specification in errors.
    Raises `PromptError` if the source, split or column does not exist, cannot be read, or contains no prompts.
    """
    texts = _texts(specification, setting)
    system = system_prompt if specification.system_prompt is None else specification.system_prompt
    prompts = [Prompt(system, f"{specification.prefix}{text}{specification.suffix}") for text in texts]
    if not prompts:
        raise PromptError(f"{setting}: {_name(specification)} contains no prompts. Check the file, or the slice of the split.")
    return prompts


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of prompts."""
    text = json.dumps([astuple(prompt) for prompt in prompts], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _name(specification: PromptSpecification) -> str:
    return specification.dataset + (f" ({specification.split})" if specification.split else "")


def _texts(specification: PromptSpecification, setting: str) -> list[str]:
    if specification.dataset.startswith(demo.PREFIX):
        return _read_text_file(demo.prompt_file(specification.dataset), specification, setting)
    _check_path(specification, setting)
    path = expand(specification.dataset)
    if path.is_file():
        return _read_text_file(path, specification, setting)
    return _read_dataset(specification, path, setting)


def _check_path(specification: PromptSpecification, setting: str) -> None:
    path = expand(specification.dataset)
    if path.is_file() and path.suffix.lower() in DATA_FILES:
        raise PromptError(f"{setting}: {path} is a data file; use its folder, with split and column, or a text file.")
    if not path.exists() and (path.suffix == ".txt" or path.is_absolute() or specification.dataset.startswith(".")):
        raise PromptError(f"{setting}: the file or folder {specification.dataset} does not exist. Check the path.")


def _read_text_file(path: Path, specification: PromptSpecification, setting: str) -> list[str]:
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise PromptError(f"{setting}: {path} cannot be read: {error.strerror}.") from error
    try:
        # Only newlines separate prompts: `str.splitlines` would also split at form feeds and the like.
        lines = io.StringIO(content.decode(), newline=None).read().split("\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PromptError(f"{setting}: {path} is not UTF-8 text (line {line}). Convert the file to UTF-8.") from error
    lines = [line for line in lines if line.strip()]
    split = specification.split
    if not split:
        return lines
    split = f"train{split}" if split.startswith("[") else split
    return _rows(split, dict.fromkeys(_split_names(split), lines), specification, setting)


def _split_names(split: str) -> list[str]:
    return [_SLICE.sub("", part).strip() for part in split.split("+")]


def _rows(split: str, parts: Mapping[str, Sequence[Any]], specification: PromptSpecification, setting: str) -> list[Any]:
    """The rows of a split with slices, by the rules of the datasets library; `parts` are the complete splits."""
    from datasets import ReadInstruction

    try:
        instructions = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in parts.items()})
    except (ValueError, AssertionError) as error:
        raise PromptError(
            f"{setting}: {specification.split!r} is not a split of {specification.dataset} with a valid slice: {_sentence(error)} "
            f"Set {setting}.split."
        ) from error
    return [row for i in instructions for row in parts[i.splitname][i.from_ : i.to]]


def _read_dataset(specification: PromptSpecification, path: Path, setting: str) -> list[str]:
    """Rows of a hub dataset or a local dataset folder (saved by `save_to_disk`, or data files that `load_dataset` reads)."""
    split, column = specification.split, specification.column
    if not split or not column:
        missing = "column" if split else "split"
        raise PromptError(
            f"{setting}: {specification.dataset} is a dataset, which needs a {missing}; set {setting}.{missing} "
            "(a text file needs neither; check the path if you meant one)."
        )
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        texts = _read_saved(path, split, column, specification, setting)
    else:
        texts = _load(path, split, column, specification, setting)
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        kind = type(texts[wrong]).__name__
        raise PromptError(f"{setting}: column {column!r} of {specification.dataset} contains {kind}, not text (row {wrong}).")
    return texts


def _read_saved(path: Path, split: str, column: str, specification: PromptSpecification, setting: str) -> list[Any]:
    from datasets import DatasetDict, load_from_disk

    with _loading(specification, setting):
        stored = load_from_disk(str(path))
    names = _split_names(split)
    parts: dict[str, Any] = dict(stored) if isinstance(stored, DatasetDict) else dict.fromkeys(names, stored)
    _require_splits(names, list(parts), specification, setting)
    for name in names:
        _require_column(column, parts[name].column_names, specification, setting)
    return _rows(split, {name: parts[name][column] for name in names}, specification, setting)


def _load(path: Path, split: str, column: str, specification: PromptSpecification, setting: str) -> list[Any]:
    from datasets import get_dataset_split_names, load_dataset

    # An absolute path, since csv, json and the like are names of builders in the library.
    dataset = str(path.absolute()) if path.is_dir() else specification.dataset
    with _loading(specification, setting):
        try:
            rows = load_dataset(dataset, revision=specification.commit, split=split)
        except ValueError:
            names = get_dataset_split_names(dataset, revision=specification.commit)
            _require_splits(_split_names(split), names, specification, setting)
            raise
    _require_column(column, rows.column_names, specification, setting)
    return list(rows[column])


@contextmanager
def _loading(specification: PromptSpecification, setting: str) -> Iterator[None]:
    """Whatever the datasets library raises, as `PromptError`."""
    try:
        yield
    except PromptError:
        raise
    except Exception as error:  # the library raises many types, which mean the same to the user
        reason = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        raise PromptError(
            f"{setting}: the dataset {specification.dataset} cannot be loaded: {_sentence(reason)} "
            "Check the name (hub id, folder or text file), the split, the commit, the network and the access rights."
        ) from error


def _require_column(column: str, known: list[str], specification: PromptSpecification, setting: str) -> None:
    if column not in known:
        raise PromptError(f"{setting}: {specification.dataset} has no column {column!r}; it has {', '.join(known)}. Set {setting}.column.")


def _require_splits(names: list[str], known: list[str], specification: PromptSpecification, setting: str) -> None:
    for name in names:
        if name not in known:
            raise PromptError(f"{setting}: {specification.dataset} has no split {name!r}; it has {', '.join(known)}. Set {setting}.split.")


def _sentence(error: BaseException) -> str:
    return first_line(error).rstrip(".!") + "."
