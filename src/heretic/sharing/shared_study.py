"""A study in a shared storage. Replaces `Checkpoint`, which locks its journal."""

import optuna
from filelock import FileLock
from optuna.artifacts._protocol import ArtifactStore
from optuna.exceptions import DuplicatedStudyError

from ..config import Settings
from ..errors import CheckpointError, UsageError
from ..loading.source import expand
from ..study.checkpoint import STUDY_NAME, Checkpoint, create_study
from ..study.journal import journal_errors
from ..study.learned_edits import LearnedEdits
from ..utils import Progress
from .storage import SharedStorage, artifact_store, is_file, open_storage


def open_study(url: str, name: str, timeout: float, progress: Progress | None = None) -> optuna.Study:
    """The study `name` in the storage `url`, for several workers. Raises `KeyError` if it does not exist."""
    return optuna.load_study(study_name=name, storage=open_storage(url, timeout, progress))


def storage_of(study: optuna.Study) -> SharedStorage:
    """The storage that `open_study` opened."""
    storage: SharedStorage = study._storage
    return storage


def target_of(study: optuna.Study, n_trials: int) -> int:
    """The number of trials to reach, as the study says now: more than `n_trials` may have been requested meanwhile."""
    target: int = study.user_attrs.get("target", n_trials)
    return target


class SharedCheckpoint(Checkpoint):
    """The study in `settings.study_storage`. It is never replaced, since other workers may be using it, and only locked if it was not
    created for several workers."""

    otherwise = "use another --study-name"

    def __init__(self, settings: Settings, progress: Progress | None = None) -> None:
        super().__init__(settings)
        assert settings.study_storage is not None
        self.url, self.name = settings.study_storage, settings.study_name
        self._timeout, self._progress = settings.worker_timeout, progress

    def __enter__(self) -> "SharedCheckpoint":
        if self._is_restarted:
            raise UsageError("A study in --study-storage cannot be restarted, since workers may be using it. Use another --study-name.")
        self._shared_storage = open_storage(self.url, self._timeout, self._progress)
        self.path = expand(self.url) if is_file(self.url) else self._shared_storage.location  # type: ignore[assignment]
        try:
            self.found = optuna.load_study(study_name=self.name, storage=self._shared_storage)
        except KeyError:
            self.found = None
        if self.found is not None and not self.is_shared and is_file(self.url):  # a run in one process may be working on it
            self._run_lock = FileLock(f"{self.path}.run.lock")
            with journal_errors(self.path):
                self._lock_run("--study-storage")
        return self

    @property
    def edits(self) -> LearnedEdits:
        """The storage of the study's learned edits, for all workers."""
        return LearnedEdits(artifact_store(self.url, self._shared_storage))

    @property
    def exists(self) -> bool:
        """Whether the study has been created."""
        return self.found is not None

    def create(self, settings: Settings, identity: dict[str, str]) -> optuna.Study:
        """Create the study. Raises `CheckpointError` if another process creates it at the same time."""
        try:
            self.found = create_study(self._shared_storage, self.name, settings, identity)
        except DuplicatedStudyError as error:
            raise CheckpointError(
                f"The study {self.path} has just been created by another process. Run the same command again, or join it with heretic "
                "worker."
            ) from error
        return self.found

    def _refuse(self, differences: list[str]) -> None:
        if differences:
            raise CheckpointError(
                f"The study {self.name!r} in {self.path} does not match this run: {'; '.join(differences)}. Use another --study-name."
            )


def open_for_workers(checkpoint: Checkpoint, settings: Settings, progress: Progress) -> tuple[optuna.Study, str, ArtifactStore]:
    """A checkpoint's study opened for several workers, the URL of its storage, and its artifact store."""
    if isinstance(checkpoint, SharedCheckpoint):
        url = checkpoint.url
        storage_of(checkpoint.study).timeout = settings.worker_timeout  # opened before the stored settings were known
    else:
        url = str(checkpoint.path.absolute())
        checkpoint.found = open_study(url, STUDY_NAME, settings.worker_timeout, progress)
    return checkpoint.study, url, artifact_store(url, storage_of(checkpoint.study))
