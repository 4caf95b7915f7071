"""Class folders and their labels: numbered over all splits of a dataset together, or as the model numbers them."""

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
"""Names that timm takes for the same split."""

SYNSET = re.compile(r"n\d{8}")
"""A WordNet id, by which the class folders of ImageNet are named."""

NAMELESS = ("", ".")
"""Folder names of images at the top of a dataset's folder or tar, outside of any class folder."""

SHOWN = 4
"""Number of names that an error message lists."""


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
        """The classes of a timm model, as many as its classifier has outputs, or else its `num_classes`."""
        if model is None:
            return cls()
        model = unwrapped(model)
        config: Any = getattr(model, "pretrained_cfg", None) or {}
        count = getattr(model, "num_classes", None)
        if not isinstance(count, int):
            return cls()
        # Some models without classes raise an error in get_classifier().
        if count and config and hasattr(model, "get_classifier"):
            count = int(getattr(model.get_classifier(), "out_features", count))  # type: ignore[operator]
        names = config.get("label_names") or ()
        return cls(count, tuple(names) if len(names) == count else ())

    def check(self, count: int, source: str, shown: str = "", advice: str = "") -> None:
        """Raise a ValueError unless the model has `count` classes, or does not say how many.

        Args:
            count: Number of classes of a dataset.
            source: Name of the dataset in the error message.
            shown: Text that follows the number of its classes in the message, such as some of their names.
            advice: Text that the message ends with, such as other remedies.
        """
        if self.count == 0:
            raise ValueError(
                f"The model has num_classes=0, so it gives features and no classes: build it with num_classes={count}."
            )
        if self.count not in (None, count):
            classes = "1 class" if count == 1 else f"{count} classes"
            raise ValueError(
                f"{source} has {classes}{shown}, and the model has {self.count}, so its labels would mean other "
                f"classes: give a model with num_classes={count}{advice}."
            )


def place_of(root: Path, split: str) -> Path:
    """The folder or tar of a split; `root` itself if it is not divided into splits.

    Raises:
        ValueError: `root` is divided into splits, and has no such split.
    """
    if root.is_file():
        return root
    same = next((names for names in SAME_SPLIT if split in names), (split,))
    for path in _named(root, (split, *same)):
        if _is_split(path):
            return path
    others = [path.name for path in _named(root, sum(SAME_SPLIT, ())) if _is_split(path)]
    if others:  # timm would read all of them as one dataset, training and test images together
        raise ValueError(f"split={split!r} is not in {root}, which holds {', '.join(sorted(others))}.")
    return root


def _named(root: Path, names: Sequence[str]) -> list[Path]:
    """The folders and tars in `root` that have one of these names."""
    return [path for name in names for path in (root / name, root / f"{name}.tar") if path.exists()]


def _is_split(path: Path) -> bool:
    """Whether `path` is a tar, holds folders, or has only splits beside it, since a class may be called "train" too."""
    if path.is_file() or _folders(path):
        return True
    return all(folder.name in sum(SAME_SPLIT, ()) for folder in _folders(path.parent))


def _folders(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")]


def class_names(root: Path, place: Path, *, top: bool = False) -> list[str]:
    """Names of the classes of a dataset, over all of its splits, in the order of their labels.

    Args:
        root: Folder or tar of the dataset.
        place: Folder or tar of the split that is read; if it is `root` itself, no other splits are looked for.
        top: Whether the topmost folders are the classes, as in torchvision, instead of the innermost, as in timm.

    Raises:
        ValueError: Some images lie beside the class folders, so they have no class.
    """
    names = _names_in(place, top)
    if place != root:
        splits = {path for path in _named(root, sum(SAME_SPLIT, ())) if _is_split(path)}
        for other in {*_folders(root), *root.glob("*.tar")} - {place}:
            other_names = _names_in(other, top)
            if other in splits or names & other_names - set(NAMELESS):
                names |= other_names
    named = names - set(NAMELESS)
    if named and named < names:
        raise ValueError(
            f"Some images in {root} lie beside the class folders ({first_of(named)}) and have no class: move them into "
            "one of these, or elsewhere."
        )
    return sorted(names) if top else sorted(names, key=natural_key)


def _names_in(place: Path, top: bool) -> set[str]:
    """Names of the folders in a folder or tar that hold images or are empty; `""` for images outside of any."""
    if place.is_file():
        return set(_names_in_file(place, place.stat().st_mtime_ns))
    if top:
        return {folder.name for folder in _folders(place)}
    names = set()
    for folder, subfolders, files in os.walk(place, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        name = "" if Path(folder) == place else os.path.basename(folder)
        if any(map(_is_image, files)) or (name and not subfolders and not files):
            names.add(name)
    return names


@lru_cache(maxsize=64)
def _names_in_file(place: Path, modified_ns: int) -> frozenset[str]:
    """The same for a tar, cached until the file changes, since every split of a root needs the names of all splits."""
    try:
        with tarfile.open(place) as tar:
            return frozenset(_names_in_tar(tar))
    except tarfile.TarError as error:
        raise tarfile.ReadError(f"{place.name}: {error}") from error


def _names_in_tar(tar: tarfile.TarFile, outer: str = "") -> set[str]:
    """The same for an open tar; a tar inside it counts as a folder of its name, as in timm."""
    names = set()
    for member in tar:
        folder, file = os.path.split(member.name)
        if member.isfile() and file.lower().endswith(".tar"):
            with tarfile.open(fileobj=tar.extractfile(member)) as inner:
                names |= _names_in_tar(inner, os.path.splitext(file)[0])
        elif member.isfile() and _is_image(file):
            names.add(os.path.basename(os.path.join(outer, folder).rstrip("/")))
    return names


def _is_image(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in get_img_extensions(as_set=True)


def labels_of(
    names: Sequence[str], classes: Classes, class_map: Mapping[str, int] | str | Path | None, source: str
) -> dict[str, int]:
    """The label of each class, by name.

    A class map decides, if there is one. Otherwise, names in the model's config, or ImageNet ids for a model of these
    classes, get the label of that name; as many classes as the model has are numbered in their order; and integers
    that are class indices of the model are their own labels. Images outside of any class folder have the label -1,
    which `evaluate` and `tune` refuse.

    Args:
        names: Names of the classes of the dataset, in order.
        classes: The classes of the model.
        class_map: The label of each name, or the path of a file for :func:`read_class_map`; None for the rules above.
        source: Name of the dataset in the error message.

    Raises:
        ValueError: The class map lacks a class, a label is no class of the model, or the names fit none of the rules.
    """
    if set(names) <= set(NAMELESS):
        return dict.fromkeys(names, -1)
    if class_map is not None:
        return _mapped(names, classes, read_class_map(class_map), source)
    known = _known_names(names, classes)
    if known:
        return {name: known[name] for name in names}
    numbers = [int(name) if re.fullmatch("[0-9]+", name) else -1 for name in names]
    count = classes.count
    if count and len(names) != count and 0 <= min(numbers) <= max(numbers) < count and len(set(numbers)) == len(names):
        if sorted(names) == sorted(map(str, range(len(names)))):
            numbered = f"0 to {len(names) - 1}"
            warnings.warn(
                f"{source} has the folders {numbered}, which are taken for classes {numbered} of the model's {count}. "
                f"If they are others, give a model with num_classes={len(names)}, or class_map=.",
                stacklevel=4,
            )
        return dict(zip(names, numbers, strict=True))
    advice = ", or the folder that holds all of its splits as root=, or the model's class of each name as class_map="
    classes.check(len(names), source, f" ({first_of(names)})", advice)
    return {name: position for position, name in enumerate(names)}


def _known_names(names: Sequence[str], classes: Classes) -> dict[str, int]:
    """The model's class of each name, if its config has all of them or all are ImageNet ids; otherwise no classes."""
    known = {name: index for index, name in enumerate(classes.names)}
    if known.keys() >= set(names):
        return known
    subset = infer_imagenet_subset({"num_classes": classes.count})
    if subset is None or not all(map(SYNSET.fullmatch, names)):
        return {}
    known = {name: index for index, name in enumerate(ImageNetInfo(subset).label_names())}
    return known if known.keys() >= set(names) else {}


def _mapped(names: Sequence[str], classes: Classes, class_map: Mapping[str, int], source: str) -> dict[str, int]:
    """The labels that a class map gives to the names, checked."""
    missing = [name for name in names if name not in class_map]
    if missing:
        raise ValueError(f"class_map has no label for {first_of(missing)} of {source}: add what is missing.")
    labels = {name: class_map[name] for name in names}
    most, why = (classes.count - 1, ", a class of the model") if classes.count else (math.inf, "")
    return {
        name: check_integer(f"class_map's label of {name!r}", label, least=0, most=most, why=why)
        for name, label in labels.items()
    }


def read_class_map(class_map: Mapping[str, int] | str | Path) -> dict[str, int]:
    """A class map from a mapping, a .txt with one name per line in the order of the labels, or a .json object.

    Raises:
        ValueError: The file is of another kind, or its content is no class map.
        OSError: The file cannot be read.
    """
    if isinstance(class_map, Mapping):
        return dict(class_map)
    path = Path(class_map)
    advice = "give a .txt with one name per line, in the order of the labels, or a .json object of names and labels"
    if path.suffix.lower() not in (".txt", ".json"):
        raise ValueError(f"class_map={str(path)!r} is neither .txt nor .json: {advice}.")
    if not path.is_file():
        raise FileNotFoundError(f"class_map={str(path)!r} does not exist: {advice}.")
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".txt":
        lines = [line.strip() for line in text.rstrip().splitlines()]
        labels: Any = {name: label for label, name in enumerate(lines)}
        if len(labels) < len(lines):
            raise ValueError(f"class_map={str(path)!r} has a name twice, or an empty line: {advice}.")
        return labels
    try:
        labels = json.loads(text)
    except ValueError as error:
        raise ValueError(f"class_map={str(path)!r} is not valid JSON ({error}): {advice}.") from error
    if not isinstance(labels, dict):
        raise ValueError(f"class_map={str(path)!r} holds no JSON object: {advice}.")
    return labels


def first_of(names: Collection[str]) -> str:
    """The first few names in order, for an error message."""
    first = sorted(names, key=natural_key)
    return ", ".join(first[:SHOWN]) + (", ..." if len(first) > SHOWN else "")
