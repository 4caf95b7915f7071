"""Other objectives, critical fine-tuning, weight signatures and a small teacher, each against its control."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from bases import Bases, Images
from row import Row

from timm_nrpm import Shift, Threat, TuneConfig, evaluate
from timm_nrpm.evaluation.trials import Effect, Kept, digits_of
from timm_nrpm.models.signatures import signature
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.subnetworks.critical_tuning import CriticalTuning, critical_tuning
from timm_nrpm.tuning.plain import tune_weights
from timm_nrpm.tuning.teacher import tune_by_teacher

DIGITS, CIFAR = "resnet8_digits, digits", "narrow ResNet-18, CIFAR-10"
THREAT = Threat("Linf", 0.15)
OBJECTIVES = {
    "pgd": (5, "beta", (6.0,)),
    "weat": (3, "beta", (1.0, 6.0)),
    "comp-sum": (4, "beta", (0.1, 0.3, 1.0)),
    "kl-dro": (5, "temperature", (1.0, 4.0)),
    "srat": (5, "beta", (0.1, 1.0)),
}
"""Steps of each objective's attack at which it takes six passes: two forwards to learn from take one more than one, and
WEAT's attack one more for the clean prediction. And its setting that is chosen on other images, from these values."""

SEEDS = (0, 1, 2)
RARE = (5, 6, 7, 8, 9)
"""Classes of which the imbalanced part of the digits has one image in ten."""

NOISE = Shift("gaussian_noise", 3)
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5)
LOSS = 2.0
"""Largest loss of clean accuracy, in points on the selection images, at which a signature's strength is chosen."""


def _robust(
    objective: str = "pgd", steps: int = 5, seed: int = 0, trainable: tuple[str, ...] | None = None
) -> TuneConfig:
    """Training on the digits: at five steps of an attack, six passes for each image and epoch."""
    return TuneConfig(
        "all", trainable, objective=objective, eps=THREAT.eps, steps=steps, epochs=10, optimizer="momentum", lr=0.02,
        seed=seed,
    )  # fmt: skip


def rows(bases: Bases, kept: Path) -> list[Row]:
    """Everything that is measured here; what is in `kept` is not measured again.

    Args:
        bases: Models and images.
        kept: Folder of the measurements.
    """
    kept.mkdir(parents=True, exist_ok=True)
    return [
        *_objectives(bases, kept), *_imbalanced(bases, kept), *_critical(bases, kept), *_signatures(bases, kept),
        *_teacher(bases, kept),
    ]  # fmt: skip


def _objectives(bases: Bases, folder: Path) -> list[Row]:
    """The objectives against PGD-AT, from the bundled model on."""
    training = bases.digit_images("train", 2000)
    control, _ = _seeds(bases, folder, training, "pgd")
    result = []
    for name in ("weat", "comp-sum", "kl-dro"):
        ours, note = _seeds(bases, folder, training, name)
        pairs = list(zip(ours, control, strict=True))
        result += _pair(name, DIGITS, f"{THREAT}, quick attacks", "pgd at equal passes", pairs, note=note)
    return result


def _imbalanced(bases: Bases, folder: Path) -> list[Row]:
    """SRAT against PGD-AT where half of the classes are rare, on the rare and on all classes."""
    pixels, labels = bases.digit_images("train", 2000)
    is_rare = torch.isin(labels, torch.tensor(RARE))
    taken = ~is_rare | (is_rare.cumsum(0) % 10 == 0)
    training = pixels[taken], labels[taken]
    control, _ = _seeds(bases, folder, training, "pgd", "imbalanced-")
    ours, note = _seeds(bases, folder, training, "srat", "imbalanced-")
    rare = torch.isin(bases.digit_images("report", 180)[1], torch.tensor(RARE)).tolist()
    base, result = f"{DIGITS}, five classes a tenth of the others", list[Row]()
    for what, chosen in (("rare classes, ", rare), ("all classes, ", [True] * len(rare))):
        pairs = [(_part(one, chosen), _part(other, chosen)) for one, other in zip(ours, control, strict=True)]
        result += _pair("srat", base, f"{what}{THREAT}, quick attacks", "pgd at equal passes", pairs, what, note)
    return result


def _seeds(bases: Bases, folder: Path, training: Images, name: str, what: str = "") -> tuple[list[Kept], str]:
    """What models keep of the report images after training with an objective, one for each seed, and its setting, which
    is that by which the first keeps most selection images under attack."""
    _, setting, values = OBJECTIVES[name]
    first = {value: _digits(bases, folder, training, name, value, SEEDS[0], what) for value in values}
    best = max(values, key=lambda value: first[value][0].accuracy)
    others = [_digits(bases, folder, training, name, best, seed, what)[1] for seed in SEEDS[1:]]
    note = f"{setting} {best:g}, chosen from {values} on other images." if len(values) > 1 else ""
    return [first[best][1], *others], note


def _digits(
    bases: Bases, folder: Path, training: Images, name: str, value: float, seed: int, what: str
) -> tuple[Kept, ...]:
    """What a model keeps of the selection and of the report images after training with an objective: the bundled one,
    or, for the imbalanced part, one that was trained naturally on that alone."""
    steps, setting, _ = OBJECTIVES[name]

    def measure() -> tuple[Kept, ...]:
        model = bases.digits()
        if what:
            torch.manual_seed(seed)
            model = timm.create_model("resnet8_digits")
            tune_weights(model, _loader(training, 64), replace(_robust("clean", seed=seed), lr=0.05))
        config = _robust(name, steps, seed)
        config = replace(config, beta=value) if setting == "beta" else replace(config, temperature=value)
        tune_weights(model, _loader(training, 64), config)
        return tuple(_kept(model, bases.digit_images(part, 180), THREAT) for part in ("selection", "report"))

    return _several(folder / f"digits-{what}{name}-{value:g}-{seed}.json", measure)


def _critical(bases: Bases, folder: Path) -> list[Row]:
    images, threat = bases.cifar("report", 400), Threat("Linf", 8 / 255)

    def before() -> Kept:
        return _kept(bases.narrow(robust=True), images, threat)

    def after() -> Kept:
        model = bases.narrow(robust=True)
        training, selection = bases.cifar("train", 2000), bases.cifar("selection", 200)
        shares = (0.2, 0.4, 0.6, 0.8, 1.0)
        loader = _loader(training, 128)
        found = critical_tuning(model, loader, _batches(selection), threat, shares=shares, measured=128)
        (folder / "critical-tuning.json").write_text(found.to_json())
        return _kept(model, images, threat)

    control, ours = _once(folder / "critical-before.json", before), _once(folder / "critical-after.json", after)
    found = CriticalTuning.from_json((folder / "critical-tuning.json").read_text())
    shares = ", ".join(f"{step.share:g}" for step in found.steps)
    note = f"{found.layer} was tuned; of the shares {shares} of the way, other images chose {found.chosen.share:g}."
    return _pair("RiFT", f"{CIFAR}, robust", f"{threat}, quick attacks", "as it is", [(ours, control)], "", note)


def _signatures(bases: Bases, folder: Path) -> list[Row]:
    """The signature of noise, of one part of the training images, in a model tuned on the other part."""
    pixels, labels = bases.cifar("train", 4000)
    parts = (pixels[::2], labels[::2]), (pixels[1::2], labels[1::2])

    def tuned(images: Images, seed: int) -> nn.Module:
        model = bases.narrow(robust=False)
        config = TuneConfig(paradigm="all", objective="clean", epochs=3, lr=0.01, optimizer="momentum", seed=seed)
        tune_weights(model, _loader(images, 128), config)
        return model.eval()

    def measure() -> tuple[Kept, Kept, Kept]:
        start = bases.narrow(robust=False)
        natural, noisy = tuned(parts[0], 0), tuned((NOISE.applied(parts[0][0], seed=1), parts[0][1]), 0)
        made = signature(natural, noisy, "first:4", start=start)
        made.save(folder / "noise-signature")
        model, selection, report = tuned(parts[1], 1), bases.cifar("selection", 500), bases.cifar("report", 1000)
        as_it_is, best, strength = _shifted(model, selection), (-1, 0.0), STRENGTHS[0]
        for each in STRENGTHS:
            patch = made.add_(model, each)
            there = _shifted(model, selection)
            patch.take_off_()
            if there.clean_accuracy >= as_it_is.clean_accuracy - LOSS / 100 and there.accuracy > best[1]:
                best, strength = (0, there.accuracy), each
        control = _shifted(model, report)
        made.add_(model, strength)
        (folder / "noise-strength.json").write_text(json.dumps(strength))
        return _shifted(model, report), control, _shifted(noisy, report)

    ours, control, _ = _several(folder / "noise.json", measure)
    strength = json.loads((folder / "noise-strength.json").read_text())
    note = (
        f"Of the first four layers, at strength {strength:g}, chosen on other images; the signature is of other images."
    )
    base = f"{CIFAR}, tuned on clean images"
    return _pair("weight signature", base, str(NOISE), "as it is", [(ours, control)], "", note)


def _teacher(bases: Bases, folder: Path) -> list[Row]:
    """The bundled model after PGD-AT teaches the last stage of a narrow ResNet-18, or that stage trains by PGD-AT."""
    training, images = bases.digit_images("train", 2000), bases.digit_images("report", 180)
    norm = {"mean": (0.5,), "std": (0.5,)}
    late = ("layer4.*", "fc.*")

    def student(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = timm.create_model("resnet18_cifar_narrow", in_chans=1)
        natural = replace(_robust("clean", seed=seed), lr=0.05)
        tune_weights(model, _loader(training, 64), natural, mean=norm["mean"], std=norm["std"])
        return model.eval()

    def measure(seed: int) -> tuple[Kept, Kept, Kept]:
        teacher = bases.digits()
        tune_weights(teacher, _loader(training, 64), _robust(seed=seed))
        natural = student(seed)
        taught, alone = copy.deepcopy(natural), copy.deepcopy(natural)
        config = replace(_robust(steps=4, seed=seed, trainable=late), epochs=4)
        tune_by_teacher(taught, teacher.eval(), _loader(training, 64), config, mean=norm["mean"], std=norm["std"])
        tune_weights(alone, _loader(training, 64), replace(config, steps=5), mean=norm["mean"], std=norm["std"])
        ours, theirs, start = (_kept(PixelModel(model, **norm), images, THREAT) for model in (taught, alone, natural))
        return ours, theirs, start

    found = [_several(folder / f"teacher-{seed}.json", partial(measure, seed)) for seed in SEEDS]
    base = "narrow ResNet-18 of digits, its last stage tuned"
    measure_of = f"{THREAT}, quick attacks"
    result = _pair("small teacher", base, measure_of, "pgd at equal passes", [(ours, pgd) for ours, pgd, _ in found])
    return result + _pair("small teacher", base, measure_of, "as it is", [(ours, start) for ours, _, start in found])


# --- measuring and keeping -------------------------------------------------------------------------------------------


def _pair(
    method: str, base: str, measure: str, control: str, pairs: list[tuple[Kept, Kept]], what: str = "", note: str = ""
) -> list[Row]:
    """A row of clean accuracy and one of that under the threat, of the first pair; a note tells those of the others."""
    result = []
    for kind, words in (("clean", f"{what}clean"), ("threat", measure)):
        of_seeds = [Effect.of(getattr(ours, kind), getattr(theirs, kind)) for ours, theirs in pairs]
        others = ", ".join(f"{each.points:+.1f}" for each in of_seeds[1:])
        ours, theirs = (100 * getattr(each, kind).count("1") / len(getattr(each, kind)) for each in pairs[0])
        text = " ".join(filter(None, (note, f"With other seeds: {others} points." if others else "")))
        result.append(Row(method, base, f"accuracy in %, {words}", control, theirs, ours, str(of_seeds[0]), text))
    return result


def _part(kept: Kept, taken: list[bool]) -> Kept:
    """The same for some of the images."""
    return Kept(
        *("".join(c for c, is_in in zip(part, taken, strict=True) if is_in) for part in (kept.clean, kept.threat))
    )


def _kept(model: nn.Module, images: Images, threat: Threat) -> Kept:
    report = evaluate(model.eval(), _batches(images), threat, "quick", control=False)
    return Kept(digits_of(report.correct), digits_of(report.survivors))


def _shifted(model: nn.Module, images: Images) -> Kept:
    """The images that a model is right on, as they are and shifted."""
    net = PixelModel(model).eval()
    pixels, labels = images

    def right(given: Tensor) -> str:
        with torch.no_grad():
            classes = torch.cat([net(batch).argmax(1) for batch in given.split(250)])
        return digits_of((classes == labels).tolist())

    return Kept(right(pixels), right(NOISE.applied(pixels)))


def _loader(images: Images, batch: int) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*images), batch_size=batch, shuffle=True, drop_last=True)


def _batches(images: Images) -> list[Images]:
    return list(zip(*(part.split(100) for part in images), strict=True))


def _once(file: Path, measure: Callable[[], Kept]) -> Kept:
    """What was measured and kept in a file, or is now."""
    return _several(file, lambda: (measure(),))[0]


def _several(file: Path, measure: Callable[[], tuple[Kept, ...]]) -> tuple[Kept, ...]:
    if not file.exists():
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps([asdict(each) for each in measure()]))
        draft.replace(file)
    return tuple(Kept(**each) for each in json.loads(file.read_text()))
