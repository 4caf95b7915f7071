"""The order of the images, and their augmentation, as a function of the seed, the epoch and the image alone.

So a run that was killed resumes in the middle of an epoch as if nothing had happened, and two processes together see
what one would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import chain, cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from timm_nrpm.data.images import check_batch


def seed_of(*numbers: int) -> int:
    """A 32-bit seed from several numbers; neighbouring numbers give unrelated seeds."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:  # splitmix64
        mixed = (mixed + number * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**32


class Numbered(Dataset[Any]):
    """A dataset that also gives each image's number, and whose randomness depends on seed, epoch and number alone.

    Attributes:
        epoch: Number of the epoch, in shared memory, so that persistent workers see it change.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        seed = seed_of(self.seed, int(self.epoch), index)
        random.seed(seed)
        np.random.seed(seed)
        # torch.manual_seed would also look for every kind of device, which takes half a millisecond.
        torch.default_generator.manual_seed(seed)
        return self.dataset[index], index


class Order(Sampler[int]):
    """The indices that a sampler gives in an epoch, without the first `skip`.

    Attributes:
        epoch: Number of the epoch, which decides the order.
        skip: Number of indices to leave out at the beginning.
        multiple: Number of images that all processes take at once. An epoch is filled up to a multiple of it with its
            own first images, as accelerate would do; but accelerate would take others after a restart, when it sees an
            epoch without the skipped ones.
    """

    def __init__(self, sampler: Sampler[int], seed: int) -> None:
        self.sampler, self.seed = sampler, seed
        self.epoch = self.skip = 0
        self.multiple = 1

    def __len__(self) -> int:
        filled = -(-len(self.sampler) // self.multiple) * self.multiple  # type: ignore[arg-type]
        return max(0, filled - self.skip)

    def __iter__(self) -> Iterator[int]:
        seed = seed_of(self.seed, self.epoch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            generator = getattr(self.sampler, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            order = list(self.sampler)
        missing = -len(order) % self.multiple
        yield from islice(chain(order, islice(cycle(order), missing)), self.skip, None)


class _Collate:
    """A collate function that adds the images' numbers to the batch of another one."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[tuple[Any, int]]) -> tuple[Any, Tensor]:
        return self.collate([item for item, _ in items]), torch.tensor([index for _, index in items])


def ordered(loader: DataLoader[Any], seed: int) -> tuple[DataLoader[Any], Order, Numbered]:
    """A loader of the same images in an order that can be resumed, each batch as `(batch, numbers [B])`.

    Returns:
        The loader, its sampler and its dataset.

    Raises:
        ValueError: `loader` is not a DataLoader over a dataset of known length in batches of a fixed size.
    """
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"The loader is a {type(loader).__name__}: give a torch DataLoader, which processes can share and a run "
            "can resume; for tensors, DataLoader(TensorDataset(pixels, labels), batch_size=64, shuffle=True)."
        )
    batch_sampler = type(loader.batch_sampler)
    if batch_sampler not in (BatchSampler, type(None)):
        raise ValueError(
            f"The loader has a batch sampler of its own, {batch_sampler.__name__}, which tuning would replace: give "
            "batch_size= and, if need be, sampler=."
        )
    if hasattr(loader.sampler, "num_replicas"):
        raise ValueError(
            f"The loader has a {type(loader.sampler).__name__}, which shares the images among processes, as tuning "
            "does by itself: give shuffle=True instead."
        )
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        raise ValueError(
            "The loader reads a stream, or makes its batches itself: a run over it could not be resumed. Give a "
            "DataLoader with a batch_size over a dataset with a length, such as timm's folder, tar and torch/ readers."
        )
    dataset, order = Numbered(loader.dataset, seed), Order(loader.sampler, seed)  # type: ignore[arg-type]
    resumable: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=loader.batch_size,
        sampler=order,
        drop_last=loader.drop_last,
        num_workers=loader.num_workers,
        collate_fn=_Collate(loader.collate_fn),
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
    return resumable, order, dataset


def first_images(loader: DataLoader[Any], count: int, size: int) -> Iterator[Tensor]:
    """The pixels `[B, C, H, W]` of the first images of epoch 0, for which every process takes the same.

    Args:
        loader: The loader that :func:`ordered` returned, whose epoch becomes 0.
        count: Number of images.
        size: Number of images in a batch: that of all processes together, since BatchNorm normalises by the batch while
            statistics are taken, and smaller batches would give others than one process does.
    """
    order: Any = loader.sampler
    numbered: Any = loader.dataset
    order.epoch = order.skip = 0
    numbered.epoch.zero_()
    rows = list(islice(order, min(count, len(order.sampler))))
    for start in range(0, len(rows), size):
        batch, _ = loader.collate_fn([numbered[i] for i in rows[start : start + size]])
        yield check_batch(batch)[0]
