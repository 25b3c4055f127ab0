"""A hub for tests: as much of the Hugging Face hub's protocol as pushing and loading models needs, on this machine.

It keeps branches and commits of any number of repositories in memory, wants a token for writing and for private
repositories, takes large files by git-lfs (basic transfer) and small ones in the commit, and counts what it is asked.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import unquote

TOKEN = "hf_of_tester"
USER = "tester"

Files = dict[str, bytes]


@dataclass
class Repository:
    """One model repository."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Hub:
    """All that the server knows."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: Files = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    refuses: str = ""
    """Part of a path that is answered with an error of the server."""

    def add(self, name: str, files: Files, *, private: bool = False) -> Repository:
        self.repositories[name] = Repository(private)
        self.repositories[name].commit("main", files, "initial commit")
        return self.repositories[name]


class HubError(Exception):
    """An answer that is an error: status, the hub's code for it, a message, and if need be more for its body."""


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".onnx"))


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path = unquote(self.path.split("?")[0])
        self.hub.requests.append((self.command, path))
        try:
            if self.hub.refuses and self.hub.refuses in path:
                raise HubError(507, "", "the disk is full")  # one that clients do not try again
            for method, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    content, headers = answer(self, **found.groupdict())
                    self._send(302 if "Location" in headers else 200, content, headers)
                    return
            raise HubError(404, "EntryNotFound", f"no such page: {self.command} {path}")
        except HubError as error:
            status, code, message, *more = error.args
            said = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
            self._send(status, {"error": message, **(more[0] if more else {})}, said)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def require_token(self) -> None:
        if not self.signed_in:
            raise HubError(401, "", "Invalid username or password.")

    def repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.signed_in):
            raise HubError(401 if not self.signed_in else 404, "RepoNotFound", "Repository not found")
        return found

    def sha(self, name: str, revision: str) -> str:
        repository = self.repository(name)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


Answer = tuple[Any, dict[str, str]]


def create(request: Handler) -> Answer:
    request.require_token()
    asked = json.loads(request.body)
    name = f"{asked.get('organization') or USER}/{asked['name']}"
    if name in request.hub.repositories:
        raise HubError(409, "", "You already created this model repo", {"url": f"{request.hub.endpoint}/{name}"})
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    request.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
    return {"url": f"{request.hub.endpoint}/{name}", "name": name, "id": name}, {}


def validate_card(request: Handler) -> Answer:
    text = json.loads(request.body)["content"]
    if not text.startswith("---\n"):
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}, {}
    return {"errors": [], "warnings": []}, {}


def describe(request: Handler, name: str, revision: str = "main") -> Answer:
    repository, sha = request.repository(name), request.sha(name, revision)
    siblings = [{"rfilename": path} for path in repository.commits[sha]]
    info = {"_id": "1", "id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings}
    return info | {"tags": [], "downloads": 0, "likes": 0}, {}


def tree(request: Handler, name: str, revision: str, path: str = "") -> Answer:
    files = request.repository(name).commits[request.sha(name, revision)]
    if path:
        raise HubError(404, "EntryNotFound", f"{path} does not exist")
    return [_entry(path, data) for path, data in files.items()], {}


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
    if is_large(path):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def resolve(request: Handler, name: str, revision: str, path: str) -> Answer:
    sha = request.sha(name, revision)
    files = request.repository(name).commits[sha]
    if path not in files:
        raise HubError(404, "EntryNotFound", "Entry not found")
    data = files[path]
    headers = {"X-Repo-Commit": sha, "ETag": f'"{_git_oid(data)}"'}
    if is_large(path):  # the hub sends readers to where large files are
        oid = hashlib.sha256(data).hexdigest()
        request.hub.blobs[oid] = data
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{oid}"'}
        elsewhere = request.hub.endpoint.replace("127.0.0.1", "localhost")  # another host, as the hub's is
        return b"", headers | {"Location": f"{elsewhere}/lfs/{oid}"}
    return data, headers


def branch(request: Handler, name: str, revision: str) -> Answer:
    request.require_token()
    repository = request.repository(name)
    if revision in repository.branches:
        raise HubError(409, "", "Reference already exists")
    repository.branches[revision] = repository.branches["main"]
    return {}, {}


def preupload(request: Handler, name: str, revision: str) -> Answer:
    request.require_token()
    request.sha(name, revision)
    asked = [file["path"] for file in json.loads(request.body)["files"]]
    modes = {path: "lfs" if is_large(path) else "regular" for path in asked}
    return {"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in asked]}, {}


def lfs_batch(request: Handler, name: str) -> Answer:
    request.require_token()
    request.repository(name)
    objects: list[dict[str, Any]] = json.loads(request.body)["objects"]
    for entry in objects:
        if entry["oid"] not in request.hub.blobs:
            entry["actions"] = {"upload": {"href": f"{request.hub.endpoint}/lfs/{entry['oid']}", "header": {}}}
    return {"transfer": "basic", "objects": objects}, {}


def lfs_store(request: Handler, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "", "the content is not what it was announced to be")
    request.hub.blobs[oid] = request.body
    return {}, {}


def lfs_read(request: Handler, oid: str) -> Answer:
    return request.hub.blobs[oid], {"ETag": f'"{oid}"'}


def commit(request: Handler, name: str, revision: str) -> Answer:
    request.require_token()
    repository = request.repository(name)
    files, message = dict(repository.commits[request.sha(name, revision)]), ""
    for line in request.body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header":
            message = value["summary"]
        elif entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            files[value["path"]] = request.hub.blobs[value["oid"]]
        elif entry["key"] == "deletedFile":
            del files[value["path"]]
        else:
            raise HubError(400, "", f"unknown operation {entry['key']}")
    sha = repository.commit(revision, files, message)
    return {"commitUrl": f"{request.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha, "success": True}, {}


_NAME, _REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"

ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("POST",), "/api/repos/create", create),
    (("POST",), "/api/validate-yaml", validate_card),
    (("GET",), f"/api/models/{_NAME}", describe),
    (("GET",), f"/api/models/{_NAME}/revision/{_REVISION}", describe),
    (("GET",), f"/api/models/{_NAME}/tree/{_REVISION}(/(?P<path>.+))?", tree),
    (("POST",), f"/api/models/{_NAME}/branch/{_REVISION}", branch),
    (("POST",), f"/api/models/{_NAME}/preupload/{_REVISION}", preupload),
    (("POST",), f"/{_NAME}[.]git/info/lfs/objects/batch", lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", lfs_store),
    (("GET", "HEAD"), "/lfs/(?P<oid>[0-9a-f]{64})", lfs_read),
    (("POST",), f"/api/models/{_NAME}/commit/{_REVISION}", commit),
    (("GET", "HEAD"), f"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", resolve),
]


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
