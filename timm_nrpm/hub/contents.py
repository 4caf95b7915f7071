"""What a push holds: the files of a variant or of an ensemble, and the card that describes them."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from timm_nrpm.ensembles.folders import (
    ENSEMBLE,
    FoundEnsemble,
    filling_as,
    find_ensemble,
    parse_ensemble,
    save_pretrained,
)
from timm_nrpm.evaluation.cost_report import CostReport
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.hub.cards import PICTURE, write_card
from timm_nrpm.hub.ensemble_cards import write_ensemble_card
from timm_nrpm.hub.latency import COST, estimated
from timm_nrpm.hub.preprocessing import images_of
from timm_nrpm.hub.signature_cards import write_signature_card
from timm_nrpm.hub.templates import CARD, EVALUATION
from timm_nrpm.models import signatures
from timm_nrpm.models.creation import TIMM_FILES
from timm_nrpm.models.format import CONFIG, parse_config
from timm_nrpm.models.loading import Found, find_variant
from timm_nrpm.models.saving import filling, needs_weights, save_variant
from timm_nrpm.models.signatures import Signature
from timm_nrpm.nn.ensemble import Ensemble
from timm_nrpm.nn.wrappers import unwrapped

BESIDE = (COST, EVALUATION, PICTURE, CARD)
"""Files that a push adds to those of a model: its card, and what is behind the card."""


@dataclass(frozen=True)
class About:
    """What a card says beyond what is in the folder; see :func:`timm_nrpm.hub.cards.render`.

    Attributes:
        name: Name of the repository, `owner/name`.
        license: Identifier of a licence that is given.
        datasets: Names on the Hub of the datasets of the training.
        tags: Further tags.
        reports: Reports on this very model.
        cost: What a forward of the model costs, if it is known.
        existing: Text of the earlier card.
        picture: An earlier picture of these lambdas, which is used if none can be drawn.
    """

    name: str
    license: str | None
    datasets: Sequence[str]
    tags: Sequence[str] = ()
    reports: Sequence[RobustnessReport] = ()
    cost: CostReport | None = None
    existing: str | None = None
    picture: bytes | None = None


@dataclass(frozen=True)
class Contents(ABC):
    """The files of a push, in a folder.

    Attributes:
        source: A model or a signature, or the folder that holds it.
        folder: Folder to which the files are written.
    """

    source: nn.Module | Signature | Path
    folder: Path

    @abstractmethod
    def fill(self, full: bool | None) -> None:
        """Write the model's own files; `full` is that of :func:`timm_nrpm.push_to_hub`."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Hash of the model, as reports have it."""

    @abstractmethod
    def write_card(self, about: About) -> None:
        """Write the card, with these facts on it."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the model's own files."""

    @property
    @abstractmethod
    def config(self) -> str:
        """Name of the file that holds the config."""

    @property
    def title(self) -> str:
        """What the model is, in words, see :func:`title_of`."""
        return title_of(self.config, PARSERS[self.config](self.folder / self.config, str(self.folder)))

    @abstractmethod
    def is_of(self, cost: CostReport) -> bool:
        """Whether a cost can be this model's, by the layers in it."""

    def checked(self, cost: CostReport) -> CostReport:
        """Return a cost, or raise a ValueError if it is another model's."""
        if not self.is_of(cost):
            raise ValueError(
                f"cost= is of another model ({cost.model}, with other layers): give timm_nrpm.cost of this one."
            )
        return cost

    def estimated(self) -> CostReport | None:
        """The estimated cost of a forward, if it can be told without the weights of others."""
        return estimated(self.source, self.image_size()) if isinstance(self.source, nn.Module) else None

    def image_size(self) -> Sequence[int] | None:
        """The `(C, H, W)` that the card names, whose forward it times; None where it names none."""
        return (images_of(self.folder / TIMM_FILES[0]) or {}).get("input_size")

    def is_based_on(self, earlier: Mapping[str, Any]) -> bool:
        """Whether an earlier model, by its config, holds the weights that this one is based on."""
        return False

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each file to send: the model's own and its card's, and no others in the folder."""
        names = (*self.names(), *BESIDE)
        return {name: (self.folder / name).stat().st_size for name in names if (self.folder / name).is_file()}


class VariantContents(Contents):
    """The files of a reprogrammed model."""

    config = CONFIG

    def fill(self, full: bool | None) -> None:
        if isinstance(self.source, nn.Module):
            save_variant(self.source, self.folder, full=needs_weights(self.source) if full is None else full)
            return
        assert isinstance(self.source, Path)
        found = find_variant(self.source)
        if full is not None and full != found.variant.is_full:
            held = "with its weights" if found.variant.is_full else "without its weights"
            raise ValueError(
                f"{self.source} holds a variant {held}: load it and push the model, or leave out full={full}."
            )
        if self.folder.resolve() != self.source.resolve():
            with filling(self.folder) as draft:
                for name in found.names():
                    shutil.copyfile(found.find(name), draft / name)

    @property
    def sha256(self) -> str:
        return self._found().variant.model

    def write_card(self, about: About) -> None:
        write_card(
            self.folder, about.name, about.reports, about.existing, license=about.license, datasets=about.datasets,
            tags=about.tags, cost=about.cost, picture=about.picture,
        )  # fmt: skip

    def is_of(self, cost: CostReport) -> bool:
        variant = self._found().variant
        runs = variant.config.estimator.iterations > 0 and variant.config.estimator.penalty != "l2"
        robust = {layer for layer, lam in variant.lams.items() if runs and lam < 1}
        counted = {layer.name for layer in cost.layers}
        return counted >= robust and {layer.name for layer in cost.layers if layer.estimated} == robust

    def estimated(self) -> CostReport | None:
        return super().estimated() or estimated(self._found().variant, self.image_size())

    def names(self) -> tuple[str, ...]:
        return self._found().names()

    def is_based_on(self, earlier: Mapping[str, Any]) -> bool:
        base = earlier["base"]
        held = TIMM_FILES[1] in earlier["files"] and isinstance(base, dict)
        return held and base.get("sha256") == self._found().variant.base.sha256

    def _found(self) -> Found:
        return find_variant(self.folder, weights=False)


class EnsembleContents(Contents):
    """The files of an ensemble."""

    config = ENSEMBLE

    def fill(self, full: bool | None) -> None:
        if isinstance(self.source, nn.Module):
            save_pretrained(self.source, self.folder, full=bool(full))
            return
        if full is not None:
            raise ValueError(f"{self.source} holds an ensemble as it was saved: leave out full={full}.")
        assert isinstance(self.source, Path)
        found = find_ensemble(self.source)
        assert found is not None
        found.check()
        if self.folder.resolve() != self.source.resolve():
            with filling_as(found, self.folder) as draft:
                for name in found.names():
                    shutil.copyfile(found.find(name), draft / name)

    @property
    def sha256(self) -> str:
        return str(self._found().content["model"])

    def write_card(self, about: About) -> None:
        write_ensemble_card(
            self.folder, about.name, about.reports, about.existing, license=about.license, datasets=about.datasets,
            tags=about.tags, cost=about.cost,
        )  # fmt: skip

    def is_of(self, cost: CostReport) -> bool:
        members = tuple(f"members.{member}." for member in self._found().content["members"])
        return all(layer.name.startswith(members) for layer in cost.layers)

    def names(self) -> tuple[str, ...]:
        return self._found().names()

    def _found(self) -> FoundEnsemble:
        found = find_ensemble(self.folder)
        assert found is not None
        return found


class SignatureContents(Contents):
    """The files of a weight signature."""

    config = signatures.CONFIG

    def fill(self, full: bool | None) -> None:
        if full is not None:
            raise ValueError(f"A signature holds no weights of a model: leave out full={full}.")
        assert isinstance(self.source, (Signature, Path))
        if isinstance(self.source, Signature):
            self.source.save(self.folder)
        elif self.folder.resolve() != self.source.resolve():
            Signature.load(self.source).save(self.folder)

    @property
    def sha256(self) -> str:
        return str(_parse_signature(self.folder / self.config, str(self.folder))["model"])

    def write_card(self, about: About) -> None:
        if about.reports:
            raise ValueError("A signature is no model, and has no report of its own: leave out reports=.")
        write_signature_card(
            self.folder, about.name, about.existing, license=about.license, datasets=about.datasets, tags=about.tags
        )

    def is_of(self, cost: CostReport) -> bool:
        return False

    def names(self) -> tuple[str, ...]:
        return (signatures.CONFIG, signatures.TENSORS)


def _parse_signature(path: Path, where: str) -> Mapping[str, Any]:
    """The checked content of a signature's config, under the keys of the other kinds as well."""
    content = signatures.parse_signature(path, where)
    return {**content, "model": content["file"], "files": {signatures.TENSORS: content["file"]}}


PARSERS: Mapping[str, Callable[[Path, str], Mapping[str, Any]]] = {
    CONFIG: parse_config,
    ENSEMBLE: parse_ensemble,
    signatures.CONFIG: _parse_signature,
}
"""Functions that check and read the config of a model of each kind, by the name of that file. All have `model`, the
hash of the model, and `files`, the other files by name."""


def title_of(config: str, content: Mapping[str, Any]) -> str:
    """What a model is, in words: its kind, and the architecture or the members that it has.

    Args:
        config: Name of the file that holds its config.
        content: Content of that file.
    """
    if config == ENSEMBLE:
        return f"an ensemble ({content['kind']}) of {', '.join(content['members'])}"
    if config == signatures.CONFIG:
        return f"a weight signature of {content['architecture']}"
    base = content["base"]
    return f"a variant of {base.get('architecture') if isinstance(base, dict) else base}"


def contents_of(model: nn.Module | Signature | str | Path, folder: Path) -> Contents:
    """What a push of a model or a signature, or of a folder that holds one, consists of; it is written to `folder`."""
    if isinstance(model, nn.Module):
        return (
            EnsembleContents(model, folder)
            if isinstance(unwrapped(model), Ensemble)
            else VariantContents(model, folder)
        )
    has = [name for name in PARSERS if not isinstance(model, Signature)]
    has = [name for name in has if (Path(model) / name).is_file()]  # type: ignore[arg-type]
    if isinstance(model, Signature) or has[:1] == [signatures.CONFIG]:
        return SignatureContents(model if isinstance(model, Signature) else Path(model), folder)
    return (EnsembleContents if has[:1] == [ENSEMBLE] else VariantContents)(Path(model), folder)
