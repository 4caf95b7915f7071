"""Images other than those of the training, without an adversary, as a threat: corrupted, or as they came."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from timm_nrpm.checks import check_choice, check_integer
from timm_nrpm.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt

AS_THEY_ARE = "none"


@dataclass(frozen=True)
class Shift:
    """What happens to images without an adversary.

    Args:
        kind: Name of a corruption, see :data:`timm_nrpm.evaluation.corruptions.CORRUPTIONS`; or `"none"` for images as
            they are, which suits a user's own images of another camera, say.
        severity: Severity of the corruption, from 1 to 5.

    Raises:
        ValueError: `kind` or `severity` is not known.

    Example:
        >>> str(Shift("fog", 3)), str(Shift())
        ('fog of severity 3', 'the images as they are')
    """

    kind: str = AS_THEY_ARE
    severity: int = 5

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, (AS_THEY_ARE, *CORRUPTIONS))
        object.__setattr__(
            self, "severity", check_integer("severity", self.severity, least=SEVERITIES[0], most=SEVERITIES[-1])
        )

    def __str__(self) -> str:
        return "the images as they are" if self.kind == AS_THEY_ARE else f"{self.kind} of severity {self.severity}"

    def applied(self, pixels: Tensor, *, seed: int = 0, first: int = 0) -> Tensor:
        """Images `[B, C, H, W]` in [0, 1] after the shift; `seed` and `first` are those of `corrupt`."""
        if self.kind == AS_THEY_ARE:
            return pixels
        return corrupt(pixels, self.kind, self.severity, seed=seed, first=first)
