"""Uploads with the hub's real client to a server on the loopback interface: in this process, and by the command in one of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
from safetensors.torch import save_file

import heretic.saving.upload
from heretic.config import Settings
from heretic.editing.ablation import Ablation, ComponentParameters
from heretic.errors import ExportError
from heretic.saving.export import save
from heretic.saving.record import Result, Strategy
from heretic.saving.upload import HubRepository, check_destination, upload
from heretic.utils import SilentProgress
from hub_server import Fault, Hub, Repository, serve, wait_until
from tiny import Recorder, load, settings, unit_directions

TOKEN = "hf_SecretSecretSecret"
READER = "hf_ReaderReaderReader"
ABLATION = Ablation(0.3, {"attn.o_proj": ComponentParameters(1.0, 1.0, 0.4, 1.0), "mlp.down_proj": ComponentParameters(1.3, 1.0, 0.5, 0.5)})
SAFE = "The study is safe."


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client in this process asks, with large files by the protocol of LFS, and no waiting between tries."""
    accounts: dict[str, Any] = {
        TOKEN: {"name": "me", "organizations": ["team"]},
        READER: {"name": "reader", "role": "read"},
        "hf_fine": {"name": "fine", "role": "fineGrained"},
    }
    with serve(**accounts) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda _: None))
        monkeypatch.setattr(heretic.saving.upload, "time", SimpleNamespace(sleep=lambda _: None))
        yield server


@pytest.fixture
def workplace_settings(tiny_model: Path, tmp_path: Path) -> Settings:
    return settings(tiny_model, study_checkpoint_dir=str(tmp_path / "checkpoints"))


def result_for(chosen: Settings) -> Result:
    return Result(chosen, 17, ABLATION, refusals=3, kl_divergence=0.0123, base_refusals=95, n_bad_prompts=100, response_prefix="yes ")


def do_upload(
    chosen: Settings,
    progress: Any = None,
    strategy: Strategy = "merge",
    private: bool = True,
    repo_id: str = "me/model",
    token: str = TOKEN,
) -> str:
    model = load(chosen.model)
    model.use_directions(unit_directions(3, 32), "none")
    return upload(model, result_for(chosen), strategy, HubRepository(repo_id, private, token), progress or SilentProgress())


def saved(chosen: Settings, folder: Path, strategy: Strategy = "merge") -> dict[str, bytes]:
    """The files of the same export, saved to a folder."""
    model = load(chosen.model)
    model.use_directions(unit_directions(3, 32), "none")
    save(model, result_for(chosen), strategy, str(folder), False, SilentProgress())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(chosen: Settings, **arguments: Any) -> ExportError:
    with pytest.raises(ExportError) as caught:
        do_upload(chosen, **arguments)
    assert not upload_folders(chosen.study_checkpoint_dir)
    return caught.value


def upload_folders(studies: Path | str) -> list[Path]:
    """The temporary folders of uploads next to the journals of a folder."""
    return [path for path in Path(studies).glob("*") if ".upload" in path.name]


# What arrives


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("strategy", ["merge", "adapter"])
def test_a_fresh_repository(hub: Hub, workplace_settings: Settings, tmp_path: Path, strategy: Strategy, private: bool) -> None:
    """Made as wanted, and filled in one commit with exactly what saving writes."""
    recorder = Recorder()
    assert do_upload(workplace_settings, recorder, strategy, private) == f"{hub.url}/me/model"
    repository = hub.repositories["me/model"]
    files = saved(workplace_settings, tmp_path / "saved", strategy)
    assert {name: content for name, content in repository.files.items() if name != ".gitattributes"} == files
    assert repository.private == private
    assert [commit["added"] for commit in repository.commits] == [sorted(files)]
    assert repository.commits[0]["summary"] == "Upload the edited model"
    assert len(hub.requests("^PUT")) == 1  # the weights, the only large file
    assert recorder.messages[0] == f"Created the {'private' if private else 'public'} repository me/model."
    assert recorder.messages[-1].startswith(f"Uploading {len(files)} files (")
    assert recorder.warnings == []
    assert not upload_folders(workplace_settings.study_checkpoint_dir)


def test_everything_is_asked_before_anything_is_computed(hub: Hub, workplace_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def stop(*_: Any) -> None:
        asked.extend(hub.log)
        raise KeyboardInterrupt

    monkeypatch.setattr(heretic.saving.upload, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        do_upload(workplace_settings)
    assert asked == ["GET /api/whoami-v2 200", "GET /api/models/me/model 404", "POST /api/repos/create 200"]


def test_a_name_without_an_owner_is_ones_own(hub: Hub, workplace_settings: Settings) -> None:
    assert do_upload(workplace_settings, repo_id="model") == f"{hub.url}/me/model"
    assert hub.repositories.keys() == {"me/model"}


def test_an_organization(hub: Hub, workplace_settings: Settings) -> None:
    do_upload(workplace_settings, repo_id="team/model")
    assert len(hub.repositories["team/model"].commits) == 1


def test_a_repository_that_exists(hub: Hub, workplace_settings: Settings, tmp_path: Path) -> None:
    """Weights of what was there before must not be loaded with the new ones; everything else stays."""
    do_upload(workplace_settings)
    repository = hub.repositories["me/model"]
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors"]
    repository.files |= dict.fromkeys([*old, "notes.txt", "figures/kernel.png", "README.md"], b"old")
    recorder = Recorder()
    do_upload(workplace_settings, recorder)
    files = saved(workplace_settings, tmp_path / "saved")
    assert {name: content for name, content in repository.files.items() if name != ".gitattributes"} == {
        **files,
        "notes.txt": b"old",
        "figures/kernel.png": b"old",
    }
    assert repository.commits[1]["deleted"] == sorted(old)
    assert repository.commits[1]["added"] == ["README.md"]  # what has not changed is no part of the commit
    assert recorder.warnings == [
        f"me/model exists and has {len(files) + 6} files. {len(files)} of them are replaced; weights that do not belong to this model are "
        "deleted (adapter_config.json, adapter_model.safetensors, model-00001-of-00002.safetensors and 1 more); the others are kept "
        "(figures/kernel.png, notes.txt). The repository's history keeps all of them."
    ]


def test_the_same_again_changes_nothing(hub: Hub, workplace_settings: Settings) -> None:
    do_upload(workplace_settings)
    do_upload(workplace_settings)
    assert len(hub.repositories["me/model"].commits) == 1
    assert len(hub.requests("^PUT")) == 1


def test_a_public_repository_where_a_private_one_is_wanted(hub: Hub, workplace_settings: Settings) -> None:
    do_upload(workplace_settings, private=False)
    assert str(refused(workplace_settings, private=True)) == (
        "me/model exists and is public, but a private repository is requested. Make it private on its settings page, choose another "
        "--upload-repo-id, or use --no-upload-repo-private."
    )
    assert len(hub.repositories["me/model"].commits) == 1


def test_a_private_repository_stays_private(hub: Hub, workplace_settings: Settings) -> None:
    do_upload(workplace_settings, private=True)
    recorder = Recorder()
    do_upload(workplace_settings, recorder, "adapter", private=False)
    assert recorder.warnings[0] == "me/model exists and is private, and stays private. You can make it public on its settings page."
    assert hub.repositories["me/model"].private


# What is refused


def test_a_wrong_token(hub: Hub, workplace_settings: Settings) -> None:
    assert str(refused(workplace_settings, token="hf_wrong")) == (
        f"The hub ({hub.url}) does not accept the access token: it is invalid or was revoked. Set HF_TOKEN to a valid one, or log in again "
        f"with `hf auth login`. {SAFE}"
    )
    assert hub.log == ["GET /api/whoami-v2 401"]


def test_a_token_that_may_only_read(hub: Hub, workplace_settings: Settings) -> None:
    assert str(refused(workplace_settings, token=READER)) == (
        "The access token of reader is read-only. Create one with write permission on the hub's page for access tokens, and set HF_TOKEN "
        "to it or log in with `hf auth login`."
    )


@pytest.mark.parametrize("exists", [True, False])
def test_no_right_to_write(hub: Hub, workplace_settings: Settings, exists: bool) -> None:
    """To a repository of somebody else, or to where one cannot be made."""
    if exists:
        hub.accounts["hf_other"] = {"name": "other", "role": "write", "organizations": []}
        do_upload(workplace_settings, repo_id="other/model", token="hf_other", private=False)
    reason = (
        "403 Forbidden: You don't have permission to write to this repository."
        if exists
        else '403 Forbidden: You don\'t have the rights to create a model under the namespace "other".'
    )
    assert str(refused(workplace_settings, repo_id="other/model", private=False)) == (
        f"The hub does not let this access token write to other/model: {reason} Use a token with write permission there, or another "
        f"--upload-repo-id. {SAFE}"
    )
    assert not hub.requests("preupload") or exists


def test_a_fine_grained_token_without_the_right(hub: Hub, workplace_settings: Settings) -> None:
    hub.accounts["hf_owner"] = {"name": "fine", "role": "write", "organizations": []}
    do_upload(workplace_settings, repo_id="fine/model", token="hf_owner", private=True)
    assert "403 Forbidden: You don't have permission" in str(refused(workplace_settings, repo_id="fine/model", token="hf_fine"))


def test_a_token_that_cannot_be_one(workplace_settings: Settings) -> None:
    for token in ("hf_ secret", "hf_secret\n", "hf_sécret"):
        with pytest.raises(ExportError) as caught:
            check_destination(HubRepository("me/model", True, token), SilentProgress())
        assert str(caught.value) == ("The access token contains invalid characters. Check HF_TOKEN, or log in again with `hf auth login`.")


def test_a_hub_that_cannot_be_reached(hub: Hub, workplace_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    recorder = Recorder()
    message = str(refused(workplace_settings, progress=recorder))
    assert message.startswith("The upload to me/model failed: ")
    assert message.endswith(f"Check the network, then upload again: files that have arrived are not sent again. {SAFE}")
    assert len(recorder.warnings) == len(heretic.saving.upload.WAITS)
    assert recorder.warnings[0].endswith(" Retrying in 5 s (1 of 4).")


def test_offline(hub: Hub, workplace_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert str(refused(workplace_settings)) == f"The hub cannot be used while HF_HUB_OFFLINE is set. Unset it to upload. {SAFE}"
    assert hub.log == []


def test_a_refusal_in_the_hubs_own_words(hub: Hub, workplace_settings: Settings) -> None:
    hub.faults.append(Fault(r"POST /api/models/me/model/commit", status=400, body='{"error": "The commit is too large."}'))
    message = str(refused(workplace_settings))
    assert message.startswith("The upload to me/model failed: Bad request for commit endpoint:")
    assert message.endswith(f"The commit is too large. {SAFE}")
    assert len(hub.requests("/commit/")) == 1


def test_a_card_that_the_hub_refuses(hub: Hub, workplace_settings: Settings, tmp_path: Path) -> None:
    """The original's licence is none that the hub knows: told before anything is sent."""
    original = shutil.copytree(workplace_settings.model, tmp_path / "m")
    (original / "README.md").write_text("---\nlicense: mine\n---\n# Mine\n")
    chosen = workplace_settings.model_copy(update={"model": str(original)})
    assert str(refused(chosen)) == (
        'The upload to me/model failed: the hub rejects the metadata of the model card: "license" must be one of mit, apache-2.0, other. '
        "It was copied from the original's card. Save the model to a folder instead (--model-action save), fix README.md there, and "
        f"upload the folder with `hf upload`. {SAFE}"
    )
    assert not hub.requests("preupload|PUT|commit")


def test_the_originals_licence_arrives(hub: Hub, workplace_settings: Settings, tmp_path: Path) -> None:
    original = shutil.copytree(workplace_settings.model, tmp_path / "m")
    (original / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Mine\n")
    (original / "LICENSE").write_text("the licence")
    do_upload(workplace_settings.model_copy(update={"model": str(original)}))
    files = hub.repositories["me/model"].files
    assert files["LICENSE"] == b"the licence"
    data = huggingface_hub.ModelCard(files["README.md"].decode()).data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", "en", "transformers")
    assert files["kernel.svg"].startswith(b"<svg")


# Connections that are lost


@pytest.fixture
def two_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """An export that has two files above 1 MiB besides the others."""
    import torch

    sizes = {"model-00001-of-00002.safetensors": 300_000, "model-00002-of-00002.safetensors": 400_000}

    def save_with_large(model: Any, result: Any, strategy: Any, directory: str, overwrite: bool, progress: Any, check: Any) -> Path:
        folder = save(model, result, "adapter", directory, overwrite, progress)
        for name, n in sizes.items():
            save_file({"weight": torch.arange(n, dtype=torch.float32)}, folder / name)
        return folder

    monkeypatch.setattr(heretic.saving.upload, "save", save_with_large)
    return sizes


def test_a_connection_that_is_lost_in_a_file(hub: Hub, workplace_settings: Settings, two_large_files: dict[str, int]) -> None:
    """The second file is cut off in its middle, once: the client sends it again, and the first one is not."""
    hub.faults.append(Fault("PUT /objects/", skip=1, after_bytes=500_000))
    recorder = Recorder()
    do_upload(workplace_settings, recorder)
    puts = hub.requests("^PUT")
    assert [line.split()[-1] for line in puts] == ["200", "cut", "200", "200"]
    assert puts[0].split()[1] != puts[1].split()[1] == puts[2].split()[1]
    assert len(hub.repositories["me/model"].commits) == 1
    assert [message for message in recorder.messages if "large" in message] == [
        "Uploading model-00001-of-00002.safetensors (1.2 MB), 1 of 2 large files ...",
        "Uploading model-00002-of-00002.safetensors (1.6 MB), 2 of 2 large files ...",
    ]


def test_a_connection_that_is_lost_for_long(hub: Hub, workplace_settings: Settings, two_large_files: dict[str, int]) -> None:
    """Longer than the client tries (six times): this program waits and continues where it was."""
    hub.faults.append(Fault("PUT /objects/", skip=1, times=8, after_bytes=500_000))
    recorder = Recorder()
    do_upload(workplace_settings, recorder)
    puts = hub.requests("^PUT")
    assert [line.split()[-1] for line in puts] == ["200", *["cut"] * 8, "200", "200"]
    assert len({line.split()[1] for line in puts}) == 3
    assert len(recorder.warnings) == 1
    assert recorder.warnings[0].endswith(" Retrying in 5 s (1 of 4).")
    assert len(hub.repositories["me/model"].commits) == 1


def test_an_upload_that_failed_goes_on_where_it_was(hub: Hub, workplace_settings: Settings, two_large_files: dict[str, int]) -> None:
    """The export is computed again, and what the hub has of it is not sent again."""
    hub.faults.append(Fault("PUT /objects/", skip=1, times=1000))
    message = str(refused(workplace_settings))
    assert message.endswith(f"Check the network, then upload again: files that have arrived are not sent again. {SAFE}")
    assert hub.repositories["me/model"].commits == []
    arrived = set(hub.objects)
    assert len(arrived) == 1
    n_before = len(hub.log)
    hub.faults.clear()
    recorder = Recorder()
    do_upload(workplace_settings, recorder)
    puts = [line.split()[1].removeprefix("/objects/") for line in hub.log[n_before:] if line.startswith("PUT")]
    assert len(puts) == 2
    assert arrived.isdisjoint(puts)
    assert len(hub.repositories["me/model"].commits) == 1
    assert recorder.warnings == []  # a repository without files of its own is nothing to tell


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_a_server_that_is_busy(hub: Hub, workplace_settings: Settings, status: int) -> None:
    """Requests that the client itself does not try again: who one is, making the repository, the commit."""
    for pattern in ("GET /api/whoami-v2", "POST /api/repos/create", "POST /api/models/me/model/commit"):
        hub.faults.append(Fault(pattern, status=status))
    recorder = Recorder()
    do_upload(workplace_settings, recorder)
    assert len(hub.repositories["me/model"].commits) == 1
    assert len(recorder.warnings) == 3
    assert all(str(status) in warning or "rate limit" in warning for warning in recorder.warnings)


def test_an_answer_that_is_lost_after_the_commit(hub: Hub, workplace_settings: Settings) -> None:
    """The commit was made; it is not made again."""
    hub.faults.append(Fault("POST /api/models/me/model/commit", served=True))
    do_upload(workplace_settings)
    assert len(hub.repositories["me/model"].commits) == 1
    assert len(hub.requests("^PUT")) == 1


def test_an_answer_that_is_lost_after_a_commit_that_removes_files(hub: Hub, workplace_settings: Settings) -> None:
    do_upload(workplace_settings)
    hub.repositories["me/model"].files["adapter_model.safetensors"] = b"old"
    hub.faults.append(Fault("POST /api/models/me/model/commit", served=True))
    do_upload(workplace_settings)
    assert [commit["deleted"] for commit in hub.repositories["me/model"].commits] == [[], ["adapter_model.safetensors"]]


# Xet, which is how files go to the hub unless it is turned off


@pytest.fixture
def xet_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub with the client's Xet turned on, which gives up on a lost connection after two tries."""
    from huggingface_hub.utils import _xet

    if not hasattr(_xet, "abort_xet_session"):
        pytest.skip("this version of the client keeps its connections to Xet, so that the settings for tests do not reach it")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_DURATION", "1s")
    _xet.abort_xet_session()
    yield hub
    _xet.abort_xet_session()


def test_an_upload_by_xet(xet_hub: Hub, workplace_settings: Settings, two_large_files: dict[str, int]) -> None:
    """Lost for a while: pieces that have arrived are not sent again, not even by another upload; and still one commit."""
    xet_hub.faults.append(Fault("POST /v1/xorbs/", skip=1, times=1000))
    message = str(refused(workplace_settings))
    assert message.endswith(f"Check the network, then upload again: files that have arrived are not sent again. {SAFE}")
    assert xet_hub.repositories["me/model"].commits == []
    arrived = [line for line in xet_hub.requests("POST /v1/xorbs/") if line.endswith("200")]
    assert len(arrived) == len(xet_hub.xorbs) == 1
    xet_hub.faults = [Fault("POST /v1/xorbs/", times=3)]
    recorder = Recorder()
    do_upload(workplace_settings, recorder)
    sent = [line for line in xet_hub.requests("POST /v1/xorbs/") if line.endswith("200")]
    assert len(sent) == len(set(sent)) == len(xet_hub.xorbs) == 3  # two large files, and the adapter with the commit
    assert len(recorder.warnings) >= 1
    repository = xet_hub.repositories["me/model"]
    assert len(repository.commits) == 1
    assert sum(content.startswith(b"xet ") for content in repository.files.values()) == 3
    assert not xet_hub.requests("^PUT")
    assert all(TOKEN.encode() not in body for _, body in xet_hub.bodies)


# The token


@pytest.mark.parametrize("where", ["header", "body", "reflected in a file's upload"])
def test_an_error_that_quotes_the_token(hub: Hub, workplace_settings: Settings, where: str) -> None:
    """In no text, cause, context, note or traceback."""
    if where == "header":
        hub.faults.append(Fault("POST /api/repos/create", status=400, headers={"X-Error-Message": f"bad token {TOKEN}"}))
    elif where == "body":
        hub.faults.append(Fault("POST /api/repos/create", status=400, body=json.dumps({"error": f"bad token {TOKEN}"})))
    else:
        hub.faults.append(Fault("PUT /objects/", status=400, body=f"bad token {TOKEN}", headers={"Content-Type": "text/plain"}))
    failure = refused(workplace_settings)
    assert "bad token [token]" in str(failure)
    text = "".join(traceback.format_exception(failure))
    assert "HfHubHTTPError" in text or "BadRequestError" in text  # the client's own traceback, as a note
    assert TOKEN not in text
    assert TOKEN not in repr(failure)
    assert (failure.__cause__, failure.__context__) == (None, None)


def test_the_storage_is_not_given_the_token(hub: Hub, workplace_settings: Settings) -> None:
    do_upload(workplace_settings)
    assert {has_token for request, has_token in hub.authorized if "/objects/" in request and request.startswith("PUT")} == {False}
    assert all(TOKEN.encode() not in body for _, body in hub.bodies)
    assert all(TOKEN.encode() not in content for content in hub.repositories["me/model"].files.values())


# The command, in a process of its own

UPLOAD = ("--model-action", "upload", "--trial-index", "0", "--export-strategy", "merge", "--upload-repo-id", "me/model", "--debug")


@pytest.fixture(scope="module")
def finished_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study of the demonstration."""
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["--demo", "--n-trials", "2", "--seed", "1", "--max-response-length", "12"]
    subprocess.run(command(*arguments), check=True, cwd=folder, capture_output=True, env=environment("http://127.0.0.1:9", folder))
    return folder


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("heretic")), *arguments]


def environment(url: str, home: Path, token: str = TOKEN) -> dict[str, str]:
    """What the process is given: nothing turned off but Xet, whose storage is not spoken here."""
    changes = {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HOME": str(home / "home"), "HF_HUB_DISABLE_XET": "1", "TMPDIR": str(home)}
    return {**{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}, **changes}


def start(folder: Path, url: str, *arguments: str, token: str = TOKEN) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command("--demo", *UPLOAD, *arguments),
        cwd=folder,
        env=environment(url, folder, token),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def assert_nowhere(token: str, folder: Path, *texts: str) -> None:
    """A token is in no text, and in no file that the process could have written."""
    assert not [text for text in texts if token in text]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert not [path for path in files if token.encode() in path.read_bytes()]


@pytest.mark.long
def test_the_command_uploads_and_keeps_the_token_to_itself(finished_demo: Path, tmp_path: Path) -> None:
    """In no output with --debug, no file, and no command line, that of every process there is looked at during the upload."""
    folder = copy_of(finished_demo, tmp_path)
    seen: list[bytes] = []

    def look(request: str) -> None:
        if request.startswith("PUT"):
            seen.extend(path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
            seen.extend(path.read_bytes() for path in folder.rglob("*") if path.is_file() and "safetensors" not in path.name)

    with serve(**{TOKEN: {"name": "me"}}) as hub:
        hub.on_request = look if Path("/proc/self/cmdline").exists() else None
        code, out, err = finish(start(folder, hub.url, "--upload-repo-private"))
        assert code == 0, err
        repository = hub.repositories["me/model"]
        assert len(repository.commits) == 1
        assert repository.private
        assert set(repository.files) >= {"README.md", "heretic.json", "model.safetensors", "config.json", "tokenizer.json"}
        assert f"Uploaded trial {json.loads(repository.files['heretic.json'])['trial']['number']} to {hub.url}/me/model" in out
        assert "Uploading model.safetensors (2.4 MB), 1 of 1 large files ..." in out
        assert hub.requests("models|repos|whoami")[0] == "GET /api/whoami-v2 200"
        if hub.on_request:
            assert any(b"--upload-repo-id" in line for line in seen)
        assert all(TOKEN.encode() not in content for content in [*seen, *repository.files.values()])
        assert_nowhere(TOKEN, folder, out, err)
    assert not upload_folders(folder / "checkpoints")


@pytest.mark.long
def test_the_command_with_a_wrong_token(finished_demo: Path, tmp_path: Path) -> None:
    """Told before the model is loaded."""
    folder = copy_of(finished_demo, tmp_path)
    with serve(**{TOKEN: {"name": "me"}}) as hub:
        code, out, err = finish(start(folder, hub.url, "--no-upload-repo-private", token="hf_WrongWrongWrong"))
        assert code == 1
        assert err.splitlines()[-1].startswith(f"Error: The hub ({hub.url}) does not accept the access token: ")
        assert "Traceback" in err  # of --debug
        assert "Loading" not in out.replace("Loading libraries", "")
        assert hub.requests("models|repos|whoami") == ["GET /api/whoami-v2 401"]
        assert_nowhere("hf_WrongWrongWrong", folder, out, err)


@pytest.mark.long
def test_the_command_without_the_right_to_write(finished_demo: Path, tmp_path: Path) -> None:
    """To a repository that exists: told before the model is loaded as well."""
    folder = copy_of(finished_demo, tmp_path)
    with serve(**{TOKEN: {"name": "somebody"}, "hf_owner": {"name": "me"}}) as hub:
        hub.repositories["me/model"] = Repository(private=False)
        code, out, err = finish(start(folder, hub.url, "--no-upload-repo-private"))
        assert code == 1
        assert err.splitlines()[-1].startswith("Error: The hub does not let this access token write to me/model: 403 Forbidden: ")
        assert "Loading" not in out.replace("Loading libraries", "")
        assert_nowhere(TOKEN, folder, out, err)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_command_stopped_in_the_middle_goes_on(finished_demo: Path, tmp_path: Path, how: signal.Signals) -> None:
    """Stopped once the weights have arrived: the next run does not send them again, and leaves no folder behind."""
    folder = copy_of(finished_demo, tmp_path)
    with serve(**{TOKEN: {"name": "me"}}) as hub:
        hub.faults.append(Fault("POST /api/models/me/model/commit", times=1000, status=503))
        process = start(folder, hub.url, "--upload-repo-private")
        wait_until(lambda: bool(hub.requests("/commit/")), 300)
        (left,) = upload_folders(folder / "checkpoints")
        assert (left / "model" / "model.safetensors").is_file()
        process.send_signal(how)
        code, out, err = finish(process)
        assert code == (-signal.SIGKILL if how == signal.SIGKILL else 130)
        assert left.exists() == (how == signal.SIGKILL)
        assert hub.repositories["me/model"].commits == []
        assert len(hub.requests("^PUT .* 200")) == 1
        hub.faults.clear()
        code, more_out, more_err = finish(start(folder, hub.url, "--upload-repo-private"))
        assert code == 0, more_err
        assert len(hub.requests("^PUT")) == 1
        assert len(hub.repositories["me/model"].commits) == 1
        assert not upload_folders(folder / "checkpoints")
        assert_nowhere(TOKEN, folder, out, err, more_out, more_err)


def copy_of(finished: Path, folder: Path) -> Path:
    shutil.copytree(finished / "checkpoints", folder / "checkpoints")
    return folder
