"""The edits that a trial stands for as data: which parameter, which direction, how strong. All that an export needs to know.

They are stored beside `heretic.json` with the directions of all layers (`DIRECTIONS_FILE`, in safetensors' format: the usual suffix would
have programs that read every such file of a folder take it for a part of the model). With them a model is made again from its
original without prompts, a search or an accelerator, and by the same numbers.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..editing.ablation import Ablation
from ..editing.architecture import Storage
from ..errors import ExportError
from ..model import Model

DIRECTIONS_FILE = "heretic.directions"


@dataclass(frozen=True)
class Edit:
    """What is done to one module: the unit `direction (d,)`, float32 on the CPU, leaves its output with a strength."""

    module: str
    storage: Storage
    direction: Tensor
    strength: float

    @property
    def weight(self) -> str | None:
        """The name of the parameter that is the module's weight."""
        return None if self.storage.weight is None else f"{self.module}.{self.storage.weight}"

    @property
    def bias(self) -> str | None:
        """The name of the parameter that is the module's bias."""
        return None if self.storage.bias is None else f"{self.module}.{self.storage.bias}"


def edits_of(model: Model, ablation: Ablation) -> list[Edit]:
    """The edits of a trial, in the order in which the modules run."""
    return [Edit(writer.name, writer.storage, r.detach().float().cpu(), strength) for writer, r, strength in model.edits(ablation)]


def save_edits(edits: Sequence[Edit], directions: Tensor, path: Path) -> None:
    """Write edits and the directions `(layer + 1, d)` that they come from. A direction that several edits share is stored once."""
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
    save_file(tensors, path, metadata={"edits": json.dumps(table)})  # one entry, since their order would vary


def load_edits(path: Path) -> list[Edit]:
    """What `save_edits` wrote. Raises `ExportError` where the file is missing or is another."""
    try:
        with safe_open(path, "pt") as file:
            table: list[dict[str, Any]] = json.loads(file.metadata()["edits"])
            directions = file.get_tensor("edit_directions")
        return [Edit(e["module"], Storage(**e["storage"]), directions[e["direction"]], e["strength"]) for e in table]
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing. It holds the directions; it was saved beside heretic.json.") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
