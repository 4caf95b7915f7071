"""Tuning of one model by several processes: a check of their set-up, and what they share besides gradients."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

REPLICATED = {
    getattr(DistributedType, name)
    for name in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_HPU")
    if hasattr(DistributedType, name)
}
"""Set-ups in which every process holds the whole model."""


def check_processes(accelerator: Accelerator) -> None:
    """Raise a ValueError unless every process holds the whole model and knows of the others."""
    if accelerator.distributed_type not in REPLICATED:
        raise ValueError(
            f"accelerate is set up for {accelerator.distributed_type}, which cuts a model into parts, and tuning needs "
            "it whole in every process: configure accelerate for multi-GPU or multi-CPU, or use torchrun."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    alone = accelerator.num_processes == 1 or accelerator.distributed_type == DistributedType.NO
    if started > 1 and alone:
        raise ValueError(
            f"{started} processes were started, and accelerate would let each tune alone: on the CPU set "
            "ACCELERATE_USE_CPU=true."
        )


@torch.no_grad()
def average_statistics_(accelerator: Accelerator, model: nn.Module) -> None:
    """Replace the running statistics of BatchNorm by their mean over the processes, each of which saw other images.

    Call it after every step, so that nothing depends on when a checkpoint is due. It leaves out modules in evaluation
    mode, whose statistics are equal, since the mean of three equal numbers is not always that number.
    """
    moving = [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if module.training and name in ("running_mean", "running_var")
    ]
    if moving and accelerator.num_processes > 1:
        means = accelerator.reduce(torch.cat(moving), "mean").split([len(buffer) for buffer in moving])
        for buffer, mean in zip(moving, means, strict=True):
            buffer.copy_(mean)


def with_others(own: Tensor) -> Tensor:
    """The rows of all processes, `[P * B, ...]`, for a loss that is no mean over images.

    A loss of all rows has the same value in every process. Only the rows of this process carry a gradient, and P times
    theirs, so that the gradients, which DistributedDataParallel averages over the P processes, are those that one
    process would have with all images.

    Args:
        own: Rows of this process, `[B, ...]`, as many as every other process has.
    """
    if not dist.is_initialized():
        return own
    count = dist.get_world_size()
    sent = own.detach().contiguous()
    rows = [torch.empty_like(sent) for _ in range(count)]
    dist.all_gather(rows, sent)
    rows[dist.get_rank()] = count * own - (count - 1) * sent
    return torch.cat(rows)
