"""The paper's backbones as timm models, and its authors' published weights for them.

Robustness Reprogramming for Representation Learning (arXiv 2410.04577).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from timm_nrpm.models.weights import load_published_, published

__all__ = ["CifarResNet", "LeNet", "LinearMLP", "load_published_"]  # timm adds the entrypoints it registers


class LinearMLP(nn.Module):
    """Linear layers fc1, fc2, ... without activations between them, as the authors published theirs.

    Args:
        widths: Outputs of every layer but the last.
        num_classes: Outputs of the last; 0 for none.
        in_chans, img_size: Channels and size of the images `[B, in_chans, *img_size]`.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (256, 64),
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_chans, self.depth = in_chans, len(widths) + 1
        sizes = (in_chans * math.prod(to_2tuple(img_size)), *widths)
        self.num_features = self.head_hidden_size = sizes[-1]
        for i, (inputs, outputs) in enumerate(zip(sizes, widths, strict=False), 1):
            self.add_module(f"fc{i}", nn.Linear(inputs, outputs, device=device, dtype=dtype))
        self._add_classifier(num_classes, device=device, dtype=dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse to trade time for memory, of which these few layers keep hardly any."""
        _refuse_checkpointing(self, enable)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.get_submodule(f"fc{self.depth}")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one; there is nothing to pool."""
        self._add_classifier(num_classes, **get_device_dtype(self))

    def _add_classifier(self, num_classes: int, **placement: Any) -> None:
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes, **placement) if num_classes else nn.Identity()
        self.add_module(f"fc{self.depth}", head)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to features `[B, num_features]`."""
        x = x.flatten(1)  # [B, C * H * W]
        for i in range(1, self.depth):
            x = self.get_submodule(f"fc{i}")(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits `[B, num_classes]`."""
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _refuse_checkpointing(model: nn.Module, enable: bool) -> None:
    if enable:
        raise ValueError(
            f"Gradient checkpointing has nothing to gain in a {type(model).__name__} of a few layers: leave it off."
        )


class LeNet(nn.Module):
    """Two 5x5 convolutions, each with its maximum over 2x2, and two linear layers, as the authors published theirs.

    Args:
        channels: Numbers of outputs of the convolutions.
        hidden: Outputs of the first linear layer.
        num_classes: Outputs of the second; 0 for none.
        in_chans, img_size: Channels and size of the images `[B, in_chans, *img_size]`; 16 pixels a side at least.
        drop_rate: Dropout of whole maps after the second convolution, and of features before the last layer; the
            authors train with 0.5.

    Raises:
        ValueError: Images too small for two convolutions.
    """

    def __init__(
        self,
        channels: tuple[int, int] = (10, 20),
        hidden: int = 50,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.num_features = self.head_hidden_size = hidden
        sides = [((side - 4) // 2 - 4) // 2 for side in to_2tuple(img_size)]
        if min(sides) < 1:
            raise ValueError(f"img_size={img_size}: LeNet's two convolutions need images of 16 x 16 pixels at least.")
        placement: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, channels[0], 5, **placement)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 5, **placement)
        self.fc1 = nn.Linear(channels[1] * math.prod(sides), hidden, **placement)
        self._add_classifier(num_classes, **placement)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse to trade time for memory, of which these few layers keep hardly any."""
        _refuse_checkpointing(self, enable)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc2

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one; there is nothing to pool."""
        self._add_classifier(num_classes, **get_device_dtype(self))

    def _add_classifier(self, num_classes: int, **placement: Any) -> None:
        self.num_classes = num_classes
        self.fc2 = nn.Linear(self.num_features, num_classes, **placement) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to features `[B, num_features]`."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # [B, 10, 12, 12] of 28 x 28 pixels
        x = F.dropout2d(self.conv2(x), self.drop_rate, self.training)
        x = F.relu(F.max_pool2d(x, 2))  # [B, 20, 4, 4]
        return F.relu(self.fc1(x.flatten(1)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits `[B, num_classes]`."""
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc2(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class CifarResNet(ResNet):
    """A ResNet for small images: its stem is one 3x3 convolution that keeps the resolution, and no pooling.

    Args:
        channels: Numbers of channels of the stages; the first is the stem's as well.
        **kwargs: timm's of a ResNet.
    """

    def __init__(self, in_chans: int = 3, channels: tuple[int, ...] = (64, 128, 256, 512), **kwargs: Any) -> None:
        # A deep stem of half the width makes timm expect as many channels after the stem as before the first block.
        stem: dict[str, Any] = {"stem_type": "deep", "stem_width": channels[0] // 2}
        super().__init__(in_chans=in_chans, channels=channels, **stem, **kwargs)
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False, device=device, dtype=dtype)  # type: ignore[assignment]
        self.maxpool = nn.Identity()  # type: ignore[assignment]
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)  # type: ignore[operator]


@dataclass(frozen=True)
class Backbone:
    """An architecture to register.

    Attributes:
        build: Its class.
        input_size: C, H, W of the pixels in [0, 1] that it was trained on, which it takes as they are.
        classifier: Name of the last layer.
        first_conv: Name of the first convolution, if it has one.
        settings: Arguments of the class.
        fixed_input_size: Whether it takes images of its size alone.
    """

    build: Callable[..., nn.Module]
    input_size: tuple[int, int, int]
    classifier: str
    first_conv: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fixed_input_size: bool = False
    num_classes: int = 10


MNIST, CIFAR, IMAGENET = (1, 28, 28), (3, 32, 32), (3, 224, 224)
DEPTHS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Of the ResNets, basic blocks in each stage."""


def _mlp(*widths: int) -> Backbone:
    settings = {"widths": widths}
    return Backbone(LinearMLP, MNIST, f"fc{len(widths) + 1}", settings=settings, fixed_input_size=True)


def _lenet(size: tuple[int, int, int]) -> Backbone:
    settings = {"in_chans": size[0], "img_size": size[1]}
    return Backbone(LeNet, size, "fc2", "conv1", settings, fixed_input_size=True)


def _resnet(depth: int, narrower: int = 1) -> Backbone:
    channels = tuple(width // narrower for width in (64, 128, 256, 512))
    return Backbone(
        CifarResNet, CIFAR, "fc", "conv1", {"block": BasicBlock, "layers": DEPTHS[depth], "channels": channels}
    )


def _mixer(blocks: int) -> Backbone:
    # The paper names the blocks alone; patches and width are ours.
    settings = {"img_size": 32, "patch_size": 4, "num_blocks": blocks, "embed_dim": 128}
    return Backbone(MlpMixer, CIFAR, "head", "stem.proj", settings, fixed_input_size=True)


BACKBONES = {
    "mlp1_mnist": _mlp(),
    "mlp2_mnist": _mlp(64),
    "mlp3_mnist": _mlp(256, 64),
    "lenet_mnist": _lenet(MNIST),
    "lenet_svhn": _lenet(CIFAR),
    "lenet_imagenet10": _lenet(IMAGENET),
    **{f"resnet{depth}_cifar": _resnet(depth) for depth in DEPTHS},
    **{f"resnet{depth}_cifar_narrow": _resnet(depth, 8) for depth in DEPTHS},
    **{f"mixer{blocks}_cifar": _mixer(blocks) for blocks in (2, 4, 8)},
}

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": row.num_classes,
            "input_size": row.input_size,
            "fixed_input_size": row.fixed_input_size,
            "mean": (0.0,) * row.input_size[0],
            "std": (1.0,) * row.input_size[0],
            "crop_pct": 1.0,
            "first_conv": row.first_conv,
            "classifier": row.classifier,
            "paper_ids": "arXiv:2410.04577",
        }
        for name, row in BACKBONES.items()
    }
)


def _register(name: str, row: Backbone) -> None:
    """Make an architecture known to timm."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        # The filter: a published file may also be given to timm, as pretrained_cfg_overlay=dict(file=FILE).
        settings = {**row.settings, **kwargs}
        return build_model_with_cfg(row.build, name, pretrained, pretrained_filter_fn=published, **settings)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = (
        f"{name} of arXiv 2410.04577: pixels {list(row.input_size)} in [0, 1], {row.num_classes} classes."
    )
    globals()[name] = register_model(entrypoint)


for _name, _row in BACKBONES.items():
    _register(_name, _row)
