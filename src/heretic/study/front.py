"""Trials as they are told: their ablation, their figures, and the Pareto front of them."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..config import DEFAULT_OBJECTIVES, Objectives
from ..editing.ablation import Ablation, ComponentParameters


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


def score_of(trial: FrozenTrial, name: str) -> float:
    """A trial's figure by a scorer's name. Raises `KeyError` where it has none."""
    value: float = trial.user_attrs[name] if name in trial.user_attrs else trial.user_attrs["scores"][name]
    return value


def pareto_front(trials: Sequence[FrozenTrial], objectives: Objectives = DEFAULT_OBJECTIVES) -> list[FrozenTrial]:
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


def objectives_of(study: optuna.Study) -> Objectives:
    """Names and directions of a study's objectives; the usual two where it does not say."""
    stored = study.user_attrs.get("objectives")
    return DEFAULT_OBJECTIVES if stored is None else tuple((name, direction) for name, direction in stored)
