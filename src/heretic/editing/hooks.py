"""Applies ablations to a loaded model: hooks on the writers map their outputs for a batch of trials.

No weight is copied, changed or factorized if an output map is equivalent. Everything that does not depend on the trial (row norms, `c` of
every layer's direction) is computed once. There are three kinds of writers:

- A linear module: its output is mapped.
- Fused experts: in mode `none` the sum of their outputs is mapped, since all experts have the same map. In modes `pre` and `full` each
  expert has its own map, which must be applied before the gate: every pair of token and expert is passed to the experts as a separate
  token with weight 1, mapped, and summed with the gates here. Transformers' grouped matrix products are still used.
- Experts that cannot be called like this: their weight is replaced while a trial is active, and trials are not batched (`batches_trials`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..device import upload
from ..errors import UnsupportedModelError
from .ablation import (
    Ablation,
    OutputMap,
    RowNormalization,
    apply_output_map,
    apply_output_map_by_expert,
    edit_bias,
    edit_weight,
    kernel,
    output_map,
    row_gram,
    trial_membership,
)
from .architecture import Architecture, Storage, Writer, as_pairs, first_tensor, with_first_tensor
from .directions import mix, mix_at

LINEAR = Storage()


@dataclass(frozen=True)
class _Constants:
    """What a writer's edit needs in every trial, on the writer's device, in float32. Experts have a separate axis before `d`."""

    directions: Tensor  # (layer + 1, d): to be removed from this writer's output, not normalized
    norms: Tensor | None = None  # (d,)
    c: Tensor | None = None  # (layer + 1, d), for unchanged `directions`; for experts it is computed per trial
    bias: Tensor | None = None  # (d,)


def batches_trials(architecture: Architecture, mode: RowNormalization) -> bool:
    """Whether several trials may share a forward pass: for every writer it is known which row a token of its output belongs to."""
    return all(writer.keeps_rows and not _is_swapped(writer, mode) for writer in architecture.writers)


def _is_swapped(writer: Writer, mode: RowNormalization) -> bool:
    by_expert = writer.takes_gates and writer.keeps_rows
    if writer.storage.weight is None:
        return True
    return writer.storage.n_experts is not None and (not writer.is_sum or (mode != "none" and not by_expert))


class AblationHooks:
    """The writers' hooks and their directions. The model is not changed until `active` is entered.

    `directions (layer + 1, d)` are unit vectors, index 0 the embedding output's.
    """

    def __init__(self, architecture: Architecture, directions: Tensor, mode: RowNormalization) -> None:
        self.architecture = architecture
        self.directions = directions
        self.mode = mode
        self._constants = [self._prepare(writer) for writer in architecture.writers]
        self._maps: dict[nn.Module, OutputMap] = {}
        self._n_trials = 0
        self._trials: dict[torch.device, Tensor] = {}
        self._membership: dict[tuple[torch.device, int], Tensor] = {}
        self._trial_of_row: Sequence[int] | None = None
        self._only_trial: int | None = None
        # For a compiled pass: the same maps and tensors whatever the ablations and rows, so that it need not be compiled again.
        self.is_uniform = False
        self._gates: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._handles = []
        for writer in architecture.writers:
            if _is_swapped(writer, mode):
                continue
            if writer.storage.n_experts is None or mode == "none":
                self._handles.append(writer.module.register_forward_hook(self._hook))
            else:
                self._handles.append(writer.module.register_forward_pre_hook(self._split, with_kwargs=True))
                self._handles.append(writer.module.register_forward_hook(self._join))

    def _prepare(self, writer: Writer) -> _Constants:
        storage = writer.storage
        if _is_swapped(writer, self.mode) and any(p.is_meta for p in writer.module.parameters(recurse=False)):
            raise UnsupportedModelError(
                f"{writer.name} is offloaded, and an edit of it replaces weights, which are loaded anew for every pass. Let it fit into "
                "memory (--max-memory, --quantization bnb_4bit)."
            )
        with align_module_device(writer.module):
            device = getattr(writer.module, storage.weight or storage.bias or "").device
            bias = None if storage.bias is None else getattr(writer.module, storage.bias).detach().float().clone()
            directions = self.directions.float().to(device)
            if writer.gain is not None:
                directions = directions * writer.gain.to(device)
            if self.mode == "none" or _is_swapped(writer, self.mode):
                return _Constants(directions, bias=bias)
            parameter = stored_weight(writer)
            if storage.n_experts is not None:
                norms = torch.stack([torch.linalg.vector_norm(W.float(), dim=-1) for W in storage.matrices(parameter.detach())])
                return _Constants(directions, norms, None, bias)
            weight = dense_weight(writer.module, storage)
            norms = torch.linalg.vector_norm(weight, dim=-1)
            c = row_gram(weight, norms, directions) if self.mode == "full" else None
            return _Constants(directions, norms, c, bias)

    def edit_of(self, writer: Writer, ablation: Ablation) -> tuple[Tensor, float]:
        """The unit direction `(d,)` that `ablation` removes from the writer's output, on the CPU, and the strength."""
        constants = self._constants[self.architecture.writers.index(writer)]
        r, _ = self._direction(writer, constants, ablation)
        return r.cpu(), self._strength(writer, ablation)

    def edits(self, ablation: Ablation) -> Iterator[tuple[Writer, Tensor, float]]:
        """Every writer that `ablation` edits, with the direction `(d,)` and the strength."""
        for writer in self.architecture.writers:
            if self._strength(writer, ablation):  # a learned edit has no direction for other writers
                yield writer, *self.edit_of(writer, ablation)

    def first_layer(self, ablation: Ablation) -> int:
        """The first layer that the ablation edits; the number of layers if it edits none."""
        edited = (writer.layer for writer in self.architecture.writers if self._strength(writer, ablation))
        return min(edited, default=len(self.architecture.layers))

    def _strength(self, writer: Writer, ablation: Ablation) -> float:
        if ablation.learned is not None:
            return ablation.learned.strengths.get(writer.name, 0.0)
        parameters = ablation.parameters.get(writer.component)
        return 0.0 if parameters is None else kernel(writer.layer, parameters, self.architecture.last_layer)

    def _direction(self, writer: Writer, constants: _Constants, ablation: Ablation) -> tuple[Tensor, Tensor | None]:
        """Unit `r (d,)` and its `c (d,)`. Both are interpolated and scaled in the same way, since `c` is linear in `r`."""
        n_layers = len(self.architecture.layers)
        if ablation.learned is not None and writer.name in ablation.learned.directions:
            r = ablation.learned.directions[writer.name].to(constants.directions)
            return r, None if constants.c is None else self._gram(writer, constants, r)
        if ablation.direction_index is None:
            r, c = constants.directions[writer.layer + 1], None if constants.c is None else constants.c[writer.layer + 1]
        else:
            layers = mix_at(ablation.direction_index * (n_layers - 1), n_layers)
            r = mix(constants.directions, layers)
            c = None if constants.c is None else mix(constants.c, layers)
        length = torch.linalg.vector_norm(r).clamp(min=1e-12)
        return r / length, None if c is None else c / length

    @contextmanager
    def active(self, ablations: Sequence[Ablation]) -> Iterator[None]:
        """Context in which the model is edited. With several ablations, `assign_rows` sets which row belongs to which one.

        Raises `ValueError` for several ablations if the model allows only one at a time (`batches_trials`).
        """
        if len(ablations) > 1 and not batches_trials(self.architecture, self.mode):
            raise ValueError("this model takes one ablation at a time")
        self._maps, self._n_trials = self._make_maps(ablations), len(ablations)
        originals = self._swap(ablations[0])
        try:
            yield
        finally:
            for parameter, original in originals:
                parameter.data = original
            self._maps = {}
            self.assign_rows(None)

    def _swap(self, ablation: Ablation) -> list[tuple[Tensor, Tensor]]:
        """Replace the weights of writers that have no output map. Returns the parameters with their original values."""
        originals = []
        for writer in self.architecture.writers:
            strength = self._strength(writer, ablation)
            if strength and _is_swapped(writer, self.mode):
                r, _ = self.edit_of(writer, ablation)
                if writer.storage.weight is not None:
                    parameter = stored_weight(writer)
                    originals.append((parameter, parameter.data))
                    parameter.data = edit_stored(writer.storage, parameter.data, r.to(parameter.device), strength, self.mode)
                if writer.storage.bias is not None:
                    bias = getattr(writer.module, writer.storage.bias)
                    originals.append((bias, bias.data))
                    bias.data = edit_bias(bias.data, r.to(bias.device), strength).to(bias.dtype)
        return originals

    def assign_rows(self, trial_of_row: Sequence[int] | None) -> None:
        """Row `k` of the batches that follow belongs to ablation `trial_of_row[k]`."""
        self._trial_of_row = trial_of_row
        shares = self.is_uniform and self._n_trials > 1
        self._only_trial = trial_of_row[0] if trial_of_row and not shares and len(set(trial_of_row)) == 1 else None
        self._trials.clear()
        self._membership.clear()
        if shares and trial_of_row:
            for device in {constants.directions.device for constants in self._constants}:
                self._membership_for(device, 1)

    def _make_maps(self, ablations: Sequence[Ablation]) -> dict[nn.Module, OutputMap]:
        maps: dict[nn.Module, OutputMap] = {}
        for writer, constants in zip(self.architecture.writers, self._constants, strict=True):
            strengths = [self._strength(writer, ablation) for ablation in ablations]
            if not any(strengths) and not self.is_uniform:
                continue
            if _is_swapped(writer, self.mode):
                continue
            edits = [self._direction(writer, constants, ablation) for ablation in ablations]
            r = torch.stack([direction for direction, _ in edits])
            c = None if constants.c is None else torch.stack([c for _, c in edits if c is not None])
            maps[writer.module] = self._map(writer, constants, r, upload(torch.tensor(strengths, dtype=r.dtype), r.device), c)
        return maps

    def _map(self, writer: Writer, constants: _Constants, r: Tensor, strength: Tensor, c: Tensor | None = None) -> OutputMap:
        """The output map of a writer for unit directions `r (trial, d)` and `strength (trial,)`; `c (trial, d)` if known."""
        if writer.storage.n_experts is not None and self.mode != "none":
            c = self._gram(writer, constants, r) if self.mode == "full" else None
            return output_map(self.mode, strength, r[:, None], constants.norms, c, constants.bias)
        if self.mode == "full" and c is None:
            c = self._gram(writer, constants, r)
        return output_map(self.mode, strength, r, constants.norms, c, None if self.mode == "none" else constants.bias)

    def _gram(self, writer: Writer, constants: _Constants, r: Tensor) -> Tensor:
        """`c` of `r (..., d)`: `(..., d)`, for experts `(trial, expert, d)`. No weight is kept after the call, not even for gradients."""
        assert constants.norms is not None
        norms = constants.norms

        def gram(r: Tensor) -> Tensor:
            with align_module_device(writer.module):
                if writer.storage.n_experts is None:
                    return row_gram(dense_weight(writer.module, writer.storage).to(r.dtype), norms, r)
                weights = writer.storage.matrices(stored_weight(writer).detach())
                return torch.stack([row_gram(W.to(r.dtype), n, r) for W, n in zip(weights, norms, strict=True)], dim=-2)

        def gradient(given: Tensor) -> Tensor:
            if writer.storage.n_experts is None:
                return gram(given)
            with align_module_device(writer.module):
                weights = writer.storage.matrices(stored_weight(writer).detach())
                parts = zip(weights, norms, given.unbind(dim=-2), strict=True)
                return sum((row_gram(W.to(given.dtype), n, own) for W, n, own in parts), torch.zeros_like(given[..., 0, :]))

        result: Tensor = _Symmetric.apply(r, gram, gradient)
        return result

    def maps_of(self, edits: Mapping[str, tuple[Tensor, Tensor]]) -> dict[nn.Module, OutputMap]:
        """Output maps as differentiable functions: by writer, of a unit `r (d,)` and a strength `()`."""
        return {
            writer.module: self._map(writer, constants, r.to(constants.directions.device)[None], s.to(constants.directions.device)[None])
            for writer, constants in zip(self.architecture.writers, self._constants, strict=True)
            if writer.name in edits
            for r, s in [edits[writer.name]]
        }

    def has_map(self, writer: Writer) -> bool:
        """Whether an edit of the writer can be expressed as an output map."""
        return not _is_swapped(writer, self.mode)

    @contextmanager
    def mapping(self, maps: dict[nn.Module, OutputMap]) -> Iterator[None]:
        """Context in which outputs are mapped by these maps, through which gradients flow."""
        self._maps, self._n_trials = maps, 1
        self.assign_rows([0])
        try:
            yield
        finally:
            self._maps = {}
            self.assign_rows(None)

    def _hook(self, module: nn.Module, args: object, output: object) -> object:
        edit = self._maps.get(module)
        if edit is None:
            return None
        result = first_tensor(output)
        if self._only_trial is None:
            edited = apply_output_map(result, edit, self._membership_of(result))
        else:
            edited = apply_output_map(result, edit.of(self._only_trial))
        return with_first_tensor(output, edited)

    def _split(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> tuple[object, dict[str, Tensor]] | None:
        if module not in self._maps:
            return None
        hidden, index, gates = (*args, *kwargs.values())
        self._gates[module] = index, gates
        return as_pairs(hidden, index, gates), {}

    def _join(self, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        edit = self._maps.get(module)
        if edit is None:
            return None
        index, gates = self._gates.pop(module)
        edited = apply_output_map_by_expert(output, edit, self._trial_of_pair(index), index.flatten())
        return (edited.view(*index.shape, -1) * gates[..., None]).sum(dim=1).to(output.dtype)

    def _trial_of_pair(self, index: Tensor) -> Tensor:
        """The trial of each pair of token and expert; `index (token, k)`."""
        if self._n_trials == 1:
            return torch.zeros(index.numel(), dtype=torch.long, device=index.device)
        trials = self._trials_on(index.device)
        return trials.repeat_interleave(index.numel() // len(trials))

    def _trials_on(self, device: torch.device) -> Tensor:
        """The trial of each row, copied to each device once per assignment."""
        if device not in self._trials:
            if self._trial_of_row is None:
                raise ValueError("rows of several ablations must be assigned before a forward pass")
            self._trials[device] = upload(torch.tensor(self._trial_of_row), device)
        return self._trials[device]

    def _membership_of(self, output: Tensor) -> Tensor | None:
        """Membership of every token of an output, computed once per device and pass; None if there is only one ablation."""
        if self._n_trials == 1:
            return None
        return self._membership_for(output.device, output.numel() // (output.shape[-1] * len(self._trials_on(output.device))))

    def _membership_for(self, device: torch.device, n_tokens: int) -> Tensor:
        if (device, n_tokens) not in self._membership:
            membership = trial_membership(self._trials_on(device), self._n_trials)
            self._membership[device, n_tokens] = membership.repeat_interleave(n_tokens, dim=0) if n_tokens > 1 else membership
        return self._membership[device, n_tokens]

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()


class _Symmetric(torch.autograd.Function):
    """A linear function whose gradient is computed by another function, so that nothing is saved for it."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, function: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.gradient = gradient
        return function(r)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        return ctx.gradient(given[0]), None, None


def stored_weight(writer: Writer) -> Tensor:
    """The parameter with a writer's weight."""
    if writer.storage.weight is None:
        raise ValueError(f"{writer.name} has no weight")
    parameter: Tensor = getattr(writer.module, writer.storage.weight)
    return parameter


def dense_weight(module: nn.Module, storage: Storage = LINEAR) -> Tensor:
    """The weight `(d_out, d_in)` of a writer without experts in float32, dequantized if it is stored in 4 bits."""
    weight: Any = getattr(module, storage.weight or "")
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit  # heavy, and only needed for 4-bit models

        return dequantize_4bit(weight.data, state).float()
    return storage.matrices(weight.detach()).float()


def edit_stored(storage: Storage, weight: Tensor, r: Tensor, strength: float, mode: RowNormalization) -> Tensor:
    """A writer's stored weight, edited in float32 (float64 for float64 input) one matrix at a time, each rounded once."""
    edited = torch.empty_like(weight)
    before, after = storage.matrices(weight), storage.matrices(edited)
    if storage.n_experts is None:
        before, after = before[None], after[None]
    for W, target in zip(before, after, strict=True):
        edit_weight(W, r, strength, mode, target)
    return edited
