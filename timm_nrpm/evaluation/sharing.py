"""Batches that are shared among the processes of an evaluation, and journals from which they continue."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from rich.progress import Progress
from torch import Tensor

from timm_nrpm.data.images import check_batch, check_labels, count_of
from timm_nrpm.evaluation.controls import KeptJudge
from timm_nrpm.evaluation.judge import Judge, Places
from timm_nrpm.evaluation.outcome import Outcome
from timm_nrpm.jobs.journal import Journal, digest_of

if TYPE_CHECKING:
    from accelerate import Accelerator

Part = TypeVar("Part")

TOGETHER = 256
"""Largest number of images, in several batches, that are judged together, so that those which are still right fill
whole batches. A run that is killed loses as many at most."""

VALUES = 1 << 20
"""Largest number of values in their pixels: an image of 224 x 224 has 150 thousand, and passes of such images gain
nothing from each other."""


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
        labels: Class of each image of all batches.
    """

    digests: list[str]
    rows: dict[int, Row]
    labels: list[int]


@dataclass(frozen=True)
class Batch:
    """A batch of the loader.

    Attributes:
        number: Number of the batch, counted from 0.
        offset: Number of images in the batches before it.
        pixels, labels: Images `[B, C, H, W]` in [0, 1], and their classes `[B]`.
        digest: Hash of images and labels.
    """

    number: int
    offset: int
    pixels: Tensor
    labels: Tensor
    digest: str


def _batches(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
    offset = 0
    for number, batch in enumerate(loader):
        pixels, labels = check_batch(batch)
        labels = check_labels(labels, count=len(pixels))
        pixels = pixels.float()  # half precision could not keep within the bound
        yield Batch(number, offset, pixels, labels, digest_of(pixels, labels))
        offset += len(labels)


def _joins(group: Sequence[Batch], batch: Batch) -> bool:
    """Return whether a batch is judged together with those of a group."""
    if not group:
        return True
    images = sum(len(each.labels) for each in (*group, batch))
    few = images <= TOGETHER and images * batch.pixels[0].numel() <= VALUES
    return few and group[0].pixels.shape[1:] == batch.pixels.shape[1:]


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
    digests: list[str] = []
    labels: list[int] = []
    group: list[Batch] = []

    def judge_group() -> None:
        done = len(digests) - len(group)

        def tell(judge: int, share: float, activity: str) -> None:
            completed = done + len(group) * (judge + share) / len(judges)
            bar.update(task, completed=completed, description=f"Evaluating: {activity}")

        if group:
            _judge_group(judges, group, journal, tell)
            group.clear()

    for batch in _batches(loader):
        if batch.number % processes == rank and not journal.has(batch.number, batch.digest):
            if not _joins(group, batch):
                judge_group()
            group.append(batch)
        digests.append(batch.digest)
        labels += batch.labels.tolist()
        bar.update(task, completed=len(digests) - len(group))
    judge_group()
    if not digests:
        raise ValueError("The loader gave no images: there is nothing to evaluate.")
    bar.update(task, completed=len(digests))
    if surplus := [number for number in journal.rows if number >= len(digests)]:
        raise ValueError(
            f"{journal.path} holds {len(surplus)} batches more than the {len(digests)} that the loader gave: give the "
            "loader it was written with, or another file."
        )
    rows = {
        number: Row(tuple(map(Outcome.from_dict, row["judged"])), tuple(row["warnings"]))
        for number, row in journal.rows.items()
    }
    return Share(digests, rows, labels)


def _judge_group(
    judges: Sequence[Judge | KeptJudge],
    group: Sequence[Batch],
    journal: Journal,
    tell: Callable[[int, float, str], None],
) -> None:
    """Judge some batches together, and write a row for each of them into the journal.

    Args:
        judges: Judge of the model and, if there is a control, that of the plain model.
        group: The batches.
        journal: Journal of this process.
        tell: Function that is called with the number of the judge, the share of its work that is done, and a
            description of the current attack.
    """
    sizes = [len(batch.labels) for batch in group]
    numbers = [batch.offset + row for batch in group for row in range(len(batch.labels))]
    pixels, labels = torch.cat([batch.pixels for batch in group]), torch.cat([batch.labels for batch in group])
    with recorded_warnings() as warning_texts:
        outcomes = [
            judge(pixels, labels, Places(numbers, sizes), partial(tell, i)).split(sizes)
            for i, judge in enumerate(judges)
        ]
    for batch, *judged in zip(group, *outcomes, strict=True):
        row = {"images": batch.digest, "judged": [outcome.to_dict() for outcome in judged]}
        journal.add(batch.number, {**row, "warnings": warning_texts})


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
