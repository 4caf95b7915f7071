"""Predictions as the crop of a larger image moves: one-pixel consistency, the worst case, and crops chosen by content.

A camera that turns a little moves its frame over the scene. Here the scene is an image larger than the model's input,
and a frame moves over it. Plain inference classifies the crop in the middle of the frame. Robust inference by crop
selection (Shifman and Weiss, "Lost in Translation", arXiv 2404.07153) classifies the crop of the frame that a score of
the crop's content prefers. Two frames one pixel apart share all crops but one row or column of them. So the choice is
the same unless the preferred crop is in the part that they do not share, and where it is, so is the prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from timm_nrpm.checks import check_choice, check_integer
from timm_nrpm.data.images import check_batch, check_labels, count_of
from timm_nrpm.evaluation.crops import RULES, Scene
from timm_nrpm.evaluation.shift_report import Frames, ShiftReport
from timm_nrpm.evaluation.trials import digits_of
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.modes import evaluating
from timm_nrpm.nn.wrappers import subject_of

NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""The moves of a frame by one pixel: down and across."""


@torch.no_grad()
def evaluate_shifts(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    budget: int = 1,
    search: int | None = None,
    rule: str = "response",
    size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: bool = False,
) -> ShiftReport:
    """Measure predictions as the crop moves inside larger images, with the crop in the middle of the frame and with one
    that is selected by its content (arXiv 2404.07153).

    The frame is searched for the crop with the highest score. A wider search makes the choice more consistent: if the
    preferred crop is equally likely to be anywhere, a move by one pixel changes it with a probability of 1 in
    `search + 1` at most. It also lets the crop be farther from the middle, which may cost accuracy. Of crops with equal
    scores, as in a flat image, the first is taken, and that choice moves with the frame. The modes, gradient flags and
    statistics of the model are left unchanged.

    Args:
        model: Classifier of normalised images, or a wrapper of one.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, larger than the model's input on either
            side by twice `budget + search` at least.
        budget: Largest move of the frame in pixels, down and across, >= 1; the worst case is over all its
            (2 * budget + 1)^2 places.
        search: Largest distance, in pixels, of a selected crop from the middle of its frame, >= 1; by default as far as
            the first images allow.
        rule: `"response"` scores a crop by how far its middle stands out in brightness, without a pass of the model;
            `"confidence"` by the model's largest probability of a class, with a pass for each of the
            (2 * (budget + search) + 1)^2 crops of an image.
        size: Side of the model's square input; by default that in timm's config of the model.
        mean, std: The model's normalisation, one number for each channel; by default timm's for this model, and none
            for a model that is not timm's.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: The images are too small, the size of the model's input is not known, an argument is outside its
            range, labels are not classes of the model, or the loader is empty.

    Example:
        >>> larger = [(torch.nn.functional.pad(pixels, (3, 3, 3, 3)), labels) for pixels, labels in loader]
        >>> print(evaluate_shifts(model, larger))
        32 images, crops of 8 x 8, moves of up to 1 pixel
                         accuracy, %              one-pixel consistency, %   worst case, %
        middle crop      ...
        crop by content  ...
        difference       ...
    """
    budget = check_integer("budget", budget, least=1)
    search = None if search is None else check_integer("search", search, least=1)
    score = RULES[check_choice("rule", rule, RULES)]
    subject = subject_of(model, mean, std)
    crop = _input_of(subject.model, size)
    net = subject.on_pixels()
    middle: list[tuple[bool, int, bool]] = []
    selected: list[tuple[bool, int, bool]] = []
    with evaluating(net), progress_bar(progress) as bar:
        task = bar.add_task("Moving", total=count_of(loader))
        for batch in loader:
            pixels, labels = check_batch(batch)
            labels = check_labels(labels, count=len(pixels))
            search = _room(pixels, crop, budget, search)
            scene = Scene(net, pixels, crop, budget + search)
            classes = net(scene.pixels[:1, :, : crop[0], : crop[1]]).shape[1]
            check_labels(labels, classes)
            middle += _judged(scene, _middles(scene, budget), labels)
            selected += _judged(scene, _selected(scene, score(scene), budget), labels)
            bar.advance(task)
    if not middle or search is None:
        raise ValueError("The loader gave no images: there is nothing to evaluate.")
    return ShiftReport(_frames(middle), _frames(selected), crop, budget, search, rule)


def _input_of(model: nn.Module, size: int | None) -> tuple[int, int]:
    """Height and width of the model's input."""
    if size is not None:
        side = check_integer("size", size, least=1)
        return side, side
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(
            f"This {type(model).__name__} has no config of timm, so the size of its input is unknown: give size=, the "
            "side in pixels."
        )
    _, height, width = resolve_model_data_config(model)["input_size"]
    return height, width


def _room(pixels: Tensor, crop: tuple[int, int], budget: int, search: int | None) -> int:
    """How far crops may be searched: as far as the images allow, or as given if they allow that."""
    margin = min((side - each) // 2 for side, each in zip(pixels.shape[2:], crop, strict=True))
    found = margin - budget if search is None else search
    if found < 1 or budget + found > margin:
        least = [each + 2 * (budget + max(found, 1)) for each in crop]
        raise ValueError(
            f"The images have {pixels.shape[2]} x {pixels.shape[3]} pixels and the model takes {crop[0]} x {crop[1]}: "
            f"moves by {budget} and a search by {max(found, 1)} need images of {least[0]} x {least[1]} at least. Give "
            "larger images, not yet cropped to the model's input, or a smaller budget= or search=."
        )
    return found


def _places(budget: int) -> list[tuple[int, int]]:
    """All moves of the frame, the one that leaves it in the middle first."""
    moves = product(range(-budget, budget + 1), range(-budget, budget + 1))
    return sorted(moves, key=lambda move: move != (0, 0))


def _middles(scene: Scene, budget: int) -> Mapping[tuple[int, int], Tensor]:
    """For each move of the frame, the place `[B, 3]` of the crop in its middle."""
    images = torch.arange(len(scene.pixels))
    return {
        (down, across): torch.stack(
            [images, torch.full_like(images, scene.radius + down), torch.full_like(images, scene.radius + across)], 1
        )
        for down, across in _places(budget)
    }


def _selected(scene: Scene, scores: Tensor, budget: int) -> Mapping[tuple[int, int], Tensor]:
    """For each move of the frame, the place `[B, 3]` of the crop in it that has the highest score."""
    images, wide = torch.arange(len(scene.pixels)), 2 * (scene.radius - budget) + 1
    found = {}
    for down, across in _places(budget):
        top, left = budget + down, budget + across
        best = scores[:, top : top + wide, left : left + wide].flatten(1).argmax(1)
        found[down, across] = torch.stack([images, top + best // wide, left + best % wide], 1)
    return found


def _judged(scene: Scene, places: Mapping[tuple[int, int], Tensor], labels: Tensor) -> list[tuple[bool, int, bool]]:
    """For each image whether the prediction is right in the middle, how many moves by one pixel leave it, and whether
    it is right at every place."""
    scene.look(torch.cat(list(places.values())))
    found = {move: scene.predictions[tuple(place.T)] for move, place in places.items()}
    middle = found[0, 0]
    right = torch.stack([each == labels.cpu() for each in found.values()])
    stays = torch.stack([found[move] == middle for move in NEIGHBOURS]).sum(0)
    return list(zip(right[0].tolist(), stays.tolist(), right.all(0).tolist(), strict=True))


def _frames(judged: Iterable[tuple[bool, int, bool]]) -> Frames:
    correct, stays, survived = zip(*judged, strict=True)
    return Frames(digits_of(correct), "".join(map(str, stays)), digits_of(survived))
