"""Reads and checks the record of a result (`heretic.json`, with the directions next to it). Imports nothing heavy."""

import contextlib
import json
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from ..errors import ExportError
from ..loading.source import expand
from ..saving import CARD, DIRECTIONS, PICTURE, RECORD
from ..settings_sources import first_problem
from ..utils import JsonObject

DESCRIPTION = (CARD, PICTURE)  # which are copied
TIMEOUT = 60


@dataclass(frozen=True)
class Record:
    """A stored result: the content of `heretic.json`, and its folder, which also contains the directions."""

    content: JsonObject
    folder: Path

    @property
    def strategy(self) -> Literal["merge", "adapter"]:
        """`merge` or `adapter`."""
        found: Literal["merge", "adapter"] = self.content["export_strategy"]
        return found


@contextlib.contextmanager
def open_record(where: str) -> Iterator[Record]:
    """The record in a folder, in a file, or at a URL that ends in `heretic.json`.

    Raises `ExportError` if there is none, or if it is not a valid record.
    """
    if where.lower().startswith(("http://", "https://")):
        with tempfile.TemporaryDirectory(prefix="heretic-record-") as temporary:
            yield _fetch_all(where, Path(temporary))
        return
    path = expand(where)
    path = path / RECORD if path.is_dir() else path
    if not path.is_file():
        raise ExportError(f"{path} does not exist. Give a folder that heretic saved, its heretic.json, or the URL of one.")
    yield Record(_read(path), path.parent)


def _fetch_all(address: str, folder: Path) -> Record:
    address = address.replace("/blob/", "/resolve/", 1)  # from the hub's page about a file to the file
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise ExportError(f"{address} is not a valid URL: {error}.") from error
    if not parts.path.endswith(f"/{RECORD}"):
        raise ExportError(f"The URL {address} does not end in /{RECORD}.")
    for name in (RECORD, DIRECTIONS, *DESCRIPTION):
        here = parts._replace(path=parts.path.removesuffix(RECORD) + name).geturl()
        try:
            with urllib.request.urlopen(here, timeout=TIMEOUT) as response:
                (folder / name).write_bytes(response.read())
        except (OSError, HTTPException, ValueError) as error:
            if name not in DESCRIPTION:
                raise ExportError(f"{here} cannot be downloaded: {error}") from error
    return Record(_read(folder / RECORD), folder)


class _Model(BaseModel):
    name: str = Field(min_length=1)
    commit: str | None = Field(None, pattern=r"^\w[\w.-]*$")
    fingerprint: str | None = None
    gguf_file: str | None = Field(None, pattern=r"^\w[\w.-]*\.gguf$")


class _Trial(BaseModel):
    number: NonNegativeInt
    direction_index: float | None
    parameters: dict[str, dict[str, float]] | None


class _Prompts(BaseModel):
    dataset: str = Field(min_length=1)
    commit: str | None = None


class _Content(BaseModel):
    """The parts of a record that are used here. The settings among them are checked like all settings."""

    model: _Model
    settings: JsonObject
    trial: _Trial
    versions: dict[str, str]
    export_strategy: Literal["merge", "adapter"]
    files: dict[str, str]
    prompts: dict[Literal["good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts"], _Prompts] = {}
    scores: dict[str, float] = {}
    hardware: JsonObject = {}
    program: JsonObject = {}


def _read(path: Path) -> JsonObject:
    try:
        content: JsonObject = json.loads(path.read_bytes())
        missing = [key for key, field in _Content.model_fields.items() if field.is_required() and key not in content]
        if not missing:
            _Content.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        where, what = first_problem(error)
        raise ExportError(f"{path} is not a record that a model can be rebuilt from: {where}: {what}.") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read as a record of heretic: {error}") from error
    if missing:
        raise ExportError(f"{path} is not a record that a model can be rebuilt from: it lacks {', '.join(missing)}.")
    return content
