"""The search: the loop that asks and tells, and the Pareto front. What a trial may look like is in `space.py`."""

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from ..config import DEFAULT_OBJECTIVES, SamplerName
from ..config import Objectives as ObjectiveNames
from ..editing.ablation import Ablation, ComponentParameters
from ..errors import HereticError
from ..evaluator import Score
from ..parameters import FirstTrial
from ..utils import is_bug, reason
from .batches import Limit, ScoreTrials, Scoring, Wait
from .batching import BatchSize
from .checkpoint import is_counted, journal_errors
from .samplers import make_sampler
from .space import SearchSpace, fixed_parameters, suggest

Objectives = Callable[[Score], Sequence[float]]

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def ablation_of(trial: FrozenTrial) -> Ablation:
    """The ablation that a finished trial stands for, from its user attributes."""
    parameters = {name: ComponentParameters(**values) for name, values in trial.user_attrs["parameters"].items()}
    return Ablation(trial.user_attrs["direction_index"], parameters)


def is_finished(trial: FrozenTrial) -> bool:
    """Whether a trial is complete and its refusals counted to the end."""
    return trial.state == TrialState.COMPLETE and not trial.user_attrs.get("bounded", False)


def refusal_limit(trials: Sequence[FrozenTrial]) -> Callable[[float], float]:
    """For a KL divergence, the fewest refusals that a finished trial has at no greater one: with more, a trial cannot be on the front."""
    finished = [(t.user_attrs["kl_divergence"], t.user_attrs["refusals"]) for t in trials if is_finished(t)]
    return partial(_fewest, finished)


def _fewest(finished: Sequence[tuple[float, int]], kl: float) -> float:
    return min((refusals for other, refusals in finished if other <= kl), default=math.inf)


def unlimited(kl: float) -> float:
    """The limit of trials that are all finished."""
    return math.inf


def score_of(trial: FrozenTrial, name: str) -> float:
    """A trial's figure by a scorer's name. Raises `KeyError` where it has none."""
    value: float = trial.user_attrs[name] if name in trial.user_attrs else trial.user_attrs["scores"][name]
    return value


def pareto_front(trials: Sequence[FrozenTrial], objectives: ObjectiveNames = DEFAULT_OBJECTIVES) -> list[FrozenTrial]:
    """Complete trials that no other beats, best in the first objective first; of equals the first.

    With the usual two that is fewest refusals first, KL divergence strictly falling. Figures are compared as they are, not what the search
    makes of them.
    """
    signs = {"minimize": 1, "maximize": -1}

    def key(trial: FrozenTrial) -> tuple[float, ...]:
        return (*(signs[direction] * score_of(trial, name) for name, direction in objectives), trial.number)

    front: list[FrozenTrial] = []
    points: list[tuple[float, ...]] = []
    for trial in sorted(filter(is_finished, trials), key=key):
        point = key(trial)[:-1]
        # Whoever beats a trial comes before it here.
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in points):
            front.append(trial)
            points.append(point)
    return front


def front_of(study: optuna.Study) -> list[FrozenTrial]:
    """The Pareto front of a study as it was searched for."""
    return pareto_front(study.get_trials(deepcopy=False), objectives_of(study))


def objectives_of(study: optuna.Study) -> ObjectiveNames:
    """Names and directions of a study's objectives; the usual two where it does not say."""
    stored = study.user_attrs.get("objectives")
    return DEFAULT_OBJECTIVES if stored is None else tuple((name, direction) for name, direction in stored)


def batch_end(index: int, n_trials: int, trials_per_batch: int, n_processes: int = 1) -> int:
    """Where the batch that trial `index` of `n_trials` belongs to ends. The last trials are shared out among the processes."""
    end = 0
    while end <= index:
        end += min(trials_per_batch, math.ceil((n_trials - end) / n_processes))
    return end


@dataclass(frozen=True)
class _Batch:
    """Trials that were asked for together. `wait` is None where scoring them was not begun, as the search is to stop."""

    asked: list[tuple[Trial, Ablation]]
    ablations: list[Ablation]
    limit: Limit
    wait: Wait | None
    begun: float = field(default_factory=time.perf_counter)


class Search:
    """Asks the study for trials and tells it their scores, batch after batch in the order asked.

    The sampler is made anew for each trial, seeded with `seed` and the number of trials before it. So a resumed run goes on exactly as
    it would have: trials that were cut off are scored as they were drawn, and the ones after them are drawn from the same history.
    """

    def __init__(
        self,
        study: optuna.Study,
        path: Path | str,
        space: SearchSpace,
        seed: int,
        n_startup_trials: int,
        sampler: SamplerName = "tpe",
        first_trials: Sequence[FirstTrial] = (),
    ) -> None:
        self.study = study
        self.path = path
        self.space = space
        self.seed = seed
        self.n_startup_trials = n_startup_trials
        self.sampler = sampler
        self.first_trials = [fixed_parameters(point, space) for point in first_trials]
        self.on_bug: Callable[[int, Exception], None] = lambda number, error: None  # given what failed trials by a bug of ours
        self._cut_off = self._find_cut_off_trials()

    def _find_cut_off_trials(self) -> list[tuple[Trial, Ablation]]:
        """Trials that an earlier process asked for and did not finish. Those that were not drawn to the end are closed."""
        found = []
        with journal_errors(self.path):
            for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if "parameters" in frozen.user_attrs:
                    found.append((Trial(self.study, frozen._trial_id), ablation_of(frozen)))
                else:
                    self.study.tell(frozen.number, state=TrialState.FAIL)
        return found

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials of the study."""
        return self.study.get_trials(deepcopy=False)

    @property
    def n_done(self) -> int:
        """How many trials are done, as `is_counted` counts."""
        return sum(map(is_counted, self.trials))

    @property
    def front(self) -> list[FrozenTrial]:
        """The Pareto front so far."""
        return front_of(self.study)

    def _sampler(self, number: int) -> BaseSampler:
        (seed,) = np.random.SeedSequence([self.seed, number]).generate_state(1)
        return make_sampler(self.sampler, self.n_startup_trials, int(seed))

    def _next_first_trial(self) -> dict[str, float | str] | None:
        """The next of the first trials that no trial of the study has tried."""
        tried = [trial.user_attrs.get("first_trial") for trial in self.trials if "parameters" in trial.user_attrs]
        return next((fixed for fixed in self.first_trials if fixed not in tried), None)

    def _ask(self, number: int) -> tuple[Trial, Ablation]:
        with journal_errors(self.path):
            first = self._next_first_trial() if self.first_trials else None
            sampler = self._sampler(number)
            self.study.sampler = sampler if first is None else PartialFixedSampler(first, sampler)
            trial = self.study.ask()
            if first is not None:
                trial.set_user_attr("first_trial", first)
            return trial, self._draw(trial)

    def _draw(self, trial: Trial) -> Ablation:
        ablation = suggest(trial, self.space)
        trial.set_user_attr("direction_index", ablation.direction_index)
        trial.set_user_attr("parameters", {name: vars(p) for name, p in ablation.parameters.items()})
        return ablation

    def _tell(self, trial: Trial, result: Score | Exception, seconds: float, objectives: Objectives) -> None:
        if isinstance(result, Score):
            try:
                values = objectives(result)
            except Exception as error:  # recorded like one in scoring: left unfinished, the trial would fail every resumed run anew
                result = error
        if isinstance(result, Exception) and is_bug(result):
            self.on_bug(trial.number, result)
        with journal_errors(self.path):
            trial.set_user_attr("seconds", round(seconds, 3))
            if isinstance(result, Exception):
                foreseen = isinstance(result, HereticError)
                trial.set_user_attr("failure", f"{type(result).__name__}: {result}" if foreseen else reason(result))
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                for name, value in result.attributes().items():
                    trial.set_user_attr(name, value)
                self.study.tell(trial, values)

    def run(
        self,
        n_trials: int,
        scoring: Scoring | ScoreTrials,
        objectives: Objectives,
        trials_per_batch: int | BatchSize = 1,
        stop_dominated: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
        on_trial: Callable[[FrozenTrial], None] = lambda trial: None,
    ) -> None:
        """Run until `n_trials` are done in all, `trials_per_batch` of them at a time, dominated ones stopped early if wished.

        A trial that cannot be scored is recorded as failed, and the search goes on. Raises `CheckpointError` where the journal cannot
        be written.
        """
        scoring = scoring if isinstance(scoring, Scoring) else Scoring(scoring)
        size = BatchSize(trials_per_batch) if isinstance(trials_per_batch, int) else trials_per_batch
        at_work: deque[_Batch] = deque()
        is_stopped, last = False, 0.0
        while True:
            is_stopped = is_stopped or should_stop()
            # Batches that are asked for after a stop are left to the resume: it would otherwise draw them from another history.
            while len(at_work) < scoring.n_at_work and (at_work or not is_stopped):
                asked = self._ask_batch(sum(len(batch.asked) for batch in at_work), n_trials, size.value, scoring.n_processes)
                if not asked:
                    break
                limit = refusal_limit(self.trials if stop_dominated else [])
                ablations = [ablation for _, ablation in asked]
                at_work.append(_Batch(asked, ablations, limit, None if is_stopped else scoring.begin(ablations, limit)))
            if not at_work or (wait := at_work[0].wait) is None:
                break
            batch = at_work.popleft()
            results = scoring.finish(batch.ablations, batch.limit, wait)
            # Of batches at work together each takes the time since the one before it was done.
            seconds, last = time.perf_counter() - max(batch.begun, last), time.perf_counter()
            for (trial, _), result in zip(batch.asked, results, strict=True):
                self._tell(trial, result, seconds / len(batch.asked), objectives)
                on_trial(self.trials[trial.number])
            size.note(self.n_done, seconds)
        self._cut_off = [pair for batch in at_work for pair in batch.asked]

    def _ask_batch(self, n_at_work: int, n_trials: int, trials_per_batch: int, n_processes: int) -> list[tuple[Trial, Ablation]]:
        """The next batch, none where there are trials enough. One that was cut off is completed, as if it had not been."""
        index = self.n_done + n_at_work
        if index >= n_trials:
            return []
        end = batch_end(index, n_trials, trials_per_batch, n_processes)
        asked, self._cut_off = self._cut_off[: end - index], self._cut_off[end - index :]
        return asked + [self._ask(number) for number in range(index + len(asked), end)]
