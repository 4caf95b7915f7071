"""Corruptions without an adversary, such as noise, blur, weather and compression, and a model's accuracy under them.

The corruptions of ImageNet-C come from the library imagecorruptions-imaug (`pip install 'timm_nrpm[corruptions]'`),
which has the constants of ImageNet-C: its severities were made for images of 224 pixels and are harsher on small
images. They are not the severities of CIFAR-10-C, so accuracies measured here do not belong in tables of CIFAR-10-C.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from timm_nrpm.checks import check_integer
from timm_nrpm.data.images import check_batch, check_labels, check_pixels, count_of
from timm_nrpm.evaluation.corruption_report import Answers, CorruptionReport
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.calibration import plain_of
from timm_nrpm.models.modes import evaluating
from timm_nrpm.models.reprogramming import reprogrammed_layers
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import subject_of
from timm_nrpm.version import __version__

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

LIBRARY = "imagecorruptions-imaug"

NOISE = ("gaussian_noise", "shot_noise", "impulse_noise")
IMAGENET_C = (
    *NOISE,
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The 15 corruptions of ImageNet-C, over which mean corruption error is usually computed: noise, blur, weather and
digital."""

EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The 4 corruptions that the authors of ImageNet-C set aside for validation."""

LEVELS = {
    "white_noise": (0.05, 0.10, 0.15, 0.20, 0.25),
    "salt_and_pepper": (0.02, 0.05, 0.10, 0.15, 0.20),
    "missing_pixels": (0.10, 0.20, 0.30, 0.40, 0.50),
}
"""Parameters at severities 1 to 5 of our corruptions, which need no library: the standard deviation of Gaussian noise,
in pixel units of [0, 1]; the share of the pixels that become white or black, half of them each; and the share of the
pixels that become black. A pixel changes in all its channels."""

NATIVE = tuple(LEVELS)
CORRUPTIONS: tuple[str, ...] = (*IMAGENET_C, *EXTRA, *NATIVE)
SEVERITIES = (1, 2, 3, 4, 5)

SMALLEST = dict.fromkeys((*IMAGENET_C, *EXTRA), 4) | dict.fromkeys(NATIVE, 1)
"""Shorter side of the smallest images that a corruption works on, the same at every severity."""
SMALLEST |= {
    "motion_blur": 28,  # cut off at the edges, it darkens images: of 28 pixels by up to 6 %, of 32 by 3 %, of 64 not
    "snow": 25,  # length of the flakes
    "gaussian_blur": 24,  # two standard deviations to either side
    "defocus_blur": 21,  # diameter of the disc into which a point is blurred
    "spatter": 16,  # room for one splash
    "glass_blur": 9,  # in smaller images no pixel is far enough from the edges to be moved
}


def corrupt(pixels: Tensor, kind: str, severity: int, *, seed: int = 0, first: int = 0) -> Tensor:
    """Return corrupted images (Hendrycks and Dietterich, arXiv 1903.12261, section 3 and appendix B).

    The corruption of an image depends only on the seed, the kind, the severity and its place among all images, not on
    the images beside it. The global generators of torch, NumPy and Python keep their states. The library gets images
    rounded to 8 bits, as it requires, one at a time and on the CPU. It gets a grey image as three equal channels, whose
    mean is taken afterwards. For :data:`NOISE` and speckle noise the first channel is taken instead, since the mean of
    three channels is less noisy than one.

    Args:
        pixels: Images `[B, C, H, W]` in [0, 1] with 1 or 3 channels, of any floating-point dtype and on any device.
        kind: Name of the corruption, one of :data:`CORRUPTIONS`.
        severity: Integer from 1 to 5.
        seed: Seed of the corruptions, >= 0.
        first: Place of the first image among all images, >= 0. For a batch of a loader it is the number of images in
            the batches before it.

    Returns:
        Pixels `[B, C, H, W]` in [0, 1], of the same dtype and on the same device, without gradient.

    Raises:
        ValueError: `kind` or `severity` is not known, the images are smaller than the kind needs, or pixels are outside
            [0, 1].
        ImportError: The kind needs the library, and it is not installed.

    Example:
        >>> corrupt(pixels, "missing_pixels", 3).shape == pixels.shape
        True
    """
    (severity,), seed = _check_request((kind,), (severity,), seed)
    first = check_integer("first", first, least=0)
    if not isinstance(pixels, Tensor):
        raise ValueError(f"pixels are a {type(pixels).__name__}: give a tensor [B, C, H, W].")
    _check_images(pixels, (kind,))
    images = check_pixels(pixels.detach(), "pixels have").cpu().double().numpy()
    places = range(first, first + len(images))
    corrupted = [_corrupt_one(image, kind, severity, seed, place) for image, place in zip(images, places, strict=True)]
    return torch.from_numpy(np.stack(corrupted)).to(pixels)


@torch.no_grad()
def evaluate_corruptions(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    kinds: str | Sequence[str] = IMAGENET_C,
    severities: int | Sequence[int] = SEVERITIES,
    *,
    baseline: nn.Module | None = None,
    seed: int = 0,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: bool = False,
) -> CorruptionReport:
    """Measure accuracy under each corruption at each severity, and mean corruption error relative to a baseline.

    Both models see the very same images, and an answer from logits that are not finite is wrong. Training modes,
    gradient flags and statistics of both models are left unchanged.

    Args:
        model: Classifier of normalised images, or a wrapper of one.
        loader: Batches of pixels `[B, C, H, W]` in [0, 1] and labels `[B]`, on any device. The corruption of an image
            depends on its place in the loader, so the loader must not shuffle.
        kinds: Names from :data:`CORRUPTIONS`; by default the 15 of ImageNet-C, some of which need images of 28 pixels.
        severities: Integers from 1 to 5.
        baseline: Model that errors are compared with; by default the plain model (lambda = 1, with its statistics from
            before calibration), and none for a model that is not reprogrammed.
        seed: Seed of the corruptions, see :func:`corrupt`.
        mean, std: Normalisation of both models, one number for each channel; by default timm's for each model, and none
            for a model that is not timm's.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: A kind or severity is not known, images are smaller than a kind needs, pixels are outside [0, 1],
            labels are not classes of the models, a model has only one class, or the loader is empty.
        ImportError: A kind needs the library, and it is not installed.

    Example:
        >>> print(evaluate_corruptions(model, loader, ("white_noise", "missing_pixels"), severities=(1, 5)))
        32 images, clean 100.0 % (baseline 100.0 %), mCE 83.3 %, relative mCE 83.3 %
        accuracy, %             1      5         CE
        white_noise         100.0   93.8     66.7 %
        missing_pixels       90.6   28.1    100.0 %
    """
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    severities = tuple(severities) if isinstance(severities, Iterable) else (severities,)
    severities, seed = _check_request(kinds, severities, seed)
    nets = [subject_of(model, mean, std).on_pixels()]
    if baseline is not None:
        nets.append(subject_of(baseline, mean, std).on_pixels())
    elif reprogrammed_layers(nets[0].model):
        nets.append(plain_of(nets[0], loader))
    clean: list[list[bool]] = [[] for _ in nets]
    corrupted = [{kind: {s: list[bool]() for s in severities} for kind in kinds} for _ in nets]
    with evaluating(nets[0]), evaluating(nets[-1]), progress_bar(progress) as bar:
        batches = count_of(loader)
        task = bar.add_task("Corrupting", total=batches and batches * len(kinds) * len(severities))
        for batch in loader:
            pixels, labels = check_batch(batch)
            _check_images(pixels, kinds)
            labels = check_labels(labels, count=len(pixels))
            first = len(clean[0])
            for net, right in zip(nets, clean, strict=True):
                right += right_on(net, pixels, labels)
            for kind in kinds:
                for severity in severities:
                    worse = corrupt(pixels, kind, severity, seed=seed, first=first)
                    for net, by_kind in zip(nets, corrupted, strict=True):
                        by_kind[kind][severity] += right_on(net, worse, labels)
                    bar.advance(task)
    if not clean[0]:
        raise ValueError("The loader gave no images: there is nothing to evaluate.")
    answers = [
        Answers(tuple(right), {k: {s: tuple(images) for s, images in by.items()} for k, by in by_kind.items()})
        for right, by_kind in zip(clean, corrupted, strict=True)
    ]
    return CorruptionReport(answers[0], answers[1] if len(nets) > 1 else None, seed, _versions(kinds))


def right_on(net: PixelModel, pixels: Tensor, labels: Tensor) -> list[bool]:
    """Return whether the model is right on each image; where a logit is not finite, it is not."""
    # Logits have the dtype of the pixels, and in half precision there are ties.
    logits = net(pixels.to(net.mean.device, torch.promote_types(pixels.dtype, torch.float32)))
    check_labels(labels, logits.shape[1])
    right = (logits.argmax(1) == labels.to(logits.device)) & logits.isfinite().all(1)
    return right.tolist()


def _corrupt_one(image: Array, kind: str, severity: int, seed: int, place: int) -> Array:
    """Corrupt an image `[C, H, W]` of float64 in [0, 1]."""
    # The seed contains the name of the kind rather than its place in CORRUPTIONS, which a new kind would change.
    random = np.random.SeedSequence((seed, zlib.crc32(kind.encode()), severity, place))
    if kind in LEVELS:
        return _ours(image, kind, LEVELS[kind][severity - 1], np.random.default_rng(random))
    return _of_library(image, kind, severity, random)


def _ours(image: Array, kind: str, level: float, random: np.random.Generator) -> Array:
    if kind == "white_noise":
        return np.clip(image + level * random.standard_normal(image.shape), 0, 1)
    flat = image.reshape(len(image), -1).copy()
    hit = random.permutation(flat.shape[1])[: round(level * flat.shape[1])]
    flat[:, hit] = np.arange(len(hit)) % 2 if kind == "salt_and_pepper" else 0  # `hit` is in random order
    return flat.reshape(image.shape)


def _of_library(image: Array, kind: str, severity: int, random: np.random.SeedSequence) -> Array:
    from PIL import Image

    function = _library().corruption_dict[kind]  # its `corrupt` refuses all images under 32 pixels
    words = random.generate_state(4)
    # These two kinds do not draw from NumPy's global generator: glass_blur draws from numba's.
    seed = {"seed": int(words[0])} if kind in ("impulse_noise", "glass_blur") else {}
    rounded = np.round(image * 255).astype(np.uint8).transpose(1, 2, 0)
    colour = np.repeat(rounded, 3, axis=2) if len(image) == 1 else rounded
    with _numpy_seeded(words), np.errstate(invalid="ignore"):
        worse = np.asarray(function(Image.fromarray(colour), severity, **seed))
    if kind == "spatter" and not np.isfinite(worse).all():
        worse = colour  # no splash landed, and the library divides by the largest one, which is 0
    worse = worse.astype(np.uint8).transpose(2, 0, 1) / 255  # the library rounds down, too
    if len(image) == 1:
        return worse[:1] if kind in (*NOISE, "speckle_noise") else worse.mean(0, keepdims=True)
    return worse


@contextmanager
def _numpy_seeded(words: Array) -> Iterator[None]:
    """Seed NumPy's global generator, and restore its state afterwards."""
    state = np.random.get_state()
    np.random.seed(words)
    try:
        yield
    finally:
        np.random.set_state(state)


@cache
def _library() -> Any:
    """Import the library. Its distribution is checked first, since a package abandoned in 2020 has the same module name
    and fails with current versions of NumPy and scikit-image."""
    try:
        version(LIBRARY)
        return import_module("imagecorruptions")
    except ImportError as error:
        # The library requires the OpenCV with windows, which needs desktop libraries that a server often lacks.
        advice = (
            "pip uninstall --yes opencv-python; pip install --force-reinstall opencv-python-headless"
            if ".so" in str(error)
            else "pip install 'timm_nrpm[corruptions]'"
        )
        raise ImportError(
            f"The corruptions of ImageNet-C come with {LIBRARY}, which cannot be imported ({error}): {advice}. "
            f"Without it there are {', '.join(NATIVE)}."
        ) from error


def _versions(kinds: Sequence[str]) -> dict[str, str]:
    modules, versions = ["torch", "timm", "numpy"], {"timm_nrpm": __version__}
    if not set(kinds) <= set(NATIVE):
        modules += ["cv2", "skimage", "scipy", "numba", "PIL"]
        versions[LIBRARY] = version(LIBRARY)
    return versions | {name: str(import_module(name).__version__) for name in modules}


def _check_request(kinds: Sequence[str], severities: Sequence[int], seed: int) -> tuple[tuple[int, ...], int]:
    """Check the kinds, the severities, the seed and the library, and return the severities and the seed as integers."""
    for name, given, allowed in (("kinds", kinds, CORRUPTIONS), ("severities", severities, SEVERITIES)):
        if not given or len(set(given)) < len(given):
            raise ValueError(
                f"{name}={tuple(given)!r}: give at least one of {', '.join(map(str, allowed))}, each once."
            )
    for kind in kinds:
        if kind not in CORRUPTIONS:
            near = difflib.get_close_matches(str(kind), CORRUPTIONS, n=3, cutoff=0.5)
            advice = f"Near names: {', '.join(near)}." if near else f"There are: {', '.join(CORRUPTIONS)}."
            raise ValueError(f"kind={kind!r} is not known. {advice}")
    whole = tuple(check_integer("severity", s, least=SEVERITIES[0], most=SEVERITIES[-1]) for s in severities)
    seed = check_integer("seed", seed, least=0)
    if not set(kinds) <= set(NATIVE):
        _library()
    return whole, seed


def _check_images(pixels: Tensor, kinds: Sequence[str]) -> None:
    """Raise a ValueError for images of a wrong shape or dtype, or images that are too small for one of the kinds."""
    shape = list(pixels.shape)
    if len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape or not pixels.is_floating_point():
        raise ValueError(
            f"The images are {shape} of {pixels.dtype}: give at least one, as floating-point pixels [B, C, H, W] in "
            "[0, 1] with C 1 for grey or 3 for colours."
        )
    side = min(shape[2:])
    if unsuitable := [kind for kind in kinds if SMALLEST[kind] > side]:
        needs = ", ".join(f"{kind} needs {SMALLEST[kind]} x {SMALLEST[kind]}" for kind in unsuitable)
        rest = [kind for kind in CORRUPTIONS if SMALLEST[kind] <= side]
        raise ValueError(
            f"The images have {shape[2]} x {shape[3]} pixels, and {needs} at least: give larger images, or "
            f"kinds that suit them: {', '.join(rest)}."
        )
