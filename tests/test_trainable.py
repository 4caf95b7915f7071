import random

import numpy as np
import pytest
import torch
from torch import nn

from timm_nrpm import NRPMConfig, TuneConfig, reprogram_
from timm_nrpm.trainable import given_back, select_, set_modes_


@pytest.fixture
def model() -> nn.Module:
    net = nn.Sequential()
    net.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
    net.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    net.head = nn.Linear(4, 2)
    return reprogram_(net, NRPMConfig(lam=0.5))


def names(model: nn.Module, parameters) -> set[str]:
    ours = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in ours}


EVERY_LAM = {"stem.0.lam", "body.0.lam", "head.lam"}


@pytest.mark.parametrize(
    ("settings", "lams", "weights"),
    [
        ({}, EVERY_LAM, set()),
        ({"paradigm": "all"}, EVERY_LAM, None),
        ({"trainable": "*.lam"}, EVERY_LAM, set()),
        ({"trainable": ("head.*",)}, {"head.lam"}, {"head.weight", "head.bias"}),
        ({"trainable": ("body.0.lam", "head.bias")}, {"body.0.lam"}, {"head.bias"}),
        ({"trainable": ("body.1.*",), "paradigm": "all"}, set(), {"body.1.weight", "body.1.bias"}),
    ],
)
def test_what_trains(model, settings, lams, weights):
    got = select_(model, TuneConfig(**settings))
    assert names(model, got[0]) == lams
    everything = {name for name, _ in model.named_parameters()}
    assert names(model, got[1]) == (everything - EVERY_LAM if weights is None else weights)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == names(model, [*got[0], *got[1]])


def test_what_is_not_there_is_refused(model):
    with pytest.raises(ValueError, match=r"trainable='heat\.\*' matches no parameter. Near names: head\.lam"):
        select_(model, TuneConfig(trainable=("head.*", "heat.*")))
    with pytest.raises(ValueError, match="not reprogrammed"):
        select_(nn.Linear(2, 2), TuneConfig())
    with pytest.raises(ValueError, match="whatever lambda is"):
        select_(reprogram_(nn.Linear(2, 2), NRPMConfig(penalty="l2")), TuneConfig())


@pytest.mark.parametrize(
    ("settings", "training"),
    [
        ({}, set()),
        ({"paradigm": "all"}, {"", "stem", "body", "head", "stem.0", "stem.1", "stem.2", "stem.3", "body.0", "body.1",
                               "body.2"}),
        ({"trainable": ("head.*",)}, {"", "head"}),
        ({"trainable": ("body.1.*", "*.lam")}, {"", "body", "body.1", "body.2"}),
    ],
)  # fmt: skip
def test_modes_follow_what_trains(model, settings, training):
    """A frozen BatchNorm keeps its statistics, and a frozen block its dropout off."""
    model.eval()
    select_(model, TuneConfig(**settings))
    set_modes_(model)
    assert {name for name, m in model.named_modules() if m.training} == training


def test_everything_is_given_back(model):
    model.train()
    model.body.eval()
    model.head.bias.requires_grad_(False)
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    torch.manual_seed(4), random.seed(4), np.random.seed(4)
    want = torch.rand(()), random.random(), np.random.rand()
    torch.manual_seed(4), random.seed(4), np.random.seed(4)
    with pytest.raises(ZeroDivisionError), given_back(model):  # noqa: PT012
        select_(model, TuneConfig(paradigm="all"))
        set_modes_(model)
        model.head(torch.rand(2, 4)).sum().backward()
        torch.rand(5), random.random(), np.random.rand()
        1 / 0  # noqa: B018
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert (torch.rand(()), random.random(), np.random.rand()) == want
