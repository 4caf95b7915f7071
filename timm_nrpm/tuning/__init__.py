"""Paradigms 2 and 3: lambda alone, or the weights as well, tuned under attack."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
