"""The search space of a model: the setting `parameters`, resolved for its components and depth, and drawing trials from it."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from optuna.trial import Trial
from pydantic import BaseModel, ConfigDict

from ..config import Settings
from ..editing.ablation import Ablation, ComponentParameters
from ..errors import UsageError, did_you_mean
from ..parameters import Choice, DirectionScope, FirstTrial, FractionChoice, FractionRange, Range, WeightChoice, quoted

# Always in this order: Optuna does not allow the choices of a study to change.
DIRECTION_SCOPES: list[DirectionScope] = ["global", "per layer"]
# What "auto" searches, and what the first trials are drawn from: most strong, wide edits destroy deep models, and nothing else suffices for
# some small ones. So narrow ones come first, then the sampler goes where it is better (see bench/LOG.md). Models that decide late need
# late edits: the refusal direction is strongest past the middle of the layers (Arditi et al. 2024). If the prompts separate in a lower
# layer, ranges of layers begin there. Edits of MLPs may cost more than they gain, so narrow ones may leave them out.
AUTO = {
    "direction_index": FractionRange(low=0.4, high=0.9),
    "max_weight": Range(low=0.0, high=3.0),
    "max_weight_position": FractionRange(low=0.3, high=1.0),
    "min_weight_distance": FractionRange(low=0.0, high=1.0),
}
START = AUTO | {
    "max_weight": Range(low=0.8, high=1.5),
    "max_weight_position": FractionRange(low=0.6, high=1.0),
    "min_weight_distance": FractionRange(low=0.0, high=0.6),
}
MLP_START = START | {"max_weight": Range(low=0.0, high=1.5)}
PLACES = ("direction_index", "max_weight_position")

KERNEL = ("max_weight", "max_weight_position", "min_weight", "min_weight_distance")


class KernelSpace(BaseModel):
    """The search space of one component's kernel; `min_weight` is a fraction of `max_weight`."""

    model_config = ConfigDict(frozen=True)

    max_weight: WeightChoice
    max_weight_position: FractionChoice
    min_weight: WeightChoice
    min_weight_distance: FractionChoice


class SearchSpace(BaseModel):
    """The search space of one model. Positions and distances are fractions of the last layer index.

    `start`: a narrower one, which the first trials are drawn from.
    """

    model_config = ConfigDict(frozen=True)

    direction_scope: list[DirectionScope]
    direction_index: FractionChoice
    components: dict[str, KernelSpace]
    start: "SearchSpace | None" = None

    def choices(self) -> dict[str, Choice]:
        """All numbers, by their parameter name in Optuna's trials."""
        index = {"direction_index": self.direction_index} if "global" in self.direction_scope else {}
        kernels = {f"{c}.{name}": getattr(kernel, name) for c, kernel in self.components.items() for name in KERNEL}
        return index | kernels


def search_space(settings: Settings, components: Sequence[str], last_layer: int, separating_layer: int | None = None) -> SearchSpace:
    """The search space for a model with these components. Kernels cover at least one layer, also in models with few layers.

    `separating_layer` (`directions.separating_layer`) is used by "auto". Raises `UsageError` if a setting names a component that the model
    does not have, if all are disabled, or if a first trial is outside the search space.
    """
    named = {f"parameters.{name}": names for name, names in settings.parameters.named_components().items()}
    for i, point in enumerate(settings.first_trials):
        named |= {f"first_trials.{i}.{name}": names for name, names in point.named_components().items()}
    for setting, names in {**named, "disabled_components": settings.disabled_components}.items():
        _check_components(setting, names, components)
    enabled = [component for component in components if component not in settings.disabled_components]
    if not enabled:
        raise UsageError(f"disabled_components disables all components of the model: {', '.join(components)}.")
    space = _resolved(settings, enabled, last_layer, separating_layer, lambda component: AUTO)
    start = _resolved(
        settings, enabled, last_layer, separating_layer, lambda component: MLP_START if component.startswith("mlp.") else START
    )
    if start != space:
        space = space.model_copy(update={"start": start})
    for i, point in enumerate(settings.first_trials):
        fixed_parameters(point, space, f"first_trials.{i}")
    return space


def _resolved(
    settings: Settings,
    components: Sequence[str],
    last_layer: int,
    separating_layer: int | None,
    automatic: Callable[[str], Mapping[str, Range]],
) -> SearchSpace:
    """The search space with these ranges for "auto", which a component is given for."""
    one_layer = 1 / max(last_layer, 1)

    def resolved(name: str, component: str | None = None) -> Choice:
        choice = settings.parameters.choice(name, component)
        if choice == "auto":
            choice = automatic(component or "")[name]
            if name in PLACES and separating_layer is not None:
                choice = choice.model_copy(update={"low": min(choice.low, separating_layer * one_layer)})
        return _at_least(choice, one_layer) if name == "min_weight_distance" else choice

    kernels = {c: KernelSpace.model_validate({name: resolved(name, c) for name in KERNEL}) for c in components}
    scopes = [scope for scope in DIRECTION_SCOPES if scope in settings.parameters.direction_scope]
    return SearchSpace.model_validate({"direction_scope": scopes, "direction_index": resolved("direction_index"), "components": kernels})


def _check_components(setting: str, named: Iterable[str], components: Sequence[str]) -> None:
    for name in named:
        if name not in components:
            raise UsageError(
                f"{setting} names the component {quoted(name)}, which the model does not have{did_you_mean(name, components)}. "
                f"Its components are {', '.join(components)}."
            )


def _at_least(choice: Choice, least: float) -> Choice:
    if isinstance(choice, Range):
        return choice.model_copy(update={"low": max(choice.low, least), "high": max(choice.high, least)})
    return max(choice, least)


def suggest(trial: Trial, space: SearchSpace) -> Ablation:
    """Draw an ablation. Constants do not become parameters of the trial.

    The direction index is drawn in both scopes, so that all trials have the same search space.
    """
    scope = space.direction_scope[0]
    if len(space.direction_scope) > 1:
        scope = trial.suggest_categorical("direction_scope", space.direction_scope)
    values = {name: _suggest_float(trial, name, choice) for name, choice in space.choices().items()}
    parameters = {}
    for component in space.components:
        kernel = {name: values[f"{component}.{name}"] for name in KERNEL}
        # A fraction of max_weight until here, because multivariate TPE needs fixed ranges.
        parameters[component] = ComponentParameters(**kernel | {"min_weight": kernel["min_weight"] * kernel["max_weight"]})
    return Ablation(values["direction_index"] if scope == "global" else None, parameters)


def _suggest_float(trial: Trial, name: str, choice: Choice) -> float:
    if isinstance(choice, Range):
        return choice.low if choice.low == choice.high else trial.suggest_float(name, choice.low, choice.high, log=choice.log)
    return choice


def fixed_parameters(point: FirstTrial, space: SearchSpace, setting: str = "first_trials") -> dict[str, float | str]:
    """A first trial as parameters of an Optuna trial, without those that are constant in the search space.

    Raises `UsageError` if a value is outside the search space.
    """
    fixed: dict[str, float | str] = {}
    if point.direction_scope is not None:
        if point.direction_scope not in space.direction_scope:
            raise UsageError(f"{setting}.direction_scope is {point.direction_scope!r}, which parameters.direction_scope does not contain.")
        if len(space.direction_scope) > 1:
            fixed["direction_scope"] = point.direction_scope
    for name, choice in space.choices().items():
        component, _, parameter = name.rpartition(".")
        value = point.value(parameter, component or None)
        if value is None:
            continue
        low, high = (choice.low, choice.high) if isinstance(choice, Range) else (choice, choice)
        if not low <= value <= high:
            whose = f" of {component}" if component else ""
            allowed = f"from {low:g} to {high:g}" if high > low else f"{low:g} only"
            raise UsageError(
                f"{setting}.{parameter} is {value:g}, but the search space{whose} is {allowed}. Change parameters.{parameter}."
            )
        if high > low:
            fixed[name] = value
    return fixed
