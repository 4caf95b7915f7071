"""What an attacker may do, and does; and the flags that say where a number flatters."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
