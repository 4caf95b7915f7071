"""Paradigms 2 and 3: lambda, or everything, tuned under attack by a training loop on accelerate (arXiv 2410.04577)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_nrpm.attacks.threats import Threat
from timm_nrpm.config import TuneConfig
from timm_nrpm.data.images import check_batch
from timm_nrpm.data.ordering import first_images, ordered, seed_of
from timm_nrpm.errors import Diverged
from timm_nrpm.evaluation.evaluate import evaluate
from timm_nrpm.evaluation.history import Evaluation, History, Step, finite
from timm_nrpm.jobs.processes import average_statistics_
from timm_nrpm.jobs.signals import SIGNALS, Interruption
from timm_nrpm.models.base import weights_sha256
from timm_nrpm.models.calibration import calibrate_, plain_of
from timm_nrpm.models.plain_statistics import norms_of
from timm_nrpm.models.reprogramming import lambdas, plain_copy, reprogrammed_layers, settle_
from timm_nrpm.nn.wrappers import Subject, subject_of
from timm_nrpm.tuning.checkpoints import collect, install_
from timm_nrpm.tuning.objectives import Objective, check_teacher
from timm_nrpm.tuning.progress import Bar, tracked
from timm_nrpm.tuning.run_folder import RunFolder
from timm_nrpm.tuning.setup import (
    accelerator_of,
    check_batches,
    classes_of,
    identity_of_run,
    optimizer_of,
    scheduler_of,
    teacher_of,
)
from timm_nrpm.tuning.trainable import given_back, select_, set_modes_

PLAIN = 1000
"""Number of training images for the plain model's statistics, which are taken anew where weights train."""


def tune(
    model: nn.Module,
    loader: DataLoader[Any],
    config: TuneConfig | None = None,
    *,
    validation: DataLoader[Any] | None = None,
    teacher: nn.Module | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    resume: bool = False,
    progress: bool = False,
) -> History:
    """Tune lambda (paradigm 2) or everything (paradigm 3) of a reprogrammed model, in place, under attack.

    The function runs in one process or in several, as `accelerate launch` or `torchrun` set them up. CPU processes are
    started by `ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 script.py`; `accelerate launch --cpu` starts one.

    If `config.output` is set, that folder holds `history.json`, `curves.png`, `variant/` (which `from_pretrained`
    loads) and `checkpoints/`: one every `config.checkpoint_every` steps, and one on SIGTERM or Ctrl-C, after which the
    signal has its usual effect. All processes must be able to read and write the folder.

    Args:
        model: A reprogrammed model, `learnable` or not. It is moved to accelerate's device. At the end, `requires_grad`
            and every training mode are as before.
        loader: A DataLoader of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, where B is the batch size of one
            process. Its dataset has a length, so that processes can share it and a run can resume within an epoch.
        config: Settings; the default is `TuneConfig()`.
        validation: A loader of the same kind, on which the accuracy, clean and under quick attacks, is measured before
            the first epoch and after every epoch.
        teacher: The teacher of the objective `"teacher"`, see :func:`timm_nrpm.teacher.tune_by_teacher`.
        mean, std: Normalisation of the model, as in :func:`timm_nrpm.evaluate`.
        resume: Whether to go on from the last intact checkpoint in `config.output`, or from the start if there is none.
        progress: Whether to show a progress bar, with the loss, accuracies and lambdas.

    Returns:
        The history of the run, step by step.

    Raises:
        ValueError: A setting, the loader or an image does not fit. Nothing was changed or lost.
        Diverged: `config.patience` gradients in a row were not finite. The last checkpoint is intact.
        OSError: A checkpoint could not be written. The one before it is intact.

    Example:
        >>> model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5)
        >>> config = TuneConfig(eps=0.15, epochs=1, calibrate=64, output="run")
        >>> history = tune(model, training_loader, config, validation=loader)
        >>> timm_nrpm.lambdas(timm_nrpm.from_pretrained("run/variant"))
        {'conv1': ..., 'layer1.0.conv1': ..., ...}
    """
    config = TuneConfig() if config is None else config
    if not isinstance(config, TuneConfig):
        raise ValueError(f"config={config!r} is no TuneConfig: write tune(model, loader, TuneConfig(epochs=1)).")
    if resume and config.output is None:
        raise ValueError("resume=True needs config.output, the folder of the run.")
    is_first, accumulation = not AcceleratorState._shared_state, dict(GradientState._shared_state)
    subject = subject_of(model, mean, std)
    with torch.inference_mode(False), given_back(subject.model):
        try:
            return _Run(subject, loader, config, validation, teacher, resume, progress).all()
        finally:
            if is_first:  # the next call may ask for another precision
                AcceleratorState._reset_state()
            GradientState._shared_state.clear()  # the caller's Accelerator, if there is one, accumulates as before
            GradientState._shared_state.update(accumulation)


class _Run:
    """One call of :func:`tune`."""

    def __init__(
        self,
        subject: Subject,
        loader: DataLoader[Any],
        config: TuneConfig,
        validation: DataLoader[Any] | None,
        teacher: nn.Module | None,
        resume: bool,
        progress: bool,
    ) -> None:
        model, net = subject.model, subject.on_pixels()
        check_teacher(config, teacher)
        self.model, self.config = model, config
        self.lams, self.weights = select_(model, config)
        self.source, self.order, self.numbered = ordered(loader, config.seed)
        self.history = History(config, tuple(reprogrammed_layers(model)))
        self.step = self.epoch = self.batch = self.failed = 0
        self.interruption = Interruption()
        self.accelerator = accelerator_of(config)
        self.folder: RunFolder | None = None
        if config.output is not None:
            self.folder = RunFolder(config.output, config.keep, resume, self.accelerator)
            if config.push_to is not None:
                self.folder.publish(model, config.push_to, config.license)
        self.classes = classes_of(net, self.source)
        taught_by = None if teacher is None else teacher_of(teacher, self.source, self.classes)
        self.objective = Objective(net, config, len(self.numbered), self.classes, taught_by)
        optimizer = optimizer_of(config, self.lams, self.weights)
        frozen = weights_sha256({n: p for n, p in model.named_parameters() if not p.requires_grad})
        with warnings.catch_warnings():
            # Recent versions of torch renamed this option, and accelerate cannot pass on the new name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.wrapped, self.optimizer, self.loader = self.accelerator.prepare(self.objective, optimizer, self.source)
        if self.accelerator.num_processes > 1 and not loader.drop_last:
            self.order.multiple = self.loader.total_batch_size
        self.validation = validation
        self.batches = len(self.loader)  # per epoch and process
        check_batches(model, self.source, len(self.order), self.batches, self.accelerator.num_processes)
        self.steps = -(-self.batches // config.accumulate)  # per epoch
        self.scheduler = scheduler_of(config, optimizer, self.steps)
        same = {"batch of all processes": self.loader.total_batch_size, "images": len(self.numbered)}
        same |= {"layers": self.history.layers, "sha256 of what is frozen": frozen}
        self.identity = identity_of_run(config, net, taught_by, same)
        self.seen = torch.zeros(4 + len(SIGNALS), device=self.accelerator.device)
        if resume:
            self._resume()
        if config.trackers:
            settings = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in asdict(config).items()}
            self.accelerator.init_trackers("timm_nrpm", config=settings)
        last = self.history.evaluations[-1] if self.history.evaluations else None
        shown = progress and self.accelerator.is_main_process
        self.bar = Bar(config.epochs * self.steps, self.step, last, shown)

    def all(self) -> History:
        """Run every epoch that is left."""
        # Without a folder there is nothing to save, so signals keep their usual effect.
        with self.interruption if self.folder else nullcontext(), self.bar:
            set_modes_(self.model, still=self.config.still)
            if self.step == 0:
                self.calibrate()
                self.evaluate()
            while self.epoch < self.config.epochs:
                self.objective.epoch = self.epoch
                for batch, rows in self.images():
                    self.train(batch, rows)
                if self.weights:
                    self.settle()
                else:
                    self.calibrate()
                self.evaluate()
                self.epoch, self.batch = self.epoch + 1, 0
                self.save()
        if self.folder is not None:
            self.folder.finish(self.model, self.history)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return self.history

    def images(self) -> Iterable[Any]:
        """The batches left in the epoch, as the user's loader gives them, each with the indices of its images."""
        if self.batch == self.batches:
            return ()
        self.order.epoch = self.epoch
        self.numbered.epoch.fill_(self.epoch)
        self.order.skip = self.batch * self.loader.total_batch_size
        return self.loader

    def train(self, batch: Any, rows: Tensor) -> None:
        """Process one batch and, unless gradients accumulate, take one step."""
        pixels, labels = check_batch(batch, self.classes)
        set_seed(seed_of(self.config.seed, self.epoch, self.batch, self.accelerator.process_index))  # for dropout
        first = self.batch - self.batch % self.config.accumulate
        together = min(self.config.accumulate, self.batches - first)  # fewer at the end of an epoch
        with self.accelerator.accumulate(self.wrapped):
            try:
                result = self.wrapped(pixels, labels, rows)
                # accelerate always divides by config.accumulate.
                self.accelerator.backward(result[0] * (self.config.accumulate / together))
            finally:
                self.objective.settle()
            loss, *right = result.detach()
            self.seen[:4] += torch.stack([loss * len(pixels), *right, torch.full_like(loss, len(pixels))])
            self.batch += 1
            norms = self._step() if self.accelerator.sync_gradients else None
            self.optimizer.zero_grad()
        if norms is not None:
            self._after_step(norms)

    def _step(self) -> tuple[float, float]:
        """Take a step unless a gradient is not finite; return the gradient norms of lambda and of the weights."""
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        clip = math.inf if self.config.clip is None else self.config.clip
        lam, rest = (float(self.accelerator.clip_grad_norm_(g, clip)) if g else 0.0 for g in (self.lams, self.weights))
        if math.isfinite(lam) and math.isfinite(rest):
            self.optimizer.step()
            with torch.no_grad():
                for parameter in self.lams:
                    parameter.clamp_(0.0, 1.0)
        average_statistics_(self.accelerator, self.model)
        return lam, rest

    def _after_step(self, norms: tuple[float, float]) -> None:
        """Record the step, then save, stop or pass a signal on where that is due."""
        c = self.config
        for i, number in enumerate(SIGNALS):
            self.seen[4 + i] = self.interruption.number == number
        loss, clean, attacked, count, *signals = self.accelerator.reduce(self.seen).tolist()
        self.seen.zero_()
        self.step += 1
        skipped = not all(map(math.isfinite, norms))
        self.failed = self.failed + 1 if skipped else 0
        row = Step(
            step=self.step,
            epoch=self.epoch,
            loss=finite(loss / count),
            clean=clean / count if clean >= 0 else None,
            attacked=attacked / count if attacked >= 0 else None,
            norm=(finite(norms[0]), finite(norms[1])),
            skipped=skipped,
            lams=tuple(lambdas(self.model).values()),
        )
        if self.step % c.log_every == 0:
            self.history.steps.append(row)
            if c.trackers:
                self.accelerator.log(tracked(row, self.history.layers), step=row.step)
        self.bar.show(row)
        if self.failed >= c.patience:
            raise Diverged(
                f"The gradient was not finite {self.failed} steps in a row, up to step {self.step}, so nothing moved. "
                f"Lower lr={c.lr:g} and lam_lr={c.lam_lr:g}, clip more than {c.clip}, or reprogram the model with a "
                "larger eps: the gradient of the estimate grows with 1 / eps^2."
            )
        if any(signals):
            self.save()
            self.interruption.pass_on(next(s for s, count in zip(SIGNALS, signals, strict=True) if count))
        elif self.step % c.checkpoint_every == 0 and self.batch < self.batches:
            self.save()

    def calibrate(self) -> None:
        """Adapt the statistics to the current lambda; where weights train, training does so after the first time.

        Every process does the same, on the same images.
        """
        if not self.config.calibrate:
            return
        self.bar.doing("Calibrating")
        images = first_images(self.source, self.config.calibrate, self.loader.total_batch_size)
        calibrate_(self.model, images, **self.objective.net.normalisation())

    def settle(self) -> None:
        """Adapt the plain model's statistics to the weights; training adapted only those the model computes with."""
        trained = [name for name, norm in norms_of(self.model).items() if norm.training]
        if trained:
            self.bar.doing("Taking the plain model's statistics")
            images = first_images(self.source, PLAIN, self.loader.total_batch_size)
            settle_(self.model, plain_of(self.objective.net, images, trained).model)
        else:
            settle_(self.model, plain_copy(self.model, kept=True))

    def evaluate(self) -> None:
        """Measure the accuracy on the validation images, which the processes share."""
        if self.validation is None:
            return
        self.bar.doing("Evaluating")
        c = self.config
        report = evaluate(
            self.objective.net,
            self.validation,
            Threat(c.norm, c.validation_eps),
            "quick",
            steps=c.evaluate_steps,
            seed=c.seed,
            control=False,
            accelerator=self.accelerator,
        )
        row = Evaluation(self.step, report.accuracy("clean"), report.accuracy("pgd"), report.worst_case, report.flags)
        self.history.evaluations.append(row)
        self.bar.evaluation = row
        self.bar.doing("Tuning")
        if c.trackers:
            values = {"clean": row.clean, "own": row.own, "quick": row.quick}
            self.accelerator.log({f"validation/{k}": v for k, v in values.items()}, step=self.step)

    def save(self) -> None:
        """Write a checkpoint, and the history so far."""
        if self.folder is None:
            return
        state = collect(self.model, self.wrapped, self.optimizer.optimizer)
        content = {"position": [self.step, self.epoch, self.batch, self.failed], "run": self.identity}
        self.folder.save(self.step, state, content, self.history, self.model)

    def _resume(self) -> None:
        """Go back to the last intact checkpoint, if there is one."""
        if not (saved := self.folder and self.folder.last(self.identity)):
            return
        install_(self.model, self.wrapped, self.optimizer.optimizer, {**saved.tensors, **saved.content["values"]})
        self.step, self.epoch, self.batch, self.failed = saved.content["position"]
        self.history = replace(History.from_dict(saved.content["history"]), config=self.config)
