"""A stand-in for the Hugging Face hub: the endpoints that huggingface_hub asks when a model is pushed or pulled, with
repositories in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in ("main", "HEAD"):
            return list(self.commits.items())[-1]
        return next(((sha, files) for sha, files in self.commits.items() if sha == revision), None)

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((sorted(files), len(self.commits))).encode()).hexdigest()
        self.commits[sha] = files
        return sha


class Hub(ThreadingHTTPServer):
    """``token``: the one that may write. ``broken``: a pattern of requests that are cut off."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.token = "hf_stand_in"
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.broken: str | None = None
        self.asked: list[str] = []

    def put(self, name: str, files: dict[str, bytes]) -> str:
        return self.repositories.setdefault(name, Repository(private=False, commits={})).commit(files)

    def handle_error(self, request: Any, address: Any) -> None:
        """A cut connection is no news."""


@contextmanager
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _route(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self._body()
        asked = f"{self.command} {path}"
        self.server.asked.append(asked)
        if self.server.broken and re.search(self.server.broken, asked):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, asked):
                answer(self, body, *match.groups())
                return
        self._answer(404, {"error": f"no such endpoint: {asked}"})

    do_GET = do_HEAD = do_POST = do_PUT = _route

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.server.token}":
            return True
        self._answer(401, {"error": "Invalid username or password."})
        return False

    def who(self, _: bytes) -> None:
        if self._may_write():
            self._answer(200, {"name": "me", "type": "user"})

    def info(self, _: bytes, name: str, revision: str | None) -> None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        there = repository.at(revision or "main")
        if there is None:
            self._answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return
        sha, files = there
        library = re.search(rb"(?m)^library_name: (\w+)$", files.get("README.md", b""))
        siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
        about = {"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}
        self._answer(200, about | ({"library_name": library[1].decode()} if library else {}))

    def create(self, body: bytes) -> None:
        if self._may_write():
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            made = Repository(private=bool(asked.get("private") or asked.get("visibility") == "private"))
            made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self.server.repositories[name] = made
            self._answer(200, {"url": f"{self.server.url}/{name}", "name": name})

    def card(self, body: bytes) -> None:
        head = json.loads(body)["content"]
        bad = [] if head.startswith("---\nlibrary_name: ") else [{"message": "no head"}]
        self._answer(200, {"errors": bad, "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        files = [each["path"] for each in json.loads(body)["files"]]
        mode = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
        self._answer(200, {"files": [{"path": p, "uploadMode": mode[p], "shouldIgnore": False} for p in files]})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def blob(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self._answer(200)

    def commit(self, body: bytes, name: str) -> None:
        if not self._may_write():
            return
        repository = self.server.repositories[name]
        files = dict(list(repository.commits.values())[-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        sha = repository.commit(files)
        url = f"{self.server.url}/{name}/commit/{sha}"
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": url})

    def file(self, _: bytes, name: str, revision: str, file: str) -> None:
        repository = self.server.repositories.get(name)
        there = repository and repository.at(revision)
        if not there or file not in there[1]:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        sha, files = there
        etag = hashlib.sha256(files[file]).hexdigest()
        self._answer(200, files[file], ETag=f'"{etag}"', X_Repo_Commit=sha)


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (r"GET /api/whoami-v2", _Handler.who),
    (rf"GET /api/models/{_REPO}(?:/revision/(.+))?", _Handler.info),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.card),
    (rf"POST /api/models/{_REPO}/preupload/main", _Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(\w+)", _Handler.blob),
    (rf"POST /api/models/{_REPO}/commit/main", _Handler.commit),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", _Handler.file),
)
