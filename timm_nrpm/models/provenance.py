"""Where the statistics of a reprogrammed model came from: the steps that moved them, as its record and variant say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from timm_nrpm.checks import check_choice, check_integer, check_number

HOW = {"calibration": ("relative", "scratch"), "adaptation": ("mean", "l1", "median")}
"""How each kind of step can be made: the mode of `calibrate_`, and `robust=` of `adapt_`."""


@dataclass(frozen=True)
class Step:
    """A step that moved the statistics of a model towards those of images.

    Attributes:
        kind: `"calibration"`, for the change that reprogramming made, or `"adaptation"`, for other images.
        how: One of `HOW[kind]`.
        images: Number of images.
        prior: Number of images that the statistics before an adaptation were worth; None where each layer had its own,
            and for a calibration.
    """

    kind: str
    how: str
    images: int
    prior: float | None = None

    @classmethod
    def from_dict(cls, data: Any) -> Step:
        """The step that :meth:`to_dict` wrote, checked in full, since a stranger may have written `data`.

        Raises:
            ValueError: `data` is nothing that :meth:`to_dict` writes.
        """
        if not isinstance(data, dict) or set(data) != {"kind", "how", "images", "prior"}:
            raise ValueError(f"a step of its statistics holds kind, how, images and prior, and nothing else: {data!r}.")
        kind = check_choice("kind", data["kind"], HOW)
        prior = None if data["prior"] is None else check_number("prior", data["prior"], least=0)
        if kind == "calibration" and prior is not None:
            raise ValueError(f"prior={prior} belongs to no calibration.")
        how, images = check_choice("how", data["how"], HOW[kind]), check_integer("images", data["images"], least=1)
        return cls(kind, how, images, prior)

    def to_dict(self) -> dict[str, Any]:
        """The step as a variant's config holds it."""
        return asdict(self)

    def __str__(self) -> str:
        images = f"{self.images} image{'s' * (self.images > 1)}"
        if self.kind == "calibration":
            return f"calibrated on {images}" + (" from scratch" if self.how == "scratch" else "")
        details = [] if self.prior is None else [f"prior {self.prior:g}"]
        details += [self.how] if self.how != "mean" else []
        return f"adapted to {images}" + (f" ({', '.join(details)})" if details else "")
