"""Images and models of the paper's experiments, read or trained once, and their accuracies under attack."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from families import DATA, EFFORTS, FAMILIES, READERS, USEFUL
from safetensors.torch import load_file, save_file
from timm.data import ImageDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_nrpm import NRPMConfig, Threat, TuneConfig, calibrate_, evaluate, lambdas, reprogram_, restore_, tune
from timm_nrpm.attacks.library import Run, fgsm, pgd
from timm_nrpm.data.loaders import pixel_loader
from timm_nrpm.jobs.journal import Journal, digest_of
from timm_nrpm.models.backbones import load_published_
from timm_nrpm.models.base import checksum_of
from timm_nrpm.models.modes import attackable
from timm_nrpm.models.reprogramming import model_sha256
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.version import __version__

BATCH = 250


class Missing(Exception):
    """Images or weights are missing; the message says where they have to be."""


class Lab:
    """Reads images, makes models and measures them, for all experiments.

    Args:
        mode: `"quick"` or `"full"`, see `EFFORTS`.
        data: Folder of datasets.
        checkpoints: Folder of the authors' published weights.
        kept: Folder of trained models and measured numbers, for other experiments and resumed runs.
        authors: Checkout of the authors' repository, for the comparison with their code.
        resume: Whether to reuse the numbers in `kept`; models are reused in any case.
        download: Whether torchvision may download datasets.
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
        self._results: dict[str, Any] = {}

    def settings(self, families: Sequence[str]) -> dict[str, Any]:
        """Return the settings of everything that is measured on backbones of these families."""
        return {name: {**asdict(FAMILIES[name]), **asdict(self.efforts[name])} for name in families}

    def described(self, family: str) -> str:
        """Describe how much is measured."""
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
        """Return a loader of batches of pixels in [0, 1] and labels.

        Raises:
            Missing: The dataset is not in the folder of data.
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
        """Return pixels `[N, C, H, W]` and labels `[N]`, always of the same images.

        They are the first images, as in the authors' code, or the first of each class where files are ordered by class.
        """
        key = (dataset, split, count)
        if key not in self._images:
            every = self.loader(dataset, split).dataset
            size = len(every)  # type: ignore[arg-type]  # these datasets have a length
            count = min(count or size, size)
            blocks = 10 if isinstance(every, ImageDataset) else 1
            each, block = math.ceil(count / blocks), size // blocks
            chosen = range(size) if count == size else [i // each * block + i % each for i in range(count)]
            pixels, labels = zip(*(every[i] for i in chosen), strict=True)
            self._images[key] = torch.stack(pixels).to(self.device), torch.tensor(labels).to(self.device)
        return self._images[key]

    # Models

    def plain(self, family: str, name: str, **build: Any) -> nn.Module:
        """Return a plain model with the authors' published weights, or trained from scratch if there are none."""
        key = f"{name} {build}"
        if key not in self._plain:
            file = FAMILIES[family].published.get(name)
            model = timm.create_model(name, **build)
            if file is None:
                model = self.trained(family, name, {}, **build)
            elif (self.checkpoints / file).is_file():
                load_published_(model, self.checkpoints / file)
            else:
                raise Missing(f"{file} is not in the folder of --checkpoints: it is in the authors' repository")
            self._plain[key] = model.eval().to(self.device)
        return copy.deepcopy(self._plain[key])

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
        """Return the plain model reprogrammed at one lambda; `estimate` overrides settings of its family's estimate."""
        model = self.plain(family, name, **(build or {}))
        reprogram_(model, NRPMConfig(lam=lam, **{**FAMILIES[family].estimate, **estimate}))
        return self.calibrated(family, model) if calibrated else model

    def calibrated(self, family: str, model: nn.Module) -> nn.Module:
        """Calibrate a model on a thousand training images, or load what an earlier run took from them.

        What follows is kept by the model's numbers, and another device would calibrate to slightly others.
        """
        pixels, labels = self.images(FAMILIES[family].dataset, "train", 1000)
        key = self._key({"calibrated": model_sha256(model), "images": digest_of(pixels, labels)})
        file = self.kept / f"{key}.safetensors"
        if self.resume and file.exists():
            model.load_state_dict(load_file(file, device=self.device))
            return model
        calibrate_(model, pixels.split(BATCH))
        self.kept.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}")
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, draft)
        draft.replace(file)
        return model

    def tuned(
        self, family: str, model: nn.Module, settings: Mapping[str, Any], samples: int | None = None
    ) -> nn.Module:
        """Tune a model, or load what an earlier run tuned from the same start with the same settings."""
        effort = self.efforts[family]
        settings = {"epochs": effort.tuning, **settings}
        return self._tuned(family, model, settings, samples or effort.samples)

    def trained(self, family: str, name: str, settings: Mapping[str, Any], **build: Any) -> nn.Module:
        """Train a plain model from scratch; `settings` override those of its family."""
        torch.manual_seed(self.seed)
        model = reprogram_(timm.create_model(name, **build), NRPMConfig(lam=1.0))
        settings = {"epochs": self.efforts[family].epochs, "objective": "clean", **FAMILIES[family].train, **settings}
        settings |= {"paradigm": "all", "trainable": ("*.weight", "*.bias")}
        return restore_(self._tuned(family, model, settings, self.efforts[family].samples))

    def _tuned(self, family: str, model: nn.Module, settings: Mapping[str, Any], samples: int | None) -> nn.Module:
        """Tune in a run folder that is kept: a run that was stopped goes on, a finished one gives its model back."""
        dataset = FAMILIES[family].dataset
        augment: dict[str, Any] = {"augment": True, "hflip": 0.5} if dataset in ("cifar10", "imagenet10") else {}
        loader = self.loader(dataset, "train", training=True, batch_size=128, samples=samples, **augment)
        digest = digest_of(*self.images(dataset, "train", 100))
        identity = {"start": model_sha256(model), "settings": dict(settings), "images": [digest, samples]}
        run = self.kept / f"{family}-{self._key(identity)}"
        config = TuneConfig(**settings, output=str(run), checkpoint_every=1000, keep=1)
        tune(model.to(self.device), loader, config, resume=True, progress=True)
        return model.eval()

    # Accuracies

    def attack(self, family: str, eps: float) -> Run:
        """Return the paper's attack, which follows the model's own gradient."""
        own = FAMILIES[family]
        return fgsm(eps) if own.attack == "fgsm" else pgd(Threat("Linf", eps), 20, 2 / 255)

    def right(
        self, family: str, model: nn.Module, run: Run | None, count: int | None = None, *, name: str = ""
    ) -> Tensor:
        """Return which images are classified correctly under one attack, or clean if `run` is None, `[N]`.

        Args:
            count: Number of images, which :meth:`some` chooses.
            name: The attack with all that decides what it finds, by which every batch is kept; empty keeps none.
        """
        # The wrapper is in evaluation mode, too: torchattacks puts all modules back into the mode of the outermost.
        net = PixelModel(model).to(self.device).eval()
        pixels, labels = self.some(family, count)
        journal = Journal(None, {})
        if name:
            identity = {"model": model_sha256(model), "family": asdict(FAMILIES[family]), "attack": name}
            key = self._key({**identity, "images": digest_of(pixels, labels)})
            journal = Journal(self._file(key), {"key": key})
        correct = []
        with attackable(model):  # no gradient of the weights
            for number, (x, y) in enumerate(zip(pixels.split(BATCH), labels.split(BATCH), strict=True)):
                if number in journal.rows:
                    correct.append(torch.tensor(journal.rows[number]["right"], device=self.device))
                    continue
                attacked = x if run is None else run(net, x, y, list(range(number * BATCH, number * BATCH + len(x))))
                with torch.no_grad():
                    hits = net(attacked).argmax(1) == y
                    if FAMILIES[family].wrong_stays and run is not None:
                        hits &= net(x).argmax(1) == y
                correct.append(hits)
                journal.add(number, {"right": hits.tolist()})
        return torch.cat(correct)

    def under(
        self, family: str, model: nn.Module, run: Run | None, count: int | None = None, *, name: str = ""
    ) -> float:
        """Return the accuracy in % under one attack, or clean if `run` is None; arguments as in :meth:`right`."""
        return round(100 * float(self.right(family, model, run, count, name=name).float().mean()), 2)

    def some(self, family: str, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the effort's test images, or `count` of them: the first, or evenly chosen if ordered by class."""
        pixels, labels = self.images(FAMILIES[family].dataset, "test", self.efforts[family].images)
        count = min(count or len(labels), len(labels))
        step = 1 if FAMILIES[family].dataset == "mnist" else len(labels) // count
        return pixels[::step][:count], labels[::step][:count]

    def worst(self, family: str, model: nn.Module, threats: Sequence[Threat]) -> list[float]:
        """Return accuracies in %, clean and over the adaptive suite under each threat, on `Effort.worst` images."""
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
        """Return accuracies in %, clean and, image by image, over all attacks of a suite under each threat.

        Args:
            threats: Threats of one norm, each wider than the one before: what one breaks, the next need not attack.
            count: Number of images.
            steps, queries: Numbers of steps and queries of the suite, in place of the effort's.
        """
        effort = self.efforts[family]
        options: dict[str, Any] = {"steps": steps or effort.steps, "queries": queries or effort.queries}
        identity = {"model": model_sha256(model), "family": asdict(FAMILIES[family]), "suite": suite, **options}
        identity |= {"images": digest_of(*self.some(family, count)), "threats": [[t.norm, t.eps] for t in threats]}
        key = self._key(identity)
        return self._once(identity, lambda: self._surviving(family, model, threats, suite, count, options, key))

    def _surviving(
        self,
        family: str,
        model: nn.Module,
        threats: Sequence[Threat],
        suite: str,
        count: int,
        options: Mapping[str, Any],
        key: str,
    ) -> list[float]:
        pixels, labels = self.some(family, count)
        count, net = len(labels), PixelModel(model).to(self.device).eval()
        with torch.no_grad():
            left = net(pixels).argmax(1) == labels
        shares = [100 * int(left.sum()) / count]
        for number, threat in enumerate(threats):
            pixels, labels = pixels[left], labels[left]
            if len(labels):
                loader = list(zip(pixels.split(BATCH), labels.split(BATCH), strict=True))
                kept = self._file(f"{key}-{number}")
                report = evaluate(model, loader, threat, suite, control=False, resume=kept, **options)
                left = torch.tensor(report.survivors, device=labels.device)
            else:
                left = labels.bool()
            shares.append(100 * int(left.sum()) / count)
        return [round(share, 1) for share in shares]

    def measured(self, family: str, model: nn.Module, count: int | None = None) -> dict[str, Any]:
        """Return a row: accuracies clean and at every budget, under the paper's attack and in the worst case.

        Quick mode leaves out the worst case where the clean accuracy is below `USEFUL`.

        Args:
            count: Number of images under the paper's attack; by default that of the effort.
        """
        identity = {"measured": self.settings([family]), "images": digest_of(*self.some(family, count))}
        identity |= {"model": model_sha256(model)}
        return self._once(identity, lambda: self._row(family, model, count))

    def _row(self, family: str, model: nn.Module, count: int | None) -> dict[str, Any]:
        budgets = FAMILIES[family].budgets
        runs = [(None, "clean"), *((self.attack(family, eps), f"{FAMILIES[family].attack} {eps}") for eps in budgets)]
        ours = [self.under(family, model, run, count, name=name) for run, name in runs]
        row = {
            "ours": ours,
            "images": len(self.some(family, count)[1]),
            "lambda": [round(lam, 4) for lam in lambdas(model).values()],
        }
        if ours[0] >= USEFUL.get(family, 0) or self.mode == "full":
            row["worst case"] = self.worst(family, model, [Threat("Linf", eps) for eps in budgets])
        return row

    def _file(self, key: str) -> Path:
        """Return the file of rows that are kept under a key, empty unless this lab resumes."""
        file = self.kept / f"{key}.jsonl"
        if not self.resume:
            file.unlink(missing_ok=True)
        self.kept.mkdir(parents=True, exist_ok=True)
        return file

    def _once(self, identity: Mapping[str, Any], work: Callable[[], Any]) -> Any:
        """Return the result of `work`, which JSON can hold, or the kept result of the same identity."""
        key = self._key(identity)
        file = self.kept / f"{key}.json"
        if key not in self._results:
            if self.resume and file.exists():
                self._results[key] = json.loads(file.read_text())
            else:
                self._results[key] = work()
                self.kept.mkdir(parents=True, exist_ok=True)
                draft = file.with_suffix(f".{os.getpid()}")
                draft.write_text(json.dumps(self._results[key]))
                draft.replace(file)
        return copy.deepcopy(self._results[key])

    def _key(self, identity: Mapping[str, Any]) -> str:
        versions = {"timm_nrpm": __version__, "torch": torch.__version__}
        return checksum_of({**json.loads(json.dumps(identity)), **versions})[:16]
