"""Images and labels: how they are read, what they must be, and their order."""

from timm_nrpm.data.loaders import digits, pixel_loader
from timm_nrpm.lazy import modules_of

__all__ = ["digits", "pixel_loader"]

__getattr__ = modules_of(__name__)
