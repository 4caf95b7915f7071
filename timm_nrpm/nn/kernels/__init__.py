"""Fast implementations of the estimator in `estimator.py`."""

import contextlib

from timm_nrpm.errors import SlowPathWarning
from timm_nrpm.nn.kernels.operator import mixed_sum

# Importing it registers its kernels. Where torch comes without Triton, ordinary operations serve CUDA as well.
with contextlib.suppress(ImportError):
    from timm_nrpm.nn.kernels import cuda as cuda

__all__ = ["SlowPathWarning", "mixed_sum"]
