"""Weights between those of two models of one architecture."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from timm_nrpm.checks import check_number


def between(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The state of a model part of the way from one state to another (Wortsman et al., arXiv 2109.01903).

    Args:
        ours: Weights and statistics to start from, by name.
        theirs: Those of another model of the same architecture, which may hold further names.
        share: Share of the way, from 0 for ours to 1 for theirs; either end is exact.

    Returns:
        Every tensor of `ours`; what is no floating-point number, such as a count of batches, is ours.

    Raises:
        ValueError: The share is outside its range, or another tensor has that name in `theirs`.

    Example:
        >>> between({"weight": torch.zeros(2)}, {"weight": torch.ones(2)}, 0.75)
        {'weight': tensor([0.7500, 0.7500])}
    """
    share = check_number("share", share, least=0, most=1)
    for name, value in ours.items():
        if name not in theirs or theirs[name].shape != value.shape:
            raise ValueError(f"{name} {list(value.shape)} is not in both models: give two of one architecture.")
    return {
        name: value.lerp(theirs[name].to(value), share) if value.is_floating_point() else value.clone()
        for name, value in ours.items()
    }
