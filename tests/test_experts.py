"""A chat model with a mixture of experts, made from the demonstration model and trained on, whose refusals the program removes."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import train_demo_model
from conftest import Outcome
from demo_corpus import DEMO, make_corpus

KEPT = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads max_position_embeddings
tie_word_embeddings bos_token_id eos_token_id pad_token_id rms_norm_eps rope_parameters""".split()
N_EXPERTS = 4
STEPS = 20


def with_experts(dense: Any) -> Any:
    """Every MLP becomes four experts, copies of it that noise sets apart, two of which an untrained router chooses."""
    torch.manual_seed(0)
    kept = {name: getattr(dense.config, name) for name in KEPT}
    config = MixtralConfig(**kept, num_local_experts=N_EXPERTS, num_experts_per_tok=2, sliding_window=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = dense.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in weights:
                tensor.copy_(weights[name])
        for new, old in zip(model.model.layers, dense.model.layers, strict=True):
            experts = new.mlp.experts
            experts.gate_up_proj.copy_(torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight]).expand_as(experts.gate_up_proj))
            experts.down_proj.copy_(old.mlp.down_proj.weight.expand_as(experts.down_proj))
            for parameter in (experts.gate_up_proj, experts.down_proj):
                parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.3)
            new.mlp.gate.weight.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "experts"
    dense = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype="float32")
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO / "model")
    model = with_experts(dense)
    rows = [train_demo_model.encode(tokenizer, example) for example in make_corpus(0, answering=100, refusing=1200).refusing]
    with contextlib.redirect_stdout(None):
        train_demo_model.learn(model, rows, train_demo_model.Schedule(), steps=STEPS, rate=1e-3, seed=1, pad=tokenizer.pad_token_id)
    model.generation_config = dense.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "trials"),
    [("none", ("--n-trials", "24", "--n-startup-trials", "10")), ("full", ("--n-trials", "0", "--n-learned-trials", "2"))],
    ids=["a search", "learned edits"],
)
def test_refusals_of_a_mixture_of_experts(
    chat_model: Path, mode: str, trials: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heretic: Callable[..., Outcome]
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = [
        f"--{kind.replace('_', '-')}-prompts.dataset={DEMO / 'prompts' / f'{kind}.txt'}"
        for kind in ("good", "bad", "good_evaluation", "bad_evaluation")
    ]
    answers = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"]
    outcome = heretic(str(chat_model), *sources, *trials, "--seed", "1", "--row-normalization", mode, *answers)
    assert (outcome.code, outcome.err) == (0, "")
    record = json.loads(Path("out/heretic.json").read_text())
    assert record["trial"]["modules"] == {"attn.o_proj": 8, "mlp.down_proj": 8 * N_EXPERTS}
    scores = record["scores"]
    assert scores["base_refusals"] >= 95
    assert scores["refusals"] <= 25 and scores["kl_divergence"] <= 0.2
    before = AutoModelForCausalLM.from_pretrained(chat_model, dtype="bfloat16").state_dict()
    after = AutoModelForCausalLM.from_pretrained("out", dtype="bfloat16").state_dict()
    changed = {name.split(".", 3)[-1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"self_attn.o_proj.weight", "mlp.experts.down_proj"}
