"""Check that a saved model, loaded again, matches the chosen trial: its first-token KL divergence against the trial's."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..device import empty_cache, free_memory
from ..errors import TrialError
from ..evaluator import Evaluator
from ..loading.load import load_model
from ..loading.source import ModelSource
from ..model import NOT_FINITE, Model
from ..study.failures import failure_as_warning
from ..utils import JsonObject, Progress

# Memory that a second model needs while running, relative to the size of its weights.
ROOM = 1.3
# The trial was scored with edited outputs, the saved model has rounded weights. A larger difference is worth a warning.
TOLERANCE, RELATIVE_TOLERANCE = 0.01, 0.1


def divergence_check(model: Model, evaluator: Evaluator, trial_divergence: float, progress: Progress) -> Callable[[Path], JsonObject]:
    """A check for `export.save`: for a saved model's folder, it returns its first-token KL divergence for the record.

    The result is empty, with a message, if there is no memory for a second model, if the check fails, or if the search used 4-bit weights,
    whose divergence is that of another model.
    """

    def check(folder: Path) -> JsonObject:
        if model.loaded.quantized:
            progress.message(
                "The saved model is not scored again: the search used 4-bit weights, and its scores are those of the quantized model."
            )
            return {}
        needed = sum(p.numel() * p.itemsize for p in model.model.parameters())
        free = free_memory(model.device)
        if free < ROOM * needed:
            progress.message(
                f"The saved model is not scored again: that needs about {ROOM * needed / 2**30:.1f} GiB of memory, and "
                f"{free / 2**30:.1f} are free. You can score it with --evaluate-model."
            )
            return {}
        divergence = None
        what, debug = "The saved model is kept, but could not be scored again", evaluator.settings.debug
        interrupted = "Interrupted: the saved model is not scored again. You can score it with --evaluate-model."
        with failure_as_warning(progress, what, debug, interrupted):
            divergence = saved_divergence(folder, model, evaluator, progress)
        empty_cache()
        if divergence is None:
            return {}
        text = f"The saved model's KL divergence on harmless prompts is {divergence:.4f}; the trial's was {trial_divergence:.4f}."
        if abs(divergence - trial_divergence) > TOLERANCE + RELATIVE_TOLERANCE * trial_divergence:
            progress.warning(f"{text} Rounding does not explain the difference; compare its responses before you rely on it.")
        else:
            progress.message(text)
        return {"saved_kl_divergence": divergence}

    return check


def saved_divergence(folder: Path, model: Model, evaluator: Evaluator, progress: Progress) -> float:
    """The first-token KL divergence (nats, mean over the harmless prompts) of a saved model from the original.

    Raises `ModelError` if it cannot be loaded, and `TrialError` if its logits are not finite.
    """
    loaded = model.loaded
    settings = evaluator.settings.model_copy(update={"dtypes": [loaded.dtype_name], "quantization": "none"})
    source = ModelSource(str(folder), "the saved model", None, loaded.source.trust_remote_code)
    parts = replace(load_model(settings, source, progress), tokenizer=loaded.tokenizer)
    saved = Model(parts, settings, response_prefix=model.response_prefix)
    (divergences,) = evaluator.original.answers.divergences(saved, [], "Harmless prompts on the saved model")
    divergence = float(divergences.first_token.mean())
    if not math.isfinite(divergence):
        raise TrialError(NOT_FINITE)
    return divergence
