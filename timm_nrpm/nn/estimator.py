"""The robust estimate of a sum, written to be read (NRPM, arXiv 2410.04577, sections 3.1 and 3.2).

A linear map computes `z = sum_d p_d` of the products `p_d = a_d * x_d`, which is D times their mean, the minimiser of
a squared loss. Here the loss is a robust one, minimised by `iterations` steps of reweighted least squares (eq. 3),
started at the mean:

    w_d = omega(p_d - m_k)        m_{k+1} = sum_d w_d p_d / sum_d w_d

Everything is in mean units: `m` stands for `z / D`. These functions hold every product in memory; `kernels/`
computes the same without holding them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Penalty:
    """A weight function `omega(t) = clamp(scale / (|t| + eps) - shift, low, high)` of the distance `t = p - m`.

    All available penalties are this formula with different numbers. The weight `omega(t) = rho'(t) / t` belongs to the
    loss `rho`:

    - l1: `rho` grows like `|t|` (the paper's, eq. 1),
    - huber: quadratic up to `delta`, then like `|t|`,
    - mcp: like `|t|` at zero, constant from `gamma` on,
    - huber-mcp: quadratic up to `delta`, constant from `gamma` on,
    - l2: quadratic, so that the estimate is the plain mean.
    """

    eps: float
    scale: float = 1.0
    shift: float = 0.0
    low: float = 0.0
    high: float = math.inf

    @classmethod
    def named(cls, name: str, eps: float, delta: float = 3.0, gamma: float = 4.0) -> Penalty:
        """The penalty called `name`, one of :data:`timm_nrpm.config.PENALTIES`.

        The lower bound `eps` keeps the weights of a redescending penalty from vanishing all at once.
        """
        slope = delta / (gamma - delta) if gamma > delta else math.nan  # used by huber-mcp alone, which forbids it
        return {
            "l1": lambda: cls(eps),
            "huber": lambda: cls(eps, scale=delta, high=1.0),
            "mcp": lambda: cls(eps, shift=1.0 / gamma, low=eps),
            "huber-mcp": lambda: cls(eps, scale=slope * gamma, shift=slope, low=eps, high=1.0),
            "l2": lambda: cls(eps, scale=0.0, shift=-1.0),
        }[name]()

    @property
    def numbers(self) -> tuple[float, float, float, float, float]:
        """The fields in order, so that `Penalty(*penalty.numbers) == penalty`."""
        return self.eps, self.scale, self.shift, self.low, self.high

    @property
    def clamps(self) -> bool:
        return self.low > 0.0 or self.high < math.inf

    def weight(self, t: Tensor) -> Tensor:
        """`omega(t)`, in the shape of `t`."""
        return self._shape(t.abs().add_(self.eps).reciprocal_())

    def weight_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`omega(t)` and its derivative `omega'(t)`, taken as 0 where omega has a kink (t = 0, and at a clamp)."""
        inverse = t.abs().add_(self.eps).reciprocal_()
        slope = (inverse * inverse).mul_(t.sign()).mul_(-self.scale)
        w = self._shape(inverse)
        if self.clamps:
            slope = slope.mul_((w > self.low) & (w < self.high))
        return w, slope

    def _shape(self, inverse: Tensor) -> Tensor:
        # Not in place: autograd keeps `inverse` when it follows the reference.
        w = inverse if self.scale == 1.0 else inverse * self.scale
        w = w - self.shift if self.shift else w
        return w.clamp(self.low, self.high) if self.clamps else w

    def loss(self, t: Tensor) -> Tensor:
        """`rho(t)`, the integral of `t * omega(t)` from 0, by the trapezoid rule: what the iteration minimises.

        For l1 and `eps -> 0` this is `|t|` (eq. 1). It is meant for checks and figures, not for speed.
        """
        steps = torch.linspace(0, 1, 4097, dtype=t.dtype, device=t.device) ** 4  # finest where omega is steepest
        s = steps * t.unsqueeze(-1)
        return torch.trapezoid(s * self.weight(s), s, dim=-1)


def robust_mean(products: Tensor, penalty: Penalty, iterations: int, start: Tensor | None = None) -> Tensor:
    """Robust mean over the last dimension: eq. 3 in mean units, as plain PyTorch that autograd can follow.

    Args:
        products: Products, `[..., D]`.
        penalty: The weight function.
        iterations: Number of steps, the paper's K; 0 gives the start.
        start: Where the steps start, `[...]`; None for the plain mean, as in the paper.

    Returns:
        Robust means, `[...]`, each between the smallest and the largest of its products.

    Example:
        >>> robust_mean(torch.tensor([1.0, 2.0, 300.0]), Penalty.named("l1", 1e-6), 50)
        tensor(2.0000)
    """
    mean = products.mean(-1) if start is None else start  # [...]
    for _ in range(iterations):
        w = penalty.weight(products - mean.unsqueeze(-1))  # [..., D]
        mean = (w * products).sum(-1) / w.sum(-1)
    return mean


def robust_sum(x: Tensor, weight: Tensor, penalty: Penalty, iterations: int) -> Tensor:
    """Robust estimate of `x @ weight.T`, holding all N * O * D products: the reference of the tests and the benchmark.

    Args:
        x: Input, `[N, D]`.
        weight: Weight, `[O, D]`.
        penalty, iterations: The same as in :func:`robust_mean`.

    Returns:
        Robust sums, `[N, O]`.
    """
    products = x.unsqueeze(1) * weight  # [N, O, D]
    return robust_mean(products, penalty, iterations) * x.shape[-1]
