"""The search: Optuna's ask and tell loop, and the Pareto front. The search space is in `space.py`."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from ..editing.ablation import Ablation
from ..errors import Aborted, HereticError
from ..evaluator import Score
from .batching import BatchSize
from .failures import is_bug, reason
from .front import ablation_of, front_of, is_counted, refusal_limit
from .journal import journal_errors
from .learned_edits import LearnedEdits
from .samplers import Sampling, StartSampler, make_sampler
from .space import SearchSpace, fixed_parameters, suggest

# For a KL divergence, the number of refusals above which a trial is dominated and can be stopped.
Limit = Callable[[float], float]
Scores = Sequence[Score | Exception]
ScoreTrials = Callable[[list[Ablation], Limit], Scores]
# The objective values of a score, as reported to the sampler.
ObjectiveValues = Callable[[Score], Sequence[float]]


def score_batch(
    score_trials: ScoreTrials, ablations: list[Ablation], limit: Limit, on_crash: Callable[[Exception], None] = lambda error: None
) -> Scores:
    """Scores of a batch. If that crashes, each trial is scored separately, so that only those that crash again fail."""
    try:
        return score_trials(ablations, limit)
    except Exception as error:  # one trial must not end the search, whatever it does
        if len(ablations) == 1:
            return [error]
        on_crash(error)
    return [score_batch(score_trials, [ablation], limit)[0] for ablation in ablations]


class Search:
    """Asks the study for trials and tells it their scores, batch after batch, in the order asked.

    A new sampler is created for each trial, seeded with the seed and the number of trials before it. So a resumed run continues exactly
    like an uninterrupted one: interrupted trials are scored as drawn, and later ones are drawn from the same history.
    """

    def __init__(
        self,
        study: optuna.Study,
        path: Path | str,
        space: SearchSpace,
        sampling: Sampling,
        edits: LearnedEdits | None = None,
    ) -> None:
        self.study = study
        self.path = path
        self.space = space
        self.sampling = sampling
        self.edits = edits or LearnedEdits(None)
        self.first_trials = [fixed_parameters(point, space) for point in sampling.first_trials]
        # Called with the error of a crashed batch, and with the bug that failed a trial.
        self.on_crash: Callable[[Exception], None] = lambda error: None
        self.on_bug: Callable[[int, Exception], None] = lambda number, error: None
        self._cut_off = self._find_interrupted_trials()
        self._n_untold = 0

    def _find_interrupted_trials(self) -> list[tuple[Trial, Ablation]]:
        """Trials that an earlier process asked for and did not finish. Those without all parameters are closed."""
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
        """How many trials of the search are done, according to `is_counted`."""
        return sum(map(is_counted, self.trials))

    @property
    def n_scored(self) -> int:
        """`n_done`, and those of the same batch that are scored and told next."""
        return self.n_done + self._n_untold

    @property
    def front(self) -> list[FrozenTrial]:
        """The Pareto front so far."""
        return front_of(self.study)

    def _sampler(self, number: int) -> BaseSampler:
        (seed,) = np.random.SeedSequence([self.sampling.seed, number]).generate_state(1)
        if self.space.start is not None and number < self.sampling.n_start_trials:
            return StartSampler(self.space.start.choices(), int(seed))
        return make_sampler(self.sampling.sampler, self.sampling.n_startup_trials, int(seed))

    def _next_first_trial(self) -> dict[str, float | str] | None:
        """The next of the first trials that the study does not contain yet."""
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
        trial.set_user_attr("origin", "search")
        trial.set_user_attr("direction_index", ablation.direction_index)
        trial.set_user_attr("parameters", {name: vars(p) for name, p in ablation.parameters.items()})
        return ablation

    def _tell(self, trial: Trial, result: Score | Exception, seconds: float, objectives: ObjectiveValues) -> None:
        if isinstance(result, Score):
            try:
                values = objectives(result)
            except Exception as error:  # recorded like an error in scoring: unfinished, the trial would fail again in every resumed run
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
        score_trials: ScoreTrials,
        objectives: ObjectiveValues,
        trials_per_batch: int | BatchSize = 1,
        stop_dominated: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
        on_trial: Callable[[FrozenTrial], None] = lambda trial: None,
    ) -> None:
        """Run until `n_trials` are done in total, `trials_per_batch` at a time, stopping dominated ones early if `stop_dominated`.

        A batch is asked for after the one before was told. A trial that cannot be scored is recorded as failed, and the search continues.
        An aborted batch (`Aborted`) is scored first by the next call or process. Raises `CheckpointError` if the study cannot be written.
        """
        size = BatchSize(trials_per_batch) if isinstance(trials_per_batch, int) else trials_per_batch
        shown = {trial.number for trial in self.trials if is_counted(trial)}

        def show_new() -> None:
            for trial in self.trials:
                if trial.number not in shown and is_counted(trial):
                    shown.add(trial.number)
                    on_trial(trial)

        while not should_stop():
            asked = self._next_batch(n_trials, size.value)
            show_new()
            if asked is None:
                return
            if asked:
                limit = refusal_limit(self.trials if stop_dominated else [])
                try:
                    seconds = self._work(asked, score_trials, objectives, limit, show_new)
                except Aborted:
                    self._cut_off = [*asked, *self._cut_off]
                    break
                size.note(self.n_done, seconds)
        show_new()

    def _next_batch(self, n_trials: int, trials_per_batch: int) -> list[tuple[Trial, Ablation]] | None:
        """The next trials to score; None if there are enough. An interrupted batch is completed as if it had not been interrupted."""
        index = self.n_done
        if index >= n_trials:
            return None
        n = min(trials_per_batch - index % trials_per_batch, n_trials - index)
        asked, self._cut_off = self._cut_off[:n], self._cut_off[n:]
        return asked + [self._ask(number) for number in range(index + len(asked), index + n)]

    def _work(
        self,
        asked: Sequence[tuple[Trial, Ablation]],
        score_trials: ScoreTrials,
        objectives: ObjectiveValues,
        limit: Limit,
        on_told: Callable[[], None] = lambda: None,
    ) -> float:
        """Score trials and tell their scores. Returns the seconds that scoring took."""
        start = time.perf_counter()
        results = self._score(asked, score_trials, limit)
        seconds = time.perf_counter() - start
        for (trial, _), result, self._n_untold in zip(asked, results, reversed(range(len(asked))), strict=True):
            self._tell(trial, result, seconds / len(asked), objectives)
            on_told()
        return seconds

    def _score(self, asked: Sequence[tuple[Trial, Ablation]], score_trials: ScoreTrials, limit: Limit) -> Scores:
        return score_batch(score_trials, [ablation for _, ablation in asked], limit, self.on_crash)
