"""Settings as a study holds them: which define it, and what a later run takes over of them."""

import json
from collections.abc import Collection

from pydantic import BaseModel, ValidationError

from ..config import Settings
from ..settings_sources import first_problem
from ..specifications import PromptSpecification, ScorerSpecification
from ..utils import JsonObject

# Settings that define a study: trials scored under different ones cannot be compared.
DEFINING = (
    "model",
    "model_commit",
    "gguf_file",
    "demo",
    "quantization",
    "max_response_length",
    "response_prefix",
    "chain_of_thought_skips",
    "system_prompt",
    "kl_divergence_scale",
    "kl_divergence_target",
    "kl_tokens",
    "scorers",
    "orthogonalize_direction",
    "row_normalization",
    "split_experts",
    "winsorization_quantile",
    "refusal_rule",
    "refusal_markers",
    "good_prompts",
    "bad_prompts",
    "good_evaluation_prompts",
    "bad_evaluation_prompts",
    # These do not affect scores, but samplers learn only from trials of one search space.
    "parameters",
    "disabled_components",
)

# Settings of one run with a study; a later run does not inherit them.
PER_RUN = (
    "evaluate_model",
    "print_responses",
    "print_residual_geometry",
    "plot_residuals",
    "residual_plot_method",
    "residual_plot_path",
    "residual_plot_title",
    "residual_plot_style",
    "report",
    "report_plots",
    "checkpoint_action",
    "debug",
    "trial_index",
    "n_additional_trials",
    "model_action",
    "benchmarks",
    "benchmark_limit",
    "benchmark_path",
    "benchmark_chat_template",
    "save_directory",
    "overwrite",
    "export_strategy",
    "upload_repo_id",
    "upload_repo_private",
    "workers",
    "study_storage",
    "study_name",
)

# Settings that let code run or choose a place to write to. They are never taken from a journal, which may be from somebody else.
NEVER_STORED = ("trust_remote_code", "trust_scorers", "study_checkpoint_dir")


def inherited_settings(attributes: JsonObject, leave: Collection[str] = ()) -> JsonObject:
    """The stored settings of a study that a later run inherits, as plain data."""
    left = {*PER_RUN, *NEVER_STORED, *leave}
    kept = [name for name in attributes["given"] if name in Settings.model_fields and name not in left]
    return {name: attributes["settings"][name] for name in kept if name in attributes["settings"]}


def differences(before: Settings, now: Settings) -> list[str]:
    """What must not differ and does: settings that define a study, with their values then and now."""
    values = {name: (_meaning(getattr(before, name)), _meaning(getattr(now, name))) for name in DEFINING}
    return [f"{name} was {_shown(then)} and is now {_shown(now)}" for name, (then, now) in values.items() if then != now]


def _meaning(value: object) -> object:
    """The part of a setting that scores depend on. The settings of custom scorers are left out: they are in the study's identity."""
    if isinstance(value, PromptSpecification):
        return value.without_plot_options
    if isinstance(value, dict) and any(isinstance(part, ScorerSpecification) and part.is_custom for part in value.values()):
        return {name: part.model_copy(update={"settings": {}}) if part.is_custom else part for name, part in value.items()}
    return value


def _shown(value: object) -> str:
    text = json.dumps(value.model_dump(exclude_defaults=True)) if isinstance(value, BaseModel) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def reason(error: ValidationError) -> str:
    """The first thing that is wrong with settings, and where."""
    where, what = first_problem(error)
    return f"{where}: {what}" if where else what
