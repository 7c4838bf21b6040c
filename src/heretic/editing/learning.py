"""Edits that a gradient can follow: unit directions and strengths, free, and the output maps that they make.

The maps are those of `ablation.output_map`, in all three modes of row normalization, so what is learned is applied, exported and rebuilt as
any other edit. Every layer has one direction, shared by its writers, which begins at the layer's own difference of means (Arditi et al.
2024, arXiv 2406.11717); every writer has a strength, of either sign: a bound at 0 would leave strengths there that no gradient moves.

Where it breaks: writers that are edited by replacing their weight have no map, and are left as they are (`unmapped`).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ablation import LearnedEdit, OutputMap
from .architecture import Writer
from .hooks import AblationHooks

# Where strengths begin: an edit that does something, and little harm.
FIRST_STRENGTH = 0.8
# By what angle a direction turns in a step, about, whatever the hidden size is, and its momentum (Muon: Jordan et al. 2024). Layers write
# to the same stream, so their gradients are much alike; made orthogonal, what few layers gain from is learned as fast as the rest.
DIRECTION_RATE, DIRECTION_MOMENTUM = 0.07, 0.8
# Adam's rate and moments (Kingma & Ba 2015) for strengths.
STRENGTH_RATE, STRENGTH_BETAS = 0.1, (0.8, 0.95)
# What the average of the steps keeps of itself with each one. Muon's steps do not shrink near an optimum, but their average comes to rest
# there (Polyak & Juditsky 1992).
AVERAGED = 0.85


class LearnableEdit:
    """Directions `(layer, d)` and strengths `(writer,)` in float32 (float64 in tests), with their optimizers. On the CPU, and moved for a
    pass.

    Gradients are taken where the last step ended; the edit itself is the average of the steps. `components`: those that are edited;
    `last_layer` and beyond are as any other.
    """

    def __init__(self, hooks: AblationHooks, components: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
        self.hooks = hooks
        self.writers = [writer for writer in hooks.architecture.writers if writer.component in components and hooks.has_map(writer)]
        self.layers = sorted({writer.layer for writer in self.writers})
        initial = hooks.directions[[layer + 1 for layer in self.layers]].to("cpu", dtype)
        empty = ~initial.any(dim=-1)  # means that coincide: no direction of its own, and no gradient to find one
        initial[empty] = initial[~empty].mean(dim=0)
        self.initial = F.normalize(initial, dim=-1)
        self.directions = self.initial.clone().requires_grad_()
        self.strengths = torch.full((len(self.writers),), FIRST_STRENGTH, dtype=dtype, requires_grad=True)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon([self.directions], lr=DIRECTION_RATE, momentum=DIRECTION_MOMENTUM, weight_decay=0.0),
            torch.optim.Adam([self.strengths], lr=STRENGTH_RATE, betas=STRENGTH_BETAS),
        ]
        self.averages = [parameter.detach().clone() for parameter in (self.directions, self.strengths)]

    def _unit_direction(self, writer: Writer, directions: Tensor) -> Tensor:
        """What leaves the writer's output: its layer's direction, by the gain of a norm that follows."""
        r = directions[self.layers.index(writer.layer)]
        if writer.gain is not None:
            r = r * writer.gain.to(r)
        return F.normalize(r, dim=-1)

    def maps(self, of_average: bool = False) -> dict[nn.Module, OutputMap]:
        """The output maps by module, through which gradients reach directions and strengths; or those of the edit, which none reach."""
        directions, strengths = self.averages if of_average else (self.directions, self.strengths)
        edits = {w.name: (self._unit_direction(w, directions), s) for w, s in zip(self.writers, strengths, strict=True)}
        return self.hooks.maps_of(edits)

    def frozen(self) -> LearnedEdit:
        """The edit as it is now, as data."""
        directions, strengths = self.averages
        unit = {writer.name: self._unit_direction(writer, directions).float() for writer in self.writers}
        return LearnedEdit(unit, {w.name: s for w, s in zip(self.writers, strengths.tolist(), strict=True)})

    def turned(self) -> list[float]:
        """By writer, the cosine between the direction of its layer and the difference of means that it began at."""
        cosines = F.cosine_similarity(self.averages[0], self.initial, dim=-1)
        return [float(cosines[self.layers.index(writer.layer)]) for writer in self.writers]

    def step(self) -> None:
        """Follow the gradients that have gathered, and clear them."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.directions.data = F.normalize(self.directions.data, dim=-1)  # a longer one would turn less
        for average, parameter in zip(self.averages, (self.directions, self.strengths), strict=True):
            average.lerp_(parameter.detach(), 1 - AVERAGED)

    def state(self) -> dict[str, Tensor]:
        """All that learning goes on from, as tensors."""
        found: dict[str, Tensor] = {}
        for name, parameter, average, optimizer in self._learned():
            found |= {name: parameter.detach().clone(), f"average.{name}": average.clone()}
            for key, value in optimizer.state[parameter].items():
                found[f"{name}.{key}"] = value.detach().clone()
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave. Changes the edit."""
        for name, parameter, average, optimizer in self._learned():
            parameter.data.copy_(state[name])
            average.copy_(state.get(f"average.{name}", state[name]))  # studies were begun before there were averages
            optimizer.state[parameter] = {
                key.removeprefix(f"{name}."): value.clone() for key, value in state.items() if key.startswith(f"{name}.")
            }

    def _learned(self) -> Iterator[tuple[str, Tensor, Tensor, torch.optim.Optimizer]]:
        """By name, what is learned, its average, and what learns it."""
        return zip(("directions", "strengths"), (self.directions, self.strengths), self.averages, self.optimizers, strict=True)


def refusal_loss(log_probability: Tensor) -> Tensor:
    """`-log(1 - p)` of the probability of a refusal, from `log p`, `(row,)`.

    A thousandth of `p` is taken off, so that a refusal that is certain has a gradient that is large and finite.
    """
    return -torch.log1p(-0.999 * log_probability.exp())


def divergence(original: Tensor, edited: Tensor) -> Tensor:
    """`KL(original || edited)` of log-probabilities `(..., vocabulary)`, in nats, `(...)`."""
    return (original.exp() * (original - edited)).sum(dim=-1)
