"""Finalists: trials of the front that are scored again after the search, by all scorers, on the same or other prompts.

The front is selected from many trials by their scores, so these are partly luck. Intervals show by how much; other prompts
(`final_bad_prompts`, `final_good_prompts`) and longer responses (`final_response_length`) avoid it. The results are stored in the study's
user attribute `finalists`, since attributes cannot be added to finished trials in Optuna.
"""

import math
from functools import partial

import optuna
from optuna.trial import FrozenTrial

from ..config import Settings
from ..evaluator import Evaluator
from ..prompts import Prompt
from ..scoring.measured import measure_original
from ..utils import JsonObject, Progress
from .failures import ONE_BY_ONE, failure_as_warning, reason, warn_of_failure
from .front import front_of
from .learned_edits import LearnedEdits
from .search import score_batch

ATTRIBUTE = "finalists"


def final_settings(settings: Settings) -> Settings:
    """The settings for scoring finalists."""
    changes = {
        "max_response_length": settings.final_response_length or settings.max_response_length,
        "kl_tokens": settings.final_kl_tokens or settings.kl_tokens,
        "good_evaluation_prompts": settings.final_good_prompts or settings.good_evaluation_prompts,
        "bad_evaluation_prompts": settings.final_bad_prompts or settings.bad_evaluation_prompts,
        "print_responses": False,
    }
    return settings.model_copy(update=changes)


def conditions(settings: Settings) -> JsonObject:
    """What the scores of finalists depend on. If it changes, they are scored again."""
    names = ("max_response_length", "kl_tokens", "good_evaluation_prompts", "bad_evaluation_prompts")
    return final_settings(settings).model_dump(mode="json", include=set(names))


def known_finalists(study: optuna.Study) -> JsonObject:
    """The study's attribute `finalists`: `trials` by number (text), `base` (the original), `conditions`, numbers of prompts; or empty."""
    return dict(study.user_attrs.get(ATTRIBUTE, {}))


def missing_finalists(study: optuna.Study, settings: Settings) -> list[FrozenTrial]:
    """The finalists that have not been scored again under the current conditions."""
    known = known_finalists(study)
    scored = known.get("trials", {}) if known.get("conditions") == conditions(settings) else {}
    return [trial for trial in front_of(study)[: settings.n_finalists] if str(trial.number) not in scored]


def score_finalists(
    study: optuna.Study,
    edits: LearnedEdits,
    search: Evaluator,
    prompts: tuple[list[Prompt], list[Prompt]],
    trials_per_batch: int,
    progress: Progress,
) -> JsonObject:
    """Score the missing finalists. Returns the new value of the study's attribute. `search` is the evaluator of the search;
    `prompts` are harmless and harmful ones.

    Raises `EvaluationError` if the original cannot be scored under these conditions. A trial that cannot be scored gets a `failure`; one
    whose learned edit is missing is left to a later run.
    """
    settings, (good_prompts, bad_prompts) = search.settings, prompts
    known, ablations = known_finalists(study), {}
    for trial in missing_finalists(study, settings):
        with failure_as_warning(progress, f"Trial {trial.number} was not scored again", settings.debug):
            ablations[trial.number] = edits.ablation_of(trial)
    if not ablations:
        return known
    missing = list(ablations)
    trials = dict(known.get("trials", {})) if known.get("conditions") == conditions(settings) else {}
    final = final_settings(settings)
    original = measure_original(final, search.model, good_prompts, bad_prompts, progress, all_scorers=True, like=search.original)
    evaluator = Evaluator(final, search.model, original, progress)
    warn_of_crash = partial(warn_of_failure, progress, ONE_BY_ONE, debug=settings.debug)
    with progress.task("Scoring the finalists again", len(missing)) as advance:
        for batch in (missing[start : start + trials_per_batch] for start in range(0, len(missing), trials_per_batch)):
            scores = score_batch(evaluator.score_trials, [ablations[number] for number in batch], lambda kl: math.inf, warn_of_crash)
            for number, score in zip(batch, scores, strict=True):
                if isinstance(score, Exception):
                    warn_of_failure(progress, f"Trial {number} was not scored again", score, settings.debug)
                trials[str(number)] = {"failure": reason(score)} if isinstance(score, Exception) else score.described()
            advance(len(batch))
    return {
        "conditions": conditions(settings),
        "n_bad_prompts": len(bad_prompts),
        "n_good_prompts": len(good_prompts),
        "base": original.described(),
        "trials": trials,
    }
