"""Result of `recommend_layers`: what each layer is worth, what it costs, and which ones to choose."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from timm_nrpm.evaluation.trials import Effect, Kept


@dataclass(frozen=True)
class LayerWorth:
    """A layer of a network.

    Attributes:
        name: Name of the layer.
        products: Number of products of a weight and an input that it adds up for one image.
        share: Share of the network's products that this is, from 0 to 1.
        criticality: Rise of the loss on attacked images, in nats, when its weight moves by a tenth of its norm.
        connectivity: Dependence on the layer before it within a class, in nats; None for the first layer, and where a
            class has too few images.
        kept: Images that the network with this layer alone reprogrammed is right on, of those that are chosen on.
        is_bound: Whether that is an upper bound by quick attacks, which was below what the plain network keeps.
    """

    name: str
    products: int
    share: float
    criticality: float
    connectivity: float | None
    kept: Kept
    is_bound: bool


@dataclass(frozen=True)
class Choice:
    """Some layers that were reprogrammed together.

    Attributes:
        layers: Their names; none for the plain network.
        share: Share of the network's products that are theirs, from 0 to 1.
        kept: Images that the network is right on, of those that are chosen on.
    """

    layers: tuple[str, ...]
    share: float
    kept: Kept


@dataclass(frozen=True)
class LayerRecommendation:
    """What was found about the layers of a network against a threat.

    Attributes:
        threat: The threat, in words.
        setting: The estimate, in words.
        budget: Largest share of the products that may be reprogrammed.
        worth: Every layer, in the order of a forward.
        choices: The plain network, and layers that were reprogrammed together, from few to many.
        layers: The recommended layers, as `NRPMConfig(layers=)` takes them; none where a gain cannot be told from
            chance on the images that nothing was chosen on.
        plain, best: Images that the plain network, and the best choice, is right on, of those that nothing was chosen
            on.
    """

    threat: str
    setting: str
    budget: float
    worth: tuple[LayerWorth, ...]
    choices: tuple[Choice, ...]
    layers: tuple[str, ...]
    plain: Kept
    best: Kept

    @property
    def effect(self) -> Effect:
        """What the best choice has over the plain network, on the images that nothing was chosen on."""
        return Effect.of(self.best.threat, self.plain.threat)

    @property
    def clean_loss(self) -> float:
        """Points of clean accuracy that the best choice loses there."""
        return 100 * (self.plain.clean_accuracy - self.best.clean_accuracy)

    @property
    def front(self) -> tuple[Choice, ...]:
        """The choices that no other one beats with fewer products."""
        found: list[Choice] = []
        for choice in sorted(self.choices, key=lambda each: each.share):
            if not found or choice.kept.accuracy > found[-1].kept.accuracy:
                found.append(choice)
        return tuple(found)

    @property
    def sentence(self) -> str:
        """The recommendation, in one sentence."""
        best = max(self.choices, key=lambda choice: choice.kept.accuracy)
        names = ", ".join(best.layers)
        count = len(self.plain.threat)
        if self.layers:
            return (
                f"Against {self.threat}, reprogram {names} ({100 * best.share:.0f} % of the products): {self.effect} "
                f"points on {count} images that nothing was chosen on, at {self.clean_loss:+.1f} points of clean "
                "accuracy lost."
            )
        if not best.layers:
            plain = self.choices[0].kept.accuracy
            gaining = [each.name for each in self.worth if not each.is_bound and each.kept.accuracy > plain]
            why = (
                f"{', '.join(gaining)} gained on their own, and have more than {100 * self.budget:g} % of the products"
                if gaining and len(self.choices) == 1
                else "no layer gained anything on its own"
            )
            return f"Against {self.threat}, leave all layers plain: {why}."
        return (
            f"Against {self.threat}, leave all layers plain: the best choice, {names}, has {self.effect} points on "
            f"{count} images that nothing was chosen on, which cannot be told from chance."
        )

    def __str__(self) -> str:
        width = max(len(each.name) for each in self.worth)
        plain = self.choices[0].kept.threat
        lines = [self.sentence, f"{self.setting}; alone, in points over the plain network, and what else a layer has:"]
        for each in self.worth:
            gain = Effect.of(each.kept.threat, plain).points
            rho = "     -" if each.connectivity is None else f"{each.connectivity:6.2f}"
            bound = "at most " if each.is_bound else ""
            lines.append(
                f"  {each.name:{width}}  {bound + format(gain, '+.1f'):>14}  criticality {each.criticality:6.3f}  "
                f"connectivity {rho}  {100 * each.share:5.1f} % of the products"
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LayerRecommendation:
        data: dict[str, Any] = json.loads(text)
        worth = tuple(LayerWorth(**{**each, "kept": Kept(**each["kept"])}) for each in data["worth"])
        choices = tuple(Choice(tuple(each["layers"]), each["share"], Kept(**each["kept"])) for each in data["choices"])
        images = {name: Kept(**data[name]) for name in ("plain", "best")}
        return cls(**{**data, **images, "worth": worth, "choices": choices, "layers": tuple(data["layers"])})
