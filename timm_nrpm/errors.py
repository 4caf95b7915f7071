"""The errors and warnings that this package raises, in addition to Python's own."""

from __future__ import annotations

from timm_nrpm.checks import printable


class ReprogrammingWarning(UserWarning):
    """Some layers stay plain although one might expect them to be reprogrammed."""


class SlowPathWarning(UserWarning):
    """The CPU kernels could not be compiled, so a slower implementation is used."""


class CompilationError(RuntimeError):
    """There is no C++ compiler, or it failed."""


class HubError(RuntimeError):
    """A request to the Hub failed; the message says why and what to do."""


class NotOnHub(HubError):
    """The Hub has no such repository, revision or file, or does not give access to it."""


class Unreachable(HubError):
    """The Hub does not answer, or is temporarily unavailable."""


class WeightsUnavailable(HubError):
    """Pretrained weights can be neither downloaded nor found on this machine."""


class WrongBase(ValueError):
    """The model is not the one that the variant was made for."""


class BrokenFolder(ValueError):
    """The content of a folder is damaged, or is not what this package writes."""

    def __init__(self, text: str) -> None:
        text = printable(text)  # it may quote a stranger's file at any length
        super().__init__(text if len(text) <= 1000 else f"{text[:700]} ... {text[-200:]}")


class BrokenVariant(BrokenFolder):
    """The content of a variant is damaged, or is not what `save_pretrained` writes."""


class BrokenSignature(BrokenFolder):
    """The content of a signature is damaged, or is not what `Signature.save` writes."""


class MissingFile(BrokenVariant, FileNotFoundError):
    """A file of a variant is missing from its folder."""


class Diverged(RuntimeError):
    """The gradient was not finite in too many consecutive steps."""


class AdaptationDoubt(UserWarning):
    """Adaptation shows a sign of harm."""


class CheckpointWarning(UserWarning):
    """A checkpoint is broken, so the one before it is used."""


class PushWarning(UserWarning):
    """A variant could not be sent to the Hub; the run goes on, and the variant can be pushed later."""
