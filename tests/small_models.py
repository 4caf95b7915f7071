"""Small models of pixels that tests share."""

import math

import torch
from torch import nn

SHAPE = (3, 4, 4)


def bowl(seed=0, shape=SHAPE, spread=1 / 3):
    """A smooth three-class model on pixels, curved enough for single steps to overshoot."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 16), nn.Tanh(), nn.Linear(16, 3))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    return net
