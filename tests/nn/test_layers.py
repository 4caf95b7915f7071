import copy
import dataclasses

import pytest
import timm.layers as timm_layers
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_nrpm import NRPMConfig, calibrate_, functional, lambdas, reprogram_, restore_
from timm_nrpm.nn import fitted
from timm_nrpm.nn.fitted import Correction, StandardUnits
from timm_nrpm.nn.layers import REPROGRAMMED, Reprogrammed

LAYERS = {
    "linear": (lambda: nn.Linear(12, 5), (4, 12)),
    "linear without bias": (lambda: nn.Linear(12, 5, bias=False), (2, 3, 12)),
    "timm linear": (lambda: timm_layers.Linear(12, 5), (4, 12)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 9)),
    "conv same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 8, 9)),
    "conv valid": (lambda: nn.Conv2d(4, 6, (3, 2), padding="valid", groups=2), (2, 4, 8, 9)),
    "conv reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 8, 9)),
    "conv replicate": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="replicate"), (2, 4, 8, 9)),
    "conv circular": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 8, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 8, 9)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (2, 4, 9)),
    "conv1d circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 1), stride=(2, 1, 1), padding=(1, 1, 0), groups=2), (3, 2, 5, 6, 3)),
    "conv3d dilated": (lambda: nn.Conv3d(2, 4, 2, padding="same", dilation=2), (2, 2, 5, 6, 4)),
    "conv3d replicate": (lambda: nn.Conv3d(2, 4, 2, padding=1, padding_mode="replicate"), (2, 2, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 4, 5)),
    "transposed with gaps": (lambda: nn.ConvTranspose2d(4, 6, (2, 3), (3, 4), output_padding=(2, 1)), (2, 4, 3, 4)),
    "timm same": (lambda: timm_layers.Conv2dSame(4, 6, 3, stride=2, dilation=2), (2, 4, 8, 9)),
    "std": (lambda: timm_layers.StdConv2d(4, 6, 3, bias=True), (2, 4, 8, 9)),
    "std same": (lambda: timm_layers.StdConv2dSame(4, 6, 3, stride=2, dilation=2), (2, 4, 8, 9)),
    "scaled std": (lambda: timm_layers.ScaledStdConv2d(4, 6, 3, gamma=1.7), (2, 4, 8, 9)),
    "scaled std same": (lambda: timm_layers.ScaledStdConv2dSame(4, 6, 3, stride=2, dilation=2), (2, 4, 8, 9)),
}
layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
WITH_UNITS = {name: each for name, each in LAYERS.items() if "transposed" not in name}
layers_with_units = pytest.mark.parametrize(("make", "shape"), WITH_UNITS.values(), ids=WITH_UNITS)


def test_every_kind_is_in_the_table():
    tested_elsewhere = {timm_layers.CondConv2d}  # which takes the weights of its experts as well
    assert {type(make()) for make, _ in LAYERS.values()} == set(REPROGRAMMED) - tested_elsewhere


@layers
def test_plain_settings_are_the_plain_layer_bit_for_bit(make, shape):
    layer, x = make(), torch.randn(shape)
    want = layer(x)
    for settings in ({"lam": 1.0}, {"lam": 0.0, "iterations": 0}, {"lam": 0.0, "penalty": "l2"}):
        assert torch.equal(reprogram_(layer, NRPMConfig(**settings))(x), want)
    assert type(restore_(layer)) is type(make())
    assert torch.equal(layer(x), want)


@layers
def test_the_layer_reads_the_same_numbers_as_the_plain_one(make, shape):
    """lambda just below 1 takes the other path: with next to no estimate in it, it must give the plain result."""
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    want = layer(x)
    torch.testing.assert_close(reprogram_(layer, NRPMConfig(lam=1 - 1e-6))(x), want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(reprogram_(layer, NRPMConfig(lam=0.5))(x), want)


@layers
def test_an_image_needs_no_batch(make, shape):
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    reprogram_(layer, NRPMConfig(lam=0.5))
    for lam in (0.5, 1.0):
        layer.lam.data.fill_(lam)
        torch.testing.assert_close(layer(x[-1]), layer(x)[-1])


def with_units(layer, distance=None):
    """A reprogrammed layer in units that no calibration would give."""
    layer.config = dataclasses.replace(layer.config, standardize=True)
    units = layer.add_part(StandardUnits)
    units.centre.uniform_(-1.0, 1.0)
    units.distance.uniform_(0.5, 2.0) if distance is None else units.distance.fill_(distance)
    return layer


@layers
@pytest.mark.parametrize("standard", [False, True])
def test_gradients(make, shape, standard):
    layer = reprogram_(make().double(), NRPMConfig(lam=0.6, iterations=2, eps=0.1, learnable=True))
    layer.lam.data = layer.lam.data.double()
    if standard and not isinstance(layer, nn.ConvTranspose2d):
        with_units(layer)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()), fast_mode=True)


@layers
@pytest.mark.parametrize("corrected", [False, True])
def test_linear_backward_keeps_the_values_and_has_the_gradient_of_the_linear_map(make, shape, corrected):
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plain = copy.deepcopy(layer)
    reprogram_(layer, NRPMConfig(lam=0.4, iterations=2, eps=0.1))
    if corrected:
        correction = layer.add_part(Correction)
        correction.gain.uniform_(0.5, 2.0)
        correction.offset.uniform_(-1.0, 1.0)
        with_units(layer)
    own = layer(x)
    layer.linear_backward = True
    got = layer(x)
    torch.testing.assert_close(got, own)
    direction = torch.randn_like(got)
    gain = layer.correction.gain if corrected else torch.ones(got.shape[layer.channel], dtype=torch.float64)
    through = direction * gain.view(-1, *[1] * (-layer.channel - 1))  # which is applied after the sum
    names = [name for name, _ in plain.named_parameters() if name != "bias"]
    slopes = torch.autograd.grad((got * direction).sum(), [x, *(layer.get_parameter(n) for n in names)])
    wanted = torch.autograd.grad((plain(x) * through).sum(), [x, *(plain.get_parameter(n) for n in names)])
    torch.testing.assert_close(slopes, wanted)
    assert not torch.allclose(torch.autograd.grad((own * direction).sum(), x)[0], slopes[0], atol=1e-3)


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_correction_is_for_what_is_mixed(monkeypatch, readable, dtype):
    """Where lambda cannot be read, as in a graph, the device chooses: the same numbers come out."""
    monkeypatch.setattr(fitted, "is_readable", lambda lam: readable)
    gain, offset = torch.tensor([0.5, 2.0, 3.0]), torch.tensor([1.0, -1.0, 0.25])
    z, correction = torch.randn(2, 3, 4, 4, dtype=dtype), Correction(-3, gain, offset)
    for lam in (1.0, 1.5):
        assert torch.equal(correction(z, torch.tensor(lam)), z)
    want = gain.view(3, 1, 1).to(dtype) * z + offset.view(3, 1, 1).to(dtype)
    for lam in (0.0, 0.999):
        got = correction(z, torch.tensor(lam))
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, atol=0.05 if dtype == torch.bfloat16 else 1e-6, rtol=1e-5)


@layers_with_units
def test_the_factors_are_those_of_every_product(make, shape):
    """Their products, added up at each position and for each output, are the plain layer's sums."""
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    if layer.bias is not None:
        layer.bias.data.zero_()
    sums = layer(x)
    inputs, weights = reprogram_(layer, NRPMConfig(lam=0.5)).factors(x)
    sums = sums.movedim(layer.channel, -1)
    got = torch.einsum("blgd,god->blgo", inputs, weights).flatten(2)
    torch.testing.assert_close(got, sums.flatten(1, -2) if sums.ndim > 2 else sums.unsqueeze(1))


@layers_with_units
def test_units_are_another_origin_and_another_eps(make, shape):
    """With the same distance for all outputs: that of other distances is in test_format.py."""
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    with_units(reprogram_(layer, NRPMConfig(lam=0.3, eps=0.1)), distance=2.0)
    other = reprogram_(copy.deepcopy(plain), NRPMConfig(lam=0.3, eps=0.2))
    centre = layer.units.along(layer.units.centre, x.dtype).expand_as(x)
    bias = 0 if plain.bias is None else plain.bias.view(-1, *[1] * (-layer.channel - 1))
    torch.testing.assert_close(layer(x), other(x - centre) + plain(centre) - bias)


def test_a_state_brings_what_was_fitted_and_a_plain_one_leaves_it():
    layer = with_units(reprogram_(nn.Linear(6, 3), NRPMConfig(lam=0.5)))
    layer.add_part(Correction).gain.fill_(2.0)
    other, x = reprogram_(nn.Linear(6, 3), NRPMConfig(lam=0.5, standardize=True)), torch.randn(4, 6)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    other.load_state_dict(nn.Linear(6, 3).state_dict())
    assert sorted(other.parts()) == ["correction", "units"]
    other.load_state_dict(reprogram_(nn.Linear(6, 3), NRPMConfig(lam=0.5)).state_dict())
    assert not other.parts()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units.centre": None}, "units.distance"),
        ({"correction.gain": None}, "correction.offset"),
        ({"units.distance": torch.tensor([1.0, 0.0, 1.0])}, "not above 0"),
    ],
)
def test_a_state_with_half_a_part_is_refused(change, message):
    layer = with_units(reprogram_(nn.Linear(6, 3), NRPMConfig(lam=0.5)))
    layer.add_part(Correction)
    state = {k: v for k, v in {**layer.state_dict(), **change}.items() if v is not None}
    other = reprogram_(nn.Linear(6, 3), NRPMConfig(lam=0.5, standardize=True))
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="units"):  # which were not asked for
        reprogram_(nn.Linear(6, 3), NRPMConfig(lam=0.5)).load_state_dict(layer.state_dict())


@layers_with_units
def test_units_keep_the_precision_of_float32_in_half_precision(make, shape):
    """Also where products are tiny: of a distance that no half can divide by."""
    layer, x = make(), torch.randn(shape)
    with_units(reprogram_(layer, NRPMConfig(lam=0.3, eps=0.5)))
    layer.units.distance[0] = 1e-7
    want = layer(x)
    scale = want.detach().abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 5e-3 * scale  # one rounding at the end
    half = copy.deepcopy(layer).half()
    half.units.distance.clamp_(min=torch.finfo(torch.half).tiny)
    assert bool(half(x.half()).isfinite().all())


def test_the_robust_part_is_the_functional():
    layer, x = nn.Linear(12, 5), torch.randn(4, 12)
    want = functional.nrpm_linear(x, layer.weight, layer.bias, lam=0.3, iterations=2, eps=0.01, penalty="mcp")
    got = reprogram_(layer, NRPMConfig(lam=0.3, iterations=2, eps=0.01, penalty="mcp"))(x)
    torch.testing.assert_close(got, want)


def test_lambda_stays_in_bounds_and_comes_back():
    layer = reprogram_(nn.Linear(6, 3), NRPMConfig(lam=0.5, learnable=True))
    optimizer = torch.optim.SGD([layer.lam], lr=5.0)
    x = torch.randn(64, 6)
    plain = F.linear(x, layer.weight, layer.bias).detach()
    robust = functional.nrpm_linear(x, layer.weight, layer.bias, lam=0.0).detach()
    seen = []
    for target in (2 * plain - robust, 2 * robust - plain) * 2:  # best at lambda = 2 and -1
        for _ in range(40):
            optimizer.zero_grad()
            F.mse_loss(layer(x), target).backward()
            optimizer.step()
            assert 0.0 <= lambdas(layer)[""] <= 1.0
        seen.append(lambdas(layer)[""])
    assert seen == [1.0, 0.0, 1.0, 0.0]  # both ends, exactly, and out of them again


def test_frozen_lambda_takes_no_gradient():
    layer = reprogram_(nn.Linear(6, 3), NRPMConfig(lam=0.5))
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.lam.grad is None
    assert layer.weight.grad is not None


def test_a_learnable_lambda_of_one_has_a_gradient_and_the_plain_values():
    layer, x = nn.Linear(6, 3), torch.randn(2, 6)
    want = layer(x)
    reprogram_(layer, NRPMConfig(lam=1.0, learnable=True))
    out = layer(x)
    torch.testing.assert_close(out, want)
    (-out.square().sum()).backward()
    assert layer.lam.grad is not None
    with torch.no_grad():
        assert torch.equal(layer(x), want)


def test_checkpoints():
    layer = nn.Linear(6, 3)
    plain = copy.deepcopy(layer.state_dict())
    reprogram_(layer, NRPMConfig(lam=0.5))
    layer.load_state_dict(plain)  # of the plain model: the lambda stays
    assert lambdas(layer) == {"": 0.5}
    layer.load_state_dict({**plain, "lam": torch.tensor(0.25)})
    assert lambdas(layer) == {"": 0.25}
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(RuntimeError, match=r"lambda must be in \[0, 1\]"):
            layer.load_state_dict({**plain, "lam": torch.tensor(bad)})
    assert lambdas(layer) == {"": 0.25}
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"lam": torch.tensor(0.5)})


def test_a_lambda_past_the_end_is_saved_as_what_counts():
    layer = reprogram_(nn.Linear(6, 3), NRPMConfig(lam=0.5, learnable=True))
    layer.lam.data.fill_(1.3)
    state = layer.state_dict()
    assert state["lam"].item() == 1.0
    layer.load_state_dict(state)
    assert lambdas(layer) == {"": 1.0}


@pytest.mark.parametrize("lam", [0.2, 1.0, 1.3])
def test_corrections_do_not_depend_on_gradients(lam):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3))
    reprogram_(model, NRPMConfig(lam=0.2, learnable=True))
    x = torch.rand(16, 3, 2, 2)
    calibrate_(model, [x])
    model[1].lam.data.fill_(lam)
    with torch.no_grad():
        want = model(x)
    torch.testing.assert_close(model(x), want)


def test_a_plain_checkpoint_keeps_corrections():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    plain = copy.deepcopy(model.state_dict())
    calibrate_(reprogram_(model, NRPMConfig(lam=0.2)), [torch.rand(16, 3, 2, 2)])
    gain = model[1].correction.gain.clone()
    model.load_state_dict(plain)
    assert torch.equal(model[1].correction.gain, gain)


def test_repr_shows_the_scheme():
    text = repr(reprogram_(nn.Linear(6, 3), NRPMConfig(lam=0.8)))
    assert text == "NRPMLinear(in_features=6, out_features=3, bias=True, lam=0.8, iterations=3, eps=0.001, penalty=l1)"


def test_on_the_meta_device():
    layer = reprogram_(nn.Linear(6, 3, device="meta"), NRPMConfig(lam=0.5))
    assert "lam=?" in repr(layer)
    assert layer.state_dict()["lam"].is_meta


def test_half_and_unbatched():
    layer = reprogram_(nn.Conv2d(4, 6, 3), NRPMConfig(lam=0.5)).bfloat16()
    assert layer(torch.randn(4, 8, 8, dtype=torch.bfloat16)).shape == (6, 6, 6)
    assert isinstance(layer, Reprogrammed)


def test_it_says_what_it_does():
    layer = reprogram_(nn.Linear(3, 2), NRPMConfig(lam=0.25, iterations=2, eps=0.5, penalty="mcp"))
    assert str(layer).endswith("bias=True, lam=0.25, iterations=2, eps=0.5, penalty=mcp)")
    with_units(layer)
    assert "penalty=mcp, standardize=True" in str(layer)
    for outside, used in ((-0.5, "0"), (1.5, "1")):  # where an optimizer may have left it
        layer.lam.data.fill_(outside)
        assert f"lam={used}, " in str(layer)
    assert "lam=?, " in str(layer.to("meta"))


@pytest.mark.parametrize(("held", "saved"), [(-0.5, 0.0), (0.0, 0.0), (0.7, 0.7), (1.0, 1.0), (1.5, 1.0)])
def test_lambda_is_saved_as_it_is_used(held, saved):
    layer = reprogram_(nn.Linear(3, 2), NRPMConfig(lam=0.25, learnable=True))
    layer.lam.data.fill_(held)
    state = layer.state_dict()
    torch.testing.assert_close(state["lam"], torch.tensor(saved))
    assert not state["lam"].requires_grad
    other = reprogram_(nn.Linear(3, 2), NRPMConfig(lam=0.5))
    other.load_state_dict(state)
    assert torch.equal(other.lam, state["lam"])
    if held == saved:
        assert layer.state_dict(keep_vars=True)["lam"] is layer.lam
    else:
        with pytest.raises(RuntimeError, match=r"\n\tlam is -?[0-9.]+, and lambda must be in \[0, 1\]\."):
            other.load_state_dict({**state, "lam": torch.tensor(held)})
