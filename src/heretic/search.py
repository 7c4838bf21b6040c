"""The search: what a trial may look like, the loop that asks and tells, and the Pareto front."""

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from .ablation import Ablation, ComponentParameters
from .checkpoint import is_counted, journal_errors
from .errors import CheckpointError
from .evaluator import Score

# The refusal decision is strongest past the middle of the layers (Arditi et al. 2024), edits work best in the upper ones.
DIRECTION_SCOPES = ["global", "per layer"]
DIRECTION_INDEX = (0.4, 0.9)
MAX_WEIGHT = (0.8, 1.5)
MAX_WEIGHT_POSITION = (0.6, 1.0)
MIN_WEIGHT = (0.0, 1.0)  # of max_weight, because multivariate TPE wants fixed ranges
MIN_WEIGHT_DISTANCE = 0.6  # at most; at least one layer

N_EI_CANDIDATES = 128

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def suggest(trial: Trial, components: Sequence[str], last_layer: int) -> Ablation:
    """Draw an ablation. Positions and distances are fractions of the last layer index; `last_layer` only bounds the distance.

    The direction index is drawn in either scope, so that the search space stays the same for every trial.
    """
    scope = trial.suggest_categorical("direction_scope", DIRECTION_SCOPES)
    direction_index = trial.suggest_float("direction_index", *DIRECTION_INDEX)
    one_layer = 1 / max(last_layer, 1)
    parameters = {}
    for component in components:
        max_weight = trial.suggest_float(f"{component}.max_weight", *MAX_WEIGHT)
        position = trial.suggest_float(f"{component}.max_weight_position", *MAX_WEIGHT_POSITION)
        min_weight = trial.suggest_float(f"{component}.min_weight", *MIN_WEIGHT) * max_weight
        # In models of very few layers one layer is more than the usual largest distance.
        distance = trial.suggest_float(f"{component}.min_weight_distance", one_layer, max(MIN_WEIGHT_DISTANCE, one_layer))
        parameters[component] = ComponentParameters(max_weight, position, min_weight, distance)
    return Ablation(direction_index if scope == "global" else None, parameters)


def ablation_of(trial: FrozenTrial) -> Ablation:
    """The ablation that a finished trial stands for, from its user attributes."""
    parameters = {name: ComponentParameters(**values) for name, values in trial.user_attrs["parameters"].items()}
    return Ablation(trial.user_attrs["direction_index"], parameters)


def pareto_front(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Complete trials that no other beats: fewest refusals first, KL divergence strictly falling."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    front: list[FrozenTrial] = []
    for trial in sorted(complete, key=lambda t: (t.user_attrs["refusals"], t.user_attrs["kl_divergence"], t.number)):
        if not front or trial.user_attrs["kl_divergence"] < front[-1].user_attrs["kl_divergence"]:
            front.append(trial)
    return front


class Search:
    """Asks the study for trials and tells it their scores.

    The sampler is made anew for each trial, seeded with `seed` and the number of trials done. So a resumed run goes on exactly as it
    would have, and the trial that was cut off is drawn again.
    """

    def __init__(
        self, study: optuna.Study, path: Path, components: Sequence[str], last_layer: int, seed: int, n_startup_trials: int
    ) -> None:
        self.study = study
        self.path = path
        self.components = list(components)
        self.last_layer = last_layer
        self.seed = seed
        self.n_startup_trials = n_startup_trials
        self._close_cut_off_trials()

    def _close_cut_off_trials(self) -> None:
        with journal_errors(self.path):
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                self.study.tell(trial.number, state=TrialState.FAIL)

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
        return pareto_front(self.trials)

    def _sampler(self, n_done: int) -> BaseSampler:
        (seed,) = np.random.SeedSequence([self.seed, n_done]).generate_state(1)
        return TPESampler(
            n_startup_trials=self.n_startup_trials,
            n_ei_candidates=N_EI_CANDIDATES,
            multivariate=True,
            seed=int(seed),
        )

    def run(
        self,
        n_trials: int,
        score: Callable[[Ablation], Score],
        objectives: Callable[[Score], tuple[float, float]],
        should_stop: Callable[[], bool] = lambda: False,
        on_trial: Callable[[FrozenTrial], None] = lambda trial: None,
    ) -> None:
        """Run until `n_trials` are done in all. A trial that raises is recorded as failed, and the next one goes on.

        Raises `CheckpointError` where the journal cannot be written.
        """
        while (n_done := self.n_done) < n_trials and not should_stop():
            with journal_errors(self.path):
                self.study.sampler = self._sampler(n_done)
                trial = self.study.ask()
                ablation = suggest(trial, self.components, self.last_layer)
                trial.set_user_attr("direction_index", ablation.direction_index)
                trial.set_user_attr("parameters", {name: vars(p) for name, p in ablation.parameters.items()})
            start = time.perf_counter()
            failure = None
            try:
                result = score(ablation)
            except CheckpointError:
                raise
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            with journal_errors(self.path):
                trial.set_user_attr("seconds", round(time.perf_counter() - start, 3))
                if failure is not None:
                    trial.set_user_attr("failure", failure)
                    self.study.tell(trial, state=TrialState.FAIL)
                else:
                    trial.set_user_attr("refusals", result.refusals)
                    trial.set_user_attr("kl_divergence", result.kl_divergence)
                    self.study.tell(trial, objectives(result))
            on_trial(self.trials[trial.number])
