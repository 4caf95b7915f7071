"""Timm models that are so small that a pass takes milliseconds, one of each kind, and images for them."""

import timm
import torch
from torch import nn

from timm_nrpm import NRPMConfig, reprogram_

DIGITS = "resnet8_digits"
SMALL = {
    DIGITS: ({}, (1, 8, 8)),
    "vit_tiny_patch16_224": (
        {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4},
        (3, 16, 16),
    ),
    "convnext_atto": (
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "ls_init_value": 1.0, "num_classes": 4},
        (3, 32, 32),
    ),
}
"""Arguments of each architecture, and the size of its images."""


def small(name, lam=None, **settings):
    """A plain model, or the same model reprogrammed with one lambda."""
    torch.manual_seed(1)
    model = timm.create_model(name, **{**SMALL[name][0], **settings})
    for module in model.modules():  # a block that ends in zeros would hide what is before it
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model if lam is None else reprogram_(model, NRPMConfig(lam=lam))


def images(name, number=4):
    return torch.rand(number, *SMALL[name][1], generator=torch.Generator().manual_seed(2))
