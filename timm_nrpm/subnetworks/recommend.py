"""Which layers are worth reprogramming: what each gains in the worst case, how critical it is, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from timm_nrpm.attacks.threats import Threat, check_threat
from timm_nrpm.checks import check_number
from timm_nrpm.config import NRPMConfig
from timm_nrpm.evaluation.evaluate import evaluate
from timm_nrpm.evaluation.layer_worth import Choice, LayerRecommendation, LayerWorth
from timm_nrpm.evaluation.trials import Effect, Kept, digits_of
from timm_nrpm.jobs.journal import Journal, digest_of
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.calibration import calibrate_
from timm_nrpm.models.reprogramming import reprogram_, reprogrammed_layers
from timm_nrpm.models.work import products
from timm_nrpm.nn.wrappers import copied
from timm_nrpm.subnetworks.connectivity import connectivity
from timm_nrpm.subnetworks.criticality import criticality
from timm_nrpm.subnetworks.mutual_information import LEAST
from timm_nrpm.subnetworks.networks import Batches, Networks
from timm_nrpm.subnetworks.splitting import split
from timm_nrpm.version import __version__


def recommend_layers(
    model: nn.Module,
    loader: Iterable[Any],
    threat: Threat | None = None,
    budget: float = 0.25,
    *,
    report: Iterable[Any],
    config: NRPMConfig | None = None,
    folder: str | Path | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> LayerRecommendation:
    """Find which layers of a network are worth reprogramming, within a share of its products.

    Each layer is reprogrammed alone, and attacked by the adaptive suite with the least effort. Those that gain, by what
    they gain for their products, are then reprogrammed together, one more at a time. The best choice is judged on the
    report images.

    Args:
        model: The network; of a reprogrammed one, the plain model. It is not changed.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, on which layers are chosen; a reprogrammed
            network is calibrated on their pixels.
        threat: What an attacker may change; the default is Linf with eps 8/255.
        budget: Largest share of all products that may be reprogrammed, above 0 and up to 1.
        report: Other images and labels, on which the choice is judged.
        config: The estimate; its layers are the ones to choose from. The default is lambda 0 in standard units with
            eps 1, in all layers.
        folder: Folder that keeps what is measured, from which the same call goes on; None keeps nothing.
        mean, std: Normalisation of the model, as for :func:`timm_nrpm.evaluate`.
        seed: Seed of everything random.
        progress: Whether to show a progress bar.

    Returns:
        The recommended layers, with what every layer is worth.

    Raises:
        ValueError: A setting is outside its range, there are no images, or `folder` holds another run.

    Example:
        >>> config = NRPMConfig(0.5, layers="conv1")
        >>> found = recommend_layers(model, loader, Threat("Linf", 0.3), report=loader, config=config)
        >>> NRPMConfig(0.5, layers=found.layers) if found.layers else print(found.sentence)
        Against Linf 0.3, leave all layers plain: ...
    """
    threat = check_threat(threat)
    budget = check_number("budget", budget, above=0, most=1, why=", a share of the products")
    config = NRPMConfig(0.0, eps=1.0, standardize=True) if config is None else config
    if not isinstance(config.lam, float):
        raise ValueError(f"lam={config.lam!r} is not one number: layers are compared at the same lambda, so give one.")
    with ExitStack() as stack:
        place = Path(stack.enter_context(TemporaryDirectory())) if folder is None else Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        bar = stack.enter_context(progress_bar(progress, counted=True))
        images, held = list(loader), list(report)
        networks = Networks(model, images, threat, place, seed, mean, std)
        run = _Run(networks, networks.checked(images), networks.checked(held), config, seed)
        task = bar.add_task("The plain network", total=2 * len(run.names) + 3)
        plain = run.kept((), None)
        choices, worth = [Choice((), 0.0, plain)], []
        bar.update(task, advance=1, description="Criticality and connectivity")
        critical, dependence = run.criticality(), run.connectivity()
        for name in run.names:
            bar.update(task, advance=1, description=name)
            kept, is_bound = run.tried((name,), plain)
            worth.append(
                LayerWorth(
                    name, run.products[name], run.share([name]), critical[name], dependence.get(name), kept, is_bound
                )
            )
        for names in run.prefixes(worth, plain, budget):
            bar.update(task, advance=1, description=f"{len(names)} layers")
            kept, is_bound = run.tried(names, max(choices, key=lambda choice: choice.kept.accuracy).kept)
            if not is_bound:
                choices.append(Choice(names, run.share(names), kept))
        best = max(choices, key=lambda choice: choice.kept.accuracy)
        bar.update(task, description="The images to judge on")
        judged = [run.kept(names, None, on_report=True) for names in ((), best.layers)]
        bar.update(task, completed=2 * len(run.names) + 3)
    gains = bool(best.layers) and Effect.of(judged[1].threat, judged[0].threat).is_gain
    setting = f"lambda {config.lam:g}, eps {config.eps:g}" + (" in standard units" if config.standardize else "")
    return LayerRecommendation(
        str(threat), setting, budget, tuple(worth), tuple(choices), best.layers if gains else (), judged[0], judged[1]
    )


class _Run:
    """One call of :func:`recommend_layers`."""

    def __init__(self, networks: Networks, images: Batches, held: Batches, config: NRPMConfig, seed: int) -> None:
        self.networks, self.images, self.held, self.config, self.seed = networks, images, held, config, seed
        plain, example = networks.plain, networks.example
        self.layers = split(plain, 1, example=example).layers
        self.names = tuple(reprogrammed_layers(reprogram_(copied(plain), config, example=example)))
        self.products = products(plain, example)
        identity = {
            **networks.identity, "config": str(replace(config, layers=self.names)), "seed": seed,
            "version": __version__,
            **{
                name: digest_of(*(torch.cat(part) for part in zip(*batches, strict=True)))
                for name, batches in (("images", images), ("report", held))
            },
        }  # fmt: skip
        self.journal = Journal(networks.folder / "layers.jsonl", identity)

    def share(self, names: Iterable[str]) -> float:
        """The share of the network's products that are these layers'."""
        return sum(self.products[name] for name in names) / sum(self.products.values())

    def network(self, names: tuple[str, ...]) -> nn.Module:
        """The network with these layers reprogrammed, calibrated."""
        networks = self.networks
        if not names:
            return networks.plain
        model = reprogram_(copied(networks.plain), replace(self.config, layers=names))
        return calibrate_(model, [pixels for pixels, _ in self.images], mean=networks.mean, std=networks.std).eval()

    def tried(self, names: tuple[str, ...], least: Kept) -> tuple[Kept, bool]:
        """The images that the network keeps, and whether that is but a bound, which lies below what another keeps."""
        bound = self.kept(names, "quick")
        if bound.accuracy < least.accuracy:
            return bound, True
        return self.kept(names, None), False

    def kept(self, names: tuple[str, ...], suite: str | None, *, on_report: bool = False) -> Kept:
        """The images that the network with these layers reprogrammed is right on, under the adaptive suite or another.

        What is in the journal is not measured again.
        """
        key = [list(names), suite, on_report]
        known = [row for row in self.journal.rows.values() if row["key"] == key]
        if known:
            return Kept(**known[0]["kept"])
        report = evaluate(
            self.network(names), self.held if on_report else self.images, self.networks.threat, suite or "adaptive",
            effort="default" if suite else "fast", seed=self.seed + (not on_report), control=False,
            mean=self.networks.mean, std=self.networks.std,
        )  # fmt: skip
        kept = Kept(digits_of(report.correct), digits_of(report.survivors))
        self.journal.add(len(self.journal.rows), {"key": key, "kept": vars(kept)})
        return kept

    def criticality(self) -> dict[str, float]:
        """Robust criticality by layer; under another norm than Linf and L2, at Linf 8/255."""
        net = self.networks.on_pixels(self.networks.state)
        threat = self.networks.threat if self.networks.threat.norm in ("Linf", "L2") else Threat()
        return criticality(net, self.images, self.names, threat, seed=self.seed)

    def connectivity(self) -> dict[str, float]:
        """Connectivity by layer, from the second on; nothing where a class has too few images."""
        networks = self.networks
        counts = torch.bincount(torch.cat([labels for _, labels in self.images]), minlength=networks.classes)
        if int(counts.min()) < LEAST:
            return {}
        parts = split(networks.plain, len(self.layers) - 1, example=networks.example)
        net = networks.on_pixels(networks.state)
        found = connectivity(net, self.images, parts, classes=networks.classes, seed=self.seed)
        return dict(zip(parts.late, found, strict=True))

    def prefixes(self, worth: list[LayerWorth], plain: Kept, budget: float) -> list[tuple[str, ...]]:
        """Layers that gain alone, one more at a time, by what they gain for their products, within the budget; in the
        order of a forward."""
        gaining = [
            each for each in worth
            if not each.is_bound and each.kept.accuracy > plain.accuracy and self.share([each.name]) <= budget
        ]  # fmt: skip
        gaining.sort(key=lambda each: -(each.kept.accuracy - plain.accuracy) / each.products)
        chosen: list[str] = []
        for each in gaining:
            if self.share([*chosen, each.name]) <= budget:
                chosen.append(each.name)
        counts = range(1, len(chosen) + 1)
        return [tuple(name for name in self.names if name in chosen[:count]) for count in counts]
