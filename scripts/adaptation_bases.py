"""Bases for the measurements of adaptation: a plain model, images on which settings are chosen, and others."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).parent / "reproduce"))
from lab import Lab

from timm_nrpm.data.loaders import digits
from timm_nrpm.nn.pixel_model import PixelModel

Images = tuple[Tensor, Tensor]  # pixels [N, C, H, W] in [0, 1], labels [N]


@dataclass(frozen=True)
class Base:
    """A plain model and its images, whose order is random.

    Attributes:
        title: Name of the model and of its images.
        model: The plain model, in evaluation mode.
        chosen: Images on which settings were chosen; there may be none.
        reported: All others.
    """

    title: str
    model: nn.Module
    chosen: Images
    reported: Images


def predictions(model: nn.Module, pixels: Tensor) -> Tensor:
    """The class that the model gives each image, `[N]`."""
    net = PixelModel(model).eval()
    with torch.no_grad():
        return torch.cat([net(batch).argmax(1) for batch in pixels.split(256)])


def interval(differences: Tensor) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % interval, by the normal approximation, in points."""
    values = 100 * differences.double()
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def narrow_resnet(shared: Path, count: int) -> Base:
    """The authors' adversarially trained ResNet-18 of CIFAR-10, with `count` images for each purpose."""
    lab = Lab("quick", shared / "data", shared / "checkpoints", shared)
    pixels, labels = _shuffled(lab.images("cifar10", "test", 2 * count))
    model = lab.plain("resnet", "resnet18_cifar_narrow").requires_grad_(False)
    chosen, reported = ((pixels[i : i + count], labels[i : i + count]) for i in (0, count))
    return Base("the narrow ResNet-18, CIFAR-10", model, chosen, reported)


def bundled() -> Base:
    """The bundled model of handwritten digits."""
    pixels, labels = _shuffled(digits("test"))
    model = timm.create_model("resnet8_digits", pretrained=True).eval().requires_grad_(False)
    return Base("resnet8_digits, its digits", model, (pixels[:0], labels[:0]), (pixels, labels))


def photos(shared: Path) -> Base:
    """timm's `tf_efficientnet_lite0` and the few photos of SHARED, most of which are the only one of their class."""
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(load_file(shared / "checkpoints" / "tf_efficientnet_lite0.safetensors"))
    config = resolve_model_data_config(model)
    transform = create_transform(
        config["input_size"], mean=(0.0,) * 3, std=(1.0,) * 3, interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
    )  # fmt: skip
    folder = ImageFolder(str(shared / "data" / "photos"), transform)
    pairs = [(image.clamp(0, 1), int(folder.classes[label])) for image, label in folder]
    pixels, labels = _shuffled((torch.stack([p for p, _ in pairs]), torch.tensor([n for _, n in pairs])))
    model.eval().requires_grad_(False)
    return Base("tf_efficientnet_lite0, photos", model, (pixels[:0], labels[:0]), (pixels, labels))


def _shuffled(images: Images) -> Images:
    order = torch.randperm(len(images[0]), generator=torch.Generator().manual_seed(0))
    return images[0][order].contiguous(), images[1][order]
