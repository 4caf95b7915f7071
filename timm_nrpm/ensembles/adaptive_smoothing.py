"""Adaptive smoothing: the probabilities of an accurate and of a robust model, mixed (Bai et al., arXiv 2301.12554)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_nrpm.checks import check_number
from timm_nrpm.ensembles.members import members_of
from timm_nrpm.nn.ensemble import Ensemble, Member

ACCURATE, ROBUST = "accurate", "robust"
LARGEST_SCALE = 1e4


@dataclass(frozen=True)
class Gate:
    """How the share of the robust model depends on an image: `low + (high - low) * sigmoid(w . f + bias)`.

    The features f are the margins of the accurate and of the robust model, the probability of the likeliest class less
    that of the next, and the probability that the robust model gives the accurate one's class.

    Attributes:
        low, high: Smallest and largest share of the robust model, from 0 to 1.
        accurate_margin, robust_margin, agreement: Weights of the features.
        bias: Bias.
    """

    low: float
    high: float
    accurate_margin: float
    robust_margin: float
    agreement: float
    bias: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            check_number(f"gate.{name}", getattr(self, name), least=0, most=1)
        for name in ("accurate_margin", "robust_margin", "agreement", "bias"):
            check_number(f"gate.{name}", getattr(self, name), least=-LARGEST_SCALE, most=LARGEST_SCALE)

    def __call__(self, accurate: Tensor, robust: Tensor) -> Tensor:
        """The share of the robust model for each image, `[B]`, from the log-probabilities `[B, N]` of both models."""
        weights = accurate.new_tensor([self.accurate_margin, self.robust_margin, self.agreement])
        opened = torch.sigmoid(features(accurate, robust) @ weights + self.bias)
        return self.low + (self.high - self.low) * opened


def features(accurate: Tensor, robust: Tensor) -> Tensor:
    """What a gate sees of each image, `[B, 3]`, from the log-probabilities `[B, N]` of both models."""
    margins = [(top[:, 0] - top[:, 1]) for top in (each.exp().topk(2).values for each in (accurate, robust))]
    agreed = robust.exp().gather(1, accurate.argmax(1, keepdim=True)).squeeze(1)
    return torch.stack([*margins, agreed], 1)


class AdaptiveSmoothing(Ensemble):
    """`log((1 - a) softmax(s_g g(x)) + a softmax(s_h h(x)))` of an accurate model g and a robust one h
    (Bai et al., arXiv 2301.12554, eq. 5).

    With a of at least 1/2 the accurate model cannot outvote a robust one that is confident enough: the class of h
    stands wherever its probability leads every other by `(1 - a) / a` (their Lemma 1), whatever g says.

    Args:
        accurate: The accurate model g, a classifier of normalised images or a model on pixels.
        robust: The robust model h, with the same classes.
        share: The robust model's share a, from 0 to 1.
        accurate_scale, robust_scale: Factors s_g and s_h of the logits, above 0.
        gate: Share of the robust model by image, in place of `share`; see
            :func:`timm_nrpm.ensembles.mixture.fit_gate`.

    Raises:
        ValueError: A setting is outside its range, or the models have different classes.

    Example:
        >>> mixture = AdaptiveSmoothing(plain, model, share=0.7)
        >>> mixture(pixels).shape
        torch.Size([32, 10])
    """

    kind = "adaptive-smoothing"
    reference = ROBUST

    def __init__(
        self,
        accurate: nn.Module,
        robust: nn.Module,
        *,
        share: float = 0.5,
        accurate_scale: float = 1.0,
        robust_scale: float = 1.0,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(members_of({ACCURATE: accurate, ROBUST: robust}))
        self._configure(share, accurate_scale, robust_scale, gate)

    def _configure(self, share: float, accurate_scale: float, robust_scale: float, gate: Gate | None) -> None:
        self.share = check_number("share", share, least=0, most=1)
        self.accurate_scale = check_number("accurate_scale", accurate_scale, above=0, most=LARGEST_SCALE)
        self.robust_scale = check_number("robust_scale", robust_scale, above=0, most=LARGEST_SCALE)
        self.gate = gate
        numbers = [self.share, self.accurate_scale, self.robust_scale, *(asdict(gate).values() if gate else ())]
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.float32))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logarithms of the mixed probabilities `[B, N]` of pixels `[B, C, H, W]` in [0, 1]."""
        accurate, robust = self.parts(pixels)
        return self.mixed(accurate, robust)

    def parts(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[B, N]` of both models, after their scales."""
        scales = {ACCURATE: self.accurate_scale, ROBUST: self.robust_scale}
        accurate, robust = (F.log_softmax(scale * self.member(name)(pixels), 1) for name, scale in scales.items())
        return accurate, robust

    def mixed(self, accurate: Tensor, robust: Tensor) -> Tensor:
        """Logarithms of the mixed probabilities `[B, N]`, from the log-probabilities of both models."""
        if self.gate is not None:
            share = self.gate(accurate, robust).clamp(1e-6, 1 - 1e-6).unsqueeze(1)
            return torch.logaddexp(torch.log1p(-share) + accurate, share.log() + robust)
        if self.share in (0.0, 1.0):
            return robust if self.share else accurate
        return torch.logaddexp(math.log1p(-self.share) + accurate, math.log(self.share) + robust)

    def settings(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "accurate_scale": self.accurate_scale,
            "robust_scale": self.robust_scale,
            "gate": None if self.gate is None else asdict(self.gate),
        }

    @classmethod
    def build(
        cls, members: Mapping[str, Member], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> AdaptiveSmoothing:
        if set(members) != {ACCURATE, ROBUST}:
            raise ValueError(f"An adaptive smoothing has the members {ACCURATE} and {ROBUST}, not {list(members)}.")
        values = dict(settings)
        gate = values.pop("gate")
        mixture = cls.__new__(cls)
        Ensemble.__init__(mixture, {name: members[name] for name in (ACCURATE, ROBUST)})
        mixture._configure(**values, gate=None if gate is None else Gate(**gate))
        return mixture

    def __str__(self) -> str:
        share = f"{self.share:g}" if self.gate is None else f"{self.gate.low:g} to {self.gate.high:g} by the image"
        scales = f"scales {self.accurate_scale:g} and {self.robust_scale:g}"
        return f"adaptive smoothing, the robust model's share {share}, {scales}"
