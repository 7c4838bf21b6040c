"""Conversations as the text that a model continues, and its answers as they come."""

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import TextStreamer

from ..prompts import Message
from ..utils import Progress


class ChatTemplate:
    """A tokenizer's chat template, and a fallback if it rejects system messages or does not exist."""

    def __init__(self, tokenizer: Any, progress: Progress) -> None:
        self.tokenizer = tokenizer
        self.exists = getattr(tokenizer, "chat_template", None) is not None
        self.takes_system = True
        if not self.exists:
            progress.warning(
                "This model has no chat template: prompts are passed as plain text after the system prompt. "
                "Base models rarely refuse; an instruction-tuned model should have a template."
            )
            return
        user = {"role": "user", "content": "Hello"}
        try:
            self._apply([{"role": "system", "content": "Hello"}, user])
        except TemplateError:
            self.takes_system = False
            progress.message("The chat template rejects system messages; the system prompt is put before the user's text.")

    def _apply(self, messages: Sequence[Message]) -> str:
        text: str = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return text

    def render(self, messages: Sequence[Message]) -> str:
        if not self.exists:
            return "\n\n".join(message["content"] for message in messages) + "\n\n"
        if not self.takes_system and messages[0]["role"] == "system":
            system, first, *rest = messages
            messages = [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]
        return self._apply(messages)


class Streamer(TextStreamer):
    """Hands each piece of an answer to `write` as it comes."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self.write(text)
