"""Model cards, and variants on the Hub."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
