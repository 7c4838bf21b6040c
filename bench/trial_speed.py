"""Seconds per trial: (a) the way the field does it against (b) this program, alternating in one process.

(a) One trial at a time: a rank-3 LoRA through PEFT, made by a randomized SVD (`torch.svd_lowrank`, q = 10, niter = 6) of every edited
weight's change; `generate` for all harmful evaluation prompts to full length in the best power-of-two batch; `generate` of one token for
the KL divergence. (b) Output maps, `--trials-per-batch` trials in one pass. Same prompts, same trials, and the verdicts are compared.

    uv run python bench/trial_speed.py                       # the demonstration model
    uv run python bench/trial_speed.py --model path/to/model --good g.txt --bad b.txt
    uv run python bench/trial_speed.py --model llama-140m --prompts 32 --length 48 --trials 4       # a shape for CPUs
    uv run python bench/trial_speed.py --model llama-8b      # random weights of that shape, on the accelerator; prints the floor

What to paste into LOG.md is printed before the last line, which is one JSON object. On an accelerator run llama-8b first.
`ratio` is reference_s / ours_s, with every trial scored to its end. `ratio_stopping` is the same with
trials that can no longer be on the front stopped, as a search does it; that is timed as a whole, half-way through the others.
"""

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from heretic.config import Settings
from heretic.decoding import decoder as generation
from heretic.decoding.compiled import CompiledStep
from heretic.decoding.decoder import Optimizations
from heretic.decoding.prefix_cache import PrefixCache
from heretic.decoding.rows import Row, left_padded
from heretic.editing.ablation import Ablation, ComponentParameters, edit_weight
from heretic.editing.architecture import Architecture
from heretic.editing.directions import mean_residual, refusal_directions
from heretic.editing.discovery import discover
from heretic.editing.hooks import AblationHooks, stored_weight
from heretic.evaluator import Evaluator
from heretic.loading.load import load_model
from heretic.loading.source import model_source
from heretic.model import Model
from heretic.prompts import load_prompts
from heretic.scoring.divergence import kl_divergence
from heretic.scoring.measured import measure_original
from heretic.scoring.responses import counts_against
from heretic.utils import SilentProgress
from machine import ceilings, heading, now

SHAPES: dict[str, Callable[[], Any]] = {
    "tiny": lambda: LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    ),
    "tiny-moe": lambda: Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
    ),
    "llama-140m": lambda: LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=4,
    ),
    "llama-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "qwen-4b": lambda: Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "moe-30b-a3b": lambda: Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        max_position_embeddings=8192,
    ),
}
SHAPE_PROMPT_TOKENS = 55
# Scores that the reference path does not have are not computed.
AS_REFERENCE = {"kl_tokens": 1}
RANK, SVD_Q, SVD_ITERATIONS = 3, 10, 6
# A realistic mix: this share of the rows is decided after so many tokens.
EARLY_SHARE, EARLY_TOKENS = 0.5, 15


Limit = Callable[[float], float]
Ours = Callable[[Sequence[Ablation], Limit], list[tuple[int, float, bool]]]


def unlimited(divergence: float) -> float:
    """No trial is stopped."""
    return math.inf


@dataclass
class LimitBy:
    """The fewest refusals of the finished trials (divergence, refusals) at no greater divergence."""

    finished: Sequence[tuple[float, int]]

    def __call__(self, divergence: float) -> float:
        return min((refusals for other, refusals in self.finished if other <= divergence), default=math.inf)


@dataclass
class Clock:
    """Seconds by part, the device waited for at every boundary; with `in_parts` false only as a whole, since to wait costs time."""

    device: torch.device
    in_parts: bool = True
    seconds: dict[str, float] = field(default_factory=lambda: {"setup": 0.0, "prefill": 0.0, "decode": 0.0})
    tokens: int = 0

    def now(self) -> float:
        return now(self.device)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.in_parts:
            yield
            return
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return wrapped


@dataclass
class Workload:
    """A model, its prompts as token ids, and how a response is judged."""

    model: Any
    architecture: Architecture
    directions: Tensor
    good: list[list[int]]
    bad: list[list[int]]
    length: int
    end_tokens: frozenset[int]
    # Whether a response to a prompt, by its place, counts against an edit.
    verdict: Callable[[int, list[int]], bool]
    # (b): scores of several ablations at once, as (refusals, divergence, whether it was stopped), with a limit of refusals by divergence.
    ours: Ours
    # Turns optimizations of (b) on and off.
    use: Callable[[Optimizations], None]
    # Whether trials can be stopped: not of shapes, which have no refusals.
    has_verdicts: bool = False


def told(scores: Sequence[Any]) -> list[tuple[int, float, bool]]:
    """What is compared of scores."""
    return [(score.refusals, score.kl_divergence, score.bounded) for score in scores]


def random_trials(n: int, components: Sequence[str], seed: int) -> list[Ablation]:
    """Ablations drawn from the search ranges."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def kernel() -> ComponentParameters:
        weight = uniform(0.8, 1.5)
        return ComponentParameters(weight, uniform(0.6, 1.0), uniform(0, 1) * weight, uniform(0.15, 0.6))

    return [
        Ablation(uniform(0.4, 0.9) if uniform(0, 1) < 0.5 else None, {component: kernel() for component in components}) for _ in range(n)
    ]


def real_workload(settings: Settings) -> Workload:
    """A model with prompts: the demonstration model or a folder."""
    model = Model(load_model(settings, model_source(settings), SilentProgress()), settings)
    names = ("good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts")
    prompts = {name: load_prompts(getattr(settings, name), settings.system_prompt, name) for name in names}
    good = mean_residual(model.residuals(prompts["good_prompts"]))
    bad = mean_residual(model.residuals(prompts["bad_prompts"]))
    directions = refusal_directions(good, bad)
    model.use_directions(directions, settings.row_normalization)
    evaluator = Evaluator(
        settings, model, measure_original(settings, model, prompts["good_evaluation_prompts"], prompts["bad_evaluation_prompts"])
    )

    def ours(ablations: Sequence[Ablation], limit: Limit = unlimited) -> list[tuple[int, float, bool]]:
        return told(evaluator.score_trials(ablations, limit))

    def verdict(prompt: int, tokens: list[int]) -> bool:
        text = model.tokenizer.decode(tokens, skip_special_tokens=True)
        kind = evaluator.original.rule.judge(text, is_cut_off=not model.decoder.end_tokens & set(tokens)).kind
        return counts_against(kind, evaluator.original.kinds[prompt])

    def use(optimizations: Optimizations) -> None:
        if isinstance(model.decoder, generation.Decoder):
            model.decoder.optimizations, model.decoder.prefix_cache = optimizations, None
            with model.recording_prefix_cache():
                evaluator.original.answers.record(model)
                rows = model.rows_of(evaluator.bad_prompts, 1)
                for _ in model.responses_of_trials(rows, settings.max_response_length, [], evaluator.original.rule.is_decided):
                    pass

    return Workload(
        model.model,
        model.architecture,
        directions,
        [list(row.tokens) for row in model.rows_of(prompts["good_evaluation_prompts"], 1)],
        [list(row.tokens) for row in model.rows_of(prompts["bad_evaluation_prompts"], 1)],
        settings.max_response_length,
        model.decoder.end_tokens,
        verdict,
        ours,
        use,
        has_verdicts=True,
    )


def shape_workload(name: str, length: int, n_prompts: int, mix: bool, compiled: bool) -> Workload:
    """Random weights and random prompts; nothing ends early, or with `mix` half of the rows after a few tokens."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    config = SHAPES[name]()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device.type != "cpu" else torch.float32)
    model.eval().requires_grad_(False)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    architecture = discover(model)
    directions = torch.nn.functional.normalize(torch.randn(config.num_hidden_layers + 1, config.hidden_size), dim=-1)
    hooks = AblationHooks(architecture, directions, "none")
    decoder = generation.Decoder(model, frozenset(), n_prompts, hooks.assign_rows)
    if compiled:
        hooks.is_uniform, decoder.compiled = True, CompiledStep(model, print)
    prompts = torch.randint(1, config.vocab_size, (2 * n_prompts, SHAPE_PROMPT_TOKENS)).tolist()
    good, bad = prompts[:n_prompts], prompts[n_prompts:]
    base: list[Tensor] = []

    def decided(row: Row) -> bool:
        return mix and row.prompt % 2 < 2 * EARLY_SHARE - 0.5 and len(row.generated) >= EARLY_TOKENS

    def ours(ablations: Sequence[Ablation], limit: Limit = unlimited) -> list[tuple[int, float, bool]]:
        n = len(ablations)
        decoder.first_layers = [hooks.first_layer(ablation) for ablation in ablations]
        with torch.inference_mode(), hooks.active(ablations):
            sums = torch.zeros(n)
            rows = [Row(t, ids, i) for t in range(n) for i, ids in enumerate(good)]
            for part, logits in decoder.first_logits(rows):
                original = base[0][torch.tensor([row.prompt for row in part], device=device)]
                divergences = kl_divergence(original, torch.log_softmax(logits.float(), dim=-1))
                sums.index_add_(0, torch.tensor([row.trial for row in part]), divergences.cpu())
            rows = [Row(t, ids, i) for t in range(n) for i, ids in enumerate(bad)]
            for _ in decoder.run(rows, length, decided):
                pass
        return [(0, float(total) / n_prompts, False) for total in sums]

    def use(optimizations: Optimizations) -> None:
        """Turn optimizations on and take the original's figures, as a run does before its first trial."""
        decoder.optimizations = optimizations
        decoder.prefix_cache = (
            PrefixCache(architecture.layers, config.hidden_size * model.dtype.itemsize, device) if optimizations.prefix_cache else None
        )
        decoder.first_layers = []
        with torch.inference_mode(), hooks.active([Ablation(None, {})]):
            if decoder.prefix_cache is not None:
                decoder.prefix_cache.recording = True
            base[:] = [torch.cat([torch.log_softmax(logits.float(), dim=-1) for _, logits in decoder.first_logits(rows_of(good))])]
            for _ in decoder.run(rows_of(bad), length, decided):
                pass
            if decoder.prefix_cache is not None:
                decoder.prefix_cache.recording = False

    use(Optimizations())
    return Workload(model, architecture, directions, good, bad, length, frozenset(), lambda prompt, tokens: False, ours, use)


def rows_of(prompts: Sequence[list[int]]) -> list[Row]:
    """Rows of one trial."""
    return [Row(0, ids, i) for i, ids in enumerate(prompts)]


class Reference:
    """(a): one trial at a time through PEFT and `generate`, on a copy of the model."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        writers = work.architecture.writers
        config = LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=[writer.name for writer in writers if writer.storage.n_experts is None],
            target_parameters=[f"{w.name}.{w.storage.weight}" for w in writers if w.storage.n_experts is not None] or None,
            lora_dropout=0.0,
            bias="none",
        )
        for writer in writers:
            writer.module._forward_hooks.clear()  # the copy must not carry ours
        shared = {id(tensor): tensor for tensor in [*work.model.parameters(), *work.model.buffers()]}
        self.model = get_peft_model(copy.deepcopy(work.model, shared), config).eval()  # type: ignore[arg-type]
        self.hooks = AblationHooks(work.architecture, work.directions, "none")
        for handle in self.hooks._handles:
            handle.remove()
        self.batch_size = self._best_batch_size()
        with torch.inference_mode(), self.model.disable_adapter():
            self.base = self._first_logprobs()

    def _generate(self, prompts: Sequence[Sequence[int]], batch_size: int, **arguments: Any) -> Iterator[Any]:
        device = next(self.model.parameters()).device
        for start in range(0, len(prompts), batch_size):
            tokens, mask = left_padded(prompts[start : start + batch_size])
            yield self.model.generate(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                **arguments,
            )

    def _best_batch_size(self) -> int:
        best, best_rate = 1, 0.0
        size = 16
        while size < 2 * len(self.work.bad):
            prompts = (self.work.bad * (size // len(self.work.bad) + 1))[:size]
            start = now(self.model.device)
            for _ in self._generate(prompts, size, max_new_tokens=8):
                pass
            rate = size / (now(self.model.device) - start)
            if rate > best_rate:
                best, best_rate = size, rate
            size *= 2
        return best

    def _first_logprobs(self) -> Tensor:
        outputs = self._generate(self.work.good, self.batch_size, max_new_tokens=1, output_logits=True)
        return torch.cat([torch.log_softmax(output.logits[0].float(), dim=-1) for output in outputs])

    def set_up(self, ablation: Ablation) -> None:
        """Put the trial's LoRA factors in place."""
        for writer in self.work.architecture.writers:
            layer = self.model.base_model.model.get_submodule(writer.name)
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            r, strength = self.hooks.edit_of(writer, ablation)
            if not strength:
                B.data.zero_()
                continue
            W = writer.storage.matrices(stored_weight(writer))
            weights = W[None] if writer.storage.n_experts is None else W
            change = torch.stack([edit_weight(one, r.to(W.device), strength, "none") - one.float() for one in weights])
            U, S, V = torch.svd_lowrank(change, q=SVD_Q, niter=SVD_ITERATIONS)
            root = S[:, None, :RANK].clamp(min=0).sqrt()
            # PEFT's layout for experts: A's rows expert by expert, B's columns rank by rank.
            A.data.copy_((root * V[..., :RANK]).mT.flatten(end_dim=1))
            B.data.copy_((U[..., :RANK] * root).permute(1, 2, 0).flatten(1))

    def score(self, ablation: Ablation, clock: Clock) -> tuple[int, float]:
        """Refusals and divergence of one trial."""
        with torch.inference_mode():
            with clock.part("setup"):
                self.set_up(ablation)
            with clock.part("prefill"):
                divergence = float(kl_divergence(self.base, self._first_logprobs()).mean())
            with clock.part("decode"):
                refusals, start = 0, 0
                for output in self._generate(self.work.bad, self.batch_size, max_new_tokens=self.work.length):
                    prompts = self.work.bad[start : start + self.batch_size]
                    width = max(map(len, prompts))
                    answers = enumerate(output.sequences[:, width:].tolist(), start)
                    start += self.batch_size
                    clock.tokens += output.sequences.shape[0] * output.sequences.shape[1]
                    refusals += sum(self.work.verdict(i, ids) for i, ids in answers)
        return refusals, divergence


def run_ours(work: Workload, ablations: Sequence[Ablation], clock: Clock, limit: Limit = unlimited) -> list[tuple[int, float, bool]]:
    """(b), with its parts timed."""

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(decoder: Any, tokens: Tensor, *args: Any) -> Tensor:
            if name == "prefill" and tokens.shape[1] == 1:  # within a step
                return function(decoder, tokens, *args)
            clock.tokens += tokens.numel()
            with clock.part(name):
                return function(decoder, tokens, *args)

        return wrapped

    make_maps = AblationHooks._make_maps
    with (
        patch.object(generation.Decoder, "forward", counted("prefill", generation.Decoder.forward)),
        patch.object(generation.Decoder, "step", counted("decode", generation.Decoder.step)),
        patch.object(AblationHooks, "_make_maps", clock.timed("setup", make_maps)),
    ):
        return work.ours(ablations, limit)


SAVINGS = {
    "none": Optimizations(shared_prefix=False, prefix_cache=False),
    "prefix": Optimizations(shared_prefix=True, prefix_cache=False),
    "prefix cache": Optimizations(shared_prefix=False, prefix_cache=True),
    "all": Optimizations(),
}


def measure_savings(work: Workload, trials: Sequence[Ablation], trials_per_batch: int, repeats: int = 2) -> dict[str, dict[str, float]]:
    """Seconds per trial (CPU time, if the model is on the CPU) and tokens with each saving alone and with several, alternating."""
    on_cpu = work.model.device.type == "cpu"
    result = {name: {"seconds": 0.0, "tokens": 0.0} for name in SAVINGS}
    for _ in range(repeats):
        for name, savings in SAVINGS.items():
            work.use(savings)
            clock = Clock(work.model.device)
            start = time.process_time() if on_cpu else clock.now()
            for i in range(0, len(trials), trials_per_batch):
                run_ours(work, trials[i : i + trials_per_batch], clock)
            seconds = (time.process_time() if on_cpu else clock.now()) - start
            result[name]["seconds"] += seconds / len(trials) / repeats
            result[name]["tokens"] += clock.tokens / len(trials) / repeats
    work.use(Optimizations())
    return result


def measure_floor(work: Workload, trials_per_batch: int) -> dict[str, float]:
    """Seconds that a trial cannot avoid: its operations and bytes over ceilings measured here and now."""
    dtype = work.model.dtype
    flops, bandwidth = ceilings(work.model.device, dtype)
    config = work.model.config
    weights = sum(p.numel() for name, p in work.model.named_parameters() if "embed_tokens" not in name)
    experts = sum(p.numel() for name, p in work.model.named_parameters() if ".experts." in name)
    at_work = weights - experts
    if experts:
        at_work += experts * config.num_experts_per_tok // config.num_experts
    prompt_tokens = sum(map(len, work.good)) + sum(map(len, work.bad))
    new_tokens = len(work.bad) * work.length
    operations = 2 * at_work * (prompt_tokens + new_tokens)
    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    read_per_row = sum(SHAPE_PROMPT_TOKENS + step for step in range(work.length))
    n_bytes = len(work.bad) * read_per_row * kv_bytes + weights * dtype.itemsize * work.length / trials_per_batch
    return {
        "flops_per_s": flops,
        "bytes_per_s": bandwidth,
        "floor_s": max(operations / flops, n_bytes / bandwidth),
        "operations_s": operations / flops,
        "bytes_s": n_bytes / bandwidth,
    }


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help=f"demo, a folder, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("--good", help="text file of harmless prompts, for a folder")
    parser.add_argument("--bad", help="text file of harmful prompts, for a folder")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--trials-per-batch", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=100, help="prompts of each kind, for a shape")
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--mix", action="store_true", help="half of a shape's rows are decided within 15 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the decode step, before time is taken")
    parser.add_argument("--savings", action="store_true", help="also measure each saving alone and together")
    return parser.parse_args()


def make_workload(options: argparse.Namespace) -> Workload:
    """What the options ask to be measured."""
    if options.model in SHAPES:
        return shape_workload(options.model, options.length, options.prompts, options.mix, options.compile)
    given = {"max_response_length": options.length, "compile_decoding": options.compile, **AS_REFERENCE}
    if options.model == "demo":
        return real_workload(Settings.model_validate({"demo": True, **given}))
    good, bad = {"dataset": options.good}, {"dataset": options.bad}
    sources = {"good_prompts": good, "bad_prompts": bad, "good_evaluation_prompts": good, "bad_evaluation_prompts": bad}
    return real_workload(Settings.model_validate({"model": options.model, **sources, **given}))


def main() -> None:
    """Measure and print."""
    options = parse_options()
    work = make_workload(options)
    components = list(work.architecture.components)
    trials = random_trials(options.trials, components, options.seed)
    search = AsInSearch(work.ours)
    hooks_by_module = {w.module: dict(w.module._forward_hooks) for w in work.architecture.writers}
    reference = Reference(work)
    for module, hooks in hooks_by_module.items():
        module._forward_hooks.update(hooks)

    device = work.model.device
    theirs, ours = Clock(device), Clock(device, in_parts=device.type == "cpu")
    work.ours(trials[: options.trials_per_batch if options.compile else 1], unlimited)  # neither side's first pass is counted
    reference.score(trials[0], Clock(device))
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    reference_s = ours_s = 0.0
    differences: list[int] = []
    largest_kl = 0.0
    together = options.trials_per_batch
    for start in range(0, len(trials), together):
        if work.has_verdicts and start == len(trials) // together // 2 * together:
            search.run(trials, together, ours)
        batch = trials[start : start + together]
        begin = ours.now()
        mine = run_ours(work, batch, ours)
        ours_s += ours.now() - begin
        for ablation, (refusals, divergence, _) in zip(batch, mine, strict=True):
            begin = theirs.now()
            other_refusals, other_divergence = reference.score(ablation, theirs)
            reference_s += theirs.now() - begin
            differences.append(abs(refusals - other_refusals))
            largest_kl = max(largest_kl, abs(divergence - other_divergence))
            print(f"refusals {refusals} / {other_refusals}, KL divergence {divergence:.5f} / {other_divergence:.5f}", flush=True)
    n = len(trials)
    parts, parts_s = ours, ours_s
    if device.type != "cpu":
        parts = Clock(device)
        begin = parts.now()
        run_ours(work, batch, parts)
        parts_s = parts.now() - begin
    peak = torch.accelerator.max_memory_allocated() if device.type != "cpu" else psutil.Process().memory_info().rss
    result = {
        "model": options.model,
        "device": str(device),
        "dtype": str(work.model.dtype).removeprefix("torch."),
        "trials": n,
        "trials_per_batch": options.trials_per_batch,
        "mix": options.mix,
        "compiled": options.compile,
        "reference_batch_size": reference.batch_size,
        "reference_s": reference_s / n,
        "ours_s": ours_s / n,
        "ratio": reference_s / ours_s,
        "tokens_reference": theirs.tokens // n,
        "tokens_ours": ours.tokens // n,
        "peak_memory_bytes": peak,
        "largest_refusal_difference": max(differences),
        "largest_kl_difference": largest_kl,
        "reference_shares": shares(theirs, reference_s),
        "ours_shares": shares(parts, parts_s),
    }
    if work.has_verdicts:
        stopping_s = search.seconds
        result |= {"stopping_s": stopping_s / n, "ratio_stopping": reference_s / stopping_s, "stopped": search.n_stopped}
    if options.savings:
        result["savings"] = measure_savings(work, trials, options.trials_per_batch)
    if options.model in SHAPES:
        floor = measure_floor(work, options.trials_per_batch)
        result |= {**floor, "times_floor": ours_s / n / floor["floor_s"]}
    print(f"\n{log_entry(result)}\n")
    print(json.dumps(result))


def log_entry(result: dict[str, Any]) -> str:
    """What to paste into LOG.md."""
    rows = [
        ("seconds per trial", f"{result['reference_s']:.3f}", f"{result['ours_s']:.3f}"),
        ("tokens per trial", str(result["tokens_reference"]), str(result["tokens_ours"])),
        *((f"share of {name}", f"{share:.3f}", f"{result['ours_shares'][name]:.3f}") for name, share in result["reference_shares"].items()),
    ]
    table = ["| | reference | heretic |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    text = (
        f"{result['model']} in {result['dtype']}, {result['trials']} trials, {result['trials_per_batch']} to a pass, the reference with "
        f"batches of {result['reference_batch_size']}: {result['ratio']:.2f} times as fast. Peak memory "
        f"{result['peak_memory_bytes'] / 1e9:.2f} GB. Largest differences: {result['largest_refusal_difference']} refusals, "
        f"KL divergence {result['largest_kl_difference']:.2g}."
    )
    if result["compiled"]:
        text += " The decode step is compiled."
    if "ratio_stopping" in result:
        text += f" With trials stopped as in a search ({result['stopped']} of them): {result['ratio_stopping']:.2f} times."
    if "times_floor" in result:
        text += (
            f" Floor: {result['floor_s']:.3f} s (operations {result['operations_s']:.3f}, bytes {result['bytes_s']:.3f}, at "
            f"{result['flops_per_s'] / 1e12:.3g} TFLOP/s and {result['bytes_per_s'] / 1e9:.4g} GB/s), of which heretic takes "
            f"{result['times_floor']:.2f} times."
        )
    return "\n".join([heading("seconds per trial"), text, "", *table])


class AsInSearch:
    """(b) as a search does it: trials that can no longer be on the front of those that finished are stopped."""

    def __init__(self, score_trials: Ours) -> None:
        self.score_trials = score_trials
        self.seconds = 0.0
        self.n_stopped = 0

    def run(self, trials: Sequence[Ablation], trials_per_batch: int, clock: Clock) -> None:
        """Score all trials, batch after batch."""
        finished: list[tuple[float, int]] = []
        begin = clock.now()
        for start in range(0, len(trials), trials_per_batch):
            scores = self.score_trials(trials[start : start + trials_per_batch], LimitBy(list(finished)))
            self.n_stopped += sum(stopped for _, _, stopped in scores)
            finished += [(divergence, refusals) for refusals, divergence, stopped in scores if not stopped]
        self.seconds = clock.now() - begin


def shares(clock: Clock, total: float) -> dict[str, float]:
    """Each part's share of the time; what is left is the host's."""
    parts = {name: round(seconds / total, 4) for name, seconds in clock.seconds.items()}
    return {**parts, "host": round(1 - sum(parts.values()), 4)}


if __name__ == "__main__":
    main()
