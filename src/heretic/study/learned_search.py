"""The learned trials of a study: each continues from the one before, is scored like any other trial, and stored at once."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from ..config import Settings
from ..editing.ablation import Ablation
from ..errors import Aborted, CheckpointError, LearningError, TrialError
from ..evaluator import Evaluator, Score
from ..prompts import Prompt
from .journal import journal_errors
from .learned_edits import LearnedEdits, State, described, learned_trials
from .learning import FIRST_ROUNDS, LATER_ROUNDS, ROUND_STEPS, Learner
from .search import score_batch

# The study's attribute with the reason why no edit could be learned.
LEARNING_FAILED = "learning_failed"


def lacks_learned_trials(study: optuna.Study, settings: Settings) -> bool:
    """Whether learned trials are missing that can be learned."""
    return LEARNING_FAILED not in study.user_attrs and len(learned_trials(study)) < settings.n_learned_trials


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
        """Learn the missing ones from `prompts` (harmless, harmful).

        An interrupted trial leaves nothing, and is learned again in the same way when the run is resumed. If edits cannot be learned for
        the model, a warning is shown, the reason is stored in the study, and there are fewer trials. Raises `CheckpointError` if the study
        cannot be written.
        """
        settings, progress = self.evaluator.settings, self.evaluator.progress
        done, n_trials = learned_trials(self.study), settings.n_learned_trials
        try:
            learner = self._learner(prompts, done)
            n_left = n_trials - len(done)
            total = (n_left * LATER_ROUNDS + (0 if done else FIRST_ROUNDS - LATER_ROUNDS)) * ROUND_STEPS
            with progress.task("Learning 1 edit" if n_left == 1 else f"Learning {n_left} edits", total) as advance:
                for number in range(len(done), n_trials):
                    start, weight = time.perf_counter(), learner.next_weight()
                    outcome = learner.learn(number, weight, advance, should_stop)
                    if outcome is None:
                        return
                    if len(learned_trials(self.study)) > number:
                        progress.message("Another process learns the edits of this study. They are left to it.")
                        return
                    facts = {"number": number, "weight": weight, "steps": outcome.n_steps}
                    on_trial(self._record_trial(learner, facts, start))
                    if should_stop():
                        return
        except Aborted:  # Ctrl+C and a slow model: a trial that was not stored is learned again when the run is resumed
            return
        except LearningError as error:
            which = "No more" if learned_trials(self.study) else "No"
            goes_on = " The search continues without them." if settings.n_trials else ""
            progress.warning(f"{which} edits are learned: {error}.{goes_on}")
            with journal_errors(str(self.location)):
                self.study.set_user_attr(LEARNING_FAILED, str(error))

    def _learner(self, prompts: tuple[list[Prompt], list[Prompt]], done: Sequence[FrozenTrial]) -> Learner:
        """A learner that goes on from where the last of the trials that are `done` ended."""
        settings, model = self.evaluator.settings, self.evaluator.model
        components = [name for name in model.architecture.components if name not in settings.disabled_components]
        learner = Learner(model, self.evaluator.original.rule, *prompts, components, settings.seed or 0)
        if done:
            try:
                _, state = self.edits.load(done[-1])
            except CheckpointError as error:
                raise LearningError(f"they start from the edit of trial {done[-1].number}, which is missing or damaged") from error
            learner.restore(state.tensors, state.facts)
        return learner

    def _record_trial(self, learner: Learner, facts: Mapping[str, float], start: float) -> FrozenTrial:
        """Score the learner's edit, store it, and add the trial with `facts` about it to the study atomically."""
        ablation = learner.ablation()
        assert ablation.learned is not None
        score, values = self._score(ablation)
        edit = learner.edit
        writers = [(writer.name, writer.component, writer.layer) for writer in edit.writers]
        with journal_errors(str(self.location)):
            learned = {
                "edit": self.edits.keep(self.study, ablation.learned, State(*learner.state())),
                **facts,
                "writers": described(writers, list(ablation.learned.strengths.values()), edit.turned()),
            }
            seconds = round(time.perf_counter() - start, 3)
            attributes = {"origin": "learned", "direction_index": None, "parameters": None, "learned": learned, "seconds": seconds}
            if isinstance(score, Exception):
                failure = {"failure": f"{type(score).__name__}: {score}"}
                trial = create_trial(state=TrialState.FAIL, user_attrs=attributes | failure)
            else:
                trial = create_trial(state=TrialState.COMPLETE, values=values, user_attrs=attributes | score.attributes())
            self.study.add_trial(trial)
            return learned_trials(self.study)[-1]

    def _score(self, ablation: Ablation) -> tuple[Score | Exception, list[float]]:
        """The score of an edit with its objective values, or the error that scoring it ended with."""
        (score,) = score_batch(self.evaluator.score_trials, [ablation], lambda kl: float("inf"))
        try:
            return score, [] if isinstance(score, Exception) else list(self.evaluator.objectives(score))
        except TrialError as error:
            return error, []
