"""Pictures of what an attack does inside a model: embeddings, how far they move, and the loss around an image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_nrpm.checks import check_integer
from timm_nrpm.data.images import check_pair
from timm_nrpm.evaluation.diagnostics import EmbeddingDifferences, embeddings
from timm_nrpm.evaluation.landscape import LossLandscape
from timm_nrpm.figures.canvas import SIGNED, STYLES, as_written, figure, target
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import subject_of

HEADINGS = {
    "own": "sign of the own gradient",
    "bpda": "sign of the linear gradient",
    "plain": "sign of the plain model's gradient",
    "random": "random signs",
}

MOST_LAYERS = 8


def draw_differences(
    differences: Mapping[str, EmbeddingDifferences],
    path: str | Path,
    norm: str = "L2",
    *,
    side: str | None = "output",
    log: bool = True,
) -> Path:
    """Draw how far an attack moves the embeddings of several models: the mean over the images, and the middle half.

    Args:
        differences: Differences by the name of the model; embeddings that not all of them have are left out.
        path: The file to write, which ends in .png or .svg.
        norm: Norm of a difference, as :meth:`timm_nrpm.evaluation.diagnostics.Difference.values` takes it.
        side: Which embeddings of layers: `"output"` as in the paper, `"input"`, or None for both.
        log: Whether the scale is logarithmic, where a difference of 0 does not show.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending, `norm` or `side` is not known, or the models have no embedding in common.
        ImportError: Matplotlib is not installed.

    Example:
        >>> from timm_nrpm.evaluation.diagnostics import embedding_differences
        >>> models = {"plain": plain, "lambda 0.5": model}
        >>> differences = {name: embedding_differences(each, pixels, attacked) for name, each in models.items()}
        >>> draw_differences(differences, "differences.svg")
        PosixPath('differences.svg')
    """
    if not differences:
        raise ValueError('differences is empty: give {"plain": embedding_differences(...), ...}.')
    if side not in ("input", "output", None):
        raise ValueError(f'side={side!r} is not known: choose "input", "output", or None for both.')
    file = target(path)
    wanted = ("", "input", "output") if side is None else ("", side)
    first, *others = ([row.name for row in each.rows if row.side in wanted] for each in differences.values())
    names = [name for name in first if all(name in rows for rows in others)]
    if len(names) < 2:  # all models have the pixels
        raise ValueError(f"{', '.join(differences)} have no embedding in common: give the same layers= for all.")
    drawing = figure(max(6.0, 2.0 + 0.28 * len(names)), 7.5)
    panels = drawing.subplots(2, 1, sharex=True)
    for panel, relative in zip(panels, (True, False), strict=True):
        for i, (model, each) in enumerate(differences.items()):
            colour, marker, line = STYLES[i % len(STYLES)]
            values = torch.tensor([each.of(name).values(norm, relative) for name in names], dtype=torch.float64)
            values = values.where(values.isfinite(), math.nan) * (100 if relative else 1)
            low, high = values.nanquantile(torch.tensor([0.25, 0.75], dtype=torch.float64), 1).tolist()
            panel.fill_between(range(len(names)), low, high, color=colour, alpha=0.15, linewidth=0)
            look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4}
            panel.plot(range(len(names)), values.nanmean(1).tolist(), label=as_written(model), **look)
        panel.set_ylabel(f"{norm} of the difference\n" + ("% of the clean embedding" if relative else "absolute"))
        panel.grid(alpha=0.3)
        if log:
            panel.set_yscale("log")
            for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
                axis("{x:g}")
            panel.tick_params(axis="y", which="both", labelsize=8)
    panels[1].set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    samples = sorted({each.samples for each in differences.values()})
    panels[0].set_title(f"{' and '.join(map(str, samples))} images, mean and quartiles", fontsize=10)
    panels[0].legend(fontsize=9)
    drawing.savefig(file, dpi=120, bbox_inches="tight")
    return file


def draw_embeddings(
    models: Mapping[str, nn.Module],
    pixels: Tensor,
    attacked: Tensor | Mapping[str, Tensor],
    path: str | Path,
    layers: str | Sequence[str] | None = None,
    *,
    channels: int = 4,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Path:
    """Draw outputs of layers for one image, clean, attacked and their difference, for several models beside each other
    (NRPM, arXiv 2410.04577, Figures 5 and 11), and what the models predict.

    Each row has one scale. Of each layer the channels with the largest clean embeddings are shown, summed over the
    models, so that the choice does not depend on the attack.

    Args:
        models: Models by name; they take normalised images and have layers in common.
        pixels: One image `[1, C, H, W]` in [0, 1].
        attacked: The attacked image, of the same shape; or one for each model, by the same names.
        path: The file to write, which ends in .png or .svg.
        layers: Layers, as :func:`timm_nrpm.evaluation.diagnostics.embedding_differences` takes them. The default is
            those that all models have, or 8 of them, spread evenly from the first to the last.
        channels: Number of channels to show of each layer.
        mean, std: Normalisation of the models, as in :func:`timm_nrpm.evaluate`.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending, the images do not fit, or the models do not share the layers.
        ImportError: Matplotlib is not installed.

    Example:
        >>> draw_embeddings({"plain": plain, "lambda 0.5": model}, pixels[:1], attacked[:1], "embeddings.png")
        PosixPath('embeddings.png')
    """
    if not models:
        raise ValueError('models is empty: give {"plain": plain, "lambda 0.5": model}.')
    channels = check_integer("channels", channels, least=1)
    by_model = attacked if isinstance(attacked, Mapping) else dict.fromkeys(models, attacked)
    if by_model.keys() != models.keys():
        raise ValueError(f"attacked has {', '.join(by_model)}, and models {', '.join(models)}: give the same names.")
    for each in by_model.values():
        check_pair(pixels, each)
    if len(pixels) != 1:
        raise ValueError(f"pixels are {len(pixels)} images: give one, pixels[:1] and attacked[:1].")
    file = target(path)
    clean: dict[str, tuple[dict[str, Tensor], str]] = {}
    moved: dict[str, tuple[dict[str, Tensor], str]] = {}
    for name, model in models.items():
        net = subject_of(model, mean, std).on_pixels()
        clean[name], moved[name] = _look_inside(net, pixels, layers), _look_inside(net, by_model[name], layers)
    rows = _shared({name: maps for name, (maps, _) in clean.items()}, layers is None)
    drawing = figure(4.1 * len(models) + 2.2, 1.4 * len(rows) + 1.0)
    # A narrow empty column follows each model; the last one holds the colour scales.
    ratios = [1.0, 1.0, 1.0, 0.12] * len(models)
    panels = drawing.subplots(len(rows), len(ratios), squeeze=False, width_ratios=ratios)
    for layer, line in zip(rows, panels, strict=True):
        shown = _largest([clean[name][0][layer] for name in models], channels)
        cells: list[Tensor | None] = []
        for name in models:
            a, b = (_mosaic(each[name][0][layer][shown]) for each in (clean, moved))
            cells += [a, b, b - a, None]
        limit = max(float(cell.nan_to_num(0.0, 0.0, 0.0).abs().max()) for cell in cells if cell is not None) or 1.0
        for panel, cell in zip(line, cells, strict=True):
            _draw_cell(panel, cell, limit)
        picture = next(panel.images[0] for panel in line if panel.images)
        drawing.colorbar(picture, ax=line[-1], fraction=1.0, shrink=0.9, format="%.2g")
        count = len(clean[next(iter(models))][0][layer])
        label = f"{layer}\n{len(shown)} of {count}" if count > len(shown) else layer
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for i, name in enumerate(models):
        for j, title in enumerate((f"clean\n{clean[name][1]}", f"attacked\n{moved[name][1]}", "difference\n")):
            panels[0][4 * i + j].set_title(title, fontsize=9)
        above = {"xycoords": "axes fraction", "xytext": (0, 34), "textcoords": "offset points", "ha": "center"}
        panels[0][4 * i + 1].annotate(as_written(name), (0.5, 1), fontsize=11, fontweight="bold", **above)
    drawing.savefig(file, dpi=120, bbox_inches="tight")
    return file


def _draw_cell(panel: Any, cell: Tensor | None, limit: float) -> None:
    """Draw a map `[H, W]` in colours from `-limit` to `limit`; None leaves the panel empty."""
    panel.set(xticks=[], yticks=[])
    if cell is None:
        panel.axis("off")
        return
    height, length = cell.shape
    aspect = "equal" if height <= length <= 3 * height else "auto"
    panel.imshow(cell.numpy(), cmap=SIGNED, vmin=-limit, vmax=limit, aspect=aspect, interpolation="nearest")
    panel.set_facecolor("#DDDDDD")
    if aspect == "auto":
        panel.set_box_aspect(0.3)


def _look_inside(net: PixelModel, pixels: Tensor, layers: str | Sequence[str] | None) -> tuple[dict[str, Tensor], str]:
    """The image and the output of every layer as maps `[C, H, W]`, and the model's prediction in words."""
    seen, logits = embeddings(net, pixels, layers)
    maps = {"pixels": pixels[0].cpu().float()}
    for (layer, side), calls in seen.items():
        if side == "output":
            last = isinstance(net.model.get_submodule(layer), nn.Linear)
            maps[layer] = torch.cat([_maps(values.cpu().float(), last) for values in calls])
    share, winner = logits.float().softmax(1)[0].max(0)
    return maps, f"{int(winner)} ({100 * float(share):.0f} %)"


def _maps(values: Tensor, last: bool) -> Tensor:
    """An embedding of one image as maps `[C, H, W]`. The channels of tokens and of the output of a linear layer, for
    which `last` is set, are the last dimension. A vector becomes one map, filled row by row."""
    values = values[0] if len(values) == 1 else values
    if values.ndim > 1:
        values = values.movedim(-1 if last or values.ndim == 2 else -3, 0)
        return values.reshape(len(values), values.shape[1] if values.ndim > 2 else 1, -1)
    width = min(len(values), 16)
    return nn.functional.pad(values, (0, -len(values) % width), value=math.nan).view(1, -1, width)


def _shared(maps: Mapping[str, Mapping[str, Tensor]], thin: bool) -> list[str]:
    """Layers that all models have, the pixels first; if `thin`, at most `MOST_LAYERS` of them, spread evenly."""
    first, *others = maps.values()
    rows = [layer for layer in first if all(layer in other for other in others)]
    if len(rows) < 2:
        raise ValueError(f"{', '.join(maps)} have no layer in common: name some that all of them have in layers=.")
    for layer in rows:
        shapes = {name: list(of_model[layer].shape) for name, of_model in maps.items()}
        if len(set(map(tuple, shapes.values()))) > 1:
            listing = " and ".join(f"{shape} in {name}" for name, shape in shapes.items())
            raise ValueError(f"The output of {layer} is {listing}: name layers of one shape in layers=.")
    if thin and len(rows) > MOST_LAYERS + 1:
        rows = [rows[0], *(rows[1 + round(i * (len(rows) - 2) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS))]
    return rows


def _largest(maps: Sequence[Tensor], count: int) -> list[int]:
    """Indices of the channels with the largest sum of squares in `maps`, each `[C, H, W]`, in ascending order."""
    sizes = torch.stack([each.nan_to_num(0.0).square().flatten(1).sum(1) for each in maps]).sum(0)
    return sorted(sizes.argsort(descending=True)[:count].tolist())


def _mosaic(maps: Tensor) -> Tensor:
    """Maps `[N, H, W]` tiled in a grid, with thin lines of NaN between them."""
    across = 1 if maps.shape[1] == 1 else math.ceil(math.sqrt(len(maps)))
    times = math.ceil(32 / max(maps.shape[1:]))
    maps = maps.repeat_interleave(times, 1).repeat_interleave(times, 2)
    count, height, width = maps.shape
    gap = max(1, height // 16)
    down = math.ceil(count / across)
    board = maps.new_full((down * (height + gap) - gap, across * (width + gap) - gap), math.nan)
    for i, each in enumerate(maps):
        top, left = (i // across) * (height + gap), (i % across) * (width + gap)
        board[top : top + height, left : left + width] = each
    return board


def draw_landscape(landscapes: Mapping[str, LossLandscape], path: str | Path) -> Path:
    """Draw loss landscapes side by side on one scale of colours; a star marks the clean images, and a white line the
    points where half of them are wrong.

    Args:
        landscapes: Landscapes by the name that is written above each.
        path: The file to write, which ends in .png or .svg.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending, or `landscapes` is empty.
        ImportError: Matplotlib is not installed.

    Example:
        >>> from timm_nrpm.evaluation.landscape import loss_landscape
        >>> landscape = loss_landscape(model, pixels[:4], labels[:4], eps=8 / 255)
        >>> draw_landscape({"lambda 0.5": landscape}, "landscapes.png")
        PosixPath('landscapes.png')
    """
    if not landscapes:
        raise ValueError('landscapes is empty: give {"plain": loss_landscape(...), ...}.')
    file, drawing = target(path), figure(4.2 * len(landscapes) + 1.0, 5.0)
    panels = drawing.subplots(1, len(landscapes), squeeze=False)[0]
    losses = {name: torch.tensor(each.losses, dtype=torch.float64) for name, each in landscapes.items()}
    known = torch.cat([grid[grid.isfinite()] for grid in losses.values()])
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    high = high if high > low else low + 1e-9
    levels = torch.linspace(low, high, 11).tolist()
    for panel, (name, each) in zip(panels, landscapes.items(), strict=True):
        edge = each.eps * (1 + 1 / (len(each.losses) - 1))  # a point is in the middle of its square
        grid = losses[name].where(losses[name].isfinite(), math.nan).T.numpy()  # the first direction goes to the right
        box = (-edge, edge, -edge, edge)
        panel.imshow(grid, origin="lower", extent=box, cmap="viridis", vmin=low, vmax=high)
        panel.contour(each.steps, each.steps, grid, levels=levels, colors="black", linewidths=0.5, alpha=0.6)
        right = torch.tensor(each.accuracies).T.numpy()
        if right.min() < 0.5 < right.max():
            panel.contour(each.steps, each.steps, right, levels=[0.5], colors="white", linewidths=2)
        panel.scatter(0, 0, marker="*", s=140, color="white", edgecolor="black", zorder=3)
        x, y = (HEADINGS[kind] for kind in each.directions)
        panel.set(xlabel=f"{x}, pixel units", ylabel=f"{y}, pixel units")
        images = f"{each.samples} image{'s' if each.samples > 1 else ''}"
        panel.set_title(
            f"{as_written(name)}\n{images}, clean {each.clean:.3g} nats, cosine {each.cosine:.2f}", fontsize=10
        )
    drawing.colorbar(panels[0].images[0], ax=list(panels), label="mean cross-entropy, nats", shrink=0.85)
    drawing.suptitle("star: clean; white line: half of the images wrong", fontsize=9)
    drawing.savefig(file, dpi=120, bbox_inches="tight")
    return file
