"""Robust weight signatures: what a robust model has beyond a natural one in its first layers, added to another model of
the same architecture, and taken off again (Cai et al., arXiv 2302.12480)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_nrpm.checks import check_number
from timm_nrpm.config import LayerSelection, NRPMConfig
from timm_nrpm.errors import BrokenSignature
from timm_nrpm.models.base import checksum_of, weights_sha256
from timm_nrpm.models.creation import LARGEST_CONFIG
from timm_nrpm.models.downloads import REPO_ID, Repository, sha256_of
from timm_nrpm.models.format import HASH
from timm_nrpm.models.reprogramming import plain_copy
from timm_nrpm.models.saving import filling
from timm_nrpm.models.selection import call_order, select
from timm_nrpm.models.tensors import write_tensors
from timm_nrpm.nn.layers import REPROGRAMMED
from timm_nrpm.nn.wrappers import unwrapped

FORMAT = 1
CONFIG, TENSORS = "nrpm_signature.json", "nrpm_signature.safetensors"
KEYS = ("format", "architecture", "layers", "natural", "robust", "start", "file")


@dataclass(frozen=True)
class Signature:
    """The difference between the first layers of a robust and of a natural model.

    Attributes:
        architecture: Name of the class of both models, or timm's name of their architecture.
        layers: Names of the layers, in the order in which the model calls them.
        tensors: Difference of each of their weights, and of the weights and statistics of BatchNorm behind them, by the
            name in the model's state.
        natural, robust: :func:`timm_nrpm.models.base.weights_sha256` of the two models.
        start: That of the model that both were trained from, if it was given.
    """

    architecture: str
    layers: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    natural: str
    robust: str
    start: str | None = None

    @torch.no_grad()
    def add_(self, model: nn.Module, strength: float = 1.0) -> Patch:
        """Add the signature to a model, in place.

        Args:
            model: A model of the same architecture, plain or reprogrammed, with or without a wrapper.
            strength: Number by which the differences are multiplied, above 0; 1 adds them as they are.

        Returns:
            What takes the signature off again.

        Raises:
            ValueError: The model is of another architecture, or a variance would fall below 0. The model is untouched.

        Example:
            >>> other = timm.create_model("resnet8_digits", pretrained=True)
            >>> patch = signature(plain, other).add_(other, strength=0.5)
            >>> patch.take_off_()
        """
        strength = check_number("strength", strength, above=0)
        model = unwrapped(model)
        if _architecture_of(model) != self.architecture:
            raise ValueError(
                f"The signature is of a {self.architecture}, and this is a {_architecture_of(model)}: give a model of "
                "the same architecture."
            )
        state = model.state_dict(keep_vars=True)
        _check_fit(self.tensors, state, "the signature")
        targets = {name: state[name] for name in self.tensors}
        after = {name: (target + strength * self.tensors[name].to(target)).detach() for name, target in targets.items()}
        for name, value in after.items():
            if name.endswith("running_var") and bool((value < 0).any()):
                raise ValueError(
                    f"strength={strength:g} would make {name} negative, which is a variance: give a smaller strength, "
                    "or a model that is closer to the natural one."
                )
        before = {name: target.detach().clone() for name, target in targets.items()}
        for name, target in targets.items():
            target.copy_(after[name])
        return Patch(model, before, after)

    def save(self, folder: str | Path) -> Path:
        """Write the signature to a folder, as safetensors and JSON, either as a whole or not at all.

        Args:
            folder: Path of the folder. It is created, or the signature in it is replaced; its other files stay.

        Returns:
            Path of the folder.

        Raises:
            ValueError: The folder exists and holds no signature.

        Example:
            >>> made = signature(plain, timm.create_model("resnet8_digits"), layers="first:2")
            >>> Signature.load(made.save("my-signature")).layers
            ('conv1', 'layer1.0.conv1')
        """
        folder = Path(folder)
        content: dict[str, Any] = {name: getattr(self, name) for name in KEYS[1:-1]} | {"format": FORMAT}
        content["layers"] = list(self.layers)
        with filling(folder, kind="signature", config=CONFIG, maybe=()) as draft:
            write_tensors(self.tensors, draft / TENSORS)
            content["file"] = sha256_of(draft / TENSORS)
            text = json.dumps({**content, "sha256": checksum_of(content)}, indent=2)
            (draft / CONFIG).write_text(text + "\n")
        return folder

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Signature:
        """Read a signature that :meth:`save` wrote or `push_to_hub` published.

        Args:
            folder: Path of a folder, or a repository on the Hub, `owner/name`. A folder of that name takes precedence.
            revision, cache_dir, token, local_files_only: The same as in :func:`timm_nrpm.from_pretrained`.

        Raises:
            BrokenSignature: A file is missing, damaged, of a later format, or not what `save` writes.
            timm_nrpm.errors.HubError: The repository cannot be read; the message says why.
        """
        is_repository = isinstance(folder, str) and not Path(folder).is_dir() and REPO_ID.fullmatch(folder)
        if is_repository:
            repository = Repository(str(folder), revision, cache_dir, token, local_files_only)
            config = repository.fetch(CONFIG, LARGEST_CONFIG)
            file = repository.at(config, CONFIG).fetch(TENSORS)
        else:
            config, file = Path(folder) / CONFIG, Path(folder) / TENSORS
        content = parse_signature(config, str(folder))
        try:
            if sha256_of(file) != content["file"]:
                raise BrokenSignature(
                    f"{TENSORS} of {folder} is cut short or was changed after it was saved: get it again."
                )
            tensors = parse_tensors(file.read_bytes())
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, BrokenSignature):
                raise
            raise BrokenSignature(f"{TENSORS} of {folder} cannot be read ({error}): get it again.") from error
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise BrokenSignature(f"{name} of {folder} does not hold finite numbers: make the signature anew.")
            if name.rpartition(".")[2] == "lam":
                raise BrokenSignature(f"{name} of {folder} is a lambda, which no signature holds: make it anew.")
        names = {name: content[name] for name in ("architecture", "natural", "robust", "start")}
        return cls(layers=tuple(content["layers"]), tensors=tensors, **names)


@dataclass(frozen=True)
class Patch:
    """A signature that was added to a model.

    Attributes:
        model: The model.
        before: Values of the tensors that it changed, before it was added, by name.
        after: Their values since.
    """

    model: nn.Module
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]

    @torch.no_grad()
    def take_off_(self) -> None:
        """Bring back what the model had before, in place and bit for bit.

        Raises:
            ValueError: The model changed since, for example by another signature. It is untouched.
        """
        state = self.model.state_dict(keep_vars=True)
        targets = {name: state[name] for name in self.before}
        changed = [name for name, target in targets.items() if not torch.equal(target, self.after[name].to(target))]
        if changed:
            raise ValueError(
                f"{changed[0]} has changed since this signature was added, so taking it off would lose that change: "
                "take off what was added later first."
            )
        for name, target in targets.items():
            target.copy_(self.before[name])


def signature(
    natural: nn.Module,
    robust: nn.Module,
    layers: LayerSelection = "first:4",
    *,
    start: nn.Module | None = None,
    example: Tensor | None = None,
) -> Signature:
    """The robust weight signature of two models of one architecture.

    It is the difference of their weights in some layers, with the weights and statistics of the BatchNorm modules that
    a forward calls right behind them. With `start`, from which both were trained, it is the part of `robust - start`
    that is orthogonal to `natural - start`, weight by weight, as in the paper. Of BatchNorm it is the difference in any
    case, where the authors' code takes the robust model's.

    Args:
        natural: A naturally trained model, plain or reprogrammed.
        robust: The same architecture trained to be robust.
        layers: Layers to take, see :data:`timm_nrpm.config.LayerSelection`; the default is the first four, since robust
            and natural weights differ most there.
        start: The model that both were trained from; None for the plain difference.
        example: Input of the model, `[B, C, H, W]`, by which the order of its layers is found; by default an image of
            zeros for a timm model, and the order in which its layers were defined for another one.

    Raises:
        ValueError: The models are not of one architecture, or no layer is selected.

    Example:
        >>> robust = timm.create_model("resnet8_digits", pretrained=True)
        >>> robust.conv1.weight.data += 0.5
        >>> made = signature(plain, robust, layers="first:1")
        >>> sorted(made.tensors)[0], round(float(made.tensors["conv1.weight"].mean()), 3)
        ('bn1.bias', 0.5)
    """
    ours, theirs = plain_copy(natural), plain_copy(robust)
    states = {"natural": ours.state_dict(), "robust": theirs.state_dict()}
    if start is not None:
        states["start"] = plain_copy(start).state_dict()
    for name, state in states.items():
        _check_fit(states["natural"], state, f"the {name} model")
        _check_fit(state, states["natural"], "the natural model")
    found = _layers(ours, layers, example)
    named = [name for name in states["natural"] if name.rpartition(".")[0] in found[1]]
    tensors = {name: _difference(name, states) for name in named if states["natural"][name].is_floating_point()}
    hashes = {name: weights_sha256(state) for name, state in states.items()}
    return Signature(_architecture_of(ours), found[0], tensors, **hashes)


def _architecture_of(model: nn.Module) -> str:
    """timm's name of the architecture, or the name of the model's class."""
    return str((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__)


def _layers(model: nn.Module, layers: LayerSelection, example: Tensor | None) -> tuple[tuple[str, ...], set[str]]:
    """Names of the selected layers, and of these and the BatchNorm modules that are called right behind them."""
    modules = dict(model.named_modules())
    wanted = {name: m for name, m in modules.items() if type(m) in REPROGRAMMED or isinstance(m, _BatchNorm)}
    order = call_order(model, wanted, example)
    called = {name: wanted[name] for name in (wanted if order is None else order)}
    chosen = select(
        {name: m for name, m in called.items() if not isinstance(m, _BatchNorm)}, NRPMConfig(layers=layers), {}
    )
    taken, is_taken = set[str](), False
    for name, module in called.items():
        is_taken = is_taken if isinstance(module, _BatchNorm) else name in chosen
        taken |= {name} if is_taken else set()
    return tuple(chosen), taken


def _difference(name: str, states: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """Robust less natural, or the part of robust less start that is orthogonal to natural less start."""
    natural, robust = (states[each][name].detach().cpu() for each in ("natural", "robust"))
    is_weight = natural.ndim > 1
    if "start" not in states or not is_weight:
        return robust - natural
    start = states["start"][name].detach().cpu()
    along, whole = (natural - start).double().flatten(), (robust - start).double().flatten()
    projection = along * (whole @ along) / (along @ along).clamp_min(torch.finfo(torch.float64).tiny)
    return (whole - projection).to(natural).view_as(natural)


def _check_fit(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Raise a ValueError that names the first tensor of `what` that has no place in a model's state."""
    for name, tensor in tensors.items():
        if name not in state or state[name].shape != tensor.shape:
            there = f"{list(state[name].shape)} there" if name in state else "missing there"
            raise ValueError(f"{name} is {list(tensor.shape)} in {what} and {there}: give models of one architecture.")


def parse_signature(file: Path, folder: str) -> dict[str, Any]:
    """The content of the JSON file, checked, since a stranger may have written it.

    Args:
        file: Path of the file.
        folder: Folder or repository as error messages name it.

    Raises:
        BrokenSignature: It is missing, damaged, of a later format, or holds something else.
    """
    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
        version, checksum = content["format"], content.pop("sha256")
        expected = checksum_of(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenSignature(
            f"{CONFIG} of {folder} is missing, cut short or no signature's ({error!r}): get it again."
        ) from error
    if version != FORMAT or type(version) is not int:
        raise BrokenSignature(f"{folder} has format {version!r}, and this version reads {FORMAT}: update timm_nrpm.")
    if checksum != expected:
        raise BrokenSignature(f"{CONFIG} of {folder} was changed after it was saved: get it again.")
    names, hashes = content.get("layers"), [content.get(name) for name in ("natural", "robust", "file")]
    hashes += [content["start"]] if content.get("start") is not None else []
    is_right = set(content) == set(KEYS) and isinstance(content["architecture"], str) and isinstance(names, list)
    is_right = is_right and all(isinstance(name, str) for name in names)
    if not is_right or not all(isinstance(each, str) and HASH.fullmatch(each) for each in hashes):
        raise BrokenSignature(f"{CONFIG} of {folder} holds something else than a signature's: make it anew.")
    return content
