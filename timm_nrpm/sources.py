"""Models whose gradient an attack may follow: a reprogrammed model's own misleads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from timm_nrpm.attacks import gradient_source
from timm_nrpm.calibration import calibrate_
from timm_nrpm.pixel_model import PixelModel, alike
from timm_nrpm.reprogramming import lambdas, plain_copy, record_of, reprogram_, reprogrammed_layers
from timm_nrpm.wrappers import subject_of


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

    `"own"`; of a reprogrammed model also `"bpda"`, its values with the gradient of the linear maps, and `"plain"`, the
    model at lambda = 1 with its statistics from before calibration; `"base"`, if one is given; and, if there are images
    to calibrate them with, surrogates whose gradient is smoother: `"softer"` with a hundred times the eps, `"shorter"`
    with one iteration, `"halfway"` with every lambda halfway to 1. One with statistics of another model would attack
    nothing, so each is calibrated on its own. All of them are put into evaluation mode, `model` and `base` too.

    Args:
        calibration: Batches of pixels `[B, C, H, W]` in [0, 1].
        base: Another model that takes the same normalised images, in any mode.
    """
    own = subject_of(model, mean, std).on_pixels().eval()
    model = own.model
    found = {"own": Source(own, predicts=True)}
    if base is not None:
        found["base"] = Source(alike(base, own))
    if not reprogrammed_layers(model):
        return found
    found |= {"bpda": Source(own, linear=True, predicts=True), "plain": Source(alike(plain_copy(model), own))}
    if not calibration:
        return found
    config, lams = record_of(model).config, lambdas(model)
    here = replace(config, lam=lams, layers=tuple(lams), learnable=False)
    settings = {"softer": replace(here, eps=100 * config.eps)}
    if config.iterations > 1:
        settings["shorter"] = replace(here, iterations=1)
    settings["halfway"] = replace(here, lam={name: (1 + lam) / 2 for name, lam in lams.items()})
    for name, setting in settings.items():
        net = alike(reprogram_(plain_copy(model), setting), own)
        calibrate_(net.model, calibration, **own.normalisation())
        found[name] = Source(net)
    return found
