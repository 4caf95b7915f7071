"""Tuning of the weights of any model, plain or reprogrammed."""

from __future__ import annotations

import fnmatch
import warnings
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from timm_nrpm.config import NRPMConfig, TuneConfig
from timm_nrpm.errors import ReprogrammingWarning
from timm_nrpm.evaluation.history import History
from timm_nrpm.models.reprogramming import reprogram_, reprogrammed_layers, restore_
from timm_nrpm.nn.wrappers import subject_of
from timm_nrpm.tuning.tune import tune


def tune_weights(
    model: nn.Module,
    loader: DataLoader[Any],
    config: TuneConfig,
    *,
    validation: DataLoader[Any] | None = None,
    teacher: nn.Module | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    resume: bool = False,
    progress: bool = False,
) -> History:
    """Do what :func:`timm_nrpm.tune` does, in place, also with a plain model, which is plain again at the end.

    Meanwhile a plain model is reprogrammed with every lambda at 1, as which it computes the same, and no lambda trains.

    Args:
        model: A plain or a reprogrammed model.
        loader, config, validation, teacher, mean, std, resume, progress: The same as in :func:`timm_nrpm.tune`. The
            globs of `config.trainable` are of the model's own parameters; None stands for all that are not frozen.

    Returns:
        The history of the run.

    Raises:
        ValueError: As in :func:`timm_nrpm.tune`.

    Example:
        >>> config = TuneConfig(paradigm="all", objective="clean", trainable="fc.*", epochs=1)
        >>> net = timm.create_model("resnet8_digits", pretrained=True)
        >>> history = tune_weights(net, training_loader, config)
        >>> timm_nrpm.lambdas(net)
        {}
    """
    subject = subject_of(model, mean, std)
    plain, mean, std = subject.model, subject.mean, subject.std
    given = {"validation": validation, "teacher": teacher, "resume": resume, "progress": progress}
    if reprogrammed_layers(plain):
        return tune(plain, loader, config, mean=mean, std=std, **given)  # type: ignore[arg-type]
    globs = config.trainable
    trainable = tuple(
        name
        for name, parameter in plain.named_parameters()
        if (parameter.requires_grad if globs is None else any(fnmatch.fnmatchcase(name, glob) for glob in globs))
    )
    names = list(plain.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReprogrammingWarning)  # no layer is meant to be estimated
        reprogram_(plain, NRPMConfig(lam=1.0))
        try:
            config = replace(config, paradigm="all", trainable=trainable or globs)
            history = tune(plain, loader, config, mean=mean, std=std, **given)  # type: ignore[arg-type]
        finally:
            # Statistics at lambda 1 are the plain model's own, and restore_ would bring back those taken in the end.
            trained = {name: value.clone() for name, value in plain.state_dict().items() if name in names}
            restore_(plain)
            plain.load_state_dict(trained)
    return history
