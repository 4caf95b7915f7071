"""Models as files that run without this package, or without PyTorch."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
