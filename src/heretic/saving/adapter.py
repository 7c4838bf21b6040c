"""Export as a PEFT adapter, which is used together with the original's weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..editing.ablation import RowNormalization, adapter_factors
from ..editing.architecture import Storage
from ..errors import ExportError
from ..loading.source import ModelSource
from ..privacy import public_model_name
from ..utils import JsonObject, Progress
from .edits import Edit
from .original import Original


def save_adapter(
    original: Original, edits: Sequence[Edit], mode: RowNormalization, rank: int, folder: Path, progress: Progress
) -> JsonObject:
    """An adapter in PEFT's format: exact at rank 1 in modes `none` and `pre`, in mode `full` as close as its rank allows.

    Returns its rank, and the mean and maximum relative error of the weight changes (Frobenius norm).
    """
    rank = rank if mode == "full" else 1
    unsaid = [edit.module for edit in edits if not _peft_can_hold(original.placements.model.get_submodule(edit.module), edit.storage)]
    if unsaid:
        raise ExportError(
            f"An adapter cannot represent the edits of these experts ({unsaid[0]} and {len(unsaid) - 1} more). Save a merged model: "
            "--export-strategy merge."
        )
    biased = [edit.module for edit in edits if edit.bias is not None]
    edits = [edit for edit in edits if edit.weight is not None]
    tensors, errors = _factors(original, edits, mode, rank, progress)
    mean, largest = sum(errors) / max(len(errors), 1), max(errors, default=0.0)
    if mode == "full":
        progress.message(
            f"Adapter of rank {rank}: its error is {mean:.1%} of the weight change on average, {largest:.1%} at most (Frobenius "
            "norm). A higher --full-normalization-lora-rank reduces it; a merged model is exact."
        )
    if biased:
        progress.warning(
            f"An adapter cannot change biases; those of {len(biased)} modules are not edited ({', '.join(biased[:3])}, ...). "
            "In a merged model they are."
        )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_config(original.source, edits, rank, folder, progress)
    return {"rank": rank, "mean_relative_error": mean, "max_relative_error": largest, "biases_left": len(biased)}


def _factors(
    original: Original, edits: Sequence[Edit], mode: RowNormalization, rank: int, progress: Progress
) -> tuple[dict[str, Tensor], list[float]]:
    """The adapter's tensors by name, and the share of its change that each of them misses."""
    tensors: dict[str, Tensor] = {}
    errors: list[float] = []
    with progress.task("Computing the adapter", len(edits)) as advance:
        for edit in edits:
            weights = edit.storage.matrices(original.read(edit.weight or ""))
            factors = [
                adapter_factors(weight, edit.direction, edit.strength, mode, rank)
                for weight in (weights[None] if edit.storage.n_experts is None else weights)
            ]
            # PEFT's layout for experts: A's rows are ordered by expert, B's columns by rank. For a single matrix this makes no difference.
            A = torch.cat([A for A, _, _ in factors])
            B = torch.stack([B for _, B, _ in factors], dim=2).flatten(1)
            tensors[f"base_model.model.{edit.module}.lora_A.weight"] = A.contiguous()
            tensors[f"base_model.model.{edit.module}.lora_B.weight"] = B.contiguous()
            errors += [error for _, _, error in factors]
            advance(1)
    return tensors, errors


def _write_config(source: ModelSource, edits: Sequence[Edit], rank: int, folder: Path, progress: Progress) -> None:
    from peft import LoraConfig, TaskType  # takes seconds to import

    if source.is_local:
        progress.message(
            f"adapter_config.json contains only the folder name of the original, {public_model_name(source)!r}, not its path. If the "
            "original is on the hub, set base_model_name_or_path to its id, or load it yourself and pass it to PeftModel."
        )
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        # GPT-2's weights are stored transposed.
        fan_in_fan_out=any(edit.storage.axis == 1 and edit.storage.n_experts is None for edit in edits),
        target_modules=[edit.module for edit in edits if edit.storage.n_experts is None],
        target_parameters=[f"{edit.module}.{edit.storage.weight}" for edit in edits if edit.storage.n_experts is not None] or None,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=public_model_name(source),
        revision=source.revision,
        inference_mode=True,
    ).save_pretrained(str(folder))


def _peft_can_hold(module: nn.Module, storage: Storage) -> bool:
    """PEFT treats a three-dimensional parameter as `(expert, out, in)`, unless the module says that it is stored transposed."""
    if storage.n_experts is None or storage.weight is None:
        return True
    transposed = bool(getattr(module, "is_transposed", False))
    return getattr(module, storage.weight).dim() == 3 and storage.n_experts > 1 and transposed == (storage.axis == 2)
