"""Everything to look at: pictures and pages."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
