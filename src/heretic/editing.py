"""Ablations applied to a loaded model: hooks on the writers that map their outputs, with a batch of trials given as data.

No weight is copied, changed or factorized. What does not depend on the trial (row norms, `c` of every layer's direction) is made once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from .ablation import Ablation, OutputMap, RowNormalization, apply_output_map, kernel, output_map, row_gram, trial_membership
from .architecture import Architecture, Writer
from .directions import mix, mix_at


@dataclass(frozen=True)
class _Constants:
    """What a writer's output map needs whatever the trial, on the writer's device, in float32."""

    directions: Tensor  # (layer + 1, d): what must leave this writer's output, not normalized
    norms: Tensor | None  # (d,)
    c: Tensor | None  # (layer + 1, d), for `directions` as they are
    bias: Tensor | None  # (d,)


class AblationHooks:
    """The writers' hooks, and the directions they work with. Nothing changes in the model until `active` is entered.

    `directions (layer + 1, d)` are unit vectors, index 0 the embedding output's.
    """

    def __init__(self, architecture: Architecture, directions: Tensor, mode: RowNormalization) -> None:
        self.architecture = architecture
        self.directions = directions
        self.mode = mode
        self._constants = [self._prepare(writer) for writer in architecture.writers]
        self._maps: dict[nn.Module, OutputMap] = {}
        self._n_trials = 0
        self._membership: dict[torch.device, Tensor] = {}
        self._trial_of_row: Tensor | None = None
        self._handles = [writer.module.register_forward_hook(self._hook) for writer in architecture.writers]

    def _prepare(self, writer: Writer) -> _Constants:
        with align_module_device(writer.module):
            device = writer.module.weight.device
            bias = None if writer.module.bias is None else writer.module.bias.detach().float().clone()
            directions = self.directions.float().to(device)
            if writer.gain is not None:
                directions = directions * writer.gain.to(device)
            if self.mode == "none":
                return _Constants(directions, None, None, bias)
            weight = dense_weight(writer.module)
            norms = torch.linalg.vector_norm(weight, dim=1)
            c = row_gram(weight, norms, directions) if self.mode == "full" else None
            return _Constants(directions, norms, c, bias)

    def edit_of(self, writer: Writer, ablation: Ablation) -> tuple[Tensor, float]:
        """The unit direction `(d,)` that `ablation` takes out of the writer's output, on the CPU, and the strength."""
        constants = self._constants[self.architecture.writers.index(writer)]
        r, _ = self._direction(constants, writer.layer, ablation)
        return r.cpu(), self._strength(writer, ablation)

    def first_layer(self, ablation: Ablation) -> int:
        """The first layer that the ablation edits; the number of layers where it edits none."""
        edited = (writer.layer for writer in self.architecture.writers if self._strength(writer, ablation))
        return min(edited, default=len(self.architecture.layers))

    def _strength(self, writer: Writer, ablation: Ablation) -> float:
        last_layer = len(self.architecture.layers) - 1
        parameters = ablation.parameters.get(writer.component)
        return 0.0 if parameters is None else kernel(writer.layer, parameters, last_layer)

    def _direction(self, constants: _Constants, layer: int, ablation: Ablation) -> tuple[Tensor, Tensor | None]:
        """Unit `r (d,)` and the `c (d,)` that goes with it. Both are mixed and scaled alike, since `c` is linear in `r`."""
        n_layers = len(self.architecture.layers)
        if ablation.direction_index is None:
            r, c = constants.directions[layer + 1], None if constants.c is None else constants.c[layer + 1]
        else:
            layers = mix_at(ablation.direction_index * (n_layers - 1), n_layers)
            r = mix(constants.directions, layers)
            c = None if constants.c is None else mix(constants.c, layers)
        length = torch.linalg.vector_norm(r).clamp(min=1e-12)
        return r / length, None if c is None else c / length

    @contextmanager
    def active(self, ablations: Sequence[Ablation]) -> Iterator[None]:
        """Within, the model computes as if edited. Where there are several ablations, `assign_rows` says which row belongs to which."""
        self._maps, self._n_trials = self._make_maps(ablations), len(ablations)
        try:
            yield
        finally:
            self._maps = {}
            self.assign_rows(None)

    def assign_rows(self, trial_of_row: Tensor | None) -> None:
        """Row `k` of the batches that follow belongs to ablation `trial_of_row[k]`."""
        self._trial_of_row = trial_of_row
        self._membership.clear()

    def _make_maps(self, ablations: Sequence[Ablation]) -> dict[nn.Module, OutputMap]:
        maps: dict[nn.Module, OutputMap] = {}
        for writer, constants in zip(self.architecture.writers, self._constants, strict=True):
            strengths = [self._strength(writer, ablation) for ablation in ablations]
            if not any(strengths):
                continue
            edits = [self._direction(constants, writer.layer, ablation) for ablation in ablations]
            r = torch.stack([direction for direction, _ in edits])
            c = None if constants.c is None else torch.stack([c for _, c in edits if c is not None])
            strength = torch.tensor(strengths, dtype=r.dtype, device=r.device)
            maps[writer.module] = output_map(self.mode, strength, r, constants.norms, c, constants.bias)
        return maps

    def _hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        edit = self._maps.get(module)
        return None if edit is None else apply_output_map(output, edit, self._rows_on(output.device))

    def _rows_on(self, device: torch.device) -> Tensor | None:
        """Membership of the rows on a device, made once for all writers there; None where one ablation has them all."""
        if self._n_trials == 1:
            return None
        if self._trial_of_row is None:
            raise ValueError("rows of several ablations must be assigned before a forward pass")
        if device not in self._membership:
            self._membership[device] = trial_membership(self._trial_of_row.to(device), self._n_trials)
        return self._membership[device]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()


def dense_weight(module: nn.Module) -> Tensor:
    """The weight `(d_out, d_in)` of a linear module in float32, dequantized where it is stored in 4 bits."""
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state).float()
    return weight.detach().float()
