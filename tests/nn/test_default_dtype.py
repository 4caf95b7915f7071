"""Another default dtype, as `torch.set_default_dtype(torch.float64)` sets it, changes no result and no type."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm
import torch

import timm_nrpm
from timm_nrpm import Threat
from timm_nrpm.attacks.gradients import generators
from timm_nrpm.data.loaders import digits
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.nn.functional import nrpm_conv2d, nrpm_linear
from timm_nrpm.nn.pixel_model import PixelModel


@contextmanager
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_functions_have_the_type_of_their_input(dtype):
    x, weight = torch.randn(4, 3, 6, 6).to(dtype), torch.randn(5, 3, 3, 3).to(dtype)
    rows, matrix = torch.randn(20, 30).to(dtype), torch.randn(18, 30).to(dtype)

    def computed():
        given = [t.clone().requires_grad_() for t in (x, weight, rows, matrix)]
        lam = torch.tensor(0.3, dtype=torch.float32, requires_grad=True)
        out = (
            nrpm_conv2d(*given[:2], lam=lam, penalty="huber-mcp", delta=0.3, gamma=1.0),
            nrpm_linear(*given[2:], lam=0.3),
        )
        return *out, *torch.autograd.grad(out[0].sum() + out[1].sum(), [*given, lam])

    want = computed()
    with doubles():
        got = computed()
    assert [t.dtype for t in got] == [t.dtype for t in want] == [dtype] * 6 + [torch.float32]
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    "threat", [Threat("Linf", 0.1), Threat("L2", 0.5), Threat("L1", 3.0), Threat("L0", 4)], ids=str
)
def test_an_attack_starts_at_the_same_images(threat):
    pixels = torch.rand(3, 1, 6, 6)
    want = threat.around(pixels, generators([1, 2, 3]))
    with doubles():
        got = threat.around(pixels, generators([1, 2, 3]))
        assert threat.distance(pixels, got).shape == (3,)
        assert bool(threat.allows(pixels, threat.project(pixels, got + 1)).all())
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_a_model_made_and_used_in_double_precision():
    """timm makes a model of the default dtype, as it does a plain one; what it gives is what the same model gives."""
    pixels, labels = (t[:4] for t in digits("test"))
    training = digits("train")[0][:64]
    single = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.5).eval()
    timm_nrpm.calibrate_(single, [training])
    with doubles():
        plain = timm.create_model(DIGITS, pretrained=True)
        model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.5).eval()
        assert {p.dtype for p in plain.parameters()} == {torch.float64}
        assert {p.dtype for name, p in model.named_parameters() if not name.endswith("lam")} == {torch.float64}
        assert digits("test")[0].dtype == torch.float32
        timm_nrpm.calibrate_(model, [training])
        logits = PixelModel(model)(pixels)
        report = timm_nrpm.evaluate(model, [(pixels, labels)], Threat("Linf", 0.1), "quick", steps=3)
        certified = timm_nrpm.certify(model, [(pixels, labels)], 0.12, n0=10, n=20)
    assert logits.dtype == pixels.dtype
    torch.testing.assert_close(logits, PixelModel(single)(pixels), rtol=1e-3, atol=1e-3)
    assert (
        report.worst_case == timm_nrpm.evaluate(single, [(pixels, labels)], report.threat, "quick", steps=3).worst_case
    )
    want = timm_nrpm.certify(single, [(pixels, labels)], 0.12, n0=10, n=20)
    assert [image.votes for image in certified.images] == [image.votes for image in want.images]


@pytest.mark.parametrize(
    ("suite", "threat"),
    [
        *(("quick", Threat(*threat)) for threat in (("L2", 0.5), ("L1", 3.0), ("L0", 3))),
        ("adaptive", Threat("Linf", 0.1)),
        *(pytest.param(suite, Threat("Linf", 0.1), marks=pytest.mark.slow) for suite in ("paper", "standard")),
    ],
    ids=str,
)
def test_every_suite_finds_the_same(suite, threat):
    data = [tuple(t[:4] for t in digits("test"))]
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.5).eval()
    want = timm_nrpm.evaluate(model, data, threat, suite, steps=3, queries=10)
    with doubles():
        got = timm_nrpm.evaluate(model, data, threat, suite, steps=3, queries=10)
    assert [attack.survived for attack in got.attacks] == [attack.survived for attack in want.attacks]


def test_a_model_made_before_works_after():
    pixels = digits("test")[0][:4]
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.5).eval()
    want = PixelModel(model)(pixels)
    with doubles():
        assert torch.equal(PixelModel(model)(pixels), want)
        timm_nrpm.restore_(timm_nrpm.reprogram_(model, timm_nrpm.NRPMConfig(lam=0.5)))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
