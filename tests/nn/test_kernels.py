"""Every implementation of the operator against the materialising reference in float64."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from timm_nrpm import NRPMConfig, reprogram_
from timm_nrpm.choices import PENALTIES
from timm_nrpm.nn.estimator import Penalty, robust_sum
from timm_nrpm.nn.functional import nrpm_conv2d, nrpm_linear
from timm_nrpm.nn.kernels import native, operator, tiled
from timm_nrpm.nn.kernels.convolution import Convolution

COMPILER = any(map(shutil.which, ["g++", "c++", "clang++"]))
WIDTHS = {"delta": 0.3, "gamma": 1.0}  # at which products of order one meet every branch of every penalty


def reference(x, weight, conv, iterations, penalty):
    """`[B, O, H', W']`, every product in memory, one group at a time."""
    outs = []
    for part, kernel in zip(x.chunk(conv.groups, 1), weight.chunk(conv.groups, 0), strict=True):
        columns = F.unfold(part, kernel.shape[2:], conv.dilation, conv.padding, conv.stride).mT  # [B, L, D]
        sums = robust_sum(columns.flatten(0, 1), kernel.flatten(1), penalty, iterations)
        outs.append(sums.unflatten(0, columns.shape[:2]).mT)  # [B, O, L]
    return torch.cat(outs, 1)


def run(x, weight, conv, iterations, penalty, grad=None, of_weight=True, lam=0.0):
    """The mixed sums and, given their gradient, the gradients of x and weight."""
    x = x.detach().requires_grad_(grad is not None)
    weight = weight.detach().requires_grad_(grad is not None and of_weight)
    shape = (conv.stride, conv.padding, conv.dilation, conv.groups)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    value = x.new_full((), lam)
    out, _ = operator.mixed_sum(x, weight, value, False, *shape, iterations, penalty.numbers, last, grad is not None)
    inputs = (x, weight) if of_weight else (x,)
    return (out,) if grad is None else (out, *torch.autograd.grad(out, inputs, grad))


def off(value, want):
    return ((value.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def check(x, weight, conv, iterations, penalty, tolerance=1e-5):
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    robust = reference(*wide, conv, iterations, penalty)
    plain = F.conv2d(*wide, None, conv.stride, conv.padding, conv.dilation, conv.groups).flatten(2)
    grad = None
    for lam in (0.0, 0.4):  # the estimate alone, whose errors nothing hides, and a mix
        want = torch.lerp(robust, plain, lam)
        (alone,) = run(x, weight, conv, iterations, penalty, lam=lam)
        grad = torch.randn_like(alone) if grad is None else grad
        wanted = torch.autograd.grad(want, wide, grad.double().flatten(2), retain_graph=True)
        out, *gradients = run(x, weight, conv, iterations, penalty, grad, lam=lam)
        assert off(alone.flatten(2), want) < tolerance
        assert off(out.flatten(2), want) < tolerance
        assert off(gradients[0], wanted[0]) < tolerance
        assert off(gradients[1], wanted[1]) < tolerance
        # As an attack takes it.
        (of_x_alone,) = run(x, weight, conv, iterations, penalty, grad, of_weight=False, lam=lam)[1:]
        assert off(of_x_alone, wanted[0]) < tolerance


# batch, channels, outputs, height, width, kernel, stride, padding, dilation, groups
LAYERS = {
    "odd": (3, 3, 5, 9, 11, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "prime": (2, 13, 17, 7, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "one summand": (2, 1, 3, 4, 5, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "one of everything": (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "strided": (2, 8, 20, 13, 10, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "uneven": (2, 6, 6, 9, 10, (3, 2), (2, 1), (0, 1), (1, 2), 2),
    "dilated": (2, 4, 6, 12, 12, (3, 3), (1, 1), (2, 2), (2, 2), 2),
    "depthwise": (2, 6, 6, 12, 9, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    "depthwise, wide": (2, 40, 40, 9, 9, (7, 7), (1, 1), (3, 3), (1, 1), 40),
    "depthwise, twice the outputs": (2, 4, 8, 9, 10, (5, 5), (2, 3), (2, 1), (1, 1), 4),
    "pointwise": (2, 30, 33, 7, 7, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "pointwise, strided": (2, 30, 33, 7, 7, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "patchify": (2, 3, 24, 16, 16, (4, 4), (4, 4), (0, 0), (1, 1), 1),
    "gaps between patches": (2, 3, 8, 17, 17, (2, 2), (5, 5), (0, 0), (1, 1), 1),
    "stem": (1, 3, 16, 30, 30, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "deep": (1, 150, 6, 6, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "mostly padding": (1, 3, 4, 2, 2, (3, 3), (1, 1), (4, 4), (1, 1), 1),
    "taller than wide": (1, 3, 4, 40, 1, (3, 1), (1, 1), (1, 0), (1, 1), 1),
}


def operands(batch, channels, outputs, height, width, kernel, *shape):
    weight = torch.randn(outputs, channels // shape[-1], *kernel)
    return torch.randn(batch, channels, height, width), weight / math.sqrt(weight[0].numel()), Convolution(*shape)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("name", "iterations"), [("l1", 1), ("l1", 3), ("huber", 2), ("mcp", 3), ("huber-mcp", 1)])
def test_the_fast_path_equals_the_reference(layer, name, iterations):
    x, weight, conv = operands(*LAYERS[layer])
    assert native.serves(x) == COMPILER
    check(x, weight, conv, iterations, Penalty.named(name, 0.01, **WIDTHS))


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("iterations", [4, 5, 9])
def test_many_steps(name, iterations):
    check(*operands(*LAYERS["uneven"]), iterations, Penalty.named(name, 0.1, **WIDTHS))


def test_the_default_eps_on_a_real_layer():
    x, weight, conv = operands(1, 64, 64, 14, 14, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    check(x.relu(), weight * 2, conv, 3, Penalty.named("l1", 1e-3))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_geometry(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups, kernel = draw(1, 3), (draw(1, 4), draw(1, 4))
    conv = Convolution((draw(1, 3), draw(1, 3)), (draw(0, 3), draw(0, 3)), (draw(1, 2), draw(1, 2)), groups)
    reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, kernel, strict=True)]
    size = [max(r - 2 * p, 1) + draw(0, 8) for r, p in zip(reach, conv.padding, strict=True)]
    torch.manual_seed(draw(0, 1000))
    x = torch.randn(draw(1, 3), groups * draw(1, 9), *size)
    weight = torch.randn(groups * draw(1, 9), x.shape[1] // groups, *kernel)
    check(x, weight, conv, 2, Penalty.named(data.draw(st.sampled_from(PENALTIES)), 0.1, **WIDTHS), 3e-5)


@pytest.mark.parametrize("layer", ["odd", "strided", "depthwise", "pointwise"])
def test_memory_formats(layer):
    x, weight, conv = operands(*LAYERS[layer])
    grad = torch.randn_like(run(x, weight, conv, 3, Penalty(0.01))[0])
    want = run(x, weight, conv, 3, Penalty(0.01), grad)
    spread = torch.randn(*x.shape[:3], 2 * x.shape[3])[..., ::2].copy_(x)
    for same, kernel in (
        (x.to(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last)),
        (x.mT.contiguous().mT, weight),
        (x.transpose(0, 1).contiguous().transpose(0, 1), weight.transpose(0, 1).contiguous().transpose(0, 1)),
        (spread, weight),
    ):
        torch.testing.assert_close(
            run(same, kernel, conv, 3, Penalty(0.01), grad.to(memory_format=torch.channels_last)),
            want,
            rtol=1e-4,
            atol=1e-5,
        )
    one = x[:1].expand_as(x)  # images that share their memory
    torch.testing.assert_close(
        run(one, weight, conv, 3, Penalty(0.01), grad), run(one.contiguous(), weight, conv, 3, Penalty(0.01), grad)
    )


@pytest.mark.parametrize("layer", ["stem", "deep", "depthwise, wide", "pointwise"])
def test_threads_change_nothing(layer):
    x, weight, conv = operands(*LAYERS[layer])
    x = torch.cat([x] * 8)
    grad = torch.randn_like(run(x, weight, conv, 3, Penalty(0.01))[0])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([*run(x, weight, conv, 3, Penalty(0.01), grad, lam=0.4)])
            results[-1].append(run(x, weight, conv, 3, Penalty(0.01), grad, of_weight=False, lam=0.4)[1])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for value, want in zip(other, results[0], strict=True):
            assert torch.equal(value, want)


@pytest.mark.parametrize("implementation", [native, tiled] if COMPILER else [tiled])
def test_gradients_that_are_not_needed_are_not_computed(implementation, monkeypatch):
    x, weight, conv = operands(*LAYERS["odd"])
    monkeypatch.setattr(operator, "_implementation", lambda x: implementation)
    shape, numbers = (conv.stride, conv.padding, conv.dilation, conv.groups), Penalty(0.1).numbers
    lam = torch.tensor(0.3)
    out, state = operator.compute(x, weight, lam, False, *shape, 2, numbers, False, True)
    arguments = (torch.ones_like(out), x, weight, lam, state, False, *shape, 2, numbers)
    both = operator.compute_backward(*arguments, True, True)
    first, nothing = operator.compute_backward(*arguments, True, False)
    torch.testing.assert_close(first, both[0])  # which may be added up in another order
    assert not nothing.numel()
    nothing, second = operator.compute_backward(*arguments, False, True)
    assert torch.equal(second, both[1])
    assert not nothing.numel()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("layer", ["odd", "depthwise", "pointwise"])
def test_what_is_not_finite_goes_where_convolution_takes_it(layer, where, bad):
    x, weight, conv = operands(*LAYERS[layer])
    (x if where == "x" else weight).view(-1)[7] = bad
    plain = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    out, *gradients = run(x, weight, conv, 3, Penalty(0.01), torch.ones_like(plain))
    touched = plain.isfinite().logical_not()
    assert touched.any()
    if where == "weight":  # convolutions differ in whether they multiply a weight by the padding: here, as in NumPy
        touched[:, touched.any(0).any(1).any(1)] = True
    assert torch.equal(out.isfinite(), touched.logical_not())
    assert not all(g.isfinite().all() for g in gradients)


def test_products_that_equal_the_mean():
    """There omega has a kink, and its derivative counts as 0 on every path."""
    x, weight = torch.randint(-1, 3, (2, 4, 9, 17)).float(), torch.randint(0, 2, (9, 4, 2, 2)) * 2.0 - 1
    products = F.unfold(x, 2).mT.unsqueeze(2) * weight.flatten(1)  # [B, L, O, D]
    assert (products == products.mean(-1, keepdim=True)).any()
    check(x, weight, Convolution(), 1, Penalty(0.01))


def test_large_and_small_numbers():
    x, weight, conv = operands(*LAYERS["odd"])
    for factor in (1e-15, 1e15):
        check(x * factor, weight, conv, 2, Penalty(0.01 * factor))


@pytest.mark.parametrize("layer", ["odd", "depthwise", "pointwise"])
def test_an_empty_batch(layer):
    x, weight, conv = operands(*LAYERS[layer])
    plain = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    out, *gradients = run(x[:0], weight, conv, 2, Penalty(0.1), plain[:0])
    assert out.shape == plain[:0].shape
    assert [g.shape for g in gradients] == [x[:0].shape, weight.shape]
    assert not any(g.any() for g in gradients)


def test_a_hook_that_moves_saved_tensors():
    x, weight, conv = operands(*LAYERS["odd"])
    x, grad = x.to(memory_format=torch.channels_last), torch.randn(3, 5, 9, 11)
    want = run(x, weight, conv, 3, Penalty(0.01), grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        torch.testing.assert_close(run(x, weight, conv, 3, Penalty(0.01), grad), want, rtol=1e-4, atol=1e-5)


def test_offsets_beyond_32_bits():
    # Elements far apart in a storage of which almost nothing is ever touched.
    far = 2**31 + 64
    storage = torch.empty(2 * far)
    x = storage.as_strided((1, 2, 1, 20), (0, far, 0, 3))
    x.copy_(torch.randn(1, 2, 1, 20))
    weight = torch.randn(5, 2, 1, 1)
    near = x.clone(memory_format=torch.contiguous_format)
    torch.testing.assert_close(
        run(x, weight, Convolution(), 3, Penalty(0.01)), run(near, weight, Convolution(), 3, Penalty(0.01))
    )


@pytest.mark.parametrize("rows", [1, 3, 15, 16, 40])
def test_linear_of_few_rows(rows):
    x, weight, bias = torch.randn(rows, 37), torch.randn(50, 37) / 6, torch.randn(50)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    x.requires_grad_(), weight.requires_grad_()
    out = nrpm_linear(x, weight, bias, lam=0.3, eps=0.01)
    want = 0.3 * wide[0] @ wide[1].t() + 0.7 * robust_sum(*wide, Penalty(0.01), 3) + bias
    assert off(out, want) < 1e-5
    grad = torch.randn_like(out)
    for value, wanted in zip(
        torch.autograd.grad(out, (x, weight), grad), torch.autograd.grad(want, wide, grad.double()), strict=True
    ):
        assert off(value, wanted) < 1e-5


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("lam", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_operator_is_what_torch_expects(skip, keep, lam):
    x, weight, conv = operands(*LAYERS["uneven"])
    shape = (conv.stride, conv.padding, conv.dilation, conv.groups)
    lam = torch.tensor(lam, requires_grad=keep and not skip)
    tensors = [t.detach().requires_grad_(keep) for t in (x, weight)]
    numbers = [0.1, 1.0, 0.0, 0.0, math.inf]
    for last in (False, True):
        arguments = (*tensors, lam, skip, *map(list, shape[:3]), conv.groups, 2, numbers, last, keep)
        torch.library.opcheck(operator.mixed_sum, arguments)


class Net(torch.nn.Module):
    """One layer of each kind, with settings that a graph must get right."""

    def __init__(self, lam):
        super().__init__()
        self.conv = torch.nn.Parameter(torch.randn(6, 3, 3, 3) / 5)
        self.linear = torch.nn.Parameter(torch.randn(5, 6) / 2)
        self.lam = torch.nn.Parameter(torch.tensor(lam))

    def forward(self, x):
        x = nrpm_conv2d(x, self.conv, padding=1, lam=self.lam).relu()
        return nrpm_linear(x.mean((2, 3)), self.linear, lam=0.7)


@pytest.mark.parametrize("lam", [0.4, 1.0])
@pytest.mark.parametrize("learned", [False, True])
def test_one_graph(lam, learned):
    torch.manual_seed(1)
    net, x = Net(lam), torch.randn(2, 3, 8, 8, requires_grad=True)
    net.lam.requires_grad_(learned)
    inputs = [p for p in (x, *net.parameters()) if p.requires_grad]
    want = net(x)
    wanted = torch.autograd.grad(want.square().sum(), inputs)
    # aot_eager: the graph and its gradient as everywhere, without the minute that generating code takes.
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), inputs), wanted)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), want)
    exported = torch.export.export(net, (x.detach(),))
    assert "timm_nrpm.mixed_sum" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x.detach()), want)


def test_one_graph_for_many_sizes():
    torch._dynamo.reset()
    net, graphs = Net(0.4), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(net, backend=count, fullgraph=True)
    for batch, size in ((20, 8), (24, 9), (30, 12), (33, 15)):
        x = torch.randn(batch, 3, size, size)
        torch.testing.assert_close(compiled(x), net(x))
    assert len(graphs) == 2  # the second is for sizes that vary
    torch._dynamo.reset()
    symbolic = torch.compile(net, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(symbolic(x), net(x))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_any_batch(strict):
    net = Net(0.4)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(net, (torch.randn(4, 3, 8, 8),), dynamic_shapes=(batch,), strict=strict).module()
    for size in (2, 15, 16, 40):
        x = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(exported(x), net(x))


def test_on_the_meta_device():
    net = Net(0.4).to("meta")
    assert net(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5)


def test_a_graph_follows_lambda():
    x, weight, lam = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.tensor(0.2)
    compiled = torch.compile(lambda x, lam: nrpm_conv2d(x, weight, lam=lam), backend="eager", fullgraph=True)
    for value in (0.2, 1.0, 0.6):
        lam.fill_(value)
        torch.testing.assert_close(compiled(x, lam), nrpm_conv2d(x, weight, lam=value))


@pytest.mark.slow
def test_inductor():
    net, x = Net(0.4), torch.randn(2, 3, 8, 8)
    want = net(x)
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), want)


def test_autocast_computes_in_float32():
    x, weight = torch.randn(2, 64, 9, 9), torch.randn(8, 64, 3, 3) / 24
    want = nrpm_conv2d(x, weight, lam=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nrpm_conv2d(x, weight, lam=0.5), want.bfloat16())
        half = nrpm_conv2d(x.bfloat16(), weight, lam=0.5)
        rows = nrpm_linear(x.flatten(1)[:, :576], weight.flatten(1), lam=0.5)
    assert rows.dtype == half.dtype == torch.bfloat16
    torch.testing.assert_close(rows, nrpm_linear(x.flatten(1)[:, :576], weight.flatten(1), lam=0.5).bfloat16())
    torch.testing.assert_close(half.float(), want, rtol=0.05, atol=0.05)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_lambda_one_is_the_plain_operation_alone():
    x, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4)
    asked = "aten::_local_scalar_dense", "aten::ge.Scalar", "aten::isnan"
    with Operations() as plain:
        F.conv2d(x, weight, bias)
    layer = reprogram_(torch.nn.Conv2d(3, 4, 3), NRPMConfig(lam=1.0))
    with Operations() as ours:
        layer(x)
    assert [name for name in ours.names if name not in asked] == plain.names


def test_a_layer_called_again_keeps_nothing_of_the_first_call():
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    first, second = torch.randn(2, 2, 3, 8, 8).unbind()
    apart = [torch.autograd.grad(nrpm_conv2d(x, weight, lam=0.5).sum(), weight)[0] for x in (first, second)]
    outs = [nrpm_conv2d(x, weight, lam=0.5) for x in (first, second)]
    torch.testing.assert_close(torch.autograd.grad(sum(out.sum() for out in outs), weight)[0], sum(apart))
