"""Whether a missed writer of the residual stream is found on a real model, and none is reported that is not missed: in three number
formats, with all writers known, and with every single one left out. A few minutes on one core.

    uv run python bench/missed_writers.py FOLDER/base    # of bench/real_model.py, or any other model

The last line is one JSON object; exit code 1 if anything was missed or reported wrongly.
"""

import argparse
import json
import sys
import time
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from heretic.editing.completeness import CHANNEL_ROUNDING, ROUNDING, remainder
from heretic.editing.discovery import discover


def main() -> None:
    """Measure, print a line for each number format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    path = parser.parse_args().model
    start = time.perf_counter()
    results, is_right = {}, True
    for dtype in ROUNDING:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        architecture = discover(model)
        complete = remainder(model, architecture)
        left = {}
        for writer in architecture.writers:
            others = tuple(other for other in architecture.writers if other is not writer)
            left[writer.name] = remainder(model, replace(architecture, writers=others)).channel
        least = min(left, key=lambda name: left[name])
        unseen = [name for name, share in left.items() if not share > CHANNEL_ROUNDING]
        is_right &= not (unseen or complete.is_missed() or complete.is_inexact(dtype))
        name = str(dtype).removeprefix("torch.")
        results[name] = {
            **{"writers": len(left), "all_known": {"channel": complete.channel, "direction": complete.direction}},
            **{"limits": {"channel": CHANNEL_ROUNDING, "direction": ROUNDING[dtype]}},
            **{"left_out_and_not_seen": unseen, "least": {least: left[least]}},
        }
        print(f"{name}: {results[name]}", flush=True)
        del model
    print(json.dumps({"threads": torch.get_num_threads(), "seconds": round(time.perf_counter() - start), **results}))
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
