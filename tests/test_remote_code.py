"""A model that transformers does not know: its code comes with it, its modules have names of their own, its experts are a list."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from conftest import Outcome

CODE = """
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=64, hidden_size=32, num_hidden_layers=2, n_experts=6, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers, self.n_experts = vocab_size, hidden_size, num_hidden_layers, n_experts
        super().__init__(**kwargs)


class Expert(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.enter, self.leave = nn.Linear(size, 24), nn.Linear(24, size)

    def forward(self, h):
        return self.leave(torch.tanh(self.enter(h)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.look, self.think = nn.LayerNorm(size), nn.LayerNorm(size)
        self.gather, self.pour = nn.Linear(size, 48), nn.Linear(48, size)
        self.choose = nn.Linear(size, config.n_experts)
        self.specialists = nn.ModuleList(Expert(size) for _ in range(config.n_experts))

    def forward(self, h, mask):
        seen = self.gather(self.look(h)) * mask
        h = h + self.pour(torch.tanh(seen.cumsum(1) / mask.cumsum(1).clamp(min=1)))
        x = self.think(h).flatten(0, 1)
        gates, chosen = self.choose(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, specialist in enumerate(self.specialists):
            here = (chosen == i).nonzero()[:, 0]
            if len(here):
                out[here] = gates[here, None] * specialist(x[here])
        return h + out.view_as(h)


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.speak = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0, 0.3)

    def forward(self, input_ids, attention_mask=None, logits_to_keep=0, **kwargs):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        h = self.words(input_ids)
        for block in self.blocks:
            h = block(h, mask[..., None].to(h.dtype))
        return CausalLMOutputWithPast(logits=self.speak(h[:, -logits_to_keep:] if logits_to_keep else h))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(CODE)
    config = {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
        "dtype": "float32",
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    from transformers import AutoConfig

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_model_with_code_of_its_own(folder: Path, tmp_path: Path, mode: str, heretic: Callable[..., Outcome]) -> None:
    (tmp_path / "good.txt").write_text("how do i bake bread\nfix my bike\nhello cat\n")
    (tmp_path / "bad.txt").write_text("how do i fix bread\nbake my cat\nhello dog on the mat\n")
    prompts = [
        f"--{kind}-prompts.dataset={tmp_path / name}.txt"
        for kind, name in (("good", "good"), ("bad", "bad"), ("good-evaluation", "good"), ("bad-evaluation", "bad"))
    ]
    search = ["--n-trials", 3, "--n-startup-trials", 2, "--seed", 1, "--row-normalization", mode, "--max-response-length", 6]
    search += ["--refusal-markers", '["a", "e", "i", "o", "?", "."]', "--study-checkpoint-dir", tmp_path / "studies"]
    saving = ["--trial-index", 0, "--model-action", "save", "--export-strategy", "merge", "--save-directory", tmp_path / "out"]
    outcome = heretic(folder, "--trust-remote-code", *prompts, *search, *saving)
    assert (outcome.code, outcome.err) == (0, "")
    assert "writing to the residual stream: 14 mlp.down_proj, all edited" in outcome.out
    assert "Trials are evaluated one at a time" in outcome.out
    before = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    strengths = json.loads((tmp_path / "out" / "heretic.json").read_text())["trial"]
    assert strengths["modules"] == {"mlp.down_proj": 14}
    assert changed and all(name.split(".", 2)[2].startswith(("pour.", "specialists.")) and ".enter." not in name for name in changed)
    last = {f"blocks.1.specialists.{i}.leave.weight" for i in range(6)} | {"blocks.1.pour.weight"}
    assert last <= changed
