import builtins

import pytest
import timm
import torch
import torch.nn as nn

from timm_nrpm import calibrate_, create_model
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.diagnostics import embedding_differences
from timm_nrpm.evaluation.landscape import loss_landscape
from timm_nrpm.figures.attacked import draw_attacked
from timm_nrpm.figures.diagnostics import _maps, _mosaic, draw_differences, draw_embeddings, draw_landscape
from timm_nrpm.models.registry import DIGITS


@pytest.fixture(scope="module")
def shown():
    """The bundled model, plain and reprogrammed, two images and what they look like attacked."""
    ours = create_model(DIGITS, pretrained=True, lam=0.5)
    calibrate_(ours, [digits("train")[0][:100]])
    pixels, labels = (t[:2] for t in digits("test"))
    generator = torch.Generator().manual_seed(0)
    noise = 0.15 * torch.randn(pixels.shape, generator=generator).sign()
    return {"plain": timm.create_model(DIGITS, pretrained=True), "ours": ours}, pixels, labels, noise


def picture(path):
    """Bytes of a picture that can be read, without the time in it."""
    data = path.read_bytes()
    if path.suffix == ".svg":
        assert b"<svg" in data
        return b"\n".join(line for line in data.splitlines() if b"dc:date" not in line)
    import matplotlib.image

    colours = matplotlib.image.imread(path)
    assert colours.std() > 0.01
    return colours.tobytes()


def drawings(shown, scale):
    models, pixels, labels, noise = shown
    attacked = (pixels + scale * noise).clamp(0, 1)
    differences = {name: embedding_differences(model, pixels, attacked) for name, model in models.items()}
    eps = 0.1 * scale
    landscapes = {n: loss_landscape(m, pixels, labels, eps=eps, resolution=5) for n, m in models.items()}
    one = {"plain": attacked[:1], "ours": pixels[:1]}
    return {
        "differences": lambda path: draw_differences(differences, path),
        "embeddings": lambda path: draw_embeddings(models, pixels[:1], one, path, ["conv1", "fc"]),
        "landscape": lambda path: draw_landscape(landscapes, path),
        "attacked": lambda path: draw_attacked(pixels, attacked, labels, labels.flip(0), path),
    }


@pytest.mark.parametrize("ending", ["png", pytest.param("SVG", marks=pytest.mark.slow)])
def test_pictures_show_what_they_are_given(shown, tmp_path, ending):
    import matplotlib

    before = matplotlib.get_backend()
    a, b = drawings(shown, 1.0), drawings(shown, 0.5)
    for name in a:
        paths = [tmp_path / f"{name}{i}.{ending}" for i in range(2)]
        assert a[name](paths[0]) == paths[0]
        b[name](str(paths[1]))
        first, second = (picture(path.rename(path.with_suffix(f".{ending.lower()}"))) for path in paths)
        assert first != second, name
    assert matplotlib.get_backend() == before


@pytest.mark.slow
def test_pictures_of_other_kinds(shown, tmp_path, net):
    models, pixels, labels, noise = shown
    attacked = (pixels + noise).clamp(0, 1)
    colours = pixels.expand(-1, 3, -1, -1)
    draw_attacked(colours, colours.flip(0), labels, labels, tmp_path / "rgb.png", [f"class {i}" for i in range(10)])
    draw_attacked(pixels, pixels, labels, labels, tmp_path / "same.png")
    draw_embeddings(models, pixels[:1], attacked[:1], tmp_path / "all.png", channels=1)
    tokens = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4)
    image = torch.rand(1, 3, 32, 32)
    draw_embeddings({"vit": tokens}, image, image.flip(3), tmp_path / "vit.png")
    assert len(list(tmp_path.iterdir())) == 4


def test_maps_and_mosaics():
    vector = _maps(torch.arange(20.0)[None], last=True)
    assert vector.shape == (1, 2, 16)
    assert vector[0, 1, 3] == 19
    assert vector[0, 1, 4:].isnan().all()
    tokens = torch.arange(6.0).view(1, 3, 2)
    assert _maps(tokens, last=False).squeeze(1).tolist() == [[0, 2, 4], [1, 3, 5]]
    assert _maps(torch.zeros(1, 4, 4, 8), last=True).shape == (8, 4, 4)
    assert _maps(torch.zeros(1, 8, 4, 5), last=False).shape == (8, 4, 5)
    board = _mosaic(torch.arange(3.0).view(3, 1, 1).expand(3, 32, 32))
    assert board.shape == (66, 66)
    assert (board[0, 0], board[0, 65], board[65, 0]) == (0, 1, 2)
    assert board[33:, 34:].isnan().all()
    assert board[32].isnan().all()


def test_bad_pictures(shown, tmp_path, net, monkeypatch):
    models, pixels, labels, _ = shown
    one = pixels[:1]
    found = embedding_differences(models["plain"], one, one)
    path = tmp_path / "a.png"
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for call, message in [
        (lambda: draw_attacked(pixels, pixels, labels, labels, "a.pdf"), "must end in .png or .svg"),
        (lambda: draw_landscape({}, path), "landscapes is empty"),
        (lambda: draw_differences({}, path), "differences is empty"),
        (lambda: draw_differences({"a": found}, path, "L7"), "norm='L7'"),
        (lambda: draw_differences({"a": found}, path, side="both"), "side='both'"),
        (lambda: draw_differences({"a": found, "b": embedding_differences(other, one, one)}, path), "a, b have no"),
        (lambda: draw_embeddings({}, one, one, path), "models is empty"),
        (lambda: draw_embeddings(models, pixels, pixels, path), "are 2 images: give one"),
        (lambda: draw_embeddings(models, one, {"plain": one}, path), "give the same names"),
        (lambda: draw_embeddings(models, one, one, path, channels=0), "channels=0"),
        (lambda: draw_embeddings({**models, "b": other}, one, one, path), "no layer in common"),
        (
            lambda: draw_embeddings(
                {"a": other, "b": nn.Sequential(nn.Flatten(), nn.Linear(64, 40))}, one, one, path, "1"
            ),
            r"output of 1 is \[1, 1, 10\] in a and \[1, 3, 16\] in b",
        ),
        (
            lambda: draw_attacked(pixels, pixels, labels, labels + 9, path, ["zero"] * 10),
            "predictions go up to .*, and there are 10 names",
        ),
        (lambda: draw_attacked(pixels, pixels, labels, torch.eye(2), path), r"predictions are \[2, 2\].*argmax"),
        (lambda: draw_attacked(*[torch.zeros(1, 2, 4, 4)] * 2, labels[:1], labels[:1], path), "2 channels"),
        (lambda: draw_attacked(*[torch.zeros(65, 1, 2, 2)] * 2, *[torch.arange(65)] * 2, path), "at most 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'timm_nrpm\[demo\]'"):
        draw_differences({"a": found}, path)
    assert not path.exists()
