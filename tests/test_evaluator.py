"""Scores against hand-counted refusals, SciPy, and models whose weights were edited by hand."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from heretic.config import REFUSAL_MARKERS, Settings
from heretic.editing.ablation import Ablation, ComponentParameters
from heretic.errors import EvaluationError, TrialError
from heretic.evaluator import Evaluator, Score
from heretic.prompts import Prompt
from heretic.scoring.divergence import kl_divergence
from heretic.scoring.measured import measure_original, refusal_rule
from heretic.scoring.response_prefix import close_thought, common_prefix, find_response_prefix
from heretic.scoring.responses import RefusalRule, normalize
from heretic.scoring.scorers import divergence_objective
from tiny import TEMPLATE, Recorder, build, load, loud, save, settings, unit_directions

REFUSED = [
    "I cannot help with that.",
    "**I** cannot help with that.",
    "I *can't* do this.",
    "I can\u2019t do this.",
    "I\ncannot\t\n  do this.",
    "As an AI, there are things I do not do.",
    "Well ... I'M SORRY, but no.",
    "I won\u2019t.",
    "That would be Illegal.",
    "It violates the rules.",
    "# **As an  AI**",
    "I\u00a0cannot do this.",  # a no-break space is white space
    "",
    " \n\t ",
]
ANSWERED = [
    "Sure, here is how.",
    "First, preheat the oven.",
    "Icannot",
    "I can do that.",
    "I canno",
    "Ethics is a branch of philosophy.",
    "**",  # not empty, and no marker
    "The answer is no.",
]


@pytest.mark.parametrize("response", REFUSED)
def test_refusals(response: str) -> None:
    assert RefusalRule(REFUSAL_MARKERS).classify(response, is_cut_off=True) != "compliance"


@pytest.mark.parametrize("response", ANSWERED)
def test_answers(response: str) -> None:
    assert RefusalRule(REFUSAL_MARKERS).classify(response, is_cut_off=True) != "refusal"


def test_markers_in_any_case() -> None:
    rule = RefusalRule(["As An AI", "no\u2019"])
    assert rule.is_decided("as AN ai")
    assert not rule.is_decided("")


def test_normalized_text() -> None:
    assert normalize("**I**  Can\u2019t\n\n\tDO \u2014 *this* ") == "i can't do \u2014 this "


def test_what_has_occurred_stays() -> None:
    """So a row may stop at its first marker: the normalized text of a beginning is a beginning of the normalized text."""
    response = "Well * , I\u2019m\n\n **sorry** , but  I can\u2019t \n."
    whole = normalize(response)
    for end in range(len(response) + 1):
        assert whole.startswith(normalize(response[:end]).rstrip(" "))
    rule = RefusalRule(["i'm sorry"])
    verdicts = [rule.is_decided(response[:end]) for end in range(len(response) + 1)]
    assert verdicts == sorted(verdicts)
    assert True in verdicts


def logprobs(n: int, size: int, seed: int, spread: float = 3.0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(n, size)) * spread
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_kl_divergence_is_scipys() -> None:
    original, edited = logprobs(150, 40, 1), logprobs(150, 40, 2)
    expected = entropy(np.exp(original), np.exp(edited), axis=1)
    np.testing.assert_allclose(kl_divergence(torch.from_numpy(original), torch.from_numpy(edited)).numpy(), expected, rtol=1e-12)
    narrow = kl_divergence(torch.from_numpy(original).float(), torch.from_numpy(edited).float())
    assert narrow.shape == (150,)
    np.testing.assert_allclose(narrow.numpy(), expected, rtol=1e-5)
    # It is not symmetric: the original comes first.
    backwards = entropy(np.exp(edited), np.exp(original), axis=1)
    assert np.abs(expected - backwards).min() > 1e-6


def test_kl_divergence_of_equals_is_nothing() -> None:
    same = torch.from_numpy(logprobs(3, 10, 1))
    assert kl_divergence(same, same).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("refusals", "kl", "scale", "target", "expected"),
    [
        (20, 0.5, 1.0, 0.01, 0.5),
        (20, 0.5, 2.0, 0.01, 0.25),
        (100, 0.0, 1.0, 0.01, 0.01),  # nothing done: as bad as the target's divergence
        (50, 0.004, 1.0, 0.01, 0.005),
        (50, 0.009, 2.0, 0.02, 0.005),
        (50, 0.01, 1.0, 0.01, 0.01),  # at the target the divergence itself
        (0, 0.001, 1.0, 0.01, 0.0),
        (120, 0.3, 1.0, 0.01, 0.3),
        (50, 0.0, 1.0, 0.0, 0.0),
    ],
)
def test_the_divergence_as_an_objective_by_hand(refusals: int, kl: float, scale: float, target: float, expected: float) -> None:
    assert divergence_objective(kl, refusals / 100, scale, target) == pytest.approx(expected, abs=1e-15)


def test_common_prefix() -> None:
    assert common_prefix(["<think> a b", "<think> a c", "<think> d"]) == "<think>"
    assert common_prefix(["yes, a", "yes, b"]) == "yes,"
    assert common_prefix(["yes\n\na", "yes\n\nb"]) == "yes\n\n"  # blanks go, line breaks are part of the habit
    assert common_prefix(["a", "b"]) == ""
    assert common_prefix(["the same", "the same"]) == ""
    assert common_prefix([]) == ""
    assert common_prefix(["", "a"]) == ""


SKIPS = Settings(model="m").chain_of_thought_skips


@pytest.mark.parametrize(
    ("prefix", "closed"),
    [
        ("<think>\nOkay, ", "<think></think>"),
        ("<think>", "<think></think>"),
        (
            "<|channel|>analysis<|message|>The user",
            "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        ("<thought>\n", "<thought></thought>"),
        ("[THINK]Let me", "[THINK][/THINK]"),
        ("Sure,", "Sure,"),
        ("", ""),
        ("Hm <think>", "Hm <think>"),
    ],
)
def test_thoughts_are_closed(prefix: str, closed: str) -> None:
    assert close_thought(prefix, SKIPS) == closed


GOOD = [Prompt("", text) for text in ("how do i bake bread ?", "hello", "fix my bike and the mat", "the cat", "a dog sat on my mat .")]
BAD = [Prompt("you are a cat", text) for text in ("hello", "my bike", "yes yes yes", "how do you bake ?", "sorry", "the dog and i", "no")]
MARKERS = ["mat", "do", "cat"]
PARAMETERS = {"attn.o_proj": ComponentParameters(1.0, 1.0, 0.4, 1.0), "mlp.down_proj": ComponentParameters(0.5, 0.0, 1.3, 1.0)}
ABLATIONS = [Ablation(None, PARAMETERS), Ablation(0.3, PARAMETERS), Ablation(1.0, {"mlp.down_proj": PARAMETERS["mlp.down_proj"]})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build("llama", seed=5)
    with torch.no_grad():
        model.lm_head.weight[2] *= 2
    return save(tmp_path_factory.mktemp("llama"), model)


def evaluator(folder: Path, progress: Any = None, **changes: Any) -> Evaluator:
    chosen = {"refusal_rule": "markers", "refusal_markers": MARKERS, **changes}
    model = load(folder, **chosen)
    model.use_directions(unit_directions(3, 32), "full")
    original = measure_original(settings(folder, **chosen), model, GOOD, BAD, progress)
    return Evaluator(settings(folder, **chosen), model, original, progress)


def by_hand(made: Evaluator, ablation: Ablation | None) -> tuple[int, float]:
    """Refusals and KL divergence from whole responses and log-probabilities; the model itself is tested elsewhere."""
    responses = made.model.responses(BAD, 12, ablation)
    before = made.model.responses(BAD, 12)
    original, edited = (made.model.first_token_logprobs(GOOD, a).double().exp().numpy() for a in (None, ablation))
    return failures(responses, before), float(entropy(original, edited, axis=1).mean())


def failures(responses: Sequence[str], before: Sequence[str]) -> int:
    """Refusals, and empty responses if the original's are not empty."""
    return sum(
        any(marker in r for marker in MARKERS) or (not r.strip() and bool(b.strip())) for r, b in zip(responses, before, strict=True)
    )


def test_scores(folder: Path) -> None:
    """One by one and all together; that of nothing has no divergence."""
    made = evaluator(folder)
    expected = [by_hand(made, ablation) for ablation in ABLATIONS]
    assert made.original.refusals == by_hand(made, None)[0]
    assert 0 < made.original.refusals < len(BAD)
    assert len({refusals for refusals, _ in expected} | {made.original.refusals}) > 2
    for scores in ([made.score(ablation) for ablation in ABLATIONS], made.score_trials(ABLATIONS)):
        assert [score.refusals for score in scores] == [refusals for refusals, _ in expected]
        np.testing.assert_allclose([score.kl_divergence for score in scores], [kl for _, kl in expected], rtol=1e-4)
        assert not any(score.bounded for score in scores)
    nothing = made.score(None)
    assert nothing.refusals == made.original.refusals
    assert 0 <= nothing.kl_divergence < 1e-6
    kl = expected[0][1]
    assert made.objectives(Score(1, kl)) == pytest.approx((1 / made.original.refusals, kl))
    # Another worker of the study has counted more.
    more = made.original.refusals + 1
    elsewhere = Evaluator(made.settings, made.model, made.original.counting_from(more))
    assert elsewhere.original.baseline.refusals == more
    assert elsewhere.objectives(Score(1, kl)) == pytest.approx((1 / more, kl))


def test_trials_that_are_not_worth_finishing(folder: Path) -> None:
    """A trial with more refusals than its divergence allows is stopped and says so; the others are scored as ever."""
    made = evaluator(folder, max_batch_size=2)
    whole = made.score_trials(ABLATIONS)
    victim = max(range(3), key=lambda i: whole[i].refusals)
    assert whole[victim].refusals > 2
    limits = []

    def limit(kl: float) -> float:
        limits.append(kl)
        return 1 if math.isclose(kl, whole[victim].kl_divergence, rel_tol=1e-4) else math.inf

    scores = made.score_trials(ABLATIONS, limit)
    np.testing.assert_allclose(limits, [score.kl_divergence for score in whole], rtol=1e-4)
    assert [score.bounded for score in scores] == [i == victim for i in range(3)]
    assert [score for score in scores if not score.bounded] == [score for i, score in enumerate(whole) if i != victim]
    assert 1 < scores[victim].refusals <= len(BAD)
    assert scores[victim].kl_divergence == pytest.approx(whole[victim].kl_divergence, rel=1e-4)

    def just_enough(kl: float) -> float:
        return next(score.refusals for score in whole if math.isclose(kl, score.kl_divergence, rel_tol=1e-4))

    assert made.score_trials(ABLATIONS, just_enough) == whole


def test_a_trial_that_overflows_has_no_score(tmp_path: Path) -> None:
    made = evaluator(save(tmp_path, loud(build("llama", seed=5))))
    broken = Ablation(None, {"mlp.down_proj": ComponentParameters(1e38, 1.0, 1e38, 1.0)})
    made.model.use_directions(unit_directions(3, 32), "none")
    expected = made.score(ABLATIONS[0])
    error, score = made.score_trials([broken, ABLATIONS[0]])
    assert isinstance(error, TrialError)
    assert str(error) == "the model returned logits that are not finite (NaN or infinite)"
    assert score.refusals == expected.refusals
    assert score.kl_divergence == pytest.approx(expected.kl_divergence, rel=1e-4)
    with pytest.raises(TrialError):
        made.score(broken)


def test_a_model_that_refuses_nothing(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # no response is empty
    with pytest.raises(EvaluationError) as caught:
        evaluator(save(tmp_path, model), refusal_markers=["zebra"])
    assert str(caught.value) == (
        "The model refuses none of the 7 harmful evaluation prompts, so there is nothing to remove. It may not be trained to "
        "refuse, or refuse in words that the rule does not know: check its responses with --print-responses, and set "
        "refusal_markers, system_prompt or bad_evaluation_prompts accordingly."
    )


def test_an_original_that_cannot_be_scored(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.model.lm_head.weight[7] = float("nan")
    with pytest.raises(EvaluationError) as caught:
        measure_original(settings(folder), model, GOOD, BAD)
    assert str(caught.value) == (
        "The original model cannot be scored: the model returned logits that are not finite (NaN or infinite). "
        "Try another --dtypes, such as float32."
    )


def test_printed_responses(folder: Path) -> None:
    """Every prompt with its whole response and verdict, once for the baseline and once a trial."""
    recorder = Recorder()
    made = evaluator(folder, recorder, print_responses=True)
    whole = made.model.responses(BAD, 12)

    def text(prompt: Prompt, response: str) -> str:
        refused = any(marker in response for marker in MARKERS)
        verdict = "Refused" if refused else "Answered" if response.strip() else "Degenerate"
        return f"Prompt: {prompt.user}\n{verdict}: {response.strip()}\n"

    assert recorder.messages == [text(prompt, response) for prompt, response in zip(BAD, whole, strict=True)]
    recorder.messages.clear()
    edited = made.model.responses(BAD, 12, ABLATIONS[0])
    score = made.score(ABLATIONS[0])
    assert sorted(recorder.messages) == sorted(text(prompt, response) for prompt, response in zip(BAD, edited, strict=True))
    assert score.refusals == failures(edited, whole)


def test_another_model_scored_against_the_original(folder: Path, tmp_path: Path) -> None:
    """What `evaluate_model` does: the baseline stays, the model is another."""
    made = evaluator(folder)
    base, base_logprobs = made.original.refusals, made.original.answers.first_token_logprobs()
    before = made.model.responses(BAD, 12)
    other = load(save(tmp_path, build("llama", seed=6)))
    score = Evaluator(made.settings, other, replace(made.original, prefix_cache=None)).score(None)
    responses = other.responses(BAD, 12)
    assert score.refusals == failures(responses, before)
    expected = entropy(base_logprobs.double().exp().numpy(), other.first_token_logprobs(GOOD).double().exp().numpy(), axis=1).mean()
    assert score.kl_divergence == pytest.approx(expected, rel=1e-4)
    assert made.original.refusals == base


@pytest.fixture(scope="module")
def habitual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that begins every response with the token `yes`, whatever follows."""
    model = build("llama", seed=5, tie_word_embeddings=False)
    with torch.no_grad():
        # Behind `<assistant>` every prompt's stream holds its embedding: a large one that `yes` answers to.
        model.model.embed_tokens.weight[5] = 0
        model.model.embed_tokens.weight[5, 3] = 60
        model.lm_head.weight[:, 3] = 0
        model.lm_head.weight[31, 3] = 10
    return save(tmp_path_factory.mktemp("habitual"), model)


def test_response_prefix_is_found(habitual: Path) -> None:
    model = load(habitual)
    responses = model.responses(GOOD, 32)
    assert {response.split()[0] for response in responses} == {"yes"}
    assert len({tuple(response.split()[:2]) for response in responses}) > 1
    model = model.with_response_prefix("left from before")
    assert find_response_prefix(model, settings(habitual), GOOD, []) == "yes"
    assert find_response_prefix(model, settings(habitual, chain_of_thought_skips=[("ye", "yes sorry")]), GOOD, []) == "yes sorry"


@pytest.mark.parametrize(
    ("template", "prefix", "inside"),
    [
        ("<think>\n", "", "<think>"),
        ("<think>\n", "Okay,", "<think>"),
        ("<think>\n", "Okay.</think>", None),
        ("<think>\n", "<think></think>", None),
        ("", "<think>", "<think>"),
        ("", "Hm <think>\nOkay,", "<think>"),
        ("", "<think></think>", None),
        ("", "Okay,", None),
    ],
)
def test_thinking_blocks_that_stay_open(template: str, prefix: str, inside: str | None, tmp_path: Path) -> None:
    """Nothing in them is judged, whatever all responses begin with."""
    thinking = TEMPLATE.replace("<assistant> ", f"<assistant> {template}")
    model = load(save(tmp_path, build(), thinking)).with_response_prefix(prefix)
    rule = refusal_rule(settings(tmp_path), model, BAD)
    assert rule.begins_inside == inside
    text = "I cannot help. No, I can.</think>First take flour and water, and mix them well."
    assert rule.is_decided(text[:20]) == (inside is None)
    assert rule.classify(text) == ("refusal" if inside is None else "compliance")


def test_response_prefix_that_is_given(habitual: Path) -> None:
    """Nothing is generated for it."""
    assert find_response_prefix(None, settings(habitual, response_prefix="no "), GOOD, []) == "no "
    assert find_response_prefix(None, settings(habitual, response_prefix=""), GOOD, []) == ""
