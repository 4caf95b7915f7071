"""Advice: what to do with a model, found by trying what the package has, from cheap to dear, on evidence."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
