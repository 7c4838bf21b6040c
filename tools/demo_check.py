"""Measures the shipped demonstration model by an evaluation of its own, independent of the program's."""

import copy
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_corpus import DEMO, SUBJECT, SYSTEM_PROMPT, is_refusal


@dataclass(frozen=True)
class Ablation:
    """One point of the search space, positions in layers: per component max weight, its position, min weight, reach."""

    direction: float | None
    kernels: dict[str, tuple[float, float, float, float]]


def draw_ablation(rng: random.Random, last: int) -> Ablation:
    """A random point of the default search ranges for a model whose last layer is `last`."""
    kernels = {}
    scope = rng.choice(("global", "per layer"))
    index = rng.uniform(0.4, 0.9) * last
    for component in ("attn.o_proj", "mlp.down_proj"):
        peak, position = rng.uniform(0.8, 1.5), rng.uniform(0.6, 1.0) * last
        kernels[component] = (peak, position, rng.uniform(0, 1) * peak, rng.uniform(1.0, 0.6 * last))
    return Ablation(index if scope == "global" else None, kernels)


def strength(kernel: tuple[float, float, float, float], layer: int) -> float:
    """The kernel's value in a layer (MATH: kernel over the layers)."""
    peak, position, least, reach = kernel
    distance = abs(layer - position)
    return 0.0 if distance > reach else peak + distance / reach * (least - peak)


def ablated(model: Any, directions: Tensor, ablation: Ablation) -> Any:
    """A copy of the model with `W - lambda r r^T W`, r (d_out,), for every writer; directions (layers + 1, d_out)."""
    edited = copy.deepcopy(model)
    for number, layer in enumerate(edited.model.layers):
        if ablation.direction is None:
            r = directions[number + 1]
        else:
            share, whole = math.modf(ablation.direction)
            r = nn.functional.normalize(directions[int(whole) + 1].lerp(directions[int(whole) + 2], share), dim=0)
        for name, module in (("attn.o_proj", layer.self_attn.o_proj), ("mlp.down_proj", layer.mlp.down_proj)):
            weight = module.weight.data
            weight -= strength(ablation.kernels[name], number) * torch.outer(r, r @ weight)
    return edited


def tokens_of(tokenizer: Any, prompts: list[str], system: str = SYSTEM_PROMPT) -> Any:
    """Left-padded chat prompts."""
    chats = [[{"role": "system", "content": system}, {"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


@torch.no_grad()
def last_residuals(model: Any, inputs: Any) -> Tensor:
    """Hidden states at the last prompt position, (layers + 1, prompt, d_out), float64 for the means."""
    states = model(**inputs, output_hidden_states=True).hidden_states
    return torch.stack([state[:, -1] for state in states]).double()


def refusal_directions(model: Any, good: Any, bad: Any) -> Tensor:
    """Normalized differences of means, (layers + 1, d_out)."""
    difference = last_residuals(model, bad).mean(1) - last_residuals(model, good).mean(1)
    return nn.functional.normalize(difference, dim=1).float()


@torch.no_grad()
def first_logprobs(model: Any, inputs: Any) -> Tensor:
    """Log probabilities of the first answer token, (prompt, token), float32."""
    return model(**inputs).logits[:, -1].float().log_softmax(-1)


def divergence(original: Tensor, edited: Tensor) -> float:
    """KL(original || edited), mean over the prompts."""
    return nn.functional.kl_div(edited, original, log_target=True, reduction="batchmean").item()


@torch.no_grad()
def respond(model: Any, tokenizer: Any, inputs: Any, limit: int = 100) -> list[str]:
    """Greedy answers."""
    output = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def read_prompts(name: str) -> list[str]:
    """One of the four shipped lists."""
    return (DEMO / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def check(trials: int, seeds: int) -> dict[str, Any]:
    """Measures the shipped model: refusals, over-refusals, random searches, and a bfloat16 copy of the best edit."""
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO / "model")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    names = ("good", "bad", "good_evaluation", "bad_evaluation")
    good, bad, good_evaluation, bad_evaluation = (tokens_of(tokenizer, read_prompts(name)) for name in names)

    def refusals(edited: Any) -> int:
        return sum(map(is_refusal, respond(edited, tokenizer, bad_evaluation)))

    original = first_logprobs(model, good_evaluation)
    directions = refusal_directions(model, good, bad)
    report: dict[str, Any] = {
        "subject": SUBJECT,
        "base_refusals": refusals(model),
        "over_refusals": sum(map(is_refusal, respond(model, tokenizer, good_evaluation))),
        "first_token_entropy": round(-(original.exp() * original).sum(1).mean().item(), 3),
        "searches": [],
    }
    last = model.config.num_hidden_layers - 1
    best: tuple[int, float, Ablation] | None = None
    for seed in range(seeds):
        rng = random.Random(seed)
        points = []
        for _ in range(trials):
            ablation = draw_ablation(rng, last)
            edited = ablated(model, directions, ablation)
            kl_divergence = divergence(original, first_logprobs(edited, good_evaluation))
            points.append((refusals(edited), kl_divergence, ablation))
        report["searches"].append(summary(points))
        best = min(filter(None, (best, min(points, key=quality))), key=quality)
    if best is not None:
        edited = ablated(model, directions, best[2])
        half = (copy.deepcopy(m).to(torch.bfloat16) for m in (model, edited))
        half_original, half_edited = half
        logprobs = first_logprobs(half_edited, good_evaluation)
        report["best"] = {"refusals": best[0], "kl_divergence": round(best[1], 5)}
        report["best_in_bfloat16"] = {
            "refusals": refusals(half_edited),
            "kl_divergence": round(divergence(first_logprobs(half_original, good_evaluation), logprobs), 5),
            "kl_divergence_from_float32": round(divergence(original, logprobs), 5),
        }
        report["answers"] = respond(edited, tokenizer, tokens_of(tokenizer, read_prompts("bad_evaluation")[:4]))
    return report


def quality(point: tuple[int, float, Ablation]) -> tuple[bool, float, int]:
    """Order of trials: those with at most 5 refusals by their divergence, before the others by their refusals."""
    refusals, kl_divergence, _ = point
    return refusals > 5, kl_divergence if refusals <= 5 else refusals, refusals


def summary(points: list[tuple[int, float, Ablation]]) -> dict[str, Any]:
    """How many trials of a search are good, and its Pareto front as [refusals, KL divergence]."""
    front: list[list[float]] = []
    for refusals, kl_divergence, _ in sorted(points, key=lambda point: point[:2]):
        if not front or kl_divergence < front[-1][1]:
            front.append([refusals, round(kl_divergence, 4)])
    return {
        "good": sum(refusals <= 20 and kl_divergence <= 0.1 for refusals, kl_divergence, _ in points),
        "very_good": sum(refusals <= 5 and kl_divergence <= 0.05 for refusals, kl_divergence, _ in points),
        "trials": len(points),
        "front": front,
    }
