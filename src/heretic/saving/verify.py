"""Whether a saved model, loaded again, is the trial that was chosen: its first-token KL divergence beside the trial's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..device import empty_cache, free_memory, is_out_of_memory
from ..errors import ExportError, ModelError
from ..evaluator import Evaluator
from ..loading.load import load_model
from ..loading.source import ModelSource
from ..model import Model
from ..scoring.divergence import kl_divergence
from ..utils import Progress

# Of the bytes of the weights: what a second model takes at work.
ROOM = 1.3
# The trial was scored by maps of outputs, the saved model has rounded weights: farther apart is worth a warning.
TOLERANCE, RELATIVE_TOLERANCE = 0.01, 0.1


def divergence_check(model: Model, evaluator: Evaluator, trial_divergence: float, progress: Progress) -> Callable[[Path], dict[str, Any]]:
    """A check for `export.save`: given a written folder, the saved model's own first-token KL divergence, for the record.

    Nothing where a second model has no room, and where the search was in 4 bits, whose divergence is another model's.
    """

    def check(folder: Path) -> dict[str, Any]:
        if model.loaded.quantized:
            progress.message("The saved model is not scored again: the search computed in 4 bits, and its scores are those of that model.")
            return {}
        needed = sum(p.numel() * p.itemsize for p in model.model.parameters())
        free = free_memory(model.device)
        if free < ROOM * needed:
            progress.message(
                f"The saved model is not scored again: that takes about {ROOM * needed / 2**30:.1f} GiB of memory, and "
                f"{free / 2**30:.1f} are free. --evaluate-model does it."
            )
            return {}
        try:
            divergence = saved_divergence(folder, model, evaluator, progress)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            progress.message("The saved model is not scored again: memory ran out. --evaluate-model does it.")
            return {}
        text = f"The saved model's KL divergence on harmless prompts is {divergence:.4f}; the trial's was {trial_divergence:.4f}."
        if abs(divergence - trial_divergence) > TOLERANCE + RELATIVE_TOLERANCE * trial_divergence:
            progress.warning(f"{text} That is farther apart than rounding explains; compare its responses before you rely on it.")
        else:
            progress.message(text)
        return {"saved_kl_divergence": divergence}

    return check


def saved_divergence(folder: Path, model: Model, evaluator: Evaluator, progress: Progress) -> float:
    """The first-token KL divergence (nats, mean over the harmless prompts) of a saved model from the original.

    Raises `ExportError` where it cannot be loaded again.
    """
    loaded = model.loaded
    settings = evaluator.settings.model_copy(update={"dtypes": [str(loaded.dtype).removeprefix("torch.")], "quantization": "none"})
    source = ModelSource(str(folder), "the saved model", None, loaded.source.trust_remote_code)
    try:
        saved = Model(replace(load_model(settings, source, progress), tokenizer=loaded.tokenizer), settings)
    except ModelError as error:
        raise ExportError(f"The saved model cannot be loaded again, so it was not kept: {error}") from error
    saved.response_prefix = model.response_prefix
    logprobs = saved.first_token_logprobs(evaluator.good_prompts, description="Harmless prompts through the saved model")
    divergence = kl_divergence(evaluator.base_logprobs.cpu(), logprobs.cpu()).double().mean()
    del saved, logprobs
    empty_cache()
    return max(0.0, float(divergence))
