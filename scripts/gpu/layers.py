"""The layers whose operator is measured: convolutions, and linear maps where `kernel` is 0."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.session import Work
from timm_nrpm.nn.estimator import Penalty, robust_mean
from timm_nrpm.nn.functional import nrpm_conv2d, nrpm_linear
from timm_nrpm.nn.kernels.convolution import Convolution, Pair

EPS, K = 1e-3, 3
Settings = tuple[Pair, Pair, Pair, int, int, tuple[float, ...]]


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer; `size` is the height and width of the images, and a linear map has `batch` rows."""

    batch: int
    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1

    def __str__(self) -> str:
        if not self.kernel:
            return f"linear {self.channels} to {self.outputs}, {self.batch} rows"
        kind = (
            "depthwise " if self.groups == self.channels > 1 else f"{self.groups} groups, " if self.groups > 1 else ""
        )
        stride = f"/{self.stride}" if self.stride > 1 else ""
        across = f"{self.channels}" if self.groups == self.channels > 1 else f"{self.channels} to {self.outputs}"
        return f"{kind}{self.kernel}x{self.kernel}{stride}, {across}, {self.size}x{self.size}, batch {self.batch}"

    @property
    def convolution(self) -> Convolution:
        return Convolution((self.stride,) * 2, (self.padding,) * 2, (1, 1), self.groups)

    def tensors(self, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Random input and weight, which require gradients."""
        kernel = (self.kernel, self.kernel) if self.kernel else ()
        images = (self.size, self.size) if self.kernel else ()
        x = torch.randn(self.batch, self.channels, *images, device=device, dtype=dtype)
        weight = torch.randn(self.outputs, self.channels // self.groups, *kernel, device=device, dtype=dtype)
        return x.requires_grad_(), weight.div_(weight[0].numel() ** 0.5).requires_grad_()

    def products(self, weight: Tensor) -> int:
        """Number of products, each counted once, whatever K is."""
        side = (self.size + 2 * self.padding - self.kernel) // self.stride + 1 if self.kernel else 1
        return self.batch * side * side * weight.numel()

    def forwards(self, x: Tensor, weight: Tensor) -> dict[str, Work]:
        """The reprogrammed layer at lambda 0, the plain one, and the reference that holds every product."""
        reference = partial(self._reference, x, weight)
        if not self.kernel:
            ours = partial(nrpm_linear, x, weight, lam=0.0, iterations=K, eps=EPS)
            return {"ours": ours, "plain": partial(F.linear, x, weight), "reference": reference}
        settings = {"stride": self.stride, "padding": self.padding, "groups": self.groups}
        ours = partial(nrpm_conv2d, x, weight, lam=0.0, iterations=K, eps=EPS, **settings)  # type: ignore[arg-type]
        return {"ours": ours, "plain": partial(F.conv2d, x, weight, **settings), "reference": reference}

    def operands(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight of the convolution that the kernels see, without gradients."""
        x, weight = x.detach(), weight.detach()
        return (x, weight) if self.kernel else (x.t()[None, :, None], weight[..., None, None])

    def settings(self, penalty: Penalty, iterations: int) -> Settings:
        """What the operator is told besides tensors and lambda, in the order of its arguments."""
        conv = self.convolution
        return conv.stride, conv.padding, conv.dilation, conv.groups, iterations, penalty.numbers

    def _reference(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.kernel:
            x, weight = x.t()[None, :, None], weight[..., None, None]
        columns = self.convolution.columns(x, weight)  # [G, D, P]
        matrix = weight.flatten(1).unflatten(0, (self.groups, -1))  # [G, O, D]
        products = matrix.unsqueeze(2) * columns.mT.unsqueeze(1)  # [G, O, P, D]
        return robust_mean(products, Penalty.named("l1", EPS), K) * matrix.shape[2]


def without_gradients(forward: Work) -> Work:
    def step() -> Tensor:
        with torch.no_grad():
            return forward()

    return step


def with_gradients(forward: Work, x: Tensor, weight: Tensor) -> Work:
    """Forward and backward pass, with respect to the input and the weight."""

    def step() -> tuple[Tensor, ...]:
        out = forward()
        return torch.autograd.grad(out, (x, weight), torch.ones_like(out))

    return step


RESNET50 = (
    Layer(32, 3, 64, 224, 7, 2, 3),
    Layer(32, 64, 64, 56, 3, 1, 1),
    Layer(32, 256, 64, 56, 1),
    Layer(32, 64, 256, 56, 1),
    Layer(32, 128, 128, 28, 3, 1, 1),
    Layer(32, 256, 256, 14, 3, 1, 1),
    Layer(32, 512, 512, 7, 3, 1, 1),
    Layer(32, 2048, 512, 7, 1),
)
OTHERS = (
    Layer(64, 16, 16, 32, 3, 1, 1),
    Layer(32, 256, 256, 28, 3, 1, 1, 256),
    Layer(32, 3, 192, 224, 16, 16),
    Layer(6272, 384, 384, 0, 0),
    Layer(32, 2048, 1000, 0, 0),
)
LAYERS = (*RESNET50[1:4], *OTHERS, RESNET50[0], *RESNET50[4:])
"""All layers, those first that a short run should have."""

TINY = (Layer(2, 4, 4, 6, 3, 1, 1), Layer(2, 6, 6, 5, 3, 1, 1, 6), Layer(16, 8, 5, 0, 0))
"""Layers of a quick run."""

SMALL = (
    Layer(4, 5, 17, 9, 3, 2, 1),
    Layer(4, 6, 12, 6, 3, 1, 1, 6),
    Layer(4, 70, 4, 13, 1),
    Layer(4, 3, 5, 16, 4, 4),
    Layer(33, 40, 21, 0, 0),
)
"""Odd sizes, for comparisons with float64."""
