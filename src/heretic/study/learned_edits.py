"""Storage of a study's learned edits: files next to its journal (or in its storage), named in its trials.

A learned trial has no parameters that a sampler could draw. Its user attribute `learned` names the file and contains what is displayed of
the edit: each edited module's strength, and how far its direction has turned. The file contains the edit and the state to resume learning.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from optuna.artifacts import FileSystemArtifactStore, download_artifact, upload_artifact
from optuna.artifacts._protocol import ArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import FrozenTrial, TrialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..editing.ablation import Ablation, LearnedEdit
from ..errors import CheckpointError
from ..utils import JsonObject
from .front import ablation_of, is_learned

FILE_NAME = "edit.safetensors"
STATE = "state."


def artifact_folder(journal: Path) -> Path:
    """The folder of a journal's artifacts, next to it."""
    return journal.with_name(f"{journal.name}.artifacts")


@dataclass(frozen=True)
class State:
    """The state to resume learning after a trial: tensors and plain data."""

    tensors: dict[str, Tensor]
    facts: JsonObject


class LearnedEdits:
    """The learned edits of a study in an Optuna artifact store. `store` None: edits cannot be stored."""

    def __init__(self, store: ArtifactStore | None) -> None:
        self.store = store

    @classmethod
    def of_journal(cls, journal: Path) -> "LearnedEdits":
        """The learned edits of a journal on disk. The folder is created with the first edit."""
        return cls(FileSystemArtifactStore(artifact_folder(journal)))

    def keep(self, study: optuna.Study, edit: LearnedEdit, state: State) -> str:
        """Store an edit with the state after it. Returns its name for the trial. It is flushed to the disk before this returns."""
        base = getattr(self.store, "_base_path", None)  # of a store of files
        if base is not None:
            Path(base).mkdir(parents=True, exist_ok=True)
        tensors = {f"direction.{name}": r.contiguous() for name, r in edit.directions.items()}
        tensors |= {f"{STATE}{name}": tensor.contiguous() for name, tensor in state.tensors.items()}
        metadata = {"strengths": json.dumps(dict(edit.strengths)), "facts": json.dumps(state.facts)}
        with tempfile.TemporaryDirectory(dir=base) as folder:
            path = Path(folder) / FILE_NAME
            path.write_bytes(save(tensors, metadata))  # `save_file` has an error of its own for a full disk
            artifact_id: str = upload_artifact(artifact_store=self.store, file_path=str(path), study_or_trial=study)
        if base is not None:
            with (Path(base) / artifact_id).open("r+b") as file:
                os.fsync(file.fileno())
        return artifact_id

    def load(self, trial: FrozenTrial) -> tuple[LearnedEdit, State]:
        """The edit of a learned trial, and the state after it. Raises `CheckpointError` if its file is missing or invalid."""
        artifact_id = trial.user_attrs["learned"]["edit"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE_NAME
            try:
                download_artifact(artifact_store=self.store, artifact_id=artifact_id, file_path=str(path))
                with safe_open(path, "pt") as file:
                    metadata = file.metadata()
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
                strengths, facts = json.loads(metadata["strengths"]), json.loads(metadata["facts"])
                directions = {name.removeprefix("direction."): r for name, r in tensors.items() if name.startswith("direction.")}
                _check(directions, strengths)
            except (KeyError, OSError, ValueError, TypeError, SafetensorError, ArtifactNotFound) as error:
                raise CheckpointError(
                    f"The learned edit of trial {trial.number}, artifact {artifact_id} of the study, is missing or damaged. Restore the "
                    "file, or choose another trial."
                ) from error
        state = {name.removeprefix(STATE): tensor for name, tensor in tensors.items() if name.startswith(STATE)}
        return LearnedEdit(directions, strengths), State(state, facts)

    def ablation_of(self, trial: FrozenTrial) -> Ablation:
        """The ablation of a sampled or learned trial, with everything needed to apply it."""
        return Ablation(None, {}, self.load(trial)[0]) if is_learned(trial) else ablation_of(trial)


def _check(directions: Mapping[str, Tensor], strengths: object) -> None:
    """Raise `ValueError` if this is not a valid edit: anybody may have written the file."""
    if not isinstance(strengths, dict) or strengths.keys() != directions.keys():
        raise ValueError("directions and strengths are not of the same modules")
    if not all(isinstance(strength, float) and math.isfinite(strength) for strength in strengths.values()):
        raise ValueError("a strength is not a finite number")
    if not all(r.dim() == 1 and r.dtype == torch.float32 and bool(r.isfinite().all()) for r in directions.values()):
        raise ValueError("a direction is not a finite vector")


def learned_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The learned trials, in the order in which they were learned from each other; the first of each number, should two processes have
    learned."""
    done: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)):
        if is_learned(trial):
            done.setdefault(trial.user_attrs["learned"]["number"], trial)
    return [done[number] for number in sorted(done)]


def described(names: Sequence[tuple[str, str, int]], strengths: Sequence[float], turned: Sequence[float]) -> list[JsonObject]:
    """What is displayed of an edit: for each module (name, component, layer) its strength, and the cosine to its initial direction."""
    return [
        {"writer": name, "component": component, "layer": layer, "strength": round(strength, 4), "cosine": round(cosine, 4)}
        for (name, component, layer), strength, cosine in zip(names, strengths, turned, strict=True)
    ]
