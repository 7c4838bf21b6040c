"""The record of a result (`heretic.json`, with the file of directions beside it), fetched and checked. Imports nothing heavy."""

import contextlib
import json
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.error import URLError
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from ..errors import ExportError
from ..loading.source import expand
from ..saving import CARD, DIRECTIONS, PICTURE, RECORD
from ..settings_sources import first_problem
from ..utils import JsonObject

DESCRIPTION = (CARD, PICTURE)  # which are taken over
TIMEOUT = 60


@dataclass(frozen=True)
class Record:
    """A stored result: what `heretic.json` says, and the folder that it and its directions are in."""

    content: JsonObject
    folder: Path

    @property
    def strategy(self) -> Literal["merge", "adapter"]:
        """`merge` or `adapter`."""
        found: Literal["merge", "adapter"] = self.content["export_strategy"]
        return found


@contextlib.contextmanager
def fetched(where: str) -> Iterator[Record]:
    """The record of a folder, a file or an address that ends in `heretic.json`.

    Raises `ExportError` where there is none, or where what is there is none.
    """
    if urlsplit(where).scheme in ("http", "https"):
        with tempfile.TemporaryDirectory(prefix="heretic-record-") as temporary:
            yield _fetch_all(where, Path(temporary))
        return
    path = expand(where)
    path = path / RECORD if path.is_dir() else path
    if not path.is_file():
        raise ExportError(f"There is no {path}. Give a folder that heretic saved, its heretic.json, or the address of one.")
    yield Record(_read(path), path.parent)


def _fetch_all(address: str, folder: Path) -> Record:
    address = address.replace("/blob/", "/resolve/", 1)  # the hub's page about a file, and the file
    parts = urlsplit(address)
    if not parts.path.endswith(f"/{RECORD}"):
        raise ExportError(f"The address {address} does not end in /{RECORD}.")
    for name in (RECORD, DIRECTIONS, *DESCRIPTION):
        here = parts._replace(path=parts.path.removesuffix(RECORD) + name).geturl()
        try:
            with urllib.request.urlopen(here, timeout=TIMEOUT) as response:
                (folder / name).write_bytes(response.read())
        except (URLError, OSError, ValueError) as error:
            if name not in DESCRIPTION:
                raise ExportError(f"{here} cannot be fetched: {error}") from error
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
    """What of a record is used here, as far as it is not settings, which are checked as all settings are."""

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
        raise ExportError(f"{path} is no record that a model can be made from: {where}: {what}.") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read as a record of heretic: {error}") from error
    if missing:
        raise ExportError(f"{path} is no record that a model can be made from: it lacks {', '.join(missing)}.")
    return content
