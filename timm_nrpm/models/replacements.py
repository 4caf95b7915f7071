"""Methods of timm models that put new layers in the place of old ones: they are followed, or refused.

A new classifier or a patch embedding for other patches stands where a reprogrammed layer stood, so it is reprogrammed
like that one. Fusing merges a layer with what follows it, and the lambda of a sum means nothing to the merged one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from timm_nrpm.config import NRPMConfig
from timm_nrpm.nn.layers import REPROGRAMMED, Reprogrammed, reprogram_layer_

FOLLOWED = ("reset_classifier", "set_input_size", "prune_intermediate_layers")
"""Names of the methods by which timm makes new layers, or removes some."""

FUSIONS = ("fuse", "reparameterize", "switch_to_deploy")
"""Names of the methods by which timm merges layers into new plain ones."""

Around = Callable[[nn.Module], AbstractContextManager[None]]


@dataclass(frozen=True)
class Place:
    """How the layer in one place of a model was reprogrammed.

    Attributes:
        config: Settings of its estimate.
        lam: Its lambda, in [0, 1].
        learned: Whether its lambda took a gradient.
    """

    config: NRPMConfig
    lam: float
    learned: bool

    @classmethod
    def of(cls, layer: Reprogrammed) -> Place:
        lam = 1.0 if layer.lam.is_meta else float(layer.lam.detach().clamp(0.0, 1.0))
        return cls(layer.config, lam, layer.lam.requires_grad)

    def fill_(self, layer: nn.Module) -> None:
        """Reprogram a plain layer that came into this place, unless nothing is known of its arithmetic."""
        kind = REPROGRAMMED.get(type(layer))
        if kind is None or kind.obstacle(layer, self.config):
            return
        reprogram_layer_(layer, self.config, self.lam)
        assert isinstance(layer, Reprogrammed)
        layer.lam.requires_grad_(self.learned)


@dataclass
class Followed:
    """A method of a module whose new layers are reprogrammed like those whose places they take.

    It is an attribute of the module's instance, and belongs to every copy of the module.

    Attributes:
        module: The module.
        method: Name of the method of its class.
        around: Function from the module to the context in which layers may be replaced.
        places: Places by the names of the layers, those included that are empty now, as a classifier of no classes is.
    """

    module: nn.Module
    method: str
    around: Around
    places: dict[str, Place] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = dict(self.module.named_modules())
        self.places |= {name: Place.of(layer) for name, layer in before.items() if isinstance(layer, Reprogrammed)}
        with self.around(self.module):
            result = getattr(type(self.module), self.method)(self.module, *args, **kwargs)
            for name, layer in self.module.named_modules():
                if name in self.places and layer is not before.get(name):
                    self.places[name].fill_(layer)
        return result


def watch_(model: nn.Module, around: Around) -> None:
    """Follow or refuse these methods in all modules that hold reprogrammed layers.

    Args:
        model: A reprogrammed model.
        around: The same as in :class:`Followed`.
    """
    holding = [m for m in model.modules() if any(isinstance(layer, Reprogrammed) for layer in m.modules())]
    for module in holding:
        for method in FOLLOWED:
            if callable(getattr(type(module), method, None)):
                setattr(module, method, Followed(module, method, around))
        for method in FUSIONS:
            if callable(getattr(module, method, None)):
                setattr(module, method, _refused)


def unwatch_(module: nn.Module) -> None:
    """Undo :func:`watch_` for one module."""
    for method in (*FOLLOWED, *FUSIONS):
        given = vars(module).get(method)
        if given is _refused or isinstance(given, Followed):
            delattr(module, method)


def _refused(*_: Any, **__: Any) -> Any:
    """Raise the error that takes the place of timm's fusion."""
    raise RuntimeError(
        "Fusing would silently drop reprogrammed layers and their lambdas. "
        "Call timm_nrpm.restore_(model) first, fuse, then reprogram_ the fused model."
    )
