"""Batches that are shared among the processes of an evaluation, and journals from which they continue."""

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
from timm_nrpm.evaluation.controls import KeptJudge
from timm_nrpm.evaluation.judge import Judge
from timm_nrpm.evaluation.outcome import Outcome
from timm_nrpm.jobs.journal import Journal, digest_of

if TYPE_CHECKING:
    from accelerate import Accelerator

Part = TypeVar("Part")


def shard_of(resume: str | Path | None, rank: int, processes: int) -> Path | None:
    """Return the path of a process's journal: `resume` for a single process, else `resume` with the rank at its end.

    Raises:
        ValueError: The run was started with several processes and continues with one, or the other way round.
    """
    if resume is None:
        return None
    alone, first = Path(resume), Path(f"{resume}.0")
    if (first if processes == 1 else alone).exists() and not (alone if processes == 1 else first).exists():
        before = "several processes" if processes == 1 else "one process"
        raise ValueError(f"The run in {resume} was started with {before}: use as many again, or give another file.")
    return alone if processes == 1 else Path(f"{resume}.{rank}")


@dataclass(frozen=True)
class Row:
    """Outcomes of one batch.

    Attributes:
        outcomes: Outcome of the model and, if there is a control, that of the plain model.
        warnings: Texts of the warnings raised while the batch was attacked.
    """

    outcomes: tuple[Outcome, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """Share of one process in the evaluation.

    Attributes:
        digests: Hashes of all batches in their order, including those of other processes.
        rows: Outcomes of the batches of this process, by the number of the batch.
    """

    digests: list[str]
    rows: dict[int, Row]


def judge_all(
    judges: Sequence[Judge | KeptJudge],
    loader: Iterable[tuple[Tensor, Tensor]],
    journal: Journal,
    bar: Progress,
    rank: int,
    processes: int,
) -> Share:
    """Judge the batches of this process that the journal does not hold yet, and return its share.

    Args:
        judges: Judge of the model and, if there is a control, that of the plain model.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, the same in every process.
        journal: Journal of this process.
        bar: Progress bar to update.
        rank: Number of this process, counted from 0.
        processes: Number of all processes.

    Raises:
        ValueError: The loader gave no images, or other batches than those in the journal.
    """
    task = bar.add_task("Evaluating", total=count_of(loader))
    offset, digests = 0, []
    for number, batch in enumerate(loader):
        pixels, labels = check_batch(batch)
        labels = check_labels(labels, count=len(pixels))
        pixels = pixels.float()  # half precision could not keep within the bound
        digests.append(digest_of(pixels, labels))
        if number % processes == rank and not journal.has(number, digests[-1]):

            def tell(share: float, activity: str, judge: int, number: int = number) -> None:
                done = number + (judge + share) / len(judges)
                bar.update(task, completed=done, description=f"Evaluating: {activity}")

            with recorded_warnings() as warning_texts:
                outcomes = [judge(pixels, labels, offset, partial(tell, judge=i)) for i, judge in enumerate(judges)]
            judged = [outcome.to_dict() for outcome in outcomes]
            journal.add(number, {"images": digests[-1], "judged": judged, "warnings": warning_texts})
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
    """Return the rows of all processes in the order of their batches."""
    if any(share.digests != shares[0].digests for share in shares):
        raise ValueError(
            "The processes were given different images: give each the same loader, not shuffled, and not prepared by "
            "accelerate, since the batches are shared here."
        )
    rows = {number: row for share in shares for number, row in share.rows.items()}
    return [rows[number] for number in sorted(rows)]


def together(accelerator: Accelerator | None, work: Callable[[], Part]) -> list[Part]:
    """Return the results of `work` in all processes. If it fails in one, it fails in all, so that none waits."""
    if accelerator is None or accelerator.num_processes == 1:
        return [work()]
    from accelerate.utils import gather_object

    failure: Exception | None = None
    result: Part | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    everyone = gather_object([(result, message)])
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(everyone):
        if message is not None:
            raise RuntimeError(f"Process {rank} failed, and the evaluation with it: {message}")
    return [part for part, _ in everyone]


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """Collect the texts of all warnings raised inside the context, and raise these warnings again afterwards."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        yield texts
        texts += dict.fromkeys(str(warning.message) for warning in caught)
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
