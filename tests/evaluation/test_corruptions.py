"""Corruptions against NumPy and the library itself, and what models say of them."""

import random
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import timm_nrpm
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation import corruptions
from timm_nrpm.evaluation.corruption_report import CorruptionReport
from timm_nrpm.evaluation.corruptions import (
    CORRUPTIONS,
    EXTRA,
    IMAGENET_C,
    LEVELS,
    LIBRARY,
    NATIVE,
    SEVERITIES,
    SMALLEST,
    corrupt,
    evaluate_corruptions,
)
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.nn.pixel_model import PixelModel

try:
    HERE, reason = corruptions._library() is not None, ""
except ImportError as error:  # not installed, or its OpenCV needs what this machine lacks
    HERE, reason = False, str(error)
library = pytest.mark.skipif(not HERE, reason=reason)
OF_LIBRARY = (*IMAGENET_C, *EXTRA)
USABLE = CORRUPTIONS if HERE else NATIVE


def scene(count=1, channels=3, height=32, width=32):
    """Smooth images with an edge, no two alike and nowhere grey."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    planes = [
        (0.5 + 0.4 * torch.sin(5 * y + c + i) * torch.cos(4 * x - c)) for i in range(count) for c in range(channels)
    ]
    pixels = torch.stack(planes).view(count, channels, height, width)
    pixels[..., width // 3 :] *= 0.7
    return pixels


def test_the_names():
    assert len(IMAGENET_C) == 15
    assert len(set(CORRUPTIONS)) == len(CORRUPTIONS) == 22
    assert set(SMALLEST) == set(CORRUPTIONS)


# --- What is ours, against NumPy ---


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_white_noise_has_its_deviation(severity, channels):
    deviation = LEVELS["white_noise"][severity - 1]
    noise = np.random.default_rng(7).standard_normal(10**6)
    for grey in (0.5, 0.9):
        got = corrupt(torch.full((2, channels, 200, 200), grey), "white_noise", severity).double().numpy()
        want = np.clip(grey + deviation * noise, 0, 1)
        assert got.mean() == pytest.approx(want.mean(), abs=0.003)
        assert got.std() == pytest.approx(want.std(), rel=0.02)
        for other in (got[:, :, 1:] - grey, got[:, :, :, 1:] - grey):  # white: neighbours know nothing of each other
            same = got[:, :, : other.shape[2], : other.shape[3]] - grey
            assert abs(np.corrcoef(same.ravel(), other.ravel())[0, 1]) < 0.02
    if channels == 3:
        assert abs(np.corrcoef(got[0, 0].ravel(), got[0, 1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (3, 5, 11), (1, 1, 1)])
def test_shares_of_pixels_are_exact(severity, shape):
    pixels = scene(4, *shape).clamp(0.1, 0.9)
    count = shape[1] * shape[2]
    for kind in ("missing_pixels", "salt_and_pepper"):
        got = corrupt(pixels, kind, severity).numpy()
        hit = round(LEVELS[kind][severity - 1] * count)
        white = hit // 2 if kind == "salt_and_pepper" else 0
        for image, before in zip(got, pixels.numpy(), strict=True):
            whole = [(image == value).all(0) for value in (0, 1)]  # all channels of a pixel
            assert [mask.sum() for mask in whole] == [hit - white, white]
            untouched = ~(whole[0] | whole[1])
            assert (image[:, untouched] == before[:, untouched]).all()


def test_any_pixel_may_be_missing_or_white():
    for kind, value in (("missing_pixels", 0), ("salt_and_pepper", 0), ("salt_and_pepper", 1)):
        got = corrupt(torch.full((400, 1, 4, 4), 0.5), kind, 5)
        share = (got == value).double().mean(0).numpy()
        assert share.min() > 0
        assert share.max() < 3 * share.mean()


# --- What is the library's, against the library ---


@library
@pytest.mark.parametrize("kind", OF_LIBRARY)
def test_the_library_made_them(kind):
    """Same bits as its own `corrupt`, given the same random numbers."""
    import zlib

    import imagecorruptions

    pixels = scene()  # not of 8 bits: rounded before
    image = (pixels[0] * 255).round().byte().permute(1, 2, 0).numpy()
    state = np.random.get_state()
    for severity in (1, 4):
        words = np.random.SeedSequence((3, zlib.crc32(kind.encode()), severity, 11)).generate_state(4)
        np.random.seed(words)
        seed = {"seed": int(words[0])} if kind in ("impulse_noise", "glass_blur") else {}
        want = imagecorruptions.corrupt(image, severity, kind, **seed)
        got = corrupt(pixels, kind, severity, seed=3, first=11)
        np.testing.assert_array_equal((got[0] * 255).round().byte().permute(1, 2, 0).numpy(), want)
    np.random.set_state(state)


@library
@pytest.mark.parametrize("kind", ["gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"])
def test_noise_on_grey_is_as_strong_as_on_colours(kind):
    """The mean of three channels would have less of it by a factor of 1.73, and grey where there is salt."""
    grey = torch.full((4, 1, 64, 64), 0.5)
    one, three = corrupt(grey, kind, 2), corrupt(grey.expand(-1, 3, -1, -1), kind, 2)
    assert one.std().item() == pytest.approx(three.std().item(), rel=0.05)


@library
@pytest.mark.parametrize("kind", [k for k in OF_LIBRARY if not k.endswith("_noise")])
def test_grey_is_the_mean_of_equal_channels(kind):
    grey = scene(2, 1)
    want = corrupt(grey.expand(-1, 3, -1, -1), kind, 4).double().mean(1, keepdim=True)
    torch.testing.assert_close(corrupt(grey, kind, 4).double(), want, atol=1e-6, rtol=0)


@library
def test_an_image_that_no_splash_hits_stays_as_it_is():
    pixels = torch.full((120, 3, 16, 16), 128 / 255)
    got = corrupt(pixels, "spatter", 1)
    assert got.isfinite().all()
    same = (got == pixels).flatten(1).all(1)
    assert 0 < same.sum() < 60


@library
@pytest.mark.parametrize(
    "kind", ["gaussian_noise", "contrast", "brightness", "white_noise", "gaussian_blur", "jpeg_compression"]
)
def test_more_severe_is_further_off(kind):
    pixels = scene(4, height=64, width=64)
    distances = [(corrupt(pixels, kind, s) - pixels).square().mean().item() for s in SEVERITIES]
    assert distances == sorted(distances)
    assert distances[0] > 0


# --- All of them ---


@pytest.mark.parametrize("kind", USABLE)
def test_pixels_come_back_as_pixels(kind):
    side = SMALLEST[kind]
    for shape, dtype in (((2, 1, side, side), torch.float32), ((1, 3, side, side + 5), torch.float64)):
        pixels = scene(*shape).to(dtype).requires_grad_()
        before = pixels.detach().clone()
        for severity in SEVERITIES:
            got = corrupt(pixels, kind, severity)
            assert (got.shape, got.dtype, got.requires_grad) == (pixels.shape, dtype, False)
            assert got.min() >= 0
            assert got.max() <= 1
        assert torch.equal(pixels, before)
        if min(shape[2:]) > 4:
            assert not torch.allclose(got, before, atol=1e-2)
    assert corrupt(scene(1, 3, 32, 32).bfloat16(), kind, 1).dtype == torch.bfloat16


@settings(max_examples=60)
@given(
    st.sampled_from([kind for kind in USABLE if SMALLEST[kind] <= 9]),
    st.sampled_from(SEVERITIES),
    st.sampled_from([1, 3]),
    st.integers(9, 40),
    st.integers(9, 40),
    st.integers(0, 2**40),
    st.sampled_from([0.0, 0.5, 1.0, None]),
)
def test_any_image_of_any_size(kind, severity, channels, height, width, seed, flat):
    """Also black, white and grey ones, for which some formulas divide by nothing."""
    pixels = scene(3, channels, height, width) if flat is None else torch.full((3, channels, height, width), flat)
    got = corrupt(pixels, kind, severity, seed=seed, first=7)
    assert got.shape == pixels.shape
    assert ((got >= 0) & (got <= 1)).all()
    assert torch.equal(corrupt(pixels[2:], kind, severity, seed=seed, first=9), got[2:])


@library
def test_the_library_says_nothing(capfd):
    for kind in OF_LIBRARY:
        for side in {SMALLEST[kind], 28, 32, 33}:
            corrupt(scene(1, 3, side, side), kind, 5)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", USABLE)
def test_an_image_is_corrupted_by_its_place_alone(kind):
    pixels = scene(5)
    whole = corrupt(pixels, kind, 2, seed=4)
    parts = [corrupt(pixels[i:j], kind, 2, seed=4, first=i) for i, j in ((0, 1), (1, 4), (4, 5))]
    assert torch.equal(torch.cat(parts), whole)
    beside = torch.cat([torch.rand(4, 3, 32, 32), pixels[4:]])
    assert torch.equal(corrupt(beside, kind, 2, seed=4)[4], whole[4])


RANDOM = (
    "white_noise",
    "salt_and_pepper",
    "missing_pixels",
    "gaussian_noise",
    "glass_blur",
    "motion_blur",
    "snow",
    "fog",
)
RANDOM += ("shot_noise", "impulse_noise", "frost", "elastic_transform", "speckle_noise", "spatter")


@pytest.mark.parametrize("kind", [kind for kind in RANDOM if kind in USABLE])
def test_seeds_and_places_differ(kind):
    pixels = scene(1, height=64, width=64).expand(2, -1, -1, -1)
    one, other = corrupt(pixels, kind, 5), corrupt(pixels, kind, 5, seed=1)
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one, other)


def test_kinds_and_severities_do_not_share_their_random_pixels():
    black = [corrupt(torch.full((1, 1, 64, 64), 0.5), "missing_pixels", s) == 0 for s in SEVERITIES]
    assert not (black[0] <= black[4]).all()
    salted = corrupt(torch.full((1, 1, 64, 64), 0.5), "salt_and_pepper", 3) != 0.5
    assert not (salted <= (black[2])).all()


def drawn():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


def start():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)


@pytest.mark.parametrize("kind", USABLE)
def test_global_generators_stay_as_they_were(kind):
    start()
    want = drawn()
    start()
    corrupt(scene(2), kind, 3)
    assert drawn() == want


@library
def test_global_generators_stay_as_they_were_after_an_error(monkeypatch):
    import imagecorruptions

    def fail(*_):
        np.random.rand(9)
        raise RuntimeError("broken")

    monkeypatch.setitem(imagecorruptions.corruption_dict, "fog", fail)
    start()
    want = drawn()
    start()
    with pytest.raises(RuntimeError, match="broken"):
        corrupt(scene(), "fog", 3)
    assert drawn() == want


def test_without_the_library_ours_are_left(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(corruptions, "version", missing)
    corruptions._library.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'timm_nrpm\[corruptions\]'. Without it there are white_noise"):
        corrupt(scene(), "fog", 1)
    with pytest.raises(ImportError, match="pip install"):  # before the loader is looked at
        evaluate_corruptions(nn.Linear(1, 1), None)
    assert corrupt(scene(), "white_noise", 1).shape == (1, 3, 32, 32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    report = evaluate_corruptions(model, [(torch.rand(2, 3, 2, 2), torch.tensor([0, 2]))], NATIVE)
    assert LIBRARY not in report.versions


def test_a_server_without_a_desktop_is_told_of_the_other_opencv(monkeypatch):
    def fail(_):
        raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(corruptions, "version", lambda _: "1.1.5")
    monkeypatch.setattr(corruptions, "import_module", fail)
    corruptions._library.cache_clear()
    with pytest.raises(ImportError, match=r"libGL.so.1.*--force-reinstall opencv-python-headless"):
        corrupt(scene(), "fog", 1)


PIXELS = torch.full((2, 3, 8, 8), 0.5)


@pytest.mark.parametrize(
    ("pixels", "kind", "severity", "options", "message"),
    [
        (PIXELS, "white_nose", 1, {}, r"kind='white_nose' is not known. Near names: white_noise"),
        (PIXELS, "rain_of_frogs", 1, {}, r"There are: gaussian_noise, .*missing_pixels"),
        (PIXELS, "white_noise", 0, {}, "severity=0 is not allowed: give an integer from 1 to 5"),
        (PIXELS, "white_noise", 6, {}, "severity=6"),
        (PIXELS, "white_noise", 2.0, {}, r"severity=2\.0"),
        (PIXELS, "white_noise", True, {}, "severity=True"),
        (PIXELS, "white_noise", 1, {"seed": -1}, "seed=-1 is not allowed: give an integer >= 0"),
        (PIXELS, "white_noise", 1, {"first": 0.5}, "first=0.5 is not allowed"),
        (2 * PIXELS + 0.1, "white_noise", 1, {}, r"values from 1\.1 to 1\.1: give pixels in \[0, 1\]"),
        (PIXELS - 1, "white_noise", 1, {}, r"values from -0\.5"),
        (PIXELS / 0 - PIXELS / 0, "white_noise", 1, {}, "values from nan"),
        (PIXELS[0], "white_noise", 1, {}, r"The images are \[3, 8, 8\] of torch.float32: give at least one"),
        (PIXELS[:0], "white_noise", 1, {}, r"The images are \[0, 3, 8, 8\]"),
        (PIXELS[:, :2], "white_noise", 1, {}, "with C 1 for grey or 3 for colours"),
        (PIXELS.byte(), "white_noise", 1, {}, "of torch.uint8"),
        (PIXELS.numpy(), "white_noise", 1, {}, "pixels are a ndarray: give a tensor"),
    ],
)
def test_what_is_refused(pixels, kind, severity, options, message):
    with pytest.raises(ValueError, match=message):
        corrupt(pixels, kind, severity, **options)


@library
def test_too_small_images_are_refused_with_what_they_need():
    with pytest.raises(ValueError, match=r"8 x 8 pixels, and motion_blur needs 28 x 28 at least: .* kinds that suit"):
        corrupt(PIXELS, "motion_blur", 1)
    with pytest.raises(ValueError, match=r"snow needs 25 x 25 at least: .*: gaussian_noise, shot_noise") as error:
        evaluate_corruptions(nn.Linear(1, 1), [(PIXELS, torch.tensor([0, 1]))])
    assert "motion_blur" not in str(error.value).split("suit them: ")[1]


# --- Whole evaluations ---


@pytest.fixture(scope="module")
def data():
    return tuple(t[:40] for t in digits("test"))


def batches(data, size):
    return list(zip(*(t.split(size) for t in data), strict=True))


def test_the_report_is_what_the_model_says_of_corrupted_images(data):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.8).eval()
    plain = timm_nrpm.plain_copy(model)
    report = evaluate_corruptions(model, batches(data, 16), NATIVE, (2, 5), seed=3, progress=False)
    for net, got in ((model, report.model), (plain, report.baseline)):
        for kind in NATIVE:
            for severity in (2, 5):
                with torch.no_grad():
                    logits = PixelModel(net)(corrupt(data[0], kind, severity, seed=3))
                assert got.corrupted[kind][severity] == tuple((logits.argmax(1) == data[1]).tolist())
    assert (report.samples, report.seed) == (40, 3)
    assert list(report.model.accuracy) == list(NATIVE)
    assert report.model != report.baseline
    assert evaluate_corruptions(model, batches(data, 40), NATIVE, (2, 5), seed=3) == report  # whatever the batches
    few = [
        evaluate_corruptions(model, batches([t[:5] for t in data], size), "white_noise", 5, seed=3).model.corrupted
        for size in (1, 5)
    ]
    assert few[0] == few[1] == {"white_noise": {5: report.model.corrupted["white_noise"][5][:5]}}
    assert evaluate_corruptions(model, batches(data, 40), NATIVE, (2, 5), seed=4) != report
    assert "True" not in repr(report)
    again = CorruptionReport.from_json(report.to_json())
    assert again == report
    assert str(again) == str(report)
    assert report.versions["timm_nrpm"] == timm_nrpm.__version__


@library
def test_all_that_digits_are_large_enough_for(data):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.8)
    kinds = [kind for kind in CORRUPTIONS if SMALLEST[kind] <= 8]
    report = evaluate_corruptions(model, batches(tuple(t[:6] for t in data), 4), kinds, 1)
    assert list(report.model.corrupted) == kinds
    assert report.versions[LIBRARY]
    assert {"cv2", "skimage", "numba"} <= set(report.versions)


def test_lambda_one_is_its_own_baseline(data):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=1.0)
    report = evaluate_corruptions(model, batches(data, 40), ("white_noise", "missing_pixels"), (5,))
    assert report.model == report.baseline
    assert report.mean_corruption_error == report.relative_mean_corruption_error == 1.0


def test_a_plain_model_has_no_baseline_unless_one_is_given(data):
    plain = timm_nrpm.plain_copy(timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.8))
    alone = evaluate_corruptions(plain, batches(data, 40), "missing_pixels", 5)
    assert alone.baseline is None
    assert alone.mean_corruption_error is alone.relative_mean_corruption_error is None
    assert "mCE" not in str(alone)
    assert CorruptionReport.from_json(alone.to_json()) == alone
    worse = timm_nrpm.create_model(DIGITS, pretrained=False)
    beside = evaluate_corruptions(plain, batches(data, 40), "missing_pixels", 5, baseline=worse)
    assert beside.model == alone.model
    wrong = [1 - answers.accuracy["missing_pixels"][5] for answers in (beside.model, beside.baseline)]
    assert beside.mean_corruption_error == pytest.approx(wrong[0] / wrong[1])


def test_normalisation_happens_inside():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model[1].weight.data, model[1].bias.data = torch.tensor([[1.0], [-1.0]]), torch.zeros(2)
    loader = [(torch.tensor([0.3, 0.7]).view(2, 1, 1, 1), torch.tensor([1, 0]))]
    for mean, want in (((0.5,), (True, True)), ((0.0,), (False, True))):
        report = evaluate_corruptions(model, loader, "missing_pixels", 1, mean=mean, std=(1.0,))
        assert report.model.correct == want


def test_the_models_stay_as_they_were(net):
    other = type(net)().train()
    net.train()
    net.norm.eval()
    net.head.weight.requires_grad_(False)
    kept = [(m.training for m in n.modules()) for n in (net, other)]
    kept = [list(modes) for modes in kept]
    states = [{k: v.clone() for k, v in n.state_dict().items()} for n in (net, other)]
    flags = [p.requires_grad for p in net.parameters()]
    report = evaluate_corruptions(net, [(scene(3), torch.tensor([0, 1, 4]))], NATIVE, 1, baseline=other)
    assert report.samples == 3
    assert [[m.training for m in n.modules()] for n in (net, other)] == kept
    for n, state in zip((net, other), states, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in n.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ValueError):
        evaluate_corruptions(net, [(scene(3), torch.tensor([0, 1, 9]))], NATIVE, 1, baseline=other)
    assert [[m.training for m in n.modules()] for n in (net, other)] == kept


@pytest.mark.parametrize(
    ("loader", "kinds", "severities", "message"),
    [
        ([], NATIVE, (1,), "The loader gave no images"),
        ([PIXELS], NATIVE, (1,), "give pairs of pixels"),
        ([(PIXELS + 1, torch.tensor([0, 1]))], NATIVE, (1,), r"give pixels in \[0, 1\]"),
        ([(PIXELS, torch.tensor([0, 5]))], NATIVE, (1,), "from 0 to 5, and the model has 5 classes"),
        ([(PIXELS, torch.tensor([0.0, 1.0]))], NATIVE, (1,), "of torch.float32"),
        ([(PIXELS, torch.tensor([0]))], NATIVE, (1,), r"labels \[1\] of torch.int64: give 2 integers"),
        (None, (), (1,), r"kinds=\(\): give at least one of gaussian_noise"),
        (None, ("fog", "fog"), (1,), "each once"),
        (None, ("missing_pixel",), (1,), "Near names: missing_pixels"),
        (None, NATIVE, (), r"severities=\(\): give at least one of 1, 2, 3, 4, 5"),
        (None, NATIVE, (1, 7), "severity=7"),
    ],
)
def test_what_an_evaluation_refuses(net, loader, kinds, severities, message):
    with pytest.raises(ValueError, match=message):
        evaluate_corruptions(net, loader, kinds, severities)


class Says(nn.Module):
    """The same logits for every image."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), *self.logits.shape)


@pytest.mark.parametrize(
    ("logits", "want"),
    [
        ((0.0, 1.0), (False, True)),
        ((float("nan"), 1.0), (False, False)),  # the largest, to argmax
        ((1.0, float("nan")), (False, False)),
        ((float("inf"), 1.0), (False, False)),
        ((float("-inf"), 1.0), (False, False)),
    ],
)
def test_an_answer_that_is_no_number_is_wrong(logits, want):
    report = evaluate_corruptions(Says(*logits), [(PIXELS, torch.tensor([0, 1]))], "missing_pixels", 1)
    assert report.model.correct == report.model.corrupted["missing_pixels"][1] == want


def test_pixels_of_half_a_type_make_no_ties():
    """100 and 100.1 are the same number in bfloat16, and 7e4 is infinite in float16."""
    for kind, logits in ((torch.bfloat16, (100.0, 100.1)), (torch.float16, (6e4, 7e4))):
        report = evaluate_corruptions(Says(*logits), [(PIXELS.to(kind), torch.tensor([1, 1]))], "white_noise", 1)
        assert report.model.clean == report.model.accuracy["white_noise"][1] == 1.0


@pytest.mark.parametrize(("logits", "said"), [(((1.0,)), r"\[2, 1\]"), ((), r"\[2, 0\]"), (([[1.0, 2.0]]), "2, 1, 2")])
def test_a_model_with_one_class_is_refused(logits, said):
    with pytest.raises(ValueError, match=f"gives .*{said}.* for 2 images: .* two classes at least"):
        evaluate_corruptions(Says(*logits), [(PIXELS, torch.tensor([0, 0]))], "white_noise", 1)


def test_severities_may_be_numpys(data):
    model = Says(0.0, *[1.0] * 9)
    one, other = (evaluate_corruptions(model, batches(data, 40), NATIVE, s) for s in (np.int64(5), np.array([5])))
    assert one == other == evaluate_corruptions(model, batches(data, 40), NATIVE, 5)
    assert CorruptionReport.from_json(one.to_json()) == one


@pytest.mark.gpu
@pytest.mark.parametrize(("of_model", "of_baseline", "of_images"), [("cuda", "cuda", "cpu"), ("cpu", "cuda", "cuda")])
def test_images_and_models_on_other_devices(data, of_model, of_baseline, of_images):
    model, plain = (timm_nrpm.create_model(DIGITS, pretrained=True, lam=lam) for lam in (0.8, 1.0))
    want = evaluate_corruptions(model, batches(data, 16), NATIVE, 2, baseline=plain)
    there = [tuple(t.to(of_images) for t in batch) for batch in batches(data, 16)]
    got = evaluate_corruptions(model.to(of_model), there, NATIVE, 2, baseline=plain.to(of_baseline))
    for a, b in ((got.model, want.model), (got.baseline, want.baseline)):
        assert abs(a.clean - b.clean) <= 1 / 40  # the last digits of logits are the device's
    worse = corrupt(there[0][0], "white_noise", 2)
    assert worse.device == there[0][0].device
    assert torch.equal(worse.cpu(), corrupt(data[0][:16], "white_noise", 2))
