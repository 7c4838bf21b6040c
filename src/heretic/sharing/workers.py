"""Several worker processes on one host, which are started, monitored, restarted and stopped from here."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import optuna
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from ..config import Settings
from ..console import Console
from ..errors import HereticError
from ..loading.gguf import dequantized_source
from ..loading.load import load_config
from ..loading.source import model_source
from ..reporting.study_view import StudyView
from ..scoring.score_tables import Baseline
from ..session.stages import stop_on_interrupt
from ..study.front import is_counted, is_learned
from ..utils import JsonObject
from .devices import WorkerPlace, place_workers
from .preparation import ATTRIBUTE
from .shared_study import storage_of, target_of
from .storage import REACHED_AGAIN, WITHDRAWN, WORKER, worker_identity

POLL_SECONDS = 0.3
# A worker that repeatedly ends without finishing a trial is not restarted after this many starts.
MAX_STARTS = 4
# Workers that are asked to stop are killed after this time.
LEAVE_SECONDS = 10.0
KEPT_LINES = 20
# Read at process start, before heretic could set them.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class Worker:
    """A worker's devices and its current process."""

    def __init__(self, number: int, placement: WorkerPlace, order: JsonObject, console: Console, tells_all: Callable[[], bool]) -> None:
        self.number = number
        self.placement = placement
        self.n_starts = 0
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._order = order
        self._console = console
        self._tells_all = tells_all
        self._reader: threading.Thread | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and send it its order."""
        self.n_starts += 1
        self.lines.clear()
        threads = {name: str(self.placement.threads) for name in _THREADS} if not self.placement.devices else {}
        self.process = subprocess.Popen(
            # -P: do not import modules from the working directory, which may contain anything.
            [sys.executable, "-P", "-m", "heretic", "worker", "--supervised"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **threads, "PYTHONUNBUFFERED": "1"},
            process_group=0,  # Ctrl+C in the terminal only reaches the parent, which forwards it
        )
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(self._order).encode() + b"\n")
            self.process.stdin.flush()

    def _read(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip()
            self.lines.append(line)
            if self._tells_all() and not line.startswith("Error:"):
                self._console.message(line)
            elif line.startswith("Warning:"):
                self._console.warning(f"Worker {self.number}: {line.removeprefix('Warning: ')}")
            elif line.endswith(REACHED_AGAIN):  # the parent need not have noticed
                self._console.message(f"Worker {self.number}: {line}")

    @property
    def identity(self) -> str:
        """The identity with which its trials are marked."""
        assert self.process is not None
        return f"{worker_identity().rpartition(':')[0]}:{self.process.pid}"

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def how_it_ended(self) -> str:
        """A description in plain words, with the error that it printed."""
        assert self.process is not None and self._reader is not None
        self._reader.join(timeout=5)
        code = self.process.returncode
        if code < 0:
            return f"was ended by signal {-code} ({signal.Signals(-code).name})"
        return f"ended: {self.error().rstrip('.')}" if self.error() else f"ended with exit code {code}"

    def error(self) -> str:
        """The errors that it printed."""
        return " ".join(line.removeprefix("Error: ") for line in self.lines if line.startswith("Error:"))

    def send(self, number: int) -> None:
        if self.is_running and self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def close(self) -> None:
        """Clean up a process that has ended, or terminate it."""
        if self.process is None:
            return
        if self.is_running:
            self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


class Supervisor:
    """Keeps the workers of a shared study running until its trials are done."""

    def __init__(self, console: Console, study: optuna.Study, workers: Sequence[Worker], target: Callable[[], int]) -> None:
        self.console = console
        self.study = study
        self.storage = storage_of(study)
        self.workers = list(workers)
        self.target = target
        self._given_up: set[int] = set()

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """Context in which the workers run. All have ended afterwards, whatever happens."""
        try:
            for worker in self.workers:
                worker.start()
            yield
        finally:
            self._end_all()

    def _end_all(self) -> None:
        for worker in self.workers:
            worker.send(signal.SIGTERM)
        deadline = time.monotonic() + LEAVE_SECONDS
        while any(worker.is_running for worker in self.workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        for worker in self.workers:
            worker.close()

    def watch(self, should_stop: Callable[[], bool], on_trial: Callable[[FrozenTrial, list[FrozenTrial], int], None]) -> None:
        """Wait until all trials are done or `should_stop`, then until the workers have ended. `on_trial` is called with each new trial,
        all trials, and the number done."""
        shown = {trial.number for trial in self._trials() if is_counted(trial)}
        told_to_stop = False
        while True:
            trials = self._trials()
            for trial in trials:
                if trial.number not in shown and is_counted(trial):
                    shown.add(trial.number)
                    on_trial(trial, trials, len(shown))
            if sum(map(is_counted, trials)) >= self.target() or (told_to_stop and not any(w.is_running for w in self.workers)):
                return
            if should_stop() and not told_to_stop:
                told_to_stop = True
                for worker in self.workers:
                    worker.send(signal.SIGINT)
            self._end_hung(trials)
            fail_stale_trials(self.study)
            if not told_to_stop:
                self.restart_ended()
            time.sleep(POLL_SECONDS)

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _end_hung(self, trials: Sequence[FrozenTrial]) -> None:
        """Kill workers without heartbeats. This comes before any write, since a stopped process may hold the journal's lock."""
        stale = set(self.storage._get_stale_trial_ids(self.study._study_id))
        silent = {trial.system_attrs.get(WORKER) for trial in trials if trial._trial_id in stale}
        # Other workers may have noticed first and requeued the trials.
        silent |= {
            trial.system_attrs.get(WORKER)
            for trial in trials
            if trial.state == TrialState.FAIL and not (is_counted(trial) or is_learned(trial) or WITHDRAWN in trial.system_attrs)
        }
        for worker in self.workers:
            if worker.is_running and worker.identity in silent:
                worker.send(signal.SIGKILL)

    def restart_ended(self) -> None:
        """Restart workers that ended early, except those that keep failing.

        Raises `HereticError` if none is left, or if the directions cannot be computed.
        """
        is_prepared = ATTRIBUTE in self.study.user_attrs
        for worker in self.workers:
            if worker.is_running or worker.number in self._given_up:
                continue
            trials = self._trials()
            if is_prepared and sum(map(is_counted, trials)) >= self.target():
                return
            worker.close()
            if any(is_counted(trial) and trial.system_attrs.get(WORKER) == worker.identity for trial in trials):
                worker.n_starts = 0
            how = worker.how_it_ended()
            if worker.n_starts < MAX_STARTS and not (worker.n_starts and worker.error()):
                self.console.warning(f"Worker {worker.number} {how}. Its trials are reassigned, and it is restarted.")
                worker.start()
                continue
            self._given_up.add(worker.number)
            if len(self._given_up) == len(self.workers) or (worker.number == 1 and not is_prepared):  # the first one prepares
                raise HereticError(worker.error() or f"Worker {worker.number} {how}, as it did at {worker.n_starts - 1} earlier starts.")
            self.console.warning(f"Worker {worker.number} {how}. It is not restarted; {self._n_left()} continue.")

    def _n_left(self) -> int:
        return len(self.workers) - len(self._given_up)


def supervise(settings: Settings, console: Console, study: optuna.Study, url: str, prepares: bool) -> None:
    """Run `settings.workers` workers until the study's trials are done or the user stops them, with one view for all of them.

    `prepares`: the first of them computes the directions if they do not exist yet.
    """
    source = dequantized_source(model_source(settings), console)
    placements = place_workers(settings, source, load_config(source))
    console.message(f"{len(placements)} workers: {describe(placements)}")
    study.set_user_attr("workers", max(len(placements), study.user_attrs.get("workers", 1)))

    def is_preparing() -> bool:
        return not is_ready.is_set()

    is_ready = threading.Event()
    workers = []
    for number, placement in enumerate(placements, start=1):
        own = settings.model_copy(update=placement.settings)
        order = {
            "settings": own.model_dump(mode="json"),
            "url": url,
            "name": study.study_name,
            "devices": placement.devices,
            "threads": placement.threads,
            "prepares": prepares and number == 1,
        }
        tells_all = (lambda: True) if settings.debug or settings.print_responses else is_preparing if number == 1 else (lambda: False)
        workers.append(Worker(number, placement, order, console, tells_all))

    target = partial(target_of, study, settings.n_trials)
    supervisor = Supervisor(console, study, workers, target)
    n_done = sum(map(is_counted, study.get_trials(deepcopy=False)))
    with supervisor.started():
        _wait_until_ready(supervisor, study, is_ready)
        facts = study.user_attrs
        console.heading(f"Search: {target()} trials, {n_done} done")
        with StudyView(console, target(), n_done, Baseline.of(facts), facts["last_layer"], settings.objectives) as view:
            view.trials = study.get_trials(deepcopy=False)

            def note_stop() -> None:
                view.say("Stopping after the running trials. Press Ctrl+C again to leave at once.")

            with stop_on_interrupt(note_stop) as should_stop:
                supervisor.watch(should_stop, view.show)
    fail_stale_trials(study)  # interrupted ones


def _wait_until_ready(supervisor: Supervisor, study: optuna.Study, is_ready: threading.Event) -> None:
    """Wait for the directions, showing the output of the first worker."""
    while ATTRIBUTE not in study.user_attrs:
        supervisor.restart_ended()
        time.sleep(POLL_SECONDS)
    is_ready.set()


def describe(placements: Sequence[WorkerPlace]) -> str:
    """The workers and their devices in words."""
    if not placements[0].devices:
        return f"{placements[0].threads} {'thread' if placements[0].threads == 1 else 'threads'} each"
    return "; ".join("device " + " and ".join(map(str, placement.devices)) for placement in placements)
