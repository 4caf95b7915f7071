"""What the package computes on a GPU is what it computes on the CPU, for every wing.

On the CPU each call is made twice and must give the same, so that the table itself is known to work.
"""

import copy

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm import Threat, TuneConfig
from timm_nrpm.data.loaders import digits
from timm_nrpm.nn.pixel_model import PixelModel

ATTACKED = Threat("Linf", 0.1)
IMAGES = 32


class Given:
    """A reprogrammed model, the plain one, and images on the CPU, as loaders give them.

    Attributes:
        device: Where the models are.
        folder: A folder for files.
        model: The bundled model at lambda 0.5, calibrated.
        plain: The bundled model.
        pixels, labels: Digits, on the CPU.
        loader, training: Batches of the digits, and of training digits.
    """

    def __init__(self, device, folder):
        torch.manual_seed(0)
        self.device, self.folder = device, folder
        self.pixels, self.labels = (part[:IMAGES] for part in digits("test"))
        self.loader = DataLoader(TensorDataset(self.pixels, self.labels), batch_size=16)
        self.training = DataLoader(TensorDataset(*(part[:256] for part in digits("train"))), batch_size=64)
        self.plain = timm.create_model("resnet8_digits", pretrained=True).eval().to(device)
        self.model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5).eval().to(device)
        timm_nrpm.calibrate_(self.model, self.training)


def outputs(model, given):
    """The logits of all images."""
    with torch.no_grad():
        return model(given.pixels.to(given.device))


def shares(report):
    return [report.clean, report.worst_case]


def tuned(given, paradigm, objective):
    config = TuneConfig(paradigm=paradigm, objective=objective, eps=0.1, steps=2, epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        if given.device == "cpu":
            patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)  # which would keep the device of the run before
        timm_nrpm.tune(given.model, given.training, config=config)
    return outputs(given.model.eval(), given)


def saved(given):
    timm_nrpm.save_pretrained(given.model, given.folder / "variant")
    return outputs(timm_nrpm.from_pretrained(given.folder / "variant").eval().to(given.device), given)


def mixture(given):
    return timm_nrpm.adaptive_smoothing.AdaptiveSmoothing(given.plain, given.model, share=0.7).eval()


def crossed(given):
    probes = timm_nrpm.probes.fit_probes(given.model, given.training, ["layer2", "layer3"])
    return timm_nrpm.crossmax.CrossMax(given.model, sizes=(8, 6), probes=probes).eval()


def signed(given):
    robust = copy.deepcopy(given.plain)
    with torch.no_grad():
        robust.conv1.weight += 0.1
    made = timm_nrpm.signatures.signature(given.plain, robust, layers="first:1")
    made.add_(given.plain, strength=0.5)
    return outputs(given.plain, given)


def larger(given):
    return [(torch.nn.functional.pad(pixels, (2, 2, 2, 2)), labels) for pixels, labels in given.loader]


def radius(report):
    return [sum(image.radius for image in report.images) / IMAGES]


def set_size(given):
    predictor = timm_nrpm.conformal.conformal(given.model, given.loader, alpha=0.2, sigma=0.25, radius=0.1)
    return [sum(map(len, predictor.sets(given.pixels, seed=0))) / IMAGES]


def criticality(given):
    images = [(given.pixels.to(given.device), given.labels.to(given.device))]
    net = PixelModel(given.plain).eval()
    return list(timm_nrpm.criticality.criticality(net, images, ["conv1", "fc"], ATTACKED).values())


def advised(given):
    (advice,) = timm_nrpm.advise(
        given.plain, given.loader, ATTACKED, selection=given.training, seconds=20, effect=25, folder=given.folder
    )
    return [advice.nothing.report.clean_accuracy, advice.nothing.report.accuracy]


FUNCTIONS = {
    "forward": (lambda given: outputs(given.model, given), 1e-3),
    "quick": (lambda given: shares(timm_nrpm.evaluate(given.model, given.loader, ATTACKED, "quick")), 0.05),
    "adaptive": (
        lambda given: shares(timm_nrpm.evaluate(given.model, given.loader, ATTACKED, effort="fast")), 0.1
    ),
    "L1, pursuit and pixels": (
        lambda given: shares(timm_nrpm.evaluate(given.model, given.loader, Threat("L1", 1.0), effort="fast")), 0.1
    ),
    "corruptions": (
        lambda given: [timm_nrpm.evaluate_corruptions(given.model, given.loader, "white_noise", 3).model.clean], 0.05
    ),
    "lambda tuned": (lambda given: tuned(given, "lambda", "pgd"), 0.1),
    "everything tuned": (lambda given: tuned(given, "all", "trades"), 0.5),
    "saved and loaded": (saved, 1e-3),
    "adapted": (lambda given: outputs(timm_nrpm.adapt_(given.model, given.pixels), given), 1e-3),
    "certified": (lambda given: radius(timm_nrpm.certify(given.model, given.loader, 0.25, n0=20, n=200)), 0.05),
    "certified in halves": (
        lambda given: radius(timm_nrpm.halves.certify_halves(given.model, given.loader, 0.25, n0=20, n=200)), 0.05
    ),
    "mixture": (lambda given: outputs(mixture(given), given), 1e-3),
    "mixture attacked": (
        lambda given: shares(timm_nrpm.evaluate(mixture(given), given.loader, ATTACKED, effort="fast")), 0.1
    ),
    "mixture certified": (
        lambda given: radius(timm_nrpm.certified.certify_mixture(mixture(given), given.loader, 0.25, n=800, votes=50)),
        0.1,
    ),
    "crossmax": (lambda given: outputs(crossed(given), given).softmax(1), 0.02),
    "sets": (set_size, 0.3),
    "signature": (signed, 1e-3),
    "crops": (lambda given: [timm_nrpm.translations.evaluate_shifts(given.model, larger(given)).middle.accuracy], 0.05),
    "resolutions": (
        lambda given: [timm_nrpm.resolutions.evaluate_resolutions(given.model, given.loader, (4,)).accuracy], 0.05
    ),
    "embedding": (
        lambda given: [timm_nrpm.embedding.embedding_change(given.model, given.loader, ATTACKED, steps=5).mean_change],
        0.05,
    ),
    "criticality": (criticality, 0.1),
    "search": (
        lambda given: [timm_nrpm.search_lambda(given.model, given.loader, ATTACKED, budget=3).plain.quick], 0.1
    ),
    "advise": (advised, 0.1),
    "cost": (lambda given: [float(timm_nrpm.cost(given.model, (1, 8, 8)).products)], 0),
}  # fmt: skip
"""What a user calls, as a function of what is given to numbers, and how far they may differ between devices.

Accuracies may differ by some images, since attacks and votes turn on the last digits of logits.
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_table_gives_the_same_twice(name, tmp_path):
    function, _ = FUNCTIONS[name]
    one, other = (torch.as_tensor(function(Given("cpu", tmp_path / f"{time}"))) for time in range(2))
    assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gpu_gives_what_the_cpu_gives(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert torch.cuda.is_available(), "there is no CUDA device: leave the marker gpu out"
    function, tolerance = FUNCTIONS[name]
    want, got = (torch.as_tensor(function(Given(device, tmp_path / device))).cpu() for device in ("cpu", "cuda"))
    assert (got - want).abs().max() <= tolerance, f"{got} on the GPU, {want} on the CPU"
