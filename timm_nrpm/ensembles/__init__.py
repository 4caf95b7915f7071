"""Models made of models."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
