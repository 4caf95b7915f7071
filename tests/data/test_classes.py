"""Labels of class folders: the same in every split, and the model's; or one clear refusal."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn

from timm_nrpm.data.loaders import pixel_loader
from timm_nrpm.nn.pixel_model import PixelModel

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SIZE = {"input_size": (3, 8, 8)}


def write(root, *folders, count=1):
    """Images in each folder, and the folders alone where `count` is 0."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(root / folder / f"{i}.png")
    return root


def packed(folder):
    """The folder as a tar beside it, instead of it."""
    with tarfile.open(f"{folder}.tar", "w") as tar:
        tar.add(folder, arcname=".")
    shutil.rmtree(folder)


def found(name, root, **options):
    """Name of the class folder and label of each image."""
    dataset = pixel_loader(name, root, **{**SIZE, **options}).dataset
    if name.startswith("torch"):
        return {Path(path).parent.name: dataset[i][1] for i, (path, _) in enumerate(dataset.samples)}
    return {Path(name).parent.name: dataset[i][1] for i, name in enumerate(dataset.filenames())}


def model(classes, name="resnet18", **options):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=classes, **options)


@pytest.mark.parametrize("name", ["folder", "torch/folder", "tar"])
@pytest.mark.parametrize("empty", [True, False])
def test_a_class_without_images_in_a_split_changes_no_label(tmp_path, name, empty):
    write(tmp_path, "train/a", "train/b", "train/d", "test/a", "test/c", "test/d")
    if empty:
        write(tmp_path, "test/b", count=0)
    if name == "tar":
        packed(tmp_path / "train")
        packed(tmp_path / "test")
    assert found(name, tmp_path, split="train") == {"a": 0, "b": 1, "d": 3}
    assert found(name, tmp_path, split="test") == {"a": 0, "c": 2, "d": 3}
    assert found(name, tmp_path, split="test", model=model(4)) == {"a": 0, "c": 2, "d": 3}


def test_splits_of_both_kinds_and_of_any_name_count(tmp_path):
    write(tmp_path, "fold1/a", "fold1/c", "fold2/b", "fold2/c", "validation/d")
    packed(tmp_path / "fold2")
    assert found("folder", tmp_path, split="fold1") == {"a": 0, "c": 2}
    assert found("folder", tmp_path, split="fold2") == {"b": 1, "c": 2}
    assert found("folder", tmp_path, split="val") == {"d": 0}  # fold1 and fold2 have none of its classes


def test_what_is_no_split_does_not_count(tmp_path):
    write(tmp_path, "train/b", "test/b", "figures/a", ".cache/a", "train/.ipynb_checkpoints")
    write(tmp_path, ".", "b/.a")
    assert found("folder", tmp_path, split="test") == {"b": 0}
    assert found("torch/folder", tmp_path, split="train") == {"b": 0}


def test_a_split_alone_is_numbered_by_itself(tmp_path):
    write(tmp_path, "train/a", "train/b", "test/b", "test/c")
    assert found("folder", tmp_path / "test") == {"b": 0, "c": 1}
    packed(tmp_path / "test")
    assert found("tar", tmp_path / "test.tar") == {"b": 0, "c": 1}


def test_an_empty_class_folder_is_a_class(tmp_path):
    write(tmp_path, "a", "c")
    write(tmp_path, "b", count=0)
    assert found("folder", tmp_path) == found("torch/folder", tmp_path) == {"a": 0, "c": 2}


def test_a_class_may_be_called_like_a_split(tmp_path):
    write(tmp_path, "car", "plane", "train")
    assert found("folder", tmp_path, split="train") == {"car": 0, "plane": 1, "train": 2}


def test_numbers_and_words_are_sorted_as_timm_and_torchvision_do(tmp_path):
    write(tmp_path, *(f"test/c{i}" for i in range(11)), "train/c0")
    assert found("folder", tmp_path, split="test") == {f"c{i}": i for i in range(11)}
    expected = {name: label for label, name in enumerate(sorted(f"c{i}" for i in range(11)))}
    assert found("torch/folder", tmp_path, split="test") == expected


@pytest.mark.parametrize("name", ["folder", "tar"])
def test_images_without_a_class(tmp_path, name):
    """Beside class folders they are refused; alone they have no label, for calibration."""
    write(tmp_path / "mixed", "a", ".")
    write(tmp_path / "alone", ".", count=3)
    if name == "tar":
        packed(tmp_path / "mixed")
        packed(tmp_path / "alone")
    end = ".tar" if name == "tar" else ""
    with pytest.raises(ValueError, match=r"Some images in .*mixed.* lie beside the class folders \(a\)"):
        pixel_loader(name, tmp_path / f"mixed{end}", **SIZE)
    for options in ({}, {"model": model(1000)}, {"model": model(0)}):
        _, labels = next(iter(pixel_loader(name, tmp_path / f"alone{end}", **SIZE, **options)))
        assert labels.tolist() == [-1, -1, -1]


def test_unlabelled_splits(tmp_path):
    write(tmp_path, "train", "test")
    assert found("folder", tmp_path, split="test") == {"": -1}


SYNSETS = ImageNetInfo().label_names()


@pytest.mark.parametrize("name", ["folder", "torch/folder", "tar"])
@pytest.mark.parametrize(
    ("folders", "classes", "expected"),
    [
        (("0001", "0340", "0999"), 1000, [1, 340, 999]),
        (("3", "12", "7"), 20, [3, 12, 7]),
        ((SYNSETS[7], SYNSETS[999], SYNSETS[0]), 1000, [7, 999, 0]),
        (("n02119789", "n02100735"), 21843, None),  # by name where positions are not sorted
        (("ant", "bee", "cow9", "cow10"), 4, [0, 1, 2, 3]),
        (("1", "2", "3"), 3, [0, 1, 2]),  # counted from 1, and as many as the model has
    ],
)
def test_labels_are_the_models_classes(tmp_path, name, folders, classes, expected):
    write(tmp_path, *folders)
    if expected is None:
        expected = [ImageNetInfo("imagenet-21k-goog").label_names().index(folder) for folder in folders]
    if name == "torch/folder" and folders[0] == "ant":
        expected = [0, 1, 3, 2]  # torchvision sorts cow10 before cow9
    if name == "tar":
        packed(tmp_path)
        tmp_path = Path(f"{tmp_path}.tar")
    assert found(name, tmp_path, model=model(classes)) == dict(zip(folders, expected, strict=True))


def test_names_that_the_models_config_has(tmp_path):
    """In another order than the alphabet's, and not all of them."""
    net = model(3, pretrained_cfg_overlay={"label_names": ("dog", "cat", "ant")})
    write(tmp_path, "ant", "dog")
    assert found("folder", tmp_path, model=net) == {"ant": 2, "dog": 0}
    write(tmp_path, "cat")
    assert found("folder", tmp_path, model=net) == {"ant": 2, "cat": 1, "dog": 0}


def test_the_width_of_the_classifier_is_what_counts(tmp_path):
    """As of a model whose classifier was replaced by hand; wrappers are seen through."""
    net = model(1000)
    net.fc = nn.Linear(512, 2, device="meta")
    write(tmp_path, "a", "b")
    for wrapped in (net, nn.DataParallel(net), PixelModel(net, (0.5,), (0.5,))):
        assert found("folder", tmp_path, model=wrapped) == {"a": 0, "b": 1}


def test_a_model_that_does_not_say_is_believed(tmp_path, net):
    write(tmp_path, "a", "b")
    assert found("folder", tmp_path, model=net) == {"a": 0, "b": 1}


def test_folders_0_to_9_are_told_about(tmp_path):
    write(tmp_path, *map(str, range(10)))
    with pytest.warns(UserWarning, match=r"the folders 0 to 9, which are taken for classes 0 to 9 of the model's 1000"):
        labels = found("folder", tmp_path, model=model(1000))
    assert labels == {str(i): i for i in range(10)}


TEN = [f"class{i}" for i in range(10)]


@pytest.mark.parametrize(
    ("folders", "classes", "message"),
    [
        (TEN, 1000, r"has 10 classes \(class0, class1, class2, class3, ...\), and the model has 1000.* num_classes=10"),
        (["a"], 1000, r"has 1 class \(a\), and the model has 1000"),
        (TEN[:9], 10, r"has 9 classes .* the model has 10, .* the folder that holds all of its splits as root=, or "),
        (["0001", "1000"], 1000, "has 2 classes"),  # 1000 is no class index
        (["1", "01"], 1000, "has 2 classes"),  # twice the same
        (["0001", "cat"], 1000, "has 2 classes"),
        ([SYNSETS[3], "cat"], 1000, "has 2 classes"),
        ([SYNSETS[3], "n00000000"], 1000, "has 2 classes"),
        (SYNSETS[:2], 10, "has 2 classes"),
        (TEN, 0, "num_classes=0, so it gives features and no classes: build it with num_classes=10"),
    ],
)
@pytest.mark.parametrize("name", ["folder", "torch/folder"])
def test_other_classes_are_refused(tmp_path, name, folders, classes, message):
    write(tmp_path, *folders)
    with pytest.raises(ValueError, match=message):
        pixel_loader(name, tmp_path, model=model(classes))


def test_datasets_that_know_their_number_are_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr("timm_nrpm.data.readers.SVHN", lambda *_: None)
    for classes, message in ((1000, "has 10 classes, and the model has 1000"), (0, "gives features and no classes")):
        for name in ("digits", "torch/svhn"):
            with pytest.raises(ValueError, match=message):
                pixel_loader(name, tmp_path, model=model(classes))


@pytest.mark.skipif(not SHARED.exists(), reason="needs MNIST in shared/data beside the repository")
def test_torchvisions_datasets_are_refused_too():
    with pytest.raises(ValueError, match=r"'torch/mnist' in root=.* has 10 classes, and the model has 7"):
        pixel_loader("torch/mnist", SHARED, model=model(7))


def test_datasets_of_the_hub(tmp_path):
    pytest.importorskip("datasets", reason="needs the package datasets")
    write(tmp_path / "data", "train/cow9", "train/ant", "train/bee")
    name, options = f"hfds/{tmp_path / 'data'}", {"root": tmp_path / "cache", **SIZE}
    with pytest.raises(ValueError, match=r"has 3 classes \(ant, bee, cow9\), and the model has 1000"):
        pixel_loader(name, model=model(1000), **options)
    given = {"ant": 2, "bee": 0, "cow9": 1}
    dataset = pixel_loader(name, model=model(3), class_map=given, **options).dataset
    assert {Path(dataset.filename(i)).parent.name: dataset[i][1] for i in range(3)} == given


@pytest.mark.parametrize("kind", ["mapping", "json", "txt"])
@pytest.mark.parametrize("name", ["folder", "torch/folder", "tar"])
def test_a_class_map_decides(tmp_path, name, kind):
    root = write(tmp_path / "data", "train/ant", "train/bee", "test/bee", "test/0003")
    given = {"bee": 0, "ant": 1, "unseen": 2, "0003": 3}
    if kind == "json":
        (tmp_path / "map.json").write_text(json.dumps(given))
    if kind == "txt":
        (tmp_path / "map.txt").write_text("bee\nant\nunseen\n0003\n")
    if name == "tar":
        packed(root / "train")
        packed(root / "test")
    given = given if kind == "mapping" else tmp_path / f"map.{kind}"
    assert found(name, root, split="test", class_map=given, model=model(1000)) == {"bee": 0, "0003": 3}
    assert found(name, root, split="train", class_map=given) == {"bee": 0, "ant": 1}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"a": 0}, ValueError, "class_map has no label for b of 'folder' in root="),
        ({"a": 0, "b": 5}, ValueError, "label of 'b'=5 is not allowed: give an integer from 0 to 4, a class"),
        ({"a": 0, "b": -1}, ValueError, "label of 'b'=-1"),
        ({"a": 0, "b": "1"}, ValueError, "label of 'b'='1'"),
        ({"a": 0, "b": True}, ValueError, "label of 'b'=True"),
        ("map.pkl", ValueError, r"map.pkl' is neither .txt nor .json: give a .txt with one name per line"),
        ("nowhere.txt", FileNotFoundError, "nowhere.txt' does not exist"),
        ("twice.txt", ValueError, "has a name twice, or an empty line"),
        ("bad.json", ValueError, "is not valid JSON"),
        ("list.json", ValueError, "holds no JSON object"),
    ],
)
def test_a_wrong_class_map_is_refused(tmp_path, content, error, message):
    root = write(tmp_path / "data", "a", "b")
    (tmp_path / "map.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    given = content if isinstance(content, dict) else tmp_path / content
    with pytest.raises(error, match=message):
        pixel_loader("folder", root, model=model(5), class_map=given)


@pytest.mark.parametrize(("name", "root"), [("digits", None), ("torch/cifar10", ".")])
def test_a_class_map_where_it_has_no_effect(name, root):
    with pytest.raises(ValueError, match="class_map= gives labels to the classes of folders"):
        pixel_loader(name, root, class_map={"a": 0}, **SIZE)


@pytest.mark.parametrize("which", ["train", "test"])
def test_a_tar_that_cannot_be_read_is_no_split_to_pass_over(tmp_path, which):
    """Or classes would be numbered without it."""
    write(tmp_path, "train/a", "test/b")
    packed(tmp_path / "train")
    path = tmp_path / "train.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"'folder' finds nothing to read .*\(train.tar: "):
        pixel_loader("folder", tmp_path, split=which, **SIZE)


@pytest.mark.skipif(not SHARED.exists(), reason="needs photos in shared/data beside the repository")
def test_real_photos_on_an_imagenet_model():
    dataset = pixel_loader("folder", SHARED / "photos", model=model(1000, "tf_efficientnet_lite0")).dataset
    assert len(dataset) == 213
    labels = {
        Path(n).parent.name: label for n, (_, label) in zip(dataset.filenames(), dataset.reader.samples, strict=True)
    }
    assert len(labels) == 136
    assert all(int(name) == label for name, label in labels.items())
    assert dataset[0][0].shape == (3, 224, 224)
