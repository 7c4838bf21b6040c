"""A loaded model at work: prompts in; residuals, first-token log-probabilities and responses out, edited or not."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer

from .ablation import Ablation, RowNormalization
from .architecture import Architecture, discover, first_tensor
from .config import Settings
from .editing import AblationHooks
from .errors import ModelError, PromptError, TrialError
from .loading import LoadedModel
from .prompts import Prompt
from .utils import BatchSize, Progress, SilentProgress

Message = dict[str, str]


class Model:
    """A model with its tokenizer, its architecture and, once `use_directions` was called, its ablation hooks.

    `response_prefix` is put after every prompt; evaluation begins behind it.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings, progress: Progress | None = None) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.progress = progress or SilentProgress()
        self.response_prefix = ""
        self.batch_size = BatchSize(settings.batch_size, settings.max_batch_size)
        self.architecture: Architecture = discover(self.model)
        self.hooks: AblationHooks | None = None
        self._template = _ChatTemplate(self.tokenizer, self.progress)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def use_directions(self, directions: Tensor, mode: RowNormalization) -> None:
        """Prepare ablations along `directions (layer + 1, d)`."""
        if self.hooks is not None:
            self.hooks.remove()
        self.hooks = AblationHooks(self.architecture, directions, mode)

    @contextmanager
    def _edited(self, ablation: Ablation | None) -> Iterator[None]:
        if ablation is not None and self.hooks is None:
            raise ValueError("call use_directions first")
        context = nullcontext() if ablation is None or self.hooks is None else self.hooks.active([ablation])
        with torch.inference_mode(), context:
            yield

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as the text the model continues."""
        return self._template.render(messages) + self.response_prefix

    def _render_prompt(self, prompt: Prompt) -> str:
        return self.render(prompt_messages(prompt))

    def _tokenize(self, prompts: Sequence[Prompt]) -> Any:
        texts = [self._render_prompt(prompt) for prompt in prompts]
        batch = self.tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=not self._template.exists, return_token_type_ids=False
        )
        return batch.to(self.device)

    def check_lengths(self, prompts: Sequence[Prompt], setting: str, n_new_tokens: int) -> None:
        """Raise `PromptError` for the first prompt that, with its response, is longer than the model's context."""
        context = getattr(self.loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if context is None:
            return
        texts = [self._render_prompt(prompt) for prompt in prompts]
        for i, ids in enumerate(self.tokenizer(texts, add_special_tokens=not self._template.exists)["input_ids"]):
            if len(ids) + n_new_tokens > context:
                raise PromptError(
                    f"{setting}: prompt {i + 1} has {len(ids)} tokens, which with {n_new_tokens} new ones is more than the model's "
                    f"context of {context}. Shorten it, or lower max_response_length. It begins: {prompts[i].user[:60]!r}"
                )

    def _generate(self, prompts: Sequence[Prompt], **arguments: Any) -> tuple[Any, int]:
        inputs = self._tokenize(prompts)
        output = self.model.generate(**inputs, return_dict_in_generate=True, **arguments)
        return output, inputs["input_ids"].shape[1]

    def _in_batches(self, prompts: Sequence[Prompt], function: Callable[[Sequence[Prompt]], Any], description: str | None) -> Iterator[Any]:
        context = nullcontext(lambda n: None) if description is None else self.progress.task(description, len(prompts))
        with context as advance:
            for result in self.batch_size.batches(prompts, function):
                advance(len(result))
                yield result

    def residuals(self, prompts: Sequence[Prompt], description: str | None = None) -> Iterator[Tensor]:
        """Residual stream at the last prompt position: batches `(prompt, layer + 1, d)` in float32.

        Index 0 is the embedding output, the input of the first layer; index `i + 1` what layer `i` gives, before any final norm.
        Raises `ModelError` where a layer gives something else than one stream of hidden states.
        """
        yield from self._in_batches(prompts, self._residual_batch, description)

    def _residual_batch(self, prompts: Sequence[Prompt]) -> Tensor:
        kept: list[Tensor] = []

        def keep(hidden: Any) -> None:
            if hidden.dim() != 3 or hidden.shape[-1] != self.architecture.hidden_size:
                raise ModelError(f"Layers of this model give hidden states of shape {tuple(hidden.shape)}, not one stream.")
            kept.append(hidden[:, -1].float())

        def before_first(module: Any, args: Any, kwargs: Any) -> None:
            keep(args[0] if args else kwargs["hidden_states"])

        layers = self.architecture.layers
        handles = [layers[0].register_forward_pre_hook(before_first, with_kwargs=True)]
        handles += [layer.register_forward_hook(lambda m, a, output: keep(first_tensor(output))) for layer in layers]
        try:
            with self._edited(None):
                self._generate(prompts, max_new_tokens=1)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([hidden.to(kept[0].device) for hidden in kept], dim=1)

    def first_token_logprobs(self, prompts: Sequence[Prompt], ablation: Ablation | None = None, description: str | None = None) -> Tensor:
        """Log-probabilities `(prompt, vocabulary)` of the first response token, float32, on the model's output device.

        Raises `TrialError` where they are not finite.
        """

        def batch(part: Sequence[Prompt]) -> Tensor:
            output, _ = self._generate(part, max_new_tokens=1, output_logits=True)
            logits = output.logits[0].float()
            if not torch.isfinite(logits).all():
                raise TrialError("the model gives logits that are not finite (NaN or infinite)")
            return torch.log_softmax(logits, dim=-1)

        with self._edited(ablation):
            return torch.cat(list(self._in_batches(prompts, batch, description)))

    def responses(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        ablation: Ablation | None = None,
        is_decided: Callable[[str], bool] | None = None,
        description: str | None = None,
        skip_special_tokens: bool = True,
    ) -> list[str]:
        """Greedy responses, in the order of the prompts. A response that `is_decided` accepts may end there.

        Raises `TrialError` where logits are not finite.
        """

        def batch(part: Sequence[Prompt]) -> list[str]:
            criteria = _Watch(self.tokenizer, is_decided)
            output, start = self._generate(
                part, max_new_tokens=max_new_tokens, logits_processor=[criteria.check_logits], stopping_criteria=[criteria]
            )
            if not criteria.finite:
                raise TrialError("the model gives logits that are not finite (NaN or infinite)")
            return self.tokenizer.batch_decode(output.sequences[:, start:], skip_special_tokens=skip_special_tokens)

        with self._edited(ablation):
            return [response for part in self._in_batches(prompts, batch, description) for response in part]

    def stream_response(
        self, messages: Sequence[Message], max_new_tokens: int, ablation: Ablation | None, write: Callable[[str], None]
    ) -> str:
        """Answer a conversation, handing each piece of text to `write` as it comes; returns the whole answer."""
        text = self.render(messages)
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=not self._template.exists).to(self.device)
        inputs.pop("token_type_ids", None)
        streamer = _CallbackStreamer(self.tokenizer, write)
        with self._edited(ablation):
            self.model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer)
        return "".join(streamer.pieces)


def prompt_messages(prompt: Prompt) -> list[Message]:
    """The conversation that a prompt begins; without a system message where the system prompt is empty."""
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": prompt.user}]


class _ChatTemplate:
    """The tokenizer's chat template, and what to do where it refuses a system message or does not exist."""

    def __init__(self, tokenizer: Any, progress: Progress) -> None:
        self.tokenizer = tokenizer
        self.exists = getattr(tokenizer, "chat_template", None) is not None
        self.takes_system = True
        if not self.exists:
            progress.warning(
                "This model has no chat template: prompts are given as plain text, the system prompt before them. "
                "Base models seldom refuse; an instruction-tuned one should have a template."
            )
            return
        user = {"role": "user", "content": "Hello"}
        try:
            self._apply([{"role": "system", "content": "Hello"}, user])
        except TemplateError:
            self.takes_system = False
            progress.message("The chat template takes no system message; the system prompt is put before the user's text.")

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


class _Watch(StoppingCriteria):
    """Ends rows whose verdict cannot change, and notes logits that are not finite."""

    def __init__(self, tokenizer: Any, is_decided: Callable[[str], bool] | None) -> None:
        self.tokenizer = tokenizer
        self.is_decided = is_decided
        self.start: int | None = None
        self._all_finite: Tensor | None = None

    @property
    def finite(self) -> bool:
        return self._all_finite is None or bool(self._all_finite)

    def check_logits(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = torch.isfinite(scores).all()
        self._all_finite = finite if self._all_finite is None else self._all_finite & finite
        return scores

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if self.start is None:
            self.start = input_ids.shape[1] - 1
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.is_decided is not None:
            texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
            done |= torch.tensor([self.is_decided(text) for text in texts], device=input_ids.device)
        return done


class _CallbackStreamer(TextStreamer):
    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self.write(text)
