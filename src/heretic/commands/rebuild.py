"""Rebuild a result from its record: the model alone (`--export-from`), the model with a comparison (`--reproduce`), or the whole search
(`--reproduce-search`).

The record is `heretic.json` and the file of directions in the same folder. With both, a model can be rebuilt from its original without
prompts, search or accelerator. With the same library versions it is identical bit by bit.
"""

import contextlib
import json
import shlex
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import URLError
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from ..errors import ExportError, UsageError

if TYPE_CHECKING:
    from ..config import Settings
    from ..saving.original import Original
    from ..utils import Progress

FLAGS = ("--export-from", "--reproduce", "--reproduce-search")
RECORD = "heretic.json"
TIMEOUT = 60
DIRECTIONS = "heretic.directions"
DESCRIPTION = ("README.md", "kernel.svg")  # the model card and its plot, which are copied

# Consequences of a difference for the rebuilt files and for a repeated search.
ROUNDING = "the last digits may differ"
SEARCH_ONLY = "no effect on the rebuilt model; a repeated search may propose other trials"
NO_EFFECT = "no effect"
DEPENDS_ON = {
    "torch": ROUNDING,
    "transformers": "names or layouts of tensors may differ, and a repeated search may propose other trials",
    "accelerate": SEARCH_ONLY,
    "bitsandbytes": SEARCH_ONLY,
    "optuna": SEARCH_ONLY,
}


# Settings, besides those that define a study, that a repeated search depends on. All other settings come from the command line.
SEARCH = (
    "dtypes",
    "batch_size",
    "max_batch_size",
    "trials_per_batch",
    "stop_dominated_trials",
    "n_learned_trials",
    "n_trials",
    "n_startup_trials",
    "sampler",
    "first_trials",
    "seed",
    "n_finalists",
    "final_response_length",
    "final_kl_tokens",
    "final_good_prompts",
    "final_bad_prompts",
)


@dataclass(frozen=True)
class Record:
    """A stored result: the content of `heretic.json`, and the folder that holds it and the directions."""

    content: dict[str, Any]
    folder: Path

    @property
    def strategy(self) -> Any:
        """`merge` or `adapter`."""
        return self.content["export_strategy"]


@dataclass(frozen=True)
class Difference:
    """Something that has changed since the record was written, and the consequence."""

    what: str
    then: str
    now: str
    means: str

    def __str__(self) -> str:
        return f"{self.what}: {self.then} then, {self.now} now ({self.means})"


def is_requested(arguments: Sequence[str]) -> bool:
    """Whether the command line has a flag of this module."""
    return any(argument.partition("=")[0] in FLAGS for argument in arguments)


def run_command(arguments: Sequence[str]) -> int:
    """`heretic --export-from ...`, `--reproduce ...` and `--reproduce-search ...`; the exit code."""
    from ..settings_sources import Parser

    parser = Parser(prog="heretic", allow_abbrev=False, add_help=False)
    action = parser.add_mutually_exclusive_group(required=True)
    for flag in FLAGS:
        action.add_argument(flag, metavar="FOLDER_FILE_OR_URL")
    parser.add_argument("--model")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--save-directory")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--debug", action="store_true")
    given, rest = parser.parse_known_args(list(arguments))

    from ..console import Console

    console = Console()
    with open_record(given.reproduce_search or given.export_from or given.reproduce) as record:
        if given.reproduce_search is not None:
            # Settings on the command line override the stored ones.
            own = {"--reproduce-search", given.reproduce_search, f"--reproduce-search={given.reproduce_search}"}
            return reproduce_search(record, [argument for argument in arguments if argument not in own], console)
        if rest:
            raise UsageError(f"{rest[0]} cannot be used with --export-from or --reproduce. heretic --help lists all options.")
        if given.export_from is not None:
            if given.save_directory is None:
                raise UsageError("--export-from needs --save-directory.")
            target, _ = rebuild(record, given.save_directory, given.overwrite, given.model, given.trust_remote_code, console)
            console.message(f"Rebuilt trial {record.content['trial']['number']} in {target}")
            return 0
        with _directory(given.save_directory) as directory:
            same = reproduce(record, directory, given.overwrite, given.model, given.trust_remote_code, console)
        return 0 if same else 1


@contextlib.contextmanager
def _directory(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="heretic-reproduce-") as temporary:
        yield str(Path(temporary) / "model")


@contextlib.contextmanager
def open_record(where: str) -> Iterator[Record]:
    """The record in a folder, in a file, or at a URL that ends in `heretic.json`.

    Raises `ExportError` if there is none, or if it is not a valid record.
    """
    from ..loading.source import expand

    if urlsplit(where).scheme in ("http", "https"):
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
    parts = urlsplit(address)
    if not parts.path.endswith(f"/{RECORD}"):
        raise ExportError(f"The URL {address} does not end in /{RECORD}.")
    for name in (RECORD, DIRECTIONS, *DESCRIPTION):
        here = parts._replace(path=parts.path.removesuffix(RECORD) + name).geturl()
        try:
            with urllib.request.urlopen(here, timeout=TIMEOUT) as response:
                (folder / name).write_bytes(response.read())
        except (URLError, OSError, ValueError) as error:
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
    settings: dict[str, Any]
    trial: _Trial
    versions: dict[str, str]
    export_strategy: Literal["merge", "adapter"]
    files: dict[str, str]
    prompts: dict[Literal["good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts"], _Prompts] = {}
    scores: dict[str, float] = {}
    hardware: dict[str, Any] = {}
    program: dict[str, Any] = {}


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        missing = [key for key, field in _Content.model_fields.items() if field.is_required() and key not in content]
        if not missing:
            _Content.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ExportError(f"{path} is not a record that a model can be rebuilt from: {where}: {problem['msg']}.") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read as a record of heretic: {error}") from error
    if missing:
        raise ExportError(f"{path} is not a record that a model can be rebuilt from: it lacks {', '.join(missing)}.")
    return content


def _export_settings(record: Record) -> "Settings":
    """The stored settings that an export depends on."""
    from ..config import Settings

    names = ("row_normalization", "full_normalization_lora_rank", "max_shard_size")
    try:
        return Settings.model_validate(
            {"model": "m", **{name: value for name, value in record.content["settings"].items() if name in names}}
        )
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ExportError(f"{record.folder / RECORD}: the setting {where} cannot be used: {problem['msg']}.") from error


def original_source(record: Record, model: str | None, trust_remote_code: bool) -> Any:
    """The source of the original: the one in the record, at the recorded commit, or `model`.

    Raises `ExportError` if it was a folder, whose path the record does not contain, and no folder of that name exists here.
    """
    from ..config import DEMO_MODEL, Settings
    from ..loading.source import model_source

    stored = record.content["model"]
    name = model or stored["name"]
    _check_local(record, name)
    if name == DEMO_MODEL and record.content["settings"].get("demo"):
        return model_source(Settings(model=name, demo=True))
    gguf = None if name.endswith(".gguf") else stored.get("gguf_file")
    commit = stored.get("commit")
    return model_source(Settings(model=name, model_commit=commit, gguf_file=gguf, trust_remote_code=trust_remote_code))


def _check_local(record: Record, name: str) -> None:
    stored = record.content["model"]
    is_local = ":" in str(stored.get("fingerprint")) and not record.content["settings"].get("demo")
    if stored.get("gguf_file") and stored["commit"] is not None:
        is_local = False  # it is on the hub; the record has the fingerprint of its dequantized weights
    if is_local and name == stored["name"] and not Path(name).exists():
        kind = "file" if str(stored["name"]).endswith(".gguf") else "folder"
        raise ExportError(
            f"The original was a {kind} named {stored['name']}, which does not exist here (records contain no paths). "
            "Give the original with --model."
        )


def rebuild(
    record: Record, directory: str, overwrite: bool, model: str | None, trust_remote_code: bool, progress: "Progress"
) -> tuple[Path, dict[str, str]]:
    """Write the record's model or adapter again, from the original and the stored edits. Returns the folder and SHA-256 of its files.

    Raises `ExportError` if the original's weights are not those that the record names.
    """
    from ..saving.card import copy_licence
    from ..saving.edits import check_edits, load_edits
    from ..saving.export import file_errors, give_usual_permissions, write_export, write_record
    from ..saving.hashed_file import copy_file
    from ..saving.original import open_original, refuse_links
    from ..saving.record import LIBRARIES
    from ..saving.staging import open_target, staged
    from ..utils import versions

    source = original_source(record, model, trust_remote_code)
    originals = [("the model", Path(source.path))] if source.is_local else []
    target = open_target(directory, overwrite, *originals, ("the folder of the record", record.folder))
    refuse_links(record.folder, (DIRECTIONS, *DESCRIPTION))
    edits = load_edits(record.folder / DIRECTIONS)
    settings = _export_settings(record)
    original = open_original(_loaded(source, progress), progress)
    _check_weights(record, original, progress)
    check_edits(edits, {name: value.shape for name, value in original.placements.model.state_dict().items()}, record.folder / DIRECTIONS)
    with file_errors(target.path), staged(target) as folder:
        hashes, _ = write_export(
            original,
            edits,
            settings.row_normalization,
            record.strategy,
            settings.full_normalization_lora_rank,
            settings.max_shard_size,
            folder,
            progress,
        )
        for name in (DIRECTIONS, *DESCRIPTION):
            if (record.folder / name).is_file():
                copy_file(record.folder / name, folder / name)
        copy_licence(original.source, folder, progress)
        kept = {key: value for key, value in record.content.items() if key != "files"}
        files = write_record({**kept, "versions": versions(LIBRARIES)}, folder, hashes)
        give_usual_permissions(folder)
    return target.path, files


def _loaded(source: Any, progress: "Progress") -> Any:
    """The source at its commit, with its configuration in the cache."""
    from ..loading.gguf import dequantized_source
    from ..loading.load import load_config

    source = dequantized_source(source, progress)
    load_config(source)
    return source.pinned()


def _check_weights(record: Record, original: "Original", progress: "Progress") -> None:
    """Compare the original's files with the record's. A local copy of a hub model cannot be compared; then there is a warning."""
    from ..loading.source import fingerprint

    then, now = record.content["model"].get("fingerprint"), fingerprint(original.source)
    if then == now:
        return
    if then is None or (":" in then) != (":" in now):
        progress.warning(
            "It cannot be checked whether this original is the one that was edited: the record identifies it in another way (commit or "
            "files)."
        )
        return
    before, after = (dict(part.rpartition(":")[::2] for part in text.split()) if ":" in text else {"commit": text} for text in (then, now))
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    weights = [name for name in differing if not name.endswith(".json")]
    if weights:
        raise ExportError(
            f"{original.source.name} is not the model that was edited (changed: {', '.join(weights[:3])}). Give the original with --model."
        )
    progress.warning(f"Files of the original have changed, so the rebuilt folder differs as well: {', '.join(differing)}")


def differences(record: Record) -> list[Difference]:
    """What has changed since the record was written: versions, hardware, and data sources without a pinned commit."""
    from .. import __version__
    from ..device import hardware
    from ..saving.record import LIBRARIES
    from ..utils import versions

    content, found = record.content, []
    program = content.get("program", {}).get("version")
    if program != __version__:
        found.append(Difference("heretic", str(program), __version__, ROUNDING))
    now = versions(LIBRARIES)
    for name, then in content["versions"].items():
        if now.get(name) != then:
            found.append(Difference(name, then, now.get(name, "not installed"), DEPENDS_ON.get(name, NO_EFFECT)))
    here = hardware()
    for name, value in content.get("hardware", {}).items():
        if here.get(name) != value:
            means = ROUNDING if name in ("cpu_threads", "cpu_capability", "machine") else SEARCH_ONLY
            found.append(Difference(name, str(value or "none"), str(here.get(name) or "none"), means))
    for name, prompts in content.get("prompts", {}).items():
        if prompts.get("commit") is None and not str(prompts["dataset"]).startswith("heretic-demo:"):
            found.append(Difference(name, str(prompts["dataset"]), "its current content, since no commit was recorded", SEARCH_ONLY))
    return found


def reproduce(record: Record, directory: str, overwrite: bool, model: str | None, trust_remote_code: bool, progress: "Progress") -> bool:
    """Rebuild, and compare with the stored hashes. Returns whether every file is the same."""
    found = differences(record)
    for difference in found:
        progress.message(f"Different: {difference}")
    if not found:
        progress.message("Versions, hardware and commits are the same as in the record.")
    _, files = rebuild(record, directory, overwrite, model, trust_remote_code, progress)
    stored = record.content["files"]
    same = [name for name, digest in stored.items() if files.get(name) == digest]
    for name in stored:
        if name not in same:
            progress.message(f"Different: {name} ({'missing' if name not in files else 'another SHA-256'})")
    progress.message(f"{len(same)} of {len(stored)} files are identical.")
    return len(same) == len(stored)


def search_settings(record: Record, arguments: Sequence[str]) -> "Settings":
    """The stored settings that the search and its scores depend on, with commits, overridden by the command line.

    Raises `UsageError` if the record names code that the user does not agree to run, or a file or folder that the command line does
    not name as well.
    """
    from ..session.answers import terminal_ask
    from ..settings_sources import load_settings
    from ..study.checkpoint import DEFINING

    content = record.content
    names = (*DEFINING, *SEARCH)
    stored = {name: value for name, value in content["settings"].items() if name in names and value is not None}
    if content["model"].get("commit") is not None:
        stored["model_commit"] = content["model"]["commit"]
    stored.setdefault("refusal_rule", "markers")  # earlier versions had only this rule
    stored |= content.get("prompts", {})
    stored |= {"model_action": "none", "study_checkpoint_dir": str(Path("checkpoints") / "reproduced")}
    settings = load_settings(arguments, stored, terminal_ask())
    _refuse_local_prompts(settings, stored, arguments)
    return settings


def _refuse_local_prompts(settings: "Settings", stored: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Raise `UsageError` if prompts would be read from a file or folder that only the record names: that could be any file here."""
    from ..demo import PREFIX
    from ..loading.source import is_hub_id

    flags = []
    for name, value in stored.items():
        dataset = value.get("dataset") if isinstance(value, Mapping) else None
        if not isinstance(dataset, str) or getattr(settings, name).dataset != dataset:
            continue
        flag = f"--{name.replace('_', '-')}.dataset"
        is_given = any(argument.partition("=")[0] == flag for argument in arguments)
        if not is_given and not dataset.startswith(PREFIX) and not is_hub_id(dataset):
            flags.append(shlex.join([flag, dataset]))
    if flags:
        raise UsageError(f"The record names local files or folders as prompts. If they are those of the study, add: {' '.join(flags)}")


def reproduce_search(record: Record, arguments: Sequence[str], progress: "Progress") -> int:
    """Run the study again with the stored seed and compare the trial. Returns 0 if it is the same, else 1."""
    from ..study.checkpoint import Checkpoint
    from .run import run

    for difference in differences(record):
        progress.message(f"Different: {difference}")
    settings = search_settings(record, arguments)
    _check_local(record, settings.model)
    if code := run(settings):
        return code
    wanted, scores = record.content["trial"], record.content["scores"]
    with Checkpoint(settings) as checkpoint:
        trials = checkpoint.study.get_trials(deepcopy=False)
        found = next((trial for trial in trials if trial.number == wanted["number"]), None)
    if found is None:
        progress.message(f"The search ended before trial {wanted['number']}.")
        return 1
    attributes = found.user_attrs
    then = {"direction_index": wanted["direction_index"], **_flat(wanted["parameters"] or {})}
    now = {"direction_index": attributes.get("direction_index"), **_flat(attributes.get("parameters") or {})}
    then |= {name: scores[name] for name in ("refusals", "kl_divergence")}
    now |= {name: attributes.get(name) for name in ("refusals", "kl_divergence")}
    differing = [name for name in then if not _close(then[name], now.get(name))]
    for name in differing:
        progress.message(f"Different in trial {wanted['number']}: {name} was {then[name]} and is {now.get(name)}")
    if not differing:
        progress.message(
            f"Trial {wanted['number']} is the same as in the record: {scores['refusals']} refusals, KL {scores['kl_divergence']:.4f}."
        )
    return 1 if differing else 0


def _flat(parameters: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{component}.{name}": value for component, values in parameters.items() for name, value in values.items()}


def _close(a: Any, b: Any) -> bool:
    """Equal up to the rounding of float32."""
    if a is None or b is None:
        return a is b
    return abs(a - b) <= 1e-5 * max(1.0, abs(a))
