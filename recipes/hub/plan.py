"""What a push has to do: the files that are wanted, beside those that the Hub says it has, with their checksums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash
from tqdm import tqdm

# What transformers loads by name: of a model that has no such file any more, an old one would be loaded all the same.
# Whatever else stands in a repository is somebody's, and stays.
LOADED = (
    *("model*.safetensors", "model.safetensors.index.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)


@dataclass(frozen=True)
class Head:
    """A branch as it is: the id of its newest commit, None where there is no such branch yet; its files by path."""

    commit: str | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)

    def differs(self, other: Head) -> set[str]:
        """Paths whose content is another, or that only one of the two has."""
        mine = {path: file.blob_id for path, file in self.files.items()}
        theirs = {path: file.blob_id for path, file in other.files.items()}
        return {path for path in mine.keys() | theirs.keys() if mine.get(path) != theirs.get(path)}


@dataclass(frozen=True)
class Plan:
    """The changes that make a branch what is wanted; none where it is that already."""

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
    """The plan that takes a branch from `head` to the files that are wanted."""
    wanted, there = tuple(wanted), head.files
    add = tuple(one for one in wanted if one.path_in_repo not in there or not is_same(one, there[one.path_in_repo]))
    paths = {one.path_in_repo for one in wanted}
    stale = sorted(path for path in there.keys() - paths if any(fnmatch(path, name) for name in LOADED))
    if "config.json" not in paths:  # no model, but something that stands beside it
        stale = []
    return Plan(wanted, head, add, tuple(path for path in stale if "/" not in path))


def is_same(wanted: CommitOperationAdd, there: RepoFile) -> bool:
    """By size and checksum: SHA-256 of a large file, git's of another; a file is read only where the size agrees."""
    if wanted.upload_info.size != there.size:
        return False
    if there.lfs is not None:
        return wanted.upload_info.sha256.hex() == there.lfs.sha256
    with wanted.as_file() as file:
        return git_hash(file.read()) == there.blob_id


def human_size(count: int) -> str:
    """`649MB`, in decimal units as the Hub shows them."""
    return tqdm.format_sizeof(count, "B") if count >= 1000 else f"{count}B"
