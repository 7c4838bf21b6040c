"""The common start of all responses, after which evaluation begins."""

import os.path
from collections.abc import Sequence

from ..config import Settings
from ..model import Model
from ..prompts import Prompt

# Prompts of each kind, and tokens per response, for detecting the common start of all responses.
PREFIX_PROMPTS = 50
PREFIX_TOKENS = 32


def find_response_prefix(model: Model, settings: Settings, good_prompts: Sequence[Prompt], bad_prompts: Sequence[Prompt]) -> str:
    """The common start of all responses (such as the opening of a thinking block); a known thinking block is closed."""
    if settings.response_prefix is not None:
        return settings.response_prefix
    prompts = [*good_prompts[:PREFIX_PROMPTS], *bad_prompts[:PREFIX_PROMPTS]]
    description = "Detecting the common response prefix"
    responses = model.with_response_prefix("").responses(prompts, PREFIX_TOKENS, description=description, skip_special_tokens=False)
    return close_thought(common_prefix(responses), settings.chain_of_thought_skips)


def common_prefix(responses: Sequence[str]) -> str:
    """The longest common start, without trailing blanks; empty if all responses are identical."""
    if len(set(responses)) < 2:
        return ""
    return os.path.commonprefix(list(responses)).rstrip(" ")


def close_thought(prefix: str, skips: Sequence[tuple[str, str]]) -> str:
    """`prefix`, or the closed block of the thinking block that it opens."""
    for opening, closed in skips:
        if prefix.startswith(opening):
            return closed
    return prefix
