"""What transformers offers for decoding many rows, against the own loop: the demonstration model, its harmful evaluation prompts.

CPU seconds for all responses to full length (end tokens still end rows), alternating in one process, the fastest of several rounds.
`generate` with its growing cache, `generate` with a static cache, `generate_batch` (continuous batching over pages), and the own pool.

    uv run python bench/transformers_decoding.py --threads 1

The last line is one JSON object with seconds and with the share of responses that are those of `generate`.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from heretic.decoding.rows import Row, left_padded
from heretic.model import Model
from search_quality import demo_evaluator

Responses = list[list[int]]


def own(model: Model, rows: Sequence[Row], length: int) -> Responses:
    """The pool decoder, without what one trial can take over from another."""
    fresh = [Row(0, row.tokens, row.prompt) for row in rows]
    done = list(model.responses_of_trials(fresh, length, []))
    return [row.generated for row in sorted(done, key=lambda row: row.prompt)]


def by_generate(model: Model, rows: Sequence[Row], length: int, **arguments: Any) -> Responses:
    """One batch of all prompts."""
    tokens, mask = left_padded([row.tokens for row in rows])
    with torch.inference_mode():
        output = model.model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=length, **arguments)
    return [cut(ids, model) for ids in output[:, tokens.shape[1] :].tolist()]


def by_generate_batch(model: Model, rows: Sequence[Row], length: int) -> Responses:
    """Continuous batching over pages."""
    end = model.model.generation_config.eos_token_id
    config = GenerationConfig(do_sample=False, max_new_tokens=length, eos_token_id=end, pad_token_id=model.tokenizer.pad_token_id)
    pages = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=4096, page_size=32)
    with torch.inference_mode():
        outputs = model.model.generate_batch([list(row.tokens) for row in rows], config, pages, warmup=False)
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [cut(by_prompt[tuple(row.tokens)], model) for row in rows]


def cut(tokens: Sequence[int], model: Model) -> list[int]:
    """Tokens before the first end token."""
    ends = [i for i, token in enumerate(tokens) if token in model.decoder.end_tokens]
    return list(tokens[: ends[0]] if ends else tokens)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    _, evaluator = demo_evaluator()
    model = evaluator.model
    rows = model.rows_of(evaluator.bad_prompts, 1)
    ways: dict[str, Callable[[], Responses]] = {
        "generate": lambda: by_generate(model, rows, options.length),
        "generate_static": lambda: by_generate(model, rows, options.length, cache_implementation="static", disable_compile=True),
        "generate_batch": lambda: by_generate_batch(model, rows, options.length),
        "own": lambda: own(model, rows, options.length),
    }
    expected = ways["generate"]()
    seconds: dict[str, float] = {}
    same: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, way in list(ways.items()):
            start = time.process_time()
            try:
                responses = way()
            except Exception as error:  # a way that does not work on this device is part of the outcome
                print(f"{name}: {type(error).__name__}: {error}")
                del ways[name]
                continue
            seconds[name] = min(seconds.get(name, float("inf")), time.process_time() - start)
            same[name] = sum(a == b for a, b in zip(responses, expected, strict=True)) / len(expected)
    tokens = sum(map(len, expected)) / len(expected)
    print(json.dumps({"cpu_s": {name: round(s, 3) for name, s in seconds.items()}, "same": same, "tokens_per_response": tokens}))


if __name__ == "__main__":
    main()
