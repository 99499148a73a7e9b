"""A model repository on the Hub: reads its revisions, and changes one in a single commit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from recipes.hub.errors import Conflict, HubAway, as_user_errors, may_pass, of_upload, status_of
from recipes.hub.plan import Head, Plan, compare, human_size
from recipes.hub.revisions import MAIN
from sinkmodel.console import say
from sinkmodel.errors import UserError, first_line
from sinkmodel.secrets import redacted

LARGE = 1 << 20  # bytes; a file of this size or more is sent by itself, and logged


class Repository:
    """The repository ORG/NAME. Errors of huggingface_hub pass through; use `errors.as_user_errors` around calls."""

    def __init__(self, name: str):
        self.name, self.api = name, HfApi()
        self.sent: list[str] = []  # large files that the Hub has now, but that are in no commit yet
        self.changed: dict[str, None] = {}  # branches that have a new commit of ours, in order

    def url(self, branch: str = MAIN) -> str:
        return redacted(f"{self.api.endpoint}/{self.name}{'' if branch == MAIN else f'/tree/{branch}'}")

    def exists(self) -> bool:
        return self.api.repo_exists(self.name)

    def make(self, private: bool) -> None:
        """Create it if it does not exist. Raises UserError if it exists and is public, but `private` is True."""
        if not self.exists():
            self.api.create_repo(self.name, private=private or None, exist_ok=True)  # None: the owner's default
        elif private and not self.api.repo_info(self.name).private:
            raise UserError(
                f"{self.url()} exists already and is public; make it private in its settings, or leave out --private"
            )

    def can_be_seen(self) -> bool:
        """Whether the repository can be read; if not, print the reason."""
        try:
            with as_user_errors(self.name):
                self.branches()
            return True
        except UserError as error:
            say(f"{error}: this shows a push to an empty repository")
            return False

    def branches(self) -> dict[str, str]:
        """Commit ids by name."""
        return {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.name).branches}

    def tags(self) -> dict[str, str]:
        return {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.name).tags}

    def head(self, branch: str) -> Head:
        commit = self.branches().get(branch)
        if commit is None:
            return Head()
        entries = self.api.list_repo_tree(self.name, recursive=True, revision=commit)
        return Head(commit, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)})

    def note(self, branch: str) -> str:
        """The description of a branch's newest commit."""
        return self.api.list_repo_commits(self.name, revision=branch)[0].message

    def text(self, path: str, branch: str) -> str | None:
        """The content of a small file of a branch; None if there is no such file."""
        with TemporaryDirectory() as folder:
            try:
                copy = self.api.hf_hub_download(self.name, path, revision=branch, local_dir=folder)
            except (RemoteEntryNotFoundError, RevisionNotFoundError):
                return None
            except LocalEntryNotFoundError as error:  # the Hub did not answer, so it may exist
                raise HubAway(
                    f"{self.api.endpoint} does not send {path} ({first_line(error.__cause__ or error)})"
                ) from None
            return Path(copy).read_bytes().decode("utf-8", errors="replace")

    def plan(self, files: Mapping[str, Path | bytes], branch: str | None) -> Plan:
        """The plan that gives these files to a branch, or to a new branch if `branch` is None."""
        wanted = [CommitOperationAdd(path, source) for path, source in files.items()]
        return compare(wanted, Head() if branch is None else self.head(branch))

    def carry_out(self, plan: Plan, branch: str, title: str, note: str = "") -> None:
        """Carry out the whole plan in one commit; if the plan is empty, do nothing.

        Large files are sent first, so that they need not be sent again if a later request fails. If somebody else has
        committed since the plan was made, our commit goes on top if it touches other files; else Conflict is raised.
        """
        if not plan:
            return
        if plan.head.commit is None:
            if branch != MAIN:
                self._make_branch(branch)
            plan = compare(plan.wanted, self.head(branch))
        self._send(plan, branch)
        try:
            self._commit(plan, branch, title, note)
        except HTTPError as error:
            if status_of(error) != 412 and not may_pass(error):
                raise
            # The head has moved, or an answer was lost: compare again, and try a second time, but not a third.
            then, plan = plan.head, compare(plan.wanted, self.head(branch))
            if theirs := sorted(plan.paths & then.differs(plan.head)):
                raise Conflict(
                    f"somebody else has changed {', '.join(theirs)} on {branch} of {self.name} in the meantime; "
                    f"nothing was overwritten: look at {self.url(branch)}, and run the same command again to put "
                    "ours on top"
                ) from None
            if plan:  # else our commit is there
                self._commit(plan, branch, title, note)
        self.sent.clear()
        self.changed[branch] = None

    def _make_branch(self, branch: str) -> None:
        """Branch from the first commit, which is empty, so that a checkpoint does not inherit main's other files."""
        first = self.api.list_repo_commits(self.name, revision=MAIN)[-1].commit_id
        self.api.create_branch(self.name, branch=branch, revision=first, exist_ok=True)

    def _send(self, plan: Plan, branch: str) -> None:
        """Send the files that the Hub stores as LFS or Xet, without a commit: large ones first, one by one."""
        for one in plan.add:
            if one.upload_info.size >= LARGE:
                say(f"sending {one.path_in_repo}, {human_size(one.upload_info.size)}")
                self._upload([one], branch)
                self.sent.append(one.path_in_repo)
        self._upload([one for one in plan.add if one.upload_info.size < LARGE], branch)

    def _upload(self, files: list[CommitOperationAdd], branch: str) -> None:
        try:
            self.api.preupload_lfs_files(self.name, files, revision=branch, free_memory=False)
        except (RuntimeError, OSError) as error:
            raise of_upload(error, self.name) from None

    def _commit(self, plan: Plan, branch: str, title: str, note: str) -> None:
        self.api.create_commit(
            self.name,
            plan.operations,
            commit_message=title,
            commit_description=note,
            revision=branch,
            parent_commit=plan.head.commit,
        )

    def tag(self, name: str, branch: str) -> None:
        self.api.create_tag(self.name, tag=name, revision=branch)

    def standing(self) -> str:
        """What this push has changed on the Hub so far, for a message about how to resume."""
        up = [
            *([several(self.changed)] if self.changed else []),
            *(f"{path}, not yet in a commit" for path in self.sent),
        ]
        return f"uploaded: {', '.join(up)}" if up else f"nothing was changed on {self.name}"


def several(names: Collection[str]) -> str:
    """All names if there are few, else the first, the last and the number."""
    first, *others = names
    return ", ".join(names) if len(names) < 8 else f"{first} … {others[-1]} ({len(names)} branches)"
