"""What it costs to edit experts before their gate: one forward pass of a mixture of experts, unedited, mode `none` and mode `full`.

python bench/experts.py            # one JSON line: seconds per pass, and ratios to the unedited pass
"""

import argparse
import json
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from heretic.editing.completeness import full_ablation
from heretic.editing.discovery import discover
from heretic.editing.hooks import AblationHooks


def main() -> None:
    """Alternates the three in one process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--per-token", type=int, default=4)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Qwen3MoeConfig(
        num_hidden_layers=arguments.layers,
        hidden_size=arguments.hidden_size,
        moe_intermediate_size=arguments.hidden_size * 3 // 8,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.per_token,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    architecture = discover(model)
    directions = torch.nn.functional.normalize(torch.randn(arguments.layers + 1, arguments.hidden_size), dim=1)
    tokens = torch.randint(0, 1024, (arguments.rows, arguments.tokens), device=device)

    def seconds() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {"unedited": [], "none": [], "full": []}
    for _ in range(arguments.rounds):
        times["unedited"].append(seconds())
        for mode in ("none", "full"):
            hooks = AblationHooks(architecture, directions, mode)  # type: ignore[arg-type]
            with hooks.active([full_ablation(architecture)]):
                times[mode].append(seconds())
            hooks.remove()
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    ratios = {f"{name}_ratio": medians[name] / medians["unedited"] for name in ("none", "full")}
    print(json.dumps({"device": device, **{f"{name}_s": value for name, value in medians.items()}, **ratios}))


if __name__ == "__main__":
    main()
