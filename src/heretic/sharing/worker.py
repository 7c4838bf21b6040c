"""A worker: joins a study that is shared, works on its trials until all are done: by `heretic worker`, or as one of several on a host."""

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
    learn_shown,
    load_model_to_edit,
    open_space,
    prepare,
    scorer_identity,
    search_shown,
    stop_on_interrupt,
    tell_failures,
)
from ..settings_sources import first_problem
from ..study.batching import BatchSize, automatic_trials_per_batch
from ..study.checkpoint import SHARED, SPACE
from ..study.learned_edits import LearnedEdits
from ..study.learned_search import LearnedTrials
from ..study.samplers import Sampling
from ..study.space import SearchSpace
from ..study.stored_settings import NEVER_STORED, OF_ONE_RUN
from ..trust import require_consent, who_asks
from ..utils import JsonObject
from .preparation import Preparation, differences, facts_of, keep, kept
from .shared_search import SharedSearch
from .shared_study import open_study, storage_of, target_of
from .storage import artifact_store
from .workers import supervise

# How often something that another worker has to do first is looked for.
POLL_SECONDS = 0.5
# What a worker says for itself; everything else comes from the study.
OWN = (
    "model",
    "device_map",
    "max_memory",
    "batch_size",
    "max_batch_size",
    "trials_per_batch",
    "trust_remote_code",
    "trust_scorers",
    "scorers",
    "debug",
)


def join(settings: Settings, console: Console, study: optuna.Study, store: ArtifactStore, prepares: bool) -> Ready:
    """Load the model and get ready to score trials of a shared study.

    The worker that `prepares` computes the directions and all that the others must have alike; they wait for it. Raises
    `CheckpointError` naming what is not the same here as there.
    """
    source, known = model_source(settings), kept(study, store)
    if known is not None and source.is_local:
        _check(study, source)  # before a model that is another one is loaded
    if known is None and prepares:
        evaluator, preparation = _prepare(settings, console, study)
        _learn(console, study, store, evaluator, preparation.prompts)
        keep(preparation, study, store)  # which the others wait for
    else:
        preparation, evaluator = _take_over(settings, console, study, store, known)
        if prepares:
            _learn(console, study, store, evaluator, preparation.prompts)

    model = evaluator.model
    space = SearchSpace.model_validate(study.user_attrs[SPACE])
    search = SharedSearch(study, storage_of(study), space, Sampling.of(settings), LearnedEdits(store))
    if known is None and prepares:
        search.queue_first_trials()
    model.model.register_forward_pre_hook(search.pulse.step)
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
            f"The original refuses {original.refusals} prompts here and {known.base_refusals} where the study began: this device "
            "rounds differently. Shares of refusals are taken of the latter."
        )
        original = original.counting_from(known.base_refusals)
    model.use_directions(known.directions, settings.row_normalization)
    return known, Evaluator(settings, model, original, console)


def _in_dtype(settings: Settings, dtype: str) -> Settings:
    return settings.model_copy(update={"dtypes": [dtype]})


def _learn(console: Console, study: optuna.Study, store: ArtifactStore, evaluator: Evaluator, prompts: Prompts) -> None:
    """Learn the edits that are missing. Raises `KeyboardInterrupt` if the user ends that: what was learned is kept."""
    if learn_shown(console, LearnedTrials(study, storage_of(study).location, LearnedEdits(store), evaluator), prompts):
        raise KeyboardInterrupt


def _prepare(settings: Settings, console: Console, study: optuna.Study) -> tuple[Evaluator, Preparation]:
    """Do as a run alone does until its search begins; what came of it is for the others as well."""
    prompts = load_all(settings)
    identity = study.user_attrs["identity"]
    changed = [name for name, here in prompts.identity.items() if here != identity.get(name)]
    if changed:
        raise CheckpointError(f"{changed[0]} are not those that the study began with.")
    evaluator, parting = prepare(settings, console, prompts)
    open_space(console, study, evaluator, parting)
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
    with console.task("Waiting for the directions, which the first worker computes"):
        while True:
            ready = kept(study, store)
            if ready is not None:
                return ready
            time.sleep(POLL_SECONDS)


def _check(study: optuna.Study, source: ModelSource) -> None:
    found = differences(study.user_attrs["facts"], source)
    if found:
        raise CheckpointError(f"This worker's trials could not be compared with the study's: {'; '.join(found)}.")


def work(url: str, options: argparse.Namespace, console: Console) -> int:
    """Join the study that the options of `heretic worker` name and work on its trials. Raises `HereticError`; returns the exit code."""
    study = _existing_study(url, options.study_name, console)
    settings = _settings_of(study, {name: value for name in OWN if (value := getattr(options, name)) is not None}, url, options)
    if settings.workers is not None:
        supervise(settings, console, study, url, prepares=False)
        return 0
    ready = join(settings, console, study, artifact_store(url, storage_of(study)), prepares=False)
    target = target_of(study, settings.n_trials)
    console.heading(f"Search: {target} trials, {ready.search.n_done} done")
    search_shown(console, ready, target)
    return 0


def _existing_study(url: str, name: str, console: Console) -> optuna.Study:
    try:
        study = open_study(url, name, Settings.model_fields["worker_timeout"].default, console)
    except KeyError as error:
        raise CheckpointError(
            f"There is no study {name!r} in {shown_location(url)}. Begin it with heretic MODEL --study-storage, then let workers join."
        ) from error
    if not study.user_attrs.get(SHARED):
        raise CheckpointError(
            f"The study {name!r} in {shown_location(url)} is worked on by one process alone. Begin it with --workers or --study-storage."
        )
    storage_of(study).timeout = study.user_attrs["settings"]["worker_timeout"]
    return study


def _settings_of(study: optuna.Study, own: JsonObject, url: str, options: argparse.Namespace) -> Settings:
    """The study's settings, with what this worker says for itself."""
    stored = study.user_attrs["settings"]
    # Whether to run a model's own code is decided on each machine; whoever can write to the storage must not decide it for others.
    here = {"device_map": "auto", "max_memory": None, "workers": options.workers, "study_storage": url, **own}
    # The number of the trials is what it was made to be there; what is not of this version is left to validation to name.
    kept_values = {name: value for name, value in stored.items() if name not in (*OF_ONE_RUN, *NEVER_STORED, *here)}
    if "model" in own:
        kept_values.pop("demo", None)
    if isinstance(own.get("scorers"), dict):
        here["scorers"] = {**stored.get("scorers", {}), **own["scorers"]}
    try:
        settings = Settings.model_validate({**kept_values, **here})
    except ValidationError as error:
        where, what = first_problem(error)
        raise UsageError(f"{where}: {what}, got {error.errors()[0]['input']!r}.") from error
    require_consent(f"The study {study.study_name!r}", settings, own, who_asks())
    identity = study.user_attrs["identity"]
    changed = [name for name, value in scorer_identity(settings).items() if identity.get(name) != value]
    if changed:
        raise CheckpointError(
            f"This worker's trials could not be compared with the study's: {changed[0]} has another file here, or other settings, which a "
            "study does not store. Give them with --scorers."
        )
    return settings


def run_supervised(order: JsonObject) -> int:
    """Be a worker of `workers.supervise`, which gave this order."""
    if order["devices"]:
        torch.accelerator.set_device_index(order["devices"][0])
    else:
        torch.set_num_threads(order["threads"])
    console = Console()
    settings = Settings.model_validate({**order["settings"], "study_storage": order["url"]})
    study = open_study(order["url"], order["name"], settings.worker_timeout, console)
    ready = join(settings, console, study, artifact_store(order["url"], storage_of(study)), order["prepares"])
    evaluator = ready.evaluator
    tell_failures(ready.search, console, settings)
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
