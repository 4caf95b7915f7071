"""Loaders of pixels in [0, 1] with labels: the bundled digits, and every dataset that timm reads in any order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.functional import to_tensor

from timm_nrpm.checks import check_integer, check_number
from timm_nrpm.data.classes import Classes
from timm_nrpm.data.decoding import decoded
from timm_nrpm.data.readers import NO_CLASS_MAP, kind_of, read_dataset
from timm_nrpm.nn.wrappers import unwrapped

TEST = 360
"""Number of test images at the end of the digits: other people wrote them, and the bundled model never saw them."""


def digits(split: str) -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: pixels `[N, 1, 8, 8]` in [0, 1], and labels `[N]`.

    Args:
        split: `"train"`, 1437 images, or `"test"`, 360 by other writers.

    Raises:
        ValueError: `split` is neither of these.
        ImportError: scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: the digits have 'train' and 'test'.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The digits come with scikit-learn: pip install 'timm_nrpm[demo]'.") from error
    data = load_digits()
    part = slice(None, -TEST) if split == "train" else slice(-TEST, None)
    pixels = torch.from_numpy(data.images[part]).float().unsqueeze(1) / 16  # [N, 1, 8, 8]
    return pixels, torch.from_numpy(data.target[part]).long()


def pixel_loader(
    name: str = "digits",
    root: str | Path | None = None,
    *,
    split: str = "train",
    model: nn.Module | None = None,
    input_size: tuple[int, int, int] | None = None,
    batch_size: int = 64,
    training: bool = False,
    augment: bool = False,
    hflip: float = 0.0,
    workers: int = 0,
    samples: int | None = None,
    first: int | None = None,
    class_map: Mapping[str, int] | str | Path | None = None,
    seed: int = 0,
    download: bool = False,
    drop_last: bool = False,
) -> DataLoader[Any]:
    """A loader of pixels `[B, C, H, W]`, float32 in [0, 1] and not normalised, and labels `[B]`, int64.

    Images that already have the right size pass through bit for bit; others are resized and cropped by the model's own
    preprocessing or, without a model, scaled until they cover `input_size` and cropped to its middle. An image that
    cannot be decoded is replaced by the next one, as everywhere in timm, and a log message says so. Greyscale of 16
    bits keeps its precision, transparent images are composed over white, and the EXIF orientation is applied; see
    :func:`timm_nrpm.data.decoding.decoded`.

    Class folders, in a folder or a tar, are numbered over all splits of the root together, in the order in which timm
    sorts their names, so that a class without images in one split changes no label. With a `model`, labels are its
    classes: folders named by the class names in the model's config, or by ImageNet ids, get the label of that name; as
    many folders as the model has classes keep their numbers; and folders named by class indices of the model, such as
    `0340`, are those classes. A `class_map` replaces these rules; without one, anything else is refused. Images outside
    of any class folder have the label -1, which `calibrate_` ignores and `evaluate` refuses.

    Args:
        name: Name of the dataset: `"digits"`, or one that `timm.data.create_dataset` reads in any order: `"folder"` or
            `"tar"`, `"torch/..."` for torchvision's datasets, including SVHN, or `"hfds/..."` for the Hub's.
        root: Path of the images. A folder or a .tar of class folders is read as it is, whatever the split; in a folder
            that holds one for each split (`train/` or `train.tar`), the split is looked up.
        split: Name of the split: `"train"`, `"test"`, `"validation"`, or another that the dataset has.
        model: Timm model, which sets the number of channels, size, crop and interpolation of the images, and whose
            classes the labels are.
        input_size: Size (C, H, W) of the images in pixels, in place of the model's; C is 1 for grey or 3 for RGB. The
            digits have (1, 8, 8).
        batch_size: Number of images in a batch.
        training: Whether to shuffle the images anew in each epoch.
        augment: Whether to crop images at random, to 0.8 to 1 of their area at nearly the same aspect ratio; colours
            do not change.
        hflip: Probability with which `augment` mirrors an image: 0.5 suits photographs, 0 digits and letters.
        workers: Number of processes that read images; 0 reads them in this process.
        samples: Number of images drawn at random, since a tar is often ordered by class. The same seed draws the same
            images, and a smaller number takes the first of them. None takes all images in their order.
        first: Number of images from the beginning, in their order, in place of `samples`.
        class_map: Label of each class by name, for `"folder"`, `"tar"` and `"hfds/..."`: a mapping, a .txt with one
            name per line in the order of the labels, or a .json object.
        seed: Seed of the draw of `samples` and of the shuffling.
        download: Whether a `torch/...` dataset that is missing may be downloaded.
        drop_last: Whether to leave out a last batch that is not full.

    Raises:
        ValueError: The dataset, split or size does not exist, the dataset has no images or is a stream, or its classes
            are not those of the model.
        FileNotFoundError: `root` does not exist.
        ImportError: The package that reads the dataset is not installed.

    Example:
        >>> loader = pixel_loader("digits", split="test", model=model, samples=100, batch_size=64)
        >>> pixels, labels = next(iter(loader))
        >>> pixels.shape, labels.shape
        (torch.Size([64, 1, 8, 8]), torch.Size([64]))
    """
    if hflip and not augment:
        raise ValueError(f"hflip={hflip} without augment=True mirrors nothing: give both or neither.")
    if samples is not None and first is not None:
        raise ValueError(f"samples={samples} and first={first}: give one of them, images at random or the first ones.")
    check_integer("batch_size", batch_size, least=1)
    check_integer("workers", workers, least=0)
    check_number("hflip", hflip, least=0, most=1)
    if name != "digits":
        kind_of(name)
    elif model is None and input_size is None:
        input_size = (1, 8, 8)
    transform = _transform(model, input_size, augment, hflip)
    classes = Classes.of(model)
    dataset: Dataset[Any]
    if name == "digits":
        if class_map is not None:
            raise ValueError(NO_CLASS_MAP.format(name))
        classes.check(10, "'digits'")
        dataset = _Digits(*digits(split), transform)
    else:
        dataset = read_dataset(name, root, split, transform, classes, class_map, download)
    if not len(dataset):  # type: ignore[arg-type]
        raise ValueError(f"split={split!r} of {name!r} in root={str(root)!r} holds no images.")
    dataset = _chosen(dataset, f"split={split!r} of {name!r}", samples, first, seed)
    count = len(dataset)  # type: ignore[arg-type]
    if drop_last and batch_size > count:
        raise ValueError(f"batch_size={batch_size} with drop_last=True drops all {count} images: give a smaller size.")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=training,
        num_workers=workers,
        drop_last=drop_last,
        generator=torch.Generator().manual_seed(seed),
    )


def _chosen(dataset: Dataset[Any], where: str, samples: int | None, first: int | None, seed: int) -> Dataset[Any]:
    """The images that `samples` or `first` of :func:`pixel_loader` choose; `where` names the dataset in messages."""
    count = len(dataset)  # type: ignore[arg-type]
    for key, number in (("samples", samples), ("first", first)):
        if number is not None and number < 1:
            raise ValueError(f"{key}={number}: give a number of images of at least 1.")
        if number is not None and number > count:
            raise ValueError(f"{key}={number}, and {where} holds {count} images: give fewer.")
    if samples is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return Subset(dataset, order[:samples].tolist())
    return dataset if first is None else Subset(dataset, range(first))


@dataclass(frozen=True)
class _Transform:
    """A transform of images, PIL's or tensors `[1, H, W]`, to pixels `[C, H, W]`.

    Attributes:
        size: Size (C, H, W) of the pixels.
        resize: timm's transform to that size.
        always: Whether `resize` is applied even to images that have that size already.
    """

    size: tuple[int, int, int]
    resize: Callable[[Any], Tensor]
    always: bool

    def __call__(self, image: Any) -> Tensor:
        channels, height, width = self.size
        if not isinstance(image, Tensor):
            image = decoded(image, "L" if channels == 1 else "RGB")
        if isinstance(image, Tensor):
            image = image.expand(channels, -1, -1)
            same = tuple(image.shape[1:]) == (height, width)
        else:
            same = image.size == (width, height)
        if same and not self.always:
            return image if isinstance(image, Tensor) else to_tensor(image)
        return self.resize(image).clamp(0, 1)  # cubic interpolation of a tensor overshoots


def _transform(
    model: nn.Module | None, input_size: tuple[int, int, int] | None, augment: bool, hflip: float
) -> _Transform:
    """The transform of images to the size of the model, or to `input_size`."""
    data: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    model = None if model is None else unwrapped(model)
    if model is not None and hasattr(model, "pretrained_cfg"):
        model_data = resolve_model_data_config(model)
        data = {key: model_data[key] for key in data}
        # The size that the model was built with, which may differ from that of its published weights.
        input_size = input_size or tuple(get_model_input_config(model)["input_size"])
    if input_size is None:
        raise ValueError(
            "The size of the images is not known: give input_size=(C, H, W), or model= with a timm model"
            + (f", which {type(model).__name__} is not." if model is not None else ".")
        )
    if len(input_size) != 3 or input_size[0] not in (1, 3) or min(input_size) < 1:
        raise ValueError(f"input_size={tuple(input_size)}: images are (C, H, W) with C 1 or 3, like (3, 32, 32).")
    if augment:
        data = {"interpolation": data["interpolation"], "scale": (0.8, 1.0), "ratio": (0.9, 1 / 0.9), "hflip": hflip}
    channels = input_size[0]
    data |= {"mean": (0.0,) * channels, "std": (1.0,) * channels, "color_jitter": None}
    return _Transform(input_size, create_transform(input_size, is_training=augment, **data), augment)


class _Digits(Dataset[tuple[Tensor, int]]):
    """The digits, with a transform applied to each image."""

    def __init__(self, pixels: Tensor, labels: Tensor, transform: _Transform) -> None:
        self.pixels, self.labels, self.transform = pixels, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pixels[index]), self.labels[index]
