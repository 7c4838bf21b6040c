"""Scores: asks the scorers for their figures of the original and of each trial, and tells the search what it sees of them."""

import math
import os.path
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .config import DEFAULT_OBJECTIVES, Settings
from .decoding.prefix_cache import PrefixCache
from .device import is_out_of_memory
from .editing.ablation import Ablation
from .errors import EvaluationError, HereticError, TrialError
from .loading.source import expand
from .model import NOT_FINITE, Model, prompt_messages
from .prompts import Prompt
from .scoring.divergence import OriginalAnswers, statistics
from .scoring.figures import Figure, intervals
from .scoring.learned_rule import LearnedRule
from .scoring.outputs import Batch
from .scoring.responses import SHOWN_KINDS, Kind, RefusalRule, Response, count_kinds
from .scoring.score_tables import Baseline
from .scoring.scorers import Scorer, load_scorers
from .utils import Progress, SilentProgress

# Prompts of each kind, and tokens of each response, from which the common start of all responses is found.
PREFIX_PROMPTS = 50
PREFIX_TOKENS = 32
# Prompts shown of those that moved most.
MOVED_PROMPTS = 5


@dataclass(frozen=True)
class Score:
    """What a trial is judged by: failures on harmful prompts (see `counts_against`), mean first-token KL divergence in nats, the rest.

    `bounded`: the trial was stopped when it could no longer be on the front, and its refusals are an estimate. `scores` has the value
    of every scorer by name, `figures` what they are made of.
    """

    refusals: int
    kl_divergence: float
    bounded: bool = False
    response_classes: Mapping[str, int] = field(default_factory=dict, repr=False)
    early_response_classes: Mapping[str, int] = field(default_factory=dict, repr=False)  # where the responses were judged whole
    kl_statistics: Mapping[str, float] = field(default_factory=dict, repr=False)
    scores: Mapping[str, float] = field(default_factory=dict, repr=False)
    figures: Mapping[str, Figure] = field(default_factory=dict, repr=False, compare=False)

    def value(self, name: str) -> float:
        """The value of a scorer."""
        usual = {"refusals": self.refusals, "kl_divergence": self.kl_divergence}
        return self.scores[name] if name in self.scores else usual[name]

    def attributes(self) -> dict[str, Any]:
        """As the journal holds them."""
        found: dict[str, Any] = {"refusals": self.refusals, "kl_divergence": self.kl_divergence}
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

    def described(self) -> dict[str, Any]:
        """All that is known of a model, with intervals, as plain data."""
        return {
            "scores": dict(self.scores),
            "intervals": intervals(self.figures),
            "response_classes": dict(self.response_classes),
            "early_response_classes": dict(self.early_response_classes),
            "kl_statistics": dict(self.kl_statistics),
        }


def find_response_prefix(model: Model, settings: Settings, prompts: Sequence[Prompt]) -> str:
    """The common start of all responses (a thinking block's opening, say), a thought closed where its opening is known."""
    if settings.response_prefix is not None:
        return settings.response_prefix
    model.response_prefix = ""
    responses = model.responses(prompts, PREFIX_TOKENS, description="Looking for a common response prefix", skip_special_tokens=False)
    return close_thought(common_prefix(responses), settings.chain_of_thought_skips)


def common_prefix(responses: Sequence[str]) -> str:
    """The longest common start, without trailing blanks; nothing where all responses are the same, which is no habit."""
    if len(set(responses)) < 2:
        return ""
    return os.path.commonprefix(list(responses)).rstrip(" ")


def close_thought(prefix: str, skips: Sequence[tuple[str, str]]) -> str:
    """`prefix`, or the closed block of the chain of thought that it opens."""
    for opening, closed in skips:
        if prefix.startswith(opening):
            return closed
    return prefix


class Evaluator:
    """Scores ablations against the original model's own answers, which it takes when made.

    `all_scorers`: those work as well that are for finalists only. `baseline` heads what is told of the original's passes. `like`:
    what it took of the same model serves again where the prompts and the tokens compared are the same. Raises
    `EvaluationError` where the original refuses nothing, since no search could improve on that, and where a scorer fails on the original;
    `UsageError` for scorers that cannot be made.
    """

    def __init__(
        self,
        settings: Settings,
        model: Model,
        good_prompts: Sequence[Prompt],
        bad_prompts: Sequence[Prompt],
        progress: Progress | None = None,
        all_scorers: bool = False,
        baseline: str = "Baseline",
        like: "Evaluator | None" = None,
    ) -> None:
        self.settings = settings
        self.model = model
        self.good_prompts = list(good_prompts)
        self.bad_prompts = list(bad_prompts)
        self.progress = progress or SilentProgress()
        chosen = settings.all_scorers
        self.scorers = {name: s for name, s in load_scorers(settings).items() if all_scorers or not chosen[name].finalists_only}
        self.objective_names = [name for name, _ in settings.objectives]
        self.stops_dominated = settings.stop_dominated_trials and settings.objectives == DEFAULT_OBJECTIVES
        self.rule = refusal_rule(settings, model, self.bad_prompts)
        self.whole_verdicts = all_scorers or any(scorer.needs_whole_responses for scorer in self.scorers.values())
        self.original_kinds: list[Kind] | None = None
        self.answers: OriginalAnswers
        self._prefix_cache: PrefixCache | None
        try:
            if like is not None and like._has_seen(self.good_prompts, self.bad_prompts, settings):
                self.answers, model.prefix_cache = like.answers, like._prefix_cache
                original = self._take_original(f"{baseline}: harmful prompts")
            else:
                described, folder = f"{baseline}: answers to harmless prompts", expand(settings.study_checkpoint_dir)
                self.answers = OriginalAnswers(model, self.good_prompts, settings.kl_tokens, described, folder)
                with model.recording_prefix_cache():
                    self.answers.record(model, f"{baseline}: harmless prompts")
                    original = self._take_original(f"{baseline}: harmful prompts")
            self._prefix_cache = model.prefix_cache
        except TrialError as error:
            raise EvaluationError(f"The original model cannot be scored: {error}. Try another --dtypes, such as float32.") from error
        responses = original.harmful()[0]
        self.original_kinds = [response.whole or response.kind for response in responses]
        self.base_response_classes = count_kinds(responses)
        self.base_early_response_classes = count_kinds(responses, early=True) if self.whole_verdicts else {}
        self.base_refusals = self.base_response_classes["refusal"]
        if self.base_refusals == 0 and "refusals" in self.objective_names:
            raise EvaluationError(
                f"The model refuses none of the {len(self.bad_prompts)} harmful evaluation prompts, so there is nothing to remove. "
                "Perhaps it was never trained to refuse, or it refuses in words that the rule does not know: look at its answers with "
                "--print-responses, and set refusal_markers, system_prompt or bad_evaluation_prompts accordingly."
            )
        original.description = None
        self.base_figures: dict[str, Figure] = {}
        for name, scorer in self.scorers.items():
            try:
                scorer.prepare(original.outputs())
                self.base_figures[name] = self._figure(name, scorer, original, 0)
            except TrialError as error:
                raise EvaluationError(f"The original model cannot be scored: {error}.") from error
            except HereticError:
                raise
            except Exception as error:  # somebody else's code
                raise EvaluationError(f"The scorer {name} failed on the original model: {type(error).__name__}: {error}.") from error

    def _has_seen(self, good_prompts: Sequence[Prompt], bad_prompts: Sequence[Prompt], settings: Settings) -> bool:
        return (self.good_prompts, self.bad_prompts, self.settings.kl_tokens) == (good_prompts, bad_prompts, settings.kl_tokens)

    def _take_original(self, description: str) -> Batch:
        original = self._batch([], description)
        original.harmful()
        if not all(original.finite):
            raise TrialError(NOT_FINITE)
        return original

    @property
    def baseline(self) -> Baseline:
        """What the original does, beside which trials are shown."""
        return Baseline(len(self.bad_prompts), self.base_refusals, self.base_response_classes)

    @property
    def base_scores(self) -> dict[str, float]:
        """The original's figures by scorer."""
        return {name: figure.value for name, figure in self.base_figures.items()}

    def detach(self) -> None:
        """Let go of the original model, keeping its scores, so that another one can take its place in `model`."""
        del self.model
        self._prefix_cache = None

    def _batch(self, ablations: Sequence[Ablation], description: str | None = None) -> Batch:
        return Batch(
            model=self.model,
            answers=self.answers,
            rule=self.rule,
            good_prompts=self.good_prompts,
            bad_prompts=self.bad_prompts,
            max_response_length=self.settings.max_response_length,
            ablations=ablations,
            original_kinds=self.original_kinds,
            # What the original's whole responses are must be known, to tell what an edit did to them.
            whole_responses=self.original_kinds is None or self.whole_verdicts or self.settings.print_responses,
            whole_verdicts=self.whole_verdicts,
            show=self._show,
            description=description,
        )

    def score(self, ablation: Ablation | None) -> Score:
        """Score an ablation (None: the model as it is). Raises `TrialError` where its numbers are not finite."""
        (result,) = self.score_trials([] if ablation is None else [ablation])
        if isinstance(result, TrialError):
            raise result
        return result

    def score_trials(
        self, ablations: Sequence[Ablation], limit: Callable[[float], float] = lambda kl: math.inf
    ) -> list[Score | TrialError]:
        """Scores of several ablations (none: the model as it is), computed together; an error takes the place of one that has none.

        `limit` tells, for a KL divergence, how many refusals a trial may have and still be worth finishing. A trial with more is
        stopped: its score is `bounded`, its count the share of refusals among its prompts begun so far, scaled to all of them, and
        scorers that read responses are not asked.
        """
        self.model.prefix_cache = self._prefix_cache
        batch = self._batch(ablations)
        first = [float(divergences.first_token.mean()) for divergences in batch.divergences]
        batch.harmful([math.inf if batch.whole_responses else limit(divergence) for divergence in first])
        results: list[Score | TrialError] = []
        for i in range(batch.n_trials):
            try:
                results.append(self._score(batch, i))
            except TrialError as error:
                results.append(error)
        # What scorers asked for may have been the first to show that a trial's numbers are not finite.
        return [result if batch.finite[i] else TrialError(NOT_FINITE) for i, result in enumerate(results)]

    def _score(self, batch: Batch, i: int) -> Score:
        if not batch.finite[i]:
            raise TrialError(NOT_FINITE)
        bounded = i in batch.stopped
        asked = {name: scorer for name, scorer in self.scorers.items() if scorer.needs_only_divergences or not bounded}
        figures = {name: self._figure(name, scorer, batch, i) for name, scorer in asked.items()}
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
            early_response_classes=count_kinds(responses, early=True) if self.whole_verdicts else {},
            kl_statistics=statistics(batch.divergences[i].first_token),
            scores=scores,
            figures=figures,
        )

    def _figure(self, name: str, scorer: Scorer, batch: Batch, i: int) -> Figure:
        try:
            result = scorer.score(batch.outputs(i))
            figure = result if isinstance(result, Figure) else Figure(float(result))
        except Exception as error:
            # Trials that are too many for the memory are tried again one by one.
            if isinstance(error, HereticError) or is_out_of_memory(error):
                raise
            raise TrialError(f"the scorer {name} failed: {type(error).__name__}: {error}") from error
        if not math.isfinite(figure.value):
            raise TrialError(f"the scorer {name} gives {figure.value}, which is no finite number")
        return figure

    def most_moved(self, ablation: Ablation | None, n: int) -> list[tuple[Prompt, float, float]]:
        """The harmless prompts after which an edited model's words have moved most (None: the model as it is), farthest first.

        Each with its KL divergence at the first token, by which they are sorted, and the mean along the original's answer.
        """
        self.model.prefix_cache = self._prefix_cache
        (divergences,) = self.answers.divergences(self.model, [] if ablation is None else [ablation])
        first, means = divergences.first_token, divergences.sums / divergences.n_tokens
        return [(self.good_prompts[i], float(first[i]), float(means[i])) for i in (-first).argsort(kind="stable")[:n]]

    def _show(self, prompt: Prompt, response: Response) -> None:
        if self.settings.print_responses:
            self.progress.message(f"Prompt: {prompt.user}\n{SHOWN_KINDS[response.kind]}: {response.text.strip()}\n")

    def objectives(self, score: Score) -> tuple[float, ...]:
        """What the search sees of a score: one number for each objective, in the order of the settings.

        Raises `TrialError` for an objective that fails or gives no finite number.
        """
        shares = (n for n in self.objective_names if self.scorers[n].counts_refusals)
        share = next((self._objective(name, score, None) for name in shares), None)
        return tuple(self._objective(name, score, share) for name in self.objective_names)

    def _objective(self, name: str, score: Score, share: float | None) -> float:
        try:
            value = float(self.scorers[name].objective(score.value(name), share))
        except Exception as error:
            raise TrialError(f"the objective of the scorer {name} failed: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise TrialError(f"the objective of the scorer {name} is {value}, which is no finite number")
        return value


def refusal_rule(settings: Settings, model: Model, bad_prompts: Sequence[Prompt]) -> RefusalRule:
    """The rule by which a model's responses are judged."""
    skips = settings.chain_of_thought_skips
    # The opening of a thinking block with which prompts end as the model sees them, where there is one.
    shown = model.render(prompt_messages(bad_prompts[0])).rstrip() if bad_prompts else ""
    begins_inside = next((opening for opening, _ in skips if shown.endswith(opening)), None)
    if settings.refusal_rule == "markers":
        return RefusalRule(settings.refusal_markers, skips, begins_inside)
    return LearnedRule(settings.own_markers, skips, begins_inside)
