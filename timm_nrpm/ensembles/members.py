"""Models as members of an ensemble, each with its own normalisation and image size."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from timm_nrpm.nn.ensemble import Member, input_size_of
from timm_nrpm.nn.wrappers import subject_of


def members_of(models: Mapping[str, nn.Module]) -> dict[str, Member]:
    """Make members of models.

    A model on pixels, such as a :class:`timm_nrpm.pixel_model.PixelModel`, keeps its normalisation, and any other has
    timm's. Where the input sizes of timm models differ, each resizes the pixels to its own.

    Args:
        models: The models by name.

    Raises:
        ValueError: A model is no classifier of images, or its normalisation is not known.
    """
    subjects = {name: subject_of(model) for name, model in models.items()}
    sizes = {name: input_size_of(subject.model) for name, subject in subjects.items()}
    differ = len({size for size in sizes.values() if size is not None}) > 1
    return {name: Member(subject.on_pixels(), sizes[name] if differ else None) for name, subject in subjects.items()}
