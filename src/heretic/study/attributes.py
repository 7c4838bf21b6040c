"""Validation of the attributes that are read from a journal, which anybody may have written: types and bounds."""

import json
from typing import Annotated, Literal, Self

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError, model_validator

from ..settings_sources import first_problem
from ..utils import JsonObject
from .space import SearchSpace

# Limits far above any real study: without them, a journal could cause tables of any size.
Count = Annotated[int, Field(ge=0, le=1_000_000)]
Layer = Annotated[int, Field(ge=0, le=100_000)]


class _Stored(BaseModel):
    """Unknown attributes are allowed: they may come from later versions or Optuna's own tools."""

    model_config = ConfigDict(extra="ignore", strict=True)


class _Figures(_Stored):
    scores: dict[str, float] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    response_classes: dict[str, Count] = {}
    kl_statistics: dict[str, float] = {}


class _Kernel(_Stored):
    """`ablation.ComponentParameters`."""

    model_config = ConfigDict(extra="forbid")

    max_weight: FiniteFloat
    max_weight_position: FiniteFloat
    min_weight: FiniteFloat
    min_weight_distance: FiniteFloat


class _Writer(_Stored):
    writer: str
    component: str
    layer: Layer
    strength: FiniteFloat
    cosine: FiniteFloat


class _Learned(_Stored):
    """A learned edit, as stored by `learned_search`. `edit` is a file name and must not be a path."""

    edit: Annotated[str, Field(pattern=r"^[0-9a-f-]{36}$")]
    number: Count
    weight: FiniteFloat
    steps: Count
    writers: Annotated[list[_Writer], Field(min_length=1)]


class _Trial(_Figures):
    """A complete trial."""

    refusals: Count
    kl_divergence: FiniteFloat
    origin: Literal["search", "learned"] = "search"
    direction_index: FiniteFloat | None
    parameters: dict[str, _Kernel] | None
    learned: _Learned | None = None
    bounded: bool = False
    seconds: FiniteFloat = 0.0
    sequence_kl_divergence: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.origin == "learned" and self.learned is None:
            raise ValueError("it was learned, but has no attribute learned")
        if self.origin == "search" and self.parameters is None:
            raise ValueError("it has no parameters")
        return self


class _Finalist(_Figures):
    early_response_classes: dict[str, Count] = {}
    failure: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        classes = self.response_classes.keys() & self.early_response_classes.keys()
        if self.failure is None and not classes >= {"refusal", "degenerate"}:
            raise ValueError("it has neither response classes nor a failure")
        return self


class _Conditions(_Stored):
    max_response_length: Count


class _Finalists(_Stored):
    conditions: _Conditions
    n_bad_prompts: Count
    n_good_prompts: Count
    base: _Finalist
    trials: dict[str, _Finalist]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, trial in self.trials.items():
            if trial.failure is None and not self.base.scores.keys() <= trial.scores.keys():
                raise ValueError(f"trial {name} lacks a score of the original")
        return self


class _Samples(_Stored):
    prompts: list[str]
    original: list[str]
    trials: dict[str, list[str]]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(len(texts) != len(self.prompts) for texts in (self.original, *self.trials.values())):
            raise ValueError("the numbers of responses and prompts differ")
        return self


class _Study(_Stored):
    settings: JsonObject
    given: list[str]
    identity: dict[str, str]
    objectives: list[tuple[str, Literal["minimize", "maximize"]]] = []
    target: NonNegativeInt = 0  # n_trials has no limit
    n_startup_trials: NonNegativeInt = 0
    trials_per_batch: Annotated[int, Field(ge=1, le=100_000)] = 1
    base_refusals: Count | None = None
    n_bad_prompts: Count | None = None
    last_layer: Layer | None = None
    search_space: SearchSpace | None = None
    finalists: _Finalists | None = None
    samples: _Samples | None = None


def damage_of(study: optuna.Study) -> str | None:
    """A description of the first invalid attribute of a study; None if all are valid."""
    if damage := _problem(_Study, study.user_attrs):
        return f"its {damage}"
    objectives = study.user_attrs.get("objectives", [])
    if objectives and len(objectives) != len(study.directions):
        return f"its objectives are {len(objectives)}, not {len(study.directions)}"
    for trial in study.get_trials(deepcopy=False):
        damage = _problem(_Trial, trial.user_attrs) if trial.state == TrialState.COMPLETE else _failure(trial)
        scores = trial.user_attrs.get("scores", {}) if damage is None and trial.state == TrialState.COMPLETE else None
        if scores is not None:
            lacking = [name for name, _ in objectives if name not in scores and not isinstance(trial.user_attrs.get(name), (int, float))]
            damage = f"no {lacking[0]}" if lacking else None
        if damage is not None:
            return f"trial {trial.number} has {damage}"
    return None


def _failure(trial: FrozenTrial) -> str | None:
    return None if isinstance(trial.user_attrs.get("failure", ""), str) else "failure: Input should be a valid string"


def _problem(model: type[_Stored], attributes: JsonObject) -> str | None:
    try:
        model.model_validate_json(json.dumps(attributes))  # as JSON: then a list is accepted as a tuple, and nothing else is converted
    except ValidationError as error:
        where, what = first_problem(error)
        return f"no {where}" if error.errors()[0]["type"] == "missing" else f"{where}: {what}"
    return None
