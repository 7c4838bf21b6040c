"""Optuna's samplers: a new one is created for every trial, seeded for that trial."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from ..config import SamplerName, Settings
from ..errors import UsageError
from ..parameters import Choice, FirstTrial, Range
from .front import search_view

N_EI_CANDIDATES = 128
# At least so many trials begin a search in the narrower ranges, however short it is: else 12 trials of a deep model mostly destroy it.
MIN_START_TRIALS = 6


@dataclass(frozen=True)
class Sampling:
    """How trials are proposed: by which of Optuna's samplers, from which seed, after how many random trials and which known points."""

    seed: int
    n_startup_trials: int
    sampler: SamplerName = "tpe"
    first_trials: Sequence[FirstTrial] = ()

    @property
    def n_start_trials(self) -> int:
        """How many of the first trials come from the start of the search space. None for samplers whose random trials are all alike."""
        return max(MIN_START_TRIALS, self.n_startup_trials // 2) if self.sampler in ("tpe", "gp") else 0

    @classmethod
    def of(cls, settings: Settings) -> "Sampling":
        return cls(settings.seed or 0, settings.n_startup_trials, settings.sampler, settings.first_trials)


class SearchSampler(BaseSampler):  # type: ignore[misc]
    """A sampler that only sees trials of the search, not learned ones. Every trial gets its own, made from the trial's number."""

    def __init__(self, make: Callable[[int], BaseSampler]) -> None:
        self._make = make
        self._sampler = make(0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler = self._make(trial.number)
        self._sampler.before_trial(search_view(study), trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(search_view(study), trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, object]:
        return self._sampler.sample_relative(search_view(study), trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> object:
        return self._sampler.sample_independent(search_view(study), trial, name, distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._sampler.after_trial(search_view(study), trial, state, values)


class StartSampler(RandomSampler):  # type: ignore[misc]
    """Draws from ranges that are narrower than the search space's, by parameter name."""

    def __init__(self, ranges: Mapping[str, Choice], seed: int) -> None:
        super().__init__(seed)
        self._ranges = ranges

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> object:
        if isinstance(own := self._ranges.get(name), Range):
            distribution = FloatDistribution(own.low, own.high, log=own.log)
        return super().sample_independent(study, trial, name, distribution)


def check_sampler(name: SamplerName) -> None:
    """Raise `UsageError` if a package that the sampler needs is not installed."""
    if name == "gp" and importlib.util.find_spec("scipy") is None:
        raise UsageError('sampler = "gp" needs SciPy, which is not installed: pip install scipy, or choose another --sampler.')


def make_sampler(name: SamplerName, n_startup_trials: int, seed: int) -> BaseSampler:
    """A sampler without internal state: its proposals depend only on the study's trials and the seed.

    All of them start with `n_startup_trials` random trials; for `nsgaii`, this is the size of every generation.
    """
    sampler = _optunas(name, n_startup_trials, seed)
    return SearchSampler(lambda number: sampler)


def _optunas(name: SamplerName, n_startup_trials: int, seed: int) -> BaseSampler:
    if name == "gp":
        # The same parameters give the same scores: there is no noise.
        return GPSampler(n_startup_trials=n_startup_trials, deterministic_objective=True, warn_independent_sampling=False, seed=seed)
    if name == "nsgaii":
        return NSGAIISampler(population_size=max(2, n_startup_trials), seed=seed)
    if name == "random":
        return RandomSampler(seed=seed)
    return TPESampler(
        n_startup_trials=n_startup_trials,
        n_ei_candidates=N_EI_CANDIDATES,
        multivariate=True,
        constant_liar=True,  # so that trials proposed together differ
        seed=seed,
    )
