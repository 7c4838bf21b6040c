"""An original on the hub: what an export needs beyond what loading fetched, and what happens if the hub does not answer."""

import json
import re
import shutil
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from transformers import AutoConfig

import hub
from conftest import Outcome
from heretic.errors import ExportError
from heretic.loading.source import ModelSource
from heretic.saving.original import open_original
from heretic.utils import SilentProgress
from test_export import export

SAVE = ["--trial-index", "0", "--model-action", "save", "--export-strategy", "merge", "--save-directory", "out"]


class _Hub(hub._Hub):
    """And lists a repository's files."""

    asked: list[str]

    def _answer(self, with_body: bool) -> None:
        path = urlsplit(self.path).path
        self.asked.append(path)
        if not re.fullmatch(rf"/api/models/owner/tiny/tree/({hub.COMMIT}|main)", path):
            return super()._answer(with_body)
        files = [f for f in self.folder.rglob("*") if f.is_file()]
        tree = [{"type": "file", "path": f.relative_to(self.folder).as_posix(), "size": f.stat().st_size, "oid": "0" * 40} for f in files]
        content = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)
        return None


@pytest.mark.usefixtures("workplace")
def test_what_loading_did_not_fetch_is_fetched(tiny_model: Path, tmp_path: Path, heretic: Callable[..., Outcome]) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(tiny_model, repository)
    (repository / "LICENSE").write_text("do what you like")
    (repository / "notes").mkdir()
    (repository / "notes" / "about.txt").write_text("small")
    (repository / "onnx").mkdir()
    for name in ("pytorch_model.bin", "onnx/model.onnx", "consolidated.safetensors"):
        shutil.copyfile(repository / "model.safetensors", repository / name)
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": repository, "asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, cache = f"http://127.0.0.1:{server.server_port}", tmp_path / "cache"
    try:
        with hub.online(address, cache):
            outcomes = [heretic("--model", "owner/tiny", *SAVE), heretic("--export-from", "out", "--save-directory", "again")]
    finally:
        server.shutdown()
        server.server_close()
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert "Downloading 2 more files of owner/tiny: LICENSE, notes/about.txt" in outcomes[0].out
    assert (tmp_path / "out" / "LICENSE").read_text() == "do what you like"
    assert (tmp_path / "out" / "notes" / "about.txt").read_text() == "small"
    assert not list((tmp_path / "out").rglob("*.onnx")) and not list((tmp_path / "out").rglob("consolidated*"))
    assert not any(path.endswith((".onnx", "pytorch_model.bin", "consolidated.safetensors")) for path in asked)
    record = json.loads((tmp_path / "out" / "heretic.json").read_text())
    assert record["model"]["commit"] == record["model"]["fingerprint"] == hub.COMMIT
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes() == path.read_bytes()

    # The server is gone; everything is in the cache, which is taken instead and told.
    with hub.online(address, cache, is_offline=True):
        outcome = heretic("--reproduce", "out")
    assert outcome.code == 0
    assert "The hub does not list the files of owner/tiny, so those in the cache are used: " in outcome.out
    assert "files are identical." in outcome.out


def test_a_hub_that_does_not_answer_in_time(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the files that loading did not need are fetched; the error of the client's HTTP library is no OSError."""

    def fail(*_: object, **__: object) -> None:
        raise HTTPError("The read operation timed out.")

    monkeypatch.setattr("heretic.saving.original._fetch", fail)
    monkeypatch.setattr("heretic.saving.original.load_config", lambda source: AutoConfig.from_pretrained(tiny_model))
    with pytest.raises(ExportError) as caught:
        open_original(ModelSource("owner/tiny", "owner/tiny", None, False), SilentProgress())
    assert str(caught.value) == "The files of owner/tiny cannot be read again: The read operation timed out. The study is safe."


@pytest.mark.parametrize("studies", ["checkpoints", "."])
def test_a_run_in_the_models_folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, studies: str) -> None:
    """The study, plots, settings and earlier results that it leaves there are not the model's."""
    shutil.copytree(tiny_model, tmp_path / "m")
    monkeypatch.chdir(tmp_path / "m")
    own = ["--.jsonl", "--.jsonl.artifacts/edit.safetensors"]
    others = ["plots/m/layer_1.png", "config.toml", "mine.toml", "shared.jsonl", "out/config.json", "out/heretic.json"]
    files = ["vocabulary/words.toml", "notes.txt"]
    for name in [*(f"{studies}/{name}" for name in own), *others, *files]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    model_files = {path.name for path in tiny_model.iterdir()}
    target = export(Path(), tmp_path / "out", study_checkpoint_dir=studies, study_storage="shared.jsonl")
    saved = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert saved - {"README.md", "kernel.svg", "heretic.json", "heretic.directions"} == {*files, *model_files}
