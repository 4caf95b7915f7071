"""Rows of all processes, by two that take turns in this one."""

import pytest
import torch

from timm_nrpm.jobs import processes
from timm_nrpm.jobs.processes import with_others
from timm_nrpm.tuning.losses import separation

FEATURES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1, 0, 2])


def in_process(monkeypatch, rank: int, features=FEATURES) -> None:
    """Let this be one of two processes, which have half of the features and of the labels each."""
    halves = {tuple(whole.shape[1:]): whole.chunk(2) for whole in (features, LABELS)}

    def all_gather(rows, sent):
        for row, part in zip(rows, halves[tuple(sent.shape[1:])], strict=True):
            row.copy_(part)

    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(processes.dist, "all_gather", all_gather)


@pytest.mark.parametrize(
    "loss",
    [
        lambda features, labels: with_others(features).square().sum(1).logsumexp(0),
        lambda features, labels: with_others(features).sum(1).mean(),
    ],
    ids=["log of a sum", "mean"],
)
def test_gradients_average_to_those_of_one_process(monkeypatch, loss):
    """As DistributedDataParallel averages them: of a weight that all rows are multiplied by."""
    weight = torch.ones(4, requires_grad=True)
    whole = loss(FEATURES * weight, LABELS)
    (want,) = torch.autograd.grad(whole, weight)
    slopes = []
    for rank in (0, 1):
        in_process(monkeypatch, rank)
        value = loss(FEATURES.chunk(2)[rank] * weight, LABELS.chunk(2)[rank])
        assert float(value.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
        slopes.append(torch.autograd.grad(value, weight)[0])
    torch.testing.assert_close((slopes[0] + slopes[1]) / 2, want)


def test_one_process_has_no_others():
    assert with_others(FEATURES) is FEATURES


def test_the_separation_sees_the_images_of_all(monkeypatch):
    normal = torch.nn.functional.normalize(FEATURES, dim=1)
    want = separation(FEATURES, LABELS, 0.5)
    for rank in (0, 1):
        in_process(monkeypatch, rank, normal)  # features are of length 1 when processes exchange them
        torch.testing.assert_close(separation(normal.chunk(2)[rank], LABELS.chunk(2)[rank], 0.5), want)
