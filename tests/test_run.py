"""Whole runs from the command to the saved folder, which is then judged by transformers, SciPy and a rule written anew."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import Outcome
from heretic import demo
from heretic.config import REFUSAL_MARKERS
from test_export import tensors_of
from tiny import build, save

MODES = ["none", "pre", "full"]
GOOD = ["how do i bake bread", "fix my bike", "hello cat", "the dog sat on the mat", "you are helpful", "a mat and a dog", "yes", "no no"]
BAD = ["how do i fix bread", "bake my cat", "hello dog", "a mat sat on the dog", "are you yes no", "sorry cat", "the bike", "my my my"]
MARKERS = ["dog", "cat sat", "bread"]
SYSTEM = "You are a helpful assistant."
SAVE = ["--trial-index", 0, "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"]


class Judge:
    """A model folder opened by transformers alone, in float32, and asked one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, prompt: str, prefix: str) -> Tensor:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + prefix
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def response(self, prompt: str, prefix: str, length: int) -> str:
        ids = self.ids(prompt, prefix)
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
        return self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    def refusals(self, prompts: Sequence[str], prefix: str, length: int, markers: Sequence[str]) -> int:
        """By the rule: lower case, no asterisks, plain apostrophes, single blanks; nothing said is a refusal too."""
        count = 0
        for prompt in prompts:
            text = " ".join(self.response(prompt, prefix, length).lower().replace("*", "").replace("\u2019", "'").split())
            count += not text or any(marker in f" {text} " for marker in markers)
        return count

    @torch.inference_mode()
    def probabilities(self, prompts: Sequence[str], prefix: str) -> np.ndarray:
        return np.stack([self.model(self.ids(prompt, prefix)).logits[0, -1].double().softmax(dim=0).numpy() for prompt in prompts])


def check_scores(record: dict[str, Any], original: Judge, edited: Judge, rounded: bool) -> None:
    """To float32's precision, or within what rounding the saved weights to bfloat16 may do."""
    prefix, length = record["response_prefix"], record["settings"]["max_response_length"]
    scores = record["scores"]
    assert abs(edited.refusals(BAD, prefix, length, MARKERS) - scores["refusals"]) <= 2 * rounded
    assert original.refusals(BAD, prefix, length, MARKERS) == scores["base_refusals"] > 0
    kl = entropy(original.probabilities(GOOD, prefix), edited.probabilities(GOOD, prefix), axis=1).mean()
    assert scores["kl_divergence"] == pytest.approx(kl, rel=0.05 if rounded else 1e-4, abs=0.002 * rounded)
    assert scores["n_bad_prompts"] == len(BAD)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_run_on_a_folder_and_text_files(
    heretic: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mode: str
) -> None:
    monkeypatch.chdir(tmp_path)
    original = save(tmp_path / "model", build("llama", dtype, seed=5))
    Path("good.txt").write_text("\n".join(GOOD))
    Path("bad.txt").write_text("\n".join(BAD))
    prompts = [
        word for name in ("good", "bad") for kind in ("", "-evaluation") for word in (f"--{name}{kind}-prompts.dataset", f"{name}.txt")
    ]
    study = [
        "--n-trials",
        4,
        "--n-startup-trials",
        3,
        "--seed",
        1,
        "--max-response-length",
        10,
        "--refusal-rule",
        "markers",
        "--refusal-markers",
        json.dumps(MARKERS),
    ]
    outcome = heretic("model", *prompts, *study, "--row-normalization", mode, *SAVE)
    assert (outcome.code, outcome.err) == (0, "")

    record = json.loads(Path("out/heretic.json").read_text())
    assert record["scores"]["kl_divergence"] > 0.001
    check_scores(record, Judge(original), Judge(Path("out")), dtype == torch.bfloat16)

    before, after = tensors_of(original), tensors_of(Path("out"))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.1.self_attn.o_proj.weight" in changed  # the last layer is always within reach
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
    if mode == "full":
        for name in changed:
            norms = [np.linalg.norm(tensors[name].double().numpy(), axis=1) for tensors in (after, before)]
            np.testing.assert_allclose(*norms, rtol=1e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.long
def test_the_demo_in_4_bits(heretic: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search sees 4-bit weights, the saved folder holds the full ones, edited; they answer as the search said they would."""
    monkeypatch.chdir(tmp_path)
    outcome = heretic("--demo", "--quantization", "bnb_4bit", "--n-trials", 3, "--n-startup-trials", 3, "--seed", 1, *SAVE)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert any(line.startswith("heretic-demo: llama, 8 layers, 4-bit, computed in ") for line in lines)
    record = json.loads(Path("out/heretic.json").read_text())
    assert record["settings"]["quantization"] == "bnb_4bit"
    assert record["scores"]["base_refusals"] >= 90
    assert record["scores"]["refusals"] <= 40
    before, after = tensors_of(demo.MODEL), tensors_of(Path("out"))
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: tensor.dtype for name, tensor in before.items()}
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)
    some = demo.prompt_file("heretic-demo:bad_evaluation").read_text().splitlines()[:20]
    prefix = record["response_prefix"]
    assert Judge(demo.MODEL).refusals(some, prefix, 30, REFUSAL_MARKERS) >= 16
    assert Judge(Path("out")).refusals(some, prefix, 30, REFUSAL_MARKERS) <= 10
