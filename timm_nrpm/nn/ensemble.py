"""A classifier of pixels that is made of other models, which every measurement treats like a single one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import get_model_input_config
from torch import Tensor, nn

from timm_nrpm.nn.pixel_model import PixelModel


class Member(nn.Module):
    """One model of an ensemble, which takes the ensemble's pixels and gives logits.

    Args:
        net: The model on pixels, with its own normalisation.
        size: Height and width to which it resizes the pixels; None for a model that takes them as they are.

    Example:
        >>> Member(PixelModel(model), None)(pixels).shape
        torch.Size([32, 10])
    """

    def __init__(self, net: PixelModel, size: tuple[int, int] | None) -> None:
        super().__init__()
        if size is not None and min(size) < 1:
            raise ValueError(f"size={size} is not allowed: give a height and a width of at least 1.")
        self.net, self.size = net, size
        self.register_buffer("resized_to", torch.tensor(size or (0, 0), dtype=torch.int64))  # a hash has to see it

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits `[B, N]` of pixels `[B, C, H, W]` in [0, 1]."""
        return self.net(resized(pixels, self.size))


def resized(pixels: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Pixels `[B, C, H, W]` at another height and width, bilinear, with means over areas where they shrink."""
    if size is None or tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)


class Ensemble(nn.Module):
    """A classifier of pixels `[B, C, H, W]` in [0, 1] that is made of members.

    A subclass computes logits from those of its members. Each member keeps its own normalisation and image size. Its
    settings are a buffer, `numbers`, so that a hash of its state tells two ensembles apart, and a state is loaded only
    into an ensemble of the same settings.

    Args:
        members: The models on pixels, by name.

    Attributes:
        kind: Name of the subclass in a saved folder.
        reference: Name of the member that an evaluation compares the ensemble with.
        num_classes: Number of classes, if a member says how many it has.
        pretrained_cfg: Description of the images it takes, as a timm model has it: those of its largest member, not
            normalised. Without a timm model among its members there is none.

    Raises:
        ValueError: The members have different numbers of classes or channels, or an ensemble is among them.
    """

    kind: ClassVar[str]
    reference: str
    num_classes: int
    numbers: Tensor

    def __init__(self, members: Mapping[str, Member]) -> None:
        super().__init__()
        counts = {name: getattr(member.net.model, "num_classes", None) for name, member in members.items()}
        channels = {name: len(member.net.mean) for name, member in members.items()}
        if any(isinstance(module, Ensemble) for member in members.values() for module in member.modules()):
            raise ValueError("An ensemble is among the members: give the models that it is made of.")
        if len({count for count in counts.values() if count is not None}) > 1:
            raise ValueError(f"The members have different classes, {_listed(counts)}: all must know the same ones.")
        if len({count for count in channels.values() if count > 1}) > 1:
            raise ValueError(f"The members take images of different channels, {_listed(channels)}.")
        self.members = nn.ModuleDict(members)
        known = [count for count in counts.values() if count is not None]
        if known:
            self.num_classes = known[0]
        described = [member.net.model for member in members.values() if hasattr(member.net.model, "pretrained_cfg")]
        if described:
            largest = max(described, key=lambda model: get_model_input_config(model)["input_size"][1])
            data, size = resolve_model_data_config(largest), get_model_input_config(largest)["input_size"]
            self.pretrained_cfg = {
                "architecture": self.kind, "input_size": tuple(size), "mean": (0.0,) * size[0], "std": (1.0,) * size[0],
                "interpolation": data["interpolation"], "crop_pct": data["crop_pct"],
            }  # fmt: skip

    def member(self, name: str) -> Member:
        """A member by name."""
        found = self.members[name]
        assert isinstance(found, Member)
        return found

    def followed(self) -> dict[str, nn.Module]:
        """Models on pixels whose gradient an attack may follow in place of the ensemble's, by name: its members."""
        return {name: self.member(name) for name in self.members}

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        given = state.get(f"{prefix}numbers")
        if given is not None and given.tolist() != self.numbers.tolist():
            rest[-1].append(f"{prefix}numbers are those of an ensemble with other settings: build one with the same.")
            return
        super()._load_from_state_dict(state, prefix, *rest)

    def settings(self) -> dict[str, Any]:
        """Settings from which, with the members, :meth:`build` makes the ensemble again; JSON can hold them."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that neither the members nor the settings give, by name."""
        return {}

    @classmethod
    def build(
        cls, members: Mapping[str, Member], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Ensemble:
        """The ensemble of some members with some settings.

        Raises:
            ValueError, TypeError, KeyError, RuntimeError: The settings or tensors are not those of such an ensemble.
        """
        raise NotImplementedError


def input_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images that a timm model takes; None if the model does not say.

    Example:
        >>> input_size_of(timm.create_model("resnet18"))
        (224, 224)
    """
    if not hasattr(model, "pretrained_cfg"):
        return None
    _, height, width = get_model_input_config(model)["input_size"]
    return int(height), int(width)


def _listed(values: Mapping[str, int | None]) -> str:
    return ", ".join(f"{value} in {name}" for name, value in values.items())
