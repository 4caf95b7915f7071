"""Threats, attacks within them, and flags that say where an accuracy under attack is misleading."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
