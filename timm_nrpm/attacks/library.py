"""Attacks on pixels in [0, 1], along the gradient of a model that is given: those of torchattacks, and our own.

This is the only module that imports torchattacks, and it does so only when an attack runs, since torchattacks needs
SciPy and takes a second to import.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_nrpm.attacks.gradients import DENSE, direction
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.models.modes import attackable
from timm_nrpm.models.reprogramming import plain_copy, reprogrammed_layers
from timm_nrpm.nn.pixel_model import PixelModel, alike

Distance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function from the logits `[B, N]` of the clean images, those of the changed ones and labels `[B]` to `[B]` distances
between the two."""

Run = Callable[[PixelModel, Tensor, Tensor, list[int]], Tensor]
"""Function from the model to follow, pixels `[B, C, H, W]`, labels `[B]` and one seed for each image to attacked
pixels."""


def fgsm(eps: float) -> Run:
    """One signed gradient step of size `eps` (Goodfellow et al., arXiv 1412.6572)."""
    return _library("FGSM", lambda make, net, _: make(net, eps=eps))


def pgd(threat: Threat, steps: int, step_size: float | None = None) -> Run:
    """Projected gradient ascent from a random start (Madry et al., arXiv 1706.06083), Linf or L2.

    Args:
        threat: Threat under Linf or L2.
        steps: Number of steps.
        step_size: Step size in pixel units; by default `eps / 4`, which at eps = 8/255 is the paper's 2/255.
    """
    size = threat.eps / 4 if step_size is None else step_size
    name = "PGD" if threat.norm == "Linf" else "PGDL2"
    return _library(name, lambda make, net, _: make(net, eps=threat.eps, alpha=size, steps=steps, random_start=True))


def square(threat: Threat, queries: int, restarts: int = 1, *, rescale: bool = True) -> Run:
    """Random search that sees only the scores (Andriushchenko et al., arXiv 1912.00049), Linf or L2.

    Args:
        threat: Threat under Linf or L2.
        queries: Number of queries for each image and restart.
        restarts: Number of restarts.
        rescale: Whether the schedule by which the squares shrink is scaled to `queries`, instead of being that of ten
            thousand queries.
    """
    search = _library(
        "Square",
        lambda make, net, seed: make(
            net,
            norm=threat.norm,
            eps=threat.eps,
            n_queries=queries,
            n_restarts=restarts,
            seed=seed,
            resc_schedule=rescale,
        ),
    )

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        if threat.norm == "L2" and min(pixels.shape[2:]) < 5:
            warnings.warn("Square under L2 needs images of at least 5 x 5 pixels: it was left out.", stacklevel=2)
            return pixels
        return search(net, pixels, labels, seeds)

    return run


def auto_attack(threat: Threat, classes: int, steps: int = 100, queries: int = 5000) -> dict[str, Run]:
    """The four attacks of AutoAttack (Croce and Hein, arXiv 2003.01690, section 6) by torchattacks, Linf or L2, with
    the settings of AutoAttack's authors: torchattacks' own ensemble takes ten steps where they take a hundred, and
    every class as a target where they take the nine most likely.

    Args:
        threat: Threat under Linf or L2.
        classes: Number of classes of the model; with three or fewer the targeted attacks are left out.
        steps: Number of steps of every attack but Square.
        queries: Number of queries of Square for each image.
    """
    targets = min(classes, MOST_TARGETS + 1)

    def configured(make: Callable[..., Any], net: PixelModel, seed: int) -> Callable[..., Any]:
        """An attack with one start under the threat, without the arguments that only one of the three attacks takes."""
        return partial(make, net, norm=threat.norm, eps=threat.eps, n_restarts=1, seed=seed, steps=steps)

    runs = {"aa_apgd_ce": _library("APGD", lambda *args: configured(*args)(loss="ce"))}
    if classes > 3:  # the targeted DLR loss takes the fourth largest logit
        runs["aa_apgd_t"] = _library("APGDT", lambda *args: configured(*args)(n_classes=targets))
        runs["aa_fab_t"] = _library("FAB", lambda *args: configured(*args)(multi_targeted=True, n_classes=targets))
    return {**runs, "aa_square": square(threat, queries, rescale=False)}


MOST_TARGETS = 9
"""Largest number of target classes of AutoAttack's targeted attacks."""

ORIGINALS = {"aa_apgd_ce": "apgd-ce", "aa_apgd_t": "apgd-t", "aa_fab_t": "fab-t", "aa_square": "square"}
"""Our names of AutoAttack's four attacks, and the names that its authors' code has for them."""


def original_auto_attack(threat: Threat, classes: int, steps: int = 100, queries: int = 5000) -> dict[str, Run]:
    """The four attacks of AutoAttack by their authors' own code, Linf, L2 or L1.

    Args:
        threat: Threat under Linf, L2 or L1.
        classes, steps, queries: The same as in :func:`auto_attack`.

    Raises:
        ImportError: The authors' code is not installed. It is not in a package index, only at
            github.com/fra31/auto-attack.
    """
    try:
        from autoattack import AutoAttack
    except ImportError as error:
        raise ImportError(
            "The suite autoattack runs its authors' own code, which is not installed: "
            'pip install git+https://github.com/fra31/auto-attack, or choose suite="standard".'
        ) from error

    def run(name: str, net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        attack = AutoAttack(
            net,
            norm=threat.norm,
            eps=threat.eps,
            version="standard",
            seed=seeds[0],
            verbose=False,
            device=pixels.device,
        )
        attack.attacks_to_run = [name]
        for part in (attack.apgd, attack.apgd_targeted, attack.fab):
            if steps != 100:
                part.n_iter = part.n_iter_orig = steps
                part.n_iter_2, part.n_iter_min = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
                part.size_decr = max(int(0.03 * steps), 1)
            part.n_target_classes = min(getattr(part, "n_target_classes", MOST_TARGETS), classes - 1)
        attack.square.n_queries = queries
        with torch.random.fork_rng(devices=[pixels.device] if pixels.is_cuda else []):
            return attack.run_standard_evaluation(pixels, labels, bs=len(pixels)).detach()

    few = classes <= 3
    return {ours: partial(run, theirs) for ours, theirs in ORIGINALS.items() if not (few and theirs.endswith("-t"))}


Make = Callable[[Callable[..., Any], PixelModel, int], Any]
"""Function from a class of torchattacks, the model to attack and a seed to the attack."""


def _library(name: str, make: Make) -> Run:
    """Return an attack of torchattacks.

    Args:
        name: Name of its class in torchattacks.
        make: Function that makes the attack from the class.
    """

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        import torchattacks

        # torchattacks seeds the global generator and draws from it.
        with torch.random.fork_rng(devices=[pixels.device] if pixels.is_cuda else []):
            torch.manual_seed(seeds[0])
            default = torch.get_default_dtype()
            torch.set_default_dtype(pixels.dtype)
            try:
                attack = make(getattr(torchattacks, name), net, seeds[0])
                attacked: Tensor = attack(pixels, labels).detach()
                return attacked
            finally:
                torch.set_default_dtype(default)

    return run


@contextmanager
def gradient_source(net: PixelModel, gradient: str) -> Iterator[PixelModel]:
    """Yield the model whose gradient an attack follows.

    Args:
        net: The attacked model.
        gradient: `"own"` for `net` itself; `"bpda"` for `net` with the gradient of its linear maps; or `"plain"` for
            the plain model, with lambda = 1 and the statistics from before calibration.
    """
    if gradient == "plain":
        yield alike(plain_copy(net.model, kept=True), net)
        return
    layers = reprogrammed_layers(net).values() if gradient == "bpda" else ()
    for layer in layers:
        layer.linear_backward = True
    try:
        yield net
    finally:
        for layer in layers:
            layer.linear_backward = False


def perturb(
    net: PixelModel,
    pixels: Tensor,
    labels: Tensor,
    start: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    gradient: str = "own",
    distance: Distance | None = None,
    turns: Tensor | None = None,
) -> Tensor:
    """Return examples to train on, by projected gradient ascent within a threat (Madry et al., arXiv 1706.06083).

    This is not an attack of torchattacks: those draw their start from the global generator, so that two processes would
    start elsewhere than one, and they know neither the linear gradient nor mixtures.

    Args:
        net: Model in any mode. The attack runs it in evaluation mode, and restores its mode afterwards.
        pixels, labels: Images `[B, C, H, W]` in [0, 1], and their classes `[B]`.
        start: First change of the pixels, `[B, C, H, W]`.
        threat: Norm and bound of the change; the norm is Linf, L2 or L1.
        steps: Number of steps.
        step_size: Length of a step in this norm, in pixel units of [0, 1].
        gradient: Gradient to follow: `"own"`, `"bpda"` or `"plain"`, see :func:`gradient_source`; or `"mixture"`, in
            which each image follows one of these three.
        distance: Distance from the clean logits to climb, such as the Kullback-Leibler divergence of TRADES; None
            climbs the cross-entropy of the labels.
        turns: Integers `[B]` for a mixture: an image with integer t follows gradient number t mod 3 of the above; by
            default t is the place of the image in the batch.

    Returns:
        Pixels `[B, C, H, W]` in [0, 1], within the threat of `pixels`. Pixels whose gradient is NaN are not moved.
    """
    kinds = ("own", "bpda", "plain")
    if gradient == "mixture":
        attacked = torch.empty_like(pixels)
        which = (torch.arange(len(pixels), device=pixels.device) if turns is None else turns) % len(kinds)
        for i, kind in enumerate(kinds):
            rows = (which == i).nonzero().squeeze(1)
            if len(rows):
                attacked[rows] = perturb(
                    net,
                    pixels[rows],
                    labels[rows],
                    start[rows],
                    threat,
                    steps=steps,
                    step_size=step_size,
                    gradient=kind,
                    distance=distance,
                )
        return attacked
    with attackable(net), gradient_source(net, gradient) as source:
        with torch.no_grad():
            clean = source(pixels) if distance else None
        attacked = threat.project(pixels, pixels + start)
        share = pixels.new_full((len(pixels),), DENSE)
        for _ in range(steps):
            attacked = attacked.detach().requires_grad_()
            logits = source(attacked)
            if distance is None or clean is None:
                loss = F.cross_entropy(logits, labels, reduction="sum")
            else:
                loss = distance(clean, logits, labels).sum()
            (slope,) = torch.autograd.grad(loss, attacked)
            with torch.no_grad():
                step = direction(slope.nan_to_num(0.0), threat, attacked, share)
                attacked = threat.project(pixels, attacked + step_size * step)
    return attacked.detach()
