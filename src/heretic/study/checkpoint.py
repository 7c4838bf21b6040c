"""An open study: which it is, whether a run may go on with it, and what the run stores in it."""

import json
import os
from contextlib import ExitStack
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal._file import get_lock_file
from optuna.study import StudyDirection
from optuna.trial import TrialState
from pydantic import ValidationError

from ..config import Settings
from ..errors import CheckpointError, UsageError
from ..trust import Ask, require_consent
from ..utils import JsonObject
from .attributes import damage_of
from .front import is_counted, is_learned
from .journal import UNREADABLE, JournalFile, JournalLock, damaged_line, free_name, journal_errors, journal_path
from .learned_edits import LearnedEdits, artifact_folder
from .space import SearchSpace
from .stored_settings import differences, inherited_settings, reason

STUDY_NAME = "heretic"
# The study's attribute that says that several workers may share it.
SHARED = "shared"
# The study's attribute that holds its search space.
SPACE = "search_space"
# The study's attributes that identify it.
DESCRIBED = {"settings", "given", "identity"}
# Prefix of the names of scorers in a study's identity.
SCORER = "the scorer "


def create_study(storage: BaseStorage, name: str, settings: Settings, identity: dict[str, str]) -> optuna.Study:
    """A new study in a storage, described by its settings."""
    directions = [StudyDirection[direction.upper()] for _, direction in settings.objectives]
    study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    study.set_user_attr("settings", settings.stored())
    study.set_user_attr("given", sorted(settings.model_fields_set))
    study.set_user_attr("identity", identity)
    study.set_user_attr("objectives", settings.objectives)
    return study


def stored_or_new_space(study: optuna.Study, space: SearchSpace) -> SearchSpace:
    """The search space that the study was created with; if it has none yet, `space`, which is then stored.

    Stored, because samplers learn only from trials of one space, and ranges that depend on the model's residuals would be computed again.
    """
    stored = study.user_attrs.get(SPACE)
    if stored is not None:
        return SearchSpace.model_validate(stored)
    study.set_user_attr(SPACE, space.model_dump(mode="json"))
    return space


class Checkpoint:
    """An open journal and the study in it. Use as a context manager: while it is open, no other process can work on it.

    Raises `CheckpointError` if the folder cannot be written, another process has locked the study, or the file is damaged.
    """

    # What to do about a study that a run cannot continue.
    otherwise = "start over with --checkpoint-action restart (the file is kept)"

    def __init__(self, settings: Settings) -> None:
        self.path = journal_path(settings)
        self.lost_bytes = 0
        self._is_restarted = settings.checkpoint_action == "restart"
        self._run_lock = FileLock(f"{self.path}.run.lock")
        # The study in the journal; None until there is one.
        self.found: optuna.Study | None = None

    def __enter__(self) -> "Checkpoint":
        with journal_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_run("--study-checkpoint-dir")
            with ExitStack() as undo:
                undo.callback(self._run_lock.release)
                if self.path.exists() and not self._is_restarted:
                    self._cut_incomplete_line()
                    self.found = self._load()
                undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._run_lock.release()

    def _lock_run(self, setting: str) -> None:
        """Lock the study for this run. Raises `CheckpointError` if another process has; `setting` says where another study lies."""
        try:
            self._run_lock.acquire(blocking=False)
        except Timeout as error:
            raise CheckpointError(f"Another process is working on the study {self.path}. Wait for it, or use another {setting}.") from error

    @property
    def study(self) -> optuna.Study:
        """The open study. Raises `CheckpointError` if none was found or created."""
        if self.found is None:
            raise CheckpointError(f"There is no study in {self.path}.")
        return self.found

    @property
    def exists(self) -> bool:
        """Whether there is a study with at least one finished trial."""
        return self.found is not None and any(trial.state.is_finished() for trial in self.found.get_trials(deepcopy=False))

    @property
    def is_shared(self) -> bool:
        """Whether the study was created for several workers, which may join and leave."""
        return self.found is not None and bool(self.found.user_attrs.get(SHARED))

    def _cut_incomplete_line(self) -> None:
        """Remove an incomplete last line that a killed writer left. Takes the writers' lock, so that a running write is waited for."""
        with get_lock_file(JournalLock(self.path)):
            content = self.path.read_bytes()
            kept = content[: content.rfind(b"\n") + 1]
            last = kept[:-1].rpartition(b"\n")[2]
            if last:
                try:
                    json.loads(last)
                except (ValueError, RecursionError):
                    kept = kept[: len(kept) - len(last) - 1]
            if kept != content and damaged_line(kept) is None:
                self.lost_bytes = len(content) - len(kept)
                os.truncate(self.path, len(kept))

    def _load(self) -> optuna.Study | None:
        """The study in the journal, or None. Reading does not change the file."""
        try:
            return optuna.load_study(study_name=STUDY_NAME, storage=self._storage())
        except KeyError:
            return None
        except UNREADABLE as error:
            raise self._damaged(str(error).rstrip(".")) from error

    def _storage(self) -> JournalStorage:
        try:
            return JournalStorage(JournalFile(str(self.path), lock_obj=JournalLock(self.path)))
        except UNREADABLE as error:
            raise self._damaged(damaged_line(self.path.read_bytes()) or str(error).rstrip(".")) from error

    def _damaged(self, damage: str) -> CheckpointError:
        return CheckpointError(f"The study {self.path} is damaged: {damage}. Replace it with an intact copy, or {self.otherwise}.")

    def create(self, settings: Settings, identity: dict[str, str]) -> optuna.Study:
        """Create a study, described by its settings. An existing journal is renamed, unless it is ours and has no finished trial."""
        with journal_errors(self.path):
            if self.path.exists():
                # Without a trial, its creation was interrupted, whoever created it.
                is_ours = self.found is not None and ("identity" in self.found.user_attrs or not self.found.get_trials(deepcopy=False))
                if self.path.stat().st_size == 0 or (is_ours and not self.exists):
                    self.path.unlink()
                else:
                    kept = free_name(self.path)
                    self.path.rename(kept)
                    if artifact_folder(self.path).exists():
                        artifact_folder(self.path).rename(artifact_folder(kept))
            self.found = create_study(self._storage(), STUDY_NAME, settings, identity)
        return self.found

    def restored(self, settings: Settings, ask: Ask | None = None) -> Settings:
        """The stored settings, overridden by those that are given now.

        Raises `CheckpointError` naming the settings that must not differ, and `UsageError` if the two do not fit together or the study
        names code that the user does not agree to run.
        """
        attributes = self._attributes()
        if damage := damage_of(self.study):
            raise self._damaged(damage)
        stored = inherited_settings(attributes)
        given = settings.model_dump(mode="json", include=settings.model_fields_set) | {"study_storage": settings.study_storage}
        try:
            before = Settings.model_validate(stored)
        except ValidationError as error:
            raise CheckpointError(
                f"The settings stored in {self.path} are not valid in this version: {reason(error)}. {self.otherwise.capitalize()}."
            ) from error
        try:
            result = Settings.model_validate({**stored, **given})
        except ValidationError as error:
            raise UsageError(f"The given settings do not fit those stored in {self.path}: {reason(error)}.") from error
        self._refuse(differences(before, result))
        require_consent(f"The study {self.path}", result, given, ask)
        if self.n_done and "n_startup_trials" in attributes and "n_startup_trials" not in result.model_fields_set:
            # The default grows with n_trials: trials after those that the sampler proposed would be random again.
            n_startup = min(attributes["n_startup_trials"], result.n_startup_trials)
            result = result.model_copy(update={"n_startup_trials": n_startup})
        return result

    def check_identity(self, identity: dict[str, str]) -> None:
        """Raise `CheckpointError` if the model's files or the prompts are no longer those of the study."""
        stored = self._attributes()["identity"]
        changed = [name for name in identity if stored.get(name) != identity[name]]
        hint = " (or its settings, which are not stored: give them again)"
        self._refuse([f"the contents of {name} have changed{hint if name.startswith(SCORER) else ''}" for name in changed])

    @property
    def edits(self) -> LearnedEdits:
        """The files of the study's learned edits."""
        return LearnedEdits.of_journal(self.path)

    @property
    def n_done(self) -> int:
        """How many trials of the study's search are done."""
        return 0 if self.found is None else sum(map(is_counted, self.found.get_trials(deepcopy=False)))

    @property
    def progress(self) -> str:
        """How far the study is, such as `3 trials done`, or `0 trials done, 2 edits learned`."""
        trials = [] if self.found is None else self.found.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        n_learned = sum(map(is_learned, trials))
        edits = "edit" if n_learned == 1 else "edits"
        return f"{self.n_done} trials done" + (f", {n_learned} {edits} learned" if n_learned else "")

    def note(self, **attributes: object) -> None:
        """Store attributes of the study, so that a later run can show them without loading the model."""
        with journal_errors(self.path):
            for name, value in attributes.items():
                if self.study.user_attrs.get(name) != value:
                    self.study.set_user_attr(name, value)

    def note_search(self, settings: Settings, target: int) -> None:
        """Store the number of trials that a search is to have, and how many of them are random."""
        self.note(target=target)
        if settings.n_trials:
            self.note(n_startup_trials=settings.n_startup_trials)

    def target(self, settings: Settings, n_done: int, is_new: bool) -> int:
        """How many trials the search is to have in total.

        This is `n_trials`, or the larger number that an earlier run requested, unless `n_trials` is changed now. If those are done,
        `n_additional_trials` are added.
        """
        target = settings.n_trials
        if not is_new and target == self._attributes()["settings"]["n_trials"]:
            target = max(target, self._attributes().get("target", 0))
        if settings.n_additional_trials and (is_new or n_done >= target):
            target = max(n_done, target) + settings.n_additional_trials
        return target

    def trials_per_batch(self, settings: Settings, automatic: int) -> int:
        """How many trials share a pass: as set, else as the study began, else the automatic choice, which is then stored.

        Stored, because the sampler's proposals depend on it: otherwise a run could not be repeated.
        """
        stored = {} if self.found is None else self.found.user_attrs
        chosen: int = settings.trials_per_batch or stored.get("trials_per_batch") or automatic
        if settings.n_trials:  # else the automatic choice is not for a search
            self.note(trials_per_batch=chosen)
        return chosen

    def _attributes(self) -> JsonObject:
        attributes = {} if self.found is None else self.found.user_attrs
        if not attributes.keys() >= DESCRIBED:
            raise CheckpointError(f"The study {self.path} was not created by heretic. {self.otherwise.capitalize()}.")
        return attributes

    def _refuse(self, differences: list[str]) -> None:
        if differences:
            raise CheckpointError(
                f"The study {self.path} does not match this run: {'; '.join(differences)}. Start over with --checkpoint-action restart "
                "(the old file is kept), or use another --study-checkpoint-dir."
            )


def read_study(path: Path) -> tuple[optuna.Study, Settings]:
    """The study in a journal and its settings, except its scorers. Raises `CheckpointError` if heretic did not create it."""
    try:
        content = path.read_bytes()
        damage = damaged_line(content[: content.rfind(b"\n") + 1])  # without an incomplete last line, which may be just being written
    except OSError as error:
        raise CheckpointError(f"The study {path} cannot be read: {error.strerror}.") from error
    if damage is not None:
        raise CheckpointError(f"The study {path} is damaged: {damage}.")
    try:
        storage = JournalStorage(JournalFile(str(path), lock_obj=JournalLock(path)))
        study = optuna.load_study(study_name=STUDY_NAME, storage=storage)
        if not study.user_attrs.keys() >= DESCRIBED:
            raise CheckpointError(f"The study {path} was not created by heretic.")
        if damage := damage_of(study):
            raise CheckpointError(f"The study {path} is damaged: {damage}.")
        return study, Settings.model_validate(inherited_settings(study.user_attrs, leave=["scorers"]))
    except KeyError as error:
        raise CheckpointError(f"The study {path} was not created by heretic.") from error
    except ValidationError as error:
        raise CheckpointError(f"The settings stored in {path} are not valid in this version: {reason(error)}.") from error
    except UNREADABLE as error:
        raise CheckpointError(f"The study {path} is damaged: {error}.") from error
