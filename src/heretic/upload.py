"""Upload of an export to the hub."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the base of all its HTTP client raises

from .errors import ExportError
from .export import save
from .model import Model
from .record import Result, Strategy
from .utils import Progress


def upload(model: Model, result: Result, strategy: Strategy, repo_id: str, private: bool, token: str, progress: Progress) -> str:
    """Save to a temporary folder and upload it to the hub repository, made if missing. Returns its address.

    Raises `ExportError` where the hub refuses. The token goes to the hub alone.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="heretic-upload-") as temporary:
        folder = save(model, result, strategy, str(Path(temporary) / "model"), False, progress)
        try:
            with progress.task(f"Uploading to {repo_id}"):
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload the edited model")
        except (HTTPError, OSError, ValueError) as error:  # HTTPError: also where the hub cannot be reached
            reason = (str(error).replace(token, "[token]").strip() or type(error).__name__).splitlines()[0]
            raise ExportError(
                f"The upload to {repo_id} failed: {reason}. Check the repository's name, the token's right to write and the network, "
                "then upload again; the study is safe."
            ) from None
    return str(commit.repo_url)
