"""Which stored tensors contain each parameter of a model.

Names and layouts in files may differ from those in the loaded model: prefixes, renamed modules, one tensor per expert instead of one for
all, transposed weights. Transformers has a list of conversions, which it applies to the names in the files. The same is done here on names
alone, with a model on the meta device (`skeleton`), so every parameter's stored tensors are known before anything is read. The reverse
conversions, which transformers uses for saving, convert an edited parameter back.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..errors import ExportError
from ..loading.load import auto_class
from ..loading.source import ModelSource
from .stored import StoredTensor


@dataclass(frozen=True)
class Piece:
    """Stored tensors that contain a parameter (`index` None), or one slice of its first axis.

    Without a `converter`, the parameter is a single stored tensor. `sources` has, for each stored tensor, its name in the file, its name
    before conversion, and the pattern of the converter that it matched.
    """

    parameter: str
    sources: tuple[tuple[str, str, str | None], ...]
    converter: WeightConverter | None = None
    index: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The stored tensors' names."""
        return tuple(name for name, *_ in self.sources)


@dataclass(frozen=True)
class Placement:
    """A parameter of the model and all its stored copies, each in one or several pieces."""

    parameter: str
    pieces: tuple[Piece, ...]


def skeleton(source: ModelSource, config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: its modules, names and shapes."""
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=source.trust_remote_code)


class Placements:
    """Finds parameters in files with tensors of the given names. `model` is a `skeleton`."""

    def __init__(self, model: PreTrainedModel, tensors: dict[str, StoredTensor]) -> None:
        self.model = model
        self.tensors = tensors
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._aliases: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._aliases.setdefault(id(parameter), []).append(name)
        self._found: dict[str, tuple[WeightConverter | None, list[tuple[str, str, str | None]]]] = {}
        self._resolve_names()

    def _resolve_names(self) -> None:
        """Like `convert_and_load_state_dict_in_model` of transformers, with names instead of tensors."""
        conversions = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, state = self.model.base_model_prefix, self.model.state_dict()
        for name in sorted(self.tensors, key=dot_natural_key):
            plain, _ = rename_source_key(name, renamings, [])
            parameter, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if parameter not in state and name in state:
                parameter, pattern = rename_source_key(name, [], [], prefix, state)
                plain = name
            if parameter not in state:
                continue
            converter = None if pattern is None else converter_of[pattern]
            for target in _targets(parameter, converter):
                self._found.setdefault(target, (converter, []))[1].append((name, plain, pattern))

    def known(self) -> set[str]:
        """Names of all stored tensors that belong to a parameter."""
        return {name for _, sources in self._found.values() for name, *_ in sources}

    def place(self, parameter: str) -> Placement:
        """The placement of a parameter. Raises `ExportError` if it is not found, or if its shape does not fit."""
        value = self.model.get_parameter(parameter)
        pieces: list[Piece] = []
        for alias in self._aliases[id(value)]:
            converter, sources = self._found.get(alias, (None, []))
            if not sources:
                continue
            if converter is None:
                pieces += [Piece(alias, (source,)) for source in sources]
            elif isinstance(converter.operations[0], MergeModulelist) and len(converter.source_patterns) == 1:
                pieces += [Piece(alias, (source,), converter, i) for i, source in enumerate(sources)]
            else:
                pieces.append(Piece(alias, tuple(sources), converter))
        if not pieces:
            raise ExportError(
                f"{parameter} was not found in the model's files, so its edit cannot be saved. Their tensors include "
                f"{', '.join(sorted(self.tensors)[:3])}. Nothing was written; the study is safe."
            )
        placement = Placement(parameter, tuple(pieces))
        self._check_shapes(placement)
        return placement

    def _check_shapes(self, placement: Placement) -> None:
        shape = self._shapes[placement.parameter]
        slices = [piece for piece in placement.pieces if piece.index is not None]
        wanted = (1, *shape[1:]) if slices else shape
        if len(slices) % max(shape[0], 1):
            self._refuse(placement.parameter, f"{len(slices)} tensors, not {shape[0]}")
        for piece in placement.pieces:
            if piece.converter is None:
                found = self.tensors[piece.names[0]].shape
            else:
                # Conversions are tried on the meta device.
                empty = [torch.empty(self.tensors[name].shape, device="meta") for name in piece.names]
                found = tuple(self._convert(piece, empty)[piece.parameter].shape)
            if found != wanted:
                self._refuse(placement.parameter, f"the shape {found}, not {wanted}")

    def _refuse(self, parameter: str, what: str) -> None:
        raise ExportError(
            f"{parameter} is stored as {what}: the files do not fit the model, so its edit cannot be saved. Nothing was written; the study "
            "is safe."
        )

    def read(self, piece: Piece) -> Tensor:
        """The piece in the loaded model's layout."""
        tensors = [self.tensors[name].read() for name in piece.names]
        return tensors[0] if piece.converter is None else self._convert(piece, tensors)[piece.parameter]

    def stored(self, piece: Piece, value: Tensor) -> dict[str, Tensor]:
        """`value`, a piece in the loaded model's layout, converted to stored tensors by name."""
        if piece.converter is None:
            return {piece.names[0]: value}
        targets = {piece.parameter: value}
        if len(piece.converter.target_patterns) > 1:
            targets = {**self._convert(piece, [self.tensors[name].read() for name in piece.names]), **targets}
        reverse: Any = piece.converter.reverse_transform()
        first = _targets(piece.parameter, None)[0]
        for name, tensor in targets.items():
            pattern = next(p for p in reverse.source_patterns if p.replace("\\", "") in name or len(reverse.source_patterns) == 1)
            reverse.add_tensor(first, name, pattern, tensor)
        renamed, _ = reverse.rename_source_key(first)
        converted = {name: _single(tensor) for name, tensor in reverse.convert(renamed, model=self.model, config=self.model.config).items()}
        if piece.index is not None or len(piece.names) == 1:
            (tensor,) = converted.values()
            return {piece.names[0]: tensor}
        return {name: _by_suffix(plain, converted) for name, plain, _ in piece.sources}

    def _convert(self, piece: Piece, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        converter = deepcopy(piece.converter)
        assert converter is not None
        for (name, _, pattern), tensor in zip(piece.sources, tensors, strict=True):
            assert pattern is not None
            converter.add_tensor(piece.parameter, name, pattern, tensor)  # type: ignore[arg-type]
        first = _targets(piece.parameter, converter)[0]
        result = converter.convert(first, model=self.model, config=self.model.config)
        return {name: _single(tensor) for name, tensor in result.items()}


def _targets(parameter: str, converter: WeightConverter | None) -> list[str]:
    """All parameters that the conversion of a given target name fills, whichever of them is given."""
    if converter is None:
        return [parameter]
    here = next((pattern for pattern in converter.target_patterns if pattern in parameter), None)
    if here is None:
        return [parameter]
    return [parameter.replace(here, pattern, 1) for pattern in converter.target_patterns]


def _by_suffix(plain: str, converted: dict[str, Tensor]) -> Tensor:
    """The tensor of a name, with or without the prefix of the base model."""
    return next(t for name, t in converted.items() if name == plain or name.endswith(f".{plain}") or plain.endswith(f".{name}"))


def _single(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
