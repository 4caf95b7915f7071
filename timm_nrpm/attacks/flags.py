"""Signs that an accuracy under attack flatters: each a number, a threshold and a paragraph in docs/flags.md.

After Carlini et al., "On evaluating adversarial robustness" (arXiv 1902.06705), and Athalye et al. (arXiv 1802.00420).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from timm_nrpm.attacks.ascent import climb, greedy_pixels, slope
from timm_nrpm.attacks.sources import Source
from timm_nrpm.attacks.threats import Threat

MASKED = "gradient_masking"
"""The same PGD breaks more images along the gradient of the plain model or the linear maps than along the own one."""

SCORES = "scores_beat_gradient"
"""A random search that sees the scores alone breaks images that the gradient did not."""

NON_FINITE = "non_finite_gradient"
"""A gradient that an attack followed was not finite, so the attack stood still on those pixels."""

ZERO = "zero_gradient"
"""The gradient of the margin is zero in every pixel of some images."""

RANDOM = "random_forward"
"""The same images give other logits each time."""

ONE_STEP = "one_step_beats_many"
"""One step breaks more images than twenty."""

UNBOUNDED = "right_when_unbounded"
"""An attacker who may change everything still fails."""

FLAT = "more_eps_no_effect"
"""Half the bound breaks some images, and double hardly any more."""

CLIMBING = "attack_not_finished"
"""The loss of the images that are still right was rising when the attack ended."""

PLAIN_CHANGED = "plain_model_changed"
"""The weights were trained since the model was reprogrammed, so the plain model beside it is not the one it was made
from."""

MARGIN = 0.02
"""Share of all images that an attack must break beyond another's to beat it."""

MEANINGS = {
    MASKED: "The same PGD breaks more images along the gradient of the plain model or of the linear maps than along "
    "the model's own, so the own gradient misleads attackers without keeping them out. Three images are the least.",
    SCORES: "A random search that sees the scores alone breaks images that no attack along the own gradient broke. "
    "Three images are the least.",
    NON_FINITE: "A gradient that an attack followed was not finite: there the attack stood still.",
    ZERO: "On some images the gradient is zero in every pixel, so that attacks along it stand still.",
    RANDOM: "The same images give other logits each time: an image that survives once may fall the next time.",
    ONE_STEP: "One step breaks more images than twenty do, so the many steps went astray. Three images are the least.",
    UNBOUNDED: "An attacker who may change every pixel at will still leaves more images right than guessing would: the "
    "attack does not work on this model.",
    FLAT: "Double the bound breaks hardly more images than half of it: attacks do not use the room that they have.",
    CLIMBING: "On images that survived, the loss was still rising when the attack ended: more steps would break more.",
    PLAIN_CHANGED: "The weights were trained since the model was reprogrammed. What stands beside it is the same "
    "weights at lambda 1, not the model that it was made from, which is no more to be had: give that one as base=.",
}
"""What each flag means, in a sentence."""

NUMBERS = {
    MASKED: "images broken along another gradient beyond the own",
    SCORES: "images that only the search breaks",
    NON_FINITE: "1 if there was one",
    ZERO: "images with a zero gradient",
    RANDOM: "change of a logit, relative to the largest",
    ONE_STEP: "images that one step breaks beyond many steps",
    UNBOUNDED: "images that survive, beyond chance",
    FLAT: "accuracy at double the bound, relative to half",
    CLIMBING: "surviving images whose loss was rising",
    PLAIN_CHANGED: "1 if they were",
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
"""Above which each is raised: shares of images; of RANDOM, the largest change of a logit, relative to the largest; of
FLAT, the accuracy at double the bound relative to that at half."""

PROBED = 64
"""Of the first so many images, those that are right are looked at one by one, and attacked for flags alone."""

BITES = 0.1
"""Share of the images that half the bound must break, for double to be expected to break more."""

FEWEST = 10
"""Images below which a share says nothing."""


def unlike(first: Tensor, again: Tensor) -> float:
    """The largest change of a logit between two forwards of the same images, relative to the largest logit."""
    return float((first - again).nan_to_num().abs().max() / first.nan_to_num().abs().max().clamp(min=1e-12))


def probe(
    source: Source, pixels: Tensor, labels: Tensor, threat: Threat, seeds: Sequence[int], *, steps: int
) -> dict[str, float]:
    """Counts and sums over `[B]` images that are right when clean, to be added up over batches.

    Args:
        steps: Of an ascent; with 0, what needs one is left out.
    """
    forward = source.net
    with torch.no_grad():
        first, again = forward(pixels), forward(pixels)
    _, _, gradient = slope(forward, pixels, labels, "margin", None, 1)
    found = {"looked": float(len(pixels)), "random": unlike(first, again)}
    found["zero"] = float((gradient.flatten(1) == 0).all(1).sum())
    if not steps:
        return found

    def right(within: Threat, start: Tensor | None = None) -> Tensor:
        if within.norm == "L0":
            attacked = greedy_pixels(forward, pixels, labels, within, rounds=steps)
        else:
            attacked, _ = climb(forward, pixels, labels, within, seeds, steps=steps, start=start)
        with torch.no_grad():
            return forward(attacked).argmax(1) == labels

    unbounded, half, double = _bounds(threat, pixels)
    found |= {"probed": float(len(pixels)), "half": float(right(half).sum()), "double": float(right(double).sum())}
    # From the image itself: unbounded noise breaks anything, gradient or not.
    found["unbounded"] = float(right(unbounded, pixels).sum())
    if threat.norm != "L0":
        _, trace = climb(forward, pixels, labels, threat, seeds, steps=5 * steps, fooled=True)
        rose, late = trace[-1] - trace[0], trace[-1] - trace[-1 - steps]  # NaN where the image was broken
        unfinished = late > THRESHOLDS[CLIMBING] * rose.clamp(min=1e-3)
        found |= {"surviving": float(rose.isfinite().sum()), "climbing": float(unfinished.sum())}
    return found


def _bounds(threat: Threat, pixels: Tensor) -> tuple[Threat, Threat, Threat]:
    """No bound at all, half of the threat's, and double."""
    size = pixels[0].numel()
    most = {"Linf": 1.0, "L2": math.sqrt(size), "L1": float(size), "L0": float(pixels[0, 0].numel())}[threat.norm]
    half = max(1.0, threat.eps // 2) if threat.norm == "L0" else threat.eps / 2
    return replace(threat, eps=most), replace(threat, eps=half), replace(threat, eps=min(2 * threat.eps, most))


def evidence_of(
    outcomes: Mapping[str, tuple[str, Sequence[bool | None]]],
    clean: Sequence[bool],
    probes: Mapping[str, float],
    *,
    non_finite: bool,
    classes: int,
) -> dict[str, float]:
    """A number for every flag that could be checked, to compare with `THRESHOLDS`.

    Args:
        outcomes: For each attack whose gradient it followed, and whether each image survived, None if not attacked.
        clean: Whether each image was right.
        probes: The sums of `probe`.
        non_finite: Whether any gradient was.
        classes: Of the model.
    """
    count = len(clean)
    own = [survived for source, survived in outcomes.values() if source == "own"]
    left = [c and all(s[i] is not False for s in own) for i, c in enumerate(clean)]
    found = {NON_FINITE: float(non_finite)}
    right = {name: sum(s is True for s in survived) for name, (_, survived) in outcomes.items()}
    elsewhere = [right[name] for name in ("pgd_plain", "pgd_base", "pgd_bpda") if name in right]
    if "pgd" in right and elsewhere:
        found[MASKED] = (right["pgd"] - min(elsewhere)) / count
    searched = [survived for source, survived in outcomes.values() if source == "scores"]
    if own and searched:
        found[SCORES] = sum(a and any(s[i] is False for s in searched) for i, a in enumerate(left)) / count
    if "fgsm" in right and "pgd" in right:
        found[ONE_STEP] = (right["pgd"] - right["fgsm"]) / count
    looked, probed = probes.get("looked", 0.0), probes.get("probed", 0.0)
    if looked:
        found |= {RANDOM: probes["random"], ZERO: probes["zero"] / looked}
    if probed >= FEWEST:
        found[UNBOUNDED] = probes["unbounded"] / probed - 1 / classes
    # Else there is nothing that could fall, or the bound is too small for anything to happen.
    if FEWEST <= probes.get("half", 0.0) <= (1 - BITES) * probed:
        found[FLAT] = probes["double"] / probes["half"]
    if probes.get("surviving", 0.0) >= FEWEST:
        found[CLIMBING] = probes["climbing"] / probes["surviving"]
    return found


def flags_of(evidence: Mapping[str, float], samples: int) -> tuple[str, ...]:
    """Which of them are raised; where images are counted one by one, by three of them at least."""
    least = dict.fromkeys((MASKED, SCORES, ONE_STEP), 2.5 / samples)
    return tuple(flag for flag, value in evidence.items() if value > max(THRESHOLDS[flag], least.get(flag, 0.0)))
