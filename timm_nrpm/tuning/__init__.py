"""Paradigms 2 and 3: lambda, or everything, learned under attack."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
