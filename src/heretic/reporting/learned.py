"""Strengths of edits over the layers, of sampled and learned trials alike, and how far learned directions have turned."""

from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial

from ..editing.ablation import ComponentParameters, kernel
from ..scoring.score_tables import Baseline, verdicts_text
from ..study.front import ablation_of, is_learned, learned_strengths
from ..utils import format_duration

Points = Sequence[tuple[float, float]]


def learned_text(trial: FrozenTrial, n_trials: int, baseline: Baseline) -> str:
    """One line about a learned trial that has just been scored."""
    attributes = trial.user_attrs
    learned = attributes["learned"]
    heading = f"Learned edit {learned['number'] + 1}/{n_trials}"
    if "failure" in attributes:
        return f"{heading} failed: {attributes['failure']}"
    known = attributes.get("sequence_kl_divergence")
    sequence = "" if known is None else f" (sequence {known:.4f})"
    return (
        f"{heading}: {verdicts_text(attributes, baseline)}, KL divergence {attributes['kl_divergence']:.4f}{sequence}; "
        f"{learned['steps']} steps, {format_duration(attributes['seconds'])}"
    )


def strength_curves(trial: FrozenTrial, last_layer: int) -> dict[str, Points]:
    """By component, a trial's strength over the layers as points `(layer, strength)`."""
    if is_learned(trial):
        return {name: [(layer, strength) for layer, strength, _ in found] for name, found in learned_strengths(trial).items()}
    return {name: kernel_points(p, last_layer) for name, p in ablation_of(trial).parameters.items()}


def cosine_curve(trial: FrozenTrial) -> Points:
    """By layer, the cosine between a learned trial's direction and the difference of means that it started from."""
    layers = {layer: cosine for found in learned_strengths(trial).values() for layer, _, cosine in found}
    return sorted(layers.items())


def kernel_points(parameters: ComponentParameters, last_layer: int) -> Points:
    """The strength over the layers as a polyline, with vertical steps where the kernel ends."""
    top, reach = parameters.max_weight_position * last_layer, parameters.min_weight_distance * last_layer
    edge = 1e-6  # in layers, on either side of a step
    corners = [0.0, top - reach - edge, top - reach + edge, top, top + reach - edge, top + reach + edge, float(last_layer)]
    return [(layer, kernel(layer, parameters, last_layer)) for layer in sorted(corners) if 0 <= layer <= last_layer]


def learned_cells(trial: FrozenTrial, components: Sequence[str]) -> list[str]:
    """The cells that describe a learned trial: `learned`, then each component's smallest and largest strength."""
    found: Mapping[str, Sequence[tuple[int, float, float]]] = learned_strengths(trial)
    cells = []
    for name in components:
        strengths = [strength for _, strength, _ in found.get(name, [])]
        cells.append(f"{min(strengths):.2f} to {max(strengths):.2f}" if strengths else "")
    return ["learned", *cells]
