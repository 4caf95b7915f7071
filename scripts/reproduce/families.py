"""The paper's experiments as data: backbones, their datasets, and how much of them is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

DATA = (
    "MNIST/, cifar10/ and cifar-100-python/ as torchvision or class folders in tars keep them, svhn/, imagenet10/ with "
    "train/ and val/"
)
USEFUL = {"resnet": 30.0}
"""By family: the clean accuracy in % below which quick mode leaves out the worst case, which takes minutes."""


@dataclass(frozen=True)
class Family:
    """Backbones that the paper measures in the same way.

    Attributes:
        dataset: Name of the dataset, a key of `READERS`.
        budgets: Linf bounds of the attack, in pixel units of [0, 1].
        attack: `"fgsm"`, or `"pgd"` for PGD with 20 steps of 2/255.
        estimate: Arguments of :class:`timm_nrpm.NRPMConfig`: the paper's K = 1, eps and layers of its authors' code.
        train: Arguments of :class:`timm_nrpm.TuneConfig` for training a plain model from scratch.
        published: File names of the authors' weights by backbone.
        wrong_stays: Whether an image that is misclassified when clean counts as wrong under attack too, as in the
            authors' code for MNIST. In their code for CIFAR-10 only the attacked image counts.
    """

    dataset: str
    budgets: Sequence[float]
    attack: str
    estimate: Mapping[str, Any]
    train: Mapping[str, Any]
    published: Mapping[str, str] = field(default_factory=dict)
    wrong_stays: bool = False


ADAM = {"optimizer": "adamw", "lr": 0.001, "weight_decay": 1e-4}
FAMILIES = {
    "mlp": Family(
        "mnist", (0.05, 0.1, 0.15, 0.2, 0.25, 0.3), "fgsm", {"iterations": 1, "eps": 5e-5}, ADAM,
        published={"mlp3_mnist": "mlp3_mnist_model.pth"}, wrong_stays=True,
    ),
    "lenet": Family(
        "mnist", (0.05, 0.1, 0.15, 0.2, 0.25, 0.3), "fgsm", {"iterations": 1, "eps": 1e-3, "layers": ("conv*",)},
        {**ADAM, "lr": 0.002}, wrong_stays=True,
    ),
    "svhn": Family(
        "svhn", tuple(i / 255 for i in (1, 2, 4, 8, 16, 32, 64)), "pgd",
        {"iterations": 1, "eps": 1e-3, "layers": ("conv*",)}, ADAM,
    ),
    "imagenet10": Family(
        "imagenet10", tuple(i / 255 for i in (2, 4, 8)), "pgd",
        {"iterations": 1, "eps": 1e-3, "layers": ("conv*",)}, ADAM,
    ),
    "mixer": Family(
        "cifar10", tuple(i / 255 for i in (1, 2, 3, 4, 8)), "pgd", {"iterations": 1, "eps": 1e-3}, ADAM
    ),
    "resnet": Family(
        "cifar10", tuple(i / 255 for i in (8, 16, 32)), "pgd",
        {"iterations": 1, "eps": 5e-4, "layers": ("layer*.conv*",)},
        {"optimizer": "momentum", "lr": 0.1, "objective": "pgd", "eps": 8 / 255},
        published={"resnet18_cifar_narrow": "tinyresnet18_cifar10_model.t7"},
    ),
}  # fmt: skip
FAMILIES["cifar100"] = replace(FAMILIES["resnet"], dataset="cifar100", published={})

READERS = {
    "mnist": (("torch/mnist", ""),),
    "cifar10": (("tar", "cifar10-jpeg"), ("tar", "cifar10"), ("torch/cifar10", "")),
    "cifar100": (("torch/cifar100", ""),),
    "svhn": (("torch/svhn", "svhn"),),
    "imagenet10": (("folder", "imagenet10"),),
}
"""By dataset: readers and their folders, in the order in which they are tried. torchvision's can be downloaded."""


@dataclass(frozen=True)
class Effort:
    """How much is measured and trained.

    Attributes:
        images: Number of test images under the paper's attack; None for all.
        worst: Number of those images that the adaptive suite attacks.
        steps, queries: Numbers of steps and queries of that suite.
        samples: Number of training images; None for all.
        epochs: Number of epochs of training from scratch.
        tuning: Number of epochs of paradigms 2 and 3, and of their control.
    """

    images: int | None
    worst: int
    steps: int = 10
    queries: int = 50
    samples: int | None = None
    epochs: int = 1
    tuning: int = 1


EFFORTS: dict[str, dict[str, Effort]] = {
    "quick": {
        "mlp": Effort(1000, 500, epochs=5),
        "lenet": Effort(1000, 500, epochs=4),
        "svhn": Effort(1000, 50, samples=10_000, epochs=5),
        "imagenet10": Effort(200, 20, samples=2000, epochs=5),
        "mixer": Effort(50, 10, samples=10_000, epochs=8),
        "resnet": Effort(1000, 25, samples=5000),
        "cifar100": Effort(1000, 25, samples=5000),
    },
    "full": {
        "mlp": Effort(1000, 1000, 50, 300, epochs=50, tuning=5),  # the first thousand, as in the authors' code
        "lenet": Effort(1000, 1000, 50, 300, epochs=50, tuning=5),
        "svhn": Effort(None, 1000, 50, 300, epochs=50, tuning=5),
        "imagenet10": Effort(None, 500, 50, 300, epochs=50, tuning=5),
        "mixer": Effort(None, 1000, 50, 300, epochs=100, tuning=5),
        "resnet": Effort(None, 1000, 50, 300, epochs=200, tuning=5),
        "cifar100": Effort(None, 1000, 50, 300, epochs=200, tuning=5),
    },
}
