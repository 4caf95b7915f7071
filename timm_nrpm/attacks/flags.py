"""Signs that an accuracy under attack is too high: each has a number, a threshold and a section in docs/flags.md.

They follow Carlini et al., "On evaluating adversarial robustness" (arXiv 1902.06705), and Athalye et al.
(arXiv 1802.00420).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from timm_nrpm.attacks.apgd import climb
from timm_nrpm.attacks.gradients import slope
from timm_nrpm.attacks.sources import Source
from timm_nrpm.attacks.sparse import SPARSE
from timm_nrpm.attacks.threats import Threat

MASKED = "gradient_masking"
"""The same PGD breaks more images along the gradient of the plain model, of `base`, of the linear maps or of an
ensemble's member than along the model's own."""

SCORES = "scores_beat_gradient"
"""A random search that sees only the scores breaks images that no attack along the model's own gradient broke."""

NON_FINITE = "non_finite_gradient"
"""A gradient that an attack followed was not finite, so the attack did not move those pixels."""

ZERO = "zero_gradient"
"""The gradient of the margin is zero in every pixel of some images."""

RANDOM = "random_forward"
"""The same images give different logits each time."""

ONE_STEP = "one_step_beats_many"
"""FGSM, a single step, breaks more images than the many steps of PGD."""

UNBOUNDED = "right_when_unbounded"
"""An attacker who may change every pixel at will still fails on many images."""

FLAT = "more_eps_no_effect"
"""Half the bound breaks some images, and double the bound hardly any more."""

CLIMBING = "attack_not_finished"
"""The loss of the images that are still right was rising when the attack ended."""

PLAIN_CHANGED = "plain_model_changed"
"""The weights were trained after the model was reprogrammed, so the plain model that it is compared with is not the one
that it was made from."""

COMPARISON = (PLAIN_CHANGED,)
"""Flags that question the comparison with the plain model. All others say that an accuracy under attack is too high."""

MARGIN = 0.02
"""Share of all images by which an attack must break more than another to count as better."""

MEANINGS = {
    MASKED: "The same PGD breaks more images along the gradient of the plain model, of the linear maps or of an "
    "ensemble's member than along the model's own, so its own gradient misleads attackers without keeping them out. At "
    "least three images are needed to raise this flag.",
    SCORES: "A random search that sees only the scores breaks images that no attack along the model's own gradient "
    "broke. At least three images are needed to raise this flag.",
    NON_FINITE: "A gradient that an attack followed was not finite, so the attack did not move the pixels concerned.",
    ZERO: "On some images the gradient is zero in every pixel, so attacks along it do not move.",
    RANDOM: "The same images give different logits each time: an image that survives once may fall the next time.",
    ONE_STEP: "A single step breaks more images than many steps do, so the many steps went astray. At least three "
    "images are needed to raise this flag.",
    UNBOUNDED: "An attacker who may change every pixel at will still leaves more images right than guessing would, so "
    "the attack does not work on this model.",
    FLAT: "Double the bound breaks hardly more images than half of it, so the attacks do not use the room they have.",
    CLIMBING: "On images that survived, the loss was still rising when the attack ended: more steps would break more.",
    PLAIN_CHANGED: "The weights were trained after the model was reprogrammed. The plain model that it is compared "
    "with has the same weights at lambda 1; the model it was made from is no longer available: give that one as base=.",
}
"""What each flag means, in a sentence."""

NUMBERS = {
    MASKED: "how many more images break along another gradient than along the model's own",
    SCORES: "images that only the random search breaks",
    NON_FINITE: "1 if a gradient was not finite",
    ZERO: "images with a zero gradient",
    RANDOM: "largest change of a logit, relative to the largest logit",
    ONE_STEP: "how many more images one step breaks than many steps",
    UNBOUNDED: "images that survive, less those that guessing would get right",
    FLAT: "accuracy at double the bound, relative to that at half of it",
    CLIMBING: "surviving images whose loss was still rising",
    PLAIN_CHANGED: "1 if the weights were trained",
}
"""What the number of each flag counts."""

THRESHOLDS = {
    MASKED: MARGIN,
    SCORES: MARGIN,
    NON_FINITE: 0.0,
    ZERO: 0.05,
    RANDOM: 1e-4,
    ONE_STEP: MARGIN,
    UNBOUNDED: 0.1,
    FLAT: 0.95,
    CLIMBING: 0.2,
    PLAIN_CHANGED: 0.0,
}
"""Threshold above which each flag is raised. Most are shares of images; that of RANDOM is the largest change of a logit
relative to the largest logit, that of FLAT the accuracy at double the bound relative to that at half of it, and those
of NON_FINITE and PLAIN_CHANGED compare with 0 or 1."""

PROBED = 64
"""Number of images, counted from the first, that are probed for flags: those of them that are right when clean are
examined one by one and attacked for the flags alone."""

BITES = 0.1
"""Share of the probed images that half the bound must break before double the bound is expected to break more."""

FEWEST = 10
"""Number of images below which a share is not meaningful."""


def unlike(first: Tensor, again: Tensor) -> float:
    """The largest change of a logit between two forwards of the same images, relative to the largest logit."""
    return float((first - again).nan_to_num().abs().max() / first.nan_to_num().abs().max().clamp(min=1e-12))


def probe(
    source: Source, pixels: Tensor, labels: Tensor, threat: Threat, seeds: Sequence[int], *, steps: int
) -> dict[str, float]:
    """Return counts over images that are right when clean, to be added up over batches, and, as `"random"`, the largest
    change of a logit.

    Args:
        source: The attacked model, with its own gradient.
        pixels, labels: Images `[B, C, H, W]` in [0, 1], and their classes `[B]`.
        threat: Threat whose bound the attacks halve, double and drop.
        seeds: One seed for each image.
        steps: Number of steps of an attack, the last of which has five times as many; with 0, counts that need an
            attack are left out.
    """
    forward = source.net
    with torch.no_grad():
        first, again = forward(pixels), forward(pixels)
    _, _, gradient = slope(forward, pixels, labels, "margin", None, 1)
    sums = {"looked": float(len(pixels)), "random": unlike(first, again)}
    sums["zero"] = float((gradient.flatten(1) == 0).all(1).sum())
    if not steps:
        return sums

    def right(within: Threat, start: Tensor | None = None) -> Tensor:
        if within.norm in SPARSE:
            ascent = SPARSE[within.norm].ascent
            attacked = ascent(forward, pixels, labels, within, rounds=steps, average=1, fooled=True)
        else:
            attacked, _ = climb(forward, pixels, labels, within, seeds, steps=steps, start=start)
        with torch.no_grad():
            return forward(attacked).argmax(1) == labels

    unbounded, half, double = _bounds(threat, pixels)
    sums |= {"probed": float(len(pixels)), "half": float(right(half).sum()), "double": float(right(double).sum())}
    # This attack starts from the image itself: unbounded noise would break any image without a gradient.
    sums["unbounded"] = float(right(unbounded, pixels).sum())
    if threat.norm not in SPARSE:
        _, trace = climb(forward, pixels, labels, threat, seeds, steps=5 * steps, fooled=True)
        rose, late = trace[-1] - trace[0], trace[-1] - trace[-1 - steps]  # NaN where the image was broken
        unfinished = late > THRESHOLDS[CLIMBING] * rose.clamp(min=1e-3)
        sums |= {"surviving": float(rose.isfinite().sum()), "climbing": float(unfinished.sum())}
    return sums


def joined_probes(probes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the results of :func:`probe` on several batches as one: the sums of the counts, and the largest change."""
    keys = sorted({key for each in probes for key in each})
    values = {key: [each.get(key, 0.0) for each in probes] for key in keys}
    return {key: max(of_key) if key == "random" else sum(of_key) for key, of_key in values.items()}


def _bounds(threat: Threat, pixels: Tensor) -> tuple[Threat, Threat, Threat]:
    """Return the threat with no bound at all, with half of its bound, and with double its bound."""
    size = pixels[0].numel()
    most = {
        "Linf": 1.0,
        "L2": math.sqrt(size),
        "L1": float(size),
        "L0": float(pixels[0, 0].numel()),
        "patch": float(max(pixels.shape[2:])),
    }[threat.norm]
    half = max(1.0, threat.eps // 2) if threat.norm in SPARSE else threat.eps / 2
    return replace(threat, eps=most), replace(threat, eps=half), replace(threat, eps=min(2 * threat.eps, most))


def evidence_of(
    outcomes: Mapping[str, tuple[str, Sequence[bool | None]]],
    clean: Sequence[bool],
    probes: Mapping[str, float],
    *,
    non_finite: bool,
    classes: int,
) -> dict[str, float]:
    """Return a number for every flag that could be checked, to compare with `THRESHOLDS`.

    Args:
        outcomes: For each attack, by name, the source whose gradient it followed, and whether each image survived; None
            for an image that was not attacked.
        clean: Whether the model was right on each image without an attack.
        probes: Results of :func:`probe`, added up over all batches.
        non_finite: Whether any gradient was not finite.
        classes: Number of classes of the model.
    """
    count = len(clean)
    own = [survived for source, survived in outcomes.values() if source == "own"]
    left = [c and all(s[i] is not False for s in own) for i, c in enumerate(clean)]
    evidence = {NON_FINITE: float(non_finite)}
    right = {name: sum(s is True for s in survived) for name, (_, survived) in outcomes.items()}
    elsewhere = [right[name] for name in right if name.startswith("pgd_")]
    if "pgd" in right and elsewhere:
        evidence[MASKED] = (right["pgd"] - min(elsewhere)) / count
    searched = [survived for source, survived in outcomes.values() if source == "scores"]
    if own and searched:
        evidence[SCORES] = sum(a and any(s[i] is False for s in searched) for i, a in enumerate(left)) / count
    if "fgsm" in right and "pgd" in right:
        evidence[ONE_STEP] = (right["pgd"] - right["fgsm"]) / count
    looked, probed = probes.get("looked", 0.0), probes.get("probed", 0.0)
    if looked:
        evidence |= {RANDOM: probes["random"], ZERO: probes["zero"] / looked}
    if probed >= FEWEST:
        evidence[UNBOUNDED] = probes["unbounded"] / probed - 1 / classes
    # Otherwise too few images are left that could break, or the bound is too small to have an effect.
    if FEWEST <= probes.get("half", 0.0) <= (1 - BITES) * probed:
        evidence[FLAT] = probes["double"] / probes["half"]
    if probes.get("surviving", 0.0) >= FEWEST:
        evidence[CLIMBING] = probes["climbing"] / probes["surviving"]
    return evidence


def flags_of(evidence: Mapping[str, float], samples: int) -> tuple[str, ...]:
    """Return the flags that are raised; those that count images one by one are raised by at least three images."""
    least = dict.fromkeys((MASKED, SCORES, ONE_STEP), 2.5 / samples)
    return tuple(flag for flag, value in evidence.items() if value > max(THRESHOLDS[flag], least.get(flag, 0.0)))
