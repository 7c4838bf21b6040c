"""The command: reads, validates, calls, renders. Library errors become one line and an exit code here and nowhere else."""

import gc
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import HereticError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from .batching import BatchSize
    from .checkpoint import Checkpoint
    from .config import Settings
    from .console import Console
    from .evaluator import Evaluator
    from .model import Model
    from .search import Search
    from .space import SearchSpace

INTERRUPTED = 130

# What the first argument may ask for besides a run: the module whose function `command` takes the other arguments.
COMMANDS = {"compare": "heretic.compare"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `heretic` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the terminal's encoding lacks must not end the run
    try:
        code = run_command(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def run_command(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code: 0 done, 1 an error told, 2 wrong usage, 130 interrupted."""
    if {"-h", "--help"} & set(arguments):  # answered from a text, before anything slow is imported
        print(files("heretic").joinpath("help.txt").read_text(encoding="utf-8"), end="")
        return 0
    if "--version" in arguments:
        print(f"heretic {__version__}")
        return 0
    debug = "--debug" in arguments
    try:
        if arguments and arguments[0] in COMMANDS:
            _prepare_libraries(debug)
            code: int = import_module(COMMANDS[arguments[0]]).command(arguments[1:])
            return code

        from . import rebuild

        if rebuild.is_asked(arguments):
            _prepare_libraries(debug)
            return rebuild.run_command(arguments)
        from .config import load_settings

        settings = load_settings(arguments)
        debug = settings.debug
        return run(settings)
    except HereticError as error:
        _tell(str(error), debug)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:  # nothing foresaw it; it is told in plain words all the same
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        _tell(f"{reason} (this is a defect of the program; --debug shows where it happened). What was finished is kept.", debug)
        return 1


def _tell(text: str, debug: bool) -> None:
    from .privacy import without_token

    if debug:
        print(without_token(traceback.format_exc()), end="", file=sys.stderr)
    for line in without_token(text).splitlines():
        print(f"Error: {line}", file=sys.stderr)


def run(settings: "Settings") -> int:
    """The stages of a run. Raises `HereticError`; returns the exit code."""
    from .answers import can_ask, check_answers
    from .source import model_source

    check_answers(settings, can_ask())
    _check_extras(settings)
    model_source(settings)  # a mistyped path is told before anything heavy is imported or a study is locked
    _prepare_libraries(settings.debug)

    with _collector_paused():
        from .console import Console

    console = Console()
    console.message(f"heretic {__version__}")
    if settings.evaluate_model is not None:
        return _evaluate(settings, console)

    if settings.model_action == "upload":
        _check_upload(settings, console)

    from .checkpoint import Checkpoint

    with Checkpoint(settings) as checkpoint:
        return _run_study(settings, console, checkpoint)


def _check_extras(settings: "Settings") -> None:
    """Raise `UsageError` where a setting asks for what only an extra brings and that is missing: an hour later would be too late."""
    from .extras import require_extra

    if settings.report_plots:
        require_extra("research", "report_plots")
    if settings.plot_residuals:
        require_extra("research", "plot_residuals")
        from .residual_plots import check_plot_settings

        check_plot_settings(settings)
    if settings.model_action == "benchmark":
        require_extra("benchmark", "model_action = benchmark")
        _prepare_libraries(settings.debug)
        from .benchmark import check_tasks

        check_tasks(settings)


def _check_upload(settings: "Settings", console: "Console") -> None:
    """Ask the hub whether the upload at the end of the run can be, as far as the settings say what it will be."""
    from huggingface_hub import get_token

    from .upload import check_destination

    token = get_token()
    if settings.upload_repo_id is not None and settings.upload_repo_private is not None and token is not None:
        with console.task(f"Asking the hub about {settings.upload_repo_id}"):
            check_destination(settings.upload_repo_id, settings.upload_repo_private, token, console)


def _prepare_libraries(debug: bool) -> None:
    """What libraries read when they are imported: how threads wait, and, except with `--debug`, that the screen is this program's."""
    import logging
    import warnings

    # OpenMP's threads spin for milliseconds while they wait. That is as fast as a short spin on an idle machine (see bench/LOG.md), but
    # on one where other programs run, threads then wait for threads that have no core: many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stdout.isatty() else "1")
    if not sys.stdout.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what it logs is told in our own errors
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Within, the garbage collector rests: imports make many objects, of which it would find none to be garbage, again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _run_study(settings: "Settings", console: "Console", checkpoint: "Checkpoint") -> int:
    # 1. Settings and seed
    seed_is_given = settings.seed is not None
    opened = _open_study(settings, console, checkpoint)
    if opened is None:
        return 0
    settings, is_new = opened

    from .source import fingerprint, model_source

    # 2. Prompts and scorers, which cost little and are most often what is wrong
    prompts = _load_prompts(settings, console)
    identity = {**_prompt_identity(prompts), **_scorer_identity(settings)}
    final_prompts = _load_final_prompts(settings, prompts)
    if not is_new:
        source = model_source(settings)
        # A model on the hub may have to be fetched first; it is checked below.
        checkpoint.check_identity({**identity, "the model": fingerprint(source)} if source.is_local else identity)
        if _is_over(settings, console, checkpoint):
            return 0

    # 3. Device, model and what can be edited in it
    from .utils import describe_device

    console.message(f"Seed {settings.seed}; {describe_device()}")
    model = _load_model(settings, console)
    _check_lengths(settings, model, prompts, final_prompts)

    # 4. Response prefix, baseline, directions
    evaluator = _evaluator(settings, console, model, prompts)
    parting = _compute_directions(settings, console, model, prompts)

    # 5. The study
    from .space import search_space

    last_layer = len(model.architecture.layers) - 1
    space = search_space(settings, list(model.architecture.components), last_layer, parting)
    identity["the model"] = fingerprint(model.loaded.source)
    if is_new:
        checkpoint.create(settings, identity)
    else:
        checkpoint.check_identity(identity)
    space = checkpoint.search_space(space)
    console.search_space(space, parting, last_layer)
    checkpoint.note(base_refusals=evaluator.base_refusals, n_bad_prompts=len(evaluator.bad_prompts), last_layer=last_layer)
    search = _open_search(settings, checkpoint, space)

    batch_size = _batch_size(settings, console, checkpoint, model, evaluator, may_measure=is_new and not seed_is_given)

    def search_up_to(target: int) -> "Path | None":
        checkpoint.note(target=target)
        was_stopped = _search(console, evaluator, search, target, batch_size)
        if not search.front:
            return None
        if not was_stopped:
            _score_finalists(settings, console, checkpoint, model, final_prompts, batch_size.value)
        return _report(settings, console, checkpoint, None if was_stopped else evaluator)

    target = checkpoint.target(settings, search.n_done, is_new)
    console.heading(f"Search: {target} trials, {search.n_done} done")
    report = search_up_to(target)
    if not search.front:
        return _no_trial(search)

    # 6. The Pareto front, and what to do with it
    if _is_told(settings, console, checkpoint, report):
        return 0

    from .interact import Workbench

    bench = Workbench(settings, console, model, evaluator, search, lambda n_more: search_up_to(search.n_done + n_more))
    bench.menu() if settings.model_action is None else bench.act(settings.model_action)
    return 0


def _is_told(settings: "Settings", console: "Console", checkpoint: "Checkpoint", report: "Path | None") -> bool:
    """Show the outcome where nobody is asked about it; whether that is all that is to be done."""
    if settings.model_action is None and console.can_ask:
        return False
    _show_outcome(settings, console, checkpoint, report)
    return settings.model_action in (None, "none")


def _open_study(settings: "Settings", console: "Console", checkpoint: "Checkpoint") -> "tuple[Settings, bool] | None":
    """The settings in force and whether the study is new; None where the user leaves."""
    from .samplers import check_sampler

    if checkpoint.lost_bytes:
        console.warning(
            f"The last line of {checkpoint.path} was cut off in the middle and is lost ({checkpoint.lost_bytes} bytes); "
            "everything before it is kept."
        )
    is_new = not checkpoint.exists
    if not is_new:
        action: str | None = settings.checkpoint_action
        if action is None and console.can_ask:
            from .interact import ask_checkpoint_action

            action = ask_checkpoint_action(str(checkpoint.path), checkpoint.n_done)
            if action is None:
                return None
        is_new = action == "restart"
    if not is_new:
        settings = checkpoint.restored(settings)
        console.message(f"Continuing the study {checkpoint.path} ({checkpoint.n_done} trials done).")
    check_sampler(settings.sampler)
    if settings.seed is None:
        import secrets

        settings = settings.model_copy(update={"seed": secrets.randbelow(2**32)})
    return settings, is_new


def _load_prompts(settings: "Settings", console: "Console") -> dict[str, Any]:
    from .errors import DirectionError
    from .prompts import load_prompts

    names = ("good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts")
    with console.task("Loading prompts"):
        prompts = {name: load_prompts(getattr(settings, name), settings.system_prompt, name) for name in names}
    if set(prompts["good_prompts"]) == set(prompts["bad_prompts"]):
        raise DirectionError(
            "good_prompts and bad_prompts are the same, so nothing tells refused from answered prompts. Give different ones."
        )
    console.message("Prompts: " + ", ".join(f"{len(prompts[name])} {name}" for name in names))
    return prompts


def _load_final_prompts(settings: "Settings", prompts: dict[str, Any]) -> dict[str, Any]:
    """Prompts for the finalists, harmless and harmful: those of the search where no others are given."""
    from .prompts import load_prompts

    found = {}
    for name, usual in (("final_good_prompts", "good_evaluation_prompts"), ("final_bad_prompts", "bad_evaluation_prompts")):
        specification = getattr(settings, name)
        found[name] = prompts[usual] if specification is None else load_prompts(specification, settings.system_prompt, name)
    return found


def _check_lengths(settings: "Settings", model: "Model", prompts: dict[str, Any], final_prompts: dict[str, Any]) -> None:
    """Raise `PromptError` where prompts with what follows them are too long for the model."""
    after = {
        "good_evaluation_prompts": (settings.kl_tokens, "kl_tokens"),
        "bad_evaluation_prompts": (settings.max_response_length, "max_response_length"),
    }
    for name, specification_prompts in prompts.items():
        model.check_lengths(specification_prompts, name, *after.get(name, (1, "")))
    if settings.n_finalists and (settings.final_good_prompts or settings.final_bad_prompts):
        _check_final_lengths(settings, model, final_prompts)  # others are checked when they are needed


def _check_final_lengths(settings: "Settings", model: "Model", prompts: dict[str, Any]) -> None:
    from .finalists import final_settings

    final = final_settings(settings)
    for name, final_prompts in prompts.items():
        model.check_lengths(
            final_prompts, name, max(final.max_response_length, final.kl_tokens), "final_response_length and final_kl_tokens"
        )


def _scorer_identity(settings: "Settings") -> dict[str, str]:
    """Fingerprints of the scorers that are not built in; told here if one cannot be made, before anything heavy is loaded."""
    if not settings.scorers:
        return {}
    from .scorers import fingerprints

    return fingerprints(settings)


def _prompt_identity(prompts: dict[str, Any]) -> dict[str, str]:
    from .prompts import fingerprint

    return {name: fingerprint(values) for name, values in prompts.items()}


def _is_over(settings: "Settings", console: "Console", checkpoint: "Checkpoint") -> bool:
    """Show the front of a finished study where nobody asks for more, without loading the model for it."""
    from .answers import trial_at
    from .finalists import missing_finalists
    from .search import front_of

    assert checkpoint.study is not None
    front = front_of(checkpoint.study)
    if not front or checkpoint.n_done < checkpoint.target(settings, checkpoint.n_done, False):
        return False
    if missing_finalists(checkpoint.study, settings):
        return False
    if settings.trial_index is not None:
        trial_at(front, settings.trial_index)  # told before the model is loaded
    if settings.model_action not in (None, "none") or (console.can_ask and settings.model_action is None):
        return False
    if settings.print_residual_geometry or settings.plot_residuals:
        return False  # the model has to be run for those
    _show_outcome(settings, console, checkpoint, _report(settings, console, checkpoint, None))
    return True


def _load_model(settings: "Settings", console: "Console", name: str | None = None) -> "Model":
    from .loading import load_model
    from .model import Model
    from .source import model_source

    with _collector_paused():  # transformers imports the model's own file only now
        loaded = load_model(settings, model_source(settings, name), console)
    model = Model(loaded, settings, console)
    found = ", ".join(f"{count} {component}" for component, count in model.architecture.components.items())
    dtype = str(loaded.dtype).removeprefix("torch.")
    left = ", ".join(name for name in settings.disabled_components if name in model.architecture.components)
    console.message(
        f"{loaded.source.name}: {loaded.config.model_type}, {len(model.architecture.layers)} layers, "
        f"{'4-bit, computed in ' if loaded.quantized else ''}{dtype}; writing to the residual stream: {found}, "
        + (f"all edited but {left}" if left else "all edited")
    )
    _report_completeness(model, console)
    return model


def _report_completeness(model: "Model", console: "Console") -> None:
    """Tell where edits of weights cannot reach all of the residual stream."""
    from .completeness import ROUNDING, remaining_share

    share = remaining_share(model.model, model.architecture)
    if share > ROUNDING.get(model.loaded.dtype.itemsize, 0.05):
        console.warning(
            f"After an ablation of full strength {min(share, 1):.0%} of a direction stays in the residual stream: this model normalizes, "
            "gates or weighs its stream in a way that no edit of weights can follow, or something that writes to it was not found. "
            "Ablation works on it, but only approximately."
        )


def _evaluator(settings: "Settings", console: "Console", model: "Model", prompts: dict[str, Any], all_scorers: bool = False) -> "Evaluator":
    from .evaluator import PREFIX_PROMPTS, Evaluator, find_response_prefix

    sample = [*prompts["good_prompts"][:PREFIX_PROMPTS], *prompts["bad_prompts"][:PREFIX_PROMPTS]]
    model.response_prefix = find_response_prefix(model, settings, sample)
    if model.response_prefix:
        console.message(f"Response prefix: {model.response_prefix!r}; evaluation begins after it.")
    evaluator = Evaluator(settings, model, prompts["good_evaluation_prompts"], prompts["bad_evaluation_prompts"], console, all_scorers)
    console.message(f"The original refuses {evaluator.base_refusals} of {len(evaluator.bad_prompts)} harmful evaluation prompts.")
    return evaluator


def _compute_directions(settings: "Settings", console: "Console", model: "Model", prompts: dict[str, Any]) -> int:
    """Give the model its directions; the layer in which the two sets of prompts part."""
    from .directions import mean_residual, parting_layer, refusal_directions
    from .errors import DirectionError

    quantile = settings.winsorization_quantile
    batches: list[Iterable[Tensor]] = [
        model.residuals(prompts["good_prompts"], "Residuals of harmless prompts"),
        model.residuals(prompts["bad_prompts"], "Residuals of harmful prompts"),
    ]
    if settings.print_residual_geometry or settings.plot_residuals:
        batches = _show_residuals(settings, console, batches)
    good, bad = (mean_residual(part, quantile) for part in batches)
    if not (good.isfinite().all() and bad.isfinite().all()):
        raise DirectionError("The residuals are not finite. Try another --dtypes, such as bfloat16 or float32.")
    directions = refusal_directions(good, bad, settings.orthogonalize_direction)
    if not directions[1:].any():
        raise DirectionError("Harmless and harmful prompts give the same residuals in every layer, so there is no direction.")
    model.use_directions(directions, settings.row_normalization)
    return parting_layer(good, bad)


def _open_search(settings: "Settings", checkpoint: "Checkpoint", space: "SearchSpace") -> "Search":
    from .search import Search

    assert checkpoint.study is not None and settings.seed is not None
    return Search(
        checkpoint.study,
        checkpoint.path,
        space,
        settings.seed,
        settings.n_startup_trials,
        settings.sampler,
        settings.first_trials,
    )


def _show_residuals(settings: "Settings", console: "Console", batches: "list[Iterable[Tensor]]") -> "list[Iterable[Tensor]]":
    """Tell and draw how all residuals lie, as far as settings ask for it; the residuals, which are then held in memory."""
    import torch

    from .checkpoint import file_name
    from .directions import winsorize
    from .source import expand

    good, bad = (torch.cat([batch.cpu() for batch in part]) for part in batches)
    quantile = settings.winsorization_quantile
    good_seen, bad_seen = winsorize(good, quantile), winsorize(bad, quantile)  # as the directions see them
    if settings.print_residual_geometry:
        from .residual_geometry import residual_geometry

        console.residual_geometry(residual_geometry(good_seen, bad_seen))
    if settings.plot_residuals:
        from .residual_plots import write_residual_plots

        folder = expand(settings.residual_plot_path) / file_name(settings.model)
        paths = write_residual_plots(good_seen, bad_seen, settings, folder, console)
        console.message(f"Plots of the residuals: {paths[0]} to {paths[-2].name}, and {paths[-1]}")
    return [[good], [bad]]


def _batch_size(
    settings: "Settings", console: "Console", checkpoint: "Checkpoint", model: "Model", evaluator: "Evaluator", may_measure: bool
) -> "BatchSize":
    """How many trials are computed together. It is measured only where the run was not asked to be an exact repetition of another."""
    from .batching import BatchSize, automatic_trials_per_batch
    from .generation import Decoder

    if not model.batches_trials:
        console.message("Trials are evaluated one at a time: this model's experts cannot tell which prompt a token belongs to.")
        return BatchSize(1)
    decoder = model.decoder
    if not isinstance(decoder, Decoder):
        return BatchSize(checkpoint.trials_per_batch(settings, automatic_trials_per_batch(len(evaluator.bad_prompts))))
    fitting = decoder.rows_that_fit()
    value = checkpoint.trials_per_batch(settings, automatic_trials_per_batch(len(evaluator.bad_prompts), fitting))
    if settings.trials_per_batch or not may_measure:
        return BatchSize(value)

    def settle(settled: int) -> None:
        checkpoint.note(trials_per_batch=settled)
        if settled != value:
            console.message(f"{settled} trials share a pass from here on: that is faster here than {value}.")

    return BatchSize(value, lambda: decoder.n_tokens, settings.n_startup_trials, settle)


def _search(console: "Console", evaluator: "Evaluator", search: "Search", target: int, batch_size: "BatchSize") -> bool:
    """Run trials up to `target`, shown as they come; the first Ctrl+C ends it after the running trial. Whether it was ended so."""
    from .console import StudyView

    last_layer = len(evaluator.model.architecture.layers) - 1
    with StudyView(console, target, search.n_done, evaluator.base_refusals, last_layer, evaluator.settings.objectives) as view:
        view.trials = search.trials

        def note_stop() -> None:
            view.say("Stopping after the running trials. Ctrl+C again leaves at once.")

        with _stop_on_interrupt(note_stop) as should_stop:
            search.run(
                target,
                evaluator.score_trials,
                evaluator.objectives,
                batch_size,
                evaluator.stops_dominated,
                should_stop,
                lambda trial: view.show(trial, search.trials, search.n_done),
            )
            return should_stop()


def _score_finalists(
    settings: "Settings", console: "Console", checkpoint: "Checkpoint", model: "Model", prompts: dict[str, Any], n_together: int
) -> None:
    """Score the best of the front again and store what comes of it; the front stands whatever happens here."""
    from .finalists import ATTRIBUTE, missing_finalists, score_finalists

    assert checkpoint.study is not None
    if not missing_finalists(checkpoint.study, settings):
        return
    good, bad = prompts["final_good_prompts"], prompts["final_bad_prompts"]
    try:
        _check_final_lengths(settings, model, prompts)
        found = score_finalists(checkpoint.study, settings, model, good, bad, n_together, console)
    except KeyboardInterrupt:
        console.message("Interrupted: the finalists are not scored again.")
    except HereticError as error:
        console.warning(f"The finalists are not scored again: {error}")
    else:
        checkpoint.note(**{ATTRIBUTE: found})


@contextmanager
def _stop_on_interrupt(note: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl+C makes the value entered return True, and the second raises `KeyboardInterrupt`."""
    pressed = False

    def handle(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        note()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _no_trial(search: "Search") -> int:
    reasons = [trial.user_attrs["failure"] for trial in search.trials if "failure" in trial.user_attrs]
    if not reasons:
        raise KeyboardInterrupt
    raise HereticError(f"No trial could be scored: all {len(reasons)} failed. The last one: {reasons[-1]}")


def _report(settings: "Settings", console: "Console", checkpoint: "Checkpoint", evaluator: "Evaluator | None") -> "Path | None":
    """Write the report, with responses of the finalists where there is an evaluator to take them; where it lies.

    What goes wrong is told, and the run goes on: the study is what counts.
    """
    from .errors import ReportError, TrialError
    from .report import facts_of, report_path, write_report

    if not settings.report:
        return None
    assert checkpoint.study is not None
    path = report_path(checkpoint.path)
    try:
        if evaluator is not None:
            _take_samples(checkpoint, evaluator)
        facts = facts_of(checkpoint.study)
        write_report(facts, path)
        if settings.report_plots:
            from .report_plots import write_plots

            write_plots(facts, path)
    except (ReportError, TrialError) as error:
        console.warning(str(error))
        return None
    return path


def _take_samples(checkpoint: "Checkpoint", evaluator: "Evaluator") -> None:
    from .samples import sample_prompts, take_samples
    from .search import pareto_front

    assert checkpoint.study is not None
    prompts = sample_prompts(evaluator.good_prompts, evaluator.bad_prompts)
    front = pareto_front(checkpoint.study.get_trials(deepcopy=False))
    kept = checkpoint.study.user_attrs.get("samples", {})
    length = evaluator.settings.max_response_length
    checkpoint.note(samples=take_samples(evaluator.model, prompts, front, length, kept))


def _show_outcome(settings: "Settings", console: "Console", checkpoint: "Checkpoint", report: "Path | None") -> None:
    """The front, and the command lines that go on from there where no setting answers what to do with it."""
    from .answers import command_lines
    from .finalists import known_finalists
    from .search import front_of

    assert checkpoint.study is not None
    attributes = checkpoint.study.user_attrs
    front = front_of(checkpoint.study)
    console.heading(f"{checkpoint.n_done} trials done")
    console.front(front, attributes.get("last_layer"), attributes.get("base_refusals"), settings.objectives)
    console.finalists(front, known_finalists(checkpoint.study))
    if report is not None:
        console.message(f"Report: {report}")
    if settings.model_action is None:
        console.message("To go on from here (the trial index is the number in the first column):")
        for line in command_lines(settings):
            console.message(f"  {line}")


def _evaluate(settings: "Settings", console: "Console") -> int:
    """Score `evaluate_model` against `model` with the evaluator of the search."""
    from .errors import EvaluationError
    from .evaluator import MOVED_PROMPTS
    from .loading import load_config
    from .score_tables import figure_rows, moved_rows
    from .source import model_source
    from .utils import describe_device, empty_cache

    # Both are looked at before one is loaded.
    sources = [model_source(settings), model_source(settings, settings.evaluate_model)]
    n_tokens, n_other = [load_config(source).get_text_config(decoder=True).vocab_size for source in sources]
    if n_tokens != n_other:
        raise EvaluationError(
            f"{settings.evaluate_model} has a vocabulary of {n_other} tokens and {settings.model} one of {n_tokens}: their KL divergence "
            "is not defined. Give a model with the same tokenizer."
        )
    prompts = _load_prompts(settings, console)
    console.message(describe_device())
    original = _load_model(settings, console)
    evaluator = _evaluator(settings, console, original, prompts, all_scorers=True)
    prefix = original.response_prefix
    del original
    evaluator.detach()
    empty_cache()

    other = _load_model(settings, console, settings.evaluate_model)
    other.response_prefix = prefix
    evaluator.model = other
    score = evaluator.score(None)
    models = [{"scores": evaluator.base_scores, "response_classes": evaluator.base_response_classes}, score.described()]
    console.columns("Scores", ["", "Original", f"{settings.evaluate_model} (95 % interval)"], figure_rows(models))
    console.columns("Prompts that moved most", *moved_rows(evaluator.most_moved(None, MOVED_PROMPTS)))
    console.message(
        f"{settings.evaluate_model}: {score.refusals} of {len(evaluator.bad_prompts)} refused (original "
        f"{evaluator.base_refusals}), KL divergence {score.kl_divergence:.4f} from {settings.model} ({n_tokens} tokens)"
    )
    return 0
