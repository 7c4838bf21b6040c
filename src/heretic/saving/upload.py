"""Upload of an export to the hub: checked before anything is computed, one commit, taken up again where a connection is lost.

What has arrived is not sent again, within a run and after it was stopped: an export of the same trial has the same bytes, and the hub
knows files by their SHA-256 (pieces of them, where it stores them with Xet). A repository shows nothing of an upload until its commit.
"""

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: the base of all its HTTP client raises
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..config import Settings
from ..errors import ExportError
from ..model import Model
from ..privacy import without_token
from ..study.journal import journal_path
from ..utils import JsonObject, Progress, format_size, some_of
from . import CARD
from .export import save
from .record import Result, Strategy
from .staging import clean_up, workspace

COMMIT_MESSAGE = "Upload the edited model"
# Seconds before each further try. Every single request is tried six times within half a minute by the client itself.
WAITS = (5.0, 20.0, 60.0, 180.0)
# Files from this size on are sent one by one, each with its own tries; what is smaller goes along with the commit.
LARGE = 2**20
# What libraries load a model from. Files of these names that the new model does not have would be taken for parts of it.
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.index.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.*")

PASSING_STATUS = (408, 409, 412, 429, 500, 502, 503, 504)
CLIENT_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)  # RuntimeError: what the client wraps the failure of a file's upload in

T = TypeVar("T")


@dataclass(frozen=True)
class HubRepository:
    """A repository of the hub to upload to, whether it is to be private, and by which token."""

    repo_id: str
    private: bool
    token: str = field(repr=False)


@dataclass(frozen=True)
class Destination:
    """A repository as it was found; `files` are what it holds, None where it does not exist yet."""

    repo_id: str
    files: tuple[str, ...] | None
    private: bool


def check_destination(repository: HubRepository, progress: Progress, waits: Sequence[float] = ()) -> Destination:
    """Ask the hub whether this upload can be: whose token it is, what it may do, and what the repository is. Changes nothing there.

    Raises `ExportError` for a token that is wrong or may only read, a repository that it may not write to, and one that exists and is
    public where a private one is wanted.
    """
    return _Hub(repository, progress, waits).check()


def upload(
    model: Model,
    result: Result,
    strategy: Strategy,
    repository: HubRepository,
    progress: Progress,
    check: Callable[[Path], JsonObject] = lambda folder: {},
) -> str:
    """Save to a folder beside the study's journal, and upload it in one commit to the repository, made if missing. Returns its address.

    `check` is given the folder that was written, as in `export.save`.
    The folder is removed afterwards, also where the upload fails. Raises `ExportError` where the hub refuses or cannot be reached in
    the end. The token goes to the hub alone: no error, message or file holds it.
    """
    hub = _Hub(repository, progress, WAITS)
    destination = hub.check()
    hub.create(destination)
    with upload_folder(result.settings) as folder:
        save(model, result, strategy, str(folder), True, progress, check)
        return hub.send(folder, _outdated(destination, folder, progress))


@contextlib.contextmanager
def upload_folder(settings: Settings) -> Iterator[Path]:
    """A folder to upload from, gone when it is left; beside the journal, where there is room for large files."""
    path = journal_path(settings).with_suffix(".upload")
    clean_up(path)
    with workspace(path) as place:
        yield place / "model"


def _outdated(destination: Destination, folder: Path, progress: Progress) -> list[str]:
    """Tell what becomes of files that the repository holds, and return those that must not stay: weights of another model."""
    if not (present := {name for name in destination.files or () if name != ".gitattributes"}):
        return []
    new = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    outdated = sorted(name for name in present - new if any(fnmatch(name, pattern) for pattern in (*WEIGHT_FILES, *ADAPTER_FILES)))
    kept = sorted(present - new - set(outdated))
    text = f"{destination.repo_id} exists and holds {len(present)} files. {len(present & new)} of them are replaced"
    if outdated:
        text += f"; weights that are no part of this model are removed ({some_of(outdated, 3)})"
    if kept:
        text += f"; the others stay ({some_of(kept, 3)})"
    progress.warning(f"{text}. The repository's history keeps everything.")
    return outdated


class _Hub:
    """The hub's client for one repository: every request is tried again where the failure may pass, and told in plain words."""

    def __init__(self, repository: HubRepository, progress: Progress, waits: Sequence[float]) -> None:
        token = repository.token
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise ExportError("The access token holds characters that no token has. Check HF_TOKEN, or log in again with `hf auth login`.")
        self._token = token
        self._api = HfApi(token=token)
        self._progress = progress
        self._waits = waits
        self.repo_id, self._private = repository.repo_id, repository.private

    def check(self) -> Destination:
        """See `check_destination`."""
        me = self._ask(self._api.whoami)
        if ((me.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise ExportError(
                f"The access token of {me['name']} may only read. Make one with the right to write on the hub's page for access tokens, "
                "and set HF_TOKEN to it or log in with `hf auth login`."
            )
        if "/" not in self.repo_id:  # as the hub understands it when a repository is made
            self.repo_id = f"{me['name']}/{self.repo_id}"
        info = self._ask(self._find)
        if info is None:
            return Destination(self.repo_id, None, self._private)
        self._ask(self._check_write)
        if self._private and not info.private:
            raise ExportError(
                f"{self.repo_id} exists and is public, but a private repository is wanted. Make it private on its settings page, choose "
                "another --upload-repo-id, or give --no-upload-repo-private."
            )
        if info.private and not self._private:
            self._progress.warning(f"{self.repo_id} exists and is private; it stays so. Its settings page can make it public.")
        return Destination(self.repo_id, tuple(file.rfilename for file in info.siblings or ()), info.private)

    def _find(self) -> Any | None:
        try:
            return self._api.model_info(self.repo_id)
        except RepositoryNotFoundError:
            return None

    def _check_write(self) -> None:
        try:
            self._api.auth_check(self.repo_id, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code != 404:  # the repository is there: it is the question that this hub does not know
                raise

    def create(self, destination: Destination) -> None:
        """Make the repository where it is missing, before anything is computed for it."""
        if destination.files is None:
            self._ask(lambda: self._api.create_repo(self.repo_id, private=destination.private, exist_ok=True))
            kind = "private" if destination.private else "public"
            self._progress.message(f"Made the {kind} repository {self.repo_id}.")

    def send(self, folder: Path, outdated: Sequence[str]) -> str:
        """Upload a folder's files and commit them, all at once, to the repository. Returns its address."""
        additions = _additions(folder)
        large = [addition for addition in additions if addition.upload_info.size >= LARGE]
        total = sum(addition.upload_info.size for addition in additions)
        self._ask(partial(_check_card, folder))
        self._progress.message(f"Uploading {len(additions)} files ({format_size(total)}) to {self.repo_id}")
        for i, addition in enumerate(large, 1):
            size = format_size(addition.upload_info.size)
            self._progress.message(f"Uploading {addition.path_in_repo} ({size}), {i} of {len(large)} large files ...")
            self._ask(partial(self._api.preupload_lfs_files, self.repo_id, [addition], free_memory=False))
        prepared: list[CommitOperationAdd] | None = additions

        def commit() -> str:
            nonlocal prepared
            tried, prepared = prepared, None
            return self._commit(folder, outdated, tried)

        return self._ask(commit)

    def _commit(self, folder: Path, outdated: Sequence[str], prepared: list[CommitOperationAdd] | None) -> str:
        """One commit of `prepared`, which are uploaded; None after one whose answer was lost, and which may have been made.

        The client compares operations that are new with what the repository holds, and makes no commit where nothing differs.
        """
        if prepared is None:
            present = {file.rfilename for file in self._api.model_info(self.repo_id).siblings or ()}
            outdated = [name for name in outdated if name in present]
        deletions = [CommitOperationDelete(name, is_folder=False) for name in outdated]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*deletions, *(prepared or _additions(folder))]
        return str(self._api.create_commit(self.repo_id, operations, commit_message=COMMIT_MESSAGE).repo_url)

    def _ask(self, request: Callable[[], T]) -> T:
        """The answer to a request, tried again after each of the waits where the failure may pass. Raises `ExportError`."""
        for i in range(len(self._waits) + 1):
            try:
                return request()
            except CLIENT_ERRORS as error:
                may_pass, failure = _may_pass(error), self._failure(error)
                reason = self._reason(error)
            # Raised out here, the error has no context: the client's own errors may quote what was sent.
            if not may_pass or i == len(self._waits):
                raise failure
            wait = self._waits[i]
            self._progress.warning(f"{reason} Trying again in {wait:g} s ({i + 1} of {len(self._waits)}).")
            time.sleep(wait)
        raise AssertionError

    def _reason(self, error: BaseException) -> str:
        said = next((item for item in _chain(error) if not isinstance(item, RuntimeError)), error)
        lines = [line.strip() for line in str(said).splitlines() if line.strip()] or [type(said).__name__]
        server = getattr(said, "server_message", None) or ""
        text = lines[0] if server in lines[0] else f"{lines[0].rstrip(':')}: {server}"
        text = without_token(" ".join(text.split()), self._token)
        return text if text.endswith((".", "!", "?")) else f"{text}."

    def _failure(self, error: BaseException) -> ExportError:
        status = next((item.response.status_code for item in _chain(error) if isinstance(item, HfHubHTTPError)), None)
        where, reason = self._api.endpoint, self._reason(error)
        if status == 401:
            text = (
                f"The hub ({where}) does not accept the access token: it is wrong, or was revoked. Set HF_TOKEN to a valid one, or log in "
                "again with `hf auth login`."
            )
        elif status == 403:
            text = (
                f"The hub does not let this access token write to {self.repo_id}: {reason} Use a token with the right to write there, "
                "or another --upload-repo-id."
            )
        elif any(isinstance(item, OfflineModeIsEnabled) for item in _chain(error)):
            text = "The hub cannot be used while HF_HUB_OFFLINE is set. Unset it to upload."
        elif _may_pass(error):
            text = (
                f"The upload to {self.repo_id} failed: {reason} Check the network, then upload again: files that have arrived are not "
                "sent again."
            )
        else:
            text = f"The upload to {self.repo_id} failed: {reason}"
        failure = ExportError(f"{text} The study is safe.")
        failure.add_note(without_token("".join(traceback.format_exception(error)), self._token))  # for --debug
        return failure


def _check_card(folder: Path) -> None:
    """Raise `ValueError` where the hub refuses the card's metadata, which it would otherwise tell after the large files were sent."""
    try:
        ModelCard((folder / CARD).read_text(encoding="utf-8")).validate()
    except ValueError as error:
        try:
            reason = "; ".join(str(item["message"]) for item in json.loads(str(error))["errors"])
        except (ValueError, LookupError, TypeError):
            reason = str(error)
        raise ValueError(
            f"the hub refuses the metadata of the model card: {reason}. It comes from the original's card. Save the model to a folder "
            "instead (--model-action save), mend README.md there, and upload the folder with `hf upload`."
        ) from error


def _additions(folder: Path) -> list[CommitOperationAdd]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not {".git", ".cache"} & set(path.relative_to(folder).parts))
    return [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its causes, outermost first."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    return chain


def _may_pass(error: BaseException) -> bool:
    """Whether another try may succeed: the connection failed, or the server said that it is its own fault, or that it is busy."""
    for item in _chain(error):
        if isinstance(item, OfflineModeIsEnabled):
            return False
        if isinstance(item, HfHubHTTPError):
            return item.response.status_code in PASSING_STATUS
        if isinstance(item, (HTTPError, ConnectionError, TimeoutError)):
            return True
    return False
