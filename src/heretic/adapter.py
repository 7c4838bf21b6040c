"""An adapter in PEFT's format, for those who keep the original's weights beside it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .ablation import adapter_factors
from .architecture import Writer
from .errors import ExportError
from .model import Model
from .record import Result
from .utils import Progress


def save_adapter(model: Model, result: Result, original: Any, folder: Path, progress: Progress) -> None:
    """An adapter in PEFT's format: exact at rank 1 in modes `none` and `pre`, in mode `full` as close as its rank allows."""
    from peft import LoraConfig, TaskType

    mode, source = result.settings.row_normalization, model.loaded.source
    rank = result.settings.full_normalization_lora_rank if mode == "full" else 1
    tensors: dict[str, Tensor] = {}
    errors: list[float] = []
    edits = list(model.edits(result.ablation))
    unsaid = [writer.name for writer, _, _ in edits if not _peft_can_hold(writer)]
    if unsaid:
        raise ExportError(
            f"An adapter cannot hold the edits of these experts ({unsaid[0]} and {len(unsaid) - 1} more). Save a merged model: "
            "--export-strategy merge."
        )
    biased = [writer.name for writer, _, _ in edits if writer.storage.bias is not None]
    edits = [(writer, r, strength) for writer, r, strength in edits if writer.storage.weight is not None]
    with progress.task("Computing the adapter", len(edits)) as advance:
        for writer, r, strength in edits:
            weights = writer.storage.matrices(getattr(original.get_submodule(writer.name), writer.storage.weight or ""))
            factors = [
                adapter_factors(weight, r, strength, mode, rank)
                for weight in (weights[None] if writer.storage.n_experts is None else weights)
            ]
            # PEFT's layout for experts: A's rows expert by expert, B's columns rank by rank. For one matrix both are as usual.
            A = torch.cat([A for A, _, _ in factors])
            B = torch.stack([B for _, B, _ in factors], dim=2).flatten(1)
            tensors[f"base_model.model.{writer.name}.lora_A.weight"] = A.contiguous()
            tensors[f"base_model.model.{writer.name}.lora_B.weight"] = B.contiguous()
            errors += [error for _, _, error in factors]
            advance(1)
    if mode == "full":
        mean = sum(errors) / max(len(errors), 1)
        progress.message(
            f"Adapter of rank {rank}: it misses {mean:.1%} of the change on average, {max(errors, default=0):.1%} at most (Frobenius "
            "norm). A higher --full-normalization-lora-rank is closer; a merged model is exact."
        )
    if biased:
        progress.warning(
            f"An adapter carries no biases; those of {len(biased)} modules keep the direction ({', '.join(biased[:3])}, ...). "
            "A merged model has them edited."
        )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(
            writer.storage.axis == 1 and writer.storage.n_experts is None for writer, _, _ in edits
        ),  # GPT-2's weights are stored transposed
        target_modules=[writer.name for writer, _, _ in edits if writer.storage.n_experts is None],
        target_parameters=[f"{writer.name}.{writer.storage.weight}" for writer, _, _ in edits if writer.storage.n_experts is not None]
        or None,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=str(Path(source.path).absolute()) if Path(source.path).is_dir() else source.path,
        revision=source.revision,
        inference_mode=True,
    ).save_pretrained(str(folder))


def _peft_can_hold(writer: Writer) -> bool:
    """PEFT takes a parameter of three axes as `(expert, out, in)`, unless the module says that it is stored transposed."""
    storage = writer.storage
    if storage.n_experts is None or storage.weight is None:
        return True
    transposed = bool(getattr(writer.module, "is_transposed", False))
    return getattr(writer.module, storage.weight).dim() == 3 and storage.n_experts > 1 and transposed == (storage.axis == 2)
