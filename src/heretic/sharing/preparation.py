"""The results of the first worker of a shared study, stored with the study, so that all workers score trials in the same way.

Directions, prompts, response prefix and dtype are an artifact of the study. Versions and hashes of the model's files tell whether another
worker's copy is the same.
"""

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import optuna
from huggingface_hub import try_to_load_from_cache
from optuna.artifacts import download_artifact, upload_artifact
from optuna.artifacts._protocol import ArtifactStore
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .. import __version__
from ..errors import CheckpointError
from ..loading.source import ModelSource, fingerprint
from ..prompts import Prompt, Prompts
from ..utils import JsonObject, versions

# Libraries that affect what a model computes and which trials are proposed.
LIBRARIES = ("torch", "transformers", "optuna")

# The study's attribute with the artifact's id.
ATTRIBUTE = "preparation"
FILE_NAME = "preparation.safetensors"


@dataclass(frozen=True)
class Preparation:
    """`directions (layer + 1, d)`, the prompts, and other results of the first worker."""

    directions: Tensor
    prompts: Prompts
    response_prefix: str
    dtype: str
    base_refusals: int
    n_bad_prompts: int
    last_layer: int
    base_response_classes: dict[str, int] = field(default_factory=dict)


def store_preparation(preparation: Preparation, study: optuna.Study, store: ArtifactStore) -> None:
    """Store a preparation with a study. If another worker was faster, some workers may have read that one; both are equal.

    Raises `OSError` or `CheckpointError` if it cannot be written.
    """
    facts = {name: value for name, value in asdict(preparation).items() if name != "directions"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        # `save_file` has an error of its own for a full disk.
        path.write_bytes(save({"directions": preparation.directions.contiguous()}, {"facts": json.dumps(facts)}))
        artifact_id = upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=study)
    for name in ("base_refusals", "n_bad_prompts", "last_layer", "base_response_classes"):
        study.set_user_attr(name, facts[name])
    study.set_user_attr(ATTRIBUTE, artifact_id)


def load_preparation(study: optuna.Study, store: ArtifactStore) -> Preparation | None:
    """The preparation of a study; None if there is none yet. Raises `CheckpointError` if its file is missing."""
    artifact_id = study.user_attrs.get(ATTRIBUTE)
    if artifact_id is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        try:
            download_artifact(artifact_store=store, artifact_id=artifact_id, file_path=str(path))
        except (KeyError, OSError, optuna.artifacts.exceptions.ArtifactNotFound) as error:
            raise CheckpointError(
                f"The directions of the study, artifact {artifact_id}, are not in the storage. Trials with other directions could not "
                "be compared: restore the file, or create another study."
            ) from error
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            directions = file.get_tensor("directions")
    prompts = {name: [Prompt(**prompt) for prompt in found] for name, found in facts.pop("prompts").items()}
    return Preparation(directions=directions, prompts=Prompts(**prompts), **facts)


def own_versions() -> dict[str, str]:
    """Versions of heretic and the libraries that scores depend on, without build tags such as `+cpu`."""
    return {"heretic": __version__, **{name: version.partition("+")[0] for name, version in versions(LIBRARIES).items()}}


def snapshot_folder(source: ModelSource) -> str | None:
    """The folder with a model's files: its own, or that in the cache; None if nothing was downloaded."""
    if source.is_local:
        return source.path
    config = try_to_load_from_cache(source.path, "config.json", revision=source.revision)
    return str(Path(config).parent) if isinstance(config, str) else None


def file_hashes(source: ModelSource) -> dict[str, str]:
    """Hashes of the model's files by name; of a hub model, those in the cache."""
    folder = snapshot_folder(source)
    if folder is None:
        return {}
    pairs = fingerprint(ModelSource(folder, source.name, None, False)).split()
    return dict(pair.rsplit(":", 1) for pair in pairs)


def differences(facts: JsonObject, source: ModelSource) -> list[str]:
    """Differences between this machine and the one that created the study, in plain words.

    Models are the same if they have the same commit, or else if their weight and configuration files have the same hashes.
    """
    here = own_versions()
    found = [f"{name} is {here.get(name)} here and {there} there" for name, there in facts["versions"].items() if here.get(name) != there]
    commit = source.revision if not source.is_local else None
    if commit is not None and facts["commit"] is not None:
        return found + ([f"the model's commit is {commit} here and {facts['commit']} there"] if commit != facts["commit"] else [])
    files = file_hashes(source)
    for name, there in facts["files"].items():
        if name not in files:
            found += [f"the model's file {name} is missing here"]
        elif files[name] != there:
            found += [f"the model's file {name} is different here"]
    return found


def facts_of(source: ModelSource) -> JsonObject:
    """What `differences` compares; `source` is pinned."""
    return {"versions": own_versions(), "commit": None if source.is_local else source.revision, "files": file_hashes(source)}
