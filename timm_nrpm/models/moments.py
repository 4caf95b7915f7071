"""Moments of the channels of layers, exact over many batches."""

from __future__ import annotations

from torch import Tensor


class Moments:
    """Exact mean and variance of each channel over all values seen so far, in float64.

    Args:
        count: Number of values in each channel.
        mean: Mean of each channel, `[C]`.
        squares: Sum of squared distances to the mean in each channel, `[C]`.
    """

    def __init__(self, count: int, mean: Tensor, squares: Tensor) -> None:
        self.count, self.mean, self.squares = count, mean, squares

    @classmethod
    def of(cls, values: Tensor, channel: int) -> Moments:
        """Moments of `values`, of any shape, whose channels are in dimension `channel`."""
        rows = values.detach().movedim(channel, 0).flatten(1).double()  # [C, n]
        mean = rows.mean(1)
        return cls(rows.shape[1], mean, (rows - mean.unsqueeze(1)).square().sum(1))

    def __add__(self, other: Moments) -> Moments:
        total = self.count + other.count
        distance = other.mean - self.mean
        squares = self.squares + other.squares + distance.square() * (self.count * other.count / total)
        return Moments(total, self.mean + distance * (other.count / total), squares)

    @property
    def var(self) -> Tensor:
        return self.squares / max(self.count - 1, 1)
