"""Pixels and labels against an independent read: PIL and NumPy alone."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_nrpm.data.loaders import TEST, digits, pixel_loader

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason="needs MNIST and CIFAR-10 in shared/data beside the repository")

CLASSES = ("ant", "bee", "cow10", "cow9")  # timm numbers cow9 before cow10
SIZE = (3, 8, 8)


def read(loader):
    pixels, labels = zip(*loader, strict=True)
    return torch.cat(pixels), torch.cat(labels)


@pytest.fixture
def drawn():
    """Images `[N, 8, 8, 3]` and labels, three of each class."""
    return np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), np.arange(12) // 3


def write(root, pixels, labels, split=""):
    names = sorted(CLASSES, key=lambda c: (c[:3], len(c)))
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = root / split / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return root / split


def packed(folder, target):
    with tarfile.open(target, "w") as tar:
        for item in sorted(folder.iterdir()):
            tar.add(item, arcname=item.name)
    return target


@pytest.fixture
def places(tmp_path, drawn):
    """One dataset in all the ways in which it may lie on a disk, each with the split that finds it."""
    pixels, labels = drawn
    half = pixels[::-1].copy()
    folder = write(tmp_path / "plain", pixels, labels)
    (tmp_path / "tars").mkdir()
    (tmp_path / "halves").mkdir()
    write(tmp_path / "both", pixels, labels, "training")
    write(tmp_path / "both", half, labels, "test")
    packed(folder, tmp_path / "tars" / "train.tar")
    packed(tmp_path / "both" / "test", tmp_path / "tars" / "test.tar")
    for name in CLASSES:  # a tar of tars
        packed(folder / name, tmp_path / "halves" / f"{name}.tar")
    packed(tmp_path / "halves", tmp_path / "nested.tar")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("name", "root", "split", "reverse"),
    [
        ("folder", "plain", "train", False),
        ("", "plain", "any", False),
        ("torch/folder", "both", "test", True),
        ("folder", "both", "train", False),
        ("Folder", "both", "test", True),
        ("tar", "tars/train.tar", "train", False),
        ("", "tars", "training", False),
        ("tar", "tars", "test", True),
        ("tar", "nested.tar", "train", False),
    ],
)
def test_class_folders_and_tars(places, drawn, name, root, split, reverse, workers):
    loader = pixel_loader(name, places / root, split=split, input_size=SIZE, batch_size=5, workers=workers)
    pixels, labels = read(loader)
    expected = drawn[0][::-1] if reverse else drawn[0]
    if name == "torch/folder":  # torchvision sorts cow10 before cow9
        expected = expected[[0, 1, 2, 3, 4, 5, 9, 10, 11, 6, 7, 8]]
    assert pixels.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(pixels, torch.from_numpy(expected.transpose(0, 3, 1, 2).astype(np.float32) / 255))
    assert labels.tolist() == drawn[1].tolist()


def test_digits_are_split_once():
    (train, _), (test, _) = digits("train"), digits("test")
    assert train.shape == (1797 - TEST, 1, 8, 8)
    assert test.shape == (TEST, 1, 8, 8)
    assert float(train.min()) == 0
    assert float(train.max()) == 1


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [None, (1, 8, 8), (3, 8, 8)])
def test_the_loader_of_the_digits_gives_them_as_they_are(split, size):
    pixels, labels = read(pixel_loader(split=split, input_size=size, workers=2, batch_size=500))
    expected = digits(split)
    assert torch.equal(pixels, expected[0].expand_as(pixels))
    assert torch.equal(labels, expected[1])


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        (("resnet8_digits", {}), (1, 8, 8)),
        (("mlp3_mnist", {}), (1, 28, 28)),
        (("resnet18", {}), (3, 224, 224)),
        (("resnet18", {"in_chans": 1}), (1, 224, 224)),
        (("vit_tiny_patch16_224", {"img_size": 64}), (3, 64, 64)),  # as built, not as published
    ],
)
def test_images_get_what_the_model_takes(places, arguments, shape):
    for name, root, classes in (("digits", None, 10), ("folder", places / "plain", 4)):
        with torch.device("meta"):
            model = timm.create_model(arguments[0], **arguments[1], num_classes=classes)
        for augment in (False, True):
            pixels, _ = next(iter(pixel_loader(name, root, model=model, batch_size=8, augment=augment)))
            assert pixels.shape == (8, *shape)
            assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1


def test_an_image_of_another_size_is_preprocessed_as_timm_does(places):
    model = timm.create_model("resnet18", num_classes=4)
    config = timm.data.resolve_model_data_config(model) | {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    image = Image.open(sorted((places / "plain" / "ant").iterdir())[0])
    expected = timm.data.create_transform(**config)(image)
    assert torch.equal(pixel_loader("folder", places / "plain", model=model).dataset[0][0], expected)


def test_an_image_of_the_models_size_is_never_cropped(tmp_path):
    """resnet18 would scale 224 to 235 and crop."""
    (tmp_path / "a").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a" / "0.png")
    pixels, _ = read(pixel_loader("folder", tmp_path, model=timm.create_model("resnet18", num_classes=1)))
    assert torch.equal(pixels[0], torch.from_numpy(noise).permute(2, 0, 1).float() / 255)


def test_training_shuffles_anew_each_epoch_and_follows_the_seed():
    def epochs(**options):
        loader = pixel_loader(split="test", training=True, **options)
        return [read(loader)[1].tolist() for _ in range(2)]

    first, second = epochs()
    assert first != second != digits("test")[1].tolist()
    assert sorted(first) == sorted(second) == sorted(digits("test")[1].tolist())
    assert epochs() == [first, second] != epochs(seed=1)


def test_samples_are_the_same_for_a_seed_and_nested():
    def some(count, **options):
        return read(pixel_loader(samples=count, **options))[0]

    many = some(300)
    assert torch.equal(some(300), many)
    assert torch.equal(some(20), many[:20])
    assert not torch.equal(some(20, seed=1), many[:20])
    assert len(torch.unique(many.flatten(1), dim=0)) > 290  # drawn without replacement; a digit or two may be alike
    assert torch.equal(some(300, training=True).flatten(1).sum(1).sort()[0], many.flatten(1).sum(1).sort()[0])


def test_the_first_images_are_those_of_the_split_in_their_order():
    pixels, labels = read(pixel_loader(split="test", first=30, batch_size=7))
    expected = digits("test")
    assert torch.equal(pixels, expected[0][:30])
    assert torch.equal(labels, expected[1][:30])


def test_augmented_images_are_crops_and_mirrored_only_if_asked(tmp_path):
    """On a ramp that rises from left to right."""
    (tmp_path / "a").mkdir()
    ramp = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))
    Image.fromarray(ramp).save(tmp_path / "a" / "0.png")

    def rises(hflip):
        dataset = pixel_loader("folder", tmp_path, input_size=(1, 32, 32), augment=True, hflip=hflip).dataset
        images = torch.stack([dataset[0][0] for _ in range(20)])
        assert len(images.unique(dim=0)) > 1
        return (images[..., 0] < images[..., -1]).all(-1).float().mean().item()

    assert rises(0.0) == 1
    assert rises(1.0) == 0
    assert 0 < rises(0.5) < 1


def test_drop_last():
    assert [len(labels) for _, labels in pixel_loader(split="test", batch_size=100, drop_last=True)] == [100] * 3
    assert [len(labels) for _, labels in pixel_loader(split="test", batch_size=100)] == [100] * 3 + [60]


@pytest.mark.parametrize(
    ("name", "root", "options", "error", "message"),
    [
        ("wds/x", "plain", {}, ValueError, "'wds/x' is a stream: its images can be neither shuffled .* 'torch/NAME'"),
        ("HFIDS/x", None, {}, ValueError, "is a stream"),
        ("tfds/mnist", None, {}, ValueError, "is a stream"),
        ("cifar10", "plain", {}, ValueError, "Unknown dataset 'cifar10'. There are: 'digits'"),
        ("torch/nope", "plain", {}, ValueError, "'torch/nope' finds nothing .*Unknown torchvision dataset nope"),
        ("torch/mnist", "plain", {}, ValueError, "Dataset not found.*MNIST/raw, or download=True"),
        ("torch/mnist", "plain", {"split": "tset"}, ValueError, "split='tset': 'torch/mnist' has 'train' and 'test'"),
        ("tar", None, {}, ValueError, "'tar' needs root=. Give"),
        ("tar", "nope.tar", {}, FileNotFoundError, "nope.tar' does not exist. Give"),
        ("folder", "nothing", {}, ValueError, "'folder' finds nothing .*Found 0 images"),
        ("tar", "nothing.tar", {}, ValueError, "'tar' finds nothing to read"),
        ("tar", "cut.tar", {}, ValueError, "'tar' finds nothing to read"),
        ("folder", "both", {"split": "val"}, ValueError, "split='val' is not in .*both, which holds test, training"),
        ("tar", "tars", {"split": "val"}, ValueError, "which holds test.tar, train.tar"),
        ("digits", None, {"split": "val"}, ValueError, "split='val': the digits have 'train' and 'test'"),
        ("digits", None, {"samples": 1438}, ValueError, "samples=1438, and split='train' of 'digits' holds 1437"),
        ("digits", None, {"samples": 0}, ValueError, "samples=0: give a number of images of at least 1"),
        ("digits", None, {"first": 1438}, ValueError, "first=1438, and split='train' of 'digits' holds 1437"),
        ("digits", None, {"first": 0}, ValueError, "first=0: give a number of images of at least 1"),
        ("digits", None, {"first": 5, "samples": 6}, ValueError, "samples=6 and first=5: give one of them"),
        ("digits", None, {"batch_size": 0}, ValueError, "batch_size=0 is not allowed: give an integer >= 1"),
        ("digits", None, {"workers": -1}, ValueError, "workers=-1 is not allowed: give an integer >= 0"),
        (
            "digits",
            None,
            {"hflip": 2, "augment": True},
            ValueError,
            "hflip=2 is not allowed: give a number from 0 to 1",
        ),
        ("digits", None, {"hflip": 0.5}, ValueError, "hflip=0.5 without augment=True"),
        ("digits", None, {"input_size": (4, 8, 8)}, ValueError, r"input_size=\(4, 8, 8\): images are"),
        ("digits", None, {"drop_last": True, "batch_size": 2000}, ValueError, "batch_size=2000 with drop_last=True"),
        ("folder", "plain", {"input_size": None}, ValueError, "The size of the images is not known"),
    ],
)
def test_one_clear_error(places, name, root, options, error, message):
    (places / "nothing").mkdir()
    packed(places / "nothing", places / "nothing.tar")
    (places / "cut.tar").write_bytes((places / "tars" / "train.tar").read_bytes()[:100])
    with pytest.raises(error, match=message):
        pixel_loader(name, None if root is None else places / root, **{"input_size": SIZE, **options})


def test_a_model_that_does_not_say_its_size(net):
    with pytest.raises(ValueError, match=r"give input_size=.*which SmallNet is not"):
        pixel_loader(model=net)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    with pytest.raises(ImportError, match=r"'hfds/x' finds nothing .*pip install datasets"):
        pixel_loader("hfds/x", input_size=SIZE)


def test_a_dataset_of_the_hub(tmp_path, drawn):
    pytest.importorskip("datasets", reason="needs the package datasets")
    write(tmp_path / "data", *drawn, "train")
    pixels, labels = read(pixel_loader(f"hfds/{tmp_path / 'data'}", tmp_path / "cache", input_size=SIZE, workers=2))
    assert len(torch.unique(labels)) == len(CLASSES)
    assert pixels.sum().item() == pytest.approx(drawn[0].sum() / 255, rel=1e-5)


@real
@pytest.mark.parametrize(("split", "file"), [("train", "train"), ("test", "t10k")])
def test_mnist(split, file):
    raw = SHARED / "MNIST" / "raw"
    expected = np.fromfile(raw / f"{file}-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 1, 28, 28)
    labels = np.fromfile(raw / f"{file}-labels-idx1-ubyte", np.uint8)[8:]
    dataset = pixel_loader("torch/mnist", SHARED, split=split, model=timm.create_model("mlp3_mnist")).dataset
    assert len(dataset) == len(labels)
    for i in range(0, len(labels), 500):
        pixels, label = dataset[i]
        assert torch.equal(pixels, torch.from_numpy(expected[i]).float() / 255)
        assert label == labels[i]


@real
@pytest.mark.parametrize("split", [pytest.param("train", marks=pytest.mark.slow), "test"])
@pytest.mark.parametrize("whole", [True, False])
def test_cifar10(split, whole):
    """The tar itself, and the folder of both; a sample, spread over classes that the tar has one after the other."""
    tars = SHARED / "cifar10-jpeg"
    model = timm.create_model("resnet18_cifar_narrow")
    root = tars / f"{split}.tar" if whole else tars
    loader = pixel_loader("tar", root, split=split, model=model, samples=300, workers=2, batch_size=100)
    loader.dataset[0]  # a file left open here would be the workers' too, who then read at each other's place
    pixels, labels = read(loader)
    with tarfile.open(tars / f"{split}.tar") as tar:
        files = sorted((m for m in tar if m.isfile()), key=lambda m: m.name)
        classes = sorted({Path(m.name).parent.name for m in files})
        for image, label, number in zip(pixels, labels.tolist(), loader.dataset.indices, strict=True):
            stream = tar.extractfile(files[number])
            expected = np.asarray(Image.open(io.BytesIO(stream.read())).convert("RGB"))
            assert torch.equal(image, torch.from_numpy(expected.copy()).permute(2, 0, 1).float() / 255)
            assert classes[label] == Path(files[number].name).parent.name
    assert len(classes) == 10
    assert labels.bincount(minlength=10).min() >= 15
    assert len(loader.dataset.dataset) == {"train": 50_000, "test": 10_000}[split]


def test_svhn_as_torchvision_keeps_it(tmp_path, drawn, monkeypatch):
    """Generated images in the format of the dataset; its own files are known by their hashes."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    pixels, labels = np.random.default_rng(1).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8), np.arange(20) % 10
    content = {"X": pixels.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]}  # a 0 is a 10 there
    with pytest.raises(ValueError, match=r"finds nothing to read.*Give as root= the folder in which torchvision keeps"):
        pixel_loader("torch/svhn", tmp_path, split="test", input_size=(3, 32, 32))
    savemat(tmp_path / "test_32x32.mat", content)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    loader = pixel_loader("torch/svhn", tmp_path, split="validation", input_size=(3, 32, 32), batch_size=8)
    assert isinstance(loader.dataset, SVHN)
    images, targets = read(loader)
    assert np.array_equal((255 * images).round().byte().numpy().transpose(0, 2, 3, 1), pixels)
    assert targets.tolist() == labels.tolist()
    assert targets.dtype == torch.int64
    with pytest.raises(ValueError, match="has 'train' and 'test'"):
        pixel_loader("torch/svhn", tmp_path, split="extra", input_size=(3, 32, 32))
