"""Class folders and their labels: numbered over all splits of a dataset together, and as the model numbers them."""

from __future__ import annotations

import json
import math
import os
import re
import tarfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch import nn

from timm_nrpm.checks import check_integer
from timm_nrpm.nn.wrappers import unwrapped

SAME_SPLIT = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"), ("test",))
"""Names of one split, as timm takes them."""

SYNSET = re.compile(r"n\d{8}")
"""An id of WordNet, as the class folders of ImageNet are named."""

NAMELESS = ("", ".")
"""Names of the folder of images that lie in none, in a folder and in a tar."""

SHOWN = 4
"""Names that a message shows."""


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Attributes:
        count: Number of classes; None if the model does not say.
        names: Names of the classes in order, if the model's config has them.
    """

    count: int | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module | None) -> Classes:
        """What a timm model says of its classes: the width of its classifier, or else its `num_classes`."""
        if model is None:
            return cls()
        model = unwrapped(model)
        config: Any = getattr(model, "pretrained_cfg", None) or {}
        count = getattr(model, "num_classes", None)
        if not isinstance(count, int):
            return cls()
        # Some models without classes fail when they are asked for their classifier.
        if count and config and hasattr(model, "get_classifier"):
            count = int(getattr(model.get_classifier(), "out_features", count))  # type: ignore[operator]
        names = config.get("label_names") or ()
        return cls(count, tuple(names) if len(names) == count else ())

    def check(self, count: int, what: str, shown: str = "", advice: str = "") -> None:
        """Raise a ValueError unless the model has `count` classes, or does not say how many.

        Args:
            count: Number of classes of a dataset.
            what: The dataset, in the error message.
            shown: Names of some of its classes.
            advice: What else may be done about it.
        """
        if self.count == 0:
            raise ValueError(
                f"The model has num_classes=0, so it gives features and no classes: build it with num_classes={count}."
            )
        if self.count not in (None, count):
            classes = "1 class" if count == 1 else f"{count} classes"
            raise ValueError(
                f"{what} has {classes}{shown}, and the model has {self.count}, so its labels would mean other classes: "
                f"give a model with num_classes={count}{advice}."
            )


def place_of(root: Path, split: str) -> Path:
    """The folder or tar of a split; `root` itself if it is not divided into splits.

    Raises:
        ValueError: The root is divided, and has no such split.
    """
    if root.is_file():
        return root
    same = next((names for names in SAME_SPLIT if split in names), (split,))
    for path in _named(root, (split, *same)):
        if _is_split(path):
            return path
    others = [path.name for path in _named(root, sum(SAME_SPLIT, ())) if _is_split(path)]
    if others:  # timm would read them all as one, training and test images together
        raise ValueError(f"split={split!r} is not in {root}, which holds {', '.join(sorted(others))}.")
    return root


def _named(root: Path, names: Sequence[str]) -> list[Path]:
    """The folders and tars in `root` that have one of these names."""
    return [path for name in names for path in (root / name, root / f"{name}.tar") if path.exists()]


def _is_split(path: Path) -> bool:
    """Whether it is a tar, holds class folders, or stands among nothing but splits: a class may be called "train"."""
    if path.is_file() or _folders(path):
        return True
    return all(folder.name in sum(SAME_SPLIT, ()) for folder in _folders(path.parent))


def _folders(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")]


def class_names(root: Path, place: Path, *, top: bool = False) -> list[str]:
    """Names of the classes of a dataset, over all of its splits, in the order of their numbers.

    Args:
        root: The folder of the dataset, or a tar.
        place: The split that is read, or `root` itself, which is then numbered by itself.
        top: Whether to go by the topmost folders, as torchvision does, instead of the innermost, as timm does.

    Raises:
        ValueError: Some images lie beside class folders, and have no class.
    """
    names = _names_in(place, top)
    if place != root:
        known = {path for path in _named(root, sum(SAME_SPLIT, ())) if _is_split(path)}
        for other in {*_folders(root), *root.glob("*.tar")} - {place}:
            more = _names_in(other, top)
            if other in known or names & more - set(NAMELESS):
                names |= more
    named = names - set(NAMELESS)
    if named and named < names:
        raise ValueError(
            f"Some images in {root} lie beside the class folders ({some(named)}) and have no class: move them into "
            "one of these, or elsewhere."
        )
    return sorted(names) if top else sorted(names, key=natural_key)


def _names_in(place: Path, top: bool) -> set[str]:
    """Names of the folders with images in a folder or tar, and of empty ones; `""` for images without a folder."""
    if place.is_file():
        return set(_names_in_file(place, place.stat().st_mtime_ns))
    if top:
        return {folder.name for folder in _folders(place)}
    found = set()
    for folder, below, files in os.walk(place, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        name = "" if Path(folder) == place else os.path.basename(folder)
        if any(map(_is_image, files)) or (name and not below and not files):
            found.add(name)
    return found


@lru_cache(maxsize=64)
def _names_in_file(place: Path, changed: int) -> frozenset[str]:
    """The same of a tar, remembered until it is changed: every split of a root asks for those of all."""
    try:
        with tarfile.open(place) as tar:
            return frozenset(_names_in_tar(tar))
    except tarfile.TarError as error:
        raise tarfile.ReadError(f"{place.name}: {error}") from error


def _names_in_tar(tar: tarfile.TarFile, outer: str = "") -> set[str]:
    """The same of an open tar; a tar in it is a folder of that name, as timm has it."""
    found = set()
    for member in tar:
        folder, file = os.path.split(member.name)
        if member.isfile() and file.lower().endswith(".tar"):
            with tarfile.open(fileobj=tar.extractfile(member)) as inner:
                found |= _names_in_tar(inner, os.path.splitext(file)[0])
        elif member.isfile() and _is_image(file):
            found.add(os.path.basename(os.path.join(outer, folder).rstrip("/")))
    return found


def _is_image(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in get_img_extensions(as_set=True)


def labels_of(
    names: Sequence[str], classes: Classes, class_map: Mapping[str, int] | str | Path | None, what: str
) -> dict[str, int]:
    """The label of each class, by name.

    A class map decides, if there is one. Otherwise names that the model's config has, or ids of ImageNet for a model
    of its classes, get the label of that name; as many classes as the model has are numbered in their order; and
    integers that are class indices of the model are those. Images without any class folder have the label -1, which
    `evaluate` and `tune` refuse.

    Args:
        names: Names of the classes of the dataset, in order.
        classes: What the model says of its classes.
        class_map: The label of each name, or a file that says it.
        what: The dataset, in the error message.

    Raises:
        ValueError: A class that the map does not have, a label that is no class of the model, or names that fit
            none of these.
    """
    if set(names) <= set(NAMELESS):
        return dict.fromkeys(names, -1)
    if class_map is not None:
        return _mapped(names, classes, read_class_map(class_map), what)
    known = _known_names(names, classes)
    if known:
        return {name: known[name] for name in names}
    numbers = [int(name) if re.fullmatch("[0-9]+", name) else -1 for name in names]
    count = classes.count
    if count and len(names) != count and 0 <= min(numbers) <= max(numbers) < count and len(set(numbers)) == len(names):
        if sorted(names) == sorted(map(str, range(len(names)))):
            warnings.warn(
                f"{what} has the folders 0 to {len(names) - 1}, which are taken for those classes of the model's "
                f"{count}. If they are others, give a model with num_classes={len(names)}, or class_map=.",
                stacklevel=4,
            )
        return dict(zip(names, numbers, strict=True))
    advice = ", as root= the folder that holds all of its splits, or as class_map= the model's class of each name"
    classes.check(len(names), what, f" ({some(names)})", advice)
    return {name: position for position, name in enumerate(names)}


def _known_names(names: Sequence[str], classes: Classes) -> dict[str, int]:
    """The model's class of each name, if its config has all of them or all are ids of ImageNet; else nothing."""
    found = {name: index for index, name in enumerate(classes.names)}
    if found.keys() >= set(names):
        return found
    subset = infer_imagenet_subset({"num_classes": classes.count})
    if subset is None or not all(map(SYNSET.fullmatch, names)):
        return {}
    found = {name: index for index, name in enumerate(ImageNetInfo(subset).label_names())}
    return found if found.keys() >= set(names) else {}


def _mapped(names: Sequence[str], classes: Classes, given: Mapping[str, int], what: str) -> dict[str, int]:
    """The labels that a class map gives to the names, found fit."""
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"class_map has no label for {some(missing)} of {what}: add what is missing.")
    labels = {name: given[name] for name in names}
    most, why = (classes.count - 1, ", a class of the model") if classes.count else (math.inf, "")
    return {
        name: check_integer(f"class_map's label of {name!r}", label, least=0, most=most, why=why)
        for name, label in labels.items()
    }


def read_class_map(class_map: Mapping[str, int] | str | Path) -> dict[str, int]:
    """A class map from a mapping, a .txt with one name a line in the order of the labels, or a .json object.

    Raises:
        ValueError: A file of another kind.
        OSError: The file cannot be read.
    """
    if isinstance(class_map, Mapping):
        return dict(class_map)
    path = Path(class_map)
    advice = "give a .txt with one name a line, in the order of the labels, or a .json object of names and labels"
    if path.suffix.lower() not in (".txt", ".json"):
        raise ValueError(f"class_map={str(path)!r} is of a kind that is not read: {advice}.")
    if not path.is_file():
        raise FileNotFoundError(f"class_map={str(path)!r} does not exist: {advice}.")
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".txt":
        lines = [line.strip() for line in text.rstrip().splitlines()]
        found: Any = {name: label for label, name in enumerate(lines)}
        if len(found) < len(lines):
            raise ValueError(f"class_map={str(path)!r} has a name twice, or a line that is empty: {advice}.")
        return found
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"class_map={str(path)!r} is no JSON ({error}): {advice}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"class_map={str(path)!r} holds no object: {advice}.")
    return found


def some(names: Collection[str]) -> str:
    """The first names, for a message."""
    first = sorted(names, key=natural_key)
    return ", ".join(first[:SHOWN]) + (", ..." if len(first) > SHOWN else "")
