"""Settings as frozen dataclasses: validated on construction, JSON both ways."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import nn

SMALLEST_EPS = 1e-15
PENALTIES = ("l1", "huber", "mcp", "huber-mcp", "l2")

Lambdas: TypeAlias = float | Sequence[float] | Mapping[str, float]
"""One number for every layer, one number a layer in forward order, or ``{glob: number}``."""

LayerSelection: TypeAlias = "str | Sequence[str] | Callable[[str, nn.Module], bool] | None"
"""``None`` (every supported layer), a glob, several globs, ``"first:N"``, or ``f(name, module) -> bool``."""


def check_lam(value: Any, where: str = "lam") -> float:
    """Return `value` as a float in [0, 1], or raise a ValueError that says what `where` may be."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(
            f"{where}={value!r} is not allowed: lambda is a number from 0 (the robust estimate) to 1 (the plain layer)."
        )
    return float(value)


@dataclass(frozen=True)
class NRPMConfig:
    """How a model is reprogrammed (NRPM, arXiv 2410.04577, Algorithm 1).

    Args:
        lam: Lambda, in [0, 1]. 1 is the plain layer bit for bit, 0 the robust estimate alone. One number for every
            layer, a sequence with one number for each chosen layer in the order the model calls them, or a mapping
            from layer name or glob to number, in which a name beats a glob and a later glob an earlier one.
        iterations: The paper's K >= 0, steps of reweighted least squares. 0 is the plain layer.
        eps: Added to every distance before it is inverted, in units of one product `a_d * x_d`. > 0.
        penalty: ``"l1"`` (the paper's), ``"huber"``, ``"mcp"``, ``"huber-mcp"`` or ``"l2"`` (the plain layer).
        layers: Which layers, see :data:`LayerSelection`. Globs match names as `model.named_modules()` gives them;
            ``"first:4"`` takes the first four convolutional or linear layers in the order the model calls them.
        delta: Width of the quadratic zone of the Huber penalties, in units of one product.
        gamma: Distance from which the MCP penalties stop growing, in units of one product. > `delta`.
        learnable: Whether lambda takes gradients (paradigms 2 and 3) or is frozen (paradigm 1).

    Raises:
        ValueError: A value is outside its range; the message names the range.

    Example:
        >>> NRPMConfig(lam=0.5, layers="layer1.*").iterations
        3
        >>> NRPMConfig.from_json(NRPMConfig(lam=0.5).to_json()) == NRPMConfig(lam=0.5)
        True
    """

    lam: Lambdas = 0.8
    iterations: int = 3
    eps: float = 1e-3
    penalty: str = "l1"
    layers: LayerSelection = None
    delta: float = 3.0
    gamma: float = 4.0
    learnable: bool = False

    def __post_init__(self) -> None:
        lam: Any = self.lam
        lam = lam.tolist() if hasattr(lam, "tolist") else lam  # NumPy's and torch's numbers and arrays
        # One canonical form each, so that a config equals its own JSON round trip.
        if isinstance(lam, Mapping):
            lam = {str(k): check_lam(v, f"lam[{k!r}]") for k, v in lam.items()}
        elif isinstance(lam, Sequence) and not isinstance(lam, str):
            lam = tuple(check_lam(v, f"lam[{i}]") for i, v in enumerate(lam))
        else:
            lam = check_lam(lam)
        object.__setattr__(self, "lam", lam)
        if isinstance(self.layers, Sequence) and not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        names = self.layers if isinstance(self.layers, tuple) else ()
        if not (self.layers is None or isinstance(self.layers, (str, tuple)) or callable(self.layers)) or not all(
            isinstance(name, str) for name in names
        ):
            raise ValueError(
                f'layers={self.layers!r} is not understood: give a pattern like "layer1.*", several in a list, '
                '"first:4", or a function of name and module.'
            )
        check_estimator(self.iterations, self.eps, self.penalty, self.delta, self.gamma)

    def to_dict(self) -> dict[str, Any]:
        if callable(self.layers):
            raise ValueError(
                "layers is a function, which JSON cannot hold: give the names it selects instead, "
                "for example layers=list(timm_nrpm.lambdas(model))."
            )
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> NRPMConfig:
        return cls(**json.loads(text))


def check_estimator(iterations: int, eps: float, penalty: str, delta: float = 3.0, gamma: float = 4.0) -> None:
    """Raise a ValueError unless these are settings the estimator can run with."""
    if isinstance(iterations, bool) or not isinstance(iterations, Integral) or iterations < 0:
        raise ValueError(f"iterations={iterations!r} is not allowed: give an integer K >= 0 (0 is the plain layer).")
    for name, value in (("eps", eps), ("delta", delta), ("gamma", gamma)):
        if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} is not allowed: give a finite number > 0.")
    if eps < SMALLEST_EPS:
        raise ValueError(
            f"eps={eps!r} is not allowed: give {SMALLEST_EPS:g} or more, since (1 / eps)^2 must fit float32."
        )
    if penalty not in PENALTIES:
        raise ValueError(f"penalty={penalty!r} is not known: choose one of {', '.join(PENALTIES)}.")
    if penalty == "huber-mcp" and gamma <= delta:
        raise ValueError(f"gamma={gamma!r} must be larger than delta={delta!r} for the huber-mcp penalty.")
