"""Finished trials: their ablation, their scores, and the Pareto front."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..editing.ablation import Ablation, ComponentParameters, LearnedEdit
from ..specifications import DEFAULT_OBJECTIVES, Objectives


def is_learned(trial: FrozenTrial) -> bool:
    """Whether a trial's edit was learned, not proposed by a sampler."""
    return bool(trial.user_attrs.get("origin") == "learned")


def is_counted(trial: FrozenTrial) -> bool:
    """Whether a trial of the search is done: complete, or failed for a recorded reason. Interrupted trials are neither.

    Learned trials are counted separately.
    """
    if trial.user_attrs.get("origin") == "learned":
        return False
    return trial.state == TrialState.COMPLETE or (trial.state == TrialState.FAIL and "failure" in trial.user_attrs)


def ablation_of(trial: FrozenTrial) -> Ablation:
    """The ablation of a finished trial, from its user attributes.

    A learned one has strengths but no directions, which is enough to display it; `LearnedEdits.ablation_of` reads the directions.
    """
    if is_learned(trial):
        writers = trial.user_attrs["learned"]["writers"]
        return Ablation(None, {}, LearnedEdit({}, {writer["writer"]: writer["strength"] for writer in writers}))
    parameters = {name: ComponentParameters(**values) for name, values in trial.user_attrs["parameters"].items()}
    return Ablation(trial.user_attrs["direction_index"], parameters)


def search_view(study: optuna.Study) -> optuna.Study:
    """The study without learned trials, for samplers and importances: no sampler could have drawn those."""
    view = copy.copy(study)
    for name in ("get_trials", "_get_trials"):  # samplers use the second one, which can use a cache
        setattr(view, name, partial(_without_learned, getattr(study, name)))
    return view


def _without_learned(get_trials: Callable[..., list[FrozenTrial]], *args: object, **kwargs: object) -> list[FrozenTrial]:
    return [trial for trial in get_trials(*args, **kwargs) if not is_learned(trial)]


def learned_strengths(trial: FrozenTrial) -> dict[str, list[tuple[int, float, float]]]:
    """By component, the layer, strength and cosine to the difference of means of each edited module of a learned trial."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for writer in trial.user_attrs["learned"]["writers"]:
        found.setdefault(writer["component"], []).append((writer["layer"], writer["strength"], writer["cosine"]))
    return found


def components_of(trials: Sequence[FrozenTrial]) -> list[str]:
    """The components that trials of a study edit. Learned trials lack those without a gradient."""
    found = [learned_strengths(trial) if is_learned(trial) else trial.user_attrs["parameters"] for trial in trials]
    return list(max(found, key=len, default=[]))


def is_finished(trial: FrozenTrial) -> bool:
    """Whether a trial is complete and all its refusals were counted."""
    return trial.state == TrialState.COMPLETE and not trial.user_attrs.get("bounded", False)


def refusal_limit(trials: Sequence[FrozenTrial]) -> Callable[[float], float]:
    """For a KL divergence, the fewest refusals of a finished trial with at most this divergence. With more, a trial is dominated."""
    finished = [(t.user_attrs["kl_divergence"], t.user_attrs["refusals"]) for t in trials if is_finished(t)]
    return partial(_fewest, finished)


def _fewest(finished: Sequence[tuple[float, int]], kl: float) -> float:
    return min((refusals for other, refusals in finished if other <= kl), default=math.inf)


def score_of(trial: FrozenTrial, name: str) -> float:
    """A trial's score by a scorer's name. Raises `KeyError` if it has none."""
    value: float = trial.user_attrs[name] if name in trial.user_attrs else trial.user_attrs["scores"][name]
    return value


def pareto_front(trials: Sequence[FrozenTrial], objectives: Objectives = DEFAULT_OBJECTIVES) -> list[FrozenTrial]:
    """Complete trials that no other dominates, best in the first objective first; of equal ones only the first.

    With the default objectives, that is fewest refusals first, with strictly falling KL divergence. Raw scores are compared, not the
    objectives that the sampler sees.
    """
    signs = {"minimize": 1, "maximize": -1}

    def key(trial: FrozenTrial) -> tuple[float, ...]:
        return (*(signs[direction] * score_of(trial, name) for name, direction in objectives), trial.number)

    front: list[FrozenTrial] = []
    points: list[tuple[float, ...]] = []
    for trial in sorted(filter(is_finished, trials), key=key):
        point = key(trial)[:-1]
        # A trial that dominates another one comes before it here.
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in points):
            front.append(trial)
            points.append(point)
    return front


def front_of(study: optuna.Study) -> list[FrozenTrial]:
    """The Pareto front of a study for its own objectives."""
    return pareto_front(study.get_trials(deepcopy=False), objectives_of(study))


def objectives_of(study: optuna.Study) -> Objectives:
    """Names and directions of a study's objectives; the default ones if it does not have the attribute."""
    stored = study.user_attrs.get("objectives")
    return DEFAULT_OBJECTIVES if stored is None else tuple((name, direction) for name, direction in stored)
