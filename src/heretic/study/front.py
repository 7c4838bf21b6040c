"""Trials as they are told: their ablation, their figures, and the Pareto front of them."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..editing.ablation import Ablation, ComponentParameters, LearnedEdit
from ..specifications import DEFAULT_OBJECTIVES, Objectives


def is_learned(trial: FrozenTrial) -> bool:
    """Whether a trial's edit was learned, and not proposed by a sampler."""
    return bool(trial.user_attrs.get("origin") == "learned")


def is_counted(trial: FrozenTrial) -> bool:
    """Whether a trial of the search is done: complete, or failed for a reason that is recorded. One that was cut off is neither.

    Learned trials are counted for themselves.
    """
    if trial.user_attrs.get("origin") == "learned":
        return False
    return trial.state == TrialState.COMPLETE or (trial.state == TrialState.FAIL and "failure" in trial.user_attrs)


def ablation_of(trial: FrozenTrial) -> Ablation:
    """The ablation that a finished trial stands for, from its user attributes.

    A learned one has its strengths and no directions, which is what screens show; `LearnedEdits.ablation_of` reads those.
    """
    if is_learned(trial):
        writers = trial.user_attrs["learned"]["writers"]
        return Ablation(None, {}, LearnedEdit({}, {writer["writer"]: writer["strength"] for writer in writers}))
    parameters = {name: ComponentParameters(**values) for name, values in trial.user_attrs["parameters"].items()}
    return Ablation(trial.user_attrs["direction_index"], parameters)


def search_view(study: optuna.Study) -> optuna.Study:
    """The study as samplers and importances are to see it: without learned trials, which no sampler could have drawn."""
    view = copy.copy(study)
    for name in ("get_trials", "_get_trials"):  # samplers use the second, which takes a cache
        setattr(view, name, partial(_searched, getattr(study, name)))
    return view


def _searched(get_trials: Callable[..., list[FrozenTrial]], *args: object, **kwargs: object) -> list[FrozenTrial]:
    return [trial for trial in get_trials(*args, **kwargs) if not is_learned(trial)]


def learned_strengths(trial: FrozenTrial) -> dict[str, list[tuple[int, float, float]]]:
    """By component, the layer, strength and cosine to the difference of means of each writer of a learned trial."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for writer in trial.user_attrs["learned"]["writers"]:
        found.setdefault(writer["component"], []).append((writer["layer"], writer["strength"], writer["cosine"]))
    return found


def components_of(trials: Sequence[FrozenTrial]) -> list[str]:
    """The components that trials of a study edit. Learned ones lack those that no gradient reaches."""
    found = [learned_strengths(trial) if is_learned(trial) else trial.user_attrs["parameters"] for trial in trials]
    return list(max(found, key=len, default=[]))


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
