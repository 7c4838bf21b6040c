"""The learned trials of a study: each learned from where the one before it ended, scored as any other, and told to the study at once."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from ..config import Settings
from ..errors import GivenUp, LearningError
from ..evaluator import Evaluator
from ..prompts import Prompt
from .journal import journal_errors
from .learned_edits import LearnedEdits, State, described, learned_trials
from .learning import FIRST_ROUNDS, LATER_ROUNDS, ROUND_STEPS, Learner, weights
from .search import score_batch

# The study's attribute that says why no edit could be learned.
LEARNING_FAILED = "learning_failed"


def lacks_learned_trials(study: optuna.Study, settings: Settings) -> bool:
    """Whether learned trials are still to be made: not if that failed, nor in a study that knew of none, unless it is said now."""
    is_known = "n_learned_trials" in {*study.user_attrs["settings"], *settings.model_fields_set}
    return is_known and LEARNING_FAILED not in study.user_attrs and len(learned_trials(study)) < settings.n_learned_trials


@dataclass(frozen=True)
class LearnedTrials:
    """The learned trials of a study. `location` is where errors say that the study lies, `edits` where the learned edits are kept."""

    study: optuna.Study
    location: object
    edits: LearnedEdits
    evaluator: Evaluator

    def learn(
        self,
        prompts: tuple[list[Prompt], list[Prompt]],
        on_trial: Callable[[FrozenTrial], None] = lambda trial: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Learn what is missing of them from `prompts` (harmless, harmful).

        A trial that is cut off leaves nothing, and is learned again by the resume, the same way. If the model cannot be learned from,
        that is told and noted in the study, and there are fewer trials. Raises `CheckpointError` if the study cannot be written.
        """
        settings, progress = self.evaluator.settings, self.evaluator.progress
        done, n_trials = learned_trials(self.study), settings.n_learned_trials
        try:
            learner = self._learner(prompts, done)
            n_left = n_trials - len(done)
            total = (n_left * LATER_ROUNDS + (0 if done else FIRST_ROUNDS - LATER_ROUNDS)) * ROUND_STEPS
            with progress.task(f"Learning {n_left} edits", total) as advance:
                for number, weight in list(enumerate(weights(n_trials)))[len(done) :]:
                    start = time.perf_counter()
                    outcome = learner.learn(number, weight, advance, should_stop)
                    if outcome is None:
                        return
                    told = {"number": number, "weight": weight, "steps": outcome.n_steps}
                    on_trial(self._tell(learner, told, start))
                    if should_stop():
                        return
        except GivenUp:  # Ctrl+C, and a model that takes long: what was not told is learned again by the resume
            return
        except LearningError as error:
            which = "No more" if learned_trials(self.study) else "No"
            progress.warning(f"{which} edits are learned: {error}. The search goes on without.")
            with journal_errors(str(self.location)):
                self.study.set_user_attr(LEARNING_FAILED, str(error))

    def _learner(self, prompts: tuple[list[Prompt], list[Prompt]], done: Sequence[FrozenTrial]) -> Learner:
        """A learner that goes on from where the last of the trials that are `done` ended."""
        settings, model = self.evaluator.settings, self.evaluator.model
        components = [name for name in model.architecture.components if name not in settings.disabled_components]
        learner = Learner(model, self.evaluator.original.rule, *prompts, components, settings.seed or 0, self.evaluator.progress)
        if done:
            _, state = self.edits.load(done[-1])
            learner.restore(state.tensors, state.facts)
        return learner

    def _tell(self, learner: Learner, told: Mapping[str, float], start: float) -> FrozenTrial:
        """Score the learner's edit, keep it, and add the trial with what is `told` of it to the study: whole or not at all."""
        ablation = learner.ablation()
        assert ablation.learned is not None
        (score,) = score_batch(self.evaluator.score_trials, [ablation], lambda kl: float("inf"))
        edit = learner.edit
        writers = [(writer.name, writer.component, writer.layer) for writer in edit.writers]
        with journal_errors(str(self.location)):
            learned = {
                "edit": self.edits.keep(self.study, ablation.learned, State(*learner.state())),
                **told,
                "writers": described(writers, list(ablation.learned.strengths.values()), edit.turned()),
            }
            seconds = round(time.perf_counter() - start, 3)
            attributes = {"origin": "learned", "direction_index": None, "parameters": None, "learned": learned, "seconds": seconds}
            if isinstance(score, Exception):
                failure = {"failure": f"{type(score).__name__}: {score}"}
                trial = create_trial(state=TrialState.FAIL, user_attrs=attributes | failure)
            else:
                values = list(self.evaluator.objectives(score))
                trial = create_trial(state=TrialState.COMPLETE, values=values, user_attrs=attributes | score.attributes())
            self.study.add_trial(trial)
            return learned_trials(self.study)[-1]
