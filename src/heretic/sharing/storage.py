"""Storage of a study that several processes share, with retries, heartbeats and an artifact store.

The study is in one of Optuna's storages: a journal file, a database, or Optuna's gRPC proxy. `SharedStorage` wraps any of them. It retries
while the storage cannot be reached, and it provides Optuna's heartbeats (`BaseHeartbeat`, `fail_stale_trials`) for all of them; only
databases have their own. Those overlook trials whose worker died before its first heartbeat, and compare the clocks of two machines. Here,
a trial is stale if its last heartbeat has not changed for `timeout` seconds of the observer's own clock.
"""

import base64
import errno
import io
import itertools
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import urlsplit

import optuna
import psutil
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts._protocol import ArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback, _CachedStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import exc
from sqlalchemy.engine import make_url
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_fixed

from ..errors import CheckpointError, UsageError
from ..loading.source import expand
from ..privacy import shown_location
from ..study.journal import JournalFile, JournalLock, journal_errors
from ..utils import Progress, SilentProgress, first_line, format_duration

# How long to wait for an unreachable storage, and how often to retry.
MAX_WAIT_SECONDS = 600.0
RETRY_SECONDS = 1.0
# How the message ends that a study which could not be reached is there again.
REACHED_AGAIN = "can be reached again."
# Heartbeats per timeout.
HEARTBEATS_PER_TIMEOUT = 5
# A trial is marked with its worker right after it is created. If the mark is missing for this long, the worker died in between.
UNCLAIMED_SECONDS = 30.0
# How often a trial of a lost worker is retried.
MAX_RETRIES = 3

# System attributes of a trial: its worker, its last heartbeat, and that it was withdrawn.
WORKER, HEARTBEAT, WITHDRAWN = "worker", "heartbeat", "withdrawn"

# Databases store at least 64 KiB in an attribute's text column.
PIECE_BYTES = 32 * 1024

_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg", "mysql": "mysql+pymysql", "mariadb": "mariadb+pymysql"}
_LOST_CONNECTIONS = ("OperationalError", "InterfaceError", "InternalError", "AdminShutdown", "CrashShutdown", "CannotConnectNow")
_PERMANENT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with Study.optimize")


def is_file(url: str) -> bool:
    """Whether a storage is a journal file: a path."""
    return "://" not in url


def open_storage(url: str, timeout: float, progress: Progress | None = None) -> "SharedStorage":
    """Open the storage of a URL: a path, `postgresql://`, `mysql://` or `grpc://host:port`.

    Raises `UsageError` for any other URL, and `CheckpointError` if it cannot be opened.
    """
    location = shown_location(url)
    try:
        backend = _open_file(expand(url)) if is_file(url) else _open_url(url)
    except (UsageError, CheckpointError):
        raise
    except ImportError as error:
        raise UsageError(
            f"--study-storage {location} needs a driver that is not installed. Install the extra: pip install 'heretic-llm[distributed]'"
        ) from error
    except Exception as error:  # each driver has its own
        reason = _reason(error).replace(url, location)
        raise CheckpointError(f"The storage {location} cannot be opened: {reason}") from error
    return SharedStorage(backend, location, timeout, progress)


def _open_file(path: Path) -> JournalStorage:
    with journal_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFile(str(path), lock_obj=JournalLock(path)))


def _open_url(url: str) -> BaseStorage:
    scheme, _, rest = url.partition("://")
    if scheme == "grpc":
        host, port = _grpc_address(url)
        proxy = GrpcStorageProxy(host=host, port=port)
        proxy.wait_server_ready(timeout=30)
        return proxy
    dialect = scheme.partition("+")[0]
    if dialect not in _DRIVERS:
        raise UsageError(
            f"--study-storage {shown_location(url)}: give the path of a journal file, postgresql://..., mysql://... or grpc://host:port."
        )
    connect: dict[str, Any] = {"connect_timeout": 10}
    if dialect.startswith("postgres"):  # so that a dead connection is noticed
        connect |= {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
    full = url if "+" in scheme else f"{_DRIVERS[dialect]}://{rest}"
    _check_database_url(full)
    return _CachedStorage(RDBStorage(full, engine_kwargs={"pool_pre_ping": True, "connect_args": connect}))


def _grpc_address(url: str) -> tuple[str, int]:
    try:
        address = urlsplit(url)
        host, port = address.hostname, address.port
    except ValueError:  # its text may contain a part of a password
        host = port = None
    if not host or not port:
        raise UsageError(f"--study-storage {shown_location(url)}: the URL of a gRPC proxy is grpc://host:port.")
    return host, port


def _check_database_url(url: str) -> None:
    """Raise `UsageError` for an invalid database URL. The parser's own errors may show a part of a password."""
    try:
        parsed = make_url(url)
        is_valid = "@" not in f"{parsed.host or ''}{parsed.database or ''}"
    except (exc.ArgumentError, ValueError):
        is_valid = False
    if not is_valid:
        raise UsageError(
            f"--study-storage {shown_location(url)} is not a valid database URL. In user name and password, write %40 for @, %2F for / "
            "and %3A for a colon."
        )


def artifact_store(url: str, storage: "SharedStorage") -> ArtifactStore:
    """A study's artifact store: a folder next to a journal file, else in the storage itself."""
    if not is_file(url):
        return StorageArtifactStore(storage)
    folder = expand(url).with_name(f"{expand(url).name}.artifacts")
    with journal_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return FileSystemArtifactStore(folder)


class StorageArtifactStore:
    """Optuna's `ArtifactStore` inside a storage, for workers that share no folder.

    An artifact is a separate study without trials, so that it is not loaded with the real study's attributes. Its user attributes contain
    the content in base64 chunks.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def open_reader(self, artifact_id: str) -> BinaryIO:
        try:
            study_id = self._storage.get_study_id_from_name(self._name(artifact_id))
        except KeyError as error:
            raise ArtifactNotFound(artifact_id) from error
        pieces = self._storage.get_study_user_attrs(study_id)
        return io.BytesIO(b"".join(base64.b64decode(pieces[str(i)]) for i in range(len(pieces))))

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        study_id = self._storage.create_new_study([StudyDirection.MINIMIZE], self._name(artifact_id))
        for i in itertools.count():
            piece = content_body.read(PIECE_BYTES)
            if not piece:
                return
            self._storage.set_study_user_attr(study_id, str(i), base64.b64encode(piece).decode())

    def remove(self, artifact_id: str) -> None:
        self._storage.delete_study(self._storage.get_study_id_from_name(self._name(artifact_id)))

    @staticmethod
    def _name(artifact_id: str) -> str:
        return f"artifact {artifact_id}"


def worker_identity() -> str:
    """The identity of this process, with which its trials are marked: host (and container), process id."""
    return f"{_host()}:{os.getpid()}"


def _host() -> str:
    namespace = Path("/proc/self/ns/pid")  # containers may share a host name, but then their process ids are in different namespaces
    return f"{socket.gethostname()}/{namespace.stat().st_ino if namespace.exists() else 0}"


def _is_gone(identity: str | None) -> bool:
    """Whether a worker is known to have ended: it ran on this host, and the process does not exist."""
    if identity is None:
        return False
    host, _, pid = identity.rpartition(":")
    if host != _host():
        return False
    try:
        return bool(psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def requeue(study: optuna.Study, trial: FrozenTrial, counts: bool = True) -> None:
    """Queue a lost trial again with the same parameters. After `MAX_RETRIES` times it is recorded as failed.

    `trial` is a copy and is modified. `counts`: whether this counts as one of the retries.
    """
    if "failure" in trial.user_attrs:  # it was scored, and its worker was lost while recording that
        return
    # The next worker marks it again, and scores it from the start.
    trial.system_attrs = {key: value for key, value in trial.system_attrs.items() if key not in (WORKER, HEARTBEAT, WITHDRAWN)}
    trial.user_attrs = {key: value for key, value in trial.user_attrs.items() if key in ("direction_index", "parameters", "first_trial")}
    n_before = len(RetryHeartbeatStaleTrialCallback.retry_history(trial))
    drawn = {"params": trial.params, "distributions": trial.distributions}
    if not counts:
        again = create_trial(state=TrialState.WAITING, **drawn, user_attrs=trial.user_attrs, system_attrs=trial.system_attrs)
        study.add_trial(again)
    elif n_before < MAX_RETRIES:
        RetryHeartbeatStaleTrialCallback()(study, trial)
    else:
        failure = f"its worker was lost {n_before + 1} times"
        study.add_trial(create_trial(state=TrialState.FAIL, **drawn, user_attrs={**trial.user_attrs, "failure": failure}))


def _with_retries(name: str) -> Callable[..., Any]:
    def call(self: "SharedStorage", *arguments: Any, **named: Any) -> Any:
        return self.with_retries(lambda: getattr(self.backend, name)(*arguments, **named))

    return call


# All operations of a storage, forwarded to the backend.
_Retrying: Any = type("_Retrying", (BaseStorage,), {name: _with_retries(name) for name in BaseStorage.__abstractmethods__})


class SharedStorage(_Retrying, BaseHeartbeat):  # type: ignore[misc]
    """Wraps any of Optuna's storages for several workers: retries while it is unreachable, and detects trials of lost workers.

    Permanent failures, such as a full disk or `MAX_WAIT_SECONDS` without an answer, raise `CheckpointError`. An operation whose response
    was lost is repeated. At worst this creates a trial without a worker, which is treated like one whose worker died.
    """

    def __init__(self, backend: BaseStorage, location: str, timeout: float, progress: Progress | None = None) -> None:
        self.backend = backend
        self.location = location
        self.timeout = timeout
        self.progress = progress or SilentProgress()
        self._is_unreachable_now = False
        self._heartbeats: dict[int, tuple[Any, float]] = {}

    def with_retries(self, operation: Callable[[], Any]) -> Any:
        """The result of an operation, retried while the storage cannot be reached."""
        retrying = Retrying(
            retry=retry_if_exception(_is_unreachable),
            stop=stop_after_delay(MAX_WAIT_SECONDS),
            wait=wait_fixed(RETRY_SECONDS),
            before_sleep=self._note_unreachable,
            retry_error_callback=self._give_up,
        )
        with journal_errors(self.location, _PERMANENT):
            result = retrying(operation)
        if self._is_unreachable_now:
            self._is_unreachable_now = False
            self._heartbeats.clear()  # no heartbeats could be recorded
            self.progress.message(f"The study {self.location} {REACHED_AGAIN}")
        return result

    def _note_unreachable(self, attempt: RetryCallState) -> None:
        if not self._is_unreachable_now:
            self._is_unreachable_now = True
            self.progress.warning(f"The study {self.location} cannot be reached; retrying: {_reason(_error_of(attempt))}")

    def _give_up(self, attempt: RetryCallState) -> NoReturn:
        error, waited = _error_of(attempt), attempt.seconds_since_start or 0.0
        raise CheckpointError(
            f"The study {self.location} could not be reached for {format_duration(waited)}: {_reason(error)} Finished trials "
            "are kept; run the same command again."
        ) from error

    def record_heartbeat(self, trial_id: int) -> None:
        self.set_trial_system_attr(trial_id, HEARTBEAT, time.time())

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        now, stale, signs = time.monotonic(), [], {}
        for trial in self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,)):
            sign = trial.system_attrs.get(HEARTBEAT)
            before, since = self._heartbeats.get(trial._trial_id, (sign, now))
            signs[trial._trial_id] = sign, since if sign == before else now
            patience = self.timeout if WORKER in trial.system_attrs else min(self.timeout, UNCLAIMED_SECONDS)
            if now - signs[trial._trial_id][1] > patience or _is_gone(trial.system_attrs.get(WORKER)):
                stale.append(trial._trial_id)
        self._heartbeats = signs
        return stale

    def get_heartbeat_interval(self) -> int | None:
        return max(1, round(self.timeout / HEARTBEATS_PER_TIMEOUT))

    def get_heartbeat_stale_trial_callback(self) -> Callable[[optuna.Study, FrozenTrial], None]:
        return requeue


def _error_of(attempt: RetryCallState) -> BaseException:
    error = None if attempt.outcome is None else attempt.outcome.exception()
    assert error is not None
    return error


def _is_unreachable(error: BaseException) -> bool:
    """Whether an error means that the storage is temporarily unreachable."""
    if isinstance(error, OSError) and error.errno in _PERMANENT:
        return False
    lost = (
        exc.OperationalError,
        exc.InterfaceError,
        exc.InternalError,
        exc.TimeoutError,
        exc.PendingRollbackError,
        exc.ResourceClosedError,
    )
    if isinstance(error, (OSError, *lost)):
        return True
    # Errors of the drivers, if the connection broke outside a statement.
    if type(error).__module__.startswith(("psycopg", "pymysql")) and type(error).__name__ in _LOST_CONNECTIONS:
        return True
    if isinstance(error, optuna.exceptions.StorageInternalError):
        cause = error.__cause__
        return isinstance(cause, Exception) and not isinstance(cause, optuna.exceptions.StorageInternalError) and _is_unreachable(cause)
    if isinstance(error, exc.DBAPIError):
        return bool(error.connection_invalidated)
    grpc = sys.modules.get("grpc")
    if grpc is not None and isinstance(error, grpc.RpcError):
        # "Cancelled": the proxy stopped during a call; "unknown": the database behind it is unreachable.
        codes = grpc.StatusCode
        return error.code() in (codes.UNAVAILABLE, codes.DEADLINE_EXCEEDED, codes.CANCELLED, codes.UNKNOWN)
    return False


def _reason(error: BaseException) -> str:
    """The innermost cause in one line, ending with a full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    details = getattr(error, "details", None)  # of gRPC
    return first_line((callable(details) and details()) or error).rstrip(".") + "."
