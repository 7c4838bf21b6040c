"""`--reproduce-search`: repeats the search of a record with its seed."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..config import Settings
from ..demo import PREFIX
from ..errors import ExportError, UsageError
from ..loading.source import is_hub_id
from ..saving import RECORD
from ..settings_sources import load_settings
from ..study.checkpoint import Checkpoint
from ..study.stored_settings import DEFINING
from ..trust import terminal_ask
from ..utils import JsonObject, Progress
from .read_record import Record
from .rebuild import check_local, differences

# Settings, besides those that define a study, that a repeated search depends on. All other settings come from the command line.
SEARCH = (
    "dtypes",
    "batch_size",
    "max_batch_size",
    "trials_per_batch",
    "compile_decoding",
    "stop_dominated_trials",
    "n_learned_trials",
    "n_trials",
    "n_startup_trials",
    "sampler",
    "first_trials",
    "seed",
    "n_finalists",
    "final_response_length",
    "final_kl_tokens",
    "final_good_prompts",
    "final_bad_prompts",
)


def search_settings(record: Record, arguments: Sequence[str]) -> Settings:
    """The stored settings that the search and its scores depend on, with commits, overridden by the command line.

    Raises `UsageError` if the record names code that the user does not agree to run, or a file or folder that the command line does
    not name as well.
    """
    content = record.content
    names = (*DEFINING, *SEARCH)
    stored = {name: value for name, value in content["settings"].items() if name in names and value is not None}
    if content["model"].get("commit") is not None:
        stored["model_commit"] = content["model"]["commit"]
    stored |= content.get("prompts", {})
    stored |= {"model_action": "none", "study_checkpoint_dir": str(Path("checkpoints") / "reproduced")}
    settings = load_settings(arguments, stored, terminal_ask())
    _refuse_local_prompts(settings, stored, arguments)
    return settings


def _refuse_local_prompts(settings: Settings, stored: JsonObject, arguments: Sequence[str]) -> None:
    """Raise `UsageError` if prompts would be read from a file or folder that only the record names: that could be any file here."""
    flags = []
    for name, value in stored.items():
        dataset = value.get("dataset") if isinstance(value, Mapping) else None
        if not isinstance(dataset, str) or getattr(settings, name).dataset != dataset:
            continue
        flag = f"--{name.replace('_', '-')}.dataset"
        is_given = any(argument.partition("=")[0] == flag for argument in arguments)
        if not is_given and not dataset.startswith(PREFIX) and not is_hub_id(dataset):
            flags.append(shlex.join([flag, dataset]))
    if flags:
        raise UsageError(f"The record names local files or folders as prompts. If they are those of the study, add: {' '.join(flags)}")


def reproduce_search(record: Record, arguments: Sequence[str], progress: Progress, run: Callable[[Settings], int]) -> int:
    """`run` the study again with the stored seed and compare the trial. Returns 0 if it is the same, else 1.

    Raises `ExportError` if the record has no scores to compare with.
    """
    wanted, scores = record.content["trial"], record.content.get("scores", {})
    if missing := [name for name in ("refusals", "kl_divergence") if name not in scores]:
        raise ExportError(f"{record.folder / RECORD} is not a record that a search can be compared with: it lacks scores.{missing[0]}.")
    for difference in differences(record):
        progress.message(f"Different: {difference}")
    settings = search_settings(record, arguments)
    check_local(record, settings.model)
    if code := run(settings):
        return code
    with Checkpoint(settings) as checkpoint:
        trials = checkpoint.study.get_trials(deepcopy=False)
        found = next((trial for trial in trials if trial.number == wanted["number"]), None)
    if found is None:
        progress.message(f"The search ended before trial {wanted['number']}.")
        return 1
    attributes = found.user_attrs
    then = {"direction_index": wanted["direction_index"], **_flat(wanted["parameters"] or {})}
    now = {"direction_index": attributes.get("direction_index"), **_flat(attributes.get("parameters") or {})}
    then |= {name: scores[name] for name in ("refusals", "kl_divergence")}
    now |= {name: attributes.get(name) for name in ("refusals", "kl_divergence")}
    differing = [name for name in then if not _close(then[name], now.get(name))]
    for name in differing:
        progress.message(f"Different in trial {wanted['number']}: {name} was {then[name]} and is {now.get(name)}")
    if not differing:
        progress.message(
            f"Trial {wanted['number']} is the same as in the record: {scores['refusals']} refusals, KL {scores['kl_divergence']:.4f}."
        )
    return 1 if differing else 0


def _flat(parameters: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{component}.{name}": value for component, values in parameters.items() for name, value in values.items()}


def _close(a: float | None, b: float | None) -> bool:
    """Equal up to the rounding of float32."""
    if a is None or b is None:
        return a is b
    return abs(a - b) <= 1e-5 * max(1.0, abs(a))
