"""What is saved, reopened with transformers and PEFT alone, against the explicit edit in float64."""

import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

import zoo
from heretic import __version__
from heretic.config import Settings
from heretic.editing.ablation import Ablation, ComponentParameters
from heretic.errors import ExportError
from heretic.saving.export import save
from heretic.saving.record import Result, Strategy
from heretic.utils import SilentProgress
from tiny import Recorder, build, explicit_bias, explicit_weight, load, settings, unit_directions
from tiny import save as save_original

MODES = ["none", "pre", "full"]
PARAMETERS = {"attn.o_proj": ComponentParameters(1.0, 1.0, 0.4, 1.0), "mlp.down_proj": ComponentParameters(1.3, 1.0, 0.5, 0.5)}
ABLATION = Ablation(0.3, PARAMETERS)
# By hand, for two layers: attention 0.4 and 1.0, the MLP in the last layer only.
STRENGTHS = {"self_attn.o_proj": (0.4, 1.0), "mlp.down_proj": (0.0, 1.3), "self_attn.dense": (0.4, 1.0), "mlp.fc2": (0.0, 1.3)}
DIRECTIONS = unit_directions(3, 32)
TOKENS = torch.arange(6, 30).reshape(2, 12)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_original(tmp_path_factory.mktemp("models") / "original", build("llama"))


def result_for(chosen: Settings) -> Result:
    return Result(chosen, 17, ABLATION, refusals=3, kl_divergence=0.0123, base_refusals=95, n_bad_prompts=100, response_prefix="yes ")


def export(
    original: Path, target: Path, strategy: Strategy = "merge", progress: Any = None, overwrite: bool = False, **changes: Any
) -> Path:
    """Load, edit and save as the program does; returns what `save` does."""
    model = load(original, **changes)
    chosen = settings(original, **changes)
    model.use_directions(DIRECTIONS, chosen.row_normalization)
    return save(model, result_for(chosen), strategy, str(target), overwrite, progress or SilentProgress())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def expected_direction(gain: np.ndarray | None = None) -> np.ndarray:
    r = DIRECTIONS[1].numpy() + 0.3 * (DIRECTIONS[2] - DIRECTIONS[1]).numpy()
    r = r if gain is None else gain * r
    return r / np.linalg.norm(r)


def expected_tensors(
    original: Path, mode: str, post_norms: tuple[str, str] | None = None
) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Every stored tensor of the original, edited in float64 if it is a writer's; and the names of those."""
    before, edited = tensors_of(original), {}
    for name, tensor in before.items():
        path, _, kind = name.rpartition(".")
        layer, _, module = path.partition("layers.")[2].partition(".")
        if "vision" in name or module not in STRENGTHS or not STRENGTHS[module][int(layer)]:
            continue
        gain = None
        if post_norms:
            norm = path.replace(module, post_norms["mlp" in module]) + ".weight"
            gain = 1 + before[norm].double().numpy()
        r, strength = expected_direction(gain), STRENGTHS[module][int(layer)]
        edited[name] = explicit_weight(tensor, r, strength, mode) if kind == "weight" else explicit_bias(tensor, r, strength)
    return before, edited


def check_tensors(target: Path, before: dict[str, Tensor], edited: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    after = tensors_of(target)
    assert after.keys() == before.keys()
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    for name, tensor in after.items():
        if name not in edited:
            assert torch.equal(tensor, before[name]), name
            continue
        # float32 rounds once more in between, which moves the last digit here and there.
        exact = torch.from_numpy(edited[name])
        if dtype == torch.float32:
            torch.testing.assert_close(tensor.double(), exact, rtol=2e-6, atol=2e-6)
        else:
            assert float((tensor == exact.to(dtype)).double().mean()) > 0.995, name
            torch.testing.assert_close(tensor.double(), exact, rtol=2**-7, atol=1e-6)
        assert (tensor != before[name]).double().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_merged_weights(tmp_path: Path, mode: str, dtype: torch.dtype) -> None:
    """Searched in float32 in either case; biases of writers included."""
    original, target = tmp_path / "original", tmp_path / "merged"
    save_original(original, build("llama", dtype, attention_bias=True, mlp_bias=True))
    assert export(original, target, row_normalization=mode) == target
    before, edited = expected_tensors(original, mode)
    assert len(edited) == 6
    check_tensors(target, before, edited, dtype)
    reopened = AutoModelForCausalLM.from_pretrained(target)
    assert reopened.dtype == dtype
    for name, tensor in tensors_of(target).items():
        assert torch.equal(reopened.state_dict()[name], tensor)
    if mode == "full" and dtype == torch.float32:
        for name in edited:
            if name.endswith("weight"):
                norms = [np.linalg.norm(t[name].double().numpy(), axis=1) for t in (before, tensors_of(target))]
                np.testing.assert_allclose(norms[1], norms[0], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_type", ["phi", "gemma3_text", "llava", "gemma3"])
def test_merged_weights_of_other_types(tmp_path: Path, model_type: str, mode: str) -> None:
    """Biases and parallel branches; norms behind the writers; a vision part, whose tensors stay as they are under the same names."""
    original, target = tmp_path / "original", tmp_path / "merged"
    save_original(original, build(model_type))
    export(original, target, row_normalization=mode)
    post_norms = ("post_attention_layernorm", "post_feedforward_layernorm") if model_type.startswith("gemma") else None
    before, edited = expected_tensors(original, mode, post_norms)
    assert len(edited) == (6 if model_type == "phi" else 3)
    assert any("vision" in name for name in before) == (model_type in ("llava", "gemma3"))
    check_tensors(target, before, edited, torch.float32)


def test_saved_model_computes_what_the_search_did(tmp_path: Path) -> None:
    original, target = tmp_path / "original", tmp_path / "merged"
    save_original(original, build("gemma3_text"))
    export(original, target, row_normalization="full")
    model = load(original)
    model.use_directions(DIRECTIONS, "full")
    with torch.inference_mode(), model.hooks.active([ABLATION]):
        expected = model.model(TOKENS).logits
    with torch.inference_mode():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(target)(TOKENS).logits, expected, rtol=0, atol=1e-4)


def test_shards(tmp_path: Path) -> None:
    original, target = tmp_path / "original", tmp_path / "merged"
    save_original(original, build("llama"))
    export(original, target, max_shard_size="30KB")
    assert len(list(target.glob("*.safetensors"))) > 1
    assert (target / "model.safetensors.index.json").is_file()
    before, edited = expected_tensors(original, "none")
    check_tensors(target, before, edited, torch.float32)


@pytest.mark.parametrize("strategy", ["merge", "adapter"])
def test_tokenizer_template_and_generation_settings_are_the_originals(tmp_path: Path, strategy: Strategy) -> None:
    """Although the search pads on the left, decodes greedily, and saving would refuse a generation configuration as odd as this."""
    original, target = tmp_path / "original", tmp_path / "out"
    save_original(original, build("llama"))
    tokenizer = AutoTokenizer.from_pretrained(original)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(original)
    odd = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3], "pad_token_id": 0}
    (original / "generation_config.json").write_text(json.dumps(odd))
    export(original, target, strategy)
    saved = AutoTokenizer.from_pretrained(target)
    reference = AutoTokenizer.from_pretrained(original)
    assert (saved.padding_side, saved.pad_token, saved.eos_token) == (reference.padding_side, None, "<end>")
    assert reference.padding_side == "right"
    assert saved.chat_template == reference.chat_template
    text = saved.apply_chat_template([{"role": "user", "content": "hello dog"}], tokenize=False)
    assert text == "<user> hello dog <end> "
    assert saved(text)["input_ids"] == reference(text)["input_ids"]
    if strategy == "merge":
        assert (target / "generation_config.json").read_bytes() == (original / "generation_config.json").read_bytes()
        assert AutoModelForCausalLM.from_pretrained(target).generation_config.eos_token_id == [2, 3]


def test_an_original_without_generation_settings_gets_none(tmp_path: Path) -> None:
    original, target = tmp_path / "original", tmp_path / "out"
    save_original(original, build("llama"))
    (original / "generation_config.json").unlink()
    export(original, target)
    assert not (target / "generation_config.json").exists()


def test_a_processors_files_are_the_originals(tmp_path: Path) -> None:
    """Also if the libraries that it needs for images are not installed."""
    original, target = tmp_path / "original", tmp_path / "out"
    save_original(original, build("llava"))
    files = {"processor_config.json": '{"processor_class": "LlavaProcessor", "patch_size": 8}', "preprocessor_config.json": '{"size": 16}'}
    for name, text in files.items():
        (original / name).write_text(text)
    export(original, target)
    assert {name: (target / name).read_text() for name in files} == files
    assert not (target / "video_preprocessor_config.json").exists()


def test_record(tmp_path: Path) -> None:
    original, target = tmp_path / "original", tmp_path / "out"
    save_original(original, build("llama", torch.bfloat16))
    export(original, target, row_normalization="pre", winsorization_quantile=0.9)
    record = json.loads((target / "heretic.json").read_text())
    assert record["scores"] == {"refusals": 3, "n_bad_prompts": 100, "base_refusals": 95, "kl_divergence": 0.0123}
    assert record["program"] == {"name": "heretic-llm", "version": __version__}
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert set(record["versions"]) >= {"torch", "transformers", "accelerate", "optuna", "peft", "bitsandbytes", "huggingface-hub"}
    fingerprint = record["model"].pop("fingerprint")
    assert [part.partition(":")[0] for part in fingerprint.split()] == sorted(path.name for path in original.glob("*[ns]"))
    assert record["model"] == {"name": "original", "commit": None, "type": "llama", "gguf_file": None, "search_dtype": "float32"}
    assert record["hardware"].keys() == {"devices", "cpu_threads", "cpu_capability", "machine", "system"}
    assert record["trial"] == {
        "number": 17,
        "origin": "search",
        "direction_index": 0.3,
        "parameters": {
            "attn.o_proj": {"max_weight": 1.0, "max_weight_position": 1.0, "min_weight": 0.4, "min_weight_distance": 1.0},
            "mlp.down_proj": {"max_weight": 1.3, "max_weight_position": 1.0, "min_weight": 0.5, "min_weight_distance": 0.5},
        },
        "n_layers": 2,
        "modules": {"attn.o_proj": 2, "mlp.down_proj": 2},
    }
    wanted = settings("original", row_normalization="pre", winsorization_quantile=0.9)  # no path of this machine
    assert record["settings"] == wanted.model_dump(mode="json")
    assert record["export_strategy"] == "merge"
    assert record["response_prefix"] == "yes "
    assert record["prompts"]["bad_prompts"] == {
        "dataset": "mlabonne/harmful_behaviors",
        "split": "train[:400]",
        "column": "text",
        "prefix": "",
        "suffix": "",
    }
    assert set(record["prompts"]) == {"good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts"}


# Targets


def test_a_target_that_is_not_empty(original: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    with pytest.raises(ExportError) as caught:
        export(original, target)
    assert str(caught.value) == (f"The folder {target} is not empty. Choose another --save-directory, or add --overwrite.")
    assert [path.name for path in target.iterdir()] == ["precious.txt"]
    export(original, target, overwrite=True)
    assert not (target / "precious.txt").exists()
    assert (target / "model.safetensors").is_file()
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208


def test_targets_that_need_not_be_told(original: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export(original, tmp_path / "empty")
    export(original, tmp_path / "not" / "there" / "yet")
    assert (tmp_path / "empty" / "config.json").is_file()
    assert (tmp_path / "not" / "there" / "yet" / "config.json").is_file()


def test_a_target_that_is_a_file(original: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ExportError) as caught:
        export(original, tmp_path / "out", overwrite=True)
    assert str(caught.value) == f"{tmp_path / 'out'} is a file. Choose another --save-directory."


def cannot_be_written(target: Path, reason: str) -> str:
    return (
        f"{target} cannot be written: {reason}. Nothing was left there; the study is safe. Free some space or choose another "
        "--save-directory, then save again."
    )


@pytest.mark.parametrize("replacing", [False, True])
def test_a_full_disk_leaves_nothing_behind(original: Path, tmp_path: Path, replacing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a part of the model nor a temporary folder; and what was there before stays."""
    target = tmp_path / "out"
    if replacing:
        target.mkdir()
        (target / "precious.txt").write_text("mine")

    def fail(descriptor: int) -> None:  # where a full disk is noticed at the latest
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("heretic.saving.hashed_file.os.fsync", fail)
    with pytest.raises(ExportError) as caught:
        export(original, target, overwrite=True)
    assert str(caught.value) == cannot_be_written(target, "No space left on device")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == (["out", "out/precious.txt"] if replacing else [])


@pytest.mark.parametrize("strategy", ["merge", "adapter"])
def test_a_file_that_the_system_refuses(tmp_path: Path, strategy: Strategy) -> None:
    """A real limit on file sizes, met by the real writer of safetensors files, which has an error type of its own."""
    source, target = save_original(tmp_path / "original", build("llama", intermediate_size=256)), tmp_path / "place" / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(ExportError) as caught:
            export(source, target, strategy, row_normalization="full", full_normalization_lora_rank=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    reason = {"merge": "File too large", "adapter": "Error while serializing: I/O error: File too large (os error 27)"}
    assert str(caught.value) == cannot_be_written(target, reason[strategy])
    assert list(target.parent.iterdir()) == []


def test_a_disk_that_is_full_once_everything_is_saved(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is complete; only what was measured of it is missing in the record."""

    def fail(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("heretic.saving.export.replace_file", fail)
    model, recorder, target = load(original), Recorder(), tmp_path / "out"
    model.use_directions(DIRECTIONS, "none")
    save(model, result_for(settings(original)), "merge", str(target), False, recorder, lambda folder: {"saved_kl_divergence": 0.1})
    assert recorder.warnings == [
        f"The KL divergence of the saved model was not added to {target / 'heretic.json'}: No space left on device"
    ]
    assert "saved_kl_divergence" not in json.loads((target / "heretic.json").read_text())


def test_a_folder_that_is_swapped_in_comes_back_where_that_fails(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder is out of the way already when the new one cannot be moved."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    monkeypatch.setattr("heretic.saving.staging._swap", lambda a, b: False)
    rename, calls = type(target).rename, []

    def fail_second(self: Path, to: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", fail_second)
    with pytest.raises(ExportError) as caught:
        export(original, target, overwrite=True)
    assert str(caught.value) == cannot_be_written(target, "Input/output error")
    assert (target / "precious.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208


def test_an_original_that_is_gone(tmp_path: Path) -> None:
    source = save_original(tmp_path / "original", build("llama"))
    model = load(source)
    model.use_directions(DIRECTIONS, "none")
    (source / "model.safetensors").unlink()
    with pytest.raises(ExportError) as caught:
        save(model, result_for(settings(source)), "merge", str(tmp_path / "out"), False, SilentProgress())
    assert str(caught.value) == (
        f"The files of {source} cannot be read again: The model's folder contains no weights: none of model.safetensors, "
        "model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json exists. The study is safe."
    )
    assert not (tmp_path / "out").exists()


# Adapters


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


def with_adapter(original: Path, adapter: Path, auto: Any = AutoModelForCausalLM) -> Any:
    return PeftModel.from_pretrained(auto.from_pretrained(original), adapter)


@pytest.mark.parametrize("mode", ["none", "pre"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "llava"])
def test_adapter_of_rank_one_is_the_merged_model(tmp_path: Path, mode: str, model_type: str) -> None:
    original = save_original(tmp_path / "original", build(model_type))
    auto = AutoModelForImageTextToText if model_type == "llava" else AutoModelForCausalLM
    recorder = Recorder()
    export(original, tmp_path / "merged", row_normalization=mode)
    export(original, tmp_path / "adapter", "adapter", recorder, row_normalization=mode)
    merged, adapted = auto.from_pretrained(tmp_path / "merged"), with_adapter(original, tmp_path / "adapter", auto)
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=0, atol=1e-4)
    assert (logits(merged) - logits(auto.from_pretrained(original))).abs().max() > 0.1
    assert adapted.peft_config["default"].r == 1
    assert len(tensors_of(tmp_path / "adapter")) == 6
    assert len(recorder.messages) == 1  # by which name the original goes in its configuration
    assert recorder.warnings == []


def test_adapter_of_transposed_weights(tmp_path: Path) -> None:
    model = zoo.build("gpt2", max_layers=2)
    with torch.no_grad():
        for layer in model.transformer.h:  # no adapter holds biases
            layer.attn.c_proj.bias.zero_()
            layer.mlp.c_proj.bias.zero_()
    original = save_original(tmp_path / "original", model)
    for strategy in ("merge", "adapter"):
        loaded = load(original, row_normalization="pre")
        chosen = settings(original, row_normalization="pre")
        loaded.use_directions(unit_directions(3, 64), "pre")
        save(loaded, result_for(chosen), strategy, str(tmp_path / strategy), False, SilentProgress())  # type: ignore[arg-type]
    merged, adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "merge"), with_adapter(original, tmp_path / "adapter")
    scale = logits(merged).abs().max()
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=0, atol=float(1e-5 * scale))
    assert (logits(merged) - logits(AutoModelForCausalLM.from_pretrained(original))).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("mode", ["none", "pre"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_adapter_of_fused_experts(tmp_path: Path, model_type: str, mode: str) -> None:
    model = zoo.build(model_type, max_layers=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # no adapter holds biases
            if name.endswith(("o_proj.bias", "down_proj_bias")):
                parameter.zero_()
    original = save_original(tmp_path / "original", model)
    for strategy in ("merge", "adapter"):
        loaded = load(original, row_normalization=mode)
        loaded.use_directions(unit_directions(3, 64), mode)
        save(loaded, result_for(settings(original, row_normalization=mode)), strategy, str(tmp_path / strategy), False, SilentProgress())  # type: ignore[arg-type]
    merged, adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "merge"), with_adapter(original, tmp_path / "adapter")
    scale = logits(merged).abs().max()
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=0, atol=float(1e-5 * scale))
    assert (logits(merged) - logits(AutoModelForCausalLM.from_pretrained(original))).abs().max() > 1e-4 * scale


def test_adapter_of_experts_that_peft_takes_for_others_is_refused(tmp_path: Path) -> None:
    original = save_original(tmp_path / "original", zoo.build("llama4_text", max_layers=2))
    loaded = load(original)
    loaded.use_directions(unit_directions(3, 64), "none")
    with pytest.raises(ExportError) as caught:
        save(loaded, result_for(settings(original)), "adapter", str(tmp_path / "adapter"), False, SilentProgress())
    assert str(caught.value) == (
        "An adapter cannot represent the edits of these experts (model.layers.1.feed_forward.experts and 0 more). Save a merged model: "
        "--export-strategy merge."
    )
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("rank", [3, 32, 40])
def test_adapter_of_mode_full(tmp_path: Path, original: Path, rank: int) -> None:
    """What it misses is what it says it misses: nothing if the rank is the matrices' own or more."""
    recorder = Recorder()
    export(original, tmp_path / "merged", row_normalization="full")
    export(original, tmp_path / "adapter", "adapter", recorder, row_normalization="full", full_normalization_lora_rank=rank)
    adapted = with_adapter(original, tmp_path / "adapter")
    before, edited = expected_tensors(original, "full")
    stored, missed = tensors_of(tmp_path / "adapter"), []
    for name, exact in edited.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        A, B = (stored[f"{path}.lora_{factor}.weight"].double().numpy() for factor in "AB")
        assert (len(A), B.shape[1]) == (rank, rank)
        change = exact - before[name].double().numpy()
        missed.append(np.linalg.norm(B @ A - change) / np.linalg.norm(change))
    assert len(missed) == 3
    assert recorder.messages[:1] == [
        f"Adapter of rank {rank}: its error is {np.mean(missed):.1%} of the weight change on average, {max(missed):.1%} at most "
        "(Frobenius norm). "
        "A higher --full-normalization-lora-rank reduces it; a merged model is exact."
    ]
    assert json.loads((tmp_path / "adapter" / "heretic.json").read_text())["adapter"] == {
        "rank": rank,
        "mean_relative_error": pytest.approx(np.mean(missed), abs=1e-5),
        "max_relative_error": pytest.approx(max(missed), abs=1e-5),
        "biases_left": 0,
    }
    wanted, plain = (
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")),
        logits(AutoModelForCausalLM.from_pretrained(original)),
    )
    if rank == 3:
        assert 0.05 < max(missed) < 1
        assert (logits(adapted) - wanted).norm() < (wanted - plain).norm()
    else:
        assert max(missed) < 1e-5
        torch.testing.assert_close(logits(adapted), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["none", "pre"])
def test_adapter_of_biased_modules(tmp_path: Path, mode: str) -> None:
    """It carries no biases, says so, and is the merged model but for them."""
    original = save_original(tmp_path / "original", build("phi"))
    recorder = Recorder()
    export(original, tmp_path / "merged", row_normalization=mode)
    export(original, tmp_path / "adapter", "adapter", recorder, row_normalization=mode)
    # Parallel branches, in the order in which they run.
    assert recorder.warnings == [
        "An adapter cannot change biases; those of 3 modules are not edited (model.layers.0.self_attn.dense, "
        "model.layers.1.self_attn.dense, model.layers.1.mlp.fc2, ...). In a merged model they are."
    ]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = with_adapter(original, tmp_path / "adapter")
    assert (logits(adapted) - logits(merged)).abs().max() > 0.01
    unedited = AutoModelForCausalLM.from_pretrained(original)
    with torch.no_grad():
        for name in ("layers.0.self_attn.dense", "layers.1.self_attn.dense", "layers.1.mlp.fc2"):
            merged.model.get_submodule(name).bias.copy_(unedited.model.get_submodule(name).bias)
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=0, atol=1e-4)


def test_adapter_folder(tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(original, tmp_path / "adapter", "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "original"
    assert sorted(config["target_modules"]) == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    assert json.loads((tmp_path / "adapter" / "heretic.json").read_text())["export_strategy"] == "adapter"
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    # PEFT's way of opening it without naming the original, which it finds by its folder's name.
    monkeypatch.chdir(original.parent)
    from peft import AutoPeftModelForCausalLM

    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(with_adapter(original, tmp_path / "adapter")), rtol=0, atol=0)


def test_generation_config_of_the_running_model_is_untouched_by_saving(original: Path, tmp_path: Path) -> None:
    model = load(original)
    model.use_directions(DIRECTIONS, "none")
    before = model.model.generation_config.to_dict()
    weights = {name: p.clone() for name, p in model.model.named_parameters()}
    save(model, result_for(settings(original)), "merge", str(tmp_path / "out"), False, SilentProgress())
    assert model.model.generation_config.to_dict() == before
    assert isinstance(model.model.generation_config, GenerationConfig)
    assert all(torch.equal(p, weights[name]) for name, p in model.model.named_parameters())
    assert model.tokenizer.padding_side == "left"


@pytest.mark.parametrize("strategy", ["merge", "adapter"])
def test_saved_files_can_be_read_by_whoever_may_read_new_files(original: Path, tmp_path: Path, strategy: Strategy) -> None:
    """safetensors creates its files for the owner only."""
    (new := tmp_path / "new").touch()
    export(original, tmp_path / "out", strategy=strategy)
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {new.stat().st_mode}
