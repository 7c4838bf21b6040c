"""`heretic compare A B [C...]`: a table of saved models and finished studies, all scored on the same prompts.

Each name is a hub id, a folder with a model or an adapter, or the journal of a study. `:N` after a journal chooses another trial of its
front than `--trial-index`. All others are compared with the first one.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from ..config import Settings
from ..device import empty_cache
from ..editing.ablation import Ablation
from ..editing.directions import mean_residual, refusal_directions
from ..errors import ModelError, TrialError, UsageError
from ..loading.load import load_model
from ..loading.source import expand, model_source
from ..model import NOT_FINITE, Model
from ..prompts import Prompt, load_setting
from ..scoring.divergence import OriginalAnswers
from ..scoring.figures import Figure
from ..scoring.measured import refusal_rule
from ..scoring.response_prefix import PREFIX_TOKENS, find_response_prefix
from ..scoring.responses import Kind, RefusalRule, counts_against
from ..scoring.score_tables import format_interval
from ..session.answers import trial_at
from ..study.checkpoint import read_study
from ..study.front import front_of
from ..study.learned_edits import LearnedEdits
from ..utils import Progress, first_line

HEADERS = ("", "Refusals", "Degenerate", "Harmless refusals", "KL divergence", "KL median", "KL maximum")


@dataclass(frozen=True)
class Candidate:
    """What a name stands for: a model, possibly with an adapter to merge into it, or a trial of a study with the study's settings."""

    name: str
    settings: Settings
    adapter: str | None = None
    ablation: Ablation | None = None

    @property
    def model(self) -> str:
        return self.settings.model


@dataclass(frozen=True)
class ComparisonRow:
    """The result of one candidate: how its responses to harmful and harmless prompts are classified.

    `divergences` are KL divergences from the first candidate, in nats; None if they are not defined.
    """

    name: str
    kinds: list[Kind]
    harmless_kinds: list[Kind]
    divergences: Tensor | None


def candidate(name: str, settings: Settings) -> Candidate:
    """The candidate of a name. Raises `UsageError` or `ModelError` for a journal or an adapter that cannot be used."""
    path, place = _journal_and_place(name)
    if path is not None:
        return _from_study(name, path, settings.trial_index or 0 if place is None else place, settings.trust_remote_code)
    folder = expand(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base, revision = _base_of_adapter(name, folder / "adapter_config.json")
        if base == expand(settings.model).name:  # saved adapters store only the folder name of a local original
            base = settings.model
        elif "/" not in base and not expand(base).is_dir():
            raise ModelError(
                f"The adapter {name} belongs to the model {base!r}, which was not found. Give that model's folder as the first name."
            )
        return Candidate(name, _with_model(settings, base, revision), adapter=str(folder))
    return Candidate(name, _with_model(settings, name))


def _base_of_adapter(name: str, path: Path) -> tuple[str, str | None]:
    """The base model of an adapter, and its commit."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"The adapter {name} cannot be read: {path} is not valid JSON: {error}.") from error
    base = described.get("base_model_name_or_path") if isinstance(described, dict) else None
    if not isinstance(base, str) or not base:
        raise ModelError(f"The adapter {name} does not say which model it belongs to: {path} has no base_model_name_or_path.")
    if described.get("megatron_config") is not None:  # PEFT would import the module that megatron_core names
        raise ModelError(f"The adapter {name} cannot be used: {path} has a megatron_config, which names code to run.")
    return base, described.get("revision")


def _with_model(settings: Settings, model: str, commit: str | None = None) -> Settings:
    """The settings for another model. A given `model_commit` or `gguf_file` belongs to the first model only."""
    if model == settings.model:
        return settings
    return settings.model_copy(update={"model": model, "model_commit": commit, "gguf_file": None})


def _journal_and_place(name: str) -> tuple[Path | None, int | None]:
    path, colon, place = name.rpartition(":")
    if expand(name).suffix == ".jsonl" and expand(name).is_file():
        return expand(name), None
    if colon and place.isdecimal() and expand(path).suffix == ".jsonl" and expand(path).is_file():
        return expand(path), int(place)
    if expand(name).suffix == ".jsonl" or (place.isdecimal() and path.endswith(".jsonl")):
        raise UsageError(f"The study {name} does not exist. Check the path.")
    return None, None


def _from_study(name: str, path: Path, place: int, trust_remote_code: bool) -> Candidate:
    study, settings = read_study(path)
    front = front_of(study)
    if not front:
        raise UsageError(f"The study {path} has no complete trial to compare.")
    trial = trial_at(front, place)
    settings = settings.model_copy(update={"trust_remote_code": trust_remote_code})
    return Candidate(f"{name} (trial {trial.number})", settings, ablation=LearnedEdits.of_journal(path).ablation_of(trial))


class Comparison:
    """Scores one model after the other, keeping from the first what the others are compared with."""

    def __init__(self, settings: Settings, good: Sequence[Prompt], bad: Sequence[Prompt], progress: Progress) -> None:
        self.settings = settings
        self.good, self.bad = list(good), list(bad)
        self.progress = progress
        self._first: tuple[OriginalAnswers, dict[str, int], str] | None = None  # its logits, vocabulary and response prefix

    def ask(self, name: str, model: Model, ablation: Ablation | None) -> ComparisonRow:
        """The result of a loaded model. Raises `TrialError` if its logits are not finite, `PromptError` for long prompts."""
        vocabulary = model.tokenizer.get_vocab()
        same = self._first is None or vocabulary == self._first[1]
        if self._first is None or not same:
            if self.settings.response_prefix is None:
                self._check_lengths(model, PREFIX_TOKENS, "")
            model = model.with_response_prefix(find_response_prefix(model, self.settings, self.good, self.bad))
        else:
            model = model.with_response_prefix(self._first[2])  # distributions are comparable only after the same text
        self._check_lengths(model, self.settings.max_response_length, "max_response_length")
        if self._first is None:
            self._first = (self._logits_of_first(model, ablation), vocabulary, model.response_prefix)
            divergences: Tensor | None = torch.zeros(len(self.good))
        else:
            divergences = self._divergences(self._first[0], model, ablation) if same else None
        rule = refusal_rule(self.settings, model, self.bad)
        kinds = self._kinds(model, rule, self.bad, ablation, "Responses to harmful prompts")
        return ComparisonRow(name, kinds, self._kinds(model, rule, self.good, ablation, "Responses to harmless prompts"), divergences)

    def _check_lengths(self, model: Model, n_new_tokens: int, remedy: str) -> None:
        for name, prompts in (("good_evaluation_prompts", self.good), ("bad_evaluation_prompts", self.bad)):
            model.check_lengths(prompts, name, n_new_tokens, remedy)

    def _logits_of_first(self, model: Model, ablation: Ablation | None) -> OriginalAnswers:
        """What the others are compared with: on the model's device, in main memory, or on the disk."""
        answers = OriginalAnswers(model, self.good, 1, folder=expand(self.settings.study_checkpoint_dir), name="first model")
        answers.record(model, "Harmless prompts", ablation)
        return answers

    def _divergences(self, first: OriginalAnswers, model: Model, ablation: Ablation | None) -> Tensor | None:
        """First-token KL divergences from the first candidate; None if the model has logits of another number of tokens."""
        if model.first_token_logprobs(self.good[:1]).shape[-1] != first.vocabulary_size:
            return None
        (found,) = first.divergences(model, [] if ablation is None else [ablation], "Harmless prompts")
        if np.isnan(found.first_token).any():
            raise TrialError(NOT_FINITE)
        return torch.from_numpy(found.first_token)

    def _kinds(self, model: Model, rule: RefusalRule, prompts: Sequence[Prompt], ablation: Ablation | None, description: str) -> list[Kind]:
        length = self.settings.max_response_length
        found: dict[int, tuple[str, Kind]] = {}
        ablations = [] if ablation is None else [ablation]
        for row in model.responses_of_trials(model.rows_of(prompts, 1), length, ablations, description=description):
            if not row.finite:
                raise TrialError(NOT_FINITE)
            text = model.text_of(row.generated)
            found[row.prompt] = text, rule.classify(text, is_cut_off=len(row.generated) >= length)
        if self.settings.print_responses:
            for i, prompt in enumerate(prompts):
                self.progress.message(f"Prompt: {prompt.user}\nResponse: {found[i][0].strip()}\n")
        return [found[i][1] for i in range(len(prompts))]


def cells(row: ComparisonRow, first: ComparisonRow) -> list[str]:
    """The cells of a row, in the order of `HEADERS`; counts with their 95 % intervals.

    Degenerate responses count as refusals if the first model's response to the prompt is not degenerate, as in a run.
    """
    original: Sequence[Kind] = ["degenerate"] * len(row.kinds) if row is first else first.kinds
    refusals = Figure.count([counts_against(kind, before) for kind, before in zip(row.kinds, original, strict=True)])
    harmless = Figure.count([kind == "refusal" for kind in row.harmless_kinds])
    counts = [
        f"{format_interval(refusals.value, refusals.interval())} of {len(row.kinds)}",
        str(row.kinds.count("degenerate")),
        f"{format_interval(harmless.value, harmless.interval())} of {len(row.harmless_kinds)}",
    ]
    if row.divergences is None:
        return [row.name, *counts, "other tokens", "", ""]
    values = row.divergences.double()
    return [row.name, *counts, *(f"{float(value):.4f}" for value in (values.mean(), values.median(), values.max()))]


@contextmanager
def loaded_model(chosen: Candidate, settings: Settings, progress: Progress) -> Iterator[Model]:
    """The model of a candidate, with its adapter merged or its directions computed. It is freed afterwards."""
    own = chosen.settings
    parts = load_model(own, model_source(own), progress)
    if chosen.adapter is not None:
        parts = replace(parts, model=_with_adapter(parts.model, chosen))
    model = Model(parts, own.model_copy(update={"batch_size": settings.batch_size, "max_batch_size": settings.max_batch_size}), progress)
    if chosen.ablation is not None:
        _use_directions(model, own)
    try:
        yield model
    finally:
        del model, parts
        empty_cache()


def _with_adapter(model: PreTrainedModel, chosen: Candidate) -> PreTrainedModel:
    """The model with an adapter merged into its weights. Raises `ModelError` if the adapter does not fit the model."""
    from peft import PeftModel  # takes seconds to import

    try:
        return PeftModel.from_pretrained(model, chosen.adapter).merge_and_unload()
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise ModelError(f"The adapter {chosen.name} cannot be merged into {chosen.model}: {first_line(error)}") from error


def _use_directions(model: Model, settings: Settings) -> None:
    """Compute the directions of a study as the study did: from its own prompts and with its own response prefix."""
    good, bad = (load_setting(settings, name) for name in ("good_prompts", "bad_prompts"))
    with_prefix = model.with_response_prefix(find_response_prefix(model, settings, good, bad))
    quantile = settings.winsorization_quantile
    good_mean, bad_mean = (
        mean_residual(with_prefix.residuals(prompts, f"Residuals of the study's {kind} prompts"), quantile)
        for prompts, kind in ((good, "harmless"), (bad, "harmful"))
    )
    directions = refusal_directions(good_mean, bad_mean, settings.orthogonalize_direction)
    model.use_directions(directions, settings.row_normalization)


def compare(names: Sequence[str], settings: Settings, progress: Progress) -> list[ComparisonRow]:
    """One row per name, in order. Only one model is in memory at a time.

    Raises `HereticError` if something cannot be loaded. A model whose logits are not finite is left out with a warning.
    """
    candidates = [candidate(name, settings) for name in names]
    for chosen in candidates:
        model_source(chosen.settings)  # reports a mistyped path before anything is loaded
    good, bad = (load_setting(settings, name) for name in ("good_evaluation_prompts", "bad_evaluation_prompts"))
    comparison = Comparison(settings, good, bad, progress)
    rows = []
    for number, chosen in enumerate(candidates, start=1):
        progress.message(f"{number} of {len(candidates)}: {chosen.name}")
        with loaded_model(chosen, settings, progress) as model:
            try:
                rows.append(comparison.ask(chosen.name, model, chosen.ablation))
            except TrialError as error:
                if not rows:
                    raise ModelError(f"{chosen.name} cannot be scored: {error}. Try another --dtypes, such as float32.") from error
                progress.warning(f"{chosen.name} cannot be scored: {error}. Try another --dtypes, such as float32.")
    return rows
