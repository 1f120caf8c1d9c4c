"""A Hub on this machine: the HTTP calls that huggingface_hub 2.4 makes for models, on threads, with faults on demand."""

import base64
import hashlib
import json
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from huggingface_hub import ModelCard

LFS = (".safetensors", ".onnx", ".png")
WRITE, READ = "hf_" + "w" * 30, "hf_" + "r" * 30  # the tokens that it knows
Json = dict[str, Any] | list[Any]


@dataclass
class Fault:
    """What goes wrong with the calls that match: an answer in place of the right one, or none.

    Args:
        call: a pattern of "METHOD /path".
        status: of the answer; 0 cuts the connection in the middle of the body.
        times: how often.
        late: the call takes effect, and only its answer goes wrong.
    """

    call: str
    status: int = 0
    times: int = 1
    message: str = "as the test wants it"
    headers: dict[str, str] = field(default_factory=dict)
    late: bool = False


@dataclass
class Repo:
    private: bool
    files: dict[str, dict[str, bytes]]  # commit -> path -> content
    branches: dict[str, list[str]]  # its commits, the last one last
    tags: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return self.tags.get(revision) or (revision if revision in self.files else None)


@dataclass(frozen=True)
class Call:
    line: str
    status: int
    received: int
    token: str


class LoopbackHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.calls: list[Call] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What is to be seen there."""
        repo = self.repos[name]
        return repo.files[repo.commit_of(revision) or ""]

    def create(self, name: str, private: bool) -> Repo:
        first = hashlib.sha1(name.encode()).hexdigest()
        self.repos[name] = Repo(private, {first: {".gitattributes": b"*.safetensors filter=lfs\n"}}, {"main": [first]})
        return self.repos[name]

    def handle_error(self, *_: object) -> None:
        """A cut connection is no news."""


class Refused(Exception):
    def __init__(self, status: int, message: str, url: str = "", **headers: str):
        self.status, self.message, self.url, self.headers = status, message, url, headers


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        line = f"{self.command} {path}"
        with self.server.lock:
            fault = next((f for f in self.server.faults if f.times > 0 and re.search(f.call, line)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status == 0 and not fault.late:
            self.cut(line)
            return
        body = self.body()
        status, headers, content = 500, {}, b""
        try:
            if fault is not None and not fault.late:
                raise Refused(fault.status, fault.message, **fault.headers)
            with self.server.lock:
                status, headers, content = self.route(path, body)
            if fault is not None and fault.status:
                raise Refused(fault.status, fault.message, **fault.headers)
        except Refused as refused:
            status, headers = refused.status, {"X-Error-Message": refused.message, **refused.headers}
            content = json.dumps({"error": refused.message, "url": refused.url}).encode()
        self.server.calls.append(Call(line, status, len(body), self.token))
        if fault is not None and fault.late and fault.status == 0:
            self.hang_up()
            return
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer

    def cut(self, line: str) -> None:
        """Hang up when half of the body is here."""
        half = int(self.headers.get("Content-Length") or 0) // 2
        self.server.calls.append(Call(line, 0, len(self.rfile.read(half)), self.token))
        self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def body(self) -> bytes:
        if (length := self.headers.get("Content-Length")) is not None:
            return self.rfile.read(int(length))
        whole = b""
        while "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            size = int(self.rfile.readline(), 16)
            whole += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                break
        return whole

    def route(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The right answer; the storage of large files knows no tokens, as presigned addresses do not."""
        if match := re.fullmatch(r"/_blobs/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                raise Refused(400, "other bytes than were announced")
            self.server.blobs[match[1]] = body
            return 200, {}, b""
        if self.token not in ("", WRITE, READ):
            raise Refused(401, "Invalid credentials in Authorization header")
        path = path.replace("/api/datasets/", "/api/models/datasets/")  # a dataset is called datasets/OWNER/NAME here
        if match := re.fullmatch(rf"/{NAME}/resolve/{REVISION}/(.+)", path):
            return self.resolve(*match.groups())
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                found = method(self, *filter(None, match.groups()), *([body] if body else []))
                return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
        raise Refused(404, f"nothing here: {path}")

    def repo(self, name: str, write: bool = False) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.token):
            raise Refused(404 if self.token else 401, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
        if write:
            self.may_write()
        return repo

    def may_write(self) -> None:
        if self.token != WRITE:
            raise Refused(403 if self.token else 401, "You don't have the rights to write here")

    def commit_at(self, repo: Repo, revision: str) -> str:
        if (commit := repo.commit_of(revision)) is None:
            raise Refused(404, "Invalid rev id", **{"X-Error-Code": "RevisionNotFound"})
        return commit

    def create(self, body: bytes) -> Json:
        self.may_write()
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repos:
            raise Refused(409, "You already created this model repo", f"{self.server.url}/{name}")
        self.server.create(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": f"{self.server.url}/{name}", "id": name, "name": name}

    def validate(self, body: bytes) -> Json:
        """As far as huggingface_hub itself knows what metadata is."""
        try:
            data = ModelCard(json.loads(body)["content"]).data
        except ValueError as error:
            raise Refused(400, str(error)) from error
        if data.get("base_model_relation", "finetune") not in ("adapter", "merge", "quantized", "finetune"):
            raise Refused(400, "base_model_relation is none of those that the Hub knows")
        return {"errors": [], "warnings": []}

    def info(self, name: str, revision: str | None = None) -> Json:
        repo = self.repo(name)
        commit = self.commit_at(repo, revision or "main")
        siblings = [{"rfilename": path} for path in repo.files[commit]]
        return {"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []}

    def refs(self, name: str) -> Json:
        repo = self.repo(name)
        listed = {branch: commits[-1] for branch, commits in repo.branches.items() if not branch.startswith("refs/")}
        return {
            kind: [{"name": ref, "ref": f"refs/{ref}", "targetCommit": commit} for ref, commit in refs.items()]
            for kind, refs in (("branches", listed), ("tags", repo.tags), ("converts", {}))
        }

    def commits(self, name: str, revision: str) -> Json:
        repo = self.repo(name)
        last = self.commit_at(repo, revision)
        history = next(commits for commits in repo.branches.values() if last in commits)
        return [
            {"id": commit, "title": "", "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
            for commit in reversed(history)
        ]

    def branch(self, name: str, branch: str, body: bytes) -> Json:
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[branch] = [self.commit_at(repo, json.loads(body)["startingPoint"])]
        return {}

    def tag(self, name: str, revision: str, body: bytes) -> Json:
        repo = self.repo(name, write=True)
        tag = json.loads(body)["tag"]
        if tag in repo.tags:
            raise Refused(409, "Tag reference exists already")
        repo.tags[tag] = self.commit_at(repo, revision)
        return {}

    def preupload(self, name: str, revision: str, body: bytes) -> Json:
        repo = self.repo(name, write=True)
        there = repo.files[self.commit_at(repo, revision)]
        return {"files": [self.mode(asked["path"], there.get(asked["path"])) for asked in json.loads(body)["files"]]}

    def mode(self, path: str, content: bytes | None) -> Json:
        large, oid = path.endswith(LFS), None
        if content is not None:
            git = hashlib.sha1(b"blob %d\0" % len(content) + content)
            oid = hashlib.sha256(content).hexdigest() if large else git.hexdigest()
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, name: str, body: bytes) -> Json:
        self.repo(name, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            put = {"upload": {"href": f"{self.server.url}/_blobs/{asked['oid']}"}}
            objects.append(asked | ({} if asked["oid"] in self.server.blobs else {"actions": put}))
        return {"transfer": "basic", "objects": objects}

    def commit(self, name: str, revision: str, body: bytes) -> Json:
        repo = self.repo(name, write=True)
        before = self.commit_at(repo, revision)
        header, *lines = [json.loads(line) for line in body.splitlines()]
        propose = "create_pr=1" in self.path
        if header["value"].get("parentCommit", before) != before and not propose:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files[before])
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                files.pop(value["path"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] in self.server.blobs:
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                raise Refused(400, "a large file that was not uploaded")
        made = hashlib.sha1(body + before.encode()).hexdigest()
        repo.files[made] = files
        url, answer = f"{self.server.url}/{name}", {}
        if propose:
            number = sum(branch.startswith("refs/pr/") for branch in repo.branches) + 1
            repo.branches[f"refs/pr/{number}"] = [*repo.branches[revision], made]
            answer = {"pullRequestUrl": f"{url}/discussions/{number}"}
        else:
            repo.branches[revision].append(made)
        return {"commitUrl": f"{url}/commit/{made}", "commitOid": made, "success": True, **answer}

    def tree(self, name: str, revision: str, folder: str = "") -> Json:
        repo = self.repo(name)
        whole = repo.files[self.commit_at(repo, revision)]
        prefix = f"{folder}/" if folder else ""
        files = {path: data for path, data in whole.items() if path.startswith(prefix)}
        if not files:
            raise Refused(404, "Entry not found", **{"X-Error-Code": "EntryNotFound"})
        entries = {path: self.entry(path, data) for path, data in files.items()}
        if "recursive=true" not in self.path.lower():
            for path in files:
                name, is_below, _ = path.removeprefix(prefix).partition("/")
                if is_below:
                    del entries[path]
                    entries[prefix + name] = self.entry(prefix + name)
        return list(entries.values())

    def entry(self, path: str, data: bytes | None = None) -> dict[str, Any]:
        size = {"type": "directory"} if data is None else {"type": "file", "size": len(data)}
        return {"path": path, "oid": "0" * 40} | size

    def paths(self, name: str, revision: str, body: bytes) -> Json:
        repo = self.repo(name)
        files = repo.files[self.commit_at(repo, revision)]
        asked = urllib.parse.parse_qs(body.decode())["paths"]
        folders = [path for path in asked if any(file.startswith(f"{path}/") for file in files)]
        return [self.entry(path, files.get(path)) for path in asked if path in files or path in folders]

    def resolve(self, name: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        repo = self.repo(name)
        commit = self.commit_at(repo, revision)
        if path not in repo.files[commit]:
            raise Refused(404, "Entry not found", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = repo.files[commit][path]
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
        }
        return 200, headers, data


NAME = r"((?:datasets/)?[\w.-]+/[\w.-]+)"
REVISION = r"(refs/\w+/[\w.-]+|[^/]+)"
MODEL = rf"/api/models/{NAME}"
ROUTES: dict[str, Callable[..., Json]] = {
    r"POST /api/repos/create": Handler.create,
    r"POST /api/validate-yaml": Handler.validate,
    rf"GET {MODEL}": Handler.info,
    rf"GET {MODEL}/revision/(.+)": Handler.info,
    rf"GET {MODEL}/refs": Handler.refs,
    rf"GET {MODEL}/commits/(.+)": Handler.commits,
    rf"POST {MODEL}/branch/(.+)": Handler.branch,
    rf"POST {MODEL}/tag/(.+)": Handler.tag,
    rf"POST {MODEL}/preupload/(.+)": Handler.preupload,
    r"POST /([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch": Handler.batch,
    rf"POST {MODEL}/commit/(.+)": Handler.commit,
    rf"GET {MODEL}/tree/{REVISION}(?:/(.+))?": Handler.tree,
    rf"POST {MODEL}/paths-info/{REVISION}": Handler.paths,
}
