"""Upload of an export to the hub: checked before anything is computed, in one commit, resumed if the connection is lost.

Files that have arrived are not sent again, also after a restart: an export of the same trial has the same bytes, and the hub identifies
files (or chunks of them, with Xet) by their SHA-256. Nothing of an upload is visible in the repository before the commit.
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

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: the base class of its HTTP client's errors
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status

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
# Seconds before each retry. The client itself tries every request six times within half a minute.
WAITS = (5.0, 20.0, 60.0, 180.0)
# Files from this size on are uploaded one by one, each with its own retries; smaller ones are part of the commit request.
LARGE = 2**20
# Files that libraries load a model from. Old files with such names would be taken for parts of the new model.
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.index.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.*")

PASSING_STATUS = (408, 409, 412, 429, 500, 502, 503, 504)
CLIENT_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)  # RuntimeError: raised by the client if the upload of a file fails

T = TypeVar("T")


@dataclass(frozen=True)
class HubRepository:
    """A repository of the hub to upload to, whether it is to be private, and by which token."""

    repo_id: str
    private: bool
    token: str = field(repr=False)


@dataclass(frozen=True)
class Destination:
    """A repository as it was found; `files` are its current files, None if it does not exist yet."""

    repo_id: str
    files: tuple[str, ...] | None
    private: bool


def check_destination(repository: HubRepository, progress: Progress, waits: Sequence[float] = ()) -> Destination:
    """Ask the hub whether this upload is possible: the token's owner and permissions, and the repository. Changes nothing there.

    Raises `ExportError` for an invalid or read-only token, a repository that it may not write to, and an existing public repository if a
    private one is requested.
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
    """Save to a temporary folder next to the study's journal, and upload it in one commit. Returns the URL of the repository.

    The repository is created if it does not exist. `check` is called with the folder, as in `export.save`. The folder is removed
    afterwards, also if the upload fails. Raises `ExportError` if the hub refuses, or cannot be reached after all retries. The token is sent
    only to the hub: no error, message or file contains it.
    """
    hub = _Hub(repository, progress, WAITS)
    destination = hub.check()
    hub.create(destination)
    with upload_folder(result.settings) as folder:
        save(model, result, strategy, str(folder), True, progress, check)
        return hub.send(folder, _outdated(destination, folder, progress))


@contextlib.contextmanager
def upload_folder(settings: Settings) -> Iterator[Path]:
    """Context with a temporary folder to upload from, next to the journal, where there is room for large files."""
    path = journal_path(settings).with_suffix(".upload")
    clean_up(path)
    with workspace(path) as place:
        yield place / "model"


def _outdated(destination: Destination, folder: Path, progress: Progress) -> list[str]:
    """Report what happens to the repository's files, and return those to delete: weights of another model."""
    if not (present := {name for name in destination.files or () if name != ".gitattributes"}):
        return []
    new = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    outdated = sorted(name for name in present - new if any(fnmatch(name, pattern) for pattern in (*WEIGHT_FILES, *ADAPTER_FILES)))
    kept = sorted(present - new - set(outdated))
    text = f"{destination.repo_id} exists and has {len(present)} files. {len(present & new)} of them are replaced"
    if outdated:
        text += f"; weights that do not belong to this model are deleted ({some_of(outdated, 3)})"
    if kept:
        text += f"; the others are kept ({some_of(kept, 3)})"
    progress.warning(f"{text}. The repository's history keeps all of them.")
    return outdated


class _Hub:
    """The hub's client for one repository. Requests are retried after temporary failures; errors are reported in plain words."""

    def __init__(self, repository: HubRepository, progress: Progress, waits: Sequence[float]) -> None:
        token = repository.token
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise ExportError("The access token contains invalid characters. Check HF_TOKEN, or log in again with `hf auth login`.")
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
                f"The access token of {me['name']} is read-only. Create one with write permission on the hub's page for access tokens, "
                "and set HF_TOKEN to it or log in with `hf auth login`."
            )
        if "/" not in self.repo_id:  # the hub's meaning of it when a repository is created
            self.repo_id = f"{me['name']}/{self.repo_id}"
        info = self._ask(self._find)
        if info is None:
            return Destination(self.repo_id, None, self._private)
        self._ask(self._check_write)
        if self._private and not info.private:
            raise ExportError(
                f"{self.repo_id} exists and is public, but a private repository is requested. Make it private on its settings page, choose "
                "another --upload-repo-id, or use --no-upload-repo-private."
            )
        if info.private and not self._private:
            self._progress.warning(f"{self.repo_id} exists and is private, and stays private. You can make it public on its settings page.")
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
            if error.response.status_code != 404:  # the repository exists, but this hub does not know the request
                raise

    def create(self, destination: Destination) -> None:
        """Create the repository if it does not exist, before anything is computed for it."""
        if destination.files is None:
            self._ask(lambda: self._api.create_repo(self.repo_id, private=destination.private, exist_ok=True))
            kind = "private" if destination.private else "public"
            self._progress.message(f"Created the {kind} repository {self.repo_id}.")

    def send(self, folder: Path, outdated: Sequence[str]) -> str:
        """Upload a folder's files and commit them in one commit. Returns the URL of the repository."""
        additions = _additions(folder)
        large = [addition for addition in additions if addition.upload_info.size >= LARGE]
        total = sum(addition.upload_info.size for addition in additions)
        self._ask(partial(_check_card, folder, self._api.endpoint))
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
        """One commit of `prepared`, which are already uploaded; None after a commit whose response was lost and that may have succeeded.

        The client compares new operations with the repository's files, and makes no commit if nothing differs.
        """
        if prepared is None:
            present = {file.rfilename for file in self._api.model_info(self.repo_id).siblings or ()}
            outdated = [name for name in outdated if name in present]
        deletions = [CommitOperationDelete(name, is_folder=False) for name in outdated]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*deletions, *(prepared or _additions(folder))]
        return str(self._api.create_commit(self.repo_id, operations, commit_message=COMMIT_MESSAGE).repo_url)

    def _ask(self, request: Callable[[], T]) -> T:
        """The result of a request, retried after each wait if the failure may be temporary. Raises `ExportError`."""
        for i in range(len(self._waits) + 1):
            try:
                return request()
            except CLIENT_ERRORS as error:
                may_pass, failure = _is_temporary(error), self._failure(error)
                reason = self._reason(error)
            # Raised here, the error has no context: the client's own errors may quote what was sent.
            if not may_pass or i == len(self._waits):
                raise failure
            wait = self._waits[i]
            self._progress.warning(f"{reason} Retrying in {wait:g} s ({i + 1} of {len(self._waits)}).")
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
                f"The hub ({where}) does not accept the access token: it is invalid or was revoked. Set HF_TOKEN to a valid one, or log in "
                "again with `hf auth login`."
            )
        elif status == 403:
            text = (
                f"The hub does not let this access token write to {self.repo_id}: {reason} Use a token with write permission there, "
                "or another --upload-repo-id."
            )
        elif any(isinstance(item, OfflineModeIsEnabled) for item in _chain(error)):
            text = "The hub cannot be used while HF_HUB_OFFLINE is set. Unset it to upload."
        elif _is_temporary(error):
            text = (
                f"The upload to {self.repo_id} failed: {reason} Check the network, then upload again: files that have arrived are not "
                "sent again."
            )
        else:
            text = f"The upload to {self.repo_id} failed: {reason}"
        failure = ExportError(f"{text} The study is safe.")
        failure.add_note(without_token("".join(traceback.format_exception(error)), self._token))  # for --debug
        return failure


def _check_card(folder: Path, endpoint: str) -> None:
    """Raise `ValueError` if the hub rejects the card's metadata. Otherwise it would do so after the large files were sent.

    The request is the one of `ModelCard.validate`, which in older versions of the client asks huggingface.co whatever the endpoint is.
    """
    card = {"repoType": "model", "content": (folder / CARD).read_text(encoding="utf-8")}
    response = get_session().post(f"{endpoint}/api/validate-yaml", json=card, headers={"Accept": "text/plain"})
    if response.status_code == 400:
        try:
            reason = "; ".join(str(item["message"]) for item in json.loads(response.text)["errors"])
        except (ValueError, LookupError, TypeError):
            reason = response.text
        raise ValueError(
            f"the hub rejects the metadata of the model card: {reason}. It was copied from the original's card. Save the model to a folder "
            "instead (--model-action save), fix README.md there, and upload the folder with `hf upload`."
        )
    hf_raise_for_status(response)


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


def _is_temporary(error: BaseException) -> bool:
    """Whether a retry may succeed: the connection failed, or the server reported an internal error or that it is busy."""
    for item in _chain(error):
        if isinstance(item, OfflineModeIsEnabled):
            return False
        if isinstance(item, HfHubHTTPError):
            return item.response.status_code in PASSING_STATUS
        if isinstance(item, (HTTPError, ConnectionError, TimeoutError)):
            return True
    return False
