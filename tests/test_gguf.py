"""GGUF files as originals: read, told, edited, saved, made again; and files that cannot be read."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gguf_files
import hub
from conftest import Outcome
from heretic.config import Settings
from heretic.errors import ModelError
from heretic.loading.gguf import dequantized_source
from heretic.loading.source import model_source
from heretic.utils import SilentProgress

Heretic = Callable[..., Outcome]
SAVE = ["--n-learned-trials", 0, "--trial-index", 0, "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"]
WRITERS = [f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A model of 130 kB, one kind of its matrices in 8 bits a weight."""
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "m.gguf", gguf_files.build()).read_bytes()


@pytest.fixture
def file(workplace: Path, content: bytes) -> Path:
    """A file, and settings under which its random answers are refusals."""
    config = (
        Path("config.toml")
        .read_text()
        .replace('["a"]', '["a", "e", "i", "o", "?", "."]')
        .replace("max_response_length = 4", "max_response_length = 12")
    )
    Path("config.toml").write_text(config)
    Path("small.gguf").write_bytes(content)
    return Path("small.gguf")


def weights(file: Path) -> dict[str, torch.Tensor]:
    """What the file holds, by the names of transformers, in bfloat16; blocks turned into numbers by the package `gguf`."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    found = {}
    for name, original in gguf_files.build().state_dict().items():
        tensor = tensors[gguf_files.gguf_name(name)]
        is_plain = tensor.tensor_type == gguf.GGMLQuantizationType.F32
        values = original.numpy() if is_plain else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[name] = torch.from_numpy(np.array(values)).reshape(original.shape).to(torch.bfloat16)
    return found


def test_a_whole_run(file: Path, heretic: Heretic) -> None:
    outcome = heretic("small.gguf", *SAVE)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    told = re.search(
        r"\nsmall\.gguf: the weights of small\.gguf are dequantized in (\S+)\. Saved models are made from these, in bfloat16\.\n",
        outcome.out,
    )
    assert told, outcome.out
    expected, dequantized, saved = weights(file), load_file(Path(told[1], "model.safetensors")), load_file("out/model.safetensors")
    assert dequantized.keys() == saved.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(dequantized[name], values), name
        assert saved[name].dtype == torch.bfloat16
        assert torch.equal(saved[name], values) == (name not in WRITERS), name
    record = json.loads(Path("out/heretic.json").read_text())["model"]
    assert (record["name"], record["gguf_file"], record["commit"]) == ("small.gguf", "small.gguf", None)
    assert {"config.json", "tokenizer.json"} <= {path.name for path in Path("out").iterdir()}

    outcome = heretic("--export-from", "out", "--save-directory", "again")
    assert (outcome.code, outcome.err) == (0, "")
    assert {p.name: p.read_bytes() for p in Path("again").iterdir()} == {p.name: p.read_bytes() for p in Path("out").iterdir()}
    file.rename("elsewhere.gguf")
    outcome = heretic("--export-from", "out", "--save-directory", "once more")
    assert (outcome.code, outcome.err) == (
        1,
        "Error: The original was a file named small.gguf, which does not exist here (records contain no paths). "
        "Give the original with --model.\n",
    )
    outcome = heretic("--export-from", "out", "--save-directory", "once more", "--model", "elsewhere.gguf")
    assert outcome.code == 0
    assert Path("once more/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


def refused(name: str, **more: str) -> str:
    with pytest.raises(ModelError) as caught:
        dequantized_source(model_source(Settings(model=name, **more)), SilentProgress())
    return str(caught.value)


@pytest.mark.usefixtures("workplace")
def test_files_that_cannot_be_read(content: bytes) -> None:
    Path("junk.gguf").write_bytes(b"hello" * 100)
    assert refused("junk.gguf") == (
        "junk.gguf cannot be read as a GGUF file: it does not start with the GGUF magic bytes, so it is not a GGUF file. "
        "It may be incomplete: download it again."
    )
    for name, size in (("head", 5000), ("weights", len(content) * 3 // 4)):
        Path(f"{name}.gguf").write_bytes(content[:size])
        told = refused(f"{name}.gguf")
        assert told.startswith(f"{name}.gguf cannot be read as a GGUF file: ")
        assert told.endswith(". It may be incomplete: download it again.")
    model = gguf_files.build()
    gguf_files.write(Path("other.gguf"), model, architecture="wavenet")
    assert refused("other.gguf") == (
        "other.gguf has the architecture wavenet, which transformers cannot read from GGUF files. Use the model that it was converted from."
    )
    gguf_files.write(Path("part.gguf"), model, parts=3)
    assert refused("part.gguf") == (
        "part.gguf is one of 3 parts of a model. Join them with llama-gguf-split --merge, and use the resulting file."
    )
    gguf_files.write(Path("less.gguf"), model, leave_out="ffn_up")
    assert refused("less.gguf") == (
        "less.gguf lacks weights of its architecture (llama): model.layers.0.mlp.up_proj.weight and 1 more. "
        "Use the model that it was converted from."
    )


def test_a_folder_of_files(file: Path, heretic: Heretic) -> None:
    Path("files").mkdir()
    file.rename("files/small.gguf")
    told = "It contains GGUF files; choose one with --gguf-file, such as small.gguf."
    assert heretic("files") == Outcome(1, "", f"Error: files is not a model folder: it has no config.json. {told}\n")
    assert heretic("files", "--gguf-file", "big.gguf") == Outcome(
        1, "", "Error: The folder files has no file big.gguf. Check --gguf-file.\n"
    )
    Path("notes.txt").write_text("hello")
    assert heretic("notes.txt").err == "Error: notes.txt is a file. Give the model's folder, a GGUF file, or a hub id.\n"
    source = dequantized_source(model_source(Settings(model="files", gguf_file="small.gguf")), SilentProgress())
    assert (source.name, source.gguf, source.repository) == ("files", "small.gguf", None)
    assert Path(source.path, "model.safetensors").is_file()


def test_files_of_the_hub(file: Path, workplace: Path, heretic: Heretic) -> None:
    Path("files").mkdir()
    file.rename("files/small.gguf")
    commands = {
        "none": ["owner/tiny"],
        "missing": ["owner/tiny", "--gguf-file", "big.gguf"],
        "works": ["owner/tiny", "--gguf-file", "small.gguf", *SAVE],
    }
    with hub.serve(Path("files")) as address:
        with hub.online(address, workplace / "cache"):
            outcomes = {name: heretic(*arguments) for name, arguments in commands.items()}
        with hub.online(address, workplace / "cache2"):
            made = heretic("--export-from", "out", "--save-directory", "again")
    told = "The model owner/tiny has no config.json that names its type. If it has GGUF files, choose one with --gguf-file."
    assert (outcomes["none"].code, outcomes["none"].err) == (1, f"Error: {told}\n")
    assert outcomes["missing"].err == "Error: The model owner/tiny has no file big.gguf. Check --gguf-file.\n"
    assert (outcomes["works"].code, outcomes["works"].err) == (0, "")
    record = json.loads(Path("out/heretic.json").read_text())["model"]
    assert (record["name"], record["gguf_file"], record["commit"]) == ("owner/tiny", "small.gguf", hub.COMMIT)
    assert (made.code, made.err) == (0, "")
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
