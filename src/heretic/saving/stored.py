"""A model's stored tensors: found without reading them, read one at a time, written or copied range by range.

The safetensors library can only write files from tensors that are all in memory. Here, a file is written from ranges of another one, and
only changed tensors are in memory. Therefore the format (8 bytes of length, a JSON header, the bytes of all tensors:
https://github.com/huggingface/safetensors) is implemented below. All written files are opened again with the library.
"""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..errors import ModelError
from ..loading.files import files_of_index, plain_names
from ..utils import JsonObject, first_line
from .hashed_file import HashedFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
# What transformers looks for in a model's folder, in this order.
WEIGHT_FILES = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
_CODES = {dtype: code for code, dtype in DTYPES.items()}

Advance = Callable[[int], None]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `dtype` is its safetensors name; `place` is the file and offset of its bytes, if they can be copied.

    A computed tensor (`make`) may be read in a higher precision than the dtype it is stored in.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    place: tuple[Path, int] | None
    make: Callable[[], Tensor] | None = None

    def read(self, rows: slice | None = None) -> Tensor:
        """A copy of the tensor, or of a range of its first axis."""
        if self.place is None:
            assert self.make is not None
            return self.make() if rows is None else self.make()[rows]
        if self.dtype not in DTYPES:
            raise ModelError(f"The tensor {self.name} is stored as {self.dtype}, which heretic cannot read.")
        path, offset = self.place
        shape, n_bytes = self.shape, self.n_bytes
        if rows is not None and shape:
            start, stop, _ = rows.indices(shape[0])
            per_row = n_bytes // max(shape[0], 1)
            offset, n_bytes, shape = offset + start * per_row, (stop - start) * per_row, (stop - start, *shape[1:])
        content = torch.empty(n_bytes, dtype=torch.uint8)
        with path.open("rb") as file:
            file.seek(offset)
            if file.readinto(bytes_of(content)) != n_bytes:
                raise ModelError(f"{path} is shorter than its header says (tensor {self.name}). Download the file again.")
        return content.view(DTYPES[self.dtype]).reshape(shape)

    def round(self, value: Tensor) -> Tensor:
        """A value of this tensor, rounded to its stored dtype."""
        return value.to(DTYPES[self.dtype])


@dataclass(frozen=True)
class Shard:
    """A file of tensors to write, in order. `header` is that of the original file if its layout is kept byte for byte."""

    name: str
    tensors: tuple[StoredTensor, ...]
    header: bytes | None = None


@dataclass(frozen=True)
class StoredModel:
    """The stored tensors of a model, and their files. `index` is the content of the index file, if there is one."""

    shards: tuple[Shard, ...]
    files: frozenset[str]
    index: bytes | None

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def n_bytes(self) -> int:
        """Total size of all tensors in bytes."""
        return sum(tensor.n_bytes for shard in self.shards for tensor in shard.tensors)


def open_stored(folder: Path, weights: str | None = None, tied: Collection[str] = ()) -> StoredModel:
    """The tensors of a model folder, in the files that transformers would read (`weights`: a file named by the configuration).

    Pickled files may contain a tensor under several names; those in `tied`, which transformers copies from others, are left out.
    Raises `ModelError` if there are no files, if one is missing or damaged, or if pickled files contain other objects than tensors.
    """
    names = WEIGHT_FILES if weights is None else plain_names([weights], "The model's configuration (transformers_weights)")
    found = next((name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ModelError(f"The model's folder contains no weights: none of {', '.join(names)} exists.")
    if not found.endswith(".index.json"):
        files, index = [found], None
    else:
        index = (folder / found).read_bytes()
        files = files_of_index(folder / found, index)
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ModelError(f"The file {missing[0]} of the model is missing, but listed in {found}. Download the model again.")
    if found in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        shards = _pickled_shards(folder, files, tied)
        index = None if index is None else make_index(shards)
    else:
        shards = [_safetensors_shard(folder / name, name) for name in files]
    return StoredModel(tuple(shards), frozenset([found, *files]), index)


def make_index(shards: Sequence[Shard]) -> bytes:
    """The content of the index file of these shards."""
    n_bytes = sum(tensor.n_bytes for shard in shards for tensor in shard.tensors)
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    return (json.dumps({"metadata": {"total_size": n_bytes}, "weight_map": weight_map}, indent=2) + "\n").encode()


def _safetensors_shard(path: Path, name: str) -> Shard:
    header, start = read_header(path)
    try:
        with safe_open(path, "pt"):  # the library checks names, shapes and offsets against each other and the file size
            pass
        entries = json.loads(header)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} does not match its header: it is damaged or incomplete. Download the file again.") from error
    entries.pop("__metadata__", None)
    tensors = [
        StoredTensor(key, e["dtype"], tuple(e["shape"]), e["data_offsets"][1] - e["data_offsets"][0], (path, start + e["data_offsets"][0]))
        for key, e in sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    ]
    return Shard(name, tuple(tensors), header)


def read_header(path: Path) -> tuple[bytes, int]:
    """The JSON header of a safetensors file, and the offset of its data. Raises `ModelError` if it is not one."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= 100_000_000 else b""  # the library's own limit
    if len(header) != length or not header.startswith(b"{"):
        raise ModelError(f"{path} is not a safetensors file: it is damaged, or a pointer to a file that was not downloaded.")
    return header, 8 + length


def _pickled_shards(folder: Path, files: Sequence[str], tied: Collection[str]) -> list[Shard]:
    """Shards of pickled files, to be written as safetensors. The files are memory-mapped, and only tensors are unpickled."""
    shards = []
    for name in files:
        try:
            content = torch.load(folder / name, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # pickle fails in many ways
            reason = first_line(error)
            raise ModelError(f"{folder / name} cannot be read as a tensor file: {reason}") from error
        if other := next((key for key, value in content.items() if not isinstance(value, Tensor)), None):
            raise ModelError(f"{folder / name} does not only contain tensors: {other} is a {type(content[other]).__name__}.")
        own = {_identity(value) for key, value in content.items() if key not in tied}
        tensors = [
            computed_tensor(key, value.dtype, value.shape, value.contiguous)
            for key, value in content.items()
            if key not in tied or _identity(value) not in own
        ]
        # pytorch_model-00001-of-00002.bin becomes model-00001-of-00002.safetensors
        shards.append(Shard(name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors", tuple(tensors)))
    return shards


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def resharded(stored: StoredModel, max_shard_size: str | int) -> StoredModel:
    """The same tensors in files of at most a given size, with the usual names."""
    tensors = stored.tensors
    split = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda t: t.n_bytes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    shards = tuple(Shard(file, tuple(tensors[name] for name in names)) for file, names in split.filename_to_tensors.items())
    return StoredModel(shards, stored.files, make_index(shards) if split.is_sharded else None)


def write_stored(
    stored: StoredModel, folder: Path, changed: Callable[[str], Tensor | None], advance: Advance = lambda n: None
) -> dict[str, str]:
    """Write the model's files, with tensors replaced by what `changed` returns (None: unchanged). Returns the SHA-256 of each file.

    At most two tensors and `BACKLOG` bytes of a file are in memory, and a file is flushed before the next but one is started. A changed
    tensor has the dtype and shape of the stored one. `advance` is called with the number of tensors written.
    """
    hashes: dict[str, str] = {}
    before: tuple[str, HashedFile] | None = None
    for shard in stored.shards:
        file = _write_shard(shard, folder / shard.name, changed, advance)
        if before is not None:
            hashes[before[0]] = before[1].sha256()
        before = shard.name, file
    if before is not None:
        hashes[before[0]] = before[1].sha256()
    if stored.index is not None:
        path = folder / SAFE_WEIGHTS_INDEX_NAME
        path.write_bytes(stored.index)
        hashes[path.name] = hashlib.sha256(stored.index).hexdigest()
    return hashes


def _write_shard(shard: Shard, path: Path, changed: Callable[[str], Tensor | None], advance: Advance) -> "HashedFile":
    header = shard.header or make_header(shard.tensors)
    with HashedFile(path) as target:
        target.write(len(header).to_bytes(8, "little") + header)
        for stored in shard.tensors:
            advance(1)
            tensor = changed(stored.name)
            if tensor is None and stored.place is not None:
                target.copy(*stored.place, stored.n_bytes)
                continue
            tensor = stored.round(stored.read()) if tensor is None else tensor
            if _CODES.get(tensor.dtype) != stored.dtype or tuple(tensor.shape) != stored.shape:
                raise ValueError(f"{stored.name} is {stored.dtype} {stored.shape}, not {tensor.dtype} {tuple(tensor.shape)}")
            target.write(bytes_of(tensor))
    return target


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy if it is contiguous."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def make_header(tensors: Sequence[StoredTensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The header of a file with these tensors in this order."""
    entries: JsonObject = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, offset + tensor.n_bytes]}
        offset += tensor.n_bytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)  # so that tensors are aligned


def computed_tensor(name: str, dtype: torch.dtype, shape: Sequence[int], make: Callable[[], Tensor]) -> StoredTensor:
    """A tensor that is computed from others when it is read."""
    return StoredTensor(name, _CODES[dtype], tuple(shape), math.prod(shape) * dtype.itemsize, None, make)
