"""The `parameters` table of the settings: the search space as a user writes it.

Every number is a constant, a range `{ low, high, log }`, or a table per component with either of these. Pydantic distinguishes the three
by a function (`Discriminator`), so that an error names only the wrong place. `study/space.py` turns the table into the search space of a
model.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from .utils import JsonObject

DirectionScope = Literal["global", "per layer"]
Weight = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Auto = Literal["auto"]

# Pydantic inserts these tags into the locations of errors; they are removed before the user sees them.
CONSTANT, RANGE, FROM_MODEL, PER_COMPONENT, SINGLE = TAGS = ("<constant>", "<range>", "<auto>", "<per component>", "<single>")


class Range(BaseModel):
    """From `low` to `high`, inclusive; with `log`, sampled on a logarithmic scale."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: Weight
    high: Weight
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low ({self.low:g}) is larger than high ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0 (it is {self.low:g})")
        return self


class FractionRange(Range):
    """A range of fractions of the last layer index."""

    low: Fraction
    high: Fraction


def kind(value: object) -> str:
    """The tag of a value, as the user wrote it or as pydantic parsed it."""
    if isinstance(value, Range):
        return RANGE
    if isinstance(value, Mapping):
        return RANGE if Range.model_fields.keys() & value.keys() else PER_COMPONENT
    return FROM_MODEL if value == "auto" else CONSTANT


def _kind_of_table(value: object) -> str:
    return PER_COMPONENT if kind(value) == PER_COMPONENT else SINGLE


_KINDS = Discriminator(
    kind,
    custom_error_type="kind",
    custom_error_message="Input should be a number or a range such as {low = 0.5, high = 1.0} (quote component names that contain dots)",
)

WeightChoice = Annotated[Annotated[Weight, Tag(CONSTANT)] | Annotated[Range, Tag(RANGE)], _KINDS]
StrengthChoice = Annotated[Annotated[Weight, Tag(CONSTANT)] | Annotated[Range, Tag(RANGE)] | Annotated[Auto, Tag(FROM_MODEL)], _KINDS]
FractionChoice = Annotated[Annotated[Fraction, Tag(CONSTANT)] | Annotated[FractionRange, Tag(RANGE)], _KINDS]
PlaceChoice = Annotated[
    Annotated[Fraction, Tag(CONSTANT)] | Annotated[FractionRange, Tag(RANGE)] | Annotated[Auto, Tag(FROM_MODEL)], _KINDS
]
Choice = float | Range

T = TypeVar("T")
PerComponent = Annotated[
    Annotated[T, Tag(SINGLE)] | Annotated[dict[str, T], Tag(PER_COMPONENT), Field(min_length=1)], Discriminator(_kind_of_table)
]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Parameters(BaseModel):
    """The search space. Positions and distances are fractions of the last layer index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    direction_scope: Annotated[list[DirectionScope], BeforeValidator(_as_list), Field(min_length=1)] = Field(
        ["global", "per layer"], description="Refusal direction: one for all layers (global), or each layer's own (per layer)."
    )
    direction_index: PlaceChoice = Field(
        "auto",
        description="Layer whose direction is used in scope global, as a fraction of the last layer index; auto: from 0.4, or from the "
        "layer in which harmless and harmful prompts separate if that is lower, to 0.9.",
    )
    max_weight: PerComponent[StrengthChoice] = Field(
        "auto",
        description="Ablation strength at max_weight_position; 1 removes the direction; auto: from 0 to 3, first trials from 0.8 (in MLPs "
        "from 0) to 1.5.",
    )
    max_weight_position: PerComponent[PlaceChoice] = Field(
        "auto",
        description="Layer of the greatest strength, as a fraction of the last layer index; auto: from 0.3 (first trials 0.6), or from "
        "the layer in which the prompts separate if that is lower, to 1.",
    )
    min_weight: PerComponent[WeightChoice] = Field(
        Range(low=0.0, high=1.0), description="Strength at min_weight_distance, as a fraction of max_weight."
    )
    min_weight_distance: PerComponent[PlaceChoice] = Field(
        "auto",
        description="Distance from max_weight_position beyond which nothing is edited, as a fraction of the last layer index; "
        "at least one layer; auto: to 1, first trials to 0.6.",
    )

    def choice(self, name: str, component: str | None = None) -> Choice | Auto:
        """The choice for a parameter, of a component if one is given; the default if a table omits the component."""
        for value in (getattr(self, name), type(self).model_fields[name].default):
            choice: Choice | Auto | None = value.get(component) if isinstance(value, dict) else value
            if choice is not None:
                return choice
        raise ValueError(f"{name} has no default for the component {component}")

    def named_components(self) -> dict[str, list[str]]:
        """The components named in tables, by parameter."""
        return _named_components(self)

    def as_table(self) -> JsonObject:
        """Plain data, as a user would write it."""
        return {name: _plain(getattr(self, name)) for name in type(self).model_fields}


class FirstTrial(BaseModel):
    """A trial to run before the sampler takes over: constants, or tables of them per component. Missing values are drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    direction_scope: DirectionScope | None = None
    direction_index: Fraction | None = None
    max_weight: PerComponent[Weight] | None = None
    max_weight_position: PerComponent[Fraction] | None = None
    min_weight: PerComponent[Weight] | None = None
    min_weight_distance: PerComponent[Fraction] | None = None

    def value(self, name: str, component: str | None = None) -> float | None:
        """The value of a parameter, of a component if one is given; None if it is to be drawn."""
        value: float | dict[str, float] | None = getattr(self, name)
        return value.get(component or "") if isinstance(value, dict) else value

    def named_components(self) -> dict[str, list[str]]:
        """The components named in tables, by parameter."""
        return _named_components(self)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.model_dump(exclude_defaults=True) if isinstance(value, Range) else value


def _named_components(table: Parameters | FirstTrial) -> dict[str, list[str]]:
    return {name: list(value) for name in type(table).model_fields if isinstance(value := getattr(table, name), dict)}


def quoted(key: str) -> str:
    """A TOML key: quoted if it contains other characters than letters, digits, `_` and `-`."""
    return key if re.fullmatch(r"[\w-]+", key, re.ASCII) else json.dumps(key)
