"""A hub on the loopback interface: the requests that an upload makes, with accounts, repositories, large files, commits and faults.

Large files come by the protocol of LFS, or by Xet's: of the latter only what its client falls back to if a storage does not know the
newer requests, and pieces are kept as they come, not put together to files.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import yaml

RELATIONS = ("adapter", "merge", "quantized", "finetune")
LICENCES = ("mit", "apache-2.0", "other")
REGULAR_LIMIT = 10 * 2**20
XET_TOKEN = "xet-token"


@dataclass
class Repository:
    """A model repository: its files as they are now, and every commit as the paths that it added and deleted."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class Fault:
    """What goes wrong with requests whose `METHOD /path` matches, `times` times, after `skip` of them were served."""

    pattern: str
    times: int = 1
    skip: int = 0
    status: int | None = None  # an answer of this status; None: the connection is cut
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    after_bytes: int = 0  # of the request's body, before the connection is cut
    served: bool = False  # the request is carried out and only its answer is lost


@dataclass
class Hub:
    """The state of the hub, to be looked at and changed by tests."""

    url: str = ""
    accounts: dict[str, dict[str, Any]] = field(default_factory=dict)  # by token: name, role, organizations
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by their SHA-256
    xorbs: dict[str, bytes] = field(default_factory=dict)  # Xet's pieces by their hash
    shards: list[bytes] = field(default_factory=list)  # and what says which files they make
    faults: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)  # "METHOD /path status", "cut" for a status if the connection was
    bodies: list[tuple[str, bytes]] = field(default_factory=list)
    authorized: list[tuple[str, bool]] = field(default_factory=list)  # "METHOD /path", whether a token came along
    on_request: Callable[[str], None] | None = None
    lock: Any = field(default_factory=threading.Lock)

    def has(self, oid: str) -> bool:
        """Whether a large file of this SHA-256 has arrived, either way."""
        words = b"".join(bytes.fromhex(oid)[i : i + 8][::-1] for i in range(0, 32, 8))  # as Xet writes hashes
        return oid in self.objects or any(words in shard for shard in self.shards)

    def requests(self, pattern: str) -> list[str]:
        """The log's lines that match."""
        return [line for line in self.log if re.search(pattern, line)]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        request = f"{self.command} {path}"
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        fault = self._fault(request)
        if hub.on_request is not None:
            hub.on_request(request)
        if fault is not None and fault.status is None and not fault.served:
            self._read(fault.after_bytes)
            return self._cut(request)
        body = self._read()
        with hub.lock:
            hub.authorized.append((request, bool(token)))
            if fault is not None and fault.status is not None:
                return self._answer(request, fault.status, fault.body.encode(), fault.headers)
            hub.bodies.append((request, body))
            status, answer, headers = self._serve(path, token, body)
        if fault is not None:
            return self._cut(request)
        return self._answer(request, status, answer if isinstance(answer, bytes) else json.dumps(answer).encode(), headers)

    do_GET = do_POST = do_PUT = do_HEAD = _handle  # noqa: N815

    def _fault(self, request: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and re.search(fault.pattern, request):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def _read(self, limit: int | None = None) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length if limit is None else min(limit, length))

    def _cut(self, request: str) -> None:
        self.hub.log.append(f"{request} cut")
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, request: str, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.hub.log.append(f"{request} {status}")
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # What the hub answers: status, body, headers

    def _serve(self, path: str, token: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if path.startswith("/objects/"):
            return self._store(path, body)
        if path.startswith(("/v1/", "/v2/")):
            return self._xet(path, token, body)
        account = self.hub.accounts.get(token)
        if account is None:
            if token or path == "/api/whoami-v2":
                return _refusal(401, "Invalid credentials in Authorization header")
            account = {"name": None, "role": "none", "organizations": []}
        if path == "/api/whoami-v2":
            organizations = [{"name": name} for name in account["organizations"]]
            return 200, {"name": account["name"], "orgs": organizations, "auth": {"accessToken": {"role": account["role"]}}}, {}
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body))
        if path == "/api/repos/create":
            return self._create(account, json.loads(body))
        return self._repository(path, account, body)

    def _store(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """The storage: addresses that the hub signed, asked without a token."""
        oid = path.removeprefix("/objects/")
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, b"the content is not what was announced", {"Content-Type": "text/plain"}
        self.hub.objects[oid] = body
        return 200, b"", {}

    def _xet(self, path: str, token: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Xet's storage, which knows its own tokens only."""
        if token != XET_TOKEN:
            return 401, {}, {}
        kind, name = path.split("/")[2], path.rsplit("/", maxsplit=1)[-1]
        if kind == "xorb-grants" and name in self.hub.xorbs:
            return 200, {}, {}  # no need to send it
        if kind == "xorbs":
            self.hub.xorbs[name] = body
            return 200, {"was_inserted": True}, {}
        if path == "/v1/shards":
            self.hub.shards.append(body)
            return 200, {"result": 1}, {}
        return (200, {}, {}) if kind == "telemetry" else (404, {}, {})

    def _validate(self, request: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        match = re.match(r"---\n(.*?)\n---\n", request["content"], re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        errors = []
        if "base_model" in data and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(data["base_model"])):
            errors.append({"message": '"base_model" must be a string with the name of a model'})
        if data.get("base_model_relation", "finetune") not in RELATIONS:
            errors.append({"message": f'"base_model_relation" must be one of {RELATIONS}'})
        if data.get("license", "mit") not in LICENCES:
            errors.append({"message": f'"license" must be one of {", ".join(LICENCES)}'})
        if not isinstance(data.get("tags", []), list):
            errors.append({"message": '"tags" must be an array'})
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

    def _create(self, account: dict[str, Any], request: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        namespace = request["organization"] or account["name"]
        repo_id = f"{namespace}/{request['name']}"
        if repo_id in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, {}
        if account["role"] != "write" or namespace not in (account["name"], *account["organizations"]):
            return _refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        private = request.get("visibility") == "private" or bool(request.get("private"))  # as newer and older clients say it
        self.hub.repositories[repo_id] = Repository(private, {".gitattributes": b"*.safetensors lfs\n"})
        return 200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}, {}

    def _repository(self, path: str, account: dict[str, Any], body: bytes) -> tuple[int, Any, dict[str, str]]:
        found = re.match(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(\.git/.*|/.*|)$", path)
        if found is None:
            return _refusal(404, "Sorry, we can't find the page you are looking for.")
        repo_id, rest = found.groups()
        repository = self.hub.repositories.get(repo_id)
        member = repo_id.split("/")[0] in (account["name"], *account["organizations"])
        if repository is None or (repository.private and not member):
            return _refusal(404 if account["name"] else 401, "Repository not found", "RepoNotFound")
        if path.startswith("/api/") and re.fullmatch("|/revision/[^/]+", rest):
            siblings = [{"rfilename": name} for name in sorted(repository.files)]
            return 200, {"id": repo_id, "modelId": repo_id, "sha": repository.sha, "private": repository.private, "siblings": siblings}, {}
        if path.startswith("/api/") and re.fullmatch("/tree/[^/]+/?", rest):
            listing = [{"type": "file", "path": name, "size": len(c), "oid": _git_hash(c)} for name, c in sorted(repository.files.items())]
            return 200, listing, {}
        if resolved := re.fullmatch(r"/resolve/([^/]+)/(.+)", rest):
            return self._resolve(repository, *resolved.groups())
        if not member or account["role"] != "write":
            return _refusal(403, "You don't have permission to write to this repository")
        if rest == "/auth-check/write":
            return 200, {}, {}
        if rest == "/xet-write-token/main":
            end = str(int(time.time()) + 3600)
            headers = {"X-Xet-Cas-Url": self.hub.url, "X-Xet-Access-Token": XET_TOKEN, "X-Xet-Token-Expiration": end}
            return 200, {"casUrl": self.hub.url, "accessToken": XET_TOKEN, "exp": int(end)}, headers
        if rest == "/preupload/main":
            return 200, {"files": [self._upload_mode(repository, file) for file in json.loads(body)["files"]]}, {}
        if rest == ".git/info/lfs/objects/batch":
            objects = [self._batch_object(item, repo_id) for item in json.loads(body)["objects"]]
            return 200, {"transfer": "basic", "objects": objects}, {}
        if rest == ".git/info/lfs/verify":
            asked = json.loads(body)
            stored = self.hub.objects.get(asked["oid"])
            return (200, {}, {}) if stored is not None and len(stored) == asked["size"] else _refusal(404, "no such object")
        if rest == "/commit/main":
            return self._commit(repo_id, repository, body)
        return _refusal(404, f"nothing at {path}")

    def _resolve(self, repository: Repository, revision: str, name: str) -> tuple[int, Any, dict[str, str]]:
        if name not in repository.files:
            return _refusal(404, "Entry not found", "EntryNotFound")
        content = repository.files[name]
        commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else repository.sha
        return 200, content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}

    def _upload_mode(self, repository: Repository, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".bin")) or file["size"] >= REGULAR_LIMIT
        present = repository.files.get(file["path"])
        oid = None
        if present is not None:
            oid = hashlib.sha256(present).hexdigest() if large else _git_hash(present)
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _batch_object(self, item: dict[str, Any], repo_id: str) -> dict[str, Any]:
        if item["oid"] in self.hub.objects:
            return item
        upload = {"href": f"{self.hub.url}/objects/{item['oid']}"}
        return {**item, "actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/verify"}}}

    def _commit(self, repo_id: str, repository: Repository, body: bytes) -> tuple[int, Any, dict[str, str]]:
        lines = [json.loads(line) for line in body.splitlines()]
        files, added, deleted = dict(repository.files), [], []
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                added.append(value["path"])
            elif line["key"] == "lfsFile":
                if not self.hub.has(value["oid"]):
                    return _refusal(400, f"the large file {value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects.get(value["oid"], f"xet {value['oid']}".encode())
                added.append(value["path"])
            else:
                del files[value["path"]]
                deleted.append(value["path"])
        repository.files = files
        repository.commits.append({"summary": lines[0]["value"]["summary"], "added": sorted(added), "deleted": sorted(deleted)})
        return 200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{repository.sha}", "commitOid": repository.sha}, {}

    def log_message(self, *_: object) -> None:
        pass


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _refusal(status: int, message: str, code: str = "") -> tuple[int, Any, dict[str, str]]:
    return status, {"error": message}, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


@contextmanager
def serve(**accounts: dict[str, Any]) -> Iterator[Hub]:
    """A running hub with accounts by token; their `role` is `write` and `organizations` are none by default."""
    hub = Hub(accounts={token: {"role": "write", "organizations": [], **account} for token, account in accounts.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that a process does; fail if it does not happen."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
