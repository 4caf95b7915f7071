"""Networks of one architecture that differ in their weights: made from a model, tuned in part, and compared."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from timm_nrpm.attacks.threats import Threat
from timm_nrpm.config import NRPMConfig, TuneConfig
from timm_nrpm.data.images import check_batch, check_labels
from timm_nrpm.evaluation.evaluate import evaluate
from timm_nrpm.evaluation.sharing import together
from timm_nrpm.evaluation.trials import digits_of
from timm_nrpm.jobs.journal import Journal
from timm_nrpm.models.base import weights_sha256
from timm_nrpm.models.reprogramming import identity_of, plain_copy, reprogram_
from timm_nrpm.models.tensors import write_tensors
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import copied, subject_of
from timm_nrpm.tuning.tune import tune

if TYPE_CHECKING:
    from accelerate import Accelerator

Found = TypeVar("Found")

State: TypeAlias = Mapping[str, Tensor]
"""Weights and statistics of a network, by name."""

Batches: TypeAlias = list[tuple[Tensor, Tensor]]
"""Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, in memory."""

MEASURED = 1000
"""Number of training images for each class, on average, that the dependence between layers is measured on, at most."""


UNSAVED = "This run will leave checkpoints, but no variant|No variant was written"
"""What tune says of a model that cannot become a variant; its weights are kept here all the same."""

NO_IMAGES = "The loader gave no images: give some to choose on, and others to judge on."


def some_of(training: DataLoader[Any], count: int) -> DataLoader[Any]:
    """At most `count` training images, drawn at random, the same ones each time.

    Raises:
        ValueError: `training` is no DataLoader.
    """
    if not isinstance(training, DataLoader):
        raise ValueError(f"training is a {type(training).__name__}: give a torch DataLoader, on which tune can train.")
    images = training.dataset
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return DataLoader(Subset(images, order[:count].tolist()), training.batch_size or 1, collate_fn=training.collate_fn)


class Networks:
    """A model, and the networks with other weights that are made from it.

    Args:
        model: A classifier; of a reprogrammed one, the plain model. It is not changed.
        images: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, of which the first is looked at.
        threat: What attacks may change.
        folder: Folder that keeps weights and what attacks left.
        seed: Seed of the attacks.
        mean, std: Normalisation of the model, as for :func:`timm_nrpm.evaluate`.
        accelerator: Accelerator whose processes share the work, with the folder; None for one process alone.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Iterable[Any],
        threat: Threat,
        folder: Path,
        seed: int,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator
        subject = subject_of(model, mean, std)
        self.plain, self.mean, self.std = copied(plain_copy(subject.model)).eval(), subject.mean, subject.std
        self.threat, self.folder, self.seed = threat, folder, seed
        net = self.on_pixels(self.state)
        first = next(iter(images), None)
        if first is None:
            raise ValueError(NO_IMAGES)
        pixels, labels = check_batch(first)
        self.device = net.mean.device
        self.example = net.normalise(pixels[:1].float().to(self.device))
        with torch.no_grad():
            self.classes = self.plain(self.example).shape[1]
        check_labels(labels, self.classes)
        self.identity = {"model": weights_sha256(self.state), **identity_of(net), "threat": repr(threat)}

    def once(self, work: Callable[[], Found]) -> Found:
        """What the main process finds, in every process; a failure is one of all."""
        main = self.accelerator is None or self.accelerator.is_main_process
        return cast(Found, together(self.accelerator, lambda: work() if main else None)[0])

    def journal(self, name: str, identity: Mapping[str, Any]) -> Journal:
        """A journal that the main process keeps in the folder, and that has the same rows in every process."""
        journal = Journal(None, identity)

        def opened() -> dict[int, dict[str, Any]]:
            nonlocal journal
            journal = Journal(self.folder / name, identity)
            return journal.rows

        journal.rows = self.once(opened)
        return journal

    @property
    def state(self) -> State:
        """The model's own weights and statistics."""
        return self.plain.state_dict()

    def state_of(self, model: nn.Module) -> State:
        """The weights and statistics of another model.

        Raises:
            ValueError: Its architecture is another one.
        """
        state = plain_copy(subject_of(model, self.mean, self.std).model).state_dict()
        shapes = {name: each.shape for name, each in state.items()}
        if shapes != {name: each.shape for name, each in self.state.items()}:
            raise ValueError("The two models have weights of other names or shapes: give two of one architecture.")
        return {name: each.to(self.device) for name, each in state.items()}

    def network(self, state: State) -> nn.Module:
        """A plain network with these weights."""
        model = copied(self.plain)
        model.load_state_dict(dict(state))
        return model.eval()

    def on_pixels(self, state: State) -> PixelModel:
        """The same on pixels in [0, 1]."""
        return subject_of(self.network(state), self.mean, self.std).on_pixels().eval()

    def checked(self, images: Iterable[Any]) -> Batches:
        """All batches of some images.

        Raises:
            ValueError: There are none, or a label is no class of the model.
        """
        batches = [check_batch(batch) for batch in images]
        if not batches:
            raise ValueError(NO_IMAGES)
        for pixels, labels in batches:
            check_labels(labels, self.classes, count=len(pixels))
        return [(pixels.float(), labels) for pixels, labels in batches]

    def tuned(
        self, state: State, training: DataLoader[Any], config: TuneConfig, name: str, *, progress: bool = False
    ) -> State:
        """The weights after some tuning, which are kept under a name; a run that was stopped goes on."""
        file = self.folder / f"{name}.safetensors"
        if not self.once(file.exists):
            model = reprogram_(self.network(state), NRPMConfig(lam=1.0))
            config = replace(config, output=str(self.folder / name), keep=1)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=UNSAVED)
                tune(model, training, config, mean=self.mean, std=self.std, resume=True, progress=progress)
            after = model.state_dict()

            def keep() -> None:
                draft = self.folder / name / "tuned.safetensors"
                write_tensors({each: after[each] for each in self.state}, draft)
                draft.replace(file)
                shutil.rmtree(self.folder / name)

            self.once(keep)
        return self.kept(name)

    def kept(self, name: str) -> State:
        """Weights that were tuned under this name."""
        return load_file(self.folder / f"{name}.safetensors", device=str(self.device))

    def some_training(self, training: DataLoader[Any]) -> DataLoader[Any]:
        """Training images in an order of their own, at most `MEASURED` for each class on average."""
        return some_of(training, MEASURED * self.classes)

    def measured(
        self, state: State, batches: Batches, suite: str, name: str | None, steps: int | None = None
    ) -> dict[str, str]:
        """The images that a network is right on: for each measure, a digit for each image, 1 where it is right.

        Args:
            state: Weights of the network.
            batches: Images that it is compared on.
            suite: Suite of attacks: `"quick"` gives the measures clean, fgsm and pgd, `"standard"` clean and
                autoattack, and `"adaptive"` clean and worst case.
            name: Name of the network, under which what attacks left is found again; None keeps nothing.
            steps: Number of steps of each ascent; by default that of the suite.
        """
        report = evaluate(
            self.network(state),
            batches,
            self.threat,
            suite,
            effort="fast" if suite == "adaptive" else "default",
            steps=steps,
            seed=self.seed,
            control=False,
            mean=self.mean,
            std=self.std,
            resume=None if name is None else self.folder / f"{name}-{suite}.jsonl",
            accelerator=self.accelerator,
        )
        right = {"clean": report.correct}
        if suite == "quick":
            right |= {each.name: tuple(s is True for s in each.survived) for each in report.attacks}
        else:
            right["worst case" if suite == "adaptive" else "autoattack"] = report.survivors
        return {measure: digits_of(digits) for measure, digits in right.items()}
