"""What a decode step and a prefill ask of the host: synchronizations with the device, and operations launched.

    uv run python bench/host_syncs.py

Counted on the emulated device of the tests, so no accelerator is needed; nothing is timed. The model is a small Llama with random weights.
`launches_per_layer` is the difference between models of 6 and of 3 layers, by 3. `plain` is transformers' own forward pass with a static
cache, one row. `divergences` is the pass without the making of the maps, which is counted as `maps`. The last line is one JSON object.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny
from emulated import Counts, Emulation
from heretic.decoding.decoder import Decoder
from heretic.decoding.pool import Pool
from heretic.editing.ablation import Ablation, ComponentParameters
from heretic.editing.hooks import AblationHooks
from heretic.model import Model
from heretic.prompts import Prompt
from heretic.scoring.divergence import OriginalAnswers

LAYERS = (3, 6)
PROMPTS = ["how do i bake bread", "fix my bike", "hello cat", "the dog sat on the mat and the cat", "you are helpful"]
NEW_TOKENS = 8
# Mode, trials in a pass, and prompts of each.
CASES = [("none", 1, 5), ("none", 4, 5), ("none", 4, 20), ("full", 1, 5), ("full", 4, 5), ("full", 4, 20)]


class PerCall:
    """Counts of every call of a function."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self.calls: list[tuple[Counter[str], Counter[str]]] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            waits, launches = self.counts.waits.copy(), self.counts.launches.copy()
            result = function(*args, **kwargs)
            self.calls.append((self.counts.waits - waits, self.counts.launches - launches))
            return result

        return counted

    def most(self) -> dict[str, Any]:
        """The call with most synchronizations, of those the one with most launches."""
        waits, launches = max(self.calls, key=lambda call: (call[0].total(), call[1].total()))
        return {"calls": len(self.calls), "waits": waits.total(), "launches": launches.total(), "waits_at": dict(waits)}


@contextmanager
def counted(owner: Any, name: str, per_call: PerCall) -> Iterator[None]:
    """Within, calls of a method are counted."""
    original = getattr(owner, name)
    setattr(owner, name, per_call.around(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def ablation(strength: float) -> Ablation:
    """An edit of every layer."""
    kernel = ComponentParameters(strength, 1.0, strength, 1.0)
    return Ablation(0.5, {"attn.o_proj": kernel, "mlp.down_proj": kernel})


def measure(n_layers: int, mode: Any, n_trials: int, n_prompts: int, dtype: str) -> dict[str, dict[str, Any]]:
    """Counts of the decode step, the prefill and the pass for divergences that ask most."""
    with tempfile.TemporaryDirectory() as folder, Emulation() as emulation:
        tiny.save(Path(folder), tiny.build(num_hidden_layers=n_layers, dtype=getattr(torch, dtype)))
        model: Model = tiny.load(folder, dtypes=[dtype], device_map={"": 0})
        model.use_directions(tiny.unit_directions(n_layers + 1, 32).float(), mode)
        prompts = [Prompt("", PROMPTS[i % len(PROMPTS)]) for i in range(n_prompts)]
        answers = OriginalAnswers(model, prompts, 4)
        answers.record(model)
        trials = [ablation(0.5 + i / n_trials) for i in range(n_trials)]
        parts = {
            "decode step": (Pool, "_step"),
            "prefill": (Decoder, "prefill"),
            "divergences": (OriginalAnswers, "divergences"),
            "maps": (AblationHooks, "_make_maps"),
        }
        found = {}
        for part, (owner, name) in parts.items():
            per_call = PerCall(emulation.counts)
            with counted(owner, name, per_call):
                if part in ("divergences", "maps"):
                    answers.divergences(model, trials)
                else:
                    list(model.responses_of_trials(model.rows_of(prompts, n_trials), NEW_TOKENS, trials, is_decided=lambda text: False))
            found[part] = per_call.most()
        # Maps are made once for all passes of a batch of trials.
        found["divergences"]["launches"] -= found["maps"]["launches"]
        return found


def plain(n_layers: int, dtype: str) -> int:
    """Launches of a step of transformers' own forward pass with a static cache."""
    with Emulation() as emulation, torch.inference_mode():
        model = tiny.build(num_hidden_layers=n_layers, dtype=getattr(torch, dtype)).to("cuda:0")
        cache = StaticCache(config=model.config, max_cache_len=32)
        ids = torch.ones(1, 5, dtype=torch.long, device="cuda:0")
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        emulation.counts.clear()
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        return emulation.counts.launches.total()


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--where", action="store_true", help="also print where synchronizations come from")
    options = parser.parse_args()
    few, many = LAYERS
    plain_per_layer = (plain(many, options.dtype) - plain(few, options.dtype)) / (many - few)
    result: dict[str, Any] = {"dtype": options.dtype, "plain_launches_per_layer": plain_per_layer}
    for mode, n_trials, n_prompts in CASES:
        small, large = (measure(n, mode, n_trials, n_prompts, options.dtype) for n in LAYERS)
        for part, own in large.items():
            if options.where:
                print(mode, n_trials, n_prompts, part, own["waits_at"])
            per_layer = (own["launches"] - small[part]["launches"]) / (many - few)
            result[f"{part}, {mode}, {n_trials} trials, {n_prompts} prompts"] = {
                "waits": own["waits"],
                "waits_more_layers": own["waits"] - small[part]["waits"],
                "launches": own["launches"],
                "launches_per_layer": round(per_layer, 2),
                "times_plain": round(per_layer / plain_per_layer, 2),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
