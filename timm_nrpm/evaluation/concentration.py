"""How far a mean of samples may be from the true mean."""

from __future__ import annotations

import math

from torch import Tensor


def deviation(samples: Tensor, beta: float) -> Tensor:
    """Return how far the mean of samples may lie on one side of the true mean, `[...]`: the smaller of the bounds of
    Hoeffding and of Bernstein.

    The true mean is above the mean of the samples by more than this with probability `beta` at most, and below it by
    more than this with probability `beta` at most. Since each of both bounds is wrong with probability `beta / 2` at
    most, so is the smaller of them with `beta` (the union bound): that it is chosen by the samples does no harm.
    Hoeffding's bound depends on the number of samples alone (J. Am. Stat. Assoc. 58, 1963, theorem 2), the empirical
    Bernstein bound also on their variance (Maurer and Pontil, arXiv 0907.3740, theorem 4).

    Args:
        samples: Independent samples of numbers in [0, 1], `[..., S]`, two at least.
        beta: Probability that the bound is wrong, above 0 and below 1.

    Example:
        >>> deviation(torch.tensor([[0.0, 1.0] * 128, [0.5] * 256]), beta=0.001)
        tensor([0.1218, 0.0759])
    """
    n, unlikely = samples.shape[-1], math.log(2 / beta)
    hoeffding = math.sqrt(unlikely / (2 * n))
    # Each of the empirical bound's two steps fails with half of its share of beta.
    unlikelier = math.log(4 / beta)
    spread = samples.var(-1, correction=1)
    bernstein = (2 * spread * unlikelier / n).sqrt() + 7 * unlikelier / (3 * (n - 1))
    return bernstein.clamp(max=hoeffding)
