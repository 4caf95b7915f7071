"""Recommendation of layers: what is measured is what is said, within the budget, and a stopped run goes on."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import timm_nrpm
from timm_nrpm import NRPMConfig, Threat
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.layer_worth import Choice, LayerRecommendation
from timm_nrpm.evaluation.trials import Kept
from timm_nrpm.models.work import products
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.subnetworks.recommend import recommend_layers

THREAT = Threat("Linf", 0.05)
CONFIG = NRPMConfig(0.5, layers=("conv1", "layer1.*"))


def batches(start, stop):
    pixels, labels = (part[start:stop] for part in digits("test"))
    return list(zip(pixels.split(20), labels.split(20), strict=True))


@pytest.fixture(scope="module")
def model():
    return timm.create_model("resnet8_digits", pretrained=True).eval()


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = recommend_layers(model, batches(0, 20), THREAT, 1.0, report=batches(40, 60), config=CONFIG, folder=folder)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return result, folder


@pytest.mark.slow
def test_every_layer_of_the_config_is_measured(model, found):
    result, _ = found
    assert [each.name for each in result.worth] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    counted = products(model, torch.zeros(1, 1, 8, 8))
    assert [each.products for each in result.worth] == [counted[each.name] for each in result.worth]
    assert counted["conv1"] == 8 * 8 * model.conv1.weight.numel()
    assert sum(each.share for each in result.worth) < 1  # of the network, whose other layers are not looked at
    assert result.worth[0].share == pytest.approx(counted["conv1"] / sum(counted.values()))
    assert all(each.criticality > 0 for each in result.worth)
    assert all(each.connectivity is None for each in result.worth)  # too few images of a class
    assert (result.choices[0].layers, result.choices[0].share) == ((), 0.0)


@pytest.mark.slow
def test_a_layer_keeps_what_the_model_with_it_alone_reprogrammed_keeps(model, found):
    result, _ = found
    each = result.worth[0]
    reprogrammed = timm_nrpm.reprogram_(copy.deepcopy(model), replace(CONFIG, layers="conv1"))
    timm_nrpm.calibrate_(reprogrammed, [pixels for pixels, _ in batches(0, 20)])
    suite, effort = ("quick", "default") if each.is_bound else ("adaptive", "fast")
    report = timm_nrpm.evaluate(reprogrammed, batches(0, 20), THREAT, suite, effort=effort, seed=1, control=False)
    assert each.kept.threat == "".join(str(int(kept)) for kept in report.survivors)
    assert each.kept.clean == "".join(str(int(right)) for right in report.correct)


@pytest.mark.slow
def test_what_is_said_is_what_was_measured(model, found):
    result, _ = found
    report = timm_nrpm.evaluate(model, batches(40, 60), THREAT, effort="fast")
    assert result.plain.threat == "".join(str(int(each)) for each in report.survivors)
    text = str(result)
    assert all(each.name in text for each in result.worth)
    assert LayerRecommendation.from_json(result.to_json()) == result


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(model, found, monkeypatch):
    result, folder = found
    monkeypatch.setattr("timm_nrpm.subnetworks.recommend.evaluate", None)  # nothing is measured again
    again = recommend_layers(model, batches(0, 20), THREAT, 1.0, report=batches(40, 60), config=CONFIG, folder=folder)
    assert again == result
    with pytest.raises(ValueError, match=r"layers.jsonl holds another run \(.*threat"):
        recommend_layers(
            model, batches(0, 20), Threat("Linf", 0.06), report=batches(40, 60), config=CONFIG, folder=folder
        )


def kept(right, count=200):
    return Kept("1" * count, "1" * right + "0" * (count - right))


def test_layers_are_added_by_their_gain_for_their_products_within_the_budget(model, monkeypatch, tmp_path):
    """The measurements are made up here: what is tested is what follows from them."""
    gains = {(): 100, ("conv1",): 104, ("layer1.0.conv1",): 140, ("layer1.0.conv2",): 90}
    joint = {("conv1", "layer1.0.conv1"): 150}
    monkeypatch.setattr(
        "timm_nrpm.subnetworks.recommend._Run.kept",
        lambda self, names, suite, on_report=False: kept({**gains, **joint}[names]),
    )
    settings = {"report": batches(40, 60), "config": CONFIG}
    every = recommend_layers(model, batches(0, 20), THREAT, 1.0, **settings)
    assert every.layers == ("conv1", "layer1.0.conv1")
    # 40 images for 36,864 products go before 4 images for 4608.
    assert [choice.layers for choice in every.choices] == [(), ("layer1.0.conv1",), ("conv1", "layer1.0.conv1")]
    assert every.effect.points == 25
    nothing = recommend_layers(model, batches(0, 20), THREAT, 0.001, **settings)
    assert "conv1, layer1.0.conv1 gained on their own, and have more than 0.1 % of the products" in nothing.sentence
    assert "reprogram conv1, layer1.0.conv1" in every.sentence
    only = recommend_layers(model, batches(0, 20), THREAT, every.worth[0].share, **settings)
    assert [choice.layers for choice in only.choices] == [(), ("conv1",)]
    assert only.layers == ()  # two points of two hundred images cannot be told from chance
    assert "cannot be told from chance" in only.sentence
    gains |= dict.fromkeys([("conv1",), ("layer1.0.conv1",)], 99)
    none = recommend_layers(model, batches(0, 20), THREAT, 1.0, **settings)
    assert none.layers == ()
    assert "no layer gained anything" in none.sentence


@pytest.mark.slow
def test_the_front_has_what_nothing_cheaper_beats(found):
    choices = (
        Choice((), 0.0, kept(100)), Choice(("a",), 0.1, kept(120)), Choice(("a", "b"), 0.2, kept(110)),
        Choice(("c",), 0.3, kept(130)),
    )  # fmt: skip
    assert [choice.layers for choice in replace(found[0], choices=choices).front] == [(), ("a",), ("c",)]


def test_products_are_those_of_the_sums():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), nn.Flatten(), nn.Linear(6 * 9, 5, bias=False)
    )
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(1)
    found = products(model, torch.ones(1, 4, 7, 7))
    assert found == {"0": int(model[0](torch.ones(1, 4, 7, 7)).sum()), "2": int(model[2](torch.ones(1, 54)).sum())}


@pytest.mark.slow
def test_it_is_drawn(found, tmp_path):
    assert timm_nrpm.plot(found[0], tmp_path / "layers.png").stat().st_size > 10_000


@pytest.mark.parametrize("budget", [0, 1.5, -1])
def test_bad_settings_are_refused(model, budget):
    with pytest.raises(ValueError, match=r"budget=.*a share of the products"):
        recommend_layers(model, batches(0, 20), THREAT, budget, report=batches(40, 60))
    with pytest.raises(ValueError, match="gave no images"):
        recommend_layers(model, [], THREAT, report=batches(40, 60))


def test_layers_that_match_nothing_are_refused_behind_a_wrapper_as_well(model):
    with pytest.raises(ValueError, match="matches none"):
        recommend_layers(
            PixelModel(model), batches(0, 20), THREAT, report=batches(40, 60), config=NRPMConfig(0.5, layers="nothing")
        )
