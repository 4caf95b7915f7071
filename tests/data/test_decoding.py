"""Files of every mode, against what was written into them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from timm_nrpm.data.loaders import pixel_loader

GREY = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
COLOUR = np.random.default_rng(1).integers(0, 256, (8, 8, 4), dtype=np.uint8)
ALPHA = COLOUR[..., 3:].astype(np.float64) / 255
OVER_WHITE = (COLOUR[..., :3] * ALPHA + 255 * (1 - ALPHA)) / 255


@pytest.fixture
def loaded(tmp_path):
    """Pixels of the one image that `save` writes, read from a class folder."""

    def read(save, channels=3, name="folder", kind="png", size=8):
        (tmp_path / "cat").mkdir()
        save(tmp_path / "cat" / f"0.{kind}")
        pixels, _ = pixel_loader(name, tmp_path, input_size=(channels, size, size)).dataset[0]
        assert pixels.dtype == torch.float32
        return pixels

    return read


def rgb(pixels):
    return torch.from_numpy(np.asarray(pixels, np.float32)).permute(2, 0, 1)


@pytest.mark.parametrize("name", ["folder", "torch/folder"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grey_png_of_16_bits_keeps_them(loaded, channels, name):
    pixels = loaded(Image.fromarray(GREY).save, channels, name)
    expected = torch.from_numpy(GREY.astype(np.float64) / 65535)
    assert pixels.shape == (channels, 8, 8)
    assert torch.allclose(pixels.double(), expected.expand(channels, 8, 8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_every_mode_of_16_bits(loaded, mode, monkeypatch):
    """As TIFF, which timm reads once it is told the ending."""
    monkeypatch.setattr("timm.data.readers.img_extensions._IMG_EXTENSIONS_SET", {".tif"})
    image = {
        "I;16": Image.fromarray(GREY),
        "I;16B": Image.frombytes("I;16B", (8, 8), GREY.astype(">u2").tobytes()),
        "I": Image.fromarray(GREY.astype(np.int32)),
    }[mode]

    def save(path):
        image.save(path)
        assert Image.open(path).mode == mode

    assert torch.equal(loaded(save, 1, kind="tif"), torch.from_numpy(GREY.astype(np.float32) / 65535).unsqueeze(0))


def test_a_16_bit_ramp_is_resized_without_steps_or_overshoot(loaded):
    """A thousandth of the range, which 8 bits cannot tell from black."""
    ramp = np.tile(np.linspace(0, 66, 64).astype(np.uint16), (64, 1))
    pixels = loaded(Image.fromarray(ramp).save, 1)
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 66 / 65535
    assert len(pixels[0, 0].unique()) == 8
    assert torch.equal(pixels[0, 0], pixels[0, 0].sort()[0])


def test_floating_point_images_are_taken_as_they_are(loaded, monkeypatch):
    monkeypatch.setattr("timm.data.readers.img_extensions._IMG_EXTENSIONS_SET", {".tif"})
    values = np.random.default_rng(0).random((8, 8), dtype=np.float32)
    assert torch.equal(loaded(Image.fromarray(values).save, 1, kind="tif"), torch.from_numpy(values).unsqueeze(0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((8, 8), 200.0, np.float32), "mode 'F' has values from 200 to 200, .* 1 as white"),
        (np.full((8, 8), np.nan, np.float32), "mode 'F' has values from nan"),
        (np.full((8, 8), -1, np.int32), "mode 'I' has values from -1 to -1, .* 65535 as white"),
        (np.full((8, 8), 70000, np.int32), "save it with 8 or 16 bits"),
    ],
)
def test_a_range_that_nobody_knows_is_refused(loaded, monkeypatch, values, message):
    monkeypatch.setattr("timm.data.readers.img_extensions._IMG_EXTENSIONS_SET", {".tif"})
    with pytest.raises(ValueError, match=message):
        loaded(Image.fromarray(values).save, kind="tif")


@pytest.mark.parametrize("name", ["folder", "torch/folder"])
def test_alpha_lies_on_white(loaded, name):
    pixels = loaded(Image.fromarray(COLOUR).save, 3, name)
    assert (pixels - rgb(OVER_WHITE)).abs().max() <= 1 / 255
    assert (pixels - rgb(COLOUR[..., :3] / 255)).abs().max() > 0.5  # which dropping alpha would give


def test_hidden_colours_stay_hidden_and_opaque_ones_are_exact(loaded):
    image = COLOUR.copy()
    image[..., 3] = np.where(np.arange(64).reshape(8, 8) % 2, 255, 0)
    pixels = loaded(Image.fromarray(image).save)
    assert torch.equal(pixels, rgb(np.where(image[..., 3:] == 255, image[..., :3], 255)) / 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_with_alpha(loaded, channels):
    pixels = loaded(Image.fromarray(COLOUR[..., [0, 3]], "LA").save, channels)
    expected = torch.from_numpy(OVER_WHITE[..., 0]).float()
    assert (pixels - expected).abs().max() <= 1 / 255


def test_transparent_colours_of_palettes_and_of_plain_images(loaded, tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(0, (0, 0, 4, 8))
    pixels = loaded(lambda path: image.save(path, transparency=0))  # the red half is not there
    expected = torch.zeros(3, 8, 8)
    expected[:, :, :4], expected[1, :, 4:] = 1, 1
    assert torch.equal(pixels, expected)
    for mode, colour, key, shape in (("RGB", (9, 8, 7), (9, 8, 7), 3), ("L", 9, 9, 1)):
        Image.new(mode, (8, 8), colour).save(tmp_path / "cat" / "0.png", transparency=key)
        assert (pixel_loader("folder", tmp_path, input_size=(shape, 8, 8)).dataset[0][0] == 1).all()
    deep = Image.fromarray(np.where(np.eye(8) > 0, 700, 65535 // 5).astype(np.uint16))
    deep.save(tmp_path / "cat" / "0.png", transparency=700)
    pixels, _ = pixel_loader("folder", tmp_path, input_size=(1, 8, 8)).dataset[0]
    assert torch.allclose(pixels[0], torch.where(torch.eye(8) > 0, 1.0, 0.2))


def test_a_palette_without_transparency_and_one_bit(loaded, tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert torch.equal(loaded(image.save), torch.tensor([0.0, 0, 1]).view(3, 1, 1).expand(3, 8, 8))
    bits = np.random.default_rng(0).integers(0, 2, (8, 8)).astype(bool)
    Image.fromarray(bits).save(tmp_path / "cat" / "0.png")
    pixels, _ = pixel_loader("folder", tmp_path, input_size=(1, 8, 8)).dataset[0]
    assert torch.equal(pixels[0], torch.from_numpy(bits).float())


def test_cmyk_is_colour(loaded):
    pixels = loaded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save, kind="jpg")
    assert (pixels - torch.tensor([1.0, 0, 0]).view(3, 1, 1)).abs().max() < 0.02


def test_photographs_stand_upright(loaded):
    """Orientation 6: the camera was turned, so that the left edge of the file is the top of the scene."""
    sideways = np.zeros((8, 8, 3), np.uint8)
    sideways[:, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    pixels = loaded(lambda path: Image.fromarray(sideways).save(path, exif=exif))
    assert torch.equal(pixels, rgb(np.rot90(sideways, -1) / 255))
    assert (pixels[:, 0] == 1).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("data", [b"Exif\0\0MM\0*nonsense", b"Exif\0\0nonsense"])
def test_broken_exif_data_are_no_reason_to_fail(loaded, data):
    image = Image.fromarray(COLOUR[..., :3])
    pixels = loaded(lambda path: image.save(path, exif=data))
    assert torch.equal(pixels, rgb(COLOUR[..., :3] / 255))


def test_an_image_that_cannot_be_decoded_gives_way_to_the_next(tmp_path, caplog):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"nothing")
    with io.BytesIO() as file:
        Image.fromarray(COLOUR[..., :3]).save(file, "png")
        (tmp_path / "cat" / "1.png").write_bytes(file.getvalue()[:100])  # cut short
        (tmp_path / "cat" / "2.png").write_bytes(file.getvalue())
    dataset = pixel_loader("folder", tmp_path, input_size=(3, 8, 8)).dataset
    assert all(torch.equal(dataset[i][0], rgb(COLOUR[..., :3] / 255)) for i in range(3))
    assert "Skipped image 1" in caplog.text
    (tmp_path / "cat" / "2.png").unlink()
    with pytest.raises(RuntimeError, match="10 images in a row cannot be decoded"):
        dataset = pixel_loader("folder", tmp_path, input_size=(3, 8, 8)).dataset[0]
