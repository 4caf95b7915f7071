"""Batches shared among the processes of an evaluation, and journals that outlive them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.progress import Progress
from torch import Tensor

from timm_nrpm.data.images import check_batch, check_labels, count_of
from timm_nrpm.evaluation.judge import Judge
from timm_nrpm.evaluation.outcome import Outcome
from timm_nrpm.jobs.journal import Journal, digest_of

if TYPE_CHECKING:
    from accelerate import Accelerator

Part = TypeVar("Part")


def shard_of(resume: str | Path | None, rank: int, processes: int) -> Path | None:
    """The journal of a process, of all those that share a run."""
    if resume is None:
        return None
    alone, first = Path(resume), Path(f"{resume}.0")
    if (first if processes == 1 else alone).exists() and not (alone if processes == 1 else first).exists():
        before = "several processes" if processes == 1 else "one process"
        raise ValueError(f"The run in {resume} was of {before}: go on with as many, or give another file.")
    return alone if processes == 1 else Path(f"{resume}.{rank}")


@dataclass(frozen=True)
class Row:
    """What became of one batch.

    Attributes:
        outcomes: Of the model, and of the plain model beside it if there is one.
        warnings: Texts of the warnings raised meanwhile.
    """

    outcomes: tuple[Outcome, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """What one process did.

    Attributes:
        digests: Hashes of all batches, its own and others', in their order.
        rows: What became of its own, by their number.
    """

    digests: list[str]
    rows: dict[int, Row]


def judge_all(
    judges: Sequence[Judge],
    loader: Iterable[tuple[Tensor, Tensor]],
    journal: Journal,
    bar: Progress,
    rank: int,
    processes: int,
) -> Share:
    """Judge the batches of this process that the journal does not have yet."""
    task = bar.add_task("Evaluating", total=count_of(loader))
    offset, digests = 0, []
    for number, batch in enumerate(loader):
        pixels, labels = check_batch(batch)
        labels = check_labels(labels, count=len(pixels))
        pixels = pixels.float()  # half precision could not keep within the bound
        digests.append(digest_of(pixels, labels))
        if number % processes == rank and not journal.has(number, digests[-1]):

            def tell(share: float, doing: str, judge: int, number: int = number) -> None:
                done = number + (judge + share) / len(judges)
                bar.update(task, completed=done, description=f"Evaluating: {doing}")

            with recorded_warnings() as raised:
                outcomes = [judge(pixels, labels, offset, partial(tell, judge=i)) for i, judge in enumerate(judges)]
            judged = [outcome.to_dict() for outcome in outcomes]
            journal.add(number, {"images": digests[-1], "judged": judged, "warnings": raised})
        offset += len(labels)
        bar.update(task, completed=number + 1)
    if not offset:
        raise ValueError("The loader gave no images: there is nothing to evaluate.")
    if surplus := [number for number in journal.rows if number >= len(digests)]:
        raise ValueError(
            f"{journal.path} holds {len(surplus)} batches more than the {len(digests)} that the loader gave: give the "
            "loader it was written with, or another file."
        )
    rows = {
        number: Row(tuple(map(Outcome.from_dict, row["judged"])), tuple(row["warnings"]))
        for number, row in journal.rows.items()
    }
    return Share(digests, rows)


def in_order(shares: Sequence[Share]) -> list[Row]:
    """The rows of all processes in the order of their batches."""
    if any(share.digests != shares[0].digests for share in shares):
        raise ValueError(
            "The processes were given different images: give each the same loader, not shuffled, and not prepared by "
            "accelerate, since the batches are shared here."
        )
    rows = {number: row for share in shares for number, row in share.rows.items()}
    return [rows[number] for number in sorted(rows)]


def together(accelerator: Accelerator | None, work: Callable[[], Part]) -> list[Part]:
    """What `work` gives in every process. Where it fails in one it fails in all, so that none waits for it."""
    if accelerator is None or accelerator.num_processes == 1:
        return [work()]
    from accelerate.utils import gather_object

    failure: Exception | None = None
    mine: Part | None = None
    try:
        mine = work()
    except Exception as error:
        failure = error
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    everyone = gather_object([(mine, message)])
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(everyone):
        if message is not None:
            raise RuntimeError(f"Process {rank} failed, and the evaluation with it: {message}")
    return [part for part, _ in everyone]


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """Texts of all warnings that are raised meanwhile; afterwards the warnings are raised again."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        yield texts
        texts += dict.fromkeys(str(warning.message) for warning in caught)
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
