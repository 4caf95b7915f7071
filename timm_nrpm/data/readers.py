"""Datasets whose images can be read in any order: class folders, tars, torchvision's datasets and the Hub's."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.readers import create_reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset
from torchvision.datasets import SVHN, ImageFolder

from timm_nrpm.data.classes import SAME_SPLIT, Classes, class_names, first_of, labels_of, place_of, read_class_map

STREAMS = ("hfids", "tfds", "wds")
TOP_FOLDERS = ("torch/folder", "torch/image_folder")
FOLDERS = ("", "folder", "tar", *TOP_FOLDERS)
TWO_SPLITS = tuple(
    f"torch/{name}" for name in ("mnist", "kmnist", "qmnist", "fashion_mnist", "cifar10", "cifar100", "svhn")
)
READERS = (
    "'digits', which are bundled; 'folder' or 'tar', class folders of images; 'torch/NAME', like 'torch/cifar10'; "
    "'hfds/NAME', from the Hub"
)
ADVICE = {
    "": "Give as root= a folder or an uncompressed .tar of class folders of images, or a folder that holds one for "
    "each split, like train/ and test/, or train.tar and test.tar.",
    "torch": "Give as root= the folder in which torchvision keeps the dataset, like the one that holds MNIST/raw, or "
    "download=True.",
    "hfds": "It needs `pip install datasets`, the name of a dataset and of its split, and the network the first time.",
}
NO_CLASS_MAP = "class_map= gives labels to the classes of folders, tars and 'hfds/NAME': {!r} has labels of its own."
ATTEMPTS = 10
"""Number of consecutive images that cannot be decoded after which reading fails."""

_log = logging.getLogger(__name__)


class _Images(ImageDataset):
    """timm's dataset without its conversion of images to RGB, in which Pillow clips values of 16 bits at 255.

    Args:
        reader: timm's reader.
        transform: Function from an image to its pixels.
        label_of: Mapping from the reader's labels to those that the dataset gives; None keeps the reader's.
    """

    def __init__(self, reader: Any, transform: Callable[[Any], Any], label_of: Mapping[int, int] | None = None) -> None:
        super().__init__("", reader, transform=transform)
        self.label_of = label_of

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for _ in range(ATTEMPTS):
            try:
                stream, target = self.reader[index]
                with stream, Image.open(stream) as image:
                    image.load()
                break
            except OSError as error:
                _log.warning("Skipped image %d, which cannot be decoded: %s", index, error)
                index = (index + 1) % len(self)
        else:
            raise RuntimeError(f"{ATTEMPTS} images in a row cannot be decoded, the last one number {index}.")
        label = -1 if target is None else int(target)
        return self.transform(image), label if self.label_of is None else self.label_of.get(label, -1)


class _Folder(ImageFolder):  # type: ignore[misc]
    """torchvision's ImageFolder with given labels, and without its conversion of images to RGB."""

    def __init__(self, root: str, labels: Mapping[str, int], transform: Callable[[Any], Any]) -> None:
        self.given_labels = dict(labels)
        super().__init__(root, transform, loader=_opened, allow_empty=True)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return list(self.given_labels), self.given_labels


def _opened(path: str) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


class _Tar(ReaderImageInTar):
    """timm's reader of a .tar, which opens the file for each image: workers that share one would move its position."""

    def __init__(self, root: str, class_map: Mapping[str, int]) -> None:
        super().__init__(root, class_map, cache_tarinfo=False)  # reading timm's cache can run code

    def __getitem__(self, index: int) -> tuple[BytesIO, int]:
        member, _, inside = self.samples[index]
        with open(self.root, "rb") as tar:
            tar.seek(member.offset_data + (inside.offset_data if inside is not None else 0))  # a tar in the tar
            return BytesIO(tar.read(member.size)), self.targets[index]


def kind_of(name: str) -> str:
    """The kind of a dataset: `""` for folders and tars, `"torch"` or `"hfds"`; raises a ValueError for any other."""
    kind, slash, _ = name.lower().partition("/")
    kind = kind if slash else ""
    if kind in STREAMS:
        raise ValueError(
            f"{name!r} is a stream: its images can be neither shuffled as a whole nor resumed after a stop. "
            f"Give one whose images can be read in any order: {READERS}."
        )
    if kind not in ADVICE or (not kind and name.lower() not in FOLDERS):
        raise ValueError(f"Unknown dataset {name!r}. There are: {READERS}.")
    return kind


def read_dataset(
    name: str,
    root: str | Path | None,
    split: str,
    transform: Callable[[Any], Any],
    classes: Classes,
    class_map: Mapping[str, int] | str | Path | None = None,
    download: bool = False,
) -> Dataset[Any]:
    """The dataset of that name, with labels that are classes of the model.

    Args:
        name, root, split, class_map, download: The same as in :func:`timm_nrpm.data.loaders.pixel_loader`.
        transform: Function from an image to its pixels.
        classes: The classes of the model.

    Raises:
        ValueError: There is nothing to read, or the dataset's classes are not those of the model.
        FileNotFoundError: `root` does not exist.
        ImportError: The package that reads the dataset is not installed.
    """
    kind = kind_of(name)
    if root is None and kind != "hfds":
        raise ValueError(f"{name!r} needs root=. {ADVICE[kind]}")
    if root is not None and not Path(root).exists() and not download and kind != "hfds":
        raise FileNotFoundError(f"root={str(root)!r} does not exist. {ADVICE[kind]}")
    if name.lower() in TWO_SPLITS and not any(split in names for names in SAME_SPLIT):
        # timm would read the test images for every name that is not one of the training split.
        raise ValueError(f"split={split!r}: {name!r} has 'train' and 'test'.")
    if root is not None and name.lower() in FOLDERS:
        return _read_folders(name, Path(root), split, transform, classes, class_map)
    source = repr(name) if root is None else f"{name!r} in root={str(root)!r}"
    if kind == "hfds":
        return _read_hub(name, root, split, transform, classes, class_map, source)
    if class_map is not None:
        raise ValueError(NO_CLASS_MAP.format(name))
    with _explained(name, root, split, kind):
        if name.lower() == "torch/svhn":  # timm does not know it
            part = "train" if split in SAME_SPLIT[0] else "test"
            svhn: Dataset[Any] = SVHN(str(root), part, transform, int, download)
            dataset, count = svhn, 10
        else:
            options: dict[str, Any] = {"transform": transform, "target_transform": int, "download": download}
            dataset = create_dataset(name, str(root), split, search_split=False, **options)
            count = len(getattr(dataset, "classes", ()))
    if count:
        classes.check(count, source)
    return dataset


def _read_folders(
    name: str,
    root: Path,
    split: str,
    transform: Callable[[Any], Any],
    classes: Classes,
    class_map: Mapping[str, int] | str | Path | None,
) -> Dataset[Any]:
    """The dataset of class folders or a tar, whose classes are numbered over all splits of the root."""
    place, top = place_of(root, split), name.lower() in TOP_FOLDERS
    with _explained(name, place, split, "", (tarfile.TarError, OSError)):
        names = class_names(root, place, top=top)
    labels = labels_of(names, classes, class_map, f"{name!r} in root={str(root)!r}")
    with _explained(name, place, split, ""):
        if top:
            return _Folder(str(place), labels, transform)
        is_tar = place.is_file() and place.suffix == ".tar"
        reader = _Tar(str(place), labels) if is_tar else create_reader("", str(place), class_map=labels)
        return _Images(reader, transform)


def _read_hub(
    name: str,
    root: str | Path | None,
    split: str,
    transform: Callable[[Any], Any],
    classes: Classes,
    class_map: Mapping[str, int] | str | Path | None,
    source: str,
) -> Dataset[Any]:
    """The dataset from the Hub, with its own labels unless a class map is given."""
    mapping = None if class_map is None else read_class_map(class_map)
    with _explained(name, root, split, "hfds"):
        reader = create_reader(name, None if root is None else str(root), split=split)
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    if mapping is None:
        if names:
            classes.check(len(names), source, f" ({first_of(names)})")
        return _Images(reader, transform)
    if not names:
        raise ValueError(f"class_map= needs the names of classes, and {source} has labels without names.")
    return _Images(reader, transform, dict(enumerate(labels_of(names, classes, mapping, source).values())))


@contextmanager
def _explained(
    name: str, place: str | Path | None, split: str, kind: str, errors: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Turn an exception of a reader, even an AssertionError or a KeyError, into one that says what to give."""
    try:
        yield
    except errors as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        where = f"split={split!r}" if place is None else f"root={str(place)!r} and split={split!r}"
        raise (ImportError if isinstance(error, ImportError) else ValueError)(
            f"{name!r} finds nothing to read with {where} ({reason}). {ADVICE[kind]}"
        ) from error
