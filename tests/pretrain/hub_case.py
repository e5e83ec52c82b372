"""A stand-in for the Hugging Face hub: the part of its protocol by which huggingface_hub pushes and downloads models.

Written after huggingface_hub 2.4 (``hf_api.py``, ``_commit_api.py``, ``lfs.py``, ``_snapshot_download.py``). Large
files travel by Git LFS in one piece; Xet, which needs a server of its own, is switched off by :func:`use`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

WRITER, READER = "hf_writer", "hf_reader"
"""The tokens that the server knows; only the first may write, to repositories of ``someone``."""
OWNER = "someone"
LFS_SUFFIXES = (".safetensors", ".onnx")


@dataclass
class Repo:
    """Branches with their commits, the newest last: (hash, {file: contents}, message)."""

    private: bool
    branches: dict[str, list[tuple[str, dict[str, bytes], str]]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        number = sum(map(len, self.branches.values()))
        digest = hashlib.sha1(f"{branch} {number} {sorted(files)}".encode()).hexdigest()
        self.branches.setdefault(branch, []).append((digest, files, message))
        return digest


@dataclass
class Hub:
    """The server's state, and what was asked of it."""

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256
    asked: list[str] = field(default_factory=list)  # "METHOD path"
    received: int = 0  # bytes of LFS objects
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)  # part of "METHOD path" -> status, message
    between: Callable[[], None] | None = None  # called once before a commit
    url: str = ""

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo].branches[branch][-1][1]

    def commits(self, repo: str, branch: str = "main") -> list[str]:
        """Messages, the oldest first."""
        return [message for _, _, message in self.repos[repo].branches[branch]]


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # headers and body in one packet: 40 ms less a request
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self.chunks())
        path = urlsplit(self.path).path
        asked = f"{self.command} {path}"
        self.hub.asked.append(asked)
        try:
            for part, (status, message) in self.hub.faults.items():
                if part in asked:
                    raise Refused(status, message)
            self.route(path.strip("/").split("/"))
        except Refused as refused:
            headers = {"X-Error-Message": str(refused)}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self.send(json.dumps({"error": str(refused)}).encode(), refused.status, headers)

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def say(self, value: Any) -> None:
        self.send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def writer(self, owner: str) -> None:
        """Refuse whoever may not write."""
        if self.token not in (WRITER, READER):
            raise Refused(401, "Invalid credentials in Authorization header" if self.token else "Invalid username")
        if self.token != WRITER or owner != OWNER:
            raise Refused(403, f"You don't have the rights to write under the namespace {owner}")

    def repo(self, owner: str, name: str) -> Repo:
        if self.token not in ("", WRITER, READER):
            raise Refused(401, "Invalid credentials in Authorization header")
        found = self.hub.repos.get(f"{owner}/{name}")
        if found is None or (found.private and not self.token):
            # As the hub does for whoever may not know.
            raise Refused(404 if self.token else 401, "Repository not found", "RepoNotFound")
        return found

    def head(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        for commits in repo.branches.values():
            for digest, files, _ in commits:
                if digest == revision:
                    return digest, files
        if revision not in repo.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.branches[revision][-1][:2]

    def route(self, parts: list[str]) -> None:
        parts = [unquote(part) for part in parts]
        match self.command, parts:
            case "POST", ["api", "repos", "create"]:
                self.create()
            case "POST", ["api", "validate-yaml"]:
                self.validate()
            case "GET", ["api", "models", owner, name]:
                self.info(owner, name, "main")
            case "GET", ["api", "models", owner, name, "revision", revision]:
                self.info(owner, name, revision)
            case "GET", ["api", "models", owner, name, "tree", revision]:
                _, files = self.head(self.repo(owner, name), revision)
                self.say([self.entry(path, data) for path, data in files.items()])
            case "POST", ["api", "models", owner, name, "branch", branch]:
                self.writer(owner)
                repo = self.repo(owner, name)
                repo.branches[branch] = list(repo.branches["main"])
                self.say({})
            case "POST", ["api", "models", owner, name, "preupload", revision]:
                self.writer(owner)
                self.preupload(self.head(self.repo(owner, name), revision)[1])
            case "POST", [_, _, "info", "lfs", "objects", "batch"]:
                self.batch(parts[0])
            case "PUT", ["lfs", digest]:
                self.hub.received += len(self.body)
                assert hashlib.sha256(self.body).hexdigest() == digest
                self.hub.objects[digest] = self.body
                self.send(b"")
            case "POST", ["lfs-verify"]:
                asked = json.loads(self.body)
                assert len(self.hub.objects[asked["oid"]]) == asked["size"]
                self.say({})
            case "POST", ["api", "models", owner, name, "commit", branch]:
                self.writer(owner)
                self.commit(owner, name, branch)
            case "GET" | "HEAD", [owner, name, "resolve", revision, *path]:
                digest, files = self.head(self.repo(owner, name), revision)
                data = files["/".join(path)]
                self.send(data, headers={"ETag": f'"{oid("/".join(path), data)}"', "X-Repo-Commit": digest})
            case _:
                raise Refused(404, f"nothing at {self.path}")

    def create(self) -> None:
        asked = json.loads(self.body)
        self.writer(asked["organization"])
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            raise Refused(409, "You already created this model repo")
        repo = self.hub.repos[name] = Repo(asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.say({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self) -> None:
        text = json.loads(self.body)["content"]
        metadata = yaml.safe_load(text[4 : text.index("\n---", 3)])
        if metadata.get("license") == "other" and not metadata.get("license_name"):
            answer = {"errors": [{"message": '"license_name" is required'}], "warnings": []}
            self.send(json.dumps(answer).encode(), 400)
            return
        self.say({"errors": [], "warnings": []})

    def info(self, owner: str, name: str, revision: str) -> None:
        repo = self.repo(owner, name)
        digest, files = self.head(repo, revision)
        full = f"{owner}/{name}"
        siblings = [{"rfilename": path} for path in files]
        self.say(
            {"id": full, "modelId": full, "private": repo.private, "sha": digest, "siblings": siblings, "tags": []}
        )

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid(path, data)}
        if path.endswith(LFS_SUFFIXES):
            found["lfs"] = {"oid": oid(path, data), "size": len(data), "pointerSize": 134}
        return found

    def preupload(self, there: dict[str, bytes]) -> None:
        self.say(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                        "shouldIgnore": False,
                        "oid": oid(file["path"], there[file["path"]]) if file["path"] in there else None,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def batch(self, owner: str) -> None:
        self.writer(owner)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            if asked["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}"}
                asked["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}
            objects.append(asked)
        self.say({"transfer": "basic", "objects": objects})

    def commit(self, owner: str, name: str, branch: str) -> None:
        if self.hub.between is not None:
            self.hub.between()
            self.hub.between = None
        repo = self.repo(owner, name)
        digest, files = self.head(repo, branch)
        files, message = dict(files), ""
        for line in map(json.loads, self.body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, digest):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert key == "deletedFile"
                del files[value["path"]]
        made = repo.commit(branch, files, message)
        self.say({"success": True, "commitOid": made, "commitUrl": f"{self.hub.url}/{owner}/{name}/commit/{made}"})


def oid(path: str, data: bytes) -> str:
    """What identifies a file's contents: SHA-256 of LFS, git's hash of a blob otherwise."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A server on a free port of this machine, for as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None = WRITER) -> None:
    """Let huggingface_hub ask servers (the tests are offline otherwise), without Xet, with this token alone."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "no-token"))
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
