"""Subnetworks: the early part of a network, made robust, and what that is worth to the rest (arXiv 2307.03803)."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
