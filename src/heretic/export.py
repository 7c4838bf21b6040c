"""What a run leaves: a model folder or an adapter, with card and record, on disk or on the hub.

The edit is computed exactly in float32 from the original weights, read again from their source, and rounded once to their own
number format, whatever format or quantization the search used.
"""

import contextlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the base of all its HTTP client raises
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers.utils import FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from . import __version__
from .ablation import Ablation, adapter_factors, edit_bias
from .answers import check_target
from .architecture import Writer
from .config import PromptSpecification, Settings
from .editing import edit_stored
from .errors import ExportError
from .loading import LoadedModel, auto_class
from .model import Model
from .source import dataset_commit
from .utils import Progress

Strategy = Literal["merge", "adapter"]

PROCESSOR_FILES = (PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, VIDEO_PROCESSOR_NAME)
LIBRARIES = ("torch", "transformers", "accelerate", "optuna", "peft", "bitsandbytes", "huggingface-hub")


@dataclass(frozen=True)
class Result:
    """A trial that was chosen, with everything its record says."""

    settings: Settings
    trial_number: int
    ablation: Ablation
    refusals: int
    kl_divergence: float
    base_refusals: int
    n_bad_prompts: int
    response_prefix: str

    @property
    def scores(self) -> dict[str, Any]:
        """As `heretic.json` holds them."""
        return {
            "refusals": self.refusals,
            "n_bad_prompts": self.n_bad_prompts,
            "base_refusals": self.base_refusals,
            "kl_divergence": self.kl_divergence,
        }


def save(model: Model, result: Result, strategy: Strategy, directory: str, overwrite: bool, progress: Progress) -> Path:
    """Write the model or adapter to a temporary folder beside the target, and rename it when it is complete.

    Raises `ExportError` where the target must not be replaced or cannot be written; then nothing is left behind.
    """
    target = check_target(directory, overwrite)
    original = _read_original(model.loaded, progress)
    with _file_errors(target):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.absolute().parent) as temporary:
            folder = Path(temporary) / target.name
            folder.mkdir()
            _write(model, result, strategy, original, folder, progress)
            _put_in_place(folder, target, Path(temporary) / "replaced")
    return target


def _put_in_place(folder: Path, target: Path, replaced: Path) -> None:
    """Move `folder` to `target`; what was there goes to `replaced`, and back again where that fails."""
    if not target.exists():
        folder.rename(target)
        return
    target.rename(replaced)
    try:
        folder.rename(target)
    except OSError:
        replaced.rename(target)
        raise


@contextlib.contextmanager
def _file_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports a full disk as its own error type, with the system's message inside.
        if isinstance(error, SafetensorError) and "os error" not in str(error).lower():
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ExportError(
            f"{target} cannot be written: {reason}. Nothing was left there; the study is safe. Free space or choose another "
            "--save-directory, then save again."
        ) from error


def _read_original(loaded: LoadedModel, progress: Progress) -> Any:
    """The model as it is stored: in its own number format, on the CPU, whatever the search used."""
    source = loaded.source
    try:
        with progress.task("Reading the original weights"):
            original = auto_class(loaded.config).from_pretrained(source.path, dtype="auto", device_map="cpu", **source.arguments)
    except (OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"The weights of {source.name} cannot be read again: {reason} The study is safe.") from error
    return original.requires_grad_(False)


def _write(model: Model, result: Result, strategy: Strategy, original: Any, folder: Path, progress: Progress) -> None:
    """Edit `original`, a fresh copy, in place, and write it or its adapter with all that belongs to it."""
    source = model.loaded.source
    if strategy == "merge":
        _merge(model, result, original, progress)
        with progress.task("Writing the model"):
            _save_model(model, original, folder, result.settings.max_shard_size)
    else:
        _save_adapter(model, result, original, folder, progress)
    # The tokenizer anew: ours pads on the left.
    AutoTokenizer.from_pretrained(source.path, **source.arguments).save_pretrained(folder)
    (folder / "README.md").write_text(model_card(model, result, strategy), encoding="utf-8")
    (folder / "heretic.json").write_text(json.dumps(record(model, result, strategy), indent=2) + "\n", encoding="utf-8")
    _share(folder)


def _share(folder: Path) -> None:
    """Give every file the permissions that new files usually have: safetensors writes its own for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _edits(model: Model, ablation: Ablation) -> Iterator[tuple[Writer, Tensor, float]]:
    if model.hooks is None:
        raise ValueError("call use_directions first")
    for writer in model.architecture.writers:
        r, strength = model.hooks.edit_of(writer, ablation)
        if strength:
            yield writer, r, strength


def _merge(model: Model, result: Result, original: Any, progress: Progress) -> None:
    """Edit the weights of `original`, a fresh copy, in place."""
    mode = result.settings.row_normalization
    edits = list(_edits(model, result.ablation))
    with progress.task("Editing weights", len(edits)) as advance:
        for writer, r, strength in edits:
            module = original.get_submodule(writer.name)
            if writer.storage.weight is not None:
                weight = getattr(module, writer.storage.weight)
                weight.copy_(edit_stored(writer.storage, weight, r, strength, mode))
            if writer.storage.bias is not None:
                bias = getattr(module, writer.storage.bias)
                bias.copy_(edit_bias(bias, r, strength))
            advance(1)


def _save_model(model: Model, original: Any, folder: Path, max_shard_size: str | int) -> None:
    source = model.loaded.source
    original.generation_config = GenerationConfig()  # saving would reject unusual values
    original.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # The files themselves: a processor need not be loadable here, where the library for its images may be missing.
    for name in ("generation_config.json", *(PROCESSOR_FILES if auto_class(model.loaded.config) is AutoModelForImageTextToText else ())):
        file = cached_file(source.path, name, revision=source.revision, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            shutil.copyfile(file, folder / name)


def _save_adapter(model: Model, result: Result, original: Any, folder: Path, progress: Progress) -> None:
    """An adapter in PEFT's format: exact at rank 1 in modes `none` and `pre`, in mode `full` as close as its rank allows."""
    from peft import LoraConfig, TaskType

    mode, source = result.settings.row_normalization, model.loaded.source
    rank = result.settings.full_normalization_lora_rank if mode == "full" else 1
    tensors: dict[str, Tensor] = {}
    errors: list[float] = []
    edits = list(_edits(model, result.ablation))
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


def _prompt_source(specification: PromptSpecification) -> dict[str, Any]:
    """A source of prompts with the commit that was read, where it came from the hub."""
    commit = dataset_commit(specification.dataset, specification.commit)
    return specification.model_dump(exclude_none=True) | ({} if commit is None else {"commit": commit})


def record(model: Model, result: Result, strategy: Strategy) -> dict[str, Any]:
    """`heretic.json`: what was done to what, with which versions, and what came of it."""
    settings, loaded = result.settings, model.loaded
    sources = ("good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts")
    return {
        "program": {"name": "heretic-llm", "version": __version__},
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "model": {
            "name": loaded.source.name,
            "commit": loaded.source.revision,
            "type": loaded.config.model_type,
            "search_dtype": str(loaded.dtype).removeprefix("torch."),
        },
        "prompts": {name: _prompt_source(getattr(settings, name)) for name in sources},
        "settings": settings.model_dump(mode="json"),
        "export_strategy": strategy,
        "response_prefix": result.response_prefix,
        "trial": {
            "number": result.trial_number,
            "direction_index": result.ablation.direction_index,
            "parameters": {name: asdict(p) for name, p in result.ablation.parameters.items()},
            "n_layers": len(model.architecture.layers),
            "modules": model.architecture.components,
        },
        "scores": result.scores,
    }


def model_card(model: Model, result: Result, strategy: Strategy) -> str:
    """The README of a saved model: what was done, what was measured, and what that means for whoever uses it."""
    source, settings, scores = model.loaded.source, result.settings, result.scores
    on_hub = not Path(source.path).is_dir()  # the hub refuses a card that names anything else
    relation = "finetune" if strategy == "merge" else "adapter"
    front_matter = ["---", f"library_name: {'transformers' if strategy == 'merge' else 'peft'}"]
    if on_hub:
        front_matter += [f"base_model: {source.name}", f"base_model_relation: {relation}"]
    front_matter += ["tags:", "- heretic", "- abliterated", "- decensored", "---"]
    index = result.ablation.direction_index
    rows = [("direction", "each layer's own" if index is None else f"one for all layers, index {index:.4f} of the last layer")]
    for name, p in result.ablation.parameters.items():
        rows += [(f"{name}.{field}", f"{value:.4f}") for field, value in asdict(p).items()]
    parameters = "\n".join(f"| {name} | {value} |" for name, value in rows)
    modules = " and ".join(f"{count} `{name}` modules" for name, count in model.architecture.components.items())
    return f"""{chr(10).join(front_matter)}

# {source.name.rstrip("/").split("/")[-1]}, refusals removed

This is {"an adapter for" if strategy == "adapter" else "a modified copy of"} `{source.name}`. Its refusals were reduced by directional
ablation with heretic {__version__}, without training: the directions that tell refused prompts from answered ones in the residual stream
were taken out of what {modules} write to it.

## Measured

| | original | this model |
| --- | --- | --- |
| refusals on {scores["n_bad_prompts"]} prompts that are to be refused | {scores["base_refusals"]} | {scores["refusals"]} |
| first-token KL divergence on harmless prompts (nats) | 0 | {scores["kl_divergence"]:.4f} |

Refusals are counted by keywords in the first {settings.max_response_length} tokens, so an answer that changes the subject counts
as an answer. The divergence looks at the first token only. Neither says that the model's abilities are unharmed.

## Parameters

Row normalization `{settings.row_normalization}`. Positions and distances are fractions of the last layer index
({len(model.architecture.layers) - 1}).

| parameter | value |
| --- | --- |
{parameters}

`heretic.json` holds every setting and version.

## Responsible use

The safeguards that the original's makers trained into it have been weakened on purpose: this model answers requests that the original
declines, and may produce content that is harmful, wrong or unlawful. Whoever runs or shares it answers for what is done with
it, and should add safeguards that fit the purpose. The original's licence and terms of use still apply.
"""


def upload(model: Model, result: Result, strategy: Strategy, repo_id: str, private: bool, token: str, progress: Progress) -> str:
    """Save to a temporary folder and upload it to the hub repository, made if missing. Returns its address.

    Raises `ExportError` where the hub refuses. The token goes to the hub alone.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="heretic-upload-") as temporary:
        folder = save(model, result, strategy, str(Path(temporary) / "model"), False, progress)
        try:
            with progress.task(f"Uploading to {repo_id}"):
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload the edited model")
        except (HTTPError, OSError, ValueError) as error:  # HTTPError: also where the hub cannot be reached
            reason = (str(error).replace(token, "[token]").strip() or type(error).__name__).splitlines()[0]
            raise ExportError(
                f"The upload to {repo_id} failed: {reason}. Check the repository's name, the token's right to write and the network, "
                "then upload again; the study is safe."
            ) from None
    return str(commit.repo_url)
