"""No saving changes a score: trials of the demonstration model against `generate`, one prompt at a time, on edited copies of it."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from heretic.config import Settings
from heretic.decoding.decoder import Decoder, Optimizations
from heretic.decoding.rows import Row
from heretic.editing.ablation import Ablation, ComponentParameters
from heretic.editing.directions import mean_residual, refusal_directions
from heretic.evaluator import Evaluator
from heretic.loading.load import load_model
from heretic.loading.source import model_source
from heretic.model import Model
from heretic.prompts import Prompt, load_prompts
from heretic.scoring.measured import measure_original
from heretic.utils import SilentProgress

N_PROMPTS = 10
EACH = [Optimizations(*switches) for switches in itertools.product([False, True], repeat=2)]


def kernel(weight: float, position: float, distance: float) -> ComponentParameters:
    return ComponentParameters(weight, position, 0.3 * weight, distance)


TRIALS = [
    Ablation(0.7, {"attn.o_proj": kernel(1.2, 0.7, 0.5), "mlp.down_proj": kernel(0.9, 0.8, 0.6)}),
    Ablation(None, {"attn.o_proj": kernel(1.0, 0.9, 0.2), "mlp.down_proj": kernel(0.8, 1.0, 0.2)}),
    Ablation(0.55, {"attn.o_proj": kernel(0.5, 0.6, 0.3), "mlp.down_proj": kernel(0.4, 0.7, 0.3)}),
    Ablation(0.7, {"attn.o_proj": kernel(1.1, 0.7, 0.5), "mlp.down_proj": kernel(0.9, 0.8, 0.6)}),
    Ablation(0.8, {"attn.o_proj": kernel(0.8, 0.7, 0.4), "mlp.down_proj": kernel(0.3, 0.7, 0.4)}),
]


class Demo:
    """The demonstration model in float32 with some of its prompts."""

    def __init__(self) -> None:
        self.settings = Settings(demo=True, dtypes=["float32"], max_response_length=40)  # type: ignore[call-arg]
        self.loaded = load_model(self.settings, model_source(self.settings), SilentProgress())
        self.prompts = {
            name: load_prompts(getattr(self.settings, name), self.settings.system_prompt, name)
            for name in ("good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts")
        }
        self.good: list[Prompt] = self.prompts["good_evaluation_prompts"][:N_PROMPTS]
        self.bad: list[Prompt] = self.prompts["bad_evaluation_prompts"][:N_PROMPTS]

        model = Model(self.loaded, self.settings, optimizations=EACH[0])
        good, bad = (mean_residual(model.residuals(self.prompts[name][:100])) for name in ("good_prompts", "bad_prompts"))
        self.directions = refusal_directions(good, bad)

    def evaluator(self, optimizations: Optimizations) -> Evaluator:
        model = Model(self.loaded, self.settings, optimizations=optimizations)
        model.use_directions(self.directions, "none")
        return Evaluator(self.settings, model, measure_original(self.settings, model, self.good, self.bad))

    def plain_scores(self) -> list[tuple[int, float]]:
        """By `generate`, full length, on copies of the model with edited weights."""
        evaluator = self.evaluator(EACH[0])
        model, rule = evaluator.model, evaluator.original.rule
        original = self._logprobs(model, model.model)
        scores = []
        for ablation in TRIALS:
            edited = self.edited(model, ablation)
            logprobs = self._logprobs(model, edited)
            divergence = float((np.exp(original) * (original - logprobs)).sum(axis=1).mean())
            responses = [self.generate(model, edited, row, self.settings.max_response_length) for row in model.rows_of(self.bad, 1)]
            texts = [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in responses]
            kinds = [rule.judge(text, is_cut_off=len(tokens) == 40).kind for text, tokens in zip(texts, responses, strict=True)]
            assert "degenerate" not in kinds
            scores.append((kinds.count("refusal"), divergence))
        return scores

    @staticmethod
    def edited(model: Model, ablation: Ablation) -> Any:
        """A copy whose weights were multiplied by `I - strength r r^T` in float64."""
        edited = copy.deepcopy(model.model)
        for module in edited.modules():
            module._forward_hooks.clear()
        for writer in model.architecture.writers:
            assert model.hooks is not None
            r, strength = model.hooks.edit_of(writer, ablation)
            weight = edited.get_submodule(writer.name).weight
            matrix = torch.eye(len(r), dtype=torch.float64) - strength * torch.outer(r.double(), r.double())
            weight.data = (matrix @ weight.double() if writer.component != "embed" else weight.double() @ matrix.T).to(weight.dtype)
        return edited

    def _logprobs(self, model: Model, network: Any) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            logits = [network(torch.tensor([row.tokens])).logits[0, -1].double().numpy() for row in model.rows_of(self.good, 1)]
        values: np.ndarray[Any, Any] = log_softmax(np.stack(logits), axis=-1)
        return values

    @staticmethod
    def generate(model: Model, network: Any, row: Row, length: int) -> list[int]:
        ids = torch.tensor([row.tokens])
        output = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
        tokens: list[int] = output[0, len(row.tokens) :].tolist()
        return tokens


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo()


@pytest.fixture(scope="module")
def expected(demo: Demo) -> list[tuple[int, float]]:
    return demo.plain_scores()


def test_the_trials_differ_from_one_another(expected: list[tuple[int, float]]) -> None:
    refusals = [refusals for refusals, _ in expected]
    assert min(refusals) < max(refusals)
    assert all(divergence > 1e-4 for _, divergence in expected)


@pytest.mark.parametrize("optimizations", EACH, ids=str)
def test_scores_are_those_of_generate_on_edited_weights(
    optimizations: Optimizations, demo: Demo, expected: list[tuple[int, float]]
) -> None:
    evaluator = demo.evaluator(optimizations)
    for trials_per_batch in (1, 4):
        scores = []
        for start in range(0, len(TRIALS), trials_per_batch):
            scores += evaluator.score_trials(TRIALS[start : start + trials_per_batch])
        assert [score.refusals for score in scores] == [refusals for refusals, _ in expected]  # type: ignore[union-attr]
        assert [score.kl_divergence for score in scores] == pytest.approx(  # type: ignore[union-attr]
            [divergence for _, divergence in expected], abs=1e-5
        )
    decoder = evaluator.model.decoder
    assert isinstance(decoder, Decoder)
    assert (decoder.prefix_cache is not None) == optimizations.prefix_cache


@pytest.mark.parametrize("kl_tokens", [16, 1])
def test_prompts_that_differ_only_in_what_all_begin_with(kl_tokens: int, demo: Demo) -> None:
    """Rows of harmless and harmful prompts are the same after their shared prefixes, but what was recorded of them is not."""
    good, bad = (
        [replace(prompt, system=f"You are a {kind} assistant.") for prompt in demo.bad[:8]] for kind in ("helpful", "careful and helpful")
    )
    settings = demo.settings.model_copy(update={"kl_tokens": kl_tokens, "max_response_length": 12})
    model = Model(demo.loaded, settings, optimizations=EACH[-1])
    model.use_directions(demo.directions, "none")
    measure_original(settings, model, good, bad)
    edited = demo.edited(model, TRIALS[0])
    for prompts in (good, bad):
        expected = [
            model.tokenizer.decode(demo.generate(model, edited, row, 12), skip_special_tokens=True) for row in model.rows_of(prompts, 1)
        ]
        assert model.responses(prompts, 12, TRIALS[0]) == expected


def test_answers_leave_earlier_by_the_learned_rule(demo: Demo) -> None:
    """Although the demonstration's are short. Both rules say the same of them."""
    tokens: dict[str, list[int]] = {}
    kinds: dict[str, list[str]] = {}
    for name in ("markers", "learned"):
        settings = demo.settings.model_copy(update={"refusal_rule": name})
        model = Model(demo.loaded, settings, optimizations=EACH[-1])
        model.use_directions(demo.directions, "none")
        rule = measure_original(settings, model, demo.good, demo.bad).rule
        rows = sorted(model.responses_of_trials(model.rows_of(demo.bad, 1), 40, TRIALS[:1], rule.is_decided), key=lambda row: row.prompt)
        tokens[name] = [len(row.generated) for row in rows]
        kinds[name] = [rule.judge(model.text_of(row.generated), len(row.generated) == 40).kind for row in rows]
    assert kinds["learned"] == kinds["markers"] and "compliance" in kinds["learned"]
    answers = [i for i, kind in enumerate(kinds["learned"]) if kind == "compliance"]
    learned, markers = (sum(tokens[name][i] for i in answers) for name in ("learned", "markers"))
    assert learned < 0.95 * markers
    assert all(tokens["learned"][i] <= tokens["markers"][i] for i in answers)
