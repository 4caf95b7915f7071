"""Critical fine-tuning: what it moves, how far it goes, and what it leaves as it was."""

from dataclasses import replace

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm import NRPMConfig, Threat, TuneConfig
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.trials import Kept
from timm_nrpm.models.interpolation import between
from timm_nrpm.models.reprogramming import is_settled
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.subnetworks.critical_tuning import CriticalTuning, Step, critical_tuning
from timm_nrpm.subnetworks.criticality import criticality
from timm_nrpm.subnetworks.networks import some_of
from timm_nrpm.subnetworks.splitting import layer_parameters

THREAT = Threat("Linf", 0.1)
CONFIG = TuneConfig(objective="clean", optimizer="momentum", lr=0.05, epochs=1)


@pytest.fixture
def model():
    return timm.create_model("resnet8_digits", pretrained=True).eval()


def training(count: int = 96) -> DataLoader:
    pixels, labels = digits("train")
    return DataLoader(TensorDataset(pixels[:count], labels[:count]), batch_size=32, shuffle=True)


def selection(count: int = 40):
    pixels, labels = (part[:count] for part in digits("test"))
    return list(zip(pixels.split(20), labels.split(20), strict=True))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("is_reprogrammed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_only_the_least_critical_layer_moves_and_by_the_chosen_share(model, is_reprogrammed):
    if is_reprogrammed:
        timm_nrpm.reprogram_(model, NRPMConfig(lam=0.8))
    before, flags = state(model), {n: p.requires_grad for n, p in model.named_parameters()}
    names = layer_parameters(model)
    rises = criticality(PixelModel(model).eval(), some_of(training(), 24), names, THREAT, attack_steps=2)
    settings = {"config": CONFIG, "shares": (0.5, 1.0), "tolerance": 1.0, "attack_steps": 2, "measured": 24}
    found = critical_tuning(model, training(), selection(), THREAT, **settings)
    assert found.criticality == pytest.approx(rises)
    assert found.layer == min(rises, key=rises.get)
    assert [step.share for step in found.steps] == [0.0, 0.5, 1.0]
    assert found.chosen.share == 1.0  # anything is allowed at this tolerance
    differing = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"{found.layer}.weight"} <= differing <= {f"{found.layer}.weight", f"{found.layer}.bias"}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    report = timm_nrpm.evaluate(model, selection(), THREAT, "quick", steps=2, control=False)
    assert "".join(str(int(each)) for each in report.survivors) == found.chosen.kept.threat
    assert bool(timm_nrpm.lambdas(model)) == is_reprogrammed
    assert not is_reprogrammed or is_settled(model)


def test_half_the_way_lies_between_the_old_weights_and_the_tuned_ones(model):
    before = model.fc.weight.detach().clone()
    settings = {"config": CONFIG, "layer": "fc", "tolerance": 1.0, "attack_steps": 1}
    other = timm.create_model("resnet8_digits", pretrained=True).eval()
    critical_tuning(model, training(), selection(), THREAT, shares=(1.0,), **settings)
    found = critical_tuning(other, training(), selection(), THREAT, shares=(0.5,), **settings)
    assert found.criticality == {}
    torch.testing.assert_close(other.fc.weight, (before + model.fc.weight) / 2)


def kept(clean: int, attacked: int) -> Kept:
    return Kept(*("1" * count + "0" * (20 - count) for count in (clean, attacked)))


@pytest.mark.parametrize(
    ("attacked", "tolerance", "share"),
    [
        ((10, 10, 10, 9), 0.0, 0.6),  # the largest that loses nothing
        ((10, 9, 10, 8), 0.0, 0.6),  # although a smaller one loses some
        ((10, 9, 8, 7), 0.0, 0.0),
        ((10, 9, 8, 7), 0.05, 0.3),
        ((10, 9, 8, 7), 0.1, 0.6),
        ((10, 9, 8, 11), 0.0, 1.0),
    ],
)
def test_the_largest_step_within_the_tolerance_is_chosen(attacked, tolerance, share):
    steps = tuple(Step(s, kept(15, count)) for s, count in zip((0.0, 0.3, 0.6, 1.0), attacked, strict=True))
    found = CriticalTuning("fc", {"fc": 0.1}, "Linf 0.1", tolerance, steps)
    assert found.chosen.share == share
    assert CriticalTuning.from_json(found.to_json()) == found
    assert str(found).startswith(f"fc, {100 * share:g} % of the way to its weights tuned on clean images: +0.0")


def test_if_every_step_loses_some_the_model_stays_as_it_was(model):
    before = state(model)
    wild = replace(CONFIG, lr=5.0, clip=None, epochs=2)
    found = critical_tuning(model, training(), selection(), THREAT, layer="conv1", config=wild, shares=(0.9, 1.0))
    assert found.chosen.share == 0.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_failure_leaves_the_model_as_it_was(model):
    class Broken(TensorDataset):
        def __getitem__(self, index):
            if index == 90:
                raise RuntimeError("the disk of the images is gone")
            return super().__getitem__(index)

    before = state(model)
    pixels, labels = digits("train")
    loader = DataLoader(Broken(pixels[:96], labels[:96]), batch_size=8)
    with pytest.raises(RuntimeError, match="is gone"):
        critical_tuning(model, loader, selection(), THREAT, layer="fc", config=CONFIG)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not timm_nrpm.lambdas(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": (0.0,)}, "shares=0.0.*a share of the way"),
        ({"tolerance": -0.1}, "tolerance=-0.1.*a share of the images"),
        ({"attack_steps": 0}, "attack_steps=0"),
        ({"measured": 0}, "measured=0"),
        ({"layer": "nope"}, "layer='nope' is not known: choose one of conv1"),
        ({"config": TuneConfig(objective="pgd")}, "objective='pgd'.*one layer is tuned on clean images"),
        ({"config": TuneConfig(objective="clean", trainable="fc.*")}, "trainable=.*neither of the others"),
        ({"config": TuneConfig(objective="clean", calibrate=64)}, "calibrate=64, which would move the statistics"),
    ],
)
def test_bad_settings_are_refused_before_any_work(model, settings, message):
    before = state(model)
    with pytest.raises(ValueError, match=message):
        critical_tuning(model, training(), selection(), THREAT, **settings)
    with pytest.raises(ValueError, match="gave no images"):
        critical_tuning(model, training(), [], THREAT)
    with pytest.raises(ValueError, match="training is a list"):
        critical_tuning(model, selection(), selection(), THREAT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_between_is_exact_at_its_ends_and_keeps_counts():
    ours = {"w": torch.randn(3, dtype=torch.float64), "n": torch.tensor(4)}
    theirs = {"w": torch.randn(3, dtype=torch.float64), "n": torch.tensor(9), "more": torch.zeros(1)}
    assert torch.equal(between(ours, theirs, 0)["w"], ours["w"])
    assert torch.equal(between(ours, theirs, 1)["w"], theirs["w"])
    torch.testing.assert_close(between(ours, theirs, 0.25)["w"], 0.75 * ours["w"] + 0.25 * theirs["w"])
    assert int(between(ours, theirs, 1)["n"]) == 4
    with pytest.raises(ValueError, match=r"w \[3\] is not in both models"):
        between(ours, {"w": torch.zeros(2)}, 0.5)
    with pytest.raises(ValueError, match=r"share=1\.5"):
        between(ours, theirs, 1.5)
