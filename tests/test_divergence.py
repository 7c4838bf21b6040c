"""KL divergences along the original's answers, against edited copies run token by token in float64."""

import copy
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy

from heretic.decoding.decoder import Decoder, Optimizations
from heretic.decoding.plain import PlainDecoder
from heretic.editing.ablation import Ablation, ComponentParameters
from heretic.errors import EvaluationError, TrialError
from heretic.model import Model
from heretic.prompts import Prompt
from heretic.scoring.divergence import OriginalAnswers, statistics
from heretic.utils import format_size
from tiny import Recorder, build, explicit_weight, load, save, unit_directions

PROMPTS = [
    Prompt("you are a cat", text)
    for text in (
        "how do i bake bread ?",
        "hello",
        "fix my bike and the mat",
        "the cat",
        "a dog sat on my mat .",
        "yes no yes",
        "i",
        "bread !",
    )
]
PARAMETERS = {"attn.o_proj": ComponentParameters(1.0, 1.0, 0.4, 1.0), "mlp.down_proj": ComponentParameters(0.5, 0.0, 1.3, 1.0)}
ABLATIONS = [Ablation(None, PARAMETERS), Ablation(0.3, PARAMETERS), Ablation(1.0, {"mlp.down_proj": PARAMETERS["mlp.down_proj"]})]
N_TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build("llama", seed=5)
    with torch.no_grad():
        model.lm_head.weight[2] *= 2  # some answers end early
    return save(tmp_path_factory.mktemp("llama"), model)


def edited_copy(model: Model, ablation: Ablation | None) -> Any:
    """The network in float64 with every weight edited as the definition says."""
    network = copy.deepcopy(model.model)
    for module in network.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    network = network.double()
    for writer in model.architecture.writers if ablation else ():
        assert model.hooks is not None and ablation is not None
        r, strength = model.hooks.edit_of(writer, ablation)
        if strength:
            linear = network.get_submodule(writer.name)
            linear.weight.data = torch.from_numpy(explicit_weight(linear.weight, r, strength, "none"))
    return network


def logprobs(network: Any, ids: list[int]) -> np.ndarray:
    """Log-probabilities of the next token, without any cache, padding or company."""
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
    values: np.ndarray = log_softmax(logits)
    return values


def by_hand(model: Model, ablation: Ablation) -> list[list[float]]:
    """For each prompt the KL divergence at each token of the original's greedy answer, its end token included."""
    original, edited = edited_copy(model, None), edited_copy(model, ablation)
    result = []
    for row in model.rows_of(PROMPTS, 1):
        ids, divergences = list(row.tokens), []
        for _ in range(N_TOKENS):
            before, after = logprobs(original, ids), logprobs(edited, ids)
            divergences.append(float(entropy(np.exp(before), np.exp(after))))
            token = int(before.argmax())
            if token == 2:
                break
            ids.append(token)
        result.append(divergences)
    return result


def check(model: Model, directions: torch.Tensor, n_together: int) -> None:
    model.use_directions(directions, "none")
    expected = [by_hand(model, ablation) for ablation in ABLATIONS]
    lengths = [len(own) for own in expected[0]]
    assert min(lengths) < max(lengths) == N_TOKENS, "some answers end before the others"
    answers = OriginalAnswers(model, PROMPTS, N_TOKENS)
    with model.recording_prefix_cache():
        answers.record(model)
    found = [d for start in range(0, 3, n_together) for d in answers.divergences(model, ABLATIONS[start : start + n_together])]
    for divergences, own in zip(found, expected, strict=True):
        assert divergences.n_tokens.tolist() == lengths
        for values, hand in zip(divergences.values, own, strict=True):
            np.testing.assert_allclose(values[: len(hand)], hand, rtol=2e-3, atol=1e-6)
        assert divergences.sums.sum() / divergences.n_tokens.sum() == pytest.approx(np.mean([kl for kls in own for kl in kls]), rel=1e-4)
        assert divergences.first_token.mean() == pytest.approx(np.mean([kls[0] for kls in own]), rel=1e-4)
    (nothing,) = answers.divergences(model, [])
    assert np.nanmax(nothing.values) < 1e-6
    # The first token alone is what it is without an answer.
    alone = answers.first_token_logprobs()
    torch.testing.assert_close(alone, model.first_token_logprobs(PROMPTS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_together", [1, 3])
@pytest.mark.parametrize(
    "optimizations",
    [Optimizations(), Optimizations(shared_prefix=False, prefix_cache=False), Optimizations(prefix_cache=False)],
    ids=["all", "none", "prefix"],
)
def test_divergences_are_those_of_an_explicit_computation(optimizations: Optimizations, n_together: int, folder: Path) -> None:
    model = load(folder)
    model.decoder.optimizations = optimizations
    assert isinstance(model.decoder, Decoder)
    check(model, unit_directions(3, 32), n_together)


@pytest.mark.parametrize("rows", [2, 128])
def test_by_plain_forward_passes(rows: int, folder: Path) -> None:
    """As models do whose cache holds more than keys and values."""
    model = load(folder)
    decoder = model.decoder
    model.decoder = PlainDecoder(model.model, decoder.end_tokens, rows, decoder.assign_rows)
    check(model, unit_directions(3, 32), 3)


@pytest.mark.parametrize("model_type", ["gemma3_text", "mamba"])
def test_other_models_agree_with_their_own_first_tokens(model_type: str, tmp_path: Path) -> None:
    """Sliding windows and state spaces: one pass along the answers predicts what the model then says."""
    model = load(save(tmp_path / "m", build(model_type)))
    answers = OriginalAnswers(model, PROMPTS, N_TOKENS)
    answers.record(model)
    torch.testing.assert_close(answers.first_token_logprobs(), model.first_token_logprobs(PROMPTS), rtol=1e-3, atol=1e-3)
    chosen = answers._logprobs(torch.arange(sum(answers.n_positions))).argmax(dim=-1).tolist()
    rows = list(model.responses_of_trials(model.rows_of(PROMPTS, 1), N_TOKENS, []))
    said = {row.prompt: row.generated for row in rows}
    for i, answer in enumerate(answers.answers):
        own = chosen[answers._starts[i] : answers._starts[i + 1]]
        assert own[: len(said[i])] == said[i][: len(own)]
        assert own[: len(answer)] == answer


def test_one_token_needs_no_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    model.use_directions(unit_directions(3, 32), "none")
    monkeypatch.setattr(Model, "responses_of_trials", None)
    answers = OriginalAnswers(model, PROMPTS, 1)
    answers.record(model)
    (found,) = answers.divergences(model, ABLATIONS[:1])
    assert found.values.shape == (len(PROMPTS), 1)
    expected = [own[0] for own in by_hand(model, ABLATIONS[0])]
    np.testing.assert_allclose(found.first_token, expected, rtol=2e-3, atol=1e-6)


def test_a_prompt_given_often_is_no_prefix_of_its_own_answer(folder: Path) -> None:
    """All rows begin alike up to the answer's end, and still every position is predicted."""
    model = load(folder)
    model.use_directions(unit_directions(3, 32), "none")
    same = [PROMPTS[0]] * 9
    answers = OriginalAnswers(model, same, N_TOKENS)
    answers.record(model)
    (found,) = answers.divergences(model, ABLATIONS[:1])
    hand = by_hand(model, ABLATIONS[0])[0]
    for values in found.values:
        np.testing.assert_allclose(values[: len(hand)], hand, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_logits_that_do_not_fit_beside_the_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """They lie in main memory, or in a file that nobody sees and that is gone with the process."""
    model = load(folder)
    model.progress = recorder = Recorder()
    model.use_directions(unit_directions(3, 32), "none")
    usual = OriginalAnswers(model, PROMPTS, N_TOKENS)
    usual.record(model)
    monkeypatch.setattr("heretic.scoring.divergence.DEVICE_SHARE", 0)
    if place == "disk":
        monkeypatch.setattr("heretic.scoring.divergence.MEMORY_SHARE", 0)
    recorder.messages.clear()
    moved = OriginalAnswers(model, PROMPTS, N_TOKENS, folder=tmp_path / "studies")
    moved.record(model)
    n_bytes = sum(moved.n_positions) * model.model.get_input_embeddings().weight.shape[0] * 4
    told = (
        f"The original's logits take {format_size(n_bytes)}, too much for memory. "
        f"They are stored in a temporary file in {tmp_path / 'studies'}."
    )
    assert recorder.messages == ([told] if place == "disk" else [])
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == (place == "disk") and all(line.endswith("(deleted)") for line in mapped)
    assert list(tmp_path.rglob("*")) == ([tmp_path / "studies"] if place == "disk" else [])
    first, second = (answers.divergences(model, ABLATIONS)[1].values for answers in (usual, moved))
    np.testing.assert_array_equal(first, second)


def test_logits_that_fit_nowhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real limit of the system's on the size of files."""
    model = load(folder)
    monkeypatch.setattr("heretic.scoring.divergence.free_memory", lambda device: 0)
    answers = OriginalAnswers(model, PROMPTS, N_TOKENS, folder=tmp_path)
    size = format_size(sum(answers.n_positions) * model.model.get_input_embeddings().weight.shape[0] * 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(EvaluationError) as caught:
            answers.record(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (
        f"The original's logits, which others are compared with, take {size}. They fit neither in memory nor in {tmp_path}: "
        "File too large. Use fewer good_evaluation_prompts, or decrease kl_tokens."
    )


def test_taking_logits_needs_little_more_than_they_take(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second copy of all of them: what each pass gives is put in its place and let go."""
    model = load(folder, max_batch_size=2)
    answers = OriginalAnswers(model, PROMPTS, N_TOKENS)
    alive: list[weakref.ref[Any]] = []
    most = 0
    logits_along = model.logits_along

    def watched(*arguments: Any, **more: Any) -> Iterator[Any]:
        nonlocal most
        for rows, logits in logits_along(*arguments, **more):
            content = logits.numpy().copy()  # lives as long as any tensor that is a part of it
            alive.append(weakref.ref(content))
            most = max(most, sum(ref() is not None for ref in alive))
            yield rows, torch.from_numpy(content)
            del content

    monkeypatch.setattr(model, "logits_along", watched)
    answers.record(model)
    assert len(alive) > 3 and most <= 2


def test_passes_hold_few_rows_where_logits_are_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    model.use_directions(unit_directions(3, 32), "none")
    answers = OriginalAnswers(model, PROMPTS, N_TOKENS)
    answers.record(model)
    whole = answers.divergences(model, ABLATIONS)
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    monkeypatch.setattr("heretic.decoding.decoder.LOGITS_BYTES", 2 * N_TOKENS * vocabulary * 4)
    sizes = [len(rows) for rows, _ in model.decoder.last_logits(model.rows_of(PROMPTS, 1), N_TOKENS)]
    assert max(sizes) == 2
    for one, other in zip(whole, answers.divergences(model, ABLATIONS), strict=True):
        np.testing.assert_allclose(one.values, other.values, rtol=1e-3, atol=1e-6)


def test_logits_that_are_not_finite(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.model.lm_head.weight[7] = float("nan")
    with pytest.raises(TrialError, match="not finite"):
        OriginalAnswers(model, PROMPTS, N_TOKENS)
    first_only = OriginalAnswers(model, PROMPTS, 1)
    with pytest.raises(TrialError, match="not finite"):
        first_only.record(model)


def test_statistics_are_numpys() -> None:
    values = np.random.default_rng(0).exponential(size=101)
    expected = {"mean": values.mean(), "median": np.sort(values)[50], "p95": np.sort(values)[95], "max": values.max()}
    assert statistics(values) == pytest.approx(expected)
