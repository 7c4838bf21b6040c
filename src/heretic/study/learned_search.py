"""The learned trials of a study: each continues from the one before, is scored like any other trial, and stored at once."""

import time
from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from ..config import Settings
from ..errors import Aborted, LearningError
from ..evaluator import Evaluator
from ..prompts import Prompt
from ..utils import Progress
from .checkpoint import journal_errors
from .learned_edits import LearnedEdits, State, described, learned_trials
from .learning import FIRST_ROUNDS, LATER_ROUNDS, ROUND_STEPS, Learner, Outcome, weights
from .search import score_batch

# The study's attribute with the reason why no edit could be learned.
LEARNING_FAILED = "learning_failed"


def lacks_learned_trials(study: optuna.Study, settings: Settings) -> bool:
    """Whether learned trials are missing: not if learning failed, nor in a study of an earlier version, unless requested now."""
    is_known = "n_learned_trials" in {*study.user_attrs["settings"], *settings.model_fields_set}
    return is_known and LEARNING_FAILED not in study.user_attrs and len(learned_trials(study)) < settings.n_learned_trials


def learn_trials(
    study: optuna.Study,
    edits: LearnedEdits,
    location: object,
    evaluator: Evaluator,
    prompts: tuple[list[Prompt], list[Prompt]],
    settings: Settings,
    progress: Progress,
    on_trial: Callable[[FrozenTrial, Outcome], None] = lambda trial, outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Learn the missing learned trials from `prompts` (harmless, harmful).

    An interrupted trial leaves nothing, and is learned again in the same way when the run is resumed. If edits cannot be learned for the
    model, a warning is shown, the reason is stored in the study, and there are fewer trials. Raises `CheckpointError` if the study (at
    `location`) cannot be written.
    """
    done, n_trials = learned_trials(study), settings.n_learned_trials
    components = [name for name in evaluator.model.architecture.components if name not in settings.disabled_components]
    try:
        learner = Learner(evaluator.model, evaluator.original.rule, *prompts, components, settings.seed or 0, progress)
        if done:
            _, state = edits.load(done[-1])
            learner.restore(state.tensors, state.facts)
        n_left = n_trials - len(done)
        total = (n_left * LATER_ROUNDS + (0 if done else FIRST_ROUNDS - LATER_ROUNDS)) * ROUND_STEPS
        with progress.task(f"Learning {n_left} edits", total) as advance:
            for number, weight in list(enumerate(weights(n_trials)))[len(done) :]:
                start = time.perf_counter()
                outcome = learner.learn(number, weight, advance, should_stop)
                if outcome is None:
                    return
                trial = _record_trial(study, edits, location, evaluator, learner, number, weight, outcome, start)
                on_trial(trial, outcome)
                if should_stop():
                    return
    except Aborted:  # Ctrl+C and a slow model: a trial that was not stored is learned again when the run is resumed
        return
    except LearningError as error:
        which = "No more" if learned_trials(study) else "No"
        progress.warning(f"{which} edits are learned: {error}. The search continues without them.")
        with journal_errors(str(location)):
            study.set_user_attr(LEARNING_FAILED, str(error))


def _record_trial(
    study: optuna.Study,
    edits: LearnedEdits,
    location: object,
    evaluator: Evaluator,
    learner: Learner,
    number: int,
    weight: float,
    outcome: Outcome,
    start: float,
) -> FrozenTrial:
    """Score the learner's edit, store it, and add the trial to the study atomically."""
    ablation = learner.ablation()
    assert ablation.learned is not None
    (score,) = score_batch(evaluator.score_trials, [ablation], lambda kl: float("inf"))
    edit = learner.edit
    writers = [(writer.name, writer.component, writer.layer) for writer in edit.writers]
    with journal_errors(str(location)):
        learned = {
            "edit": edits.keep(study, ablation.learned, State(*learner.state())),
            "number": number,
            "weight": weight,
            "steps": outcome.n_steps,
            "writers": described(writers, list(ablation.learned.strengths.values()), edit.turned()),
        }
        attributes: dict[str, Any] = {"origin": "learned", "direction_index": None, "parameters": None, "learned": learned}
        attributes["seconds"] = round(time.perf_counter() - start, 3)
        if isinstance(score, Exception):
            attributes["failure"] = f"{type(score).__name__}: {score}"
            trial = create_trial(state=TrialState.FAIL, user_attrs=attributes)
        else:
            values = list(evaluator.objectives(score))
            trial = create_trial(state=TrialState.COMPLETE, values=values, user_attrs=attributes | score.attributes())
        study.add_trial(trial)
        return learned_trials(study)[-1]
