"""A small robust model teaches a part of a large one (after Jain et al., arXiv 2309.07499)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from timm_nrpm.config import TuneConfig
from timm_nrpm.evaluation.history import History
from timm_nrpm.tuning.plain import tune_weights


def tune_by_teacher(
    model: nn.Module,
    teacher: nn.Module,
    loader: DataLoader[Any],
    config: TuneConfig | None = None,
    *,
    validation: DataLoader[Any] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    resume: bool = False,
    progress: bool = False,
) -> History:
    """Tune weights of a model, in place, so that it predicts what a robust teacher does, on images as they are and
    attacked alike, and learns from the labels where the teacher is unsure.

    A small model is cheap to make robust. What it has learned then moves to a part of the large one, so name few of
    its layers in `config.trainable`: gradients are computed for them alone, and the others keep what they know. The
    loss is :func:`timm_nrpm.tuning.losses.taught`. To teach against shifts rather than an attacker, give `eps=0` and a
    loader of images that are augmented.

    Args:
        model: The model to tune, plain or reprogrammed.
        teacher: A robust classifier of the same classes, plain or reprogrammed, with its own normalisation: that of a
            timm model, or of a PixelModel around any other. It is not changed.
        loader, validation, resume, progress: The same as in :func:`timm_nrpm.tune`.
        config: Settings; the default is `TuneConfig(paradigm="all")`, which tunes all weights that are not frozen. Its
            objective becomes `"teacher"`, and its temperature softens what the teacher says.
        mean, std: Normalisation of the model, as in :func:`timm_nrpm.evaluate`.

    Returns:
        The history of the run.

    Raises:
        ValueError: The teacher has another number of classes, or as in :func:`timm_nrpm.tune`.

    Example:
        >>> config = TuneConfig(paradigm="all", trainable=("layer3.*", "fc.*"), eps=0.1, steps=1, epochs=1)
        >>> student = timm.create_model("resnet8_digits", pretrained=True)
        >>> history = tune_by_teacher(student, model, training_loader, config)
        >>> history.config.objective
        'teacher'
    """
    config = TuneConfig(paradigm="all") if config is None else config
    return tune_weights(
        model,
        loader,
        replace(config, objective="teacher"),
        validation=validation,
        teacher=teacher,
        mean=mean,
        std=std,
        resume=resume,
        progress=progress,
    )
