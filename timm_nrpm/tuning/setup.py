"""Setup of a run: the Accelerator, the optimizer, the learning-rate schedule, and checks of the loader."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from timm_nrpm.choices import TEMPERED
from timm_nrpm.config import TuneConfig
from timm_nrpm.data.images import check_batch, check_labels
from timm_nrpm.jobs.processes import check_processes
from timm_nrpm.models.modes import evaluating
from timm_nrpm.models.reprogramming import model_sha256, record_of
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import subject_of

MAY_DIFFER = ("output", "checkpoint_every", "keep", "trackers", "patience", "push_to", "license")
"""Settings that may change when a run resumes, since they do not change what it computes."""


def settings_of(config: TuneConfig) -> dict[str, Any]:
    """What decides the results of a run, by name; a newer setting, which earlier runs lack, only if it is set."""
    newer = {"still": bool(config.still), "temperature": config.objective in TEMPERED}
    left_out = (*MAY_DIFFER, *(name for name, is_set in newer.items() if not is_set))
    return {name: value for name, value in asdict(config).items() if name not in left_out}


def identity_of_run(
    config: TuneConfig, net: PixelModel, teacher: PixelModel | None, same: Mapping[str, object]
) -> Mapping[str, object]:
    """Settings and hashes that must be the same for a run to resume, as JSON values by name.

    Args:
        config: Settings of the run.
        net: The model on pixels, whose normalisation and estimate decide the result as well.
        teacher: The teacher, if there is one.
        same: Further values that must be the same.
    """
    values = {**settings_of(config), **same}
    values |= {name: value.flatten().tolist() for name, value in net.named_buffers(recurse=False)}
    values |= {f"estimate's {name}": value for name, value in record_of(net.model).config.settings.items()}
    if teacher is not None:
        values |= {"the teacher": [model_sha256(teacher.model), teacher.normalisation()]}
    return json.loads(json.dumps(values))


def accelerator_of(config: TuneConfig) -> Accelerator:
    """The Accelerator of a run, in the precision and with the trackers that its settings name.

    Raises:
        ValueError: The processes share the model instead of the images, or do not know of each other.
    """
    logs = None if config.output is None else str(Path(config.output) / "logs")
    accelerator = Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(config.output, logs),
        # Broadcasting buffers before every forward would break the backward of a loss that takes two forwards.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check_processes(accelerator)
    return accelerator


def optimizer_of(
    config: TuneConfig, lams: Sequence[nn.Parameter], weights: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer: lambdas have a learning rate of their own, and only weights of several dimensions decay."""
    groups = [
        {"params": list(lams), "lr": config.lam_lr, "weight_decay": 0.0},
        {"params": [p for p in weights if p.ndim > 1], "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "lr": config.lr, "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        [group for group in groups if group["params"]], config.optimizer, config.lr
    )
    return optimizer


def scheduler_of(config: TuneConfig, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler | None:
    """The learning-rate schedule over epochs of `steps` steps; None if the learning rate is constant."""
    if config.schedule == "constant":
        return None
    scheduler, _ = create_scheduler_v2(
        optimizer,
        config.schedule,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return scheduler


def check_batches(model: nn.Module, source: DataLoader[Any], images: int, batches: int, processes: int) -> None:
    """Check that every process has a batch, and that BatchNorm can train on the last one.

    Args:
        model: The model to tune.
        source: The loader of its images.
        images: Number of images in an epoch.
        batches: Number of batches per epoch and process.
        processes: Number of processes.

    Raises:
        ValueError: There is no batch, or the last batch of an epoch would be one image, on which BatchNorm fails.
    """
    if not batches:
        raise ValueError(
            f"The loader gives fewer batches than there are processes, {processes}: give more images, smaller batches, "
            "or drop_last=False."
        )
    size = source.batch_size or 1
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    norms = [m for m in norms if any(p.requires_grad for p in m.parameters())]
    if norms and size > 1 and images % size == 1 and not source.drop_last:
        raise ValueError(
            f"The last of the {images} images would be a batch of its own, from which BatchNorm in training mode "
            "cannot take statistics: give drop_last=True or another batch_size."
        )


def classes_of(net: PixelModel, images: DataLoader[Any]) -> int:
    """The number of classes, which is that of the model's logits. The labels of the first batch must fit it."""
    if not len(images):
        raise ValueError(
            "The loader gives no batch: give it images, or drop_last=False where they are too few for one."
        )
    batch, _ = next(iter(images))
    pixels, labels = check_batch(batch)
    with evaluating(net), torch.no_grad():
        classes = net(pixels[:1].to(net.mean.device)).shape[1]
    check_labels(labels, classes)
    return int(classes)


def teacher_of(teacher: nn.Module, images: DataLoader[Any], classes: int) -> PixelModel:
    """The teacher on pixels, with its own normalisation.

    Args:
        teacher: A classifier, or a wrapper of one that knows its normalisation.
        images: The loader of the images that it will see, of which the first batch is looked at.
        classes: Number of classes of the model that it teaches.

    Raises:
        ValueError: Its logits are of another number of classes, or its normalisation is unknown.
    """
    net = subject_of(teacher).on_pixels()
    batch, _ = next(iter(images))
    pixels = check_batch(batch)[0][:1].to(net.mean.device)
    with evaluating(net), torch.no_grad():
        theirs = net(pixels).shape[1]
    if theirs != classes:
        raise ValueError(
            f"The teacher has {theirs} classes, and the model {classes}: give a teacher of the same classes, in the "
            "same order."
        )
    return net
