"""Models whose gradient an attack may follow: a reprogrammed model's own misleads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from timm_nrpm.attacks.library import gradient_source
from timm_nrpm.models.calibration import calibrate_, plain_of
from timm_nrpm.models.reprogramming import lambdas, plain_copy, record_of, reprogram_, reprogrammed_layers
from timm_nrpm.nn.pixel_model import PixelModel, alike
from timm_nrpm.nn.wrappers import subject_of, unwrapped


@dataclass(frozen=True)
class Surrogate:
    """A model that is like the attacked one and smoother.

    Attributes:
        lam: Its lambda of a layer, by the attacked model's.
        eps: Its eps of the estimate, in units of the attacked model's.
        iterations: Its K; None for the attacked model's.
    """

    lam: Callable[[float], float]
    eps: float
    iterations: int | None = None


SURROGATES = {
    "soft": Surrogate(lambda lam: lam, 10.0),
    "soft_short": Surrogate(lambda lam: lam, 10.0, 1),
    "halfway": Surrogate(lambda lam: (1 + lam) / 2, 10.0),
}
"""What may be followed in the attacked model's place. A hundred times the eps, or lambda 0.9, added little to these: on
the paper's narrow ResNet-18 nothing, on the bundled model two images of 180, which the mean of three seeds does not
show."""


@dataclass(frozen=True)
class Source:
    """A model to follow.

    Attributes:
        net: On pixels, in evaluation mode.
        linear: Whether gradients go through the linear maps alone (BPDA, arXiv 1802.00420).
        predicts: Whether its predictions are those of the attacked model.
    """

    net: PixelModel
    linear: bool = False
    predicts: bool = False

    @contextmanager
    def followed(self) -> Iterator[PixelModel]:
        """The model, with the gradient that an attack is to follow."""
        with gradient_source(self.net, "bpda" if self.linear else "own") as net:
            yield net


def sources_of(
    model: nn.Module,
    calibration: Sequence[Tensor] = (),
    *,
    base: nn.Module | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> dict[str, Source]:
    """Every model that an attack on `model` may follow, by name.

    `"own"`; `"base"`, if one is given; of a model that has an estimate somewhere also `"bpda"`, its values with the
    gradient of the linear maps, and `"plain"`, the plain model; and, if there are images to calibrate them with,
    surrogates whose gradient is smoother, see :data:`SURROGATES`. One with statistics of another model would attack
    nothing, so each is calibrated on its own. All of them are put into evaluation mode, `model` and `base` too.

    Args:
        model: The attacked model, which a wrapper may be around.
        calibration: Batches of pixels `[B, C, H, W]` in [0, 1].
        base: Another model that takes the same normalised images, in any mode.
        mean, std: The model's normalisation, as for :func:`timm_nrpm.evaluate`.
    """
    own = subject_of(model, mean, std).on_pixels().eval()
    found = {"own": Source(own, predicts=True)}
    if base is not None:
        found["base"] = Source(alike(unwrapped(base), own))
    layers = reprogrammed_layers(own.model).values()
    if all(layer.is_plain() for layer in layers):
        return found
    plain = plain_of(own, calibration) if calibration else alike(plain_copy(own.model, kept=True), own)
    found |= {"bpda": Source(own, linear=True, predicts=True), "plain": Source(plain.eval())}
    if not calibration:
        return found
    config, lams = record_of(own.model).config, lambdas(own.model)
    here = replace(config, layers=tuple(lams), learnable=False)
    for name, surrogate in SURROGATES.items():
        if surrogate.iterations is not None and surrogate.iterations == config.iterations and name == "soft_short":
            continue  # it would be the soft one
        setting = replace(
            here,
            lam={layer: surrogate.lam(lam) for layer, lam in lams.items()},
            eps=surrogate.eps * config.eps,
            iterations=surrogate.iterations or config.iterations,
        )
        net = alike(reprogram_(plain_copy(plain.model), setting), own)
        calibrate_(net.model, calibration, **own.normalisation())
        found[name] = Source(net)
    return found
