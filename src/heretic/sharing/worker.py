"""A worker: joins a study that is shared, works on its trials until all are done. Also the command `heretic worker`."""

import argparse
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from pydantic import ValidationError

from ..config import Settings
from ..errors import CheckpointError, HereticError, UsageError
from ..loading.libraries import prepare_libraries
from ..loading.source import ModelSource, model_source
from ..privacy import shown_location
from ..prompts import load_all
from ..reporting.tables import space_text
from ..session.answers import terminal_ask
from ..session.stages import scorer_identity
from ..settings_sources import ENV_PREFIX, Parser
from ..study.checkpoint import NEVER_STORED, PER_RUN, SHARED, SPACE, stored_or_new_space
from ..study.learned_edits import LearnedEdits
from ..study.space import SearchSpace
from ..trust import require_consent
from .preparation import Preparation, differences, facts_of, keep, kept
from .shared_study import open_study, storage_of
from .storage import artifact_store

if TYPE_CHECKING:
    from ..console import Console
    from ..evaluator import Evaluator
    from ..model import Model
    from ..study.batching import BatchSize
    from .shared_search import SharedSearch

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


@dataclass(frozen=True)
class Joined:
    """A worker that is ready: its model with directions, its evaluator, and the search it takes part in."""

    settings: Settings
    model: "Model"
    evaluator: "Evaluator"
    search: "SharedSearch"
    batch_size: "BatchSize"


def join(settings: Settings, console: "Console", study: optuna.Study, store: Any, prepares: bool) -> Joined:
    """Load the model and get ready to score trials of a shared study.

    The worker that `prepares` computes the directions and all that the others must have alike; they wait for it. Raises
    `CheckpointError` naming what is not the same here as there.
    """
    from ..decoding.decoder import Decoder
    from ..evaluator import Evaluator
    from ..scoring.measured import measure_original
    from ..session.stages import load_model_to_edit
    from ..study.batching import BatchSize, automatic_trials_per_batch
    from .shared_search import SharedSearch

    source, ready = model_source(settings), kept(study, store)
    if ready is not None and source.is_local:
        _check(study, source)  # before a model that is another one is loaded
    if ready is None and prepares:
        model, evaluator, preparation = _prepare(settings, console, study)
        _learn(settings, console, study, store, evaluator, preparation)
        keep(preparation, study, store)  # which the others wait for
    else:
        wanted = None if ready is None else ready.dtype
        model = load_model_to_edit(settings if wanted is None else _in_dtype(settings, wanted), console)
        ready = ready or _wait_for_preparation(study, store, console)
        if str(model.loaded.dtype).removeprefix("torch.") != ready.dtype:
            del model
            model = load_model_to_edit(_in_dtype(settings, ready.dtype), console)
        _check(study, model.loaded.source)
        model = model.with_response_prefix(ready.response_prefix)
        original = measure_original(settings, model, ready.prompts.good_evaluation, ready.prompts.bad_evaluation, console)
        if original.refusals != ready.base_refusals:
            console.warning(
                f"The original refuses {original.refusals} prompts here and {ready.base_refusals} where the study began: this device "
                "rounds differently. Shares of refusals are taken of the latter."
            )
            original = original.counting_from(ready.base_refusals)
        evaluator = Evaluator(settings, model, original, console)
        model.use_directions(ready.directions, settings.row_normalization)
        if prepares:
            _learn(settings, console, study, store, evaluator, ready)

    assert settings.seed is not None
    space = SearchSpace.model_validate(study.user_attrs[SPACE])
    search = SharedSearch(
        study,
        storage_of(study),
        space,
        settings.seed,
        settings.n_startup_trials,
        settings.sampler,
        settings.first_trials,
        LearnedEdits(store),
    )
    if ready is None:
        search.queue_first_trials()
    model.model.register_forward_pre_hook(search.pulse.step)
    fitting = model.decoder.rows_that_fit() if isinstance(model.decoder, Decoder) else None
    n_together = settings.trials_per_batch or automatic_trials_per_batch(len(evaluator.bad_prompts), settings.n_trials, fitting)
    return Joined(settings, model, evaluator, search, BatchSize(n_together if model.batches_trials else 1))


def _in_dtype(settings: Settings, dtype: str) -> Settings:
    return settings.model_copy(update={"dtypes": [dtype]})


def _learn(
    settings: Settings, console: "Console", study: optuna.Study, store: Any, evaluator: "Evaluator", preparation: Preparation
) -> None:
    """Learn the edits that are missing. Raises `KeyboardInterrupt` if the user ends that: what was learned is kept."""
    from ..session.stages import learn_with_messages

    location = storage_of(study).location
    if learn_with_messages(settings, console, study, LearnedEdits(store), location, evaluator, preparation.prompts):
        raise KeyboardInterrupt


def _prepare(settings: Settings, console: "Console", study: optuna.Study) -> "tuple[Model, Evaluator, Preparation]":
    """Do as a run alone does until its search begins; what came of it is for the others as well."""
    from ..evaluator import Evaluator
    from ..session.stages import check_lengths, compute_directions, load_model_to_edit, measure, with_found_prefix
    from ..study.space import search_space

    prompts = load_all(settings)
    identity = study.user_attrs["identity"]
    changed = [name for name, here in prompts.identity.items() if here != identity.get(name)]
    if changed:
        raise CheckpointError(f"{changed[0]} are not those that the study began with.")
    model = load_model_to_edit(settings, console)
    check_lengths(settings, model, prompts)
    model = with_found_prefix(settings, console, model, prompts)
    original = measure(settings, console, model, prompts)
    separating_layer = compute_directions(settings, console, model, prompts)
    assert model.hooks is not None
    last_layer = len(model.architecture.layers) - 1
    space = stored_or_new_space(study, search_space(settings, list(model.architecture.components), last_layer, separating_layer))
    console.message(space_text(space, separating_layer, last_layer))
    preparation = Preparation(
        directions=model.hooks.directions,
        prompts=prompts,
        response_prefix=model.response_prefix,
        dtype=str(model.loaded.dtype).removeprefix("torch."),
        base_refusals=original.refusals,
        n_bad_prompts=len(original.bad_prompts),
        last_layer=last_layer,
        base_response_classes=dict(original.response_classes),
    )
    study.set_user_attr("facts", facts_of(model.loaded.source))
    return model, Evaluator(settings, model, original, console), preparation


def _wait_for_preparation(study: optuna.Study, store: Any, console: "Console") -> Preparation:
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


def command(arguments: Sequence[str]) -> int:
    """The command `heretic worker`. Raises `HereticError`; returns the exit code."""
    options = _parser().parse_args(list(arguments))
    if options.supervised:
        return _run_supervised()
    url = options.study_storage or os.environ.get(f"{ENV_PREFIX}STUDY_STORAGE")
    if not url:
        raise UsageError("heretic worker needs --study-storage, the one that the study was begun with.")
    prepare_libraries(options.debug)
    from ..console import Console

    console = Console()
    study = _existing_study(url, options.study_name, console)
    settings = _settings_of(study, {name: value for name in OWN if (value := getattr(options, name)) is not None}, url, options)
    if settings.workers is not None:
        from .workers import supervise

        supervise(settings, console, study, url, prepares=False)
        return 0
    joined = join(settings, console, study, artifact_store(url, storage_of(study)), prepares=False)
    console.heading(f"Search: {joined.search.target(settings.n_trials)} trials, {joined.search.n_done} done")
    from ..session.stages import search_with_view

    search_with_view(console, joined.evaluator, joined.search, joined.search.target(settings.n_trials), joined.batch_size)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="heretic worker",
        description="Work on a study that was begun with --study-storage or --workers. Model, prompts and settings come from the study.",
        allow_abbrev=False,
    )
    parser.add_argument("--study-storage", metavar="URL", help="where the study lives, as it was begun with (or HERETIC_STUDY_STORAGE)")
    parser.add_argument("--study-name", metavar="TEXT", default=os.environ.get(f"{ENV_PREFIX}STUDY_NAME", "heretic"))
    parser.add_argument("--workers", metavar="auto|N", help="processes here, each with its own copy of the model; one if not given")
    parser.add_argument("--model", metavar="TEXT", help="where the same model lies here, if not where the study says")
    parser.add_argument("--device-map", type=_json_or_text, metavar="TEXT", help="placement on devices, given to Accelerate")
    parser.add_argument("--max-memory", type=_json_or_text, metavar="JSON", help="memory limit per device, given to Accelerate")
    parser.add_argument("--batch-size", metavar="N", help="prompts that a forward pass holds for one trial")
    parser.add_argument("--max-batch-size", metavar="N", help="largest batch that the automatic choice uses")
    parser.add_argument("--trials-per-batch", metavar="N", help="trials that share one forward pass")
    parser.add_argument("--trust-remote-code", action="store_true", default=None, help="run Python code that comes with the model")
    parser.add_argument("--trust-scorers", action="store_true", default=None, help="run scorers that the study names, without asking")
    parser.add_argument("--scorers", type=_json_or_text, metavar="JSON", help="custom scorers, whose own settings a study does not store")
    parser.add_argument("--debug", action="store_true", default=None, help="show tracebacks and the libraries' messages")
    parser.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
    return parser


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _existing_study(url: str, name: str, console: "Console") -> optuna.Study:
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


def _settings_of(study: optuna.Study, own: dict[str, Any], url: str, options: argparse.Namespace) -> Settings:
    """The study's settings, with what this worker says for itself."""
    stored = study.user_attrs["settings"]
    # Whether to run a model's own code is decided on each machine; whoever can write to the storage must not decide it for others.
    here = {"device_map": "auto", "max_memory": None, "workers": options.workers, "study_storage": url, **own}
    # The number of the trials is what it was made to be there; what is not of this version is left to validation to name.
    kept_values = {name: value for name, value in stored.items() if name not in (*PER_RUN, *NEVER_STORED, *here)}
    if "model" in own:
        kept_values.pop("demo", None)
    if isinstance(own.get("scorers"), dict):
        here["scorers"] = {**stored.get("scorers", {}), **own["scorers"]}
    try:
        settings = Settings.model_validate({**kept_values, **here})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UsageError(f"{where}: {problem['msg'].removeprefix('Value error, ')}, got {problem['input']!r}.") from error
    require_consent(f"The study {study.study_name!r}", settings, own, terminal_ask())
    identity = study.user_attrs["identity"]
    changed = [name for name, value in scorer_identity(settings).items() if identity.get(name) != value]
    if changed:
        raise CheckpointError(
            f"This worker's trials could not be compared with the study's: {changed[0]} has another file here, or other settings, which a "
            "study does not store. Give them with --scorers."
        )
    return settings


def _run_supervised() -> int:
    """Be a worker of `workers.supervise`: what to do comes in one line on standard input, whose end means that the parent is gone."""
    order = json.loads(_read_line(0))
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    from ..session.stages import report_failures, stop_on_interrupt

    prepare_libraries(order["settings"]["debug"])
    import torch

    from ..console import Console

    if order["devices"]:
        torch.accelerator.set_device_index(order["devices"][0])
    else:
        torch.set_num_threads(order["threads"])
    console = Console()
    settings = Settings.model_validate({**order["settings"], "study_storage": order["url"]})
    study = open_study(order["url"], order["name"], settings.worker_timeout, console)
    joined = join(settings, console, study, artifact_store(order["url"], storage_of(study)), order["prepares"])
    evaluator = joined.evaluator
    report_failures(joined.search, console, settings)
    with stop_on_interrupt(lambda: None) as should_stop:
        joined.search.run(
            settings.n_trials,
            evaluator.score_trials,
            evaluator.objectives,
            joined.batch_size,
            evaluator.stops_dominated,
            should_stop,
        )
    return 0


def _read_line(file: int) -> bytes:
    """A line, read byte by byte: nothing that follows is taken away from whoever reads next."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(file, 1)
        if not byte:
            raise HereticError("A worker that is started by hand needs no --supervised.")
        line += byte
    return line


def _leave_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
