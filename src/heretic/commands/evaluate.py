"""`--evaluate-model`: another model, scored against the original as the search scores trials."""

from dataclasses import replace

from ..config import Settings
from ..console import Console
from ..device import describe_device, empty_cache
from ..errors import EvaluationError
from ..evaluator import MOST_DIVERGENT_PROMPTS, Evaluator
from ..loading.gguf import dequantized_source
from ..loading.load import load_config
from ..loading.source import model_source
from ..model import Model
from ..prompts import Prompts
from ..scoring.score_tables import divergent_rows, figure_rows, verdicts_text
from ..session.stages import load_all_prompts, load_model_to_edit, measure, with_found_prefix


def evaluate(settings: "Settings", console: "Console") -> int:
    """Score `evaluate_model` against `model` as the search scores trials."""

    # Both configurations are checked before either model is loaded.
    sources = [dequantized_source(model_source(settings, name), console) for name in (settings.model, settings.evaluate_model)]
    n_tokens, n_other = [load_config(source).get_text_config(decoder=True).vocab_size for source in sources]
    if n_tokens != n_other:
        raise EvaluationError(
            f"{settings.evaluate_model} has a vocabulary of {n_other} tokens, {settings.model} one of {n_tokens}: their KL divergence "
            "is not defined. Give a model with the same tokenizer."
        )
    prompts = load_all_prompts(settings, console)
    console.message(describe_device())
    model = with_found_prefix(settings, console, load_model_to_edit(settings, console), prompts)
    _check_lengths(settings, model, prompts)
    prefix = model.response_prefix
    original = replace(measure(settings, console, model, prompts, all_scorers=True), prefix_cache=None)  # it belongs to that model's layers
    del model
    empty_cache()

    other = load_model_to_edit(settings, console, settings.evaluate_model, prefix)
    _check_lengths(settings, other, prompts)  # its context may be shorter
    evaluator = Evaluator(settings, other, original, console)
    score = evaluator.score(None)
    models = [original.described(), score.described()]
    console.columns("Scores", ["", "Original", f"{settings.evaluate_model} (95 % interval)"], figure_rows(models))
    console.columns("Prompts with the largest KL divergence", *divergent_rows(evaluator.most_divergent(None, MOST_DIVERGENT_PROMPTS)))
    console.message(
        f"{settings.evaluate_model}: {verdicts_text(score.attributes(), original.baseline)}, KL divergence {score.kl_divergence:.4f} "
        f"from {settings.model} ({n_tokens} tokens)"
    )
    return 0


def _check_lengths(settings: Settings, model: Model, prompts: Prompts) -> None:
    """Raise `PromptError` for evaluation prompts without room for a response: of all scorers, some need responses to harmless ones."""
    n_new_tokens = max(settings.max_response_length, settings.kl_tokens)
    for name in ("good_evaluation_prompts", "bad_evaluation_prompts"):
        model.check_lengths(prompts.of_study[name], name, n_new_tokens, "max_response_length and kl_tokens")
