"""Models and images on which the related systems are measured."""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "reproduce"))
import adaptation_bases
from lab import Lab
from subnetworks import QUICK, networks

from timm_nrpm.data.loaders import digits

Images = tuple[Tensor, Tensor]  # pixels [N, C, H, W] in [0, 1], labels [N]
PARTS = ("selection", "report")


class Bases:
    """Fresh copies of the models, and images of which no purpose shares one with another.

    Args:
        shared: Folder of the datasets and of the published weights.
        kept: Folder of the networks that are trained here, which takes some minutes once.
        times: Factor to the numbers of images of CIFAR-10 to choose on and to judge on.
    """

    def __init__(self, shared: Path, kept: Path, *, times: int = 1) -> None:
        self.times = times
        self.shared, self.lab = shared, Lab("quick", shared / "data", shared / "checkpoints", kept / "models")

    def narrow(self, *, robust: bool) -> nn.Module:
        """The narrow ResNet-18 of CIFAR-10, with the published adversarially trained weights, or trained on from these
        on clean images."""
        natural, star = networks(self.lab, QUICK[0])
        return (star if robust else natural).eval()

    def cifar(self, part: str, count: int) -> Images:
        """Images of CIFAR-10 for training (`"train"`), to choose on (`"selection"`) and to judge on (`"report"`)."""
        if part == "train":
            return self.lab.images("cifar10", "train", count)
        return _every_other(self.lab.images("cifar10", "test", 2 * self.times * count), part)

    def digits(self) -> nn.Module:
        """The bundled model of handwritten digits."""
        return timm.create_model("resnet8_digits", pretrained=True).eval()

    def digit_images(self, part: str, count: int) -> Images:
        """Handwritten digits, 180 at most to choose on and as many to judge on."""
        pixels, labels = digits("train" if part == "train" else "test")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images = pixels[order], labels[order]
        if part == "train":
            return images[0][:count], images[1][:count]
        return _every_other((images[0][: 2 * count], images[1][: 2 * count]), part)

    def efficientnet(self) -> nn.Module:
        """ImageNet's `tf_efficientnet_lite0`."""
        return adaptation_bases.photos(self.shared).model

    def photos(self) -> Images:
        """Some two hundred photos, most of which are the only one of their class, in random order."""
        return adaptation_bases.photos(self.shared).reported


def _every_other(images: Images, part: str) -> Images:
    start = PARTS.index(part)
    return images[0][start::2].contiguous(), images[1][start::2]
