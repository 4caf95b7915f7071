import random

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm import NRPMConfig, TuneConfig, reprogram_, tune
from timm_nrpm.data.loaders import digits
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.tuning.trainable import given_back, select_, set_modes_


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


def test_modules_that_are_named_stay_still(model):
    model.eval()
    select_(model, TuneConfig(paradigm="all"))
    set_modes_(model, still=("stem.*", "body.1", ""))
    assert {name for name, m in model.named_modules() if m.training} == {"stem", "body", "head", "body.0", "body.2"}
    with pytest.raises(ValueError, match=r"still='stam\.\*' matches no module\. Near names: stem"):
        set_modes_(model, still=("stam.*",))


# --- what the user froze -------------------------------------------------------------------------------------------


def freeze(model: nn.Module, *prefixes: str) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)


@pytest.mark.parametrize(
    ("settings", "frozen", "lams", "weights"),
    [
        ({"paradigm": "all"}, ("stem.0.weight",), EVERY_LAM, None),
        ({"paradigm": "all"}, ("stem.", "body.1."), EVERY_LAM, None),
        ({"paradigm": "all"}, ("stem.0.lam",), EVERY_LAM, None),  # which paradigm 1 had frozen anyway
        ({"paradigm": "lambda"}, ("",), EVERY_LAM, set()),  # of a model that is never trained
        ({"trainable": ("stem.*",)}, ("stem.",), {"stem.0.lam"}, {"stem.0.weight", "stem.0.bias", "stem.1.weight",
                                                                  "stem.1.bias"}),  # a name goes before
        ({"trainable": ("head.bias", "*.lam"), "paradigm": "all"}, ("",), EVERY_LAM, {"head.bias"}),
    ],
)  # fmt: skip
def test_what_the_user_froze_stays_frozen_unless_named(model, settings, frozen, lams, weights):
    freeze(model, *frozen)
    left = {name for name, p in model.named_parameters() if p.requires_grad}
    got = select_(model, TuneConfig(**settings))
    assert names(model, got[0]) == lams
    assert names(model, got[1]) == (left if weights is None else weights)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names(model, [*got[0], *got[1]])


@pytest.mark.parametrize("paradigm", ["lambda", "all"])
def test_a_learnable_lambda_that_the_user_froze_stays(model, paradigm):
    reprogram_(model, NRPMConfig(lam=0.5, learnable=True))
    freeze(model, "body.0.lam")
    assert names(model, select_(model, TuneConfig(paradigm=paradigm))[0]) == {"stem.0.lam", "head.lam"}
    freeze(model, "body.0.lam")
    assert "body.0.lam" in names(model, select_(model, TuneConfig(trainable="*.lam"))[0])


def test_a_frozen_norm_keeps_its_statistics(model):
    freeze(model, "stem.1.")
    select_(model, TuneConfig(paradigm="all"))
    set_modes_(model.eval())
    assert {name for name, m in model.named_modules() if not m.training} == {"stem.1"}


@pytest.mark.parametrize(
    ("settings", "learnable", "message"),
    [
        ({"paradigm": "all"}, False, r"paradigm='all' trains the weights, .* frozen.* trainable=, .*='lambda'"),
        ({"paradigm": "all"}, True, r"paradigm='all' trains the weights, .* frozen"),
        ({"paradigm": "lambda"}, True, r"every lambda .* frozen .* requires_grad"),
    ],
)
def test_where_everything_is_frozen_it_is_refused_before_any_work(tmp_path, settings, learnable, message):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.9, learnable=learnable)
    freeze(model, "")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        tune(model, images(), TuneConfig(**settings, epochs=1, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def images() -> DataLoader:
    return DataLoader(TensorDataset(*(t[:32] for t in digits("train"))), batch_size=16)


def test_tuning_everything_moves_nothing_that_is_frozen():
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.9)
    frozen = ("conv1.weight", "bn1.weight", "bn1.bias", "layer2.0.conv2.weight")
    freeze(model, *frozen)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tune(model, images(), TuneConfig(paradigm="all", objective="fgsm", eps=0.1, epochs=1, lr=0.1, lam_lr=0.1))
    after = model.state_dict()
    same = {key for key, value in before.items() if torch.equal(value, after[key])}
    weights = {name for name, _ in model.named_parameters()}
    assert same & weights == set(frozen)
    assert {"bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"} <= same
    assert not {"layer1.0.bn1.running_mean", "layer1.0.bn1.running_var"} & same
    assert {name for name, p in model.named_parameters() if not p.requires_grad and not name.endswith("lam")} == set(
        frozen
    )


# --- torch.inference_mode ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("paradigm", ["lambda", "all"])
def test_a_caller_without_gradients_tunes_all_the_same(mode, paradigm):
    config = TuneConfig(paradigm=paradigm, objective="fgsm", eps=0.1, epochs=1)
    want, got = (timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.9) for _ in range(2))
    tune(want, images(), config)
    with mode():
        tune(got, images(), config)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), got.state_dict().values(), strict=True))


def test_weights_of_inference_mode_are_refused():
    with torch.inference_mode():
        model = reprogram_(timm.create_model(DIGITS, pretrained=True), NRPMConfig(lam=0.9))
    for paradigm in ("lambda", "all"):
        with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
            tune(model, images(), TuneConfig(paradigm=paradigm, epochs=1))


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
