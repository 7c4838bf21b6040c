"""Measurements of the original model before the first trial, which trials are compared with."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..config import Settings
from ..decoding.prefix_cache import PrefixCache
from ..device import is_out_of_memory
from ..errors import EvaluationError, HereticError, TrialError
from ..loading.source import expand
from ..model import NOT_FINITE, Model
from ..prompts import Prompt, prompt_messages
from ..utils import JsonObject, Progress, SilentProgress
from .divergence import OriginalAnswers
from .figures import Figure, intervals
from .learned_rule import LearnedRule
from .outputs import Batch
from .responses import SHOWN_KINDS, Kind, RefusalRule, Response, count_kinds
from .score_tables import Baseline
from .scorers import Refusals, Scorer, load_scorers


@dataclass(frozen=True)
class MeasuredOriginal:
    """The original model's outputs for the evaluation prompts, the verdicts on them, and the scorers prepared with them.

    `prefix_cache` belongs to the measured model; None for another one. `whole_verdicts`: responses are judged by their full text, not by
    their beginnings.
    """

    good_prompts: Sequence[Prompt]
    bad_prompts: Sequence[Prompt]
    rule: RefusalRule
    scorers: Mapping[str, Scorer]
    whole_verdicts: bool
    answers: OriginalAnswers
    prefix_cache: PrefixCache | None
    kinds: Sequence[Kind]
    refusals: int
    response_classes: Mapping[str, int]
    early_response_classes: Mapping[str, int]
    figures: Mapping[str, Figure]

    @property
    def logprobs(self) -> Tensor:
        """Log-probabilities `(prompt, vocabulary)` of the first token after each harmless prompt, float32."""
        return self.answers.first_token_logprobs()

    @property
    def scores(self) -> dict[str, float]:
        """The scores by scorer."""
        return {name: figure.value for name, figure in self.figures.items()}

    def described(self) -> JsonObject:
        """All scores, with intervals, as plain data."""
        return {
            "scores": self.scores,
            "intervals": intervals(self.figures),
            "response_classes": dict(self.response_classes),
            "early_response_classes": dict(self.early_response_classes),
        }

    @property
    def baseline(self) -> Baseline:
        """The baseline that is displayed with trials."""
        return Baseline(len(self.bad_prompts), self.refusals, self.response_classes)

    def counting_from(self, refusals: int) -> "MeasuredOriginal":
        """The same with another worker's count of refusals, by which the objective is normalized."""
        for scorer in self.scorers.values():
            if isinstance(scorer, Refusals):
                scorer.base = refusals
        return replace(self, refusals=refusals)


def measure_original(
    settings: Settings,
    model: Model,
    good_prompts: Sequence[Prompt],
    bad_prompts: Sequence[Prompt],
    progress: Progress | None = None,
    all_scorers: bool = False,
    like: MeasuredOriginal | None = None,
) -> MeasuredOriginal:
    """Generate the original's outputs for the evaluation prompts, and prepare the scorers with them.

    `all_scorers`: include scorers for finalists only. `like`, for finalists: earlier measurements of the same model, which are reused if
    prompts and compared tokens are the same. Raises `EvaluationError` if the original refuses nothing, since then there is nothing to
    optimize, or if a scorer fails on the original; and `UsageError` for scorers that cannot be created.
    """
    good_prompts, bad_prompts = list(good_prompts), list(bad_prompts)
    title = "Baseline" if like is None else "Baseline of the finalists"
    chosen = settings.all_scorers
    scorers = {name: s for name, s in load_scorers(settings).items() if all_scorers or not chosen[name].finalists_only}
    asked = partial(
        _asked,
        model=model,
        rule=refusal_rule(settings, model, bad_prompts),
        good_prompts=good_prompts,
        bad_prompts=bad_prompts,
        max_response_length=settings.max_response_length,
        whole_verdicts=all_scorers or any(scorer.needs_whole_responses for scorer in scorers.values()),
        show=response_shown(settings, progress or SilentProgress()),
        description=f"{title}: harmful prompts",
    )
    try:
        if like is not None and (like.good_prompts, like.bad_prompts, like.answers.n_tokens) == (
            good_prompts,
            bad_prompts,
            settings.kl_tokens,
        ):
            model.prefix_cache = like.prefix_cache
            batch = asked(like.answers)
        else:
            folder = expand(settings.study_checkpoint_dir)
            answers = OriginalAnswers(model, good_prompts, settings.kl_tokens, f"{title}: responses to harmless prompts", folder)
            with model.recording_prefix_cache():
                answers.record(model, f"{title}: harmless prompts")
                batch = asked(answers)
    except TrialError as error:
        raise EvaluationError(f"The original model cannot be scored: {error}. Try another --dtypes, such as float32.") from error
    return _measured(batch, scorers, must_refuse=any(name == "refusals" for name, _ in settings.objectives))


def _asked(answers: OriginalAnswers, **more: Any) -> Batch:
    """The original as a batch that has answered the harmful prompts: whole, which must be known to tell what an edit did to them."""
    batch = Batch(answers=answers, ablations=[], whole_responses=True, **more)
    batch.harmful()
    if not all(batch.finite):
        raise TrialError(NOT_FINITE)
    batch.description = None
    return batch


def _measured(batch: Batch, scorers: Mapping[str, Scorer], must_refuse: bool) -> MeasuredOriginal:
    responses = batch.harmful()[0]
    counts = count_kinds(responses)
    if counts["refusal"] == 0 and must_refuse:
        raise EvaluationError(
            f"The model refuses none of the {len(batch.bad_prompts)} harmful evaluation prompts, so there is nothing to remove. It may "
            "not be trained to refuse, or refuse in words that the rule does not know: check its responses with --print-responses, and set "
            "refusal_markers, system_prompt or bad_evaluation_prompts accordingly."
        )
    return MeasuredOriginal(
        good_prompts=batch.good_prompts,
        bad_prompts=batch.bad_prompts,
        rule=batch.rule,
        scorers=scorers,
        whole_verdicts=batch.whole_verdicts,
        answers=batch.answers,
        prefix_cache=batch.model.prefix_cache,
        kinds=[response.full or response.kind for response in responses],
        refusals=counts["refusal"],
        response_classes=counts,
        early_response_classes=count_kinds(responses, early=True) if batch.whole_verdicts else {},
        figures={name: _prepared(name, scorer, batch) for name, scorer in scorers.items()},
    )


def _prepared(name: str, scorer: Scorer, original: Batch) -> Figure:
    """Prepare a scorer with the original. Returns its score of the original."""
    try:
        scorer.prepare(original.outputs())
        return figure_of(name, scorer, original, 0)
    except TrialError as error:
        raise EvaluationError(f"The original model cannot be scored: {error}.") from error
    except HereticError:
        raise
    except Exception as error:  # custom code may raise anything
        raise EvaluationError(f"The scorer {name} failed on the original model: {type(error).__name__}: {error}.") from error


def figure_of(name: str, scorer: Scorer, batch: Batch, i: int) -> Figure:
    """A scorer's score of one trial of a batch. Raises `TrialError` if the scorer fails or does not return a finite number."""
    try:
        result = scorer.score(batch.outputs(i))
        figure = result if isinstance(result, Figure) else Figure(float(result))
    except Exception as error:  # code of others
        # If memory runs out, trials are scored again one by one.
        if isinstance(error, HereticError) or is_out_of_memory(error):
            raise
        raise TrialError(f"the scorer {name} failed: {type(error).__name__}: {error}") from error
    if not math.isfinite(figure.value):
        raise TrialError(f"the scorer {name} returned {figure.value}, which is not a finite number")
    return figure


def response_shown(settings: Settings, progress: Progress) -> Callable[[Prompt, Response], None]:
    """A callback for each response to a harmful prompt, which prints it if `print_responses` is set."""

    def show(prompt: Prompt, response: Response) -> None:
        if settings.print_responses:
            progress.message(f"Prompt: {prompt.user}\n{SHOWN_KINDS[response.kind]}: {response.text.strip()}\n")

    return show


def refusal_rule(settings: Settings, model: Model, bad_prompts: Sequence[Prompt]) -> RefusalRule:
    """The rule that judges a model's responses."""
    skips = settings.chain_of_thought_skips
    shown = model.with_response_prefix("").render(prompt_messages(bad_prompts[0])).rstrip() if bad_prompts else ""
    begins_inside = next((opening for opening, closed in skips if _leaves_open(shown, model.response_prefix, opening, closed)), None)
    if settings.refusal_rule == "markers":
        return RefusalRule(settings.refusal_markers, skips, begins_inside)
    return LearnedRule(settings.own_markers, skips, begins_inside)


def _leaves_open(prompt: str, prefix: str, opening: str, closed: str) -> bool:
    """Whether a thinking block that the end of the rendered prompt or the response prefix opens is not closed by the prefix."""
    _, opened, after = prefix.rpartition(opening)
    return bool(opened or prompt.endswith(opening)) and closed.removeprefix(opening).strip() not in after
