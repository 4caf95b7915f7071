"""Export of a model to a file that runs without this package, checked against the model before it is there."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from timm_nrpm.checks import check_choice, shown
from timm_nrpm.deployment.agreement import HINT, agreement
from timm_nrpm.deployment.facts import Facts
from timm_nrpm.deployment.formats import FORMATS, Format, Given
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.hub.templates import check_reports
from timm_nrpm.models.bypasses import LAYER, unfollow_
from timm_nrpm.models.reprogramming import reprogrammed_layers
from timm_nrpm.models.selection import example_of
from timm_nrpm.nn.ensemble import Ensemble
from timm_nrpm.nn.fitted import Fitted
from timm_nrpm.nn.kernels.standard import standard_operators
from timm_nrpm.nn.layers import Reprogrammed, restore_layer_
from timm_nrpm.nn.wrappers import copied, subject_of


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how far it agrees with the model.

    Attributes:
        path: The file.
        format: Its format, one of :data:`timm_nrpm.formats.FORMATS`.
        difference: Largest difference of its logits from the model's on the example.
        rounding: Largest difference of the model's own logits from those in float64, where the file agrees less than to
            1e-4 of the largest; otherwise 0, since nothing was computed in float64.
        bytes: Size of the file, with that of its weights where they are in another.
        any_batch: Whether it takes any number of images.
        facts: What the file says of its model.
    """

    path: Path
    format: str
    difference: float
    rounding: float
    bytes: int
    any_batch: bool
    facts: Facts

    def __str__(self) -> str:
        channels, height, width = self.facts.input_size
        takes = "pixels in [0, 1]" if self.facts.pixels else "normalised images"
        own = f", where those of the model are {self.rounding:.1g} from those in float64" if self.rounding else ""
        batch = "N" if self.any_batch else "a fixed number"
        return (
            f"{self.path}: {self.format}, {self.bytes / 2**20:.1f} MiB, takes {takes} [{batch}, {channels}, {height}, "
            f"{width}], runs on {FORMATS[self.format].runs_on}; its logits differ by {self.difference:.1g} at most{own}"
        )


def export(
    model: nn.Module,
    path: str | Path,
    format: str | None = None,
    *,
    example: Tensor | None = None,
    any_batch: bool = True,
    pixels: bool = False,
    reports: Sequence[RobustnessReport] = (),
) -> Exported:
    """Write a model to a file that runs without this package, and check that it computes the same.

    Layers at lambda = 1 are plain in the file. The estimate of the others is a loop over tiles of products in standard
    operators, which takes several times as long as this package's own kernels (`docs/deployment.md`). The file holds
    the facts of the model as JSON, under the name `timm_nrpm`. It is put in its place when it has been loaded by what
    is to run it and its logits agree with the model's, to 1e-4 of the largest or as far as rounding in float32 lets
    them (:mod:`timm_nrpm.deployment.agreement`). A failed export leaves nothing, and an earlier file as it was.

    Args:
        model: A model, reprogrammed or plain, or an ensemble, in float32. It is not changed.
        path: The file to write.
        format: `"onnx"`, `"pt2"` (`torch.export`), `"torchscript"` or `"openvino"`; by default what the ending of
            `path` says: .onnx, .pt2, .ts or .xml.
        example: Images `[B, C, H, W]` as the file is to take them, whose size it will have. By default noise of the
            size that a timm model takes.
        any_batch: Whether the file takes any number of images; otherwise as many as the example has.
        pixels: Whether the file takes pixels in [0, 1] and normalises them itself, by timm's config of the model. A
            model in a wrapper that normalises, such as :class:`timm_nrpm.pixel_model.PixelModel`, and an ensemble, do
            so in any case.
        reports: Reports on this model, whose texts the file is to hold.

    Returns:
        The file and how far it agrees.

    Raises:
        ValueError: The format is unknown or needs a package that is not installed; there is no example; the model is
            not in float32, is in training mode, gives no finite logits, or others when it is asked twice; or a report
            is on another model.
        RuntimeError: The model has operators that the format does not know, its number of images cannot be free, or the
            file computes something else.

    Example:
        >>> exported = export(model, "model.pt2", pixels=True)
        >>> exported.difference < 1e-4
        True
        >>> torch.export.load(exported.path).module()(pixels).shape
        torch.Size([32, 10])
    """
    path = Path(path).expanduser()
    format = _format_of(path, format)
    subject = subject_of(model)
    net, pixels = _network(model, pixels)
    images = _example(subject.model, example, pixels, any_batch)
    logits = _logits(net, images)
    normalisation = subject.on_pixels().normalisation()
    facts = Facts.of(
        subject.model, tuple(images.shape[1:]), tuple(logits.shape[1:]), pixels, **normalisation, reports=reports
    )
    check_reports(reports, facts.sha256)
    given = Given(net, images, any_batch, facts.to_json())
    there = next(folder for folder in path.absolute().parents if folder.exists())
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=there) as folder:
        draft = Path(folder) / path.name
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            with standard_operators():
                _write(FORMATS[format], given, draft, format)
            agrees = agreement(FORMATS[format], draft, given, pixels)
        files = sorted(Path(folder).iterdir())
        size = sum(file.stat().st_size for file in files)
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.replace(path.parent / file.name)
    return Exported(path, format, agrees.difference, agrees.rounding, size, any_batch, facts)


def _format_of(path: Path, format: str | None) -> str:
    """The format of a file, which is known and whose packages are there."""
    endings = {each.suffix: name for name, each in FORMATS.items()}
    if format is None and path.suffix not in endings:
        known = ", ".join(f"{suffix} for {name}" for suffix, name in endings.items())
        raise ValueError(f"The ending of {path.name} names no format: give format=, or a path that ends in {known}.")
    name = check_choice("format", format or endings[path.suffix], FORMATS)
    if path.suffix != FORMATS[name].suffix:
        raise ValueError(f"{path.name} is to hold {name}, whose files end in {FORMATS[name].suffix}: rename it.")
    for file in (path, path.with_suffix(".bin")) if name == "openvino" else (path,):
        if file.is_dir():
            raise ValueError(f"{file} is a folder: give the path of a file.")
    if missing := FORMATS[name].missing():
        extra = "openvino" if name == "openvino" else "export"
        raise ValueError(f'{name} needs {", ".join(missing)}, not installed: pip install "timm_nrpm[{extra}]".')
    return name


def _network(model: nn.Module, pixels: bool) -> tuple[nn.Module, bool]:
    """A copy of the model on the CPU that is to be exported, and whether it takes pixels."""
    subject = subject_of(model)
    for name, module in subject.model.named_modules():
        if module.training and not isinstance(module, Fitted):  # what calibration adds has no mode
            raise ValueError(f"{name or 'The model'} is in training mode: call model.eval() before the export.")
    if any(p.is_meta or isinstance(p, UninitializedParameter) for p in subject.model.parameters()):
        raise ValueError("The model has parameters without values, on the meta device or of a lazy layer: load them.")
    types = {p.dtype for p in subject.model.parameters() if p.is_floating_point()} - {torch.float32}
    if types:
        raise ValueError(f"The model has parameters of type {', '.join(map(str, types))}: call model.float() first.")
    pixels = pixels or subject.mean is not None or isinstance(subject.model, Ensemble)
    net = copied(subject.on_pixels() if pixels else subject.model).cpu().requires_grad_(False).eval()
    for layer in reprogrammed_layers(net).values():
        if layer.is_plain():
            restore_layer_(layer)
    for module in net.modules():
        if isinstance(getattr(module, LAYER, None), nn.Linear) and not isinstance(getattr(module, LAYER), Reprogrammed):
            unfollow_(module)  # an attention whose layer is plain in the file
    return net, pixels


def _example(model: nn.Module, example: Tensor | None, pixels: bool, any_batch: bool) -> Tensor:
    """Images to trace the model with, two at least if their number is to be free."""
    if example is None:
        zeros = example_of(model)
        if zeros is None:
            raise ValueError(
                f"This {type(model).__name__} is no timm model, so the size of its images is unknown: give example=, "
                "images of [B, C, H, W]."
            )
        generator = torch.Generator().manual_seed(0)
        draw = torch.rand if pixels else torch.randn
        return draw(2 if any_batch else 1, *zeros.shape[1:], generator=generator)
    if not isinstance(example, Tensor) or example.ndim != 4 or not len(example):
        raise ValueError(f"example is {shown(example)}: give images of [B, C, H, W].")
    example = example.detach().cpu().float()
    return torch.cat([example, example]) if any_batch and len(example) == 1 else example


def _logits(net: nn.Module, images: Tensor) -> Tensor:
    """The model's logits, which are the same when it is asked twice."""
    with torch.no_grad():
        logits, again = net(images), net(images)
    if not isinstance(logits, Tensor):
        raise ValueError(f"The model gives a {type(logits).__name__} and not logits: export the part that gives them.")
    if not bool(logits.isfinite().all()):
        raise ValueError("The model gives logits that are not finite on the example: give example=, images it knows.")
    if not torch.equal(logits, again):
        raise ValueError(
            f"The model's forward is random: two runs on the same images differ by up to "
            f"{float((logits - again).abs().max()):.2g}, and a file would repeat one of them. Take the random part out."
        )
    return logits


def _write(format: Format, given: Given, draft: Path, name: str) -> None:
    """Write a file, and say in one sentence what the format cannot do."""
    try:
        format.write(given, draft)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        batch = f" {HINT}" if given.any_batch else ""
        raise RuntimeError(f"This model cannot be exported to {name}: {first[:300]}.{batch}") from error
