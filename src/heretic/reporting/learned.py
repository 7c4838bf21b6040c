"""What edits look like: strengths over the layers, whoever proposed the trial, and how far what was learned has turned."""

from collections.abc import Mapping, Sequence

from optuna.trial import FrozenTrial

from ..editing.ablation import ComponentParameters, kernel
from ..scoring.score_tables import Baseline, verdicts_text
from ..study.front import ablation_of, is_learned, learned_strengths
from ..utils import format_duration

Points = Sequence[tuple[float, float]]


def learned_text(trial: FrozenTrial, n_trials: int, baseline: Baseline) -> str:
    """A learned trial in a line, when it has just been scored."""
    attributes = trial.user_attrs
    learned = attributes["learned"]
    begun = f"Learned edit {learned['number'] + 1}/{n_trials}"
    if "failure" in attributes:
        return f"{begun} failed: {attributes['failure']}"
    known = attributes.get("sequence_kl_divergence")
    sequence = "" if known is None else f" (sequence {known:.4f})"
    return (
        f"{begun}: {verdicts_text(attributes, baseline)}, KL divergence {attributes['kl_divergence']:.4f}{sequence}; "
        f"{learned['steps']} steps, {format_duration(attributes['seconds'])}"
    )


def strength_curves(trial: FrozenTrial, last_layer: int) -> dict[str, Points]:
    """By component, a trial's strength over the layers as points `(layer, strength)`."""
    if is_learned(trial):
        return {name: [(layer, strength) for layer, strength, _ in found] for name, found in learned_strengths(trial).items()}
    return {name: kernel_points(p, last_layer) for name, p in ablation_of(trial).parameters.items()}


def cosine_curve(trial: FrozenTrial) -> Points:
    """By layer, the cosine between a learned trial's direction and the difference of means that it began at."""
    layers = {layer: cosine for found in learned_strengths(trial).values() for layer, _, cosine in found}
    return sorted(layers.items())


def kernel_points(parameters: ComponentParameters, last_layer: int) -> Points:
    """The strength over the layers as a line: its corners, with the cliffs where the kernel ends."""
    top, reach = parameters.max_weight_position * last_layer, parameters.min_weight_distance * last_layer
    edge = 1e-6  # layers, on either side of a cliff
    corners = [0.0, top - reach - edge, top - reach + edge, top, top + reach - edge, top + reach + edge, float(last_layer)]
    return [(layer, kernel(layer, parameters, last_layer)) for layer in sorted(corners) if 0 <= layer <= last_layer]


def learned_cells(trial: FrozenTrial, components: Sequence[str]) -> list[str]:
    """What a learned trial does as cells: that it was learned, then each component's least and greatest strength."""
    found: Mapping[str, Sequence[tuple[int, float, float]]] = learned_strengths(trial)
    cells = []
    for name in components:
        strengths = [strength for _, strength, _ in found.get(name, [])]
        cells.append(f"{min(strengths):.2f} to {max(strengths):.2f}" if strengths else "")
    return ["learned", *cells]
