"""A picture of what the layers of a network are worth, and of the choices among them."""

from __future__ import annotations

from pathlib import Path

from timm_nrpm.evaluation.layer_worth import LayerRecommendation
from timm_nrpm.evaluation.trials import Effect
from timm_nrpm.figures import canvas


def draw_layers(found: LayerRecommendation, path: str | Path) -> Path:
    """Draw what each layer gains when it is reprogrammed alone, how critical it is, and what share of the products it
    has; and the accuracy of the choices over their share of the products.

    Args:
        found: The result of :func:`timm_nrpm.recommend.recommend_layers`.
        path: The file to write, which ends in .png or .svg.

    Returns:
        `path`.

    Raises:
        ValueError: `path` has another ending.
        ImportError: Matplotlib is not installed.
    """
    target, rows = canvas.target(path), len(found.worth)
    figure = canvas.figure(11, min(2.2 + 0.22 * rows, 40))
    gains, critical, shares, front = figure.subplots(1, 4, width_ratios=(3, 2, 2, 4))
    plain = found.choices[0].kept
    places = range(rows)
    points = [Effect.of(each.kept.threat, plain.threat).points for each in found.worth]
    for is_bound, label in ((False, "measured"), (True, "at most")):
        chosen = [place for place in places if found.worth[place].is_bound == is_bound]
        colour = "#BBBBBB" if is_bound else canvas.STYLES[0][0]
        gains.barh(chosen, [points[place] for place in chosen], color=colour, height=0.6, label=label)
    gains.axvline(0, color="black", linewidth=0.8)
    gains.set_xlabel("points gained alone")
    gains.legend(fontsize=7, frameon=False)
    critical.barh(places, [each.criticality for each in found.worth], color=canvas.STYLES[1][0], height=0.6)
    critical.set_xlabel("criticality, nats")
    shares.barh(places, [100 * each.share for each in found.worth], color=canvas.STYLES[2][0], height=0.6)
    shares.set_xlabel("products, %")
    for panel in (gains, critical, shares):
        panel.set_yticks(places, [each.name for each in found.worth] if panel is gains else [""] * rows, fontsize=7)
        panel.invert_yaxis()  # puts the first layer at the top
        panel.grid(axis="x", alpha=0.3)
    at = [100 * choice.share for choice in found.choices]
    front.plot(at, [100 * choice.kept.accuracy for choice in found.choices], "o", color="#999999", label="choices")
    line = [(100 * choice.share, 100 * choice.kept.accuracy) for choice in found.front]
    front.step(*zip(*line, strict=True), where="post", color=canvas.STYLES[3][0], marker="D", label="front")
    front.set(xlabel="products reprogrammed, %", ylabel=f"kept under {found.threat}, %")
    front.grid(alpha=0.3)
    front.legend(fontsize=8, frameon=False)
    figure.savefig(target, dpi=120)
    return target
