"""Models in other files than one of safetensors: several shards, pickled, quantized; read by an independent way, edited, saved, opened."""

import hashlib
import json
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import zoo
from heretic.errors import ExportError, ModelError
from heretic.saving.export import save
from heretic.saving.hashed_file import HashedFile
from heretic.saving.original import files_to_copy
from heretic.saving.stored import Shard, StoredModel, computed_tensor, open_stored, write_stored
from heretic.utils import SilentProgress
from test_export import DIRECTIONS, expected_tensors, export, result_for, tensors_of
from tiny import Recorder, build, explicit_bias, explicit_weight, load, settings, unit_directions
from tiny import save as save_original

EDITED = {"model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"}


def sharded(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model in shards that transformers chose, with a prediction layer that it does not load."""
    save_original(folder, build("llama", dtype))
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="12KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    extra = {"mtp.0.self_attn.o_proj.weight": torch.randn(32, 32), "mtp.head.weight": torch.arange(7, dtype=torch.int8)}
    save_file(extra, folder / "extra.safetensors", {"made by": "somebody"})
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    index["metadata"]["note"] = "kept"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def bytes_of_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_edited_tensors_are_rewritten(tmp_path: Path) -> None:
    """Same files, same headers byte for byte, and only the bytes of edited tensors differ; every other file is the same."""
    original, target = sharded(tmp_path / "original"), tmp_path / "merged"
    (original / "extra").mkdir()
    (original / "extra" / "notes.txt").write_text("mine")
    (original / "LICENSE").write_text("do what you like")
    (original / "chat_template.json").write_text("{}")
    (original / ".git").mkdir()
    (original / ".git" / "config").write_text("not a part of the model")
    export(original, target)
    before, after = bytes_of_files(original), bytes_of_files(target)
    assert set(after) == {*before, "heretic.json", "heretic.directions", "README.md", "kernel.svg"} - {".git/config"}
    differing = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    index = json.loads(after["model.safetensors.index.json"])
    assert differing == {index["weight_map"][name] for name in EDITED}
    for name in differing:
        length = 8 + int.from_bytes(before[name][:8], "little")
        assert before[name][:length] == after[name][:length]
        assert len(before[name]) == len(after[name])
    wanted, edited = expected_tensors(original, "none")
    stored = tensors_of(target)
    assert set(edited) == EDITED
    for name, tensor in stored.items():
        if name not in EDITED:
            assert torch.equal(tensor, wanted[name]) and tensor.dtype == wanted[name].dtype
        else:
            torch.testing.assert_close(tensor.double(), torch.from_numpy(edited[name]), rtol=2**-7, atol=1e-6)
    AutoModelForCausalLM.from_pretrained(target)


@pytest.mark.parametrize("size", ["20KB", "5GB"])
def test_max_shard_size_makes_new_files(tmp_path: Path, size: str) -> None:
    original, target = sharded(tmp_path / "original"), tmp_path / "merged"
    export(original, target, max_shard_size=size)
    export(original, tmp_path / "kept")
    files = sorted(path.name for path in target.glob("*.safetensors"))
    if size == "5GB":
        assert files == ["model.safetensors"] and not (target / "model.safetensors.index.json").exists()
    else:
        assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))] and len(files) > 1
        assert sum((target / name).stat().st_size < 24_000 for name in files) >= len(files) - 1
        index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
        assert all(set(load_file(target / name)) == {key for key, file in index.items() if file == name} for name in files)
    kept, new = tensors_of(tmp_path / "kept"), tensors_of(target)
    assert kept.keys() == new.keys()
    assert all(torch.equal(kept[name], new[name]) for name in kept)
    AutoModelForCausalLM.from_pretrained(target)


def test_what_is_saved_has_its_hashes(tmp_path: Path) -> None:
    import hashlib

    target = export(sharded(tmp_path / "original"), tmp_path / "merged")
    files = json.loads((target / "heretic.json").read_text())["files"]
    found = {name: hashlib.sha256(content).hexdigest() for name, content in bytes_of_files(target).items()}
    found.pop("heretic.json")
    assert files == found


def test_tied_weights_stay_stored_once(tmp_path: Path) -> None:
    original = save_original(tmp_path / "original", build("llama", tie_word_embeddings=True))
    export(original, tmp_path / "merged")
    assert set(tensors_of(original)) == set(tensors_of(tmp_path / "merged"))
    assert "lm_head.weight" not in tensors_of(original)


@pytest.mark.parametrize(("size", "kept"), [(None, True), ("5GB", False), ("12KB", False)])
def test_weights_that_the_configuration_names(tmp_path: Path, size: str | None, kept: bool) -> None:
    """It goes on naming them only if the file keeps its name."""
    original = save_original(tmp_path / "original", build("llama"))
    (original / "model.safetensors").rename(original / "own.safetensors")
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"transformers_weights": "own.safetensors"}))
    target = export(original, tmp_path / "out", max_shard_size=size)
    assert ("transformers_weights" in json.loads((target / "config.json").read_text())) == kept
    state, stored = AutoModelForCausalLM.from_pretrained(target).state_dict(), tensors_of(target)
    assert stored and all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    assert (
        json.loads((target / "heretic.json").read_text())["files"]["config.json"]
        == hashlib.sha256((target / "config.json").read_bytes()).hexdigest()
    )


# Which files belong to a copy


def test_files_to_copy() -> None:
    own = {"model-1.safetensors": 500, "model-2.safetensors": 500, "model.safetensors.index.json": 9}
    others = ["config.json", "tokenizer.model", "vocab.txt", "a/b.txt", "LICENSE", "params.json"]
    weights = ["pytorch_model.bin", "original/consolidated.00.pth", "model.gguf", "onnx/model.onnx", "tf_model.h5"]
    indexes = ["pytorch_model.bin.index.json"]
    never = [".gitattributes", ".cache/x", "__pycache__/m.pyc", "README.md", "heretic.json", "heretic.directions"]
    sizes = {**own, **dict.fromkeys([*others, *weights, *indexes, *never, "modeling.py"], 1)}
    assert files_to_copy(sizes, frozenset(own), True) == (sorted([*others, "modeling.py"]), sorted([*weights, *indexes]))
    assert files_to_copy(sizes, frozenset(own), False) == (sorted(others), sorted([*weights, *indexes, "modeling.py"]))
    # A prediction layer in a separate file is a part of the model, all of its weights under other names are not.
    assert files_to_copy({**own, "mtp.safetensors": 80}, frozenset(own), False) == (["mtp.safetensors"], [])
    assert files_to_copy({**own, "consolidated.safetensors": 1000}, frozenset(own), False) == ([], ["consolidated.safetensors"])


def test_what_is_not_copied_is_told(tmp_path: Path) -> None:
    original = sharded(tmp_path / "original")
    (original / "model.gguf").write_bytes(b"GGUF")
    recorder = Recorder()
    export(original, tmp_path / "merged", progress=recorder)
    assert recorder.messages == ["Not copied, because they contain the original's weights again or untrusted code: model.gguf"]


# Pickled files


@pytest.mark.parametrize("n_files", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_pickled_weights(tmp_path: Path, n_files: int, tied: bool) -> None:
    """Saved as safetensors, under the names of the files they were in."""
    original, reference = tmp_path / "original", tmp_path / "reference"
    save_original(reference, build("llama", torch.bfloat16, tie_word_embeddings=tied))
    shutil.copytree(reference, original)
    state = AutoModelForCausalLM.from_pretrained(reference).state_dict()
    assert ("lm_head.weight" in state) and (state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()) == tied
    (original / "model.safetensors").unlink()
    names = list(state)
    if n_files == 1:
        torch.save(state, original / "pytorch_model.bin")
        wanted = {"model.safetensors"}
    else:
        parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        for file, part in parts.items():
            torch.save({name: state[name] for name in part}, original / file)
        index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (original / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        wanted = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    target = export(original, tmp_path / "merged")
    assert {path.name for path in target.glob("*.safetensors")} == wanted
    assert not list(target.glob("*.bin*"))
    export(reference, tmp_path / "expected")
    found, expected = tensors_of(target), tensors_of(tmp_path / "expected")
    if not (tied and n_files == 2):  # in two files, a tied tensor is stored twice before and after
        assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    models = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (target, tmp_path / "expected")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


def broken(folder: Path, name: str, content: bytes) -> str:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        open_stored(folder)
    return str(caught.value).replace(str(folder), "m")


def test_damaged_files(tmp_path: Path) -> None:
    folder = save_original(tmp_path / "m", build("llama"))
    content = (folder / "model.safetensors").read_bytes()
    assert broken(folder, "model.safetensors", content[:-1]) == (
        "m/model.safetensors does not match its header: it is damaged or incomplete. Download the file again."
    )
    assert broken(folder, "model.safetensors", b"version https://git-lfs.github.com/spec/v1\n") == (
        "m/model.safetensors is not a safetensors file: it is damaged, or a pointer to a file that was not downloaded."
    )
    index = {"weight_map": {"a": "model-1.safetensors"}}
    assert broken(folder, "model.safetensors.index.json", json.dumps(index).encode()) == (
        "The file model-1.safetensors of the model is missing, but listed in model.safetensors.index.json. Download the model again."
    )
    (folder / "model.safetensors").touch()
    assert broken(folder, "model.safetensors.index.json", b"{}") == (
        "m/model.safetensors.index.json is not a valid index of a model's files: 'weight_map'. Download the file again."
    )
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").touch()
    torch.save({"a": 1}, folder / "more.bin")
    assert broken(folder, "pytorch_model.bin", (folder / "more.bin").read_bytes()) == (
        "m/pytorch_model.bin does not only contain tensors: a is a int."
    )
    (folder / "model.safetensors").touch()
    assert broken(folder, "pytorch_model.bin", b"nonsense").startswith("m/pytorch_model.bin cannot be read as a tensor file: ")


# Parameters that cannot be placed


def save_changed(tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
    """What is said when a folder's tensors are other than those that were loaded; nothing must be written."""
    original = save_original(tmp_path / "original", build("llama"))
    model = load(original)
    model.use_directions(DIRECTIONS, "none")
    save_file(change(load_file(original / "model.safetensors")), original / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError) as caught:
        save(model, result_for(settings(original)), "merge", str(tmp_path / "out"), False, SilentProgress())
    assert {path.name for path in tmp_path.iterdir()} == {"original"}
    return str(caught.value).replace(str(original), "m")


NAME = "model.layers.1.mlp.down_proj.weight"


def test_a_parameter_that_is_not_in_the_files(tmp_path: Path) -> None:
    text = save_changed(tmp_path, lambda tensors: {("odd.weight" if name == NAME else name): t for name, t in tensors.items()})
    assert text == (
        f"{NAME} was not found in the model's files, so its edit cannot be saved. Their tensors include lm_head.weight, "
        "model.embed_tokens.weight, model.layers.0.input_layernorm.weight. Nothing was written; the study is safe."
    )


def test_a_parameter_of_another_shape(tmp_path: Path) -> None:
    text = save_changed(tmp_path, lambda tensors: {**tensors, NAME: tensors[NAME].T.contiguous()})
    assert text == (
        f"{NAME} is stored as the shape (48, 32), not (32, 48): the files do not fit the model, so its edit cannot be saved. Nothing was "
        "written; the study is safe."
    )


def test_a_parameter_of_another_value(tmp_path: Path) -> None:
    text = save_changed(tmp_path, lambda tensors: {**tensors, NAME: tensors[NAME] + 1})
    assert text == (
        f"{NAME} in the files of m differs from the loaded model: the files have changed since, or have an unknown layout. "
        "Nothing was written; the study is safe."
    )


def test_what_the_disk_changes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = save_original(tmp_path / "original", build("llama"))
    closed = HashedFile._close

    def damage(file: HashedFile) -> None:
        closed(file)
        path = Path(str(file._file.name))
        if path.name == "model.safetensors":
            header = open_header(path)
            with path.open("r+b") as written:
                written.seek(8 + len(header) + json.loads(header)[NAME]["data_offsets"][0])
                written.write(b"\xff")

    monkeypatch.setattr(HashedFile, "_close", damage)
    with pytest.raises(ExportError) as caught:
        export(original, tmp_path / "out")
    assert str(caught.value) == f"{NAME} in model.safetensors differs from what was written. Check the disk. The study is safe."
    assert not (tmp_path / "out").exists()


def open_header(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


# Quantized files


def fp8_model(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A model stored in FP8 with a scale for each block of 16 by 16; its weights in float64."""
    save_original(folder, build("llama", torch.bfloat16))
    tensors, exact = {}, {}
    for name, tensor in tensors_of(folder).items():
        if not name.endswith("_proj.weight"):
            tensors[name], exact[name] = tensor, tensor.double().numpy()
            continue
        blocks = tensor.float().unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        quantized = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = quantized, scale
        spread = np.kron(scale.double().numpy(), np.ones((16, 16)))
        exact[name] = quantized.double().numpy() * spread
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config))
    return exact


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_is_saved_dequantized(tmp_path: Path, dtype: str) -> None:
    original, target = tmp_path / "original", tmp_path / "merged"
    exact = fp8_model(original)
    recorder = Recorder()
    model = load(original, recorder, dtypes=[dtype])
    assert recorder.messages == [
        f"{original} is stored in FP8. Its weights are dequantized: the search computes in {dtype}, and the saved model is in bfloat16."
    ]
    model.use_directions(DIRECTIONS, "none")
    save(model, result_for(settings(original)), "merge", str(target), False, SilentProgress())
    stored = tensors_of(target)
    assert stored.keys() == exact.keys()
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    strengths = dict(zip(sorted(EDITED), (0.4, 1.3, 1.0), strict=True))
    r = DIRECTIONS[1].numpy() + 0.3 * (DIRECTIONS[2] - DIRECTIONS[1]).numpy()
    r /= np.linalg.norm(r)
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16
        wanted = explicit_weight(exact[name], r, strengths[name], "none") if name in EDITED else exact[name]
        np.testing.assert_allclose(tensor.double().numpy(), wanted, rtol=2**-8, atol=1e-7)  # rounded once
    AutoModelForCausalLM.from_pretrained(target)


def test_fp8_without_a_scale(tmp_path: Path) -> None:
    fp8_model(tmp_path / "original")
    model = load(tmp_path / "original")
    model.use_directions(DIRECTIONS, "none")
    tensors = load_file(tmp_path / "original" / "model.safetensors")
    del tensors[f"{NAME}_scale_inv"]
    save_file(tensors, tmp_path / "original" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError) as caught:
        save(model, result_for(settings(tmp_path / "original")), "merge", str(tmp_path / "out"), False, SilentProgress())
    assert f"{NAME} is stored as F8_E4M3, and its scale was not found (looked for {NAME}_scale_inv)." in str(caught.value)


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_mxfp4_is_saved_dequantized(tmp_path: Path) -> None:
    """gpt-oss: blocks of 16 bytes, two numbers in each, the lower half first, and an exponent for each block."""
    original, target = tmp_path / "original", tmp_path / "merged"
    save_original(original, zoo.build("gpt_oss", max_layers=2).to(torch.bfloat16))
    tensors, exact = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors_of(original).items():
        if not name.endswith(("down_proj", "gate_up_proj")):
            tensors[name] = tensor
            continue
        n_experts, d_in, d_out = tensor.shape
        blocks = torch.randint(0, 256, (n_experts, d_out, d_in // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 126, (n_experts, d_out, d_in // 32), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        numbers = FP4[np.stack([blocks.numpy() & 15, blocks.numpy() >> 4], axis=-1)].reshape(n_experts, d_out, d_in // 32, 32)
        exact[name] = (numbers * 2.0 ** (scales.numpy().astype(int) - 127)[..., None]).reshape(n_experts, d_out, d_in).swapaxes(1, 2)
    save_file(tensors, original / "model.safetensors", {"format": "pt"})
    config = json.loads((original / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
    (original / "config.json").write_text(json.dumps(config))
    model = load(original)
    directions = unit_directions(3, 64)
    model.use_directions(directions, "none")
    save(model, result_for(settings(original)), "merge", str(target), False, SilentProgress())
    stored = tensors_of(target)
    r = (directions[1] + 0.3 * (directions[2] - directions[1])).numpy()
    r /= np.linalg.norm(r)
    name = "model.layers.1.mlp.experts.down_proj"
    wanted = np.stack([explicit_weight(W.T, r, 1.3, "none").T for W in exact[name]])
    np.testing.assert_allclose(stored[name].double().numpy(), wanted, rtol=2**-7, atol=1e-3)
    bias = explicit_bias(tensors[f"{name}_bias"][0], r, 1.3)
    np.testing.assert_allclose(stored[f"{name}_bias"][0].double().numpy(), bias, rtol=2**-7, atol=1e-3)
    gate = "model.layers.1.mlp.experts.gate_up_proj"
    np.testing.assert_array_equal(stored[gate].double().numpy(), exact[gate])
    assert not any(key.endswith(("_blocks", "_scales")) for key in stored)
    AutoModelForCausalLM.from_pretrained(target)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes"])
def test_other_methods_are_refused_before_anything_is_loaded(tmp_path: Path, method: str) -> None:
    original = save_original(tmp_path / "original", build("llama"))
    config = json.loads((original / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (original / "config.json").write_text(json.dumps(config))
    (original / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        load(original)
    assert str(caught.value) == (
        f"The weights of {original} are quantized by {method}, which cannot be edited. Use the model that it was quantized from (see "
        "the card); --quantization bnb_4bit loads it in as little memory, and the saved model has full precision."
    )


def test_a_file_that_was_cut_off_since_it_was_opened(tmp_path: Path) -> None:
    folder = save_original(tmp_path / "original", build("llama"))
    stored = open_stored(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20000)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        ModelError, match=r"model\.safetensors is too short: it was changed since it was opened\. Download the file again\."
    ):
        write_stored(stored, tmp_path / "out", lambda name: None)


def test_many_small_files_do_not_pile_up_in_memory_before_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = HashedFile._write
    alive: set[int] = set()
    most = []

    def slowly(file: HashedFile, content: Any) -> None:
        time.sleep(0.02)
        write(file, content)

    def changed(name: str) -> torch.Tensor:
        tensor = torch.zeros(1000)
        alive.add(int(name))
        weakref.finalize(tensor.untyped_storage(), alive.discard, int(name))
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(HashedFile, "_write", slowly)
    shards = tuple(
        Shard(f"{i}.safetensors", (computed_tensor(str(i), torch.float32, (1000,), lambda: torch.ones(1000)),)) for i in range(12)
    )
    hashes = write_stored(StoredModel(shards, frozenset(), None), tmp_path, changed)
    assert list(hashes) == [shard.name for shard in shards]
    assert all(hashes[name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in hashes)
    assert max(most) <= 3
