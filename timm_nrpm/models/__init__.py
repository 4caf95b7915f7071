"""Models: made, reprogrammed, calibrated, kept, and found again."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
