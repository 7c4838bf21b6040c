"""The pool decoder against transformers' own `generate`, one prompt at a time, without padding."""

import random
from typing import Any

import pytest
import torch

import tiny
from heretic.decoding import pool
from heretic.decoding.decoder import Decoder, supports
from heretic.decoding.plain import PlainDecoder
from heretic.decoding.rows import Row, TextWatch

LENGTH = 30
TYPES = [
    ("llama", {}),
    ("qwen2", {}),
    ("mistral", {"sliding_window": 16}),
    ("gemma2", {"sliding_window": 24}),
    ("gemma3_text", {"sliding_window": 24}),
    ("phi", {}),
]


def random_prompts(n: int = 17) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(6, 30) for _ in range(generator.randrange(3, 20))] for _ in range(n)]


def by_generate(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[0, len(prompt) :].tolist()
    return (tokens[: tokens.index(2)] if 2 in tokens else tokens), output.logits[0][0]


def make(model: Any, kind: type, rows_per_trial: int = 128) -> Any:
    return kind(model, frozenset([2]), rows_per_trial, lambda trials: None)


def decoded(decoder: Any, prompts: list[list[int]], **arguments: Any) -> dict[int, list[int]]:
    rows = [Row(0, prompt, i) for i, prompt in enumerate(prompts)]
    with torch.inference_mode():
        return {row.prompt: row.generated for row in decoder.run(rows, LENGTH, lambda row: False, **arguments)}


@pytest.mark.parametrize(("model_type", "changes"), TYPES)
def test_responses_and_logits_are_those_of_generate(model_type: str, changes: dict[str, Any]) -> None:
    # In float32 two tokens may tie up to rounding. Gemma 2's attention cannot mask padding in float64.
    model = tiny.build(model_type, torch.float32 if model_type == "gemma2" else torch.float64, **changes)
    prompts = random_prompts()
    expected = [by_generate(model, prompt) for prompt in prompts]
    assert len({len(tokens) for tokens, _ in expected}) > 1 or model_type in ("gemma2", "gemma3_text")  # rows leave at different times
    assert supports(model)
    for decoder in (make(model, Decoder), make(model, Decoder, rows_per_trial=5), make(model, PlainDecoder, rows_per_trial=5)):
        with torch.inference_mode():
            parts = list(decoder.first_logits([Row(0, prompt, i) for i, prompt in enumerate(prompts)]))
        order = [row.prompt for rows, _ in parts for row in rows]
        assert sorted(order) == list(range(len(prompts)))
        torch.testing.assert_close(
            torch.cat([logits for _, logits in parts]), torch.stack([expected[i][1] for i in order]), check_dtype=False
        )
        assert decoded(decoder, prompts) == {i: tokens for i, (tokens, _) in enumerate(expected)}


def test_windows_that_the_cache_does_not_have() -> None:
    """GPT-Neo's layers count columns by themselves: a gap between what all prompts begin with and the rest of one would be counted."""
    model = tiny.build("gpt_neo", attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4, window_size=24)
    prompts = [[5, 6, 7, 8, 9, *prompt] for prompt in random_prompts()]
    decoder = make(model, Decoder)
    assert decoded(decoder, prompts) == {i: by_generate(model, prompt)[0] for i, prompt in enumerate(prompts)}
    with torch.inference_mode():
        for rows, logits in decoder.first_logits([Row(0, prompt) for prompt in prompts]):
            expected = torch.cat([model(torch.tensor([row.tokens])).logits[:, -1] for row in rows])
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert decoder.window == 0  # nor may rows be packed


def test_columns_are_forgotten_when_the_block_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """With hardly any slack and few rows at a time, rows that follow share blocks that have to be shifted again and again."""
    monkeypatch.setattr(pool, "SLACK_COLUMNS", 2)
    model, prompts = tiny.build(dtype=torch.float64), random_prompts(40)
    shifts = []
    shift = pool.Pool._shift
    monkeypatch.setattr(pool.Pool, "_shift", lambda self: (shifts.append(1), shift(self))[1])
    assert decoded(make(model, Decoder, 3), prompts) == {i: by_generate(model, prompt)[0] for i, prompt in enumerate(prompts)}
    assert shifts


def test_running_out_of_memory_halves_the_rows_and_changes_nothing() -> None:
    model, prompts = tiny.build(), random_prompts()
    expected = {i: by_generate(model, prompt)[0] for i, prompt in enumerate(prompts)}

    def fail_above_five_rows(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    handle = model.register_forward_pre_hook(fail_above_five_rows, with_kwargs=True)
    decoder = make(model, Decoder)
    assert decoded(decoder, prompts) == expected
    handle.remove()

    seen = 0

    def fail_in_a_step(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal seen
        one_token = kwargs["input_ids"].shape[1] == 1
        seen += one_token
        if one_token and seen == 5:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    model.register_forward_pre_hook(fail_in_a_step, with_kwargs=True)
    decoder = make(model, Decoder)
    assert decoded(decoder, prompts) == expected
    assert decoder.max_rows is not None  # remembered
    assert decoder.max_rows <= len(prompts) // 2


def test_memory_that_runs_out_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are nearly finished are prefilled together with others that have yet to begin."""
    monkeypatch.setattr(pool, "SLACK_COLUMNS", 2)
    model = tiny.build(dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # no response ends by itself
    prompts = [[5, 6, 7, 8, 9, 10, *prompt] for prompt in random_prompts()]
    expected = {i: by_generate(model, prompt)[0] for i, prompt in enumerate(prompts)}
    seen = 0

    def fail_in_a_late_step(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal seen
        seen += kwargs["input_ids"].shape[1] == 1
        if seen == LENGTH - 4:
            seen += 1
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    model.register_forward_pre_hook(fail_in_a_late_step, with_kwargs=True)
    assert decoded(make(model, Decoder, 5), prompts) == expected
    assert seen > LENGTH


def test_a_single_row_that_does_not_fit_is_an_error() -> None:
    model = tiny.build()

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        decoded(make(model, Decoder), random_prompts(4))


def test_rows_of_cancelled_trials_are_dropped() -> None:
    model, prompts = tiny.build(), random_prompts()
    rows = [Row(i % 2, prompt, i) for i, prompt in enumerate(prompts)]
    cancelled: set[int] = set()
    done = []
    with torch.inference_mode():
        for row in make(model, Decoder, 3).run(rows, LENGTH, lambda row: False, cancelled):
            done.append(row)
            cancelled.add(1)
    assert [row.prompt for row in rows if row.trial == 0] == sorted(row.prompt for row in done if row.trial == 0)
    assert sum(row.trial == 1 for row in done) <= 3  # what was finished in the very step that cancelled it


def test_rows_of_several_trials_are_told_apart() -> None:
    """Before every pass the decoder says which trial each row belongs to, whatever left or moved in between."""
    model, prompts = tiny.build(), random_prompts(20)
    assigned: list[list[int]] = []
    decoder = Decoder(model, frozenset([2]), 4, assigned.append)
    passes: list[tuple[int, list[int]]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        passes.append((len(kwargs["input_ids"]), assigned[-1]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    rows = [Row(i % 3, prompt, i) for i, prompt in enumerate(prompts)]
    with torch.inference_mode():
        assert len(list(decoder.run(rows, LENGTH, lambda row: False))) == len(rows)
    assert all(n == len(trials) for n, trials in passes)


def test_a_row_of_logits_that_are_not_finite_is_given_back_marked() -> None:
    model = tiny.build()
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with torch.inference_mode():
        (row,) = make(model, Decoder).run([Row(0, [7, 8])], LENGTH, lambda row: False)
    assert not row.finite
    assert row.generated == []


def test_state_space_models_are_left_to_generate() -> None:
    model = tiny.build("mamba", state_size=4, num_hidden_layers=2)
    assert not supports(model)


def test_text_watch_asks_after_each_token_and_confirms_on_the_whole() -> None:
    tokenizer = tiny.tokenizer()
    asked: list[str] = []

    def is_decided(text: str) -> bool:
        asked.append(text)
        return "sorry yes" in text

    watch = TextWatch(tokenizer, is_decided)
    row = Row(0, [])
    for token in tokenizer.encode("the cat sat on the mat sorry yes no", add_special_tokens=False):
        row.generated.append(token)
        if watch(row):
            break
    assert tokenizer.decode(row.generated) == "the cat sat on the mat sorry yes"
    assert len(asked) == len(row.generated) + 1 and asked[-1] == "the cat sat on the mat sorry yes"
    assert [text.split() for text in asked[:-1]] == [asked[-1].split()[:n] for n in range(1, len(row.generated) + 1)]
