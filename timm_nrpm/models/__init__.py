"""Models: creating, reprogramming, calibrating, saving and loading them."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
