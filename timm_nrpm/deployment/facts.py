"""What an exported file says of its model: what it takes and gives, what it is made of, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from timm.data import resolve_model_data_config
from torch import nn

from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.models.reprogramming import is_reprogrammed, lambdas, model_sha256, record_of, reprogrammed_layers
from timm_nrpm.version import __version__

KEY = "timm_nrpm"
"""Name under which a file holds its facts, as JSON."""

FILE = "timm_nrpm_facts.json"
"""Name of the extra file that has them in the formats of PyTorch."""


@dataclass(frozen=True)
class Facts:
    """The facts of a model that a file holds beside it.

    Attributes:
        architecture: Name of the architecture or of the class.
        base: Name to give to timm for the plain model; None if none leads to its weights.
        input_size: Channels, height and width of the images.
        pixels: Whether the file takes pixels in [0, 1] and normalises them itself; otherwise it takes what the timm
            model takes, pixels normalised by `mean` and `std`.
        mean, std: Normalisation of each channel.
        interpolation, crop_pct: How timm resizes an image and the share that it cuts out; None where it is unknown.
        outputs: Shape of the output for one image, without the batch.
        lam: Lambda of each reprogrammed layer; empty for an ensemble or a plain model.
        settings: Settings of the first layer's estimate, those of :class:`timm_nrpm.NRPMConfig`, by name.
        statistics: How the statistics were moved, such as "calibrated on 96 images".
        sha256: Hash of all that determines what the model computes.
        verdicts: A sentence of each report that was given.
        version: Version of this package that wrote the file.
    """

    architecture: str
    base: str | None
    input_size: tuple[int, ...]
    pixels: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str | None
    crop_pct: float | None
    outputs: tuple[int, ...]
    lam: dict[str, float]
    settings: dict[str, object]
    statistics: str
    sha256: str
    verdicts: tuple[str, ...]
    version: str = __version__

    @classmethod
    def of(
        cls,
        model: nn.Module,
        input_size: tuple[int, ...],
        outputs: tuple[int, ...],
        pixels: bool,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        reports: Sequence[RobustnessReport],
    ) -> Facts:
        """The facts of a model without wrappers; the arguments are the attributes of the class."""
        record = record_of(model) if is_reprogrammed(model) else None
        layers = reprogrammed_layers(model)
        base = record.base if record is not None else None
        cfg = getattr(model, "pretrained_cfg", None)
        data = resolve_model_data_config(model) if cfg else {}
        return cls(
            architecture=str((cfg or {}).get("architecture") or type(model).__name__),
            base=base.name if base is not None else None,
            input_size=input_size,
            pixels=pixels,
            mean=mean,
            std=std,
            interpolation=data.get("interpolation"),
            crop_pct=data.get("crop_pct"),
            outputs=outputs,
            lam=lambdas(model),
            settings=next((dict(layer.config.estimator._asdict()) for layer in layers.values()), {}),
            statistics="" if record is None else ", then ".join(map(str, record.statistics)),
            sha256=model_sha256(model),
            verdicts=tuple(str(report) for report in reports),
        )

    def to_json(self) -> str:
        """The facts as JSON."""
        return json.dumps(asdict(self), sort_keys=True)
