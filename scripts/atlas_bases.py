"""Bases of the atlas: plain models, images on which advice is chosen, judged and trained, and threats for each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from adaptation_bases import Images, photos
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "reproduce"))
from lab import Lab

from timm_nrpm import Shift, Threat
from timm_nrpm.advice.study import Danger
from timm_nrpm.data.loaders import digits

ATTACKED, CORRUPTED = 120, 600
"""Numbers of images of the selection, and of the report, under an attack and after a shift."""

TRAINING = 1500
"""Largest number of training images."""

NATIVE = ("salt_and_pepper", "missing_pixels", "white_noise")
WEATHER = ("gaussian_noise", "motion_blur", "frost", "fog", "contrast", "jpeg_compression")


@dataclass(frozen=True)
class Cell:
    """A question of the atlas.

    Attributes:
        model: The plain model.
        threat: Name of the threat in the atlas, `"Linf"` or `"fog"`.
        danger: The threat.
        seconds: Time for it.
        selection, report: Images to choose on and to judge on.
        training: Images to tune on; None where there are none.
    """

    model: nn.Module
    threat: str
    danger: Danger
    seconds: float
    selection: Images
    report: Images
    training: Images | None


@dataclass(frozen=True)
class Base:
    """A plain model of the atlas.

    Attributes:
        title: Its name, and that of its images.
        model: The model, in evaluation mode.
        held: Images that nobody trained on, in random order.
        training: Training images.
        threats: Attacks, whose bounds leave the model some of its accuracy.
        kinds: Corruptions of the highest severity.
        foreign: Images of the same classes from another source, and its name.
        seconds, shifted: Time for a cell under attack, and for one after a shift, by the cost of the model.
        sparse: Time for a cell under attacks on few pixels; by default as under others.
    """

    title: str
    model: nn.Module
    held: Images
    training: Images | None
    threats: tuple[Threat, ...]
    kinds: tuple[str, ...]
    foreign: tuple[str, Images] | None = None
    seconds: float = 300
    shifted: float = 180
    sparse: float | None = None

    def cells(self, images: int | None) -> list[Cell]:
        """All questions about this model; `images` replaces the numbers of images for each purpose."""
        found = [
            Cell(self.model, danger.norm, danger, seconds, *_two(self.held, images or ATTACKED), self.training)
            for danger, seconds in ((each, self._attacked(each)) for each in self.threats)
        ]
        corrupted = _two(self.held, images or CORRUPTED)
        found += [Cell(self.model, kind, Shift(kind), self.shifted, *corrupted, self.training) for kind in self.kinds]
        if self.foreign is not None:
            found.append(
                Cell(
                    self.model,
                    "another source",
                    Shift(),
                    self.shifted,
                    *_two(self.foreign[1], images or CORRUPTED),
                    None,
                )
            )
        return found

    def _attacked(self, threat: Threat) -> float:
        """Time for a cell under an attack."""
        return self.sparse if self.sparse and threat.norm in ("L0", "patch") else self.seconds


def batches(images: Images, size: int = 60) -> list[Images]:
    """Images in batches."""
    return list(zip(*(part.split(size) for part in images), strict=True))


def _two(images: Images, count: int) -> tuple[Images, Images]:
    """Two parts of the images, without a common one; halves where there are too few."""
    pixels, labels = images
    count = min(count, len(labels) // 2)
    return (pixels[:count], labels[:count]), (pixels[count : 2 * count], labels[count : 2 * count])


def _shuffled(images: Images, count: int | None = None) -> Images:
    order = torch.randperm(len(images[1]), generator=torch.Generator().manual_seed(0))[:count]
    return images[0][order].contiguous(), images[1][order]


def _scaled(images: Images, size: int) -> Images:
    """Images of another size, by means over areas, or bilinear where they grow."""
    mode = "area" if images[0].shape[2] > size else "bilinear"
    return F.interpolate(images[0], (size, size), mode=mode).clamp(0, 1), images[1]


def _threats(linf: float, l2: float, l1: float, l0: int, patch: int) -> tuple[Threat, ...]:
    bounds = {"Linf": linf, "L2": l2, "L1": l1, "L0": l0, "patch": patch}
    return tuple(Threat(norm, eps) for norm, eps in bounds.items())


def bundled(lab: Lab) -> Base:
    """The bundled model of handwritten digits; the images from another source are MNIST's, of 8 pixels."""
    model = timm.create_model("resnet8_digits", pretrained=True)
    foreign = _scaled(_shuffled(lab.images("mnist", "test", 2000)), 8)
    return Base(
        "resnet8_digits, digits", model.eval(), _shuffled(digits("test")), digits("train"),
        _threats(0.15, 0.6, 1.0, 1, 2), NATIVE, ("MNIST", foreign), sparse=600,
    )  # fmt: skip


def _mnist(lab: Lab, title: str, family: str, name: str, threats: tuple[Threat, ...]) -> Base:
    foreign = _scaled(_shuffled(tuple(map(torch.cat, zip(digits("train"), digits("test"), strict=True)))), 28)  # type: ignore[arg-type]
    return Base(
        title, lab.plain(family, name), _shuffled(lab.images("mnist", "test", 2000)),
        _shuffled(lab.images("mnist", "train", 20_000), TRAINING), threats,
        (*NATIVE, "gaussian_noise", "motion_blur", "fog", "contrast", "jpeg_compression"),
        ("scikit-learn's digits", foreign), shifted=100, sparse=600,
    )  # fmt: skip


def mlp(lab: Lab) -> Base:
    """The authors' perceptron of three layers."""
    return _mnist(lab, "MLP, MNIST", "mlp", "mlp3_mnist", _threats(0.05, 0.7, 5.0, 4, 3))


def lenet(lab: Lab) -> Base:
    """A LeNet, naturally trained."""
    return _mnist(lab, "LeNet, MNIST", "lenet", "lenet_mnist", _threats(0.1, 1.2, 8.0, 6, 4))


def _cifar(lab: Lab, title: str, model: nn.Module, threats: tuple[Threat, ...], seconds: float) -> Base:
    held, training = lab.images("cifar10", "test", 2000), lab.images("cifar10", "train", TRAINING)
    return Base(title, model, _shuffled(held), _shuffled(training), threats, (*NATIVE, *WEATHER),
                seconds=seconds, shifted=150)  # fmt: skip


def robust(lab: Lab) -> Base:
    """The authors' adversarially trained narrow ResNet-18."""
    model = lab.plain("resnet", "resnet18_cifar_narrow")
    return _cifar(lab, "narrow ResNet-18, adversarially trained, CIFAR-10", model,
                  _threats(8 / 255, 0.6, 6.0, 2, 4), 500)  # fmt: skip


def natural(lab: Lab) -> Base:
    """The same network, naturally trained by us."""
    lab.efforts = {**lab.efforts, "resnet": replace(lab.efforts["resnet"], samples=25_000, epochs=8)}
    model = lab.trained("resnet", "resnet18_cifar_narrow", {"objective": "clean", "eps": 0.0})
    return _cifar(lab, "narrow ResNet-18, naturally trained, CIFAR-10", model,
                  _threats(1 / 255, 0.1, 1.0, 1, 3), 500)  # fmt: skip


def mixer(lab: Lab) -> Base:
    """A Mixer of two blocks, naturally trained by us."""
    return _cifar(lab, "Mixer-2, CIFAR-10", lab.plain("mixer", "mixer2_cifar"),
                  _threats(1 / 255, 0.15, 2.0, 1, 3), 500)  # fmt: skip


def photographs(lab: Lab) -> Base:
    """ImageNet's `tf_efficientnet_lite0` and some two hundred photos, most of which are the only one of their class."""
    base = photos(lab.data.parent)
    held = base.reported
    return Base(
        "tf_efficientnet_lite0, photos",
        base.model,
        held,
        None,
        (Threat("Linf", 0.25 / 255),),
        (*NATIVE, *WEATHER),
        seconds=600,
        shifted=600,
    )


BASES: dict[str, Callable[[Lab], Base]] = {
    "digits": bundled, "mlp": mlp, "lenet": lenet, "robust": robust, "natural": natural, "mixer": mixer,
    "photos": photographs,
}  # fmt: skip
"""All bases, by their names on the command line."""
