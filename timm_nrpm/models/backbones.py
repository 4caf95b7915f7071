"""The backbones of both papers as timm models, and published weights for them.

The papers are "Robustness Reprogramming for Representation Learning" (arXiv 2410.04577), whose authors' weights are
published, and that of semirobust subnetworks (arXiv 2307.03803), which adds the wide ResNet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ClassifierHead, create_conv2d, get_device_dtype, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnet import BasicBlock, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from timm_nrpm.models.weights import load_published_, published

__all__ = [
    "CifarResNet",
    "LeNet",
    "LinearMLP",
    "WideResNet",
    "load_published_",
]  # timm adds the entrypoints it registers


class LinearMLP(nn.Module):
    """An MLP of linear layers fc1, fc2, ... without activations between them, like the authors' published models.

    Args:
        widths: Number of outputs of each layer but the last.
        num_classes: Number of outputs of the last layer; 0 replaces that layer by an identity.
        in_chans, img_size: Number of channels, and size in pixels, of the images `[B, in_chans, *img_size]`.
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
        """Refuse gradient checkpointing, which saves hardly any memory in so few layers."""
        _refuse_checkpointing(self, enable)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.get_submodule(f"fc{self.depth}")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one; `global_pool` is ignored, since there is nothing to pool."""
        self._add_classifier(num_classes, **get_device_dtype(self))

    def _add_classifier(self, num_classes: int, **placement: Any) -> None:
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes, **placement) if num_classes else nn.Identity()
        self.add_module(f"fc{self.depth}", head)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features `[B, num_features]` of images `[B, C, H, W]`."""
        x = x.flatten(1)  # [B, C * H * W]
        for i in range(1, self.depth):
            x = self.get_submodule(f"fc{i}")(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[B, num_classes]` of features `[B, num_features]`; with `pre_logits`, the input of the last layer."""
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _refuse_checkpointing(model: nn.Module, enable: bool) -> None:
    if enable:
        raise ValueError(
            f"Gradient checkpointing saves hardly any memory in a {type(model).__name__} of a few layers: leave it off."
        )


class LeNet(nn.Module):
    """Two 5x5 convolutions, each with 2x2 max pooling, and two linear layers, like the authors' published models.

    Args:
        channels: Numbers of output channels of the two convolutions.
        hidden: Number of outputs of the first linear layer.
        num_classes: Number of outputs of the second linear layer; 0 replaces that layer by an identity.
        in_chans, img_size: Number of channels, and size in pixels, of the images `[B, in_chans, *img_size]`, whose
            sides have at least 16 pixels.
        drop_rate: Probability of dropping a whole channel after the second convolution, and a feature before the last
            layer; the authors train with 0.5.

    Raises:
        ValueError: `img_size` is too small for the two convolutions.
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
        """Refuse gradient checkpointing, which saves hardly any memory in so few layers."""
        _refuse_checkpointing(self, enable)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc2

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one; `global_pool` is ignored, since there is nothing to pool."""
        self._add_classifier(num_classes, **get_device_dtype(self))

    def _add_classifier(self, num_classes: int, **placement: Any) -> None:
        self.num_classes = num_classes
        self.fc2 = nn.Linear(self.num_features, num_classes, **placement) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Features `[B, num_features]` of images `[B, C, H, W]`."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # [B, 10, 12, 12] for 28 x 28 pixels
        x = F.dropout2d(self.conv2(x), self.drop_rate, self.training)
        x = F.relu(F.max_pool2d(x, 2))  # [B, 20, 4, 4]
        return F.relu(self.fc1(x.flatten(1)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[B, num_classes]` of features `[B, num_features]`; with `pre_logits`, the input of the last layer."""
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc2(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class CifarResNet(ResNet):
    """A ResNet for small images, whose stem is one 3x3 convolution that keeps the resolution, without pooling.

    Args:
        in_chans: Number of channels of the images.
        channels: Number of channels of each stage; the stem has as many as the first stage.
        **kwargs: Further arguments of timm's `ResNet`.
    """

    def __init__(self, in_chans: int = 3, channels: tuple[int, ...] = (64, 128, 256, 512), **kwargs: Any) -> None:
        # timm expects 2 * stem_width channels after a deep stem, and always 64 after any other.
        stem: dict[str, Any] = {"stem_type": "deep", "stem_width": channels[0] // 2}
        super().__init__(in_chans=in_chans, channels=channels, **stem, **kwargs)
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False, device=device, dtype=dtype)  # type: ignore[assignment]
        self.maxpool = nn.Identity()  # type: ignore[assignment]
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)  # type: ignore[operator]


class WideResNet(ResNetV2):
    """A wide ResNet for small images (Zagoruyko and Komodakis, arXiv 1605.07146): three stages of blocks with the
    normalisation first, behind one 3x3 convolution that keeps the resolution.

    Args:
        in_chans: Number of channels of the images.
        **kwargs: Further arguments of timm's `ResNetV2`.
    """

    def __init__(self, in_chans: int = 3, **kwargs: Any) -> None:
        blocks: dict[str, Any] = {"basic": True, "bottle_ratio": 1.0, "stem_chs": 16, "conv_layer": create_conv2d}
        super().__init__(in_chans=in_chans, **{**blocks, "norm_layer": BatchNormAct2d, **kwargs})
        placement: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.stem = nn.Sequential()
        self.stem.add_module("conv", nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, **placement))
        pool = kwargs.get("global_pool", "avg")
        self.head = ClassifierHead(self.num_features, self.num_classes, pool, self.drop_rate, **placement)
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)  # type: ignore[operator]


@dataclass(frozen=True)
class Backbone:
    """An architecture that is registered with timm.

    Attributes:
        build: Class of the model.
        input_size: Shape `(C, H, W)` of the images that it was trained on; it takes pixels in [0, 1] without
            normalisation.
        classifier: Name of the last layer.
        first_conv: Name of the first convolution; None if there is none.
        settings: Keyword arguments of the class.
        fixed_input_size: Whether it takes images of `input_size` only.
        num_classes: Number of classes.
        paper: The paper that has it.
        features: How timm takes features out of it, where that is not timm's default.
    """

    build: Callable[..., nn.Module]
    input_size: tuple[int, int, int]
    classifier: str
    first_conv: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fixed_input_size: bool = False
    num_classes: int = 10
    paper: str = "arXiv:2410.04577"
    features: Mapping[str, Any] = field(default_factory=dict)


MNIST, CIFAR, IMAGENET = (1, 28, 28), (3, 32, 32), (3, 224, 224)
DEPTHS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Number of basic blocks in each stage, by the depth of the ResNet."""


def _mlp(*widths: int) -> Backbone:
    settings = {"widths": widths}
    return Backbone(LinearMLP, MNIST, f"fc{len(widths) + 1}", settings=settings, fixed_input_size=True)


def _lenet(size: tuple[int, int, int]) -> Backbone:
    settings = {"in_chans": size[0], "img_size": size[1]}
    return Backbone(LeNet, size, "fc2", "conv1", settings, fixed_input_size=True)


def _resnet(depth: int, divisor: int = 1) -> Backbone:
    channels = tuple(width // divisor for width in (64, 128, 256, 512))
    return Backbone(
        CifarResNet, CIFAR, "fc", "conv1", {"block": BasicBlock, "layers": DEPTHS[depth], "channels": channels}
    )


def _wide_resnet(depth: int, width: int) -> Backbone:
    stages = {"layers": ((depth - 4) // 6,) * 3, "channels": (16 * width, 32 * width, 64 * width)}
    features = {"out_indices": tuple(range(4)), "flatten_sequential": True}
    return Backbone(WideResNet, CIFAR, "head.fc", "stem.conv", stages, paper="arXiv:2307.03803", features=features)


def _mixer(blocks: int) -> Backbone:
    # The paper states only the number of blocks; the patch size and the width are chosen here.
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
    "wideresnet34_cifar": _wide_resnet(34, 10),
    **{f"mixer{blocks}_cifar": _mixer(blocks) for blocks in (2, 4, 8)},
}

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": backbone.num_classes,
            "input_size": backbone.input_size,
            "fixed_input_size": backbone.fixed_input_size,
            "mean": (0.0,) * backbone.input_size[0],
            "std": (1.0,) * backbone.input_size[0],
            "crop_pct": 1.0,
            "first_conv": backbone.first_conv,
            "classifier": backbone.classifier,
            "paper_ids": backbone.paper,
        }
        for name, backbone in BACKBONES.items()
    }
)


def _register(name: str, backbone: Backbone) -> None:
    """Register an architecture with timm."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        # With the filter timm can load the authors' files too, given as pretrained_cfg_overlay=dict(file=FILE).
        settings = {**backbone.settings, **kwargs}
        return build_model_with_cfg(
            backbone.build, name, pretrained, pretrained_filter_fn=published, feature_cfg=dict(backbone.features),
            **settings,
        )  # fmt: skip

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = (
        f"{name} of {backbone.paper.replace(':', ' ')}, for images {list(backbone.input_size)} of pixels in [0, 1] and "
        f"{backbone.num_classes} classes."
    )
    globals()[name] = register_model(entrypoint)


for _name, _backbone in BACKBONES.items():
    _register(_name, _backbone)
