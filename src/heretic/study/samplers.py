"""Optuna's samplers as this program uses them: made anew for every trial, from a seed that is the trial's own."""

import importlib.util

from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

from ..config import SamplerName
from ..errors import UsageError

N_EI_CANDIDATES = 128


def check_sampler(name: SamplerName) -> None:
    """Raise `UsageError` where what a sampler needs is not installed."""
    if name == "gp" and importlib.util.find_spec("scipy") is None:
        raise UsageError('sampler = "gp" needs SciPy, which is not installed: pip install scipy, or choose another --sampler.')


def make_sampler(name: SamplerName, n_startup_trials: int, seed: int) -> BaseSampler:
    """A sampler without a history of its own: what it proposes depends on the study and the seed alone.

    All of them begin with `n_startup_trials` random trials; for `nsgaii` those are the first generation, and the size of the others.
    """
    if name == "gp":
        # The same parameters give the same scores; nothing is noise.
        return GPSampler(n_startup_trials=n_startup_trials, deterministic_objective=True, warn_independent_sampling=False, seed=seed)
    if name == "nsgaii":
        return NSGAIISampler(population_size=max(2, n_startup_trials), seed=seed)
    if name == "random":
        return RandomSampler(seed=seed)
    return TPESampler(
        n_startup_trials=n_startup_trials,
        n_ei_candidates=N_EI_CANDIDATES,
        multivariate=True,
        constant_liar=True,  # so that trials asked for together differ
        seed=seed,
    )
