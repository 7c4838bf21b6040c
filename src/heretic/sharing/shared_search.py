"""The search in a shared study: which worker starts a trial, heartbeats, and trials of lost workers."""

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState

from ..editing.ablation import Ablation
from ..errors import CheckpointError
from ..evaluator import Score
from ..study.batching import MAX_TRIALS_PER_BATCH
from ..study.front import is_counted
from ..study.learned_edits import LearnedEdits, learned_trials
from ..study.samplers import Sampling, SearchSampler
from ..study.search import Limit, ObjectiveValues, Scores, ScoreTrials, Search
from ..study.space import SearchSpace
from .shared_study import target_of
from .storage import WITHDRAWN, WORKER, SharedStorage, requeue, worker_identity

# How often an idle worker looks for trials.
IDLE_SECONDS = 0.5


class Heartbeats:
    """Records heartbeats of trials in a background thread while there is progress: a worker that hangs must count as lost."""

    def __init__(self, storage: SharedStorage) -> None:
        self._storage = storage
        self._last_step = time.monotonic()

    def note_progress(self, *_: object) -> None:
        """Note that there is progress. Used as a hook before every forward pass."""
        self._last_step = time.monotonic()

    @contextmanager
    def recording(self, trials: Sequence[Trial]) -> Iterator[None]:
        """Context in which the trials' heartbeats are recorded."""
        self.note_progress()
        over = threading.Event()
        interval = self._storage.get_heartbeat_interval()

        def record() -> None:
            while not over.wait(interval):
                if time.monotonic() - self._last_step < self._storage.timeout:
                    for trial in trials:
                        try:
                            self._storage.record_heartbeat(trial._trial_id)
                        except (UpdateFinishedTrialError, KeyError):  # reassigned meanwhile
                            continue
                        except CheckpointError:  # storing the scores raises it as well, unless it is over until then
                            continue

        thread = threading.Thread(target=record, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class SharedSearch(Search):
    """A `Search` in a study that other workers share. `storage` is the study's.

    Proposals depend on which trials are finished, so a run cannot be repeated exactly. The startup trials can, since their samplers are
    seeded with their numbers.
    """

    def __init__(
        self, study: optuna.Study, storage: SharedStorage, space: SearchSpace, sampling: Sampling, edits: LearnedEdits | None = None
    ) -> None:
        super().__init__(study, storage.location, space, sampling, edits)
        self.storage = storage
        self.heartbeats = Heartbeats(storage)
        self.identity = worker_identity()
        self.study.sampler = SearchSampler(self._sampler)

    def _sampler(self, number: int) -> BaseSampler:
        return super()._sampler(max(0, number - len(learned_trials(self.study))))

    def _find_interrupted_trials(self) -> list[tuple[Trial, Ablation]]:
        return []  # a lost worker's trials are requeued by `fail_stale_trials`

    def _next_batch(self, n_trials: int, trials_per_batch: int) -> list[tuple[Trial, Ablation]] | None:
        """Like `Search._next_batch`, up to the study's attribute `target` or `n_trials`, counting all workers' trials; may be empty.

        Raises `CheckpointError` if the storage stays unreachable or cannot be written.
        """
        fail_stale_trials(self.study)
        trials, target = self.trials, target_of(self.study, n_trials)
        if sum(map(is_counted, trials)) >= target:
            return None
        asked = self._ask_some(self._n_to_start(trials, target, trials_per_batch), target)
        if not asked:
            time.sleep(IDLE_SECONDS)
        return asked

    def _n_to_start(self, trials: Sequence[FrozenTrial], target: int, trials_per_batch: int) -> int:
        """How many trials this worker may start: its share of the remaining ones, and no more in total than a batch may have."""
        n_waiting = sum(trial.state == TrialState.WAITING for trial in trials)
        n_free = max(0, target - sum(map(_is_live, trials))) + n_waiting
        at_work = {trial.system_attrs.get(WORKER) for trial in trials if trial.state == TrialState.RUNNING} - {None, self.identity}
        n_workers = max(len(at_work) + 1, self.study.user_attrs.get("workers", 1))
        return min(trials_per_batch, math.ceil(n_free / n_workers), math.ceil(MAX_TRIALS_PER_BATCH / n_workers))

    def _ask_some(self, n: int, target: int) -> list[tuple[Trial, Ablation]]:
        """Start up to `n` trials; fewer if other workers were faster.

        Trials are created one after the other, so all workers agree which ones are within `target`. Those beyond are withdrawn, so the
        study never has more than `target`.
        """
        asked = []
        for _ in range(n):
            try:
                trial, ablation = self._ask(0)
            except UpdateFinishedTrialError:  # counted as lost before it was marked as ours
                continue
            before = sum(other.number < trial.number and _is_live(other) for other in self.trials)
            if before >= target:
                self._withdraw(trial)
                break
            asked.append((trial, ablation))
        return asked

    def queue_first_trials(self) -> None:
        """Queue the first trials that the study does not contain yet. Done by one worker of a run."""
        tried = [trial.user_attrs.get("first_trial") for trial in self.trials]
        for fixed in self.first_trials:
            if fixed not in tried:
                self.study.enqueue_trial(fixed, user_attrs={"first_trial": fixed})

    def _ask(self, number: int) -> tuple[Trial, Ablation]:
        trial = self.study.ask()
        self.storage.set_trial_system_attr(trial._trial_id, WORKER, self.identity)
        return trial, self._draw(trial)

    def _withdraw(self, trial: Trial) -> bool:
        """Close a trial of ours that is not to be finished. Returns False if it is no longer ours."""
        try:
            self.storage.set_trial_system_attr(trial._trial_id, WITHDRAWN, True)
            self.study.tell(trial, state=TrialState.FAIL)
        except (UpdateFinishedTrialError, ValueError):
            return False
        return True

    def _score(self, asked: Sequence[tuple[Trial, Ablation]], score_trials: ScoreTrials, limit: Limit) -> Scores:
        trials = [trial for trial, _ in asked]
        try:
            with self.heartbeats.recording(trials):
                return super()._score(asked, score_trials, limit)
        except KeyboardInterrupt:
            self._requeue(trials)
            raise

    def _tell(self, trial: Trial, result: Score | Exception, seconds: float, objectives: ObjectiveValues) -> None:
        try:
            super()._tell(trial, result, seconds, objectives)
        except (UpdateFinishedTrialError, ValueError) as error:
            # We counted as lost, and another worker repeats the trial: only its result counts.
            if not self.storage.get_trial(trial._trial_id).state.is_finished():
                raise error

    def _requeue(self, trials: Sequence[Trial]) -> None:
        """Requeue trials of a worker that leaves; this does not count as a failed attempt."""
        for trial in trials:
            frozen = self.storage.get_trial(trial._trial_id)
            if self._withdraw(trial):
                requeue(self.study, frozen, counts=False)


def _is_live(trial: FrozenTrial) -> bool:
    """Whether a trial is done, running or queued."""
    return is_counted(trial) or not trial.state.is_finished()
