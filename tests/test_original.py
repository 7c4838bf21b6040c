"""An original on the hub: what an export needs beyond what loading fetched, and what happens if the hub does not answer."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import hub

RUN_ALL = """
import contextlib, io, json, sys
from heretic.main import run_command
results = []
for arguments in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(arguments)
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""
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


def run(commands: list[list[str]], **environment: str) -> list[tuple[int, str, str]]:
    process = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        check=False,
        input=json.dumps(commands),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return [tuple(result) for result in json.loads(process.stdout)]


@pytest.mark.usefixtures("workplace")
def test_what_loading_did_not_fetch_is_fetched(tiny_model: Path, tmp_path: Path) -> None:
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
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    study = ["--model", "owner/tiny", *SAVE]
    again = ["--export-from", "out", "--save-directory", "again"]
    try:
        outcomes = run([study, again], HF_HUB_OFFLINE="0", **environment)
    finally:
        server.shutdown()
        server.server_close()
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    assert "Downloading 2 more files of owner/tiny: LICENSE, notes/about.txt" in outcomes[0][1]
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
    ((code, out, _),) = run([["--reproduce", "out"]], HF_HUB_OFFLINE="1", **environment)
    assert code == 0
    assert "The hub does not list the files of owner/tiny, so those in the cache are used: " in out
    assert "files are identical." in out
