"""What an ablation leaves in the stream, in every number format: nothing if all writers were found, and something if one was left out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import tiny
import zoo
from heretic.editing.architecture import Architecture, Writer, first_tensor
from heretic.editing.completeness import remainder
from heretic.editing.discovery import discover
from heretic.editing.probe import probe_tokens

FORMATS = [torch.float32, torch.bfloat16, torch.float16]
# One of each kind of structure; test_coverage.py has all others, in the format that most models are stored in.
SAMPLE = ("llama", "gpt2", "gemma3_text", "gpt_oss", "qwen3_moe", "falcon_h1", "nemotron_h", "deepseek_v3", "gemma4_text", "phimoe")


def working(model: Any, architecture: Architecture) -> list[Writer]:
    """Writers that give something else than zeros for the probe's tokens: experts that none of them is sent to do not."""
    found: set[nn.Module] = set()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if bool(first_tensor(output).any()):
            found.add(module)

    handles = [writer.module.register_forward_hook(note) for writer in architecture.writers]
    tokens = probe_tokens(model)
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    for handle in handles:
        handle.remove()
    return [writer for writer in architecture.writers if writer.module in found]


def without(architecture: Architecture, writer: Writer) -> Architecture:
    return replace(architecture, writers=tuple(other for other in architecture.writers if other is not writer))


def check_that_every_writer_counts(model: Any, formats: Sequence[torch.dtype]) -> None:
    """In these number formats, to which the model is converted."""
    for dtype in formats:
        model.to(dtype)
        architecture = discover(model)
        left = remainder(model, architecture)
        assert not left.is_missed() and not left.is_inexact(dtype), (dtype, left)
        for writer in working(model, architecture):
            left = remainder(model, without(architecture, writer))
            assert left.is_missed(), (dtype, writer.name, left)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_every_writer_counts_in_every_number_format(model_type: str) -> None:
    check_that_every_writer_counts(zoo.build(model_type), FORMATS)


@pytest.mark.parametrize("dtype", FORMATS)
def test_enormous_channels_do_not_show(dtype: torch.dtype) -> None:
    """As in most trained models: a few channels of the stream are thousands of times larger than the others."""
    model = tiny.build()
    with torch.no_grad():
        model.get_input_embeddings().weight[:, [3, 17]] = 2000.0
    model.to(dtype)
    architecture = discover(model)
    left = remainder(model, architecture)
    assert not left.is_missed() and not left.is_inexact(dtype)
    for writer in architecture.writers:
        assert remainder(model, without(architecture, writer)).is_missed(), writer.name


@pytest.mark.parametrize("model_type", [t for t in ("doge", "openai-gpt", "minimax", "rwkv") if t in zoo.TYPES])
@pytest.mark.parametrize("dtype", FORMATS)
def test_what_edits_cannot_follow_shows(model_type: str, dtype: torch.dtype) -> None:
    model = zoo.build(model_type).to(dtype)
    assert remainder(model, discover(model)).is_inexact(dtype)
