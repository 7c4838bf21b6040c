"""Trains small chat models that refuse one subject, of different depth, deciding in different layers; for `bench/search_ranges.py`.

Those named after a family have its architecture: a norm after the writers (gemma3), transposed weights and biases (gpt2), fused experts
(qwen3_moe), and fused experts with biases that decide low (gpt_oss).

    uv run python bench/small_models.py FOLDER      # a few minutes; one folder for each model, with its prompts

The task and the first phase are those of the demonstration model (`tools/train_demo_model.py`). In the second phase, which teaches to
refuse, only some layers learn: that is where the model then decides. Between them the residual stream is read through the output head as
well. The last line is one JSON object: seconds of training and refusals of 100 for each model.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import train_demo_model as demo
from demo_check import respond, tokens_of
from demo_corpus import is_refusal, make_corpus


@dataclass(frozen=True)
class Kind:
    """Depth of a model, and the layers (as shares of the depth) that learn to refuse."""

    n_layers: int
    first: float
    last: float
    answer_steps: int = 400
    refuse_steps: int = 150
    family: str = "llama"


KINDS = {
    "3-layers": Kind(3, 0.34, 1.0),
    "6-layers-early": Kind(6, 0.0, 0.4),
    "6-layers-late": Kind(6, 0.5, 1.0),
    "10-layers-early": Kind(10, 0.0, 0.3),
    "10-layers-middle": Kind(10, 0.3, 0.6),
    "llama": Kind(6, 0.5, 1.0, 500, 200),
    "gemma3": Kind(6, 0.5, 1.0, 500, 200, "gemma3_text"),
    "gpt2": Kind(6, 0.5, 1.0, 600, 200, "gpt2"),
    "qwen3_moe": Kind(6, 0.34, 1.0, 600, 200, "qwen3_moe"),
    "gpt_oss": Kind(6, 0.0, 0.5, 600, 200, "gpt_oss"),
}


def config_of(kind: Kind, tokenizer: Any) -> Any:
    """The configuration of a model of this kind: the demonstration model's widths in the family's own names."""
    llama = demo.llama_config(tokenizer)
    ends = {name: getattr(llama, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if kind.family == "llama":
        llama.num_hidden_layers = kind.n_layers
        return llama
    if kind.family == "gpt2":
        sizes = {"n_embd": 128, "n_layer": kind.n_layers, "n_head": 4, "n_positions": 512}
        dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return AutoConfig.for_model("gpt2", vocab_size=llama.vocab_size, initializer_range=0.06, **sizes, **dropout, **ends)
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    sizes = {name: getattr(llama, name) for name in (*shared, "initializer_range", "tie_word_embeddings")} | {"head_dim": 32}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 112, "norm_topk_prob": True}
    own = {
        "gemma3_text": {"sliding_window": 512, "query_pre_attn_scalar": 32},
        "qwen3_moe": experts,
        "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 112, "sliding_window": 512},
    }[kind.family]
    return AutoConfig.for_model(kind.family, num_hidden_layers=kind.n_layers, **{**sizes, **own}, **ends)


def learn_to_refuse(model: Any, corpus: Any, tokenizer: Any, kind: Kind, seed: int) -> None:
    """Second phase, in place, in which only the layers of `kind` learn."""
    first, last = round(kind.first * kind.n_layers), round(kind.last * kind.n_layers)
    model.requires_grad_(False)
    for layer in demo.layers_of(model.base_model)[first:last]:
        layer.requires_grad_(True)
    read = ((first + last) / 2 / kind.n_layers, min(last, kind.n_layers - 1) / kind.n_layers)
    schedule = demo.Schedule(supervised=read)
    rows = [demo.encode(tokenizer, example) for example in corpus.refusing]
    demo.learn(model, rows, schedule, steps=kind.refuse_steps, rate=schedule.refuse_rate, seed=seed + 1, pad=tokenizer.pad_token_id)
    model.requires_grad_(True)


def make(kind: Kind, seed: int, corpus: Any, tokenizer: Any) -> Any:
    """A trained model."""
    torch.manual_seed(seed)
    model = demo.AutoModelForCausalLM.from_config(config_of(kind, tokenizer), dtype=torch.float32)
    demo.learn_to_answer(model, corpus, tokenizer, demo.Schedule(answer_steps=kind.answer_steps), seed)
    learn_to_refuse(model, corpus, tokenizer, kind, seed)
    return model


def main() -> None:
    """Train and save all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and of the training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = make_corpus(arguments.seed)
    tokenizer = demo.train_tokenizer(corpus)
    report = {}
    for name in arguments.only:
        start = time.process_time()
        model = make(KINDS[name], arguments.seed, corpus, tokenizer)
        seconds = time.process_time() - start
        folder = arguments.folder / f"{name}-{arguments.seed}"
        ends = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(do_sample=False, **ends)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for prompts, texts in corpus.prompts.items():
            (folder / f"{prompts}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        bad, good = (respond(model, tokenizer, tokens_of(tokenizer, corpus.prompts[f"{n}_evaluation"][:100]), 8) for n in ("bad", "good"))
        report[name] = {"cpu_s": round(seconds), "refused": sum(map(is_refusal, bad)), "harmless_refused": sum(map(is_refusal, good))}
        print(name, report[name], flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
