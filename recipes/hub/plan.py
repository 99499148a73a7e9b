"""The changes that a push makes: the wanted files compared, by checksum, with those on the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash
from tqdm import tqdm

# Files that transformers loads by name. If the model no longer has one, an old copy on the Hub would still be loaded:
# it is deleted. All other files in a repository belong to its owner, and stay.
LOADED = (
    *("model*.safetensors", "model.safetensors.index.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)


@dataclass(frozen=True)
class Head:
    """The present state of a branch: the id of its newest commit (None if the branch does not exist), files by path."""

    commit: str | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)

    def differs(self, other: Head) -> set[str]:
        """Paths whose content differs, or that only one of the two has."""
        mine = {path: file.blob_id for path, file in self.files.items()}
        theirs = {path: file.blob_id for path, file in other.files.items()}
        return {path for path in mine.keys() | theirs.keys() if mine.get(path) != theirs.get(path)}


@dataclass(frozen=True)
class Plan:
    """The changes that give a branch the wanted files; empty if it has them already."""

    wanted: tuple[CommitOperationAdd, ...]
    head: Head
    add: tuple[CommitOperationAdd, ...]
    delete: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.add or self.delete)

    @property
    def paths(self) -> set[str]:
        return {*(one.path_in_repo for one in self.add), *self.delete}

    @property
    def bytes(self) -> int:
        return sum(one.upload_info.size for one in self.add)

    @property
    def operations(self) -> list[CommitOperationAdd | CommitOperationDelete]:
        return [*self.add, *(CommitOperationDelete(path) for path in self.delete)]


def compare(wanted: Iterable[CommitOperationAdd], head: Head) -> Plan:
    """The plan that takes a branch from `head` to the wanted files."""
    wanted, there = tuple(wanted), head.files
    add = tuple(one for one in wanted if one.path_in_repo not in there or not is_same(one, there[one.path_in_repo]))
    paths = {one.path_in_repo for one in wanted}
    stale = sorted(path for path in there.keys() - paths if any(fnmatch(path, name) for name in LOADED))
    if "config.json" not in paths:  # not a model, but a file beside it
        stale = []
    return Plan(wanted, head, add, tuple(path for path in stale if "/" not in path))


def is_same(wanted: CommitOperationAdd, there: RepoFile) -> bool:
    """Compare size, then checksum: SHA-256 of a large file, git's of a small one. Reads it only if the sizes agree."""
    if wanted.upload_info.size != there.size:
        return False
    if there.lfs is not None:
        return wanted.upload_info.sha256.hex() == there.lfs.sha256
    with wanted.as_file() as file:
        return git_hash(file.read()) == there.blob_id


def human_size(count: int) -> str:
    """`649MB`, in decimal units as the Hub shows them."""
    return tqdm.format_sizeof(count, "B") if count >= 1000 else f"{count}B"
