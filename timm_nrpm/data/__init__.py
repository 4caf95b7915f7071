"""Images and labels: where they are read, their contract and their order."""

from timm_nrpm.data.loaders import digits, pixel_loader
from timm_nrpm.lazy import modules_of

__all__ = ["digits", "pixel_loader"]

__getattr__ = modules_of(__name__)
