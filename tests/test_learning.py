"""Learned edits: what the loss and its gradient are, against finite differences of models whose weights are edited in float64."""

import copy
import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial
from scipy.special import log_softmax
from scipy.stats import entropy
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from heretic.config import SamplerName, Settings
from heretic.demo import MODEL as DEMO_MODEL
from heretic.editing.ablation import Ablation, RowNormalization
from heretic.editing.discovery import discover
from heretic.editing.hooks import AblationHooks
from heretic.editing.learning import AVERAGED, DIRECTION_RATE, FIRST_STRENGTH, LearnableEdit, divergence, refusal_loss
from heretic.errors import LearningError
from heretic.evaluator import Score
from heretic.saving.export import save
from heretic.saving.record import Result
from heretic.scoring.openings import DEPTH, FEWEST_REFUSALS, Openings
from heretic.study import passes
from heretic.study.front import search_view
from heretic.study.learning import same_words
from heretic.study.passes import Originals, Passes, Term, checkpointed
from heretic.study.samplers import Sampling, make_sampler
from heretic.study.search import Search
from heretic.study.space import search_space
from heretic.utils import SilentProgress
from tiny import build, explicit_bias, explicit_weight, load, settings, unit_directions
from tiny import save as save_original

MODES: list[RowNormalization] = ["none", "pre", "full"]
TOKENS = torch.arange(6, 30).reshape(2, 12)
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True, "num_experts": 3}
# Name, type, what the configuration needs besides, and how the edited parameters lie: bias beside the weight, transposed, by expert.
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gain": ("gemma3_text", {}),
    "transposed": ("gpt2", {}),
    "experts": ("qwen3_moe", EXPERTS),
    "experts with biases": ("gpt_oss", {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 24}),
}


# The explicit edit


def gain_of(model: Any, name: str) -> np.ndarray[Any, Any]:
    """What a norm behind a writer multiplies with: of these types only gemma3 has one."""
    if model.config.model_type != "gemma3_text":
        return np.ones(32)
    layer = model.get_submodule(".".join(name.split(".")[:3]))
    norm = layer.post_feedforward_layernorm if name.endswith("down_proj") else layer.post_attention_layernorm
    return 1 + norm.weight.detach().double().numpy()


def edit_explicitly(target: Any, model: Any, names: Sequence[str], directions: Any, strengths: Any, mode: str) -> None:
    """Put into `target` the weights and biases of `model`, edited as the definition says: by layer a direction, by writer a strength."""
    with torch.no_grad():
        for name, strength in zip(names, strengths, strict=True):
            layer = int(name.split(".")[2])
            r = gain_of(model, name) * np.asarray(directions[layer], dtype=np.float64)
            r = r / np.linalg.norm(r)
            source, edited = dict(model.get_submodule(name).named_parameters()), dict(target.get_submodule(name).named_parameters())
            for key in source.keys() & {"weight", "bias", "down_proj", "down_proj_bias"}:
                before = source[key].detach().double().numpy()
                if key in ("bias", "down_proj_bias"):
                    bias = [explicit_bias(b, r, strength) for b in np.atleast_2d(before)]
                    after = np.stack(bias).reshape(before.shape)
                else:
                    is_transposed = model.config.model_type in ("gpt2", "gpt_oss") and not name.endswith("o_proj")
                    matrices = before if before.ndim == 3 else before[None]
                    matrices = matrices.swapaxes(-1, -2) if is_transposed else matrices
                    after = np.stack([explicit_weight(W, r, strength, mode) for W in matrices])
                    after = (after.swapaxes(-1, -2) if is_transposed else after).reshape(before.shape)
                edited[key].copy_(torch.from_numpy(after))


def learnable(model: Any, mode: RowNormalization, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[AblationHooks, LearnableEdit]:
    """A learnable edit of a model, in the middle of learning: directions that are not of unit length any more, strengths of both signs."""
    hooks = AblationHooks(discover(model), unit_directions(len(discover(model).layers) + 1, 32), mode)
    edit = LearnableEdit(hooks, list(hooks.architecture.components), dtype)
    generator = torch.Generator().manual_seed(seed)
    edit.directions.data += 0.05 * torch.randn(edit.directions.shape, dtype=dtype, generator=generator)
    edit.strengths.data += 0.7 * torch.randn(edit.strengths.shape, dtype=dtype, generator=generator)
    assert (edit.strengths < 0).any() and (edit.strengths > 0).any()
    return hooks, edit


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", TYPES)
def test_gradients_are_those_of_the_explicitly_edited_weights(kind: str, mode: RowNormalization) -> None:
    """The loss of learning along a path, its gradient by the output maps; finite differences of a model with `W'` and `b'` written out."""
    model_type, changes = TYPES[kind]
    if "experts" in kind:
        changes = changes | {"num_experts_per_tok": 3}  # all of them, so that no step changes which
    model = build(model_type, torch.float64, **changes).requires_grad_(False)
    if "experts" in kind:
        model.set_experts_implementation("eager")  # grouped products take no float64
    edited = copy.deepcopy(model)
    hooks, edit = learnable(model, mode)
    names = [writer.name for writer in edit.writers]
    assert len(names) == 4 and len(edit.layers) == 2
    with torch.no_grad():
        original = torch.log_softmax(model(input_ids=TOKENS).logits, dim=-1)
    openings = Openings()
    for _ in range(FEWEST_REFUSALS):
        openings.add([7, 8], refuses=True)
        openings.add([9], refuses=True)
    openings.add([7, 9], refuses=False)

    def loss_by_maps() -> Tensor:
        with hooks.mapping(edit.maps()):
            logprobs = torch.log_softmax(model(input_ids=TOKENS).logits, dim=-1)
        refusal = refusal_loss(openings.log_probability([7, 8], logprobs[0, -2:], True))
        return divergence(original, logprobs).mean() + 3 * refusal

    reference = original.numpy()

    def loss_by_weights(directions: np.ndarray[Any, Any], strengths: np.ndarray[Any, Any]) -> float:
        edit_explicitly(edited, model, names, directions, strengths, mode)
        with torch.no_grad():
            logprobs = log_softmax(edited(input_ids=TOKENS).logits.numpy(), axis=-1)
        p = np.exp(logprobs[0, -2, 9]) + np.exp(logprobs[0, -2, 7] + logprobs[0, -1, 8])
        return float(entropy(np.exp(reference), np.exp(logprobs), axis=-1).mean() - 3 * math.log(1 - 0.999 * p))

    directions, strengths = edit.directions.detach().numpy().copy(), edit.strengths.detach().numpy().copy()
    loss = loss_by_maps()
    # float32 constants (row norms, c, gains) in maps of float64.
    assert float(loss.detach()) == pytest.approx(loss_by_weights(directions, strengths), rel=1e-5)
    loss.backward()
    assert edit.directions.grad is not None and edit.strengths.grad is not None
    step = 5e-3  # transformers' norms and gates are float32 whatever the model is, so a shorter one would measure their rounding

    def slope(d: np.ndarray[Any, Any], s: np.ndarray[Any, Any]) -> float:
        """By differences of fourth order."""
        at = [loss_by_weights(directions + n * step * d, strengths + n * step * s) for n in (-2, -1, 1, 2)]
        return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step)

    still, unmoved = np.zeros_like(directions), np.zeros_like(strengths)
    found = [slope(still, np.eye(4)[i]) for i in range(4)]
    scale = float(edit.strengths.grad.norm())
    np.testing.assert_allclose(edit.strengths.grad.numpy(), found, rtol=1e-3, atol=2e-4 * scale)
    rng = np.random.default_rng(0)
    scale = float(edit.directions.grad.norm())
    for _ in range(3):
        d = rng.normal(size=directions.shape)
        d /= np.linalg.norm(d)
        assert float((edit.directions.grad.numpy() * d).sum()) == pytest.approx(slope(d, unmoved), rel=1e-3, abs=2e-4 * scale)
    # Along itself a direction has no slope, since only its unit vector counts.
    for r, gradient in zip(edit.directions.detach(), edit.directions.grad, strict=True):
        assert abs(float(r @ gradient)) < 1e-6 * scale


def test_no_gradient_reaches_or_leaves_the_model() -> None:
    model = build("llama").requires_grad_(False)
    hooks, edit = learnable(model, "full", torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with hooks.mapping(edit.maps()):
        model(input_ids=TOKENS).logits.square().mean().backward()
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        original = build("llama")(input_ids=TOKENS).logits
        assert torch.equal(model(input_ids=TOKENS).logits, original)  # nothing is left of the maps


def test_a_row_that_an_edit_leaves_nothing_of_has_a_finite_gradient() -> None:
    """At `W` of rank one along the direction and strength 1, mode `full` divides by nothing."""
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.mlp.down_proj.weight[3] = 1.0
    model.requires_grad_(False)
    directions = torch.zeros(3, 32, dtype=torch.float64)
    directions[:, 3] = 1
    hooks = AblationHooks(discover(model), directions, "full")
    edit = LearnableEdit(hooks, ["mlp.down_proj"])
    edit.strengths.data.fill_(1.0)
    with hooks.mapping(edit.maps()):
        loss = model(input_ids=TOKENS).logits.square().mean()
    loss.backward()
    assert edit.directions.grad is not None and edit.strengths.grad is not None
    assert torch.isfinite(loss) and edit.directions.grad.isfinite().all() and edit.strengths.grad.isfinite().all()


def test_where_learning_begins() -> None:
    """At each layer's own difference of means; a layer whose means coincide has the mean of the others."""
    model = build("llama", num_hidden_layers=3)
    directions = unit_directions(4, 32)
    directions[2] = 0
    hooks = AblationHooks(discover(model), directions, "none")
    edit = LearnableEdit(hooks, ["mlp.down_proj"])
    assert [writer.name for writer in edit.writers] == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert edit.strengths.tolist() == pytest.approx([FIRST_STRENGTH] * 3) and edit.turned() == pytest.approx([1.0] * 3)
    mean = directions[1] + directions[3]
    expected = torch.stack([directions[1], mean / mean.norm(), directions[3]])
    torch.testing.assert_close(edit.directions.detach().double(), expected, rtol=0, atol=1e-6)
    edit.averages[0][0] = -edit.averages[0][0]
    assert edit.turned() == pytest.approx([-1.0, 1.0, 1.0])


def test_directions_turn_as_far_after_many_steps_as_at_first() -> None:
    """Whatever size their gradients have: a vector that grows longer with its steps would turn less and less."""
    edit = LearnableEdit(AblationHooks(discover(build("llama", num_hidden_layers=3)), unit_directions(4, 32), "none"), ["mlp.down_proj"])
    generator = torch.Generator().manual_seed(0)
    for size in [1.0, 1e-3] * 30:
        before = edit.directions.detach().double()
        edit.directions.grad = size * torch.randn(before.shape, generator=generator)
        edit.strengths.grad = torch.zeros_like(edit.strengths)
        edit.step()
        after = edit.directions.detach().double()
        torch.testing.assert_close(after.norm(dim=-1), torch.ones(len(after), dtype=torch.float64), rtol=0, atol=1e-6)
        angles = torch.arccos((before * after).sum(dim=-1))
        assert 0.4 * DIRECTION_RATE < float(angles.min()) <= float(angles.max()) < 1.6 * DIRECTION_RATE


def test_the_edit_is_the_average_of_its_steps() -> None:
    model = build("llama", num_hidden_layers=3)
    edit = LearnableEdit(AblationHooks(discover(model), unit_directions(4, 32), "none"), ["mlp.down_proj"])
    generator = torch.Generator().manual_seed(0)
    seen = [(edit.directions.detach().double().numpy().copy(), edit.strengths.detach().double().numpy().copy())]
    for _ in range(12):
        for parameter in (edit.directions, edit.strengths):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        edit.step()
        seen.append((edit.directions.detach().double().numpy().copy(), edit.strengths.detach().double().numpy().copy()))
    shares = np.array([AVERAGED**12, *((1 - AVERAGED) * AVERAGED ** (12 - i) for i in range(1, 13))])
    assert shares.sum() == pytest.approx(1)
    directions, strengths = (np.tensordot(shares, np.stack(own), axes=1) for own in zip(*seen, strict=True))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    frozen = edit.frozen()
    for i, name in enumerate(frozen.strengths):
        assert frozen.strengths[name] == pytest.approx(strengths[i], abs=1e-6)
        np.testing.assert_allclose(frozen.directions[name].numpy(), directions[i], atol=1e-6)
    assert edit.turned() == pytest.approx((directions * seen[0][0]).sum(axis=-1), abs=1e-6)
    assert not np.allclose(directions, seen[-1][0], atol=1e-3), "where the last step ended is another edit"


def test_steps_go_on_from_a_state_exactly() -> None:
    def steps(edit: LearnableEdit, hooks: AblationHooks, model: Any, n: int) -> None:
        for _ in range(n):
            with hooks.mapping(edit.maps()):
                model(input_ids=TOKENS).logits.square().mean().backward()
            edit.step()

    model = build("llama").requires_grad_(False)
    hooks, edit = learnable(model, "pre", torch.float32)
    steps(edit, hooks, model, 2)
    state = edit.state()
    steps(edit, hooks, model, 2)
    other = LearnableEdit(hooks, list(hooks.architecture.components))
    other.restore(state)
    steps(other, hooks, model, 2)
    assert torch.equal(edit.directions, other.directions) and torch.equal(edit.strengths, other.strengths)
    assert all(map(torch.equal, edit.averages, other.averages))
    assert not torch.equal(edit.strengths, state["strengths"])
    other.restore({name: tensor for name, tensor in state.items() if not name.startswith("average.")})  # of an earlier version
    assert torch.equal(other.averages[0], state["directions"]) and torch.equal(other.averages[1], state["strengths"])


# Exported


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", TYPES)
def test_what_was_learned_is_what_is_saved(kind: str, mode: RowNormalization, tmp_path: Path) -> None:
    """Logits with the maps of the edit, with the edit as a trial, and of the saved model in transformers alone. The loss that says which
    edit is the best is the edit's, too, and not that of where the last step ended."""
    model_type, changes = TYPES[kind]
    folder = save_original(tmp_path / "m", build(model_type, **changes))
    model = load(folder, row_normalization=mode)
    model.use_directions(unit_directions(3, 32), mode)
    assert model.hooks is not None
    edit = LearnableEdit(model.hooks, list(model.architecture.components))
    generator = torch.Generator().manual_seed(1)
    for average, size in zip(edit.averages, (0.1, 1.0), strict=True):
        average.add_(size * torch.randn(average.shape, generator=generator))
    ablation = Ablation(None, {}, edit.frozen())
    assert ablation.learned is not None
    with torch.no_grad():
        original = model.model(input_ids=TOKENS).logits
        with model.hooks.mapping(edit.maps(of_average=True)):
            learned = model.model(input_ids=TOKENS).logits
        with model.hooks.active([ablation]):
            applied = model.model(input_ids=TOKENS).logits
    scale = float(original.std())
    assert float((learned - original).abs().max()) > 0.1 * scale
    torch.testing.assert_close(applied, learned, rtol=0, atol=1e-5 * scale)
    term = Term(tuple(TOKENS[0].tolist()), 12, lambda edited, original: (edited.square().mean(), edited.new_zeros(())), False)
    expected = torch.log_softmax(applied[0], dim=-1).square().mean().item()
    assert Passes(model, edit).total([term]).held == pytest.approx(expected, rel=1e-5)
    found = {w.component: [] for w in edit.writers} | {
        component: [
            (w.layer, float(s), c)
            for w, s, c in zip(edit.writers, ablation.learned.strengths.values(), edit.turned(), strict=True)
            if w.component == component
        ]
        for component in {w.component for w in edit.writers}
    }
    result = Result(settings(folder, row_normalization=mode), 0, ablation, 1, 0.1, 5, 5, "", learned=found)
    save(model, result, "merge", str(tmp_path / "out"), False, SilentProgress())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(saved(input_ids=TOKENS).logits, learned, rtol=0, atol=1e-4 * scale)


# The loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_of_a_refusal(dtype: torch.dtype) -> None:
    """`-log(1 - 0.999 p)` in float64 from 1e-9 to certainty, at which the slope `0.999 p / (1 - 0.999 p)` is still large and finite."""
    p = np.array([1e-9, 1e-4, 0.1, 0.5, 0.9, 0.99, 0.9999, 1.0])
    log_p = torch.tensor(np.log(p), dtype=dtype, requires_grad=True)
    loss = refusal_loss(log_p)
    loss.sum().backward()
    rel = 1e-6 if dtype == torch.float64 else 2e-4
    assert loss.tolist() == pytest.approx((-np.log1p(-0.999 * p)).tolist(), rel=rel)
    assert log_p.grad is not None
    assert log_p.grad.tolist() == pytest.approx((0.999 * p / (1 - 0.999 * p)).tolist(), rel=rel)


def test_divergence_is_scipys() -> None:
    rng = np.random.default_rng(0)
    logprobs = log_softmax(rng.normal(size=(2, 5, 40), scale=3), axis=-1)
    found = divergence(torch.from_numpy(logprobs[0]), torch.from_numpy(logprobs[1]))
    np.testing.assert_allclose(found.numpy(), entropy(np.exp(logprobs[0]), np.exp(logprobs[1]), axis=-1), rtol=1e-10)
    assert divergence(torch.from_numpy(logprobs[0]), torch.from_numpy(logprobs[0])).tolist() == [0.0] * 5


Responses = list[tuple[tuple[int, ...], bool]]
VOCABULARY, LENGTH = 4, 4


def seen_responses(rng: random.Random) -> Responses:
    """Responses, some of them several times, in which one that refuses and one that answers are never the same; a refusal may be short."""
    found: dict[tuple[int, ...], bool] = {}
    for _ in range(rng.randint(2, 12)):
        tokens = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, LENGTH)))
        found.setdefault(tokens, rng.random() < 0.5)
    return [seen for seen in found.items() for _ in range(rng.randint(1, FEWEST_REFUSALS + 1))]


def test_words_are_found_within_a_text_too() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    first = [tokenizer.encode(text, add_special_tokens=False)[0] for text in ("Sorry, no", "I do")]
    found = same_words(tokenizer, first)
    assert {*first, *(tokenizer.encode(text, add_special_tokens=False)[-1] for text in ("But I", "But\nI"))} <= set(found)
    assert {tokenizer.decode([token]).strip() for token in found} == {tokenizer.decode([token]) for token in first} and len(found) > 2


def test_the_original_does_not_go_back_to_refusing() -> None:
    """After the first token none is probable that begins refusals, but where an answer is known to go on with it."""
    openings = Openings()
    for tokens, refuses in (*[([1, 2], True), ([1, 3], True)] * 2, ([2, 1], False), ([0, 1], True)):
        openings.add(tokens, refuses)
    assert openings.deciding(()) == [1]
    openings.turn_with(openings.deciding(()))
    logprobs = torch.log_softmax(torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1)
    found = openings.without_refusals([2, 3, 3], logprobs).exp()
    for j, left_out in enumerate(([0, 1], [], [1])):
        expected = logprobs[j].exp()
        expected[left_out] = 0
        torch.testing.assert_close(found[j], expected / expected.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_probabilities_of_refusals_along_a_path(seed: int) -> None:
    """Against the sum over all sequences of a small vocabulary, whose tokens depend on all that stand before them."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    sequences = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
    conditional = {
        prefix: log_softmax(numbers.normal(size=VOCABULARY, scale=2))
        for n in range(LENGTH)
        for prefix in itertools.product(range(VOCABULARY), repeat=n)
    }
    probability = {s: math.exp(sum(conditional[s[:j]][s[j]] for j in range(LENGTH))) for s in sequences}
    assert math.fsum(probability.values()) == pytest.approx(1)
    responses = seen_responses(rng)
    openings = Openings()
    for tokens, is_refusal in responses:
        openings.add(tokens, is_refusal)

    def refuses(prefix: tuple[int, ...]) -> bool:
        kinds = [is_refusal for tokens, is_refusal in responses if tokens[: len(prefix)] == prefix]
        return all(kinds) and len(kinds) >= FEWEST_REFUSALS

    def check(path: tuple[int, ...], is_refusal: bool) -> None:
        counted = 0.0
        for s, p in probability.items():
            common = next((j for j in range(len(path)) if s[j] != path[j]), len(path))
            # Refusals that leave the path, or are the path's own beginning; and the path itself if it refuses.
            leaves = any(refuses(s[: j + 1]) for j in range(min(common + 1, len(path))))
            counted += p * (leaves or (is_refusal and common == len(path)))
        logprobs = torch.tensor(np.stack([conditional[path[:j]] for j in range(len(path))]), requires_grad=True)
        found = openings.log_probability(path, logprobs, is_refusal)
        assert math.exp(found.item()) == pytest.approx(counted, abs=1e-12)

    for response, is_refusal in responses:
        decided = next((response[:n] for n in range(1, len(response) + 1) if refuses(response[:n])), response)
        assert openings.decided(response) == decided
        check(decided if is_refusal else response, is_refusal)
        check(response, False)  # an edit's answer may begin as only the original's refusals do


def test_the_original_given_that_it_does_not_refuse() -> None:
    """Probabilities by Bayes's rule, token by token; the gradient of a divergence from them is finite."""
    openings = Openings()
    seen = [([1, 2, 3], True), ([0, 1, 1], False), ([0, 3, 1], True), ([0, 3, 2], True), ([2, 1, 1], False)]
    for tokens, refuses in seen:
        openings.add(tokens, refuses)
    logprobs = torch.log_softmax(torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1)
    path = [0, 1, 1]
    found = openings.without_refusals(path, logprobs)
    for j in range(3):
        # By Bayes' rule, with the chance of an answer after each token counted among the responses that go on with it.
        begun = {t: [refuses for tokens, refuses in seen if tokens[: j + 1] == [*path[:j], t]] for t in range(VOCABULARY)}
        joint = [float(logprobs[j, t].exp()) * (begun[t].count(False) / len(begun[t]) if begun[t] else 1) for t in range(VOCABULARY)]
        assert found[j].exp().tolist() == pytest.approx([own / sum(joint) for own in joint], abs=1e-12)
    edited = logprobs.clone().requires_grad_()
    divergence(found, edited).sum().backward()
    assert edited.grad is not None and edited.grad.isfinite().all()


def test_openings_are_told_by_their_first_tokens_and_kept() -> None:
    openings = Openings()
    openings.add([1, 4], refuses=False)
    for _ in range(FEWEST_REFUSALS):
        assert openings.decided([1, 2, 3]) == (1, 2, 3) and openings.deciding((1,)) == []  # seen too seldom: followed to the end
        openings.add([1, 2, 3], refuses=True)
    assert [openings.refuses(t) for t in ([], [1], [1, 2], [1, 2, 3], [1, 4], [9])] == [False, False, True, True, False, False]
    assert openings.deciding((1,)) == [2] and openings.decided([1, 2, 9]) == (1, 2)
    assert [openings.begins_as_refusal(tokens) for tokens in ([1, 2, 9], [1, 4, 2], [9])] == [True, False, False]
    openings.add([1, 2, 5], refuses=False)
    assert openings.deciding((1,)) == [] and openings.deciding((1, 2)) == [3]  # what was looked up before is not remembered
    for _ in range(20):
        openings.add([7, 8], refuses=True)
    found = []
    for _ in range(3):  # one answer for ten refusals may be a mistake, or a rare way to begin; more are not
        openings.add([7, 9], refuses=False)
        found.append(openings.refuses([7]))
    assert found == [True, True, False] and openings.refuses([7, 8]) and not openings.refuses([7, 9])
    long = list(range(10, 10 + 2 * DEPTH))
    for _ in range(FEWEST_REFUSALS):
        openings.add(long, refuses=True)
    assert not openings.refuses(long[: DEPTH + 1]) and openings.refuses(long[:DEPTH])
    other = Openings()
    other.restore(json.loads(json.dumps(openings.state())))
    assert other.state() == openings.state() and other.deciding((1, 2)) == [3]


# Passes


@pytest.mark.parametrize("kind", TYPES)
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    """Layers computed twice, and their forward is their own again afterwards."""
    model_type, changes = TYPES[kind]
    model = build(model_type, **changes).requires_grad_(False)
    hooks, edit = learnable(model, "full", torch.float32)
    kept: list[int] = []

    def gradients() -> list[Tensor]:
        for optimizer in edit.optimizers:
            optimizer.zero_grad()
        n_bytes = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal n_bytes
            n_bytes += tensor.nbytes
            return tensor

        with hooks.mapping(edit.maps()), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=TOKENS, use_cache=False).logits.square().mean().backward()
        kept.append(n_bytes)
        assert edit.directions.grad is not None and edit.strengths.grad is not None
        return [edit.directions.grad.clone(), edit.strengths.grad.clone()]

    usual = gradients()
    layers = hooks.architecture.layers
    with checkpointed(layers):
        assert all("forward" in vars(layer) for layer in layers)
        twice = gradients()
    assert not any("forward" in vars(layer) for layer in layers)
    for a, b in zip(usual, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(a.abs().max()))
    with pytest.raises(RuntimeError, match="stop"), checkpointed(layers):
        raise RuntimeError("stop")
    assert not any("forward" in vars(layer) for layer in layers)


def test_originals_are_computed_once_as_far_as_there_is_room() -> None:
    asked: list[int] = []

    def compute(terms: Sequence[Term]) -> list[Tensor]:
        asked.extend(term.tokens[0] for term in terms)
        return [torch.full((term.n, 4), float(term.tokens[0])) for term in terms]

    def term(token: int) -> Term:
        return Term((token,), 1, lambda edited, original: edited.sum(), True)

    originals = Originals(compute, max_bytes=40)  # two of 16 bytes
    first, again = term(1), term(1)
    found = originals.of([first, again, term(2), term(3)])
    assert asked == [1, 2, 3] and found[first][0, 0] == found[again][0, 0] == 1
    assert {float(own[0, 0]) for own in originals.of([term(1), term(2), term(3)]).values()} == {1, 2, 3}
    assert asked == [1, 2, 3, 3]
    asked.clear()
    originals.keep([term(1), term(2)])  # more than half of the room
    originals.forget()
    originals.of([term(1)])
    assert asked == [1, 1]
    asked.clear()
    originals.keep([term(1)])
    originals.forget()
    originals.of([term(1), term(2), term(3)])  # room for one besides
    originals.of([term(1), term(2), term(3)])
    assert asked == [1, 1, 2, 3, 3]
    asked.clear()
    originals.forget()
    originals.remember([term(1), term(3), again, term(2)])  # 1 is kept; room for one besides
    assert asked == [3]
    found = originals.of([first, term(3), term(2)])
    assert asked == [3, 2] and [float(own[0, 0]) for own in found.values()] == [1, 3, 2]


# Beside the search


def learned_trial(number: int) -> optuna.trial.FrozenTrial:
    writers = [{"writer": "w", "component": "attn.o_proj", "layer": 1, "strength": 1.0, "cosine": 0.9}]
    learned = {"edit": "0" * 36, "number": number, "weight": 1.0, "steps": 8, "writers": writers}
    attributes = {
        "origin": "learned",
        "direction_index": None,
        "parameters": None,
        "learned": learned,
        "refusals": 0,
        "kl_divergence": 1e-4,
    }
    return create_trial(state=TrialState.COMPLETE, values=[0.0, 1e-4], user_attrs=attributes)


def made_up(ablations: list[Ablation], limit: object = None) -> list[Score]:
    strengths = [sum(p.max_weight + p.min_weight for p in ablation.parameters.values()) for ablation in ablations]
    return [Score(max(0, round(20 - 6 * s)), 0.02 * s**2) for s in strengths]


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=pytest.mark.slow), "nsgaii", "random"])
def test_a_search_proposes_the_same_whatever_was_learned_before(sampler: SamplerName) -> None:
    space = search_space(Settings(model="m"), ["attn.o_proj", "mlp.down_proj"], 10)
    found = []
    for n_learned in (0, 3):
        study = optuna.create_study(directions=["minimize", "minimize"])
        for number in range(n_learned):
            study.add_trial(learned_trial(number))
        search = Search(study, "nowhere", space, Sampling(3, 4, sampler))
        search.run(9, made_up, lambda score: (score.refusals / 20, score.kl_divergence), 2)
        assert search.n_done == 9 and len(study.trials) == 9 + n_learned
        found.append([trial.params for trial in study.trials[n_learned:]])
        if n_learned:
            trial = study.ask()
            relative = make_sampler(sampler, 4, 0).infer_relative_search_space(study, trial)
            names = {"direction_scope", *space.choices()}
            assert set(relative) == (names if sampler in ("tpe", "gp", "nsgaii") else set())
            assert len(search_view(study).trials) == len(search_view(study).get_trials()) == 10
    assert found[0] == found[1]
    assert len({json.dumps(params) for params in found[0]}) == 9


class Opaque(torch.autograd.Function):
    """An operation that has no gradient, as kernels of some models have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        raise NotImplementedError("this kernel is for inference only")


def test_an_operation_without_a_gradient_is_told() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(LearningError, match=r"^the model has an operation without a gradient \(this kernel is for inference only\)$"):
        passes._backward(Opaque.apply(x).sum())
    with pytest.raises(RuntimeError, match="allocate memory"):
        passes._backward(OutOfRoom.apply(x).sum())


class OutOfRoom(Opaque):
    """Memory that runs out in the backward pass."""

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
