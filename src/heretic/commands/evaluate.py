"""`--evaluate-model`: another model, scored against the original by the evaluator of the search."""

from ..config import Settings
from ..console import Console
from ..device import describe_device, empty_cache
from ..errors import EvaluationError
from ..evaluator import MOVED_PROMPTS
from ..loading.load import load_config
from ..loading.source import model_source
from ..scoring.score_tables import figure_rows, moved_rows, verdicts_text
from ..session.stages import load_all_prompts, load_model_to_edit, make_evaluator


def evaluate(settings: "Settings", console: "Console") -> int:
    """Score `evaluate_model` against `model` with the evaluator of the search."""

    # Both are looked at before one is loaded.
    sources = [model_source(settings), model_source(settings, settings.evaluate_model)]
    n_tokens, n_other = [load_config(source).get_text_config(decoder=True).vocab_size for source in sources]
    if n_tokens != n_other:
        raise EvaluationError(
            f"{settings.evaluate_model} has a vocabulary of {n_other} tokens and {settings.model} one of {n_tokens}: their KL divergence "
            "is not defined. Give a model with the same tokenizer."
        )
    prompts = load_all_prompts(settings, console)
    console.message(describe_device())
    original = load_model_to_edit(settings, console)
    evaluator = make_evaluator(settings, console, original, prompts, all_scorers=True)
    prefix = original.response_prefix
    del original
    evaluator.detach()
    empty_cache()

    other = load_model_to_edit(settings, console, settings.evaluate_model)
    other.response_prefix = prefix
    evaluator.model = other
    score = evaluator.score(None)
    before = {
        "scores": evaluator.base_scores,
        "response_classes": evaluator.base_response_classes,
        "early_response_classes": evaluator.base_early_response_classes,
    }
    models = [before, score.described()]
    console.columns("Scores", ["", "Original", f"{settings.evaluate_model} (95 % interval)"], figure_rows(models))
    console.columns("Prompts that moved most", *moved_rows(evaluator.most_moved(None, MOVED_PROMPTS)))
    console.message(
        f"{settings.evaluate_model}: {verdicts_text(score.attributes(), evaluator.baseline)}, KL divergence {score.kl_divergence:.4f} "
        f"from {settings.model} ({n_tokens} tokens)"
    )
    return 0
