"""From prompt specifications to lists of prompts."""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from . import demo
from .config import PromptSpecification
from .errors import PromptError
from .source import expand

# What the datasets library reads; taken as text files, their markup would become prompts.
DATA_FILES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")

_SLICE = re.compile(r"\[[^\]]*\]")


@dataclass(frozen=True)
class Prompt:
    """What a conversation begins with."""

    system: str
    user: str


def load_prompts(specification: PromptSpecification, system_prompt: str, setting: str) -> list[Prompt]:
    """The prompts of a specification, in order, its prefix, suffix and system prompt applied.

    `system_prompt` is used where the specification has none; `setting` names the specification in errors.
    Raises `PromptError` where the source, split or column does not exist, cannot be read, or holds no prompts.
    """
    texts = _texts(specification, setting)
    system = system_prompt if specification.system_prompt is None else specification.system_prompt
    prompts = [Prompt(system, f"{specification.prefix}{text}{specification.suffix}") for text in texts]
    if not prompts:
        raise PromptError(f"{setting}: {_name(specification)} holds no prompts. Check the file, or the slice of the split.")
    return prompts


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash by which a resumed run knows that the prompts are still the same."""
    text = json.dumps([astuple(prompt) for prompt in prompts], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _name(specification: PromptSpecification) -> str:
    return specification.dataset + (f" ({specification.split})" if specification.split else "")


def _texts(specification: PromptSpecification, setting: str) -> list[str]:
    if specification.dataset.startswith(demo.PREFIX):
        return _read_text_file(demo.prompt_file(specification.dataset), specification, setting)
    path = expand(specification.dataset)
    if path.is_file():
        if path.suffix in DATA_FILES:
            raise PromptError(f"{setting}: {path} is a data file; give the folder it lies in, with split and column, or a text file.")
        return _read_text_file(path, specification, setting)
    if not path.exists() and (path.suffix == ".txt" or path.is_absolute() or specification.dataset.startswith(".")):
        raise PromptError(f"{setting}: there is no file or folder {specification.dataset}. Check the path.")
    return _read_dataset(specification, path, setting)


def _read_text_file(path: Path, specification: PromptSpecification, setting: str) -> list[str]:
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise PromptError(f"{setting}: {path} cannot be read: {error.strerror}.") from error
    try:
        # Only line ends separate prompts: `str.splitlines` would also split at form feeds and the like.
        lines = io.StringIO(content.decode(), newline=None).read().split("\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PromptError(f"{setting}: {path} is not UTF-8 text (line {line}). Convert the file to UTF-8.") from error
    lines = [line for line in lines if line.strip()]
    if specification.split is None:
        return lines
    spec = "train" + "".join(_SLICE.findall(specification.split))
    return [lines[i] for i in _slice_indices(spec, {"train": len(lines)}, specification, setting)]


def _slice_indices(split: str, lengths: dict[str, int], specification: PromptSpecification, setting: str) -> list[int]:
    """The rows that a split with a slice stands for, by the rules of the datasets library."""
    from datasets import ReadInstruction

    try:
        instructions = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise PromptError(
            f"{setting}: the split {specification.split!r} of {specification.dataset} does not exist or is no valid slice: {error}"
        ) from error
    return [i for instruction in instructions for i in range(instruction.from_, instruction.to)]


def _read_dataset(specification: PromptSpecification, path: Path, setting: str) -> list[str]:
    """Rows of a hub dataset or a local dataset folder (saved by `save_to_disk`, or data files that `load_dataset` reads)."""
    from datasets import DatasetDict, get_dataset_split_names, load_dataset, load_from_disk

    if specification.split is None or specification.column is None:
        missing = "split" if specification.split is None else "column"
        raise PromptError(
            f"{setting}: {specification.dataset} is a dataset, which needs a {missing}; set {setting}.{missing} "
            "(a text file needs neither; check the path if one was meant)."
        )
    split_name = _SLICE.sub("", specification.split)
    saved = path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            stored: Any = load_from_disk(str(path))
            if isinstance(stored, DatasetDict):
                _require_split(split_name, list(stored), specification, setting)
                stored = stored[split_name]
            indices = _slice_indices(specification.split, {split_name: len(stored)}, specification, setting)
            rows = stored.select(indices)
        else:
            try:
                rows = load_dataset(specification.dataset, revision=specification.commit, split=specification.split)
            except ValueError:
                names = get_dataset_split_names(specification.dataset, revision=specification.commit)
                _require_split(split_name, names, specification, setting)
                raise
    except PromptError:
        raise
    except Exception as error:  # the library raises many types; each means the same to the user
        raise PromptError(
            f"{setting}: the dataset {specification.dataset} cannot be loaded: {_first_line(error)} "
            "Check the name (hub id, folder or text file), the commit, the network and the access rights."
        ) from error
    if specification.column not in rows.column_names:
        raise PromptError(
            f"{setting}: {specification.dataset} has no column {specification.column!r}; it has {', '.join(rows.column_names)}. "
            f"Set {setting}.column."
        )
    texts = list(rows[specification.column])
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        kind = type(texts[wrong]).__name__
        raise PromptError(f"{setting}: column {specification.column!r} of {specification.dataset} holds {kind}, not text (row {wrong}).")
    return texts


def _require_split(name: str, known: list[str], specification: PromptSpecification, setting: str) -> None:
    if name not in known:
        raise PromptError(f"{setting}: {specification.dataset} has no split {name!r}; it has {', '.join(known)}. Set {setting}.split.")


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if line.endswith(".") else line + "."
