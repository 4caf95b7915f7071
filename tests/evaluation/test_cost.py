"""What a model costs: the arithmetic of the estimate, what it grows with, what is refused, and the report."""

import copy
import time

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import timm_nrpm
from timm_nrpm import NRPMConfig
from timm_nrpm.evaluation import cost as room
from timm_nrpm.evaluation.cost import cost
from timm_nrpm.evaluation.cost_report import CostReport
from timm_nrpm.evaluation.machine import ATTENTION, CURVED, ELEMENTWISE, POOLED, WEIGHTS, Machine, Rates
from timm_nrpm.evaluation.speed import STEPS, _with_steps, machine_of
from timm_nrpm.evaluation.stopwatch import peak_bytes, seconds_of
from timm_nrpm.models.work import LAYER_KINDS, LayerWork, Work
from timm_nrpm.nn.pixel_model import PixelModel

KINDS = (*LAYER_KINDS, WEIGHTS)
RATES = st.fixed_dictionaries({kind: st.floats(1e6, 1e13) for kind in KINDS})


def machine(threads=2):
    plain = Rates(1e-5, dict.fromkeys(LAYER_KINDS, 1e9) | {WEIGHTS: 1e8})
    estimate = Rates(1e-4, dict.fromkeys(LAYER_KINDS, 1e8) | {WEIGHTS: 1e7})
    other = Rates(1e-6, {ELEMENTWISE: 1e9, CURVED: 1e8, POOLED: 1e7, ATTENTION: 1e10})
    return Machine("cpu", threads, 3, plain, estimate, other)


def digits(**settings):
    return timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5, **settings).eval()


def test_the_arithmetic_of_a_layer_and_of_the_rest():
    layer = LayerWork("conv", "pointwise", products=4_000_000, outputs=1, weights=1000)
    assert machine().layer(layer, estimated=False) == pytest.approx(1e-5 + (4e-3 + 1e-5) / 2)
    assert machine(1).layer(layer, estimated=True) == pytest.approx(1e-4 + 4e-2 + 1e-4)
    depthwise = LayerWork("conv", "depthwise", products=4_000_000, outputs=1_000_000, weights=0)
    assert machine(1).layer(depthwise, estimated=False) == pytest.approx(1e-5 + 1e-3)
    assert machine(1).layer(depthwise, estimated=True) == pytest.approx(1e-4 + 4e-2)
    work = Work(calls=7, moved=1000, curved=200, pooled=30, products=4000)
    assert machine().rest(work) == pytest.approx(7e-6 + (1e-6 + 2e-6 + 3e-6 + 4e-7) / 2)


def test_an_estimate_takes_no_less_than_the_plain_layer():
    fast = Machine("cpu", 1, 1, machine().plain, Rates(0.0, dict.fromkeys(KINDS, 1e12)), machine().other)
    layer = LayerWork("conv", "linear", 1_000_000, 1000, 10)
    assert fast.layer(layer, estimated=True) == fast.layer(layer, estimated=False)


@given(RATES, RATES, st.integers(1, 60), st.integers(1, 60))
def test_time_grows_with_the_steps_whatever_the_probes_say(few, many, steps, more):
    rates = [_with_steps(Rates(0.0, few), Rates(0.0, many), k) for k in sorted((steps, more))]
    assert all(rates[0].rates[kind] >= rates[1].rates[kind] > 0 for kind in KINDS)
    at_probes = _with_steps(Rates(0.0, few), Rates(0.0, many), STEPS[1])
    for kind in KINDS:
        assert at_probes.rates[kind] == pytest.approx(min(few[kind], many[kind]))


def test_time_is_linear_in_the_steps():
    few, many = Rates(0.0, dict.fromkeys(KINDS, 1 / 2)), Rates(0.0, dict.fromkeys(KINDS, 1 / 4))
    assert _with_steps(few, many, 11).rates["linear"] == pytest.approx(1 / 12)


def test_a_probe_of_this_machine():
    found = machine_of(torch.device("cpu"), torch.float32, NRPMConfig(iterations=2).estimator)
    assert found.iterations == 2
    assert set(found.plain.rates) == set(found.estimate.rates) == set(KINDS)
    assert set(found.other.rates) == {ELEMENTWISE, CURVED, POOLED, ATTENTION}
    assert all(1e5 < rate < 1e14 for family in (found.plain, found.estimate) for rate in family.rates.values())
    assert found.estimate.rates["convolution"] < found.plain.rates["convolution"]


def test_a_cost_grows_with_the_steps_the_layers_and_the_batch():
    by_steps = [cost(digits(iterations=k)).seconds for k in (1, 2, 3, 8)]
    assert by_steps == sorted(by_steps)
    by_layers = [cost(digits(layers=f"first:{n}")).seconds for n in (1, 4, 9)] + [cost(digits()).seconds]
    assert by_layers == sorted(by_layers)
    one, four = cost(digits()), cost(digits(), batch=4)
    assert four.products == one.products
    assert four.memory > one.memory
    assert four.rest_seconds > one.rest_seconds


@pytest.fixture
def fixed(monkeypatch):
    """A machine whose speed is known, which is asked for this estimate."""
    asked = []
    monkeypatch.setattr(room, "machine_of", lambda device, dtype, estimator: asked.append(estimator) or machine())
    return asked


def test_what_a_report_adds_up(fixed):
    model = digits(layers="first:2", iterations=5)
    report = cost(model)
    assert fixed[0].iterations == 5
    assert [layer.name for layer in report.layers if layer.estimated] == ["conv1", "layer1.0.conv1"]
    first = report.layers[0]
    assert (first.kind, first.products, first.parameters) == ("convolution", 64 * 72, 73)
    assert first.seconds == pytest.approx(1e-4 + (64 * 72 / 1e8 + 72 / 1e7) / 2)
    assert report.seconds == pytest.approx(sum(layer.seconds for layer in report.layers) + report.rest_seconds)
    assert report.slowdown == report.seconds / report.plain_seconds > 1
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.memory - report.plain_memory == torch.get_num_threads() * room.PANEL
    assert report.plain_memory > 4 * report.parameters
    assert CostReport.from_json(report.to_json()) == report


def test_a_plain_model_and_lambda_one_cost_what_the_plain_model_costs(fixed):
    plain = cost(timm.create_model("resnet8_digits").eval())
    one = cost(timm_nrpm.create_model("resnet8_digits", lam=1.0))
    assert fixed == [None, None]
    assert plain.seconds == one.seconds == one.plain_seconds
    assert plain.memory == plain.plain_memory


def test_standard_units_cost_the_plain_layer_of_one_image_more(fixed):
    usual, standard = cost(digits(), batch=2), cost(digits(standardize=True), batch=2)
    for layer, other in zip(usual.layers, standard.layers, strict=True):
        assert other.seconds == pytest.approx(layer.seconds + layer.plain_seconds / 2)


def test_a_wrapped_model_and_another_size_and_type(fixed):
    model = digits()
    assert cost(PixelModel(model)).layers == cost(model).layers
    wide = cost(model, (16, 8))
    assert wide.image == cost(model, (1, 16, 8)).image == (1, 16, 8)
    assert wide.layers[0].products == 2 * cost(model, 8).layers[0].products
    half = cost(model.double(), 8)
    assert half.plain_memory > 1.5 * cost(model.float(), 8).plain_memory


def test_a_module_that_is_not_timms_needs_a_size(fixed):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    report = cost(timm_nrpm.reprogram_(net, NRPMConfig(0.5)), 8)
    assert (report.model, report.image) == ("Sequential", (3, 8, 8))
    assert [layer.products for layer in report.layers] == [4 * 36 * 27, 4 * 36 * 2]


REFUSED = {
    "meta": (lambda: digits().to("meta"), {}, "on the meta device.*whose weights are in memory"),
    "size unknown": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), {}, "does not say what size.*give image_size="),
    "size too small": (digits, {"image_size": 0}, "image_size=0 is not allowed: give an integer >= 1 pixels"),
    "a word": (digits, {"image_size": "8"}, "image_size='8' is not allowed: give H, \\(H, W\\) or \\(C, H, W\\)"),
    "four numbers": (digits, {"image_size": (1, 1, 8, 8)}, r"image_size=\(1, 1, 8, 8\) is not allowed"),
    "channels": (digits, {"image_size": (3, 8, 8)}, r"does not run on images \[1, 3, 8, 8\].*give the size"),
    "batch": (digits, {"batch": 0}, "batch=0 is not allowed: give an integer >= 1 images"),
    "no layer": (lambda: nn.Sequential(nn.BatchNorm2d(3)), {"image_size": 8}, "calls no convolutional or linear layer"),
    "no parameters": (nn.ReLU, {"image_size": 8}, "has no parameters"),
    "no module": (lambda: "resnet18", {}, "give a torch.nn.Module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_measured(case, fixed):
    make, arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        cost(make(), **arguments)
    assert not fixed


def test_what_is_measured(fixed, monkeypatch):
    monkeypatch.setattr(room, "SECONDS", 0.05)
    report = cost(digits(), measured=True)
    assert 0 < report.measured.plain_seconds < 1
    assert 0 < report.measured.seconds < 1
    if report.measured.memory is not None:
        assert report.measured.memory >= 4 * report.parameters
    assert CostReport.from_json(report.to_json()) == report
    assert "Measured: " in str(report)


def test_the_table_shows_what_takes_longest_and_the_totals(fixed):
    report = cost(timm_nrpm.create_model("resnet18", lam=0.5, num_classes=10), 32)
    lines = str(report).splitlines()
    assert lines[0] == report.verdict
    assert "with the estimate in 21 of 21 layers" in lines[0]
    shown = [line.split()[0] for line in lines[2:12]]
    longest = sorted(report.layers, key=lambda layer: -layer.seconds)[:10]
    assert shown == [layer.name for layer in longest]
    millions = [float(line.split()[1]) for line in lines[2:12]]
    rest, total = float(lines[12].removeprefix("all else").split()[0]), float(lines[13].split()[1])
    assert sum(millions) + rest == pytest.approx(total, abs=0.1)
    assert total == pytest.approx(report.products / 1e6, abs=0.01)


def test_nothing_is_changed(fixed):
    model = digits().train()
    before, threads, seed = copy.deepcopy(model.state_dict()), torch.get_num_threads(), torch.get_rng_state()
    cost(model)
    machine_of(torch.device("cpu"), torch.float64, None)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), seed)


def test_the_stopwatch():
    calls, prepared = [], []
    spent = seconds_of(lambda: calls.append(sum(range(20_000))), 0.01, prepare=lambda: prepared.append(1))
    assert len(calls) == len(prepared) == 1 + len(spent) >= 5
    assert 0 < min(spent) < 0.1
    slow = []
    seconds_of(lambda: slow.append(time.sleep(0.01)), 0.0005)
    assert len(slow) == 2
    peak = peak_bytes(lambda: torch.ones(1 << 24), "cpu")
    assert peak is None or 0.9 * 2**26 <= peak < 2**27
