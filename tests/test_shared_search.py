"""One study, several workers: who begins what, what comes of lost workers, and storages that go away. Scores are made up here."""

import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import InMemoryStorage, JournalStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

import process
from conftest import Outcome
from heretic.config import Settings
from heretic.console import Console
from heretic.editing.ablation import Ablation
from heretic.errors import CheckpointError, HereticError, UsageError
from heretic.evaluator import Score
from heretic.parameters import FirstTrial
from heretic.privacy import shown_location
from heretic.settings_sources import load_settings
from heretic.sharing import storage as storage_module
from heretic.sharing.devices import WorkerPlace
from heretic.sharing.shared_search import Heartbeats, SharedSearch
from heretic.sharing.shared_study import SharedCheckpoint, open_for_workers, storage_of
from heretic.sharing.storage import SharedStorage, StorageArtifactStore, open_storage
from heretic.sharing.workers import Supervisor, Worker
from heretic.study.checkpoint import Checkpoint
from heretic.study.front import is_counted
from heretic.study.journal import JournalFile, JournalLock
from heretic.study.samplers import Sampling
from heretic.study.space import fixed_parameters, search_space
from heretic.utils import SilentProgress
from test_search import COMPONENTS, LAST_LAYER, SETTINGS, made_up, proposals, run, scaled
from test_search import score as usual_score

SPACE = search_space(SETTINGS, COMPONENTS, LAST_LAYER)

Heretic = Callable[..., Outcome]
QUICK = ["--n-finalists", 0, "--no-report"]
LONG_AGO = "elsewhere/0:1"  # a worker on another host


class Told:
    """Keeps what is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    warning = message


def shared(path: Path, timeout: float = 60.0, progress: Any = None) -> SharedSearch:
    """A worker of its own on the journal at `path`."""
    storage = open_storage(str(path), timeout, progress)
    study = optuna.create_study(storage=storage, study_name="heretic", directions=["minimize", "minimize"], load_if_exists=True)
    return SharedSearch(study, storage, SPACE, Sampling(1, 5))


def slow_score(ablations: list[Ablation], limit: object = None) -> list[Score | Exception]:
    time.sleep(0.002)
    return [made_up(ablation) for ablation in ablations]


def lose(path: Path, worker: str = LONG_AGO) -> FrozenTrial:
    """Begin a trial, which nobody will finish, as a worker that is not there any more."""
    search = shared(path)
    search.identity = worker
    ((trial, _),) = search._ask_some(1, 100)
    return search.storage.get_trial(trial._trial_id)


def as_optuna_reads(path: Path) -> list[FrozenTrial]:
    return optuna.load_study(study_name="heretic", storage=JournalStorage(JournalFileBackend(str(path)))).trials


def check_whole(trials: list[FrozenTrial], n_trials: int) -> None:
    """Exactly so many are done, all different, and nothing is left over."""
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert sum(map(is_counted, trials)) == n_trials
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len({str(trial.params) for trial in complete}) == len(complete)
    # A worker that is killed between creating a trial and saying that it is its own leaves one that nobody counts.
    assert all(trial.state.is_finished() or "worker" not in trial.system_attrs for trial in trials)


pytestmark = pytest.mark.filterwarnings("ignore")  # heartbeats are "experimental"

# Who begins what


@pytest.mark.parametrize("trials_per_batch", [1, 4])
def test_many_workers_finish_exactly_the_trials_that_were_asked_for(trials_per_batch: int, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    searches = [shared(path) for _ in range(8)]
    for i, search in enumerate(searches):
        search.identity = f"elsewhere/0:{i}"
    with ThreadPoolExecutor(len(searches)) as pool:
        for future in [pool.submit(search.run, 40, slow_score, scaled, trials_per_batch) for search in searches]:
            future.result()
    trials = as_optuna_reads(path)
    check_whole(trials, 40)
    assert all(trial.state == TrialState.COMPLETE for trial in trials if is_counted(trial))
    assert len({trial.system_attrs["worker"] for trial in trials}) > 1


def test_one_too_many_is_withdrawn(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first, second = shared(path), shared(path)
    asked = first._ask_some(3, 3)
    assert len(asked) == 3
    assert second._ask_some(2, 3) == []
    assert [trial.state for trial in first.trials] == [TrialState.RUNNING] * 3 + [TrialState.FAIL]
    assert not is_counted(first.trials[3])
    first._work(asked, slow_score, scaled, lambda kl: 1e9)
    check_whole(as_optuna_reads(path), 3)


def test_startup_trials_are_those_of_a_run_alone(tmp_path: Path) -> None:
    alone = proposals(run(tmp_path / "alone.jsonl", 5))
    first, second = shared(tmp_path / "j.jsonl"), shared(tmp_path / "j.jsonl")
    asked = [search._ask_some(1, 10)[0][0] for search in (first, second, second, first, second)]
    assert [trial.params for trial in asked] == alone


def test_the_last_trials_are_divided_among_those_at_work(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    lose(path)
    search = shared(path)
    assert search._n_to_start(search.trials, 9, 16) == 4, "half of the eight that are left"
    assert search._n_to_start(search.trials, 1000, 16) == 8, "together no more than one worker alone would have"
    search.study.set_user_attr("workers", 16)
    assert search._n_to_start(search.trials, 1000, 16) == 1
    assert search._n_to_start(search.trials, 1, 16) == 0


def test_more_trials_than_were_asked_for_at_first(tmp_path: Path) -> None:
    search = shared(tmp_path / "j.jsonl")
    search.study.set_user_attr("target", 4)
    search.run(2, slow_score, scaled)
    check_whole(search.trials, 4)


def test_what_others_finish_is_shown_too(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    other, seen = shared(path), []

    def score(ablations: list[Ablation], limit: object = None) -> list[Score | Exception]:
        if other.n_done == 0:
            other._work(other._ask_some(1, 9), slow_score, scaled, lambda kl: 1e9)
        return slow_score(ablations)

    search = shared(path)
    search.run(4, score, scaled, on_trial=lambda trial: seen.append(trial.number))
    assert sorted(seen) == [0, 1, 2, 3]


# Lost workers


def test_a_trial_of_a_worker_that_is_not_heard_of_is_tried_again_as_it_was_drawn(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    lost = lose(path)
    search = shared(path, timeout=0.3)
    fail_stale_trials(search.study)
    assert search.trials[0].state == TrialState.RUNNING, "nobody knows yet how old its last sign of life is"
    search.run(3, slow_score, scaled)
    trials = as_optuna_reads(path)
    check_whole(trials, 3)
    again = [trial for trial in trials if RetryHeartbeatStaleTrialCallback.retry_history(trial) == [0]]
    assert [trial.state for trial in again] == [TrialState.COMPLETE]
    assert again[0].params == lost.params
    assert again[0].user_attrs["parameters"] == lost.user_attrs["parameters"]
    assert again[0].system_attrs["worker"] == search.identity
    assert trials[0].state == TrialState.FAIL and not is_counted(trials[0])


def test_a_trial_of_a_process_that_is_gone_is_tried_again_at_once(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    search = shared(path)
    lose(path, search.identity.rpartition(":")[0] + ":999999999")
    fail_stale_trials(search.study)
    assert [trial.state for trial in search.trials] == [TrialState.FAIL, TrialState.WAITING]
    fail_stale_trials(search.study)
    assert len(search.trials) == 2


def test_a_trial_that_no_worker_survives_is_given_up_after_four_times(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    search = shared(path)
    gone = search.identity.rpartition(":")[0] + ":999999999"
    for _ in range(4):
        lose(path, gone)
        fail_stale_trials(search.study)
    last = search.trials[-1]
    assert (last.state, last.user_attrs["failure"]) == (TrialState.FAIL, "its worker was lost 4 times")
    assert is_counted(last)
    assert len({str(trial.params) for trial in search.trials}) == 1
    assert not any(map(is_counted, search.trials[:-1]))
    search.run(2, slow_score, scaled)
    check_whole(search.trials, 2)


def test_heartbeats_keep_a_trial_and_a_hang_ends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j.jsonl"
    worker, watcher = shared(path, timeout=1.0), shared(path, timeout=1.0)
    monkeypatch.setattr(SharedStorage, "get_heartbeat_interval", lambda self: 0.05)
    worker.identity = LONG_AGO

    def is_kept(seconds: float, step: Callable[[], None]) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            step()
            fail_stale_trials(watcher.study)
            if watcher.trials[0].state != TrialState.RUNNING:
                return False
            time.sleep(0.02)
        return True

    ((trial, _),) = worker._ask_some(1, 9)
    with worker.heartbeats.recording([trial]):
        assert is_kept(2.5, worker.heartbeats.note_progress)
        assert not is_kept(30, lambda: None)
    assert [trial.state for trial in watcher.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_who_was_taken_for_lost_but_was_not_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    slow, other = shared(path), shared(path)
    asked = slow._ask_some(1, 1)
    other.storage.timeout = 0.0
    for _ in range(2):
        fail_stale_trials(other.study)
        time.sleep(0.01)
    other.storage.timeout = 60.0
    other.run(1, slow_score, scaled)
    slow._work(asked, slow_score, scaled, lambda kl: 1e9)
    trials = as_optuna_reads(path)
    check_whole(trials, 1)
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.COMPLETE]


def test_an_interrupted_worker_hands_its_trials_back_and_that_counts_as_no_attempt(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"

    def interrupt(ablations: list[Ablation], limit: object = None) -> list[Score | Exception]:
        raise KeyboardInterrupt

    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            shared(path).run(4, interrupt, scaled, 2)
    shared(path).run(4, slow_score, scaled, 2)
    trials = as_optuna_reads(path)
    check_whole(trials, 4)
    assert all(trial.state == TrialState.COMPLETE for trial in trials if is_counted(trial))
    assert [trial.params for trial in trials if trial.state == TrialState.COMPLETE][:2] == [trial.params for trial in trials[:2]]


def test_a_wish_to_stop(tmp_path: Path) -> None:
    search = shared(tmp_path / "j.jsonl")
    search.run(9, slow_score, scaled, 2, should_stop=lambda: search.n_done >= 4)
    assert search.n_done == len(search.trials) == 4


# Storages that go away


class Moody(InMemoryStorage):  # type: ignore[misc]
    """A storage that fails a few times before it answers."""

    failures: Iterator[Exception | None] = iter(())

    def get_all_trials(self, *arguments: Any, **named: Any) -> list[FrozenTrial]:
        failure = next(self.failures, None)
        if failure is not None:
            raise failure
        return super().get_all_trials(*arguments, **named)


def moody(failures: Iterator[Exception | None], monkeypatch: pytest.MonkeyPatch) -> tuple[SharedSearch, Told]:
    monkeypatch.setattr(storage_module, "RETRY_SECONDS", 0.01)
    backend, told = Moody(), Told()
    storage = SharedStorage(backend, "the storage", 60, told)  # type: ignore[arg-type]
    study = optuna.create_study(storage=storage, study_name="heretic", directions=["minimize", "minimize"])
    search = SharedSearch(study, storage, SPACE, Sampling(1, 5))
    backend.failures = failures
    return search, told


def test_a_storage_that_goes_away_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import OperationalError

    away = OperationalError("SELECT", {}, Exception())
    away.__cause__ = Exception("server closed the connection unexpectedly\nand more")
    internal = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    internal.__cause__ = away
    failures = iter([None, away, internal, OSError(116, "Stale file handle"), None, None, ConnectionResetError("gone")])
    search, told = moody(failures, monkeypatch)
    search.run(3, slow_score, scaled)
    check_whole(search.trials, 3)
    assert told.lines[:2] == [
        "The study the storage cannot be reached; retrying: server closed the connection unexpectedly.",
        "The study the storage can be reached again.",
    ]
    assert len(told.lines) == 4


def test_a_storage_that_stays_away_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    search, _ = moody(itertools.repeat(ConnectionRefusedError("Connection refused")), monkeypatch)
    monkeypatch.setattr(storage_module, "MAX_WAIT_SECONDS", 0.1)
    expected = r"The study the storage could not be reached for 0 s: Connection refused\. Finished trials are kept; run the same command"
    with pytest.raises(CheckpointError, match=expected):
        search.run(3, slow_score, scaled)


def test_what_is_no_outage_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    search, _ = moody(iter([OSError(28, "No space left on device")]), monkeypatch)
    with pytest.raises(CheckpointError, match=r"cannot be written: No space left on device\. Free some space"):
        search.run(3, slow_score, scaled)
    search, _ = moody(iter([ZeroDivisionError("a mistake")]), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        search.run(3, slow_score, scaled)


def test_a_line_that_a_killed_worker_left_half_written_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    first, second = shared(path), shared(path)
    first.run(2, slow_score, scaled)
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    second.run(4, slow_score, scaled)
    first.run(5, slow_score, scaled)
    check_whole(as_optuna_reads(path), 5)
    empty = JournalFile(str(tmp_path / "empty"), lock_obj=JournalLock(tmp_path / "empty"))
    (tmp_path / "empty").write_bytes(b"{half a first line")
    empty.append_logs([{"op_code": 0}])
    assert (tmp_path / "empty").read_bytes() == b'{"op_code":0}\n'


# Where a study may live


def test_where_a_study_may_live(tmp_path: Path) -> None:
    assert shown_location("postgresql://me:secret@host:5432/x") == "postgresql://me:***@host:5432/x"
    assert shown_location("grpc://host:1") == "grpc://host:1"
    assert shown_location("a/b:c@d.jsonl") == "a/b:c@d.jsonl"
    with pytest.raises(UsageError, match=r"--study-storage sqlite:///x\.db: give the path of a journal file, postgresql://\.\.\., mysql"):
        open_storage("sqlite:///x.db", 60)
    with pytest.raises(UsageError, match=r"the URL of a gRPC proxy is grpc://host:port"):
        open_storage("grpc://host", 60)
    driver = r"needs a driver that is not installed\. Install the extra: pip install 'heretic-llm\[distributed\]'"
    with pytest.raises(UsageError, match=driver):
        open_storage("postgresql+pg8000://me:secret@127.0.0.1:1/x", 60)
    closed = r"The storage postgresql://me:\*\*\*@127\.0\.0\.1:1/x cannot be opened: .*onnection"
    with pytest.raises(CheckpointError, match=closed) as caught:
        open_storage("postgresql://me:secret@127.0.0.1:1/x", 60)
    assert "secret" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written: (Not a directory|File exists)"):
        open_storage(str(tmp_path / "file" / "j.jsonl"), 60)


def test_an_artifact_in_the_storage_itself() -> None:
    backend = InMemoryStorage()
    store = StorageArtifactStore(backend)
    content = bytes(range(256)) * 700
    store.write("a", io.BytesIO(content))
    assert store.open_reader("a").read() == content
    sizes = [len(value) for value in backend.get_all_studies()[0].user_attrs.values()]
    assert len(sizes) > 1 and max(sizes) < 2**16, "the smallest text column of a database holds 64 KiB"
    store.remove("a")
    with pytest.raises(ArtifactNotFound):
        store.open_reader("a")


def test_through_the_grpc_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc")
    from optuna.storages._grpc.server import make_server

    monkeypatch.setattr(storage_module, "RETRY_SECONDS", 0.05)
    backend = InMemoryStorage()
    port = process.free_port()

    def serve() -> Any:
        server = make_server(backend, "127.0.0.1", port)
        server.start()
        return server

    server = serve()
    told = Told()
    storages = [open_storage(f"grpc://127.0.0.1:{port}", 60, told) for _ in range(2)]  # type: ignore[arg-type]
    studies = [
        optuna.create_study(storage=storage, study_name="heretic", directions=["minimize", "minimize"], load_if_exists=True)
        for storage in storages
    ]
    searches = [SharedSearch(study, storage, SPACE, Sampling(1, 5)) for study, storage in zip(studies, storages, strict=True)]
    server_again: list[Any] = []

    def restart() -> None:
        while searches[0].n_done < 5:
            time.sleep(0.01)
        server.stop(None).wait()
        time.sleep(0.5)
        server_again.append(serve())

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(search.run, 30, slow_score, scaled) for search in searches]
        restart()
        for future in futures:
            future.result()
    store = StorageArtifactStore(storages[0])
    store.write("a", io.BytesIO(b"x" * 100_000))
    assert StorageArtifactStore(storages[1]).open_reader("a").read() == b"x" * 100_000
    check_whole(backend.get_all_trials(0), 30)
    assert f"The study grpc://127.0.0.1:{port} can be reached again." in told.lines
    server_again[0].stop(None).wait()


def test_the_pulse_ends_with_its_trials(tmp_path: Path) -> None:
    search = shared(tmp_path / "j.jsonl")
    before = threading.active_count()
    with Heartbeats(search.storage).recording([]):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_first_trials_are_queued_once_and_done_first(tmp_path: Path) -> None:
    """Whoever asks next does them; another worker that queues them finds them there."""
    points = [FirstTrial(direction_scope="per layer", max_weight=1.0), FirstTrial(max_weight=1.2, min_weight=0.5)]
    first, second = shared(tmp_path / "j.jsonl"), shared(tmp_path / "j.jsonl")
    for search in (first, second):
        search.first_trials = [fixed_parameters(point, SPACE) for point in points]
        search.queue_first_trials()
    second.run(4, usual_score, scaled)
    trials = second.trials
    assert [trial.user_attrs.get("first_trial") for trial in trials] == [*first.first_trials, None, None]
    weights = [trial.user_attrs["parameters"]["attn.o_proj"]["max_weight"] for trial in trials]
    assert weights[:2] == [1.0, 1.2]
    assert trials[0].user_attrs["direction_index"] is None


def test_a_trial_that_nobody_has_claimed_is_given_up_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker died between creating it and saying whose it is; one that was only slow goes on with another."""
    monkeypatch.setattr(storage_module, "UNCLAIMED_SECONDS", 0.2)
    slow, other = shared(tmp_path / "j.jsonl", timeout=600.0), shared(tmp_path / "j.jsonl", timeout=600.0)
    unclaimed = slow.study.ask()
    fail_stale_trials(other.study)
    time.sleep(0.3)
    fail_stale_trials(other.study)
    assert other.trials[0].state == TrialState.FAIL
    asked = slow.study.ask
    monkeypatch.setattr(slow.study, "ask", lambda: unclaimed)
    assert slow._ask_some(1, 5) == []
    monkeypatch.setattr(slow.study, "ask", asked)
    slow.run(3, usual_score, scaled)
    assert sum(map(is_counted, slow.trials)) == 3


def test_what_a_worker_says_that_its_user_should_know(capsys: pytest.CaptureFixture[str]) -> None:
    """Warnings, and that the study is there again, which the parent need not have noticed; nothing else."""
    worker = Worker(2, WorkerPlace((), 1), {}, Console(), lambda: False)
    lines = ["Loading ...", "Warning: The study s cannot be reached; retrying: no", "The study s can be reached again.", "Error: no"]
    worker._read(SimpleNamespace(stdout=[f"{line}\n".encode() for line in lines]))  # type: ignore[arg-type]
    expected = "Warning: Worker 2: The study s cannot be reached; retrying: no\nWorker 2: The study s can be reached again.\n"
    assert capsys.readouterr().out == expected
    assert list(worker.lines) == lines


def test_a_first_worker_that_ends_before_it_has_prepared_anything() -> None:
    """No trial of the search is asked for, so none is missing, but nothing would come of waiting."""
    worker: Any = SimpleNamespace(number=1, is_running=False, n_starts=1, identity="here:1", close=lambda: None)
    worker.how_it_ended, worker.error = lambda: "ended: no memory", lambda: "no memory"
    supervisor = Supervisor(Console(), optuna.create_study(), [worker], lambda: 0)
    with pytest.raises(HereticError, match=r"^no memory$"):
        supervisor.restart_ended()


def test_another_worker_that_ends_leaves_the_first_one_preparing(capsys: pytest.CaptureFixture[str]) -> None:
    first: Any = SimpleNamespace(number=1, is_running=True)
    second: Any = SimpleNamespace(number=2, is_running=False, n_starts=1, identity="here:2", close=lambda: None)
    second.how_it_ended, second.error = lambda: "ended: no memory", lambda: "no memory"
    supervisor = Supervisor(Console(), optuna.create_study(), [first, second], lambda: 9)
    supervisor.restart_ended()
    assert capsys.readouterr().out == "Warning: Worker 2 ended: no memory. It is not restarted; 1 continue.\n"
    first.is_running, first.n_starts, first.identity, first.close = False, 1, "here:1", lambda: None
    first.how_it_ended, first.error = second.how_it_ended, second.error
    with pytest.raises(HereticError, match=r"^no memory$"):
        supervisor.restart_ended()


def test_a_heartbeat_that_cannot_be_written_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search, tried = shared(tmp_path / "j.jsonl"), threading.Semaphore(0)

    def fail(self: SharedStorage, trial_id: int) -> None:
        tried.release()
        raise CheckpointError("The study cannot be written")

    monkeypatch.setattr(SharedStorage, "get_heartbeat_interval", lambda self: 0.01)
    monkeypatch.setattr(SharedStorage, "record_heartbeat", fail)
    with search.heartbeats.recording([search.study.ask()]):
        assert all(tried.acquire(timeout=5) for _ in range(3))
    assert capsys.readouterr().err == ""


# Runs on a shared study


def test_a_resumed_run_keeps_the_timeout_of_the_study(tmp_path: Path) -> None:
    storage = str(tmp_path / "s.jsonl")
    first, again = Settings(model="m", study_storage=storage, worker_timeout=3000.0), Settings(model="m", study_storage=storage)
    with SharedCheckpoint(first) as checkpoint:
        checkpoint.create(first, {})
    with SharedCheckpoint(again) as checkpoint:
        study, _, _ = open_for_workers(checkpoint, checkpoint.restored(again), SilentProgress())
    assert storage_of(study).timeout == 3000.0


def test_a_study_searched_alone_is_prepared_for_workers(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert heretic(*QUICK).code == 0

    def wait(*_: object) -> None:
        raise AssertionError("nobody prepares the study")

    monkeypatch.setattr("heretic.sharing.worker._wait_for_preparation", wait)
    saving = ["--trial-index", 0, "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"]
    outcome = heretic(*QUICK, "--workers", 2, *saving)
    assert (outcome.code, outcome.err) == (0, "")
    assert Path("out/heretic.json").is_file()


def test_a_study_that_a_run_works_on_alone_is_not_shared(heretic: Heretic, workplace: Path) -> None:
    assert heretic(*QUICK).code == 0
    journal = Path("checkpoints/m.jsonl")
    with Checkpoint(load_settings([])):
        outcome = heretic(*QUICK, "--study-storage", journal)
        expected = f"Error: Another process is working on the study {journal}. Wait for it, or use another --study-storage.\n"
        assert (outcome.code, outcome.err) == (1, expected)
    assert heretic(*QUICK, "--study-storage", journal, "--n-trials", 4).code == 0
    with Checkpoint(load_settings([])):  # what is shared may be worked on by several
        assert heretic(*QUICK, "--study-storage", journal).code == 0


def test_a_study_in_a_storage_is_not_offered_to_be_started_over(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = ["--study-storage", "s.jsonl", "--model-action", "none"]
    assert heretic(*QUICK, *storage).code == 0
    monkeypatch.setattr("heretic.console.can_ask", lambda: True)
    monkeypatch.setattr("heretic.commands.run.ask_checkpoint_action", lambda *_: "restart")
    outcome = heretic(*QUICK, *storage)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Continuing the study s.jsonl (3 trials done)." in outcome.out


def test_a_study_in_a_storage_that_cannot_be_continued(heretic: Heretic, workplace: Path) -> None:
    storage = ["--study-storage", "s.jsonl"]
    study = optuna.create_study(storage=open_storage("s.jsonl", 60.0), study_name="heretic", directions=["minimize", "minimize"])
    outcome = heretic(*QUICK, *storage)
    assert (outcome.code, outcome.err) == (1, "Error: The study s.jsonl was not created by heretic. Use another --study-name.\n")
    for name in ("given", "identity"):
        study.set_user_attr(name, {} if name == "identity" else [])
    study.set_user_attr("settings", {"model": "m"})
    study.set_user_attr("target", -1)
    told = "its target: Input should be greater than or equal to 0. Replace it with an intact copy, or use another --study-name."
    assert heretic(*QUICK, *storage).err == f"Error: The study s.jsonl is damaged: {told}\n"


def test_a_full_disk_before_the_search(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("heretic.sharing.preparation.upload_artifact", fail)
    outcome = heretic(*QUICK, "--study-storage", "s.jsonl")
    assert (outcome.code, outcome.err) == (
        1,
        "Error: The study s.jsonl cannot be written: No space left on device. Free some space, then run the same command again: it "
        "continues from the last finished trial.\n",
    )


def test_what_a_run_on_a_shared_study_is_told(heretic: Heretic, workplace: Path) -> None:
    """Its seed is printed, first trials that a later run adds are tried, and residuals are shown."""
    storage = ["--study-storage", "s.jsonl"]
    assert "\nSeed 1; " in heretic(*QUICK, *storage).out
    assert heretic(*QUICK, *storage, "--n-trials", 4, "--first-trials", '[{"max_weight": 1.0}]').code == 0
    assert [trial.user_attrs.get("first_trial") is not None for trial in as_optuna_reads(Path("s.jsonl"))] == [False] * 3 + [True]
    assert "Residual geometry" in heretic(*QUICK, *storage, "--print-residual-geometry").out


@pytest.mark.parametrize("prints", [False, True])
def test_responses_that_workers_print_are_shown(heretic: Heretic, workplace: Path, monkeypatch: pytest.MonkeyPatch, prints: bool) -> None:
    shown: list[bool] = []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("heretic.sharing.workers.Worker", lambda *arguments: shown.append(arguments[-1]()))
    monkeypatch.setattr("heretic.sharing.workers.Supervisor", interrupt)
    assert heretic(*QUICK, "--workers", 2, *(["--print-responses"] if prints else [])).code == 130
    assert shown == [True, prints], "what the first one does before the search is always shown"
