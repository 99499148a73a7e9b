"""What the double of the Hub keeps, in memory: repositories, large files, tokens, and the troubles to come."""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

TOKEN = "hf_TheTokenOfTheTestsWhichNobodyMaySee"  # may write to `me` and `org`
READ_ONLY = "hf_ATokenThatMayReadOnly"


@dataclass(frozen=True)
class File:
    content: bytes
    large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """git's name of the blob; of a large file that of its pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        blob = pointer.encode() if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    def described(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return {**entry, "lfs": lfs} if self.large else entry


@dataclass(frozen=True)
class Commit:
    files: dict[str, File]
    parent: str | None
    title: str
    message: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(20))
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


class Repository:
    """Commits never change; branches and tags are names for them."""

    def __init__(self, private: bool = False):
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit({".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}, "initial commit")

    def commit(self, files: dict[str, File], title: str, message: str = "", branch: str = "main") -> str:
        """A commit on a branch: its files are `files`, and no others."""
        commit = Commit(dict(files), self.branches.get(branch), title, message)
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit.id

    def add(self, path: str, content: bytes, branch: str = "main") -> str:
        """What somebody else does: one file changed, by hand."""
        return self.commit({**self.files(branch), path: File(content)}, f"change {path}", branch=branch)

    def find(self, revision: str) -> Commit | None:
        name = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(name)

    def files(self, revision: str = "main") -> dict[str, File]:
        commit = self.find(revision)
        assert commit is not None, f"no revision {revision}"
        return commit.files

    def history(self, revision: str = "main") -> list[Commit]:
        """The newest first."""
        commits, commit = [], self.find(revision)
        while commit is not None:
            commits.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return commits


@dataclass
class Trouble:
    """What happens to requests whose `METHOD path` matches, `times` times, once `after` of them went well.

    `status` is answered instead; `lost` is a connection that is cut: in the middle of what is sent or downloaded
    ("half"), or after all was done, before the answer ("answer"); `meanwhile` is called first, and the request goes its
    way.
    """

    request: re.Pattern[str]
    after: int = 0
    times: int = 1
    status: int | None = None
    lost: str | None = None
    meanwhile: Callable[[], Any] | None = None

    def strikes(self, request: str) -> bool:
        if self.times == 0 or not self.request.search(request):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.times -= 1
        return True


@dataclass
class Hub:
    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256: what was uploaded, committed or not
    # Of each token its user, and whose repositories it may write to.
    tokens: dict[str, tuple[str, set[str]]] = field(
        default_factory=lambda: {TOKEN: ("me", {"me", "org"}), READ_ONLY: ("me", set())}
    )
    troubles: list[Trouble] = field(default_factory=list)
    log: list[str] = field(default_factory=list)  # `METHOD path` of every request
    lock: threading.RLock = field(default_factory=threading.RLock)

    def trouble(self, request: str, **kind: Any) -> None:
        """See Trouble; `request` is a regular expression, as in `PUT /lfs/`."""
        self.troubles.append(Trouble(re.compile(request), **kind))

    def asked(self, request: str) -> list[str]:
        return [line for line in self.log if re.search(request, line)]

    @property
    def uploads(self) -> int:
        """Large files that were sent."""
        return len(self.asked("^PUT /lfs/"))

    @property
    def environment(self) -> dict[str, str]:
        """What turns another process to this server, without a token."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
