"""Images and models for the paper's experiments: read or trained once, measured as the paper does and adaptively."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_nrpm import NRPMConfig, Threat, TuneConfig, calibrate_, evaluate, lambdas, reprogram_, restore_, tune
from timm_nrpm.attacks.library import Run, fgsm, pgd
from timm_nrpm.data.loaders import pixel_loader
from timm_nrpm.jobs.journal import digest_of
from timm_nrpm.models.backbones import load_published_
from timm_nrpm.models.base import checksum_of
from timm_nrpm.models.modes import attackable
from timm_nrpm.models.reprogramming import model_sha256
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.version import __version__

DATA = "MNIST/ and cifar10/ as torchvision or class folders in tars keep them, svhn/, imagenet10/ with train/ and val/"
BATCH = 250
USEFUL = {"resnet": 30.0}
"""Clean accuracy in % below which quick mode does not ask for the worst case, where that takes minutes."""


class Missing(Exception):
    """Images or weights that are not here, and where they would have to be."""


@dataclass(frozen=True)
class Family:
    """Backbones that the paper measures alike.

    Attributes:
        dataset: One of `READERS`.
        budgets: Of the attack, Linf, in pixel units.
        attack: `"fgsm"`, or `"pgd"`: 20 steps of 2/255.
        estimate: Of :class:`timm_nrpm.NRPMConfig`: the paper's K = 1, and eps and layers of its authors' code.
        train: Of :class:`timm_nrpm.TuneConfig`, to train a plain model from nothing.
        published: The authors' weights, by backbone.
        wrong_stays: Whether an image that is wrong when clean counts as wrong whatever the attack makes of it, as in
            the authors' code for MNIST; in that for CIFAR-10 an attack may put it right.
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

READERS = {
    "mnist": (("torch/mnist", ""),),
    "cifar10": (("tar", "cifar10-jpeg"), ("tar", "cifar10"), ("torch/cifar10", "")),
    "svhn": (("torch/svhn", "svhn"),),
    "imagenet10": (("folder", "imagenet10"),),
}
"""Of each dataset, how it may be read and in which folder; those of torchvision may be downloaded."""


@dataclass(frozen=True)
class Effort:
    """How much is measured and trained.

    Attributes:
        images: Test images under the paper's attack; None for all.
        worst: Of them, those that the adaptive suite attacks.
        steps, queries: Of that suite.
        samples: Training images; None for all.
        epochs: Of training from nothing.
        tuning: Epochs of paradigms 2 and 3, and of their control.
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
        "mlp": Effort(1000, 50, epochs=5),
        "lenet": Effort(1000, 50, epochs=4),
        "svhn": Effort(1000, 50, samples=10_000, epochs=5),
        "imagenet10": Effort(200, 20, samples=2000, epochs=5),
        "mixer": Effort(50, 10, samples=10_000, epochs=8),
        "resnet": Effort(1000, 25, samples=5000),
    },
    "full": {
        "mlp": Effort(1000, 1000, 50, 300, epochs=50, tuning=5),  # the first thousand, as the authors' code has it
        "lenet": Effort(1000, 1000, 50, 300, epochs=50, tuning=5),
        "svhn": Effort(None, 1000, 50, 300, epochs=50, tuning=5),
        "imagenet10": Effort(None, 500, 50, 300, epochs=50, tuning=5),
        "mixer": Effort(None, 1000, 50, 300, epochs=100, tuning=5),
        "resnet": Effort(None, 1000, 50, 300, epochs=200, tuning=5),
    },
}


class Lab:
    """Where experiments are made.

    Args:
        mode: `"quick"` or `"full"`, see `EFFORTS`.
        data: Folder of datasets.
        checkpoints: Folder of the authors' published weights.
        kept: Folder of what was trained and measured, so that another experiment, or a run that was stopped, has it.
        authors: A checkout of their repository, for the comparison with their code.
        resume: Whether to take numbers from there; models are taken in any case.
        download: Whether torchvision may download.
    """

    seed = 0

    def __init__(
        self,
        mode: str,
        data: Path,
        checkpoints: Path,
        kept: Path,
        *,
        authors: Path | None = None,
        resume: bool = False,
        download: bool = False,
    ) -> None:
        self.mode, self.data, self.checkpoints, self.kept, self.authors = mode, data, checkpoints, kept, authors
        self.resume, self.download = resume, download
        self.efforts = EFFORTS[mode]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._images: dict[tuple[str, str, int | None], tuple[Tensor, Tensor]] = {}
        self._plain: dict[str, nn.Module] = {}
        self._found: dict[str, Any] = {}

    def settings(self, families: Sequence[str]) -> dict[str, Any]:
        """Of what is measured on backbones of these families."""
        return {name: {**asdict(FAMILIES[name]), **asdict(self.efforts[name])} for name in families}

    def described(self, family: str) -> str:
        """How much is measured, in words."""
        effort, own = self.efforts[family], FAMILIES[family]
        which = f"the first {effort.images} test images" if effort.images else "all test images"
        if own.dataset == "cifar10" and effort.images:
            which = f"{effort.images} test images, the first {effort.images // 10} of each class"
        if own.dataset == "cifar10" and (self.data / READERS["cifar10"][0][1]).exists():
            which += ", which are here as JPEG files and so not CIFAR-10's very pixels"
        least = USEFUL.get(family)
        worst = f"the worst case on {effort.worst} of them, over the adaptive suite with {effort.steps} steps and "
        worst += f"{effort.queries} queries"
        if least and self.mode == "quick":
            worst += f", where at least {least:g} % are right when clean"
        return f"Accuracy in % on {which}; {worst}."

    # Images

    def loader(self, dataset: str, split: str, **options: Any) -> DataLoader[Any]:
        """Of pixels and labels.

        Raises:
            Missing: The dataset is not here.
        """
        size = {"mnist": (1, 28, 28), "imagenet10": (3, 224, 224)}.get(dataset, (3, 32, 32))
        split = "validation" if (dataset, split) == ("imagenet10", "test") else split
        reasons = []
        for reader, folder in READERS[dataset]:
            if not (self.data / folder).exists() and not self.download:
                reasons.append(f"there is no {folder or 'folder of data'}")
                continue
            try:
                return pixel_loader(reader, self.data / folder, split=split, input_size=size,
                                    download=self.download and reader.startswith("torch/"), **options)  # fmt: skip
            except (ValueError, FileNotFoundError) as error:
                reasons.append(str(error))
        raise Missing(f"{dataset} is not here ({reasons[-1].split('(')[0].strip().rstrip('.')}): --data holds {DATA}.")

    def images(self, dataset: str, split: str = "test", count: int | None = None) -> tuple[Tensor, Tensor]:
        """Pixels and labels, always the same: the first, as the authors' code takes them, and where the files are in
        the order of ten classes, the first of each."""
        key = (dataset, split, count)
        if key not in self._images:
            every = self.loader(dataset, split).dataset
            size = len(every)  # type: ignore[arg-type]  # these datasets have one
            count = min(count or size, size)
            blocks = 10 if isinstance(every, ImageDataset) else 1
            each, block = math.ceil(count / blocks), size // blocks
            chosen = range(size) if count == size else [i // each * block + i % each for i in range(count)]
            pixels, labels = zip(*(every[i] for i in chosen), strict=True)
            self._images[key] = torch.stack(pixels).to(self.device), torch.tensor(labels).to(self.device)
        return self._images[key]

    # Models

    def plain(self, family: str, name: str, **build: Any) -> nn.Module:
        """A plain model: the published weights where the authors published some, else trained from nothing."""
        known = f"{name} {build}"
        if known not in self._plain:
            file = FAMILIES[family].published.get(name)
            model = timm.create_model(name, **build)
            if file is None:
                model = self.trained(family, name, {}, **build)
            elif (self.checkpoints / file).is_file():
                load_published_(model, self.checkpoints / file)
            else:
                raise Missing(f"{file} is not in the folder of --checkpoints: it is in the authors' repository")
            self._plain[known] = model.eval().to(self.device)
        return copy.deepcopy(self._plain[known])

    def reprogrammed(
        self,
        family: str,
        name: str,
        lam: float,
        calibrated: bool = False,
        *,
        build: Mapping[str, Any] | None = None,
        **estimate: Any,
    ) -> nn.Module:
        """The plain model at one lambda, with the estimate of its family where `estimate` says nothing else."""
        model = self.plain(family, name, **(build or {}))
        reprogram_(model, NRPMConfig(lam=lam, **{**FAMILIES[family].estimate, **estimate}))
        return self.calibrated(family, model) if calibrated else model

    def calibrated(self, family: str, model: nn.Module) -> nn.Module:
        """On a thousand training images."""
        pixels, _ = self.images(FAMILIES[family].dataset, "train", 1000)
        return calibrate_(model, pixels.split(BATCH))

    def tuned(
        self, family: str, model: nn.Module, settings: Mapping[str, Any], samples: int | None = None
    ) -> nn.Module:
        """Tuned on the training images, or what an earlier run has tuned from the same start in the same way."""
        effort = self.efforts[family]
        settings = {"epochs": effort.tuning, **settings}
        return self._tuned(family, model, settings, samples or effort.samples)

    def trained(self, family: str, name: str, settings: Mapping[str, Any], **build: Any) -> nn.Module:
        """A plain model trained from nothing, as its family is but for `settings`."""
        torch.manual_seed(self.seed)
        model = reprogram_(timm.create_model(name, **build), NRPMConfig(lam=1.0))
        settings = {"epochs": self.efforts[family].epochs, "objective": "clean", **FAMILIES[family].train, **settings}
        settings |= {"paradigm": "all", "trainable": ("*.weight", "*.bias")}
        return restore_(self._tuned(family, model, settings, self.efforts[family].samples))

    def _tuned(self, family: str, model: nn.Module, settings: Mapping[str, Any], samples: int | None) -> nn.Module:
        """By a run that is kept: one that was stopped goes on, one that is done gives its model back."""
        dataset = FAMILIES[family].dataset
        augment: dict[str, Any] = {"augment": True, "hflip": 0.5} if dataset in ("cifar10", "imagenet10") else {}
        loader = self.loader(dataset, "train", training=True, batch_size=128, samples=samples, **augment)
        seen = digest_of(*self.images(dataset, "train", 100))
        what = {"start": model_sha256(model), "settings": dict(settings), "images": [seen, samples]}
        run = self.kept / f"{family}-{self._key(what)}"
        config = TuneConfig(**settings, output=str(run), checkpoint_every=1000, keep=1)
        tune(model.to(self.device), loader, config, resume=True, progress=True)
        return model.eval()

    # Numbers

    def attack(self, family: str, eps: float) -> Run:
        """The paper's, on the model's own gradient."""
        own = FAMILIES[family]
        return fgsm(eps) if own.attack == "fgsm" else pgd(Threat("Linf", eps), 20, 2 / 255)

    def right(self, family: str, model: nn.Module, run: Run | None, count: int | None = None) -> Tensor:
        """Which images are right under one attack, or clean, `[N]`.

        Args:
            count: Of images, see :meth:`some`.
        """
        # In evaluation mode as a whole: torchattacks puts a model back into the mode of its outermost module.
        net = PixelModel(model).to(self.device).eval()
        pixels, labels = self.some(family, count)
        found = []
        with attackable(model):  # no gradient of the weights
            for number, (x, y) in enumerate(zip(pixels.split(BATCH), labels.split(BATCH), strict=True)):
                attacked = x if run is None else run(net, x, y, list(range(number * BATCH, number * BATCH + len(x))))
                with torch.no_grad():
                    hits = net(attacked).argmax(1) == y
                    if FAMILIES[family].wrong_stays and run is not None:
                        hits &= net(x).argmax(1) == y
                found.append(hits)
        return torch.cat(found)

    def under(self, family: str, model: nn.Module, run: Run | None, count: int | None = None) -> float:
        """Accuracy in % under one attack, or clean."""
        return round(100 * float(self.right(family, model, run, count).float().mean()), 2)

    def some(self, family: str, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Test images of the effort, or so many of them: the first, or, of those in the order of classes, evenly."""
        pixels, labels = self.images(FAMILIES[family].dataset, "test", self.efforts[family].images)
        count = min(count or len(labels), len(labels))
        step = 1 if FAMILIES[family].dataset == "mnist" else len(labels) // count
        return pixels[::step][:count], labels[::step][:count]

    def worst(self, family: str, model: nn.Module, threats: Sequence[Threat]) -> list[float]:
        """Accuracies in %, clean and in the worst case: over the adaptive suite, on the images of the effort for it."""
        return self.surviving(family, model, threats, count=self.efforts[family].worst)

    def surviving(
        self,
        family: str,
        model: nn.Module,
        threats: Sequence[Threat],
        suite: str = "adaptive",
        *,
        count: int,
        steps: int | None = None,
        queries: int | None = None,
    ) -> list[float]:
        """Accuracies in %, clean and, image by image, over all attacks of a suite.

        Args:
            threats: Of one norm, each wider than the one before, so that it takes what that one broke as broken.
            count: Of images.
            steps, queries: Of the suite, in place of the effort's.
        """
        effort = self.efforts[family]
        options: dict[str, Any] = {"steps": steps or effort.steps, "queries": queries or effort.queries}
        what = {"model": model_sha256(model), "family": asdict(FAMILIES[family]), "suite": suite, **options}
        what |= {"images": digest_of(*self.some(family, count)), "threats": [[t.norm, t.eps] for t in threats]}
        return self._once(what, lambda: self._surviving(family, model, threats, suite, count, options))

    def _surviving(
        self,
        family: str,
        model: nn.Module,
        threats: Sequence[Threat],
        suite: str,
        count: int,
        options: Mapping[str, Any],
    ) -> list[float]:
        pixels, labels = self.some(family, count)
        count, net = len(labels), PixelModel(model).to(self.device).eval()
        with torch.no_grad():
            left = net(pixels).argmax(1) == labels
        shares = [100 * int(left.sum()) / count]
        for threat in threats:
            pixels, labels = pixels[left], labels[left]
            if len(labels):
                loader = list(zip(pixels.split(BATCH), labels.split(BATCH), strict=True))
                left = torch.tensor(
                    evaluate(model, loader, threat, suite, control=False, **options).survivors, device=labels.device
                )
            else:
                left = labels.bool()
            shares.append(100 * int(left.sum()) / count)
        return [round(share, 1) for share in shares]

    def measured(self, family: str, model: nn.Module, count: int | None = None) -> dict[str, Any]:
        """A row: clean and at every budget, under the paper's attack and, if it is of any use, in the worst case.

        Args:
            count: Of images under the paper's attack; by default those of the effort.
        """
        what = {"measured": self.settings([family]), "images": digest_of(*self.some(family, count))}
        what |= {"model": model_sha256(model)}
        return self._once(what, lambda: self._row(family, model, count))

    def _row(self, family: str, model: nn.Module, count: int | None) -> dict[str, Any]:
        budgets = FAMILIES[family].budgets
        runs = (None, *(self.attack(family, eps) for eps in budgets))
        ours = [self.under(family, model, run, count) for run in runs]
        row = {
            "ours": ours,
            "images": len(self.some(family, count)[1]),
            "lambda": [round(lam, 4) for lam in lambdas(model).values()],
        }
        if ours[0] >= USEFUL.get(family, 0) or self.mode == "full":
            row["worst case"] = self.worst(family, model, [Threat("Linf", eps) for eps in budgets])
        return row

    def _once(self, what: Mapping[str, Any], work: Callable[[], Any]) -> Any:
        """What `work` gives, which JSON can hold, or what it gave when it was asked the same before."""
        key = self._key(what)
        file = self.kept / f"{key}.json"
        if key not in self._found:
            if self.resume and file.exists():
                self._found[key] = json.loads(file.read_text())
            else:
                self._found[key] = work()
                self.kept.mkdir(parents=True, exist_ok=True)
                draft = file.with_suffix(f".{os.getpid()}")
                draft.write_text(json.dumps(self._found[key]))
                draft.replace(file)
        return copy.deepcopy(self._found[key])

    def _key(self, what: Mapping[str, Any]) -> str:
        versions = {"timm_nrpm": __version__, "torch": torch.__version__}
        return checksum_of({**json.loads(json.dumps(what)), **versions})[:16]
