"""The edits of a trial as data: parameter, direction and strength. An export needs nothing else.

They are stored next to `heretic.json` with the directions of all layers (`DIRECTIONS`, in safetensors format; its suffix differs because
programs that load all `.safetensors` files of a folder would take it for a part of the model). With them, exactly the same model can be
rebuilt from its original without prompts, search or accelerator.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..editing.ablation import Ablation
from ..editing.architecture import Storage
from ..errors import ExportError
from ..model import Model


@dataclass(frozen=True)
class Edit:
    """The edit of one module: the unit `direction (d,)`, float32 on the CPU, is removed from its output with `strength`."""

    module: str
    storage: Storage
    direction: Tensor
    strength: float

    @property
    def weight(self) -> str | None:
        """The name of the module's weight parameter."""
        return None if self.storage.weight is None else f"{self.module}.{self.storage.weight}"

    @property
    def bias(self) -> str | None:
        """The name of the module's bias parameter."""
        return None if self.storage.bias is None else f"{self.module}.{self.storage.bias}"


def _fits(storage: Storage, shape: Sequence[int], size: int) -> bool:
    """Whether a weight of this shape can have this layout, with `size` outputs."""
    n_dim, axis, n_experts = len(shape), storage.axis, storage.n_experts
    if not 0 <= axis < n_dim or shape[axis] != size:
        return False
    if n_experts is None:
        return n_dim == 2
    if n_dim == 2:
        return n_experts > 0 and shape[1 - axis] % n_experts == 0
    return n_dim == 3 and axis > 0 and shape[0] == n_experts


class _StoredEdit(BaseModel):
    """An edit in the file's table, with its direction as a row index."""

    model_config = ConfigDict(extra="forbid", strict=True)

    module: str
    storage: Storage
    direction: NonNegativeInt
    strength: FiniteFloat


_TABLE = TypeAdapter(list[_StoredEdit])


def edits_of(model: Model, ablation: Ablation) -> list[Edit]:
    """The edits of a trial, in the order in which the modules run."""
    return [Edit(writer.name, writer.storage, r.detach().float().cpu(), strength) for writer, r, strength in model.edits(ablation)]


def save_edits(edits: Sequence[Edit], directions: Tensor, path: Path) -> None:
    """Write edits and the directions `(layer + 1, d)` they come from. A direction shared by several edits is stored once."""
    rows: dict[bytes, int] = {}
    table = []
    for edit in edits:
        row = rows.setdefault(edit.direction.numpy().tobytes(), len(rows))
        table.append({"module": edit.module, "storage": asdict(edit.storage), "direction": row, "strength": edit.strength})
    distinct = [torch.frombuffer(bytearray(row), dtype=torch.float32) for row in rows]
    size = directions.shape[-1]
    tensors = {
        "directions": directions.detach().float().cpu().contiguous(),
        "edit_directions": torch.stack(distinct) if distinct else torch.empty(0, size),
    }
    save_file(tensors, path, metadata={"edits": json.dumps(table)})  # a single entry, since the order of several would vary


def load_edits(path: Path) -> list[Edit]:
    """Read what `save_edits` wrote. Raises `ExportError` if the file is missing or invalid."""
    try:
        with safe_open(path, "pt") as file:
            table = _TABLE.validate_json(file.metadata()["edits"])
            directions = file.get_tensor("edit_directions")
        if directions.dim() != 2 or directions.dtype != torch.float32 or not directions.isfinite().all():
            raise ValueError("its directions are not a matrix of finite numbers")
        return [Edit(entry.module, entry.storage, directions[entry.direction], entry.strength) for entry in table]
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing. It contains the directions and was saved next to heretic.json.") from error
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def check_edits(edits: Sequence[Edit], shapes: Mapping[str, Sequence[int]], path: Path) -> None:
    """Raise `ExportError` if edits from a file do not fit a model with parameters of these shapes."""
    for edit in edits:
        size, storage = edit.direction.shape[0], edit.storage
        for name in (edit.weight, edit.bias):
            if name is not None and name not in shapes:
                raise ExportError(f"{path} does not fit the model: it has no parameter {name}.")
        if edit.weight is not None and not _fits(storage, shapes[edit.weight], size):
            raise ExportError(f"{path} does not fit the model: {edit.weight} has the shape {tuple(shapes[edit.weight])}.")
        if edit.bias is not None and shapes[edit.bias][-1:] != (size,):
            raise ExportError(f"{path} does not fit the model: {edit.bias} has the shape {tuple(shapes[edit.bias])}.")
