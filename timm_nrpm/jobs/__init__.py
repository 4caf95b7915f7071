"""Support for long jobs: a journal, signals, progress bars, and several processes."""

from timm_nrpm.lazy import modules_of

__getattr__ = modules_of(__name__)
