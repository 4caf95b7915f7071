"""The outcome of a push to the Hub."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """The outcome of a push.

    Attributes:
        repo_id: The repository, `owner/name`.
        commit: The commit that holds the variant; None for a dry run.
        url: Address of the repository's page at that commit; None for a dry run.
        files: Size of every file of the variant, in bytes, by name.
        uploaded: Names of the files that the Hub did not have already.
        deleted: Names of the files of an earlier variant that this one does not have.
        pull_request: Address of the pull request, if one was asked for.
        notes: Sentences on what became of the evaluation that the repository held before, on what else it lost, and on
            who may see it now, if that changed.
        collection: Address of the collection that holds the repository, if one was asked for.
    """

    repo_id: str
    commit: str | None
    url: str | None
    files: dict[str, int]
    uploaded: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    pull_request: str | None = None
    notes: tuple[str, ...] = ()
    collection: str | None = None

    def __str__(self) -> str:
        if self.commit is None:
            lines = [f"Nothing was sent. {self.repo_id} would hold:"]
        elif not self.uploaded and not self.deleted:
            lines = [f"{self.repo_id} holds all of it already, at commit {self.commit[:12]}: nothing was sent."]
        else:
            lines = [f"{self.repo_id}: {self.pull_request or self.url}"]
        state = {True: "sent", False: "there already"} if self.commit else {True: "", False: ""}
        lines += [f"  {name:22} {size:>10,} bytes  {state[name in self.uploaded]}" for name, size in self.files.items()]
        lines += [f"  {name:22} deleted" for name in self.deleted]
        lines += [f"In the collection {self.collection}"] if self.collection else []
        return "\n".join([*(line.rstrip() for line in lines), *self.notes])
