"""A server that answers as the model hub does to the few requests that loading a model makes, and a process that asks it."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    folder: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        repo = re.search(r"owner/[\w.-]+", self.path)
        if repo is None or repo[0] not in ("owner/tiny", "owner/gated", "owner/private"):
            return self._refuse(404, "RepoNotFound")
        if repo[0] == "owner/gated":
            return self._refuse(403, "GatedRepo")
        if repo[0] == "owner/private":
            return self._refuse(401, "RepoNotFound")
        if re.match(r"/api/models/owner/tiny/tree/", self.path):
            files = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in sorted(self.folder.iterdir())]
            return self._send(json.dumps(files).encode(), {"Content-Type": "application/json"}, with_body)
        wanted = re.fullmatch(r"/owner/tiny/resolve/([^/]+)/(.+)", self.path)
        if wanted is None:  # questions about the repository, which the libraries do without
            return self._refuse(404, "EntryNotFound")
        revision, name = wanted.groups()
        if revision not in ("main", "v1", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        file = self.folder / name
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        return self._send(file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'}, with_body)

    def _send(self, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _refuse(self, code: int, error: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of a hub that holds `owner/tiny`, the model in `folder`; `owner/gated` and `owner/private` are refused."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": folder}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def online(address: str, cache: Path, is_offline: bool = False) -> Iterator[None]:
    """Within, this process asks the hub at `address`, or may not ask any, and has a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
        # Made once with the usual address, which would be asked for the better part of a minute if there is no network.
        patch.setattr(transformers_hub, "_hf_api", None, raising=False)
        patch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield
