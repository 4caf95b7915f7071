import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from timm_nrpm.data.ordering import Order, ordered, seed_of


class Noisy(Dataset):
    """Every image is noise from all three generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index):
        noise = torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))], dtype=torch.float64)
        return noise, torch.tensor(index)


def numbers(loader) -> list[list[int]]:
    return [rows.tolist() for _, rows in loader]


def test_seeds_of_neighbours_have_nothing_in_common():
    seeds = [seed_of(a, b, c) for a in range(20) for b in range(20) for c in range(20)]
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert len(set(seeds)) > 8000 - 20  # 8000^2 / 2^33 chance meetings are 0.007
    bits = np.unpackbits(np.array(seeds, dtype=np.uint32).view(np.uint8)).reshape(len(seeds), 32)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.03
    assert np.abs((bits[1:] ^ bits[:-1]).mean(0) - 0.5).max() < 0.03


def test_the_order_is_a_function_of_seed_and_epoch():
    sampler = RandomSampler(range(100))
    orders = []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        order = Order(sampler, seed)
        order.epoch = epoch
        torch.rand(epoch + 1)  # the global generator is elsewhere
        orders.append(list(order))
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(100))
    assert len({tuple(o) for o in orders}) == 3


@given(skip=st.integers(0, 30), count=st.integers(0, 25), epoch=st.integers(0, 3))
def test_what_is_skipped_is_the_beginning(skip, count, epoch):
    shuffled = RandomSampler(range(count + 1), generator=torch.Generator())
    for sampler in (SequentialSampler(range(count)), shuffled):
        order = Order(sampler, 3)
        order.epoch = epoch
        whole = list(order)
        order.skip = skip
        assert list(order) == whole[skip:]
        assert len(order) == len(whole[skip:])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_and_its_augmentation_depend_on_seed_epoch_and_number_alone(workers):
    options = {"batch_size": 5, "shuffle": True, "num_workers": workers, "persistent_workers": workers > 0}
    loader, order, numbered = ordered(DataLoader(Noisy(), **options), seed=7)
    epochs = []
    for epoch in (0, 1, 0):
        order.epoch = epoch
        numbered.epoch.fill_(epoch)
        epochs.append({int(n): x.tolist() for (pixels, _), rows in loader for n, x in zip(rows, pixels, strict=True)})
    assert epochs[0] == epochs[2]
    assert epochs[0].keys() == epochs[1].keys() == set(range(12))
    values = [tuple(x) for epoch in epochs[:2] for x in epoch.values()]
    assert len({v for x in values for v in x}) == 2 * 12 * 3  # no generator repeats itself
    order.skip, order.epoch = 5, 1
    numbered.epoch.fill_(1)
    for (pixels, labels), rows in loader:
        assert torch.equal(labels, rows)
        assert all(epochs[1][int(n)] == x.tolist() for n, x in zip(rows, pixels, strict=True))


@given(count=st.integers(1, 25), multiple=st.integers(1, 9), taken=st.integers(0, 9))
def test_an_epoch_that_is_taken_up_ends_like_the_whole_one(count, multiple, taken):
    """Filled up to even batches with the same images, which accelerate would take from what is left."""
    order = Order(RandomSampler(range(count)), 3)
    order.multiple = multiple
    whole = list(order)
    assert len(whole) == len(order) == -(-count // multiple) * multiple
    assert whole[count:] == (whole * multiple)[: len(whole) - count]
    order.skip = min(taken * multiple, len(whole))
    assert list(order) == whole[order.skip :]
    assert len(order) == len(whole) - order.skip


@pytest.mark.parametrize("make", [
    lambda g: SubsetRandomSampler(range(3, 30), generator=g),
    lambda g: WeightedRandomSampler(torch.ones(30), 20, generator=g),
    lambda g: RandomSampler(range(30), generator=g),
])  # fmt: skip
def test_a_sampler_with_its_own_generator_gives_the_same_order_again(make):
    order = Order(make(torch.Generator()), 5)
    first = list(order)
    assert list(order) == first
    order.epoch = 1
    assert list(order) != first


def test_the_users_loader_is_kept():
    data = TensorDataset(torch.arange(10.0))

    def together(items):
        return torch.stack([x for (x,) in items]) * 2

    options = {"batch_size": 3, "drop_last": True, "collate_fn": together, "sampler": [9, 8, 7, 6, 5, 4, 3, 2]}
    loader, _, _ = ordered(DataLoader(data, **options), seed=0)
    batches = list(loader)
    assert [b.tolist() for b, _ in batches] == [[18, 16, 14], [12, 10, 8]]
    assert numbers(loader) == [[9, 8, 7], [6, 5, 4]]


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1)


class Own(torch.utils.data.BatchSampler):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [torch.zeros(1)], "is a list: give a torch DataLoader"),
        (lambda: DataLoader(Stream(), batch_size=2), "reads a stream"),
        (
            lambda: DataLoader(range(4), sampler=DistributedSampler(range(4), 2, 0)),
            "has a DistributedSampler, which shar",
        ),
        (lambda: DataLoader(range(4), batch_size=None), "makes its batches itself"),
        (lambda: DataLoader(range(4), batch_sampler=Own(range(4), 2, False)), "batch sampler of its own, Own"),
    ],
)
def test_what_could_not_be_taken_up_again_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        ordered(make(), 0)
