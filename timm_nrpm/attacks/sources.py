"""Models whose gradient an attack may follow, since a reprogrammed model's own gradient misleads attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from timm_nrpm.attacks.library import gradient_source
from timm_nrpm.models.calibration import calibrate_, plain_of
from timm_nrpm.models.reprogramming import lambdas, plain_copy, record_of, reprogram_, reprogrammed_layers
from timm_nrpm.nn.ensemble import Ensemble
from timm_nrpm.nn.pixel_model import PixelModel, alike
from timm_nrpm.nn.wrappers import subject_of, unwrapped


@dataclass(frozen=True)
class Surrogate:
    """Settings of a model that is like the attacked one but smoother.

    Attributes:
        lam: Function from a layer's lambda in the attacked model to its lambda in the surrogate.
        eps: Factor from the attacked model's eps of the estimate to the surrogate's.
        iterations: Number of iterations (K) of the surrogate's estimate; None for the attacked model's number.
    """

    lam: Callable[[float], float]
    eps: float
    iterations: int | None = None


SURROGATES = {
    "soft": Surrogate(lambda lam: lam, 10.0),
    "soft_short": Surrogate(lambda lam: lam, 10.0, 1),
    "halfway": Surrogate(lambda lam: (1 + lam) / 2, 10.0),
}
"""Surrogates that an attack may follow in place of the attacked model. A hundred times the eps, or lambda 0.9, added
little to these: nothing on the paper's narrow ResNet-18, and on the bundled model two images of 180, a gain that the
mean of three seeds does not show."""


MEMBER = "member_"
"""Start of the names of sources that are parts of an ensemble."""


@dataclass(frozen=True)
class Source:
    """A model whose gradient an attack may follow.

    Attributes:
        net: Model on pixels, in evaluation mode.
        linear: Whether gradients go through the linear maps alone (BPDA, arXiv 1802.00420).
        predicts: Whether its predictions are those of the attacked model.
    """

    net: PixelModel
    linear: bool = False
    predicts: bool = False

    @contextmanager
    def followed(self) -> Iterator[PixelModel]:
        """Yield the model, with the gradient that an attack is to follow."""
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

    These are `"own"`, the model itself, and `"base"`, if one is given. For a model that has an estimate in some layer
    there are also `"bpda"`, its values with the gradient of the linear maps, and `"plain"`, the plain model; and, if
    there are images to calibrate them with, surrogates whose gradient is smoother, see :data:`SURROGATES`. A surrogate
    with the statistics of another model would not yield an attack, so each is calibrated separately. Of an ensemble
    there are also its members, `"member_robust"` for the one called `robust`, and no surrogates. All models are put
    into evaluation mode, `model` and `base` included.

    Args:
        model: The attacked model, or a wrapper of it.
        calibration: Batches of pixels `[B, C, H, W]` in [0, 1] to calibrate surrogates with; without them there are no
            surrogates.
        base: Another model that takes the same normalised images, in any mode; beside an ensemble, one with its own
            normalisation.
        mean, std: The model's normalisation, as for :func:`timm_nrpm.evaluate`.
    """
    own = subject_of(model, mean, std).on_pixels().eval()
    sources = {"own": Source(own, predicts=True)}
    if base is not None:
        other = subject_of(base).on_pixels() if isinstance(own.model, Ensemble) else alike(unwrapped(base), own)
        sources["base"] = Source(other.eval())
    if isinstance(own.model, Ensemble):
        followed = own.model.followed().items()
        sources |= {f"{MEMBER}{name}": Source(alike(part, own)) for name, part in followed}
    layers = reprogrammed_layers(own.model).values()
    if all(layer.is_plain() for layer in layers):
        return sources
    if isinstance(own.model, Ensemble):
        plain = alike(plain_copy(own.model, kept=True), own)
        return sources | {"bpda": Source(own, linear=True, predicts=True), "plain": Source(plain)}
    plain = plain_of(own, calibration) if calibration else alike(plain_copy(own.model, kept=True), own)
    sources |= {"bpda": Source(own, linear=True, predicts=True), "plain": Source(plain.eval())}
    if not calibration:
        return sources
    config, lams = record_of(own.model).config, lambdas(own.model)
    common = replace(config, layers=tuple(lams), learnable=False)
    for name, surrogate in SURROGATES.items():
        if surrogate.iterations is not None and surrogate.iterations == config.iterations and name == "soft_short":
            continue  # it would equal "soft"
        setting = replace(
            common,
            lam={layer: surrogate.lam(lam) for layer, lam in lams.items()},
            eps=surrogate.eps * config.eps,
            iterations=surrogate.iterations or config.iterations,
        )
        net = alike(reprogram_(plain_copy(plain.model), setting), own)
        calibrate_(net.model, calibration, **own.normalisation())
        sources[name] = Source(net)
    return sources
