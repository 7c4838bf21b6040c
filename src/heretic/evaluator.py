"""Scores trials with all scorers, and computes the objective values for the search."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .config import Settings
from .editing.ablation import Ablation
from .errors import TrialError
from .model import NOT_FINITE, Model
from .prompts import Prompt
from .scoring.divergence import statistics
from .scoring.figures import Figure, intervals
from .scoring.measured import MeasuredOriginal, figure_of, response_shown
from .scoring.outputs import Batch
from .scoring.responses import count_kinds
from .specifications import DEFAULT_OBJECTIVES
from .utils import JsonObject, Progress, SilentProgress

# Number of prompts shown with the largest divergence.
MOST_DIVERGENT_PROMPTS = 5


@dataclass(frozen=True)
class Score:
    """The scores of a trial: failures on harmful prompts (see `counts_against`), mean first-token KL divergence in nats, and others.

    `bounded`: the trial was stopped early because it was dominated, and its refusals are an estimate. `scores` has the value of every
    scorer by name, `figures` their contributions per prompt.
    """

    refusals: int
    kl_divergence: float
    bounded: bool = False
    response_classes: Mapping[str, int] = field(default_factory=dict, repr=False)
    early_response_classes: Mapping[str, int] = field(default_factory=dict, repr=False)  # if responses were judged by their full text
    kl_statistics: Mapping[str, float] = field(default_factory=dict, repr=False)
    scores: Mapping[str, float] = field(default_factory=dict, repr=False)
    figures: Mapping[str, Figure] = field(default_factory=dict, repr=False, compare=False)

    def value(self, name: str) -> float:
        """The score of a scorer."""
        usual = {"refusals": self.refusals, "kl_divergence": self.kl_divergence}
        return self.scores[name] if name in self.scores else usual[name]

    def attributes(self) -> JsonObject:
        """The scores as attributes of a trial."""
        found: JsonObject = {"refusals": self.refusals, "kl_divergence": self.kl_divergence}
        if self.bounded:
            found["bounded"] = True
        for name in ("response_classes", "kl_statistics", "scores"):
            if getattr(self, name):
                found[name] = dict(getattr(self, name))
        if "sequence_kl_divergence" in self.scores:
            found["sequence_kl_divergence"] = self.scores["sequence_kl_divergence"]
        if "harmless_refusals" in self.scores:
            found["harmless_refusals"] = int(self.scores["harmless_refusals"])
        return found

    def described(self) -> JsonObject:
        """All scores, with intervals, as plain data."""
        return {
            "scores": dict(self.scores),
            "intervals": intervals(self.figures),
            "response_classes": dict(self.response_classes),
            "early_response_classes": dict(self.early_response_classes),
            "kl_statistics": dict(self.kl_statistics),
        }


class Evaluator:
    """Scores ablations of `model` against the measured original."""

    def __init__(self, settings: Settings, model: Model, original: MeasuredOriginal, progress: Progress | None = None) -> None:
        self.settings = settings
        self.model = model
        self.original = original
        self.progress = progress or SilentProgress()
        self.good_prompts, self.bad_prompts = original.good_prompts, original.bad_prompts
        self.objective_names = [name for name, _ in settings.objectives]
        self.stops_dominated = settings.stop_dominated_trials and settings.objectives == DEFAULT_OBJECTIVES

    def _batch(self, ablations: Sequence[Ablation]) -> Batch:
        original = self.original
        return Batch(
            model=self.model,
            answers=original.answers,
            rule=original.rule,
            good_prompts=original.good_prompts,
            bad_prompts=original.bad_prompts,
            max_response_length=self.settings.max_response_length,
            ablations=ablations,
            original_kinds=original.kinds,
            whole_responses=original.whole_verdicts or self.settings.print_responses,
            whole_verdicts=original.whole_verdicts,
            show=response_shown(self.settings, self.progress),
        )

    def score(self, ablation: Ablation | None) -> Score:
        """Score an ablation (None: the unedited model). Raises `TrialError` if logits are not finite."""
        (result,) = self.score_trials([] if ablation is None else [ablation])
        if isinstance(result, TrialError):
            raise result
        return result

    def score_trials(
        self, ablations: Sequence[Ablation], limit: Callable[[float], float] = lambda kl: math.inf
    ) -> list[Score | TrialError]:
        """Scores of several ablations (none: the unedited model), computed together. For a trial that failed, the error is returned.

        `limit` returns, for a KL divergence, how many refusals a trial may have without being dominated. A trial with more is stopped: its
        score is `bounded`, its refusals are extrapolated from the prompts started so far, and scorers that need responses are skipped.
        """
        self.model.prefix_cache = self.original.prefix_cache
        batch = self._batch(ablations)
        first = [float(divergences.first_token.mean()) for divergences in batch.divergences]
        batch.harmful([math.inf if batch.whole_responses else limit(divergence) for divergence in first])
        results: list[Score | TrialError] = []
        for i in range(batch.n_trials):
            try:
                results.append(self._score(batch, i))
            except TrialError as error:
                results.append(error)
        # Outputs that a scorer requested may be the first ones to contain non-finite values.
        return [result if batch.finite[i] else TrialError(NOT_FINITE) for i, result in enumerate(results)]

    def _score(self, batch: Batch, i: int) -> Score:
        if not batch.finite[i]:
            raise TrialError(NOT_FINITE)
        bounded = i in batch.stopped
        asked = {name: scorer for name, scorer in self.original.scorers.items() if scorer.needs_only_divergences or not bounded}
        figures = {name: figure_of(name, scorer, batch, i) for name, scorer in asked.items()}
        scores = {name: figure.value for name, figure in figures.items()}
        responses = batch.harmful()[i]
        refusals = sum(response.is_failure for response in responses)
        if bounded:
            refusals = round(refusals / batch.n_begun[i] * len(self.bad_prompts))
            scores["refusals"] = refusals
        return Score(
            refusals=refusals,
            kl_divergence=scores["kl_divergence"],
            bounded=bounded,
            response_classes={} if bounded else count_kinds(responses),
            early_response_classes=count_kinds(responses, early=True) if self.original.whole_verdicts else {},
            kl_statistics=statistics(batch.divergences[i].first_token),
            scores=scores,
            figures=figures,
        )

    def most_divergent(self, ablation: Ablation | None, n: int) -> list[tuple[Prompt, float, float]]:
        """The harmless prompts with the largest KL divergence (None: the unedited model), largest first.

        Each with its KL divergence at the first token, by which they are sorted, and the mean along the original's response.
        """
        self.model.prefix_cache = self.original.prefix_cache
        (divergences,) = self.original.answers.divergences(self.model, [] if ablation is None else [ablation])
        first, means = divergences.first_token, divergences.sums / divergences.n_tokens
        return [(self.good_prompts[i], float(first[i]), float(means[i])) for i in (-first).argsort(kind="stable")[:n]]

    def objectives(self, score: Score) -> tuple[float, ...]:
        """The objective values of a score, in the order of the settings.

        Raises `TrialError` for an objective that fails or is not finite.
        """
        shares = (n for n in self.objective_names if self.original.scorers[n].counts_refusals)
        share = next((self._objective(name, score, None) for name in shares), None)
        return tuple(self._objective(name, score, share) for name in self.objective_names)

    def _objective(self, name: str, score: Score, share: float | None) -> float:
        try:
            value = float(self.original.scorers[name].objective(score.value(name), share))
        except Exception as error:  # code of others
            raise TrialError(f"the objective of the scorer {name} failed: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise TrialError(f"the objective of the scorer {name} is {value}, which is not a finite number")
        return value
