"""The functions, and below them the tiled kernel, against the materialising reference in float64."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from timm_nrpm.choices import PENALTIES
from timm_nrpm.nn.estimator import Penalty, robust_sum
from timm_nrpm.nn.functional import nrpm_conv2d, nrpm_linear
from timm_nrpm.nn.kernels import tiled

# Widths at which every branch of every penalty is met by products of order one.
WIDTHS = {"delta": 0.3, "gamma": 1.0}


def reference_linear(x, weight, bias, lam, iterations, eps, name):
    """Algorithm 1 with every product in memory."""
    rows = x.reshape(-1, x.shape[-1])
    robust = robust_sum(rows, weight, Penalty.named(name, eps, **WIDTHS), iterations)
    out = lam * rows @ weight.t() + (1 - lam) * robust
    return (out if bias is None else out + bias).reshape(*x.shape[:-1], len(weight))


def reference_conv(x, weight, stride, padding, dilation, groups, **settings):
    """Unfold plus linear, one group at a time."""
    h, w = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    )
    outs = []
    for part, kernel in zip(x.chunk(groups, 1), weight.chunk(groups, 0), strict=True):
        columns = F.unfold(part, kernel.shape[2:], dilation, padding, stride).mT  # [B, L, D]
        outs.append(reference_linear(columns, kernel.flatten(1), None, **settings).mT)
    return torch.cat(outs, 1).unflatten(2, (h, w))


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(("name", "iterations"), list(itertools.product(PENALTIES, (0, 1, 3))))
def test_linear_matches_the_reference(name, iterations):
    x, weight, bias, lam = doubles(2, 3, 11), doubles(5, 11), doubles(5), torch.tensor(0.3, dtype=torch.float64)
    lam.requires_grad_()
    out = nrpm_linear(x, weight, bias, lam=lam, iterations=iterations, eps=0.05, penalty=name, **WIDTHS)
    want = reference_linear(x, weight, bias, lam, iterations, 0.05, name)
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(out)
    inputs = (x, weight, bias, lam)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(want, inputs, grad))


@pytest.mark.parametrize(("name", "iterations"), list(itertools.product(PENALTIES, (1, 2, 3))))
def test_gradcheck(name, iterations):
    settings = {"lam": 0.4, "iterations": iterations, "eps": 0.1, "penalty": name, **WIDTHS}
    assert torch.autograd.gradcheck(
        lambda x, w, b: nrpm_linear(x, w, b, **settings), (doubles(3, 6), doubles(4, 6), doubles(4))
    )
    assert torch.autograd.gradcheck(
        lambda x, w: nrpm_conv2d(x, w, stride=(2, 1), padding=1, groups=2, **settings),
        (doubles(2, 4, 5, 4), doubles(2, 2, 3, 2)),
    )


GEOMETRIES = [
    # channels, outputs, kernel, stride, padding, dilation, groups
    (3, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (3, 4, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (4, 6, (3, 2), (2, 1), (0, 1), (1, 2), 1),
    (4, 6, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (4, 6, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (4, 6, (3, 3), (1, 1), (2, 2), (2, 2), 2),
    (6, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6),  # depthwise
    (4, 8, (5, 5), (2, 3), (2, 1), (1, 1), 4),  # depthwise, two outputs a channel
    (3, 5, (4, 4), (4, 4), (0, 0), (1, 1), 1),  # patchify
    (2, 3, (9, 10), (1, 1), (0, 0), (1, 1), 1),  # one position
]


@pytest.mark.parametrize(("c", "o", "kernel", "stride", "padding", "dilation", "groups"), GEOMETRIES)
def test_conv_is_unfold_plus_linear(c, o, kernel, stride, padding, dilation, groups):
    x, weight = doubles(3, c, 9, 10), doubles(o, c // groups, *kernel)
    settings = {"lam": 0.2, "iterations": 2, "eps": 0.01}
    out = nrpm_conv2d(x, weight, stride=stride, padding=padding, dilation=dilation, groups=groups, **settings)
    want = reference_conv(x, weight, stride, padding, dilation, groups, **settings, name="l1")
    assert out.shape == F.conv2d(x, weight, None, stride, padding, dilation, groups).shape
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (x, weight), grad), torch.autograd.grad(want, (x, weight), grad)
    )


@pytest.mark.parametrize("kernel", [(3, 3), (2, 2), (4, 1), (2, 5)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_and_valid_padding(kernel, dilation):
    x, weight, bias = doubles(2, 3, 9, 10), doubles(4, 3, *kernel), doubles(4)
    for padding in ("same", "valid"):
        plain = F.conv2d(x, weight, bias, padding=padding, dilation=dilation)
        out = nrpm_conv2d(x, weight, bias, padding=padding, dilation=dilation, lam=1.0)
        torch.testing.assert_close(out, plain)
        out = nrpm_conv2d(x, weight, bias, padding=padding, dilation=dilation, lam=0.0, iterations=0)
        torch.testing.assert_close(out, plain)


@pytest.mark.parametrize("tile", [1, 7, 64, 1 << 18])
@pytest.mark.parametrize("block", [1, 200, 1 << 24])
def test_tiling_changes_nothing(monkeypatch, tile, block):
    x, weight = doubles(5, 4, 6, 7), doubles(6, 2, 3, 3)
    settings = {"padding": 1, "groups": 2, "lam": 0.1, "iterations": 2, "eps": 0.02}
    want = nrpm_conv2d(x, weight, **settings)
    grad = torch.randn_like(want)
    wanted = torch.autograd.grad(want, (x, weight), grad)
    monkeypatch.setattr(tiled, "TILE", tile)
    monkeypatch.setattr(tiled, "BLOCK", block)
    out = nrpm_conv2d(x, weight, **settings)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(torch.autograd.grad(out, (x, weight), grad), wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_float_types(dtype, tolerance):
    x, weight, bias = torch.randn(4, 33), torch.randn(7, 33), torch.randn(7)
    want = nrpm_linear(x.to(dtype).double(), weight.to(dtype).double(), bias.to(dtype).double(), lam=0.5)
    out = nrpm_linear(x.to(dtype), weight.to(dtype), bias.to(dtype), lam=0.5)
    assert out.dtype == dtype
    assert ((out.double() - want).abs().max() / want.abs().max()).item() < tolerance


def test_memory_formats_and_empty_batches():
    x, weight = doubles(4, 6, 8, 8), doubles(5, 6, 3, 3)
    want = nrpm_conv2d(x, weight, padding=1, lam=0.5)
    torch.testing.assert_close(nrpm_conv2d(x.to(memory_format=torch.channels_last), weight, padding=1, lam=0.5), want)
    torch.testing.assert_close(nrpm_conv2d(x.mT.contiguous().mT, weight, padding=1, lam=0.5), want)
    torch.testing.assert_close(nrpm_conv2d(x[0], weight, padding=1, lam=0.5), want[0])
    empty = doubles(0, 6, 8, 8)
    out = nrpm_conv2d(empty, weight, padding=1, lam=0.5)
    assert out.shape == (0, 5, 8, 8)
    out.sum().backward()
    assert nrpm_linear(torch.empty(0, 3, 6), torch.randn(2, 6), lam=0.5).shape == (0, 3, 2)
    assert nrpm_linear(torch.randn(6), torch.randn(2, 6), lam=0.5).shape == (2,)


def test_nothing_to_do_is_the_plain_operation_bit_for_bit():
    x, weight, bias, rows = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(6, 5)
    for settings in (
        {"lam": 1.0},
        {"lam": torch.tensor(1.0)},
        {"lam": 0.2, "iterations": 0},
        {"lam": 0.2, "penalty": "l2"},
    ):
        assert torch.equal(nrpm_conv2d(x, weight, bias, padding=1, **settings), F.conv2d(x, weight, bias, padding=1))
        assert torch.equal(nrpm_linear(x, rows, **settings), F.linear(x, rows))


def test_autocast_keeps_its_type():
    x, conv, linear = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert nrpm_conv2d(x, conv, torch.randn(4), lam=0.5).dtype == torch.bfloat16
        assert nrpm_linear(x, linear, torch.randn(4), lam=0.5).dtype == torch.bfloat16


def test_one_summand_is_its_own_estimate():
    x, weight = torch.randn(4, 1), torch.randn(3, 1)
    torch.testing.assert_close(nrpm_linear(x, weight, lam=0.0), F.linear(x, weight))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_stays_in_its_row(bad):
    x = torch.randn(3, 16)
    x[1, 2] = bad
    finite = nrpm_linear(x, torch.randn(5, 16), lam=0.5).isfinite().all(1)
    assert finite.tolist() == [True, False, True]


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_the_products_are_never_held():
    x, weight = torch.randn(2, 64, 28, 28, requires_grad=True), torch.randn(64, 64, 3, 3, requires_grad=True)
    products = 2 * 64 * 576 * 784
    with Largest() as ours:
        nrpm_conv2d(x, weight, padding=1, lam=0.5).sum().backward()
    assert ours.elements < products / 50
    rows, matrix = torch.randn(32, 576, requires_grad=True), weight.flatten(1)
    with Largest() as reference:  # the measure sees products where they are held
        robust_sum(rows, matrix, Penalty.named("l1", 1e-3), 1).sum().backward()
    assert reference.elements >= 32 * 576 * 64


def test_second_derivatives_are_refused():
    x = doubles(2, 6)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(nrpm_linear(x, doubles(3, 6), lam=0.5).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nrpm_linear(torch.ones(2, 3), torch.ones(4, 5), lam=0.5), r"x \[2, 3\] and weight \[4, 5\]"),
        (lambda: nrpm_linear(torch.ones(2, 3), torch.ones(4, 5, 3), lam=0.5), r"x \[2, 3\] and weight \[4, 5, 3\]"),
        (lambda: nrpm_linear(torch.ones(()), torch.ones(4, 3), lam=0.5), r"x \[\] and weight \[4, 3\]"),
        (lambda: nrpm_linear(torch.ones(2, 3), torch.ones(4, 3), lam=2), "lam=2"),
        (lambda: nrpm_linear(torch.ones(2, 3), torch.ones(4, 3), lam=torch.tensor(2.0)), r"lam=2\.0"),
        (lambda: nrpm_linear(torch.ones(2, 3), torch.ones(4, 3), lam=torch.tensor(float("nan"))), "lam=nan"),
        (lambda: nrpm_linear(torch.ones(2, 3), torch.ones(4, 3), lam=torch.ones(4)), r"lam has shape \[4\]"),
        (lambda: nrpm_linear(torch.ones(2, 3), torch.ones(4, 3), lam=0.5, iterations=-1), "integer >= 0"),
        (lambda: nrpm_linear(torch.ones(2, 3), torch.ones(4, 3), lam=0.5, eps=0), "eps=0"),
        (lambda: nrpm_linear(torch.ones(2, 3), torch.ones(4, 3), lam=0.5, eps=1e-20), "give a number >= 1e-15"),
        (lambda: nrpm_linear(torch.ones(2, 3), torch.ones(4, 3), lam=0.5, penalty="l3"), "choose one of"),
        (lambda: nrpm_conv2d(torch.ones(2, 3, 4, 4), torch.ones(4, 3, 3, 3), groups=2, lam=0.5), "groups=2"),
        (lambda: nrpm_conv2d(torch.ones(2, 3, 4, 4), torch.ones(4, 3, 3, 3), padding="full", lam=0.5), '"valid"'),
        (
            lambda: nrpm_conv2d(torch.ones(2, 3, 4, 4), torch.ones(4, 3, 3, 3), padding="same", stride=2, lam=0.5),
            "stride 1",
        ),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor])
def test_numbers_of_other_libraries(number):
    x, weight = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(3, 4, 3, 3, requires_grad=True)
    numbers = {"lam": 0.5, "eps": 0.125, "delta": 0.25, "gamma": 1.0}
    integers = {"stride": 2, "padding": 1, "dilation": 2, "groups": 1}
    want = nrpm_conv2d(x, weight, **numbers, **integers, iterations=2, penalty="huber-mcp")
    theirs = {key: number(value) for key, value in numbers.items()}
    got = nrpm_conv2d(
        x, weight, **theirs, **{key: np.int64(value) for key, value in integers.items()}, iterations=np.int32(2),
        penalty="huber-mcp",
    )  # fmt: skip
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0])
    rows, matrix = torch.randn(3, 8), torch.randn(5, 8)
    assert torch.equal(
        nrpm_linear(rows, matrix, **theirs, iterations=np.uint8(3)), nrpm_linear(rows, matrix, **numbers)
    )


@pytest.mark.parametrize("settings", [{"lam": 1.0}, {"lam": 0.3, "iterations": 0}, {"lam": 0.3, "penalty": "l2"}])
def test_without_an_estimate_it_is_the_plain_function(settings):
    x, weight, bias = torch.randn(2, 3, 6), torch.randn(4, 6), torch.randn(4)
    assert torch.equal(nrpm_linear(x, weight, bias, **settings), F.linear(x, weight, bias))
    images, kernel = torch.randn(2, 6, 5, 4), torch.randn(4, 3, 3, 2)
    plain = F.conv2d(images, kernel, bias, (2, 1), (1, 0), (1, 2), 2)
    options = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
    assert torch.equal(nrpm_conv2d(images, kernel, bias, **options, **settings), plain)


def test_the_defaults_are_those_of_the_docstring():
    x, weight = 3 * torch.randn(2, 60), torch.randn(4, 60)  # products on both sides of the thresholds
    for penalty in PENALTIES:
        spelled = nrpm_linear(x, weight, None, lam=0.8, iterations=3, eps=1e-3, penalty=penalty, delta=3.0, gamma=4.0)
        assert torch.equal(nrpm_linear(x, weight, lam=0.8, penalty=penalty), spelled)
