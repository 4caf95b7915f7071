"""What a reprogrammed model is worth: accuracy image by image, under every attack, and the worst case over them all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sized
from dataclasses import asdict, dataclass, field

import torch
from rich.progress import Progress
from torch import Tensor, nn

from timm_nrpm.attacks import PixelModel, fgsm, pgd
from timm_nrpm.images import check_labels, check_pixels
from timm_nrpm.reprogramming import attackable, plain_copy, reprogrammed_layers

MASKED = "gradient_masking"
"""Flag: attacks that do not use the model's own gradient leave fewer images right than those that do, so accuracy under
the latter says nothing. Raised when they differ by more than `MASKING_MARGIN`."""

MASKING_MARGIN = 0.02

NON_FINITE = "non_finite_gradient"
"""Flag: a gradient that an attack followed was not finite, so the attack stood still on those pixels."""


@dataclass(frozen=True)
class Threat:
    """What an attacker may change.

    Args:
        norm: `"Linf"`, the largest change of a pixel.
        eps: The bound, in pixel units of [0, 1]; 8/255 is usual for CIFAR.

    Example:
        >>> Threat("Linf", 8 / 255)
    """

    norm: str = "Linf"
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        if self.norm != "Linf":
            raise ValueError(f'norm={self.norm!r} is not known: "Linf" is.')
        if not isinstance(self.eps, (int, float)) or not 0 < self.eps <= 1:
            raise ValueError(f"eps={self.eps!r} is not allowed: it is a change of a pixel in [0, 1], like 8 / 255.")


@dataclass(frozen=True)
class RobustnessReport:
    """Accuracies from 0 to 1, and the images behind them.

    Attributes:
        correct: For `"clean"` and each attack, whether each image was still classified correctly. An image that is
            wrong when clean counts as wrong under every attack.
        flags: Reasons not to believe the accuracies under the model's own gradient.

    Example:
        >>> report = evaluate(model, loader, Threat("Linf", 8 / 255))
        >>> report.accuracy("clean"), report.worst_case
        (0.675, 0.417)
    """

    threat: Threat
    steps: int
    seed: int
    correct: dict[str, tuple[bool, ...]] = field(repr=False)
    flags: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        return len(self.correct["clean"])

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {100 * self.accuracy(name):.1f} %" for name in self.correct)
        flags = f", flags: {', '.join(self.flags)}" if self.flags else ""
        threat = f"{self.threat.norm} {self.threat.eps:.4g}"
        return f"{self.samples} images, {threat}: {shares}, worst case {100 * self.worst_case:.1f} %{flags}"

    def accuracy(self, attack: str) -> float:
        """Share of the images still right under `attack`: "clean", "fgsm", "pgd", or "pgd_plain"."""
        if attack not in self.correct:
            raise ValueError(f"{attack!r} is not in this report: it has {', '.join(self.correct)}.")
        return sum(self.correct[attack]) / self.samples

    @property
    def worst_case(self) -> float:
        """Share of the images that no attack changed: what an attacker who may choose the attack leaves."""
        return sum(map(all, zip(*self.correct.values(), strict=True))) / self.samples

    def to_json(self) -> str:
        accuracies = {attack: self.accuracy(attack) for attack in self.correct}
        return json.dumps({**asdict(self), "accuracies": accuracies, "worst_case": self.worst_case})

    @classmethod
    def from_json(cls, text: str) -> RobustnessReport:
        data = json.loads(text)
        return cls(
            threat=Threat(**data["threat"]),
            steps=data["steps"],
            seed=data["seed"],
            correct={attack: tuple(images) for attack, images in data["correct"].items()},
            flags=tuple(data["flags"]),
        )


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    threat: Threat | None = None,
    *,
    steps: int = 20,
    seed: int = 0,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: bool = False,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> RobustnessReport:
    """Accuracy when clean and under attack, per image.

    The attacks are FGSM and PGD on the model's own gradient, as in the paper (Table 5), and PGD on the plain model
    (lambda = 1, its statistics from before calibration), whose examples are then shown to the reprogrammed one. The
    gradient of the estimate is steep and erratic, which stops an attacker who follows it and nobody else; the plain
    model's is not. A model that is not reprogrammed has no such third attack.

    Args:
        model: Takes normalised images.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`; in the same order each time it is run.
        threat: The default is Linf with eps 8/255.
        steps: Of PGD; the step size is `eps / 4`.
        seed: Of PGD's random start.
        mean, std: The model's normalisation, one number a channel; by default timm's for this model, and none for a
            model that is not timm's.
        progress: Whether to show a progress bar.
        gather: `accelerator.gather_for_metrics`, for a loader that accelerate prepared: every process then returns the
            report of all images, none counted twice.

    Raises:
        ValueError: Pixels outside [0, 1], no steps, or an empty loader.
    """
    threat = threat or Threat()
    if not isinstance(threat, Threat):
        raise ValueError(f'threat={threat!r} is no Threat: write Threat("Linf", 8 / 255).')
    if steps < 1:
        raise ValueError(f"steps={steps} is not allowed: PGD needs at least one.")
    with attackable(model), Progress(disable=not progress) as bar:
        # In eval mode themselves: torchattacks puts a model back into the mode it finds.
        own = PixelModel(model, mean, std).eval()
        attacks = [fgsm("fgsm", own, threat.eps), pgd("pgd", own, threat.eps, steps, seed)]
        sources = [own]
        if reprogrammed_layers(model):
            plain = PixelModel(plain_copy(model), mean, std).eval()
            attacks.append(pgd("pgd_plain", plain, threat.eps, steps, seed))
            sources.append(plain)
        correct: dict[str, list[bool]] = {name: [] for name in ("clean", *(a.name for a in attacks))}
        batches = len(loader) if isinstance(loader, Sized) else None
        task = bar.add_task("Evaluating", total=batches and batches * len(correct))
        for images, targets in loader:
            pixels, labels = images.to(own.mean.device), targets.to(own.mean.device)
            check_pixels(pixels)
            with torch.no_grad():
                logits = own(pixels)
            check_labels(labels, logits.shape[1])
            labels = labels.long()
            right = {"clean": logits.argmax(1) == labels}
            bar.advance(task)
            for attack in attacks:
                right[attack.name] = right["clean"] & _right(own, attack.run(pixels, labels), labels)
                bar.advance(task)
            for name, images_right in right.items():
                correct[name] += (images_right if gather is None else gather(images_right)).tolist()
    if not correct["clean"]:
        raise ValueError("The loader gave no images: there is nothing to evaluate.")
    shares = {name: sum(images) / len(images) for name, images in correct.items()}
    masked = shares.get("pgd_plain", 1.0) < min(shares["fgsm"], shares["pgd"]) - MASKING_MARGIN
    non_finite = torch.tensor([any(source.non_finite for source in sources)], device=own.mean.device)
    raised = {MASKED: masked, NON_FINITE: bool((non_finite if gather is None else gather(non_finite)).any())}
    flags = tuple(flag for flag, is_raised in raised.items() if is_raised)
    return RobustnessReport(threat, steps, seed, {k: tuple(v) for k, v in correct.items()}, flags)


@torch.no_grad()
def _right(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    return model(pixels).argmax(1) == labels
