"""What others see of a variant: its card, and the Hub."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
