"""Images as pixels in [0, 1], with labels: the bundled digits, and whatever timm reads in any order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageDataset, create_dataset, create_transform, resolve_model_data_config
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import SVHN
from torchvision.transforms.functional import to_tensor

TEST = 360
"""Images at the end of the digits that the bundled model was not trained on; other people wrote them."""

STREAMS = ("hfids", "tfds", "wds")
FOLDERS = ("", "folder", "tar", "torch/folder", "torch/image_folder")
TWO_SPLITS = tuple(
    f"torch/{name}" for name in ("mnist", "kmnist", "qmnist", "fashion_mnist", "cifar10", "cifar100", "svhn")
)
READERS = (
    "'digits', which come along; 'folder' or 'tar', class folders of images; 'torch/NAME', like 'torch/cifar10'; "
    "'hfds/NAME', from the Hub"
)
ADVICE = {
    "": "Give as root= a folder or an uncompressed .tar of class folders of images, or a folder that holds one for "
    "each split, like train/ and test/, or train.tar and test.tar.",
    "torch": "Give as root= the folder in which torchvision keeps the dataset, like the one that holds MNIST/raw, or "
    "download=True.",
    "hfds": "It needs `pip install datasets`, the name of a dataset and of its split, and the network the first time.",
}
SAME_SPLIT = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"), ("test",))
"""Names of one split, as timm takes them."""


def digits(split: str) -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: pixels `[N, 1, 8, 8]` in [0, 1], and labels `[N]`.

    Args:
        split: `"train"`, 1437 images, or `"test"`, 360 by other writers.

    Raises:
        ValueError: Another split.
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
    seed: int = 0,
    download: bool = False,
    drop_last: bool = False,
) -> DataLoader[Any]:
    """A loader of pixels `[B, C, H, W]`, float32 in [0, 1] and not normalised, and labels `[B]`, int64.

    Images that have the size already come through bit for bit; others are resized and cropped as the model's own
    preprocessing does, or, without a model, scaled until they cover `input_size` and cropped to its middle. An image
    that cannot be decoded is, as everywhere in timm, replaced by the next, which its log says.

    Args:
        name: `"digits"`, or a name that `timm.data.create_dataset` reads in any order: `"folder"` or `"tar"` (classes
            are numbered in the order of the folders' names), `"torch/..."` for torchvision's, SVHN too, `"hfds/..."`.
        root: Where the images are. A folder or a .tar of class folders is read as it is, whatever the split; in a
            folder that holds one for each split (`train/` or `train.tar`), the split is looked up.
        split: `"train"`, `"test"`, `"validation"`, or what else the dataset has.
        model: A timm model, whose number of channels, size, crop and interpolation the images get.
        input_size: C, H, W in pixels, in place of the model's; C is 1 for grey or 3. The digits have (1, 8, 8).
        training: Whether to shuffle anew each epoch.
        augment: Whether to crop at random, 0.8 to 1 of the area at nearly the same aspect, with no change of colours.
        hflip: Share of the images that `augment` mirrors: 0.5 suits photographs, 0 digits and letters.
        workers: Processes that read; 0 reads in this one.
        samples: So many images, drawn at random (a tar is often ordered by class) and always the same for a seed;
            of fewer, the same come first. None takes all, in their order.
        seed: Of the samples and of the order.
        download: Whether `torch/` may download what is not there.
        drop_last: Whether to leave out a last batch that is not full.

    Raises:
        ValueError: A dataset, split or size that there is not, one without images, or a stream.
        FileNotFoundError: A root that does not exist.
        ImportError: What reads it is not installed.

    Example:
        >>> loader = pixel_loader("torch/cifar10", "data", split="test", model=model, samples=1000)
        >>> pixels, labels = next(iter(loader))
        >>> pixels.shape, labels.shape
        (torch.Size([64, 3, 32, 32]), torch.Size([64]))
    """
    if hflip and not augment:
        raise ValueError(f"hflip={hflip} without augment=True mirrors nothing: give both or neither.")
    if samples is not None and samples < 1:
        raise ValueError(f"samples={samples}: give a number of images of at least 1, or None for all.")
    if name != "digits":
        _kind(name)
    elif model is None and input_size is None:
        input_size = (1, 8, 8)
    transform = _transform(model, input_size, augment, hflip)
    dataset: Dataset[Any]
    if name == "digits":
        dataset = _Digits(*digits(split), transform)
    else:
        dataset = _read(name, root, split, transform, download)
    count = len(dataset)  # type: ignore[arg-type]
    if not count:
        raise ValueError(f"split={split!r} of {name!r} in root={str(root)!r} holds no images.")
    if samples is not None:
        if samples > count:
            raise ValueError(f"samples={samples}, and split={split!r} of {name!r} holds {count}: give fewer, or None.")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        dataset, count = Subset(dataset, order[:samples].tolist()), samples
    if drop_last and batch_size > count:
        raise ValueError(f"batch_size={batch_size} with drop_last=True leaves nothing of {count} images: give less.")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=training,
        num_workers=workers,
        drop_last=drop_last,
        generator=torch.Generator().manual_seed(seed),
    )


@dataclass(frozen=True)
class _Transform:
    """An image, PIL's or a tensor `[1, H, W]`, to pixels `[C, H, W]`.

    Attributes:
        size: C, H, W.
        resize: timm's transform.
        always: Whether `resize` also sees images of that size.
    """

    size: tuple[int, int, int]
    resize: Callable[[Any], Tensor]
    always: bool

    @property
    def mode(self) -> str:
        """PIL's name for as many channels."""
        return "L" if self.size[0] == 1 else "RGB"

    def __call__(self, image: Any) -> Tensor:
        channels, height, width = self.size
        if isinstance(image, Tensor):
            image = image.expand(channels, -1, -1)
            same = tuple(image.shape[1:]) == (height, width)
        else:
            image = image.convert(self.mode)
            same = image.size == (width, height)
        if same and not self.always:
            return image if isinstance(image, Tensor) else to_tensor(image)
        return self.resize(image).clamp(0, 1)  # cubic interpolation of a tensor overshoots


def _transform(
    model: nn.Module | None, input_size: tuple[int, int, int] | None, augment: bool, hflip: float
) -> _Transform:
    """What brings images to the size of the model, or to the one given."""
    data: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    if model is not None and hasattr(model, "pretrained_cfg"):
        known = resolve_model_data_config(model)
        data = {key: known[key] for key in data}
        # What the model was built with, where that is not what its weights were published with.
        input_size = input_size or tuple(get_model_input_config(model)["input_size"])
    if input_size is None:
        raise ValueError(
            "The size of the images is not known: give input_size=(C, H, W), or as model= a timm model"
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
    """The digits, transformed."""

    def __init__(self, pixels: Tensor, labels: Tensor, transform: _Transform) -> None:
        self.pixels, self.labels, self.transform = pixels, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pixels[index]), self.labels[index]


class _Tar(ReaderImageInTar):
    """timm's reader of a .tar, without its open file: workers who share one would read at each other's place."""

    def __init__(self, root: str) -> None:
        super().__init__(root, cache_tarinfo=False)  # its cache is a file that runs code when read

    def __getitem__(self, index: int) -> tuple[BytesIO, int]:
        member, _, inside = self.samples[index]
        with open(self.root, "rb") as tar:
            tar.seek(member.offset_data + (inside.offset_data if inside is not None else 0))  # a tar in the tar
            return BytesIO(tar.read(member.size)), self.targets[index]


def _kind(name: str) -> str:
    """What reads a dataset: `""` for folders and tars, `"torch"` or `"hfds"`; a ValueError for another."""
    kind, slash, _ = name.lower().partition("/")
    kind = kind if slash else ""
    if kind in STREAMS:
        raise ValueError(
            f"{name!r} is a stream: its images can be neither shuffled as a whole nor taken up again after a stop. "
            f"Take a reader with numbered images: {READERS}."
        )
    if kind not in ADVICE or (not kind and name.lower() not in FOLDERS):
        raise ValueError(f"Unknown dataset {name!r}. There are: {READERS}.")
    return kind


def _read(name: str, root: str | Path | None, split: str, transform: _Transform, download: bool) -> Dataset[Any]:
    """timm's dataset of that name."""
    kind = _kind(name)
    if root is None and kind != "hfds":
        raise ValueError(f"{name!r} needs root=. {ADVICE[kind]}")
    if root is not None and not Path(root).exists() and not download and kind != "hfds":
        raise FileNotFoundError(f"root={str(root)!r} does not exist. {ADVICE[kind]}")
    if name.lower() in TWO_SPLITS and not any(split in names for names in SAME_SPLIT):
        # timm takes every name that is not a training split's for the test images.
        raise ValueError(f"split={split!r}: {name!r} has 'train' and 'test'.")
    if root is not None and name.lower() in FOLDERS:
        root = _split_folder(Path(root), split)
    options: dict[str, Any] = {"input_img_mode": transform.mode, "transform": transform, "target_transform": int}
    place = None if root is None else str(root)
    try:
        if name.lower() == "torch/svhn":  # which timm does not know
            part = "train" if split in SAME_SPLIT[0] else "test"
            return SVHN(str(place), part, transform, int, download)
        if place is not None and not kind and place.endswith(".tar") and Path(place).is_file():
            return ImageDataset(place, reader=_Tar(place), **options)
        return create_dataset(name, place, split, search_split=False, download=download, **options)
    except Exception as error:  # assertions and lookups among them
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        kind_of = ImportError if isinstance(error, ImportError) else ValueError
        raise kind_of(
            f"{name!r} finds nothing to read with root={place!r} and split={split!r} "
            f"({reason.rstrip('.')}). {ADVICE[kind]}"
        ) from error


def _split_folder(root: Path, split: str) -> Path:
    """The folder or tar of a split; `root` itself if it is not divided."""
    if root.is_file():
        return root
    same = next((names for names in SAME_SPLIT if split in names), (split,))
    for name in (split, *same):
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return path
    others = [p.name for n in sum(SAME_SPLIT, ()) for p in (root / n, root / f"{n}.tar") if p.exists()]
    if others:  # timm would read them all as one, training and test images together
        raise ValueError(f"split={split!r} is not in {root}, which holds {', '.join(sorted(others))}.")
    return root
