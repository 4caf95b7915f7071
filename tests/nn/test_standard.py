"""The estimator by standard operators against float64, and its tiles."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_nrpm.nn.functional import nrpm_conv2d, nrpm_linear
from timm_nrpm.nn.kernels import standard
from timm_nrpm.nn.kernels.standard import standard_operators

CONVOLUTIONS = {
    "dense": (5, 6, (3, 3), {"padding": 1}),
    "strided": (4, 6, (3, 2), {"stride": (2, 1), "dilation": (1, 2)}),
    "depthwise": (6, 6, (3, 3), {"groups": 6, "padding": 1}),
    "grouped": (6, 9, (3, 3), {"groups": 3}),
    "pointwise": (7, 5, (1, 1), {}),
}
PENALTIES = ("l1", "huber", "mcp", "huber-mcp")


@pytest.mark.parametrize("tile", [1, 500, 1 << 18], ids=["an output", "some", "all"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_it_computes_what_the_operator_computes(name, penalty, tile, monkeypatch):
    monkeypatch.setattr(standard, "TILE", tile)
    channels, outputs, kernel, options = CONVOLUTIONS[name]
    options = options | {"lam": 0.3, "penalty": penalty, "eps": 0.01, "delta": 0.3, "gamma": 1.0}
    x = torch.randn(2, channels, 7, 6, dtype=torch.float64)
    weight = torch.randn(outputs, channels // options.get("groups", 1), *kernel, dtype=torch.float64)
    want = nrpm_conv2d(x, weight, **options)
    with standard_operators():
        assert torch.allclose(nrpm_conv2d(x, weight, **options), want, rtol=1e-9, atol=1e-9)
        single = nrpm_conv2d(x.float(), weight.float(), **options)
    assert torch.allclose(single.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(9,), (3, 9), (2, 20, 9)])
def test_linear_maps(shape):
    x, weight, bias = (torch.randn(*each, dtype=torch.float64) for each in (shape, (17, 9), (17,)))
    want = nrpm_linear(x, weight, bias, lam=0.5)
    with standard_operators():
        assert torch.allclose(nrpm_linear(x, weight, bias, lam=0.5), want, rtol=1e-9, atol=1e-9)


@given(count=st.integers(1, 300), each=st.integers(1, 10**7))
@settings(max_examples=60)
def test_chunks_are_equal_and_fit(count, each):
    chunks = standard._chunks(count, each)
    assert count % chunks == 0
    assert chunks == count or count // chunks * each <= standard.TILE
    if chunks > 1:  # no smaller number of equal chunks would fit
        assert all(count // n * each > standard.TILE for n in range(1, chunks) if count % n == 0)


def test_a_second_thread_waits_for_the_first_one():
    seen = []

    def second():
        with standard_operators():
            seen.append(standard.is_wanted())

    with standard_operators():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert seen == []
    thread.join()
    assert seen == [True]
    assert not standard.is_wanted()


def test_the_context_ends_with_an_error():
    def fails():
        with standard_operators():
            assert standard.is_wanted()
            raise ValueError

    with pytest.raises(ValueError):
        fails()
    assert not standard.is_wanted()
