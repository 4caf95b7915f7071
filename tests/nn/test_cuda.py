"""The Triton kernels: under the interpreter and compiled for a GPU that is not there; on one that is, `-m gpu`."""

import json
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

from timm_nrpm.nn.functional import nrpm_conv2d, nrpm_linear

triton = pytest.importorskip("triton", reason="this build of torch comes without Triton")

# batch, channels, outputs, height, width, kernel, stride, padding, dilation, groups
LAYERS = {
    "odd": (2, 3, 4, 6, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "prime": (1, 5, 17, 7, 5, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "uneven": (2, 6, 6, 7, 8, (3, 2), (2, 1), (0, 1), (1, 2), 2),
    "depthwise": (2, 6, 12, 5, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    "patchify": (1, 3, 5, 8, 8, (4, 4), (4, 4), (0, 0), (1, 1), 1),
    "pointwise": (1, 70, 4, 13, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "many positions": (3, 2, 2, 17, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1),  # which are split
    "one of everything": (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
}

# Whether Triton interprets is decided when it is imported, hence a process of its own.
INTERPRETED = """
    import json, os, sys
    os.environ["TRITON_INTERPRET"] = "1"
    import torch, torch.nn.functional as F
    from timm_nrpm.nn.estimator import Penalty
    from timm_nrpm.nn.kernels import cuda, operator

    def off(value, want):
        return ((value.double() - want).norm() / want.norm().clamp_min(1e-30)).item()

    torch.manual_seed(0)
    cuda.RECIPROCAL = "divide"  # the interpreter has no special function unit
    errors = []
    batch, channels, outputs, height, width, kernel, *shape = json.loads(sys.argv[1])
    x = torch.randn(batch, channels, height, width).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels // shape[-1], *kernel)
    plain = F.conv2d(x, weight, None, *shape)
    grad = torch.randn_like(plain)
    needs = (True, True)
    for name, iterations in (("l1", 1), ("l1", 3), ("huber-mcp", 2)):
        settings = (*shape, iterations, Penalty.named(name, 0.05, 0.3, 1.0).numbers)
        lam, skip = torch.tensor(0.3), iterations != 1
        wide = [t.double() for t in (x, weight, lam)]
        want, states = operator.compute(*wide, skip, *settings, True, True)
        wanted = operator.compute_backward(grad.double(), *wide, states, skip, *settings, *needs)
        out, state = cuda.compute(x, weight, lam, skip, *settings, True, True)
        alone, _ = cuda.compute(x, weight, lam, skip, *settings, False, False)
        gradients = cuda.compute_backward(grad, x, weight, lam, state, skip, *settings, *needs)
        errors += [off(*pair) for pair in zip((out, alone, state, *gradients), (want, want, states, *wanted))]
        one = torch.tensor(1.0)  # the work is skipped, bit for bit
        out, state = cuda.compute(x, weight, one, True, *settings, True, True)
        gradients = cuda.compute_backward(grad, x, weight, one, state, True, *settings, *needs)
        wanted = operator.convolution(*shape).plain_gradients(grad, x, weight, needs)
        skipped = torch.equal(out, plain) and all(map(torch.equal, gradients, wanted))
        errors.append(0.0 if skipped else 1.0)
        # A reciprocal with a Newton step from one of 15 bits.
        cuda.RECIPROCAL = "newton"
        errors.append(off(cuda.compute(x, weight, lam, True, *settings, True, False)[0], want))
        cuda.RECIPROCAL = "divide"
    print(json.dumps(errors))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_interpreted(layer):
    command = [sys.executable, "-c", textwrap.dedent(INTERPRETED), json.dumps(LAYERS[layer])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 3 * (5 + 2)
    assert max(errors) < 1e-5


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kernel", ["forward", "backward_x", "backward_weight"])
def test_compiles_without_a_gpu(kernel, architecture):
    """Triton's own compiler takes the kernel down to machine code; the smallest and the largest tile."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from timm_nrpm.nn.kernels import cuda, cuda_kernels

    tuned = getattr(cuda_kernels, kernel)
    names = tuned.fn.arg_names
    constants = {"STEPS": 3, "KH": 3, "KW": 3, "SH": 1, "SW": 1, "PH": 1, "PW": 1, "DH": 1, "DW": 1, "GENERAL": True}
    constants |= {"RECIPROCAL": cuda.RECIPROCAL, "SKIP": True}
    pointers = {"x", "weight", "plain", "lam", "out", "state", "grad", "grad_x", "grad_weight"}
    for config in (tuned.configs[0], tuned.configs[-1]):
        fixed = {**constants, "KEEP": True, **config.kwargs}
        signature = {
            name: "constexpr" if name in fixed
            else "*fp32" if name in pointers
            else "fp32" if name in ("eps", "scale", "shift", "low", "high")
            else "i32"
            for name in names
        }  # fmt: skip
        source = ASTSource(tuned.fn, signature, {(names.index(n),): v for n, v in fixed.items() if n in names})
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": config.num_warps})
        assert len(compiled.asm["cubin"]) > 1000
        # The state may have more elements than 32 bits count.
        assert not re.search(r"arith\.muli [^:]*%whole[^:]*: i32", compiled.asm["ttir"])


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["l1", "huber", "mcp", "huber-mcp"])
def test_on_a_gpu(layer, name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the plain sums are compared, too
    assert torch.cuda.is_available(), "there is no CUDA device: leave the marker gpu out"
    batch, channels, outputs, height, width, kernel, stride, padding, dilation, groups = LAYERS[layer]
    x = torch.randn(8 * batch, channels, height, width, requires_grad=True)
    weight = torch.randn(outputs, channels // groups, *kernel, requires_grad=True)
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "penalty": name}
    settings |= {"lam": 0.3, "eps": 0.01, "delta": 0.3, "gamma": 1.0}
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        inputs = [t.detach().to(device, dtype).requires_grad_() for t in (x, weight)]
        out = nrpm_conv2d(*inputs, **settings)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for want, value in zip(*results, strict=True):
        assert ((value.cpu().double() - want).norm() / want.norm()).item() < 1e-5


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    x, weight, lam = torch.randn(64, 32, device="cuda"), torch.randn(16, 32, device="cuda"), torch.tensor(0.5).cuda()
    want = nrpm_linear(x, weight, lam=lam)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nrpm_linear(x, weight, lam=lam)
    graph.replay()
    torch.testing.assert_close(out, want)
    lam.fill_(1.0)
    graph.replay()
    torch.testing.assert_close(out, F.linear(x, weight))
