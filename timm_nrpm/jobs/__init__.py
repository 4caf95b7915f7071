"""What every long job needs: a journal, signals, and processes that agree."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
