"""The errors and warnings that this package raises, beside Python's own."""

from __future__ import annotations

from timm_nrpm.checks import printable


class ReprogrammingWarning(UserWarning):
    """Layers stay plain that one might think reprogrammed."""


class SlowPathWarning(UserWarning):
    """The CPU kernels could not be compiled, so the slow path serves."""


class CompilationError(RuntimeError):
    """There is no compiler, or it failed."""


class HubError(RuntimeError):
    """The Hub did not do what it was asked; the message says why and what to do."""


class NotOnHub(HubError):
    """The Hub has no such repository, revision or file, or shows it to others only."""


class Unreachable(HubError):
    """The Hub does not answer, or not now."""


class WeightsUnavailable(HubError):
    """Pretrained weights can be neither downloaded nor found on this machine."""


class WrongBase(ValueError):
    """A model is not the one that a variant was made for."""


class BrokenVariant(ValueError):
    """Something that does not hold what `save_pretrained` writes, damaged or made up."""

    def __init__(self, text: str) -> None:
        text = printable(text)  # a stranger's words in it may be long, too
        super().__init__(text if len(text) <= 1000 else f"{text[:700]} ... {text[-200:]}")


class MissingFile(BrokenVariant, FileNotFoundError):
    """A folder lacks a file."""


class Diverged(RuntimeError):
    """The gradient was not finite, too many steps in a row."""


class CheckpointWarning(UserWarning):
    """A checkpoint is broken, and the one before it is taken."""


class PushWarning(UserWarning):
    """A variant did not get to the Hub; the run goes on, and it can be pushed later."""
