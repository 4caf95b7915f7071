"""Low-rank adapters (LoRA, arXiv 2106.09685) of reprogrammed layers, by PEFT.

PEFT adds an adapter's sum to what a layer gives: `NRPM(x; W) + B A x`. It merges by adding `B A` to the weight, which
then is within the estimate: `NRPM(x; W + B A)`. The two are equal at lambda = 1 alone. An adapter of this module is
within the estimate from the beginning, so that merging changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.func import functional_call

from timm_nrpm.nn.layers import NRPMConv2d, NRPMLinear

if TYPE_CHECKING:
    from peft import LoraConfig

UNKNOWN = ("lora_dropout", "lora_bias", "use_dora")
"""Settings of PEFT that change more than the weight, or the input of the adapter alone."""


def within(config: LoraConfig) -> LoraConfig:
    """Have the adapters of a config stand within the estimates of reprogrammed layers, in place.

    PEFT does not save this with the adapters. So whoever loads them gives the config again:
    `PeftModel.from_pretrained(model, folder, config=within(LoraConfig.from_pretrained(folder)))`.

    Args:
        config: PEFT's config, whose `target_modules` are two-dimensional convolutions and linear maps.

    Returns:
        `config`, for `peft.get_peft_model`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: The config has dropout, a bias or DoRA, which no weight within an estimate can express.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> adapted = get_peft_model(model, within(LoraConfig(r=4, target_modules=["conv1", "conv2"]))).eval()
        >>> with torch.no_grad():
        ...     before, after = adapted(pixels), adapted.merge_and_unload()(pixels)
        >>> torch.allclose(before, after, atol=1e-4)
        True
    """
    try:
        from peft.tuners import lora
    except ImportError as error:
        raise ImportError("Low-rank adapters are those of PEFT: pip install 'timm_nrpm[lora]'.") from error
    given = {name: value for name in UNKNOWN if (value := getattr(config, name, None))}
    if given:
        listed = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(
            f"{listed} is more than a change of the weight, and an adapter within the estimate is nothing else: leave "
            "it out, or give PEFT the config as it is, and do not merge."
        )
    config._register_custom_module({NRPMLinear: _within(lora.Linear), NRPMConv2d: _within(lora.Conv2d)})
    return config


def _within(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of adapters like one of PEFT's, that change the weight of their layer while this computes.

    Args:
        kind: PEFT's adapter of a linear map or of a convolution.
    """

    class Within(kind):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.lora_variant:
                raise ValueError(
                    f"{type(next(iter(self.lora_variant.values()))).__name__} is a variant of LoRA that may be more "
                    "than a change of the weight: use plain LoRA, or give PEFT the config as it is, and do not merge."
                )

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._check_forward_args(x, *args, **kwargs)
            if args or any(value is not None for value in kwargs.values()):
                raise ValueError("Adapters within the estimate are the same for all images of a batch.")
            if self.disable_adapters and self.merged:
                self.unmerge()
            base: nn.Module = self.get_base_layer()
            active = () if self.disable_adapters or self.merged else self.active_adapters
            weight: Any = base.weight
            for name in active:
                if name in self.lora_A:
                    weight = weight + self.get_delta_weight(name).to(weight.dtype)
            result: Tensor = functional_call(base, {"weight": weight}, (x,))
            return result

    Within.__name__ = Within.__qualname__ = f"{kind.__name__}Within"
    return Within
