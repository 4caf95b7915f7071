"""The estimator of `estimator.py`, fast: the one place that decides how it is computed."""

from timm_nrpm.kernels.tiled import estimate, estimate_backward

__all__ = ["estimate", "estimate_backward"]
