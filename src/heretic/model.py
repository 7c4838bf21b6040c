"""Runs a loaded model: residuals, first-token log-probabilities and responses of prompts, with or without edits."""

import copy
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .config import Settings
from .decoding.chat import ChatTemplate, Streamer
from .decoding.compiled import CompiledStep, is_supported
from .decoding.decoder import Decoder, Optimizations
from .decoding.packed import packed_logits
from .decoding.plain import PlainDecoder
from .decoding.prefix_cache import PrefixCache
from .decoding.rows import Row, TextWatch, decoded, padded_on
from .decoding.selfcheck import choose_decoder, packs_well, resumes_well
from .device import input_device, upload
from .editing.ablation import Ablation, RowNormalization
from .editing.architecture import Architecture, Writer, split_experts
from .editing.discovery import discover
from .editing.hooks import AblationHooks, batches_trials
from .editing.residuals import recorded_residuals
from .errors import ModelError, PromptError, TrialError
from .loading.load import LoadedModel
from .prompts import Message, Prompt, prompt_messages
from .utils import Progress, SilentProgress

NOT_FINITE = "the model returned logits that are not finite (NaN or infinite)"


def read_output_weight_once(model: PreTrainedModel) -> None:
    """Make the inputs of the output embeddings contiguous.

    The last positions of padded rows are not, and PyTorch multiplies those by a copy of the whole weight for each row.
    """
    if (module := model.get_output_embeddings()) is not None:
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(), *inputs[1:]) if inputs else None)


def _special_tags(tokenizer: Any, skips: Sequence[tuple[str, str]]) -> frozenset[int]:
    """The opening and closing tags of thinking blocks that are special tokens of a tokenizer."""
    tags = {tag for opening, closed in skips for tag in (opening, closed.removeprefix(opening).strip())}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(number for number, token in added.items() if token.special and token.content in tags)


class Model:
    """A model with its tokenizer, its architecture and, once `use_directions` was called, its ablation hooks.

    `response_prefix` is appended to every prompt; evaluation begins after it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: Settings,
        progress: Progress | None = None,
        optimizations: Optimizations | None = None,
        response_prefix: str = "",
    ) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.progress = progress or SilentProgress()
        self._response_prefix = response_prefix
        read_output_weight_once(self.model)
        found = discover(self.model)
        self.architecture: Architecture = split_experts(found) if settings.split_experts else found
        self.hooks: AblationHooks | None = None
        rows_per_trial = settings.batch_size or settings.max_batch_size
        self.decoder = choose_decoder(self.model, self.tokenizer, rows_per_trial, self.progress, optimizations or Optimizations())
        self._compiles = settings.compile_decoding and self._can_compile()
        self._template = ChatTemplate(self.tokenizer, self.progress)
        self._special_tags = _special_tags(self.tokenizer, settings.chain_of_thought_skips)
        self._ids: dict[tuple[str, tuple[Prompt, ...]], list[list[int]]] = {}

    def _can_compile(self) -> bool:
        """Whether decode steps can be compiled; if not, a warning says why."""
        if not is_supported():
            why = f"with PyTorch {torch.__version__}: it needs a later version"
        elif not (isinstance(self.decoder, Decoder) and self.decoder.can_compile):
            why = "on this model: it needs SDPA attention without sliding windows, and one device"
        else:
            return True
        self.progress.warning(f"compile_decoding has no effect {why}.")
        return False

    @property
    def response_prefix(self) -> str:
        """Text appended to every prompt, with which responses begin."""
        return self._response_prefix

    def with_response_prefix(self, prefix: str) -> "Model":
        """The same loaded model with another response prefix. Current directions are kept; ones set later are not shared."""
        other = copy.copy(self)
        other._response_prefix = prefix
        return other

    @property
    def device(self) -> torch.device:
        """The device of token ids."""
        return input_device(self.model)

    @property
    def context_length(self) -> int | None:
        """The model's context length in tokens, if its configuration has it."""
        length: int | None = getattr(self.loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return length

    def use_directions(self, directions: Tensor, mode: RowNormalization) -> None:
        """Prepare ablations along `directions (layer + 1, d)`."""
        if self.hooks is not None:
            self.hooks.remove()
        self.hooks = AblationHooks(self.architecture, directions, mode)
        self.decoder.assign_rows = self.hooks.assign_rows
        if self._compiles and isinstance(self.decoder, Decoder):
            self.hooks.is_uniform = True
            self.decoder.compiled = CompiledStep(self.model, self.progress.warning)

    @property
    def _used_hooks(self) -> AblationHooks:
        if self.hooks is None:
            raise ValueError("call use_directions first")
        return self.hooks

    @property
    def directions(self) -> Tensor:
        """The directions `(layer + 1, d)` that were given by `use_directions`."""
        return self._used_hooks.directions

    def edits(self, ablation: Ablation) -> Iterator[tuple[Writer, Tensor, float]]:
        """Every writer that `ablation` edits, with the direction `(d,)` and the strength."""
        return self._used_hooks.edits(ablation)

    @property
    def batches_trials(self) -> bool:
        """Whether several ablations may be computed together."""
        return self.hooks is None or batches_trials(self.architecture, self.hooks.mode)

    @contextmanager
    def _edited(self, ablations: Sequence[Ablation]) -> Iterator[None]:
        context = self._used_hooks.active(ablations) if ablations else nullcontext()
        self.decoder.first_layers = [self.hooks.first_layer(a) for a in ablations] if self.hooks is not None else []
        with torch.inference_mode(), context:
            yield

    @contextmanager
    def edited(self, ablation: Ablation | None) -> Iterator[PreTrainedModel]:
        """Context in which the model itself is edited (None: unedited), for code that calls it without this class."""
        with self._edited([] if ablation is None else [ablation]):
            yield self.model

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """The recorded passes of the original that trials start from; set for the prompts that are scored."""
        return self.decoder.prefix_cache if isinstance(self.decoder, Decoder) else None

    @prefix_cache.setter
    def prefix_cache(self, prefix_cache: PrefixCache | None) -> None:
        if isinstance(self.decoder, Decoder):
            self.decoder.prefix_cache = prefix_cache

    @contextmanager
    def recording_prefix_cache(self) -> Iterator[None]:
        """Context in which passes of the original are recorded, so that trials on the same prompts can reuse unedited layers."""
        if (
            not isinstance(self.decoder, Decoder)
            or not self.decoder.optimizations.prefix_cache
            or not resumes_well(self.decoder, self.architecture)
        ):
            yield
            return
        bytes_per_token = self.architecture.hidden_size * self.model.dtype.itemsize
        self.decoder.prefix_cache = PrefixCache(self.architecture.layers, bytes_per_token, self.device)
        self.decoder.prefix_cache.recording = True
        try:
            yield
        finally:
            self.decoder.prefix_cache.recording = False

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as the text the model continues."""
        return self._template.render(messages) + self._response_prefix

    def _render_prompt(self, prompt: Prompt) -> str:
        return self.render(prompt_messages(prompt))

    def _token_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of the rendered prompts, cached since they are the same in every trial."""
        key = (self._response_prefix, tuple(prompts))
        if key not in self._ids:
            texts = [self._render_prompt(prompt) for prompt in prompts]
            self._ids[key] = self.tokenizer(texts, add_special_tokens=not self._template.exists)["input_ids"]
        return self._ids[key]

    def rows_of(self, prompts: Sequence[Prompt], n_trials: int) -> list[Row]:
        """A row for every combination of prompt and trial, trial after trial."""
        ids = self._token_ids(prompts)
        return [Row(trial, ids[i], i) for trial in range(n_trials) for i in range(len(prompts))]

    def check_lengths(self, prompts: Sequence[Prompt], setting: str, n_new_tokens: int, remedy: str = "max_response_length") -> None:
        """Raise `PromptError` for the first prompt that, with its response, exceeds the model's context length.

        `remedy` is the setting that limits the response; empty: none does.
        """
        context = self.context_length
        if context is None:
            return
        for i, ids in enumerate(self._token_ids(prompts)):
            if len(ids) + n_new_tokens > context:
                lower = f", or decrease {remedy}" if remedy and n_new_tokens > 1 else ""
                raise PromptError(
                    f"{setting}: prompt {i + 1} has {len(ids)} tokens, which with {n_new_tokens} new ones exceeds the model's "
                    f"context length of {context}. Shorten it{lower}. It begins: {prompts[i].user[:60]!r}"
                )

    @contextmanager
    def _task(self, description: str | None, total: int) -> Iterator[Callable[[int], None]]:
        if description is None:
            yield lambda n: None
        else:
            with self.progress.task(description, total) as advance:
                yield advance

    def residuals(self, prompts: Sequence[Prompt], description: str | None = None) -> Iterator[Tensor]:
        """Residual stream at the last prompt position: batches `(prompt, layer + 1, d)` in float32, in the order of the prompts.

        What is at which index: `recorded_residuals`.
        """
        with self._edited([]), self._task(description, len(prompts)) as advance, recorded_residuals(self.architecture) as latest:
            for part, _ in self.decoder.first_logits(self.rows_of(prompts, 1), in_order=True):
                advance(len(part))
                yield latest()

    def first_token_logprobs(self, prompts: Sequence[Prompt], ablation: Ablation | None = None, description: str | None = None) -> Tensor:
        """Log-probabilities `(prompt, vocabulary)` of the first response token, float32. Raises `TrialError` if not finite."""
        rows: list[Row] = []
        batches = []
        for part, batch in self.logprobs_of_trials(prompts, [] if ablation is None else [ablation], description):
            rows += part
            batches.append(batch)
        logprobs = torch.cat(batches)[sorted(range(len(rows)), key=lambda i: rows[i].prompt)]
        if not torch.isfinite(logprobs).all():
            raise TrialError(NOT_FINITE)
        return logprobs

    def logprobs_of_trials(
        self, prompts: Sequence[Prompt], ablations: Sequence[Ablation], description: str | None = None
    ) -> Iterator[tuple[list[Row], Tensor]]:
        """Log-probabilities of the first response token of every prompt under every ablation (none: the original).

        Yields rows (with trial and prompt) and their log-probabilities `(row, vocabulary)` in float32, in any order.
        """
        rows = self.rows_of(prompts, max(1, len(ablations)))
        with self._edited(ablations), self._task(description, len(rows)) as advance:
            for part, logits in self.decoder.first_logits(rows):
                advance(len(part))
                yield part, torch.log_softmax(logits.float(), dim=-1)

    def logits_along(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], ablations: Sequence[Ablation], description: str | None = None
    ) -> Iterator[tuple[list[Row], Tensor]]:
        """Logits at the last token of every prompt and at each token of its given response (token ids), under every ablation.

        Yields rows, and `(sum of response lengths + 1, vocabulary)` in the model's dtype, row after row.
        """
        rows = self.rows_of(prompts, max(1, len(ablations)))
        for row in rows:
            row.tokens = [*row.tokens, *answers[row.prompt]]
        n = max(map(len, answers)) + 1
        with self._edited(ablations), self._task(description, len(rows)) as advance:
            for part, logits in self.decoder.last_logits(rows, n):
                advance(len(part))
                width = logits.shape[1]  # a prompt with its response can be shorter than the longest response
                lengths = [len(answers[row.prompt]) + 1 for row in part]
                asked = torch.tensor([(i, j) for i, length in enumerate(lengths) for j in range(width - length, width)])
                yield part, logits[upload(asked.T, logits.device).unbind()]

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

        Raises `TrialError` if logits are not finite.
        """
        texts = [""] * len(prompts)
        rows = self.rows_of(prompts, 1)
        for row in self.responses_of_trials(rows, max_new_tokens, [] if ablation is None else [ablation], is_decided, description):
            if not row.finite:
                raise TrialError(NOT_FINITE)
            texts[row.prompt] = self.text_of(row.generated) if skip_special_tokens else self.tokenizer.decode(row.generated)
        return texts

    def responses_by_trial(
        self, prompts: Sequence[Prompt], max_new_tokens: int, ablations: Sequence[Ablation], description: str | None = None
    ) -> list[list[str | None]]:
        """Greedy responses of every ablation (none: the original) to each prompt; None if logits are not finite."""
        if len(ablations) > 1 and not self.batches_trials:
            return [self.responses_by_trial(prompts, max_new_tokens, [ablation], description)[0] for ablation in ablations]
        n_trials = max(1, len(ablations))
        texts: list[list[str | None]] = [[None] * len(prompts) for _ in range(n_trials)]
        for row in self.responses_of_trials(self.rows_of(prompts, n_trials), max_new_tokens, ablations, description=description):
            if row.finite:
                texts[row.trial][row.prompt] = self.text_of(row.generated)
        return texts

    def responses_of_trials(
        self,
        rows: Sequence[Row],
        max_new_tokens: int,
        ablations: Sequence[Ablation],
        is_decided: Callable[[str], bool] | None = None,
        description: str | None = None,
        cancelled: Set[int] = frozenset(),
    ) -> Iterator[Row]:
        """Greedy responses to `rows` (from `rows_of`, with these ablations; none: the original), in the order they finish.

        Trials that are added to `cancelled` meanwhile are dropped.
        """
        is_finished = (lambda row: False) if is_decided is None else TextWatch(self.tokenizer, is_decided, self._special_tags)
        with self._edited(ablations), self._task(description, len(rows)) as advance:
            for row in self.decoder.run(rows, max_new_tokens, is_finished, cancelled):
                advance(1)
                yield row

    @property
    def pads(self) -> bool:
        """Whether rows of different lengths may share a pass of `logits_at_end`."""
        return isinstance(self.decoder, Decoder)

    def logits_at_end(self, rows: Sequence[Sequence[int]], n: int) -> Tensor:
        """Logits `(row, n, vocabulary)` at the last `n` tokens of each row of token ids, in one pass. Gradients flow if they are enabled.

        Padding before shorter rows is masked. Hooks are not changed: without an active edit this is the original.
        """
        if isinstance(self.decoder, PlainDecoder):
            return self.decoder.logits_at_end(rows, n)
        return self.decoder.forward(*padded_on(self.device, rows), None, n)

    @cached_property
    def packed_length(self) -> int:
        """How long rows may be that are packed into one sequence; 0 if that does not work. Asked first while no edit is active."""
        return self.decoder.window if isinstance(self.decoder, Decoder) and packs_well(self.model, self.tokenizer) else 0

    def packed_logits(self, rows: Sequence[Sequence[int]], counts: Sequence[int], by_row: bool) -> list[Tensor]:
        """Logits `(n, vocabulary)` at the last `counts[i]` tokens of each row, none longer than `packed_length`, in one pass."""
        return packed_logits(self.model, rows, counts, by_row)

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of a response, without special tokens other than tags of thinking blocks."""
        return decoded(self.tokenizer, tokens, self._special_tags)

    def stream_response(
        self, messages: Sequence[Message], max_new_tokens: int, ablation: Ablation | None, write: Callable[[str], None]
    ) -> str:
        """Generate a response to a conversation, passing each piece of text to `write`. Returns the full response.

        Raises `ModelError` if the conversation fills the model's context.
        """
        text = self.render(messages)
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=not self._template.exists)
        inputs.pop("token_type_ids", None)
        if self.context_length is not None:
            max_new_tokens = min(max_new_tokens, self.context_length - inputs["input_ids"].shape[1])
            if max_new_tokens < 1:
                raise ModelError(f"The conversation fills the model's context of {self.context_length} tokens. Start a new one.")
        streamer = Streamer(self.tokenizer, write)
        with self._edited([] if ablation is None else [ablation]):
            cast(Any, self.model).generate(**inputs.to(self.device), max_new_tokens=max_new_tokens, streamer=streamer)
        return "".join(streamer.pieces)
