"""The mathematics and the modules: the estimate, its kernels, the layers, and a model on pixels."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
