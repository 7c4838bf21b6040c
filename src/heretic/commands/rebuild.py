"""Rebuilds a result from its record: the model alone (`--export-from`), or the model with a comparison (`--reproduce`).

The record is `heretic.json` with the directions next to it. With both, a model can be rebuilt from its original without prompts, search
or accelerator. With the same library versions it is identical bit by bit.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from .. import __version__
from ..config import DEMO_MODEL, Settings
from ..device import hardware
from ..errors import ExportError
from ..loading.gguf import dequantized_source
from ..loading.load import load_config
from ..loading.source import ModelSource, fingerprint, model_source
from ..saving import DIRECTIONS, RECORD
from ..saving.card import copy_licence
from ..saving.edits import check_edits, load_edits
from ..saving.export import file_errors, give_usual_permissions, write_export, write_record
from ..saving.hashed_file import copy_file, sha256
from ..saving.original import Original, open_original, refuse_links
from ..saving.record import LIBRARIES
from ..saving.staging import open_target, staged
from ..settings_sources import first_problem
from ..utils import Progress, some_of, versions
from .read_record import DESCRIPTION, Record

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


@dataclass(frozen=True)
class Difference:
    """Something that has changed since the record was written, and the consequence."""

    what: str
    then: str
    now: str
    means: str

    def __str__(self) -> str:
        return f"{self.what}: {self.then} then, {self.now} now ({self.means})"


def _export_settings(record: Record) -> Settings:
    """The stored settings that an export depends on."""
    names = ("row_normalization", "full_normalization_lora_rank", "max_shard_size")
    try:
        return Settings.model_validate(
            {"model": "m", **{name: value for name, value in record.content["settings"].items() if name in names}}
        )
    except ValidationError as error:
        where, what = first_problem(error)
        raise ExportError(f"{record.folder / RECORD}: the setting {where} cannot be used: {what}.") from error


def original_source(record: Record, model: str | None, trust_remote_code: bool) -> ModelSource:
    """The source of the original: the one in the record, at the recorded commit, or `model`.

    Raises `ExportError` if it was a folder, whose path the record does not contain, and no folder of that name exists here.
    """
    stored = record.content["model"]
    name = model or stored["name"]
    check_local(record, name)
    if name == DEMO_MODEL and record.content["settings"].get("demo"):
        return model_source(Settings(model=name, demo=True))
    gguf = None if name.endswith(".gguf") else stored.get("gguf_file")
    commit = stored.get("commit")
    return model_source(Settings(model=name, model_commit=commit, gguf_file=gguf, trust_remote_code=trust_remote_code))


def check_local(record: Record, name: str) -> None:
    """Raise `ExportError` if the original was a folder or a file that is not at the name that the record has of it."""
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
    record: Record, directory: str, overwrite: bool, model: str | None, trust_remote_code: bool, progress: Progress
) -> tuple[Path, dict[str, str]]:
    """Write the record's model or adapter again, from the original and the stored edits. Returns the folder and SHA-256 of its files.

    Raises `ExportError` if the original's weights are not those that the record names.
    """
    source = original_source(record, model, trust_remote_code)
    originals = [("the model", Path(source.path))] if Path(source.path).exists() else []
    target = open_target(directory, overwrite, *originals, ("the folder of the record", record.folder))
    refuse_links(record.folder, (DIRECTIONS, *DESCRIPTION))
    edits = load_edits(record.folder / DIRECTIONS)
    settings = _export_settings(record)
    original = open_original(_loaded(source, progress), progress, settings)
    _check_weights(record, original, progress)
    check_edits(edits, {name: value.shape for name, value in original.placements.model.state_dict().items()}, record.folder / DIRECTIONS)
    with file_errors(target.path), staged(target) as folder:
        hashes, _ = write_export(original, edits, settings, record.strategy, folder, progress)
        for name in (DIRECTIONS, *DESCRIPTION):
            if (record.folder / name).is_file():
                copy_file(record.folder / name, folder / name)
        copy_licence(original.source, folder, progress)
        kept = {key: value for key, value in record.content.items() if key != "files"}
        files = write_record({**kept, "versions": versions(LIBRARIES)}, folder, hashes)
        give_usual_permissions(folder)
    return target.path, files


def _loaded(source: ModelSource, progress: Progress) -> ModelSource:
    """The source at its commit, with its configuration in the cache."""
    source = dequantized_source(source, progress)
    load_config(source)
    return source.pinned()


def _check_weights(record: Record, original: Original, progress: Progress) -> None:
    """Compare the original's files with the record's. A local copy of a hub model cannot be compared; then there is a warning."""
    then, now = record.content["model"].get("fingerprint"), fingerprint(original.source)
    if then == now:
        return
    if then is None or (":" in then) != (":" in now):
        progress.warning(
            "It cannot be checked whether this original is the edited one: the record identifies it in another way (commit or files)."
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


def reproduce(record: Record, directory: str, overwrite: bool, model: str | None, trust_remote_code: bool, progress: Progress) -> bool:
    """Rebuild, and compare with the stored hashes and with the files next to the record. Returns whether every file is the same."""
    found = differences(record)
    for difference in found:
        progress.message(f"Different: {difference}")
    if not found:
        progress.message("Versions, hardware and commits are the same as in the record.")
    _, files = rebuild(record, directory, overwrite, model, trust_remote_code, progress)
    stored = record.content["files"]
    names = sorted(stored.keys() | files.keys())
    found_here = {name: sha256(record.folder / name) for name in files if (record.folder / name).is_file()}
    n_same = 0
    for name in names:
        if name not in files:
            progress.message(f"Different: {name} (missing)")
        elif name not in stored:
            progress.message(f"Different: {name} (not in the record)")
        elif files[name] != stored[name]:
            progress.message(f"Different: {name} (another SHA-256)")
        elif found_here.get(name, stored[name]) != stored[name]:
            progress.message(f"Different: {name} (changed since it was saved)")
        else:
            n_same += 1
    if unread := sorted(files.keys() - found_here.keys()):
        progress.message(f"Compared with the record only, since they are not next to it: {some_of(unread, 5)}")
    progress.message(f"{n_same} of {len(names)} files are identical.")
    return n_same == len(names)
