"""Conversations as the text that a model continues, and its answers as they come."""

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import TextStreamer

from ..errors import ModelError
from ..prompts import Message
from ..utils import Progress, first_line

# Texts of the system and of the user that no template contains by itself.
SYSTEM_PROBE, USER_PROBE = "You know a lot about bread.", "How warm is the oven?"


class ChatTemplate:
    """A tokenizer's chat template, and a fallback if it rejects system messages, takes lists of parts instead of text, or does not exist.

    Raises `ModelError` for a template that leaves out what the user says.
    """

    def __init__(self, tokenizer: Any, progress: Progress) -> None:
        self.tokenizer = tokenizer
        self.exists = getattr(tokenizer, "chat_template", None) is not None
        self.takes_parts, self.takes_system = False, True
        if not self.exists:
            progress.warning(
                "This model has no chat template: prompts are passed as plain text after the system prompt. "
                "Base models rarely refuse; an instruction-tuned model should have a template."
            )
            return
        failures = []
        for self.takes_parts, self.takes_system in ((False, True), (False, False), (True, True), (True, False)):
            if (failure := self._failure()) is None:
                break
            failures.append(failure)
        else:
            raise ModelError(
                f"The chat template {failures[1]}, and also if that is given as a list of parts. "
                "Put one that works into the model's folder, as chat_template.jinja."
            )
        if not self.takes_system:
            progress.message("The chat template takes no system messages; the system prompt is put before the user's text.")

    def _failure(self) -> str | None:
        """What is wrong if a system message and the user's are rendered; None if all that is said is there."""
        try:
            text = self.render([{"role": "system", "content": SYSTEM_PROBE}, {"role": "user", "content": USER_PROBE}])
        except (TemplateError, TypeError, ValueError) as error:  # a template's own text and a list cannot be added
            return f"cannot render the user's message ({first_line(error)})"
        return None if SYSTEM_PROBE in text and USER_PROBE in text else "leaves out the user's message"

    def _apply(self, messages: Sequence[Message]) -> str:
        given: list[Any] = list(messages)
        if self.takes_parts:
            given = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        text: str = self.tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=False)
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
