"""What the double of the Hub answers, learned from what huggingface_hub asks (hf_api.py, lfs.py, _commit_api.py)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml

from tests.hub.state import Commit, File, Hub, Repository

LARGE = (".safetensors", ".gguf", ".bin", ".png")  # what .gitattributes of a new repository sends through LFS


class Refusal(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.body = status, json.dumps({"error": message}).encode()
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}


class Lost(Exception):
    """The connection ends here, without an answer."""


Answer = tuple[bytes, dict[str, str]]


def as_json(content: Any) -> Answer:
    return json.dumps(content).encode(), {"Content-Type": "application/json"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub  # set by serving_hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        self.path, _, self.query = self.path.partition("?")
        request = f"{self.command} {self.path}"
        try:
            with self.hub.lock:
                self.hub.log.append(request)
                trouble = next((one for one in self.hub.troubles if one.strikes(request)), None)
            half = trouble is not None and trouble.lost == "half"
            if half and self.command != "GET":
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                raise Lost
            self.body = self.read_body()
            if trouble is not None and trouble.status is not None:
                raise Refusal(trouble.status, message="a trouble of the server")
            with self.hub.lock:
                if trouble is not None and trouble.meanwhile is not None:
                    trouble.meanwhile()
                body, headers = self.route()
            if trouble is not None and trouble.lost == "answer":
                raise Lost
            self.send(headers.pop("Status", "200"), body, headers, sent=len(body) // 2 if half else None)
        except Refusal as refusal:
            self.send(str(refusal.status), refusal.body, {"Content-Type": "application/json", **refusal.headers})
        except (Lost, ConnectionError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, status: str, body: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        """`sent`: how many bytes of the body reach the other side, if not all."""
        self.send_response(int(status))
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        if sent is not None:
            raise Lost

    def route(self) -> Answer:
        for method, pattern, name in ROUTES:
            if re.fullmatch(method, self.command) and (match := re.fullmatch(pattern, self.path)):
                return getattr(self, name)(*(unquote(part) for part in match.groups()))
        raise Refusal(404, message=f"the double of the Hub has no {self.command} {self.path}")

    # ------------------------------------------------------------------------------------------------ who may do what

    def user(self) -> tuple[str, set[str]] | None:
        """The user of the token and the owners that it may write to; None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.hub.tokens:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def refuse_others(self, owner: str) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, message="Invalid username or password.")
        if owner not in user[1]:
            raise Refusal(403, message=f"You don't have the rights to create or change a model under {owner!r}")

    def repository(self, name: str, write: bool = False) -> Repository:
        user, owner = self.user(), name.split("/")[0]
        found = self.hub.repositories.get(name)
        if found is None or (found.private and (user is None or owner not in {user[0], *user[1]})):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write:
            self.refuse_others(owner)
        return found

    def commit_of(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    # --------------------------------------------------------------------------------------------------- repositories

    def create(self) -> Answer:
        wanted = self.json()
        owner = wanted.get("organization") or (self.user() or ("", ()))[0]
        self.refuse_others(owner)
        name = f"{owner}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repositories:
            raise Refusal(409, message="You already created this model repo")
        self.hub.repositories[name] = Repository(wanted.get("visibility") == "private")
        return as_json({"url": url, "name": name, "id": name})

    def information(self, name: str, revision: str = "main") -> Answer:
        repository = self.repository(name)
        commit = self.commit_of(repository, revision)
        return as_json(
            {"_id": "0", "id": name, "modelId": name, "author": name.split("/")[0], "sha": commit.id}
            | {"private": repository.private, "lastModified": commit.date, "createdAt": commit.date}
            | {"tags": [], "downloads": 0, "likes": 0}
            | {"siblings": [{"rfilename": path} for path in sorted(commit.files)]}
        )

    def refs(self, name: str) -> Answer:
        repository = self.repository(name)

        def listed(names: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": one, "ref": f"refs/{kind}/{one}", "targetCommit": to} for one, to in names.items()]

        branches, tags = listed(repository.branches, "heads"), listed(repository.tags, "tags")
        return as_json({"branches": branches, "tags": tags, "converts": []})

    def branch(self, name: str, branch: str) -> Answer:
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise Refusal(409, message="Reference already exists")
        repository.branches[branch] = self.commit_of(repository, self.json().get("startingPoint", "main")).id
        return as_json({})

    def tag(self, name: str, revision: str) -> Answer:
        repository, tag = self.repository(name, write=True), self.json()["tag"]
        if tag in repository.tags:
            raise Refusal(409, message="Tag reference exists already")
        repository.tags[tag] = self.commit_of(repository, revision).id
        return as_json({})

    def commits(self, name: str, revision: str) -> Answer:
        repository = self.repository(name)
        self.commit_of(repository, revision)
        history = repository.history(revision)
        listed = [{"id": one.id, "title": one.title, "message": one.message, "date": one.date} for one in history]
        return as_json([{**one, "authors": [{"user": "me"}]} for one in listed])

    # ---------------------------------------------------------------------------------------------------------- files

    def tree(self, name: str, revision: str, folder: str = "") -> Answer:
        files = self.commit_of(self.repository(name), revision).files
        inside = {path: path.removeprefix(folder) for path in sorted(files) if path.startswith(folder)}
        if folder and not inside:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        if parse_qs(self.query).get("recursive", ["false"])[0].lower() == "true":
            return as_json([files[path].described(path) for path in inside])
        folders = {folder + rest.split("/")[0] for rest in inside.values() if "/" in rest}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        return as_json([*entries, *(files[path].described(path) for path, rest in inside.items() if "/" not in rest)])

    def tree_below(self, name: str, revision: str, folder: str) -> Answer:
        return self.tree(name, revision, f"{folder}/")

    def paths(self, name: str, revision: str) -> Answer:
        files = self.commit_of(self.repository(name), revision).files
        wanted = parse_qs(self.body.decode()).get("paths") or self.json()["paths"]
        return as_json([files[path].described(path) for path in wanted if path in files])

    def resolve(self, name: str, revision: str, path: str) -> Answer:
        commit = self.commit_of(self.repository(name), revision)
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.id})
        file = commit.files[path]
        etag = f'"{file.sha256 if file.large else file.oid}"'
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes", "ETag": etag}
        headers["Content-Type"] = "application/octet-stream"
        if file.large:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(file.content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return file.content, headers
        first, last = int(wanted[1]), int(wanted[2] or len(file.content) - 1)
        headers |= {"Status": "206", "Content-Range": f"bytes {first}-{last}/{len(file.content)}"}
        return file.content[first : last + 1], headers

    def validate_card(self) -> Answer:
        metadata = re.match(r"---\n(.*?)\n---\n", self.json()["content"], re.DOTALL)
        try:
            yaml.safe_load(metadata[1] if metadata else "")
        except yaml.YAMLError as error:
            refusal = Refusal(400, message="Invalid metadata")
            refusal.body = json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode()
            raise refusal from None
        return as_json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> Answer:
        files = self.commit_of(self.repository(name, write=True), revision).files

        def known(path: str) -> str | None:
            file = files.get(path)
            return None if file is None else file.sha256 if file.large else file.oid

        def described(file: dict[str, Any]) -> dict[str, Any]:
            mode = "lfs" if file["path"].endswith(LARGE) or file["size"] > 10e6 else "regular"
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known(file["path"])}

        return as_json({"files": [described(file) for file in self.json()["files"]]})

    def batch(self, name: str) -> Answer:
        self.repository(name, write=True)

        def described(wanted: dict[str, Any]) -> dict[str, Any]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}
            return wanted if wanted["oid"] in self.hub.large else {**wanted, "actions": upload}

        return as_json({"transfer": "basic", "objects": [described(wanted) for wanted in self.json()["objects"]]})

    def upload(self, sha256: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(400, message="these bytes have another checksum")
        self.hub.large[sha256] = self.body
        return as_json({})

    def make_commit(self, name: str, branch: str) -> Answer:
        repository = self.repository(name, write=True)
        if branch not in repository.branches:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        files, lines = dict(repository.files(branch)), [json.loads(line) for line in self.body.splitlines()]
        head = next(line["value"] for line in lines if line["key"] == "header")
        if head.get("parentCommit") not in (None, repository.branches[branch]):
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refusal(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.large[value["oid"]], large=True)
            elif kind == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                assert kind == "header", kind
        done = repository.commit(files, head["summary"], head.get("description", ""), branch)
        url = f"{self.hub.endpoint}/{name}/commit/{done}"
        return as_json({"success": True, "commitOid": done, "commitUrl": url, "hookOutput": ""})


MODEL = "/api/models/([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_card"),
    ("GET", MODEL, "information"),
    ("GET", f"{MODEL}/revision/([^/]+)", "information"),
    ("GET", f"{MODEL}/refs", "refs"),
    ("POST", f"{MODEL}/branch/([^/]+)", "branch"),
    ("POST", f"{MODEL}/tag/([^/]+)", "tag"),
    ("GET", f"{MODEL}/commits/([^/]+)", "commits"),
    ("GET", f"{MODEL}/tree/([^/]+)", "tree"),
    ("GET", f"{MODEL}/tree/([^/]+)/(.+)", "tree_below"),
    ("POST", f"{MODEL}/paths-info/([^/]+)", "paths"),
    ("POST", f"{MODEL}/preupload/([^/]+)", "preupload"),
    ("POST", f"{MODEL}/commit/([^/]+)", "make_commit"),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/([0-9a-f]{64})", "upload"),
    ("GET|HEAD", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
]
