"""The estimator of `estimator.py`, fast."""

from timm_nrpm.kernels.native import SlowPathWarning
from timm_nrpm.kernels.operator import robust_sum

__all__ = ["SlowPathWarning", "robust_sum"]
