"""A worker: joins a shared study and runs its trials until all are done, as `heretic worker` or as one of several on a host."""

import argparse
import time

import optuna
import torch
from optuna.artifacts._protocol import ArtifactStore
from pydantic import ValidationError

from ..config import Settings
from ..console import Console
from ..decoding.decoder import Decoder
from ..errors import CheckpointError, UsageError
from ..evaluator import Evaluator
from ..loading.source import ModelSource, model_source
from ..privacy import shown_location
from ..prompts import Prompts, load_all
from ..scoring.measured import measure_original
from ..session.stages import (
    Ready,
    compute_directions,
    learn_with_messages,
    load_model_to_edit,
    open_space,
    prepare,
    report_failures,
    scorer_identity,
    search_with_view,
    stop_on_interrupt,
)
from ..settings_sources import first_problem
from ..study.batching import BatchSize, automatic_trials_per_batch
from ..study.checkpoint import SHARED, SPACE
from ..study.journal import journal_errors
from ..study.learned_edits import LearnedEdits
from ..study.learned_search import LearnedTrials
from ..study.samplers import Sampling
from ..study.space import SearchSpace
from ..study.stored_settings import NEVER_STORED, PER_RUN
from ..trust import require_consent, terminal_ask
from ..utils import JsonObject
from .preparation import Preparation, differences, facts_of, load_preparation, store_preparation
from .shared_search import SharedSearch
from .shared_study import open_study, storage_of, target_of
from .storage import artifact_store
from .workers import supervise

# How often to check whether the first worker is ready.
POLL_SECONDS = 0.5
# Settings that each worker has for itself; all others come from the study.
OWN = (
    "model",
    "device_map",
    "max_memory",
    "batch_size",
    "max_batch_size",
    "trials_per_batch",
    "compile_decoding",
    "trust_remote_code",
    "trust_scorers",
    "scorers",
    "debug",
)


def join(settings: Settings, console: Console, study: optuna.Study, store: ArtifactStore, prepares: bool) -> Ready:
    """Load the model and prepare to score trials of a shared study.

    The worker that `prepares` computes the directions and everything else that all workers must share; the others wait for it. Raises
    `CheckpointError` naming what differs here.
    """
    source, known = model_source(settings), load_preparation(study, store)
    if known is not None and source.is_local:
        _check(study, source)  # before a wrong model is loaded
    if known is None and prepares:
        evaluator, preparation = _prepare(settings, console, study)
        _learn(console, study, store, evaluator, preparation.prompts)
        with journal_errors(storage_of(study).location):
            store_preparation(preparation, study, store)  # the others wait for it
    else:
        preparation, evaluator = _take_over(settings, console, study, store, known)
        if prepares:
            _learn(console, study, store, evaluator, preparation.prompts)

    model = evaluator.model
    space = SearchSpace.model_validate(study.user_attrs[SPACE])
    search = SharedSearch(study, storage_of(study), space, Sampling.of(settings), LearnedEdits(store))
    if prepares:
        search.queue_first_trials()
    model.model.register_forward_pre_hook(search.heartbeats.note_progress)
    fitting = model.decoder.rows_that_fit() if isinstance(model.decoder, Decoder) else None
    n_together = settings.trials_per_batch or automatic_trials_per_batch(len(evaluator.bad_prompts), settings.n_trials, fitting)
    return Ready(evaluator, search, BatchSize(n_together if model.batches_trials else 1))


def _take_over(
    settings: Settings, console: Console, study: optuna.Study, store: ArtifactStore, known: Preparation | None
) -> tuple[Preparation, Evaluator]:
    """Load the model as the first worker's preparation says; if it is not `known` yet, it is waited for meanwhile."""
    model = load_model_to_edit(settings if known is None else _in_dtype(settings, known.dtype), console)
    known = known or _wait_for_preparation(study, store, console)
    if model.loaded.dtype_name != known.dtype:
        del model
        model = load_model_to_edit(_in_dtype(settings, known.dtype), console)
    _check(study, model.loaded.source)
    model = model.with_response_prefix(known.response_prefix)
    original = measure_original(settings, model, known.prompts.good_evaluation, known.prompts.bad_evaluation, console)
    if original.refusals != known.base_refusals:
        console.warning(
            f"The original refuses {original.refusals} prompts here and {known.base_refusals} on the first worker: this device "
            "rounds differently. The objective of refusals is normalized by the latter."
        )
        original = original.counting_from(known.base_refusals)
    if settings.workers is None and (settings.print_residual_geometry or settings.plot_residuals):
        compute_directions(settings, console, model, known.prompts)  # prints and plots; the study's own directions are used
    model.use_directions(known.directions, settings.row_normalization)
    return known, Evaluator(settings, model, original, console)


def _in_dtype(settings: Settings, dtype: str) -> Settings:
    return settings.model_copy(update={"dtypes": [dtype]})


def _learn(console: Console, study: optuna.Study, store: ArtifactStore, evaluator: Evaluator, prompts: Prompts) -> None:
    """Learn the missing edits. Raises `KeyboardInterrupt` if the user stops that; edits learned so far are kept."""
    if learn_with_messages(console, LearnedTrials(study, storage_of(study).location, LearnedEdits(store), evaluator), prompts):
        raise KeyboardInterrupt


def _prepare(settings: Settings, console: Console, study: optuna.Study) -> tuple[Evaluator, Preparation]:
    """Do everything that a single-process run does before its search, for all workers."""
    prompts = load_all(settings)
    identity = study.user_attrs["identity"]
    changed = [name for name, here in prompts.identity.items() if here != identity.get(name)]
    if changed:
        raise CheckpointError(f"{changed[0]} are not those that the study was created with.")
    evaluator, separating_layer = prepare(settings, console, prompts)
    open_space(console, study, evaluator, separating_layer)
    model, original = evaluator.model, evaluator.original
    preparation = Preparation(
        directions=model.directions,
        prompts=prompts,
        response_prefix=model.response_prefix,
        dtype=model.loaded.dtype_name,
        base_refusals=original.refusals,
        n_bad_prompts=len(original.bad_prompts),
        last_layer=model.architecture.last_layer,
        base_response_classes=dict(original.response_classes),
    )
    study.set_user_attr("facts", facts_of(model.loaded.source))
    return evaluator, preparation


def _wait_for_preparation(study: optuna.Study, store: ArtifactStore, console: Console) -> Preparation:
    with console.task("Waiting for the first worker to compute the directions"):
        while True:
            ready = load_preparation(study, store)
            if ready is not None:
                return ready
            time.sleep(POLL_SECONDS)


def _check(study: optuna.Study, source: ModelSource) -> None:
    found = differences(study.user_attrs["facts"], source)
    if found:
        raise CheckpointError(f"This worker's trials could not be compared with the study's: {'; '.join(found)}.")


def work(url: str, options: argparse.Namespace, console: Console) -> int:
    """Join the study that the options of `heretic worker` name and run its trials. Raises `HereticError`; returns the exit code."""
    study = _existing_study(url, options.study_name, console)
    settings = _settings_of(study, {name: value for name in OWN if (value := getattr(options, name)) is not None}, url, options)
    if settings.workers is not None:
        supervise(settings, console, study, url, prepares=False)
        return 0
    ready = join(settings, console, study, artifact_store(url, storage_of(study)), prepares=False)
    target = target_of(study, settings.n_trials)
    console.heading(f"Search: {target} trials, {ready.search.n_done} done")
    search_with_view(console, ready, target)
    return 0


def _existing_study(url: str, name: str, console: Console) -> optuna.Study:
    try:
        study = open_study(url, name, Settings.model_fields["worker_timeout"].default, console)
    except KeyError as error:
        raise CheckpointError(
            f"There is no study {name!r} in {shown_location(url)}. Create it with heretic MODEL --study-storage, then let workers join."
        ) from error
    if not study.user_attrs.get(SHARED):
        raise CheckpointError(
            f"The study {name!r} in {shown_location(url)} was not created for several workers. Create it with --workers or --study-storage."
        )
    storage_of(study).timeout = study.user_attrs["settings"]["worker_timeout"]
    return study


def _settings_of(study: optuna.Study, own: JsonObject, url: str, options: argparse.Namespace) -> Settings:
    """The study's settings, with this worker's own ones."""
    stored = study.user_attrs["settings"]
    # Each machine decides whether to run a model's code; whoever can write to the storage must not decide it for others.
    here = {"device_map": "auto", "max_memory": None, "workers": options.workers, "study_storage": url, **own}
    # The number of trials is that of the study; settings of other versions are reported by validation.
    kept_values = {name: value for name, value in stored.items() if name not in (*PER_RUN, *NEVER_STORED, *here)}
    if "model" in own:
        kept_values.pop("demo", None)
    if isinstance(own.get("scorers"), dict):
        here["scorers"] = {**stored.get("scorers", {}), **own["scorers"]}
    try:
        settings = Settings.model_validate({**kept_values, **here})
    except ValidationError as error:
        where, what = first_problem(error)
        raise UsageError(f"{where}: {what}, got {error.errors()[0]['input']!r}.") from error
    require_consent(f"The study {study.study_name!r}", settings, own, terminal_ask())
    identity = study.user_attrs["identity"]
    changed = [name for name, value in scorer_identity(settings).items() if identity.get(name) != value]
    if changed:
        raise CheckpointError(
            f"This worker's trials could not be compared with the study's: {changed[0]} has a different file or different settings here. A "
            "study does not store settings of scorers; give them with --scorers."
        )
    return settings


def run_supervised(order: JsonObject) -> int:
    """Run as a worker of `workers.supervise`, which sent this order."""
    if order["devices"]:
        torch.accelerator.set_device_index(order["devices"][0])
    else:
        torch.set_num_threads(order["threads"])
    console = Console()
    settings = Settings.model_validate({**order["settings"], "study_storage": order["url"]})
    study = open_study(order["url"], order["name"], settings.worker_timeout, console)
    ready = join(settings, console, study, artifact_store(order["url"], storage_of(study)), order["prepares"])
    evaluator = ready.evaluator
    report_failures(ready.search, console, settings)
    with stop_on_interrupt(lambda: None) as should_stop:
        ready.search.run(
            settings.n_trials,
            evaluator.score_trials,
            evaluator.objectives,
            ready.batch_size,
            evaluator.stops_dominated,
            should_stop,
        )
    return 0
