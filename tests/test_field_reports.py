"""What users did, and what is right: whatever was done to a model before, a report's numbers are those of the model."""

import json

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import timm_nrpm
from timm_nrpm import NRPMConfig, Threat, TuneConfig
from timm_nrpm.attacks.flags import PLAIN_CHANGED
from timm_nrpm.data.loaders import digits
from timm_nrpm.errors import ReprogrammingWarning
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import copied, unwrapped

THREAT = Threat("Linf", 0.15)


@pytest.fixture(scope="module")
def images():
    pixels, labels = digits("test")
    return [(pixels[:60], labels[:60])]


def fresh(lam=0.4):
    return timm_nrpm.create_model(DIGITS, pretrained=True, lam=lam).eval()


def training(count=500):
    return digits("train")[0][:count]


def quick(model, images, **options):
    return timm_nrpm.evaluate(model, images, THREAT, "quick", steps=5, **options)


# 1. The plain model is the one that was reprogrammed, whatever became of the statistics.


@pytest.fixture(scope="module")
def truth(images):
    """The plain model's own report."""
    return quick(timm.create_model(DIGITS, pretrained=True).eval(), images)


def calibrated():
    return timm_nrpm.calibrate_(fresh(), [training()])


def updated():
    model = fresh()
    update_bn([PixelModel(model).normalise(training())], model)
    return model.eval()


def loaded():
    model = fresh()
    model.load_state_dict(calibrated().state_dict())
    return model


def averaged():
    model = calibrated()
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    return average.eval()


def reloaded(tmp_path):
    return timm_nrpm.from_pretrained(timm_nrpm.save_pretrained(calibrated(), tmp_path / "variant"))


@pytest.mark.parametrize("make", [calibrated, updated, loaded, averaged, reloaded])
def test_the_control_is_the_model_that_was_reprogrammed(make, images, truth, tmp_path):
    model = make(tmp_path) if make is reloaded else make()
    report = quick(model, images)
    assert report.control.correct == truth.correct
    assert report.control.survivors == truth.survivors
    assert report.plain == "reprogrammed"
    assert PLAIN_CHANGED not in report.flags
    assert all(torch.equal(a, b) for a, b in zip(
        timm_nrpm.restore_(unwrapped(model)).state_dict().values(),
        timm.create_model(DIGITS, pretrained=True).state_dict().values(), strict=True))  # fmt: skip


def test_a_plain_checkpoint_in_a_calibrated_model_gives_the_plain_model(images, truth):
    model = calibrated()
    model.load_state_dict(timm.create_model(DIGITS, pretrained=True).state_dict())
    assert quick(timm_nrpm.restore_(model), images).survivors == truth.survivors


def test_a_state_of_a_calibrated_model_evaluates_like_it(images):
    """Examples are made on the plain model, so that the headline is wrong where that is a wreck."""
    assert quick(loaded(), images).survivors == quick(calibrated(), images).survivors


def tune_all(**settings):
    model = fresh(0.8)
    loader = DataLoader(TensorDataset(*(t[:256] for t in digits("train"))), batch_size=64, shuffle=True)
    config = TuneConfig(paradigm="all", objective="fgsm", eps=0.1, epochs=1, lr=0.02, **settings)
    timm_nrpm.tune(model, loader, config)
    return model


def test_after_tuning_everything_the_plain_model_works_and_the_report_says_what_it_is(images, truth, tmp_path):
    model = tune_all(output=str(tmp_path / "run"))
    report = quick(model, images)
    assert report.control.clean > 0.9
    assert report.plain == "trained"
    assert PLAIN_CHANGED in report.flags
    assert "the same weights at lambda 1" in report.verdict
    base = timm.create_model(DIGITS, pretrained=True).eval()
    given = quick(model, images, base=base)
    assert given.control.survivors == truth.survivors
    assert (given.plain, PLAIN_CHANGED in given.flags) == ("given", False)
    again = quick(timm_nrpm.from_pretrained(tmp_path / "run" / "variant"), images)
    assert again.control.clean > 0.9
    assert PLAIN_CHANGED in again.flags
    assert quick(timm_nrpm.restore_(model), images).clean > 0.9


def test_a_loop_of_ones_own_is_told(images):
    model = fresh(0.8).train()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if not n.endswith("lam")], 0.05)
    pixels, labels = (t[:256] for t in digits("train"))
    for rows in torch.arange(256).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(PixelModel(model)(pixels[rows]), labels[rows]).backward()
        optimizer.step()
    model.eval()
    report = quick(model, images)
    assert report.control.clean > 0.8
    assert PLAIN_CHANGED in report.flags
    with pytest.warns(ReprogrammingWarning, match="weights changed since"):
        timm_nrpm.restore_(model)


def test_half_precision_keeps_the_plain_model(images):
    report = quick(calibrated().bfloat16(), images)
    assert report.plain == "reprogrammed"
    assert report.control.clean > 0.9


# 2. Wrappers are seen through, or refused before any work.


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.backbone = model

    def forward(self, x):
        return self.backbone(x)


def normalise_first(model):
    from torchvision.transforms import Normalize

    return nn.Sequential(Normalize((0.5,), (0.5,)), model)


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compile": torch.compile,
    "AveragedModel": AveragedModel,
    "ModelEmaV3": lambda model: timm.utils.ModelEmaV3(model),
    "Sequential": nn.Sequential,
    "PixelModel": PixelModel,
    "Normalize": normalise_first,
    "two": lambda model: nn.DataParallel(nn.Sequential(model)),
}
ENTRANCES = {
    "evaluate": lambda m, images: quick(m, images).survivors,
    "evaluate_corruptions": lambda m, images: timm_nrpm.evaluate_corruptions(m, images, ("white_noise",), (3,)).model,
    "certify": lambda m, images: (
        timm_nrpm.certify(m, [(images[0][0][:2], images[0][1][:2])], n0=5, n=20).images[0].votes
    ),
    "smoothed_predict": lambda m, images: timm_nrpm.certification.smoothed_predict(m, images[0][0][:2], n=20),
    "calibrate_": lambda m, images: (
        timm_nrpm.calibrate_(m, [training(64)]),
        unwrapped(m).bn1.running_mean.tolist(),
    )[1],
    "lambdas": lambda m, images: timm_nrpm.lambdas(m),
    "plain_copy": lambda m, images: timm_nrpm.plain_copy(m).bn1.running_mean.tolist(),
    "landscape": lambda m, images: (
        timm_nrpm.landscape.loss_landscape(m, images[0][0][:1], images[0][1][:1], eps=0.1, resolution=3).clean
    ),
    "search_lambda": lambda m, images: (
        timm_nrpm.search_lambda(m, images, THREAT, budget=2, steps=1, layerwise=False).trials
    ),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_changes_no_number(wrapper, entrance, images):
    want = ENTRANCES[entrance](calibrated(), images)
    assert ENTRANCES[entrance](WRAPPERS[wrapper](calibrated()), images) == want


def test_a_wrapped_model_is_saved_tuned_and_reprogrammed(tmp_path):
    folder = timm_nrpm.save_pretrained(nn.DataParallel(calibrated()), tmp_path / "v")
    assert timm_nrpm.lambdas(timm_nrpm.from_pretrained(folder)) == timm_nrpm.lambdas(calibrated())
    wrapped = nn.Sequential(fresh())
    loader = DataLoader(TensorDataset(*(t[:64] for t in digits("train"))), batch_size=32)
    config = TuneConfig(objective="fgsm", eps=0.1, epochs=1, lam_lr=0.5, output=str(tmp_path / "run"))
    timm_nrpm.tune(wrapped, loader, config)
    assert timm_nrpm.lambdas(timm_nrpm.from_pretrained(tmp_path / "run" / "variant")) == timm_nrpm.lambdas(wrapped)
    plain = nn.DataParallel(timm.create_model(DIGITS, pretrained=True))
    assert set(timm_nrpm.lambdas(timm_nrpm.reprogram_(plain, NRPMConfig(lam=0.3))).values()) == {0.3}
    assert not timm_nrpm.lambdas(timm_nrpm.restore_(plain))


def test_what_a_module_around_a_model_normalises_has_to_be_said(images):
    model = Around(fresh())
    with pytest.raises(ValueError, match=r"holds a timm model, _SmallResNet as 'backbone'.*mean= and std="):
        quick(model, images)
    assert quick(model, images, mean=(0.5,), std=(0.5,), control=False).survivors == quick(fresh(), images).survivors
    with pytest.raises(ValueError, match="The model is a dict"):
        timm_nrpm.evaluate({}, images)


# 3. and 14. Copies.


def test_a_forward_replaced_on_the_instance_is_refused_where_a_copy_is_needed():
    model = fresh()
    forward = model.forward
    model.forward = lambda x: forward(x) / 2
    for call in (timm_nrpm.plain_copy, lambda m: timm_nrpm.calibrate_(m, [training(8)])):
        with pytest.raises(ValueError, match=r"was replaced on the instance.*Write a class"):
            call(model)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore::timm_nrpm.errors.ReprogrammingWarning")
@pytest.mark.parametrize("how", ["prune", "weight_norm", "parametrization", "kept", "hook"])
def test_computed_tensors_are_copied(how, images):
    model = timm.create_model(DIGITS, pretrained=True).eval()
    if how == "prune":
        prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.3)
    elif how == "weight_norm":
        nn.utils.weight_norm(model.fc)
    elif how == "parametrization":
        parametrizations.weight_norm(model.layer1[0].conv2)
    kept = model.kept = [torch.ones(3, requires_grad=True) * 2] if how == "kept" else []
    if how == "hook":
        model.bn1.seen = kept
        model.bn1.register_forward_hook(lambda m, i, o: m.seen.append(o))
    timm_nrpm.calibrate_(timm_nrpm.reprogram_(model, NRPMConfig(lam=0.6)), [training()])
    PixelModel(model)(images[0][0][:4].requires_grad_())
    report = quick(model, [(images[0][0][:10], images[0][1][:10])])
    assert report.clean > 0.5
    twin = copied(model)
    with torch.no_grad():
        x = torch.rand(2, 1, 8, 8)
        assert torch.equal(twin(x), model(x))


# 15. and 16. Loaders, images, labels and numbers.


class Stream(IterableDataset):
    def __init__(self, pixels, labels):
        self.pairs = list(zip(pixels, labels, strict=True))

    def __iter__(self):
        return iter(self.pairs)


def test_a_loader_without_a_length(images):
    pixels, labels = images[0]
    stream = DataLoader(Stream(pixels, labels), batch_size=60)
    model = calibrated()
    assert quick(model, stream).survivors == quick(model, images).survivors
    timm_nrpm.calibrate_(model, stream)
    kinds = (("white_noise",), (3,))
    assert (
        timm_nrpm.evaluate_corruptions(model, stream, *kinds).model
        == timm_nrpm.evaluate_corruptions(model, images, *kinds).model
    )


def test_inside_inference_mode(images):
    want = quick(calibrated(), images).survivors
    with torch.inference_mode():
        model = calibrated()
        assert quick(model, [(images[0][0] * 1.0, images[0][1] * 1)]).survivors == want
        made = timm.create_model(DIGITS, pretrained=True).eval()
        with pytest.raises(ValueError, match=r"made under torch.inference_mode"):
            quick(made, images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32])
def test_labels_of_every_integer_type(dtype, images):
    pixels, labels = images[0]
    assert (
        quick(fresh(), [(pixels, labels.to(dtype))], control=False).clean == quick(fresh(), images, control=False).clean
    )


def test_images_are_pixels_at_every_entrance(images):
    pixels, labels = images[0]
    entrances = {
        "evaluate": lambda x: quick(fresh(), [(x, labels)]),
        "calibrate_": lambda x: timm_nrpm.calibrate_(fresh(), [x]),
        "certify": lambda x: timm_nrpm.certify(fresh(), [(x, labels)], n=20),
        "evaluate_corruptions": lambda x: timm_nrpm.evaluate_corruptions(fresh(), [(x, labels)], ("white_noise",)),
        "search_lambda": lambda x: timm_nrpm.search_lambda(fresh(), [(x, labels)], THREAT, budget=2, layerwise=False),
        "tune": lambda x: timm_nrpm.tune(fresh(), DataLoader(TensorDataset(x, labels), 60), TuneConfig(epochs=1)),
    }
    for call in entrances.values():
        for wrong, said in (
            (pixels * 2 - 1, r"from -1 to 1: give pixels in \[0, 1\]"),
            ((pixels * 255).byte(), "uint8"),
        ):
            with pytest.raises(ValueError, match=said):
                call(wrong)
    rounded = pixels * (1 + 5e-7) - 2e-7
    assert rounded.min() < 0
    assert quick(calibrated(), [(rounded, labels)], control=False).clean > 0.9
    timm_nrpm.calibrate_(fresh(), [rounded])


def test_numbers_of_numpy_and_quantised_models(images):
    report = quick(fresh(), images, control=False)
    with_numpy = timm_nrpm.evaluate(fresh(), images, Threat("Linf", np.float32(0.15)), "quick", steps=5, control=False)
    assert with_numpy.clean == report.clean
    json.loads(with_numpy.to_json())


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_refused_in_words(images):
    model = torch.ao.quantization.quantize_dynamic(timm.create_model(DIGITS, pretrained=True).eval(), {nn.Linear})
    for call in (
        lambda: quick(model, images),
        lambda: timm_nrpm.reprogram_(model),
        lambda: timm_nrpm.certify(model, images, n=20),
    ):
        with pytest.raises(ValueError, match=r"model is quantised.*floating-point model"):
            call()


def test_features_are_no_classes(images):
    model = timm_nrpm.create_model(DIGITS, lam=0.5, num_classes=0).eval()
    with pytest.raises(ValueError, match="num_classes=0: it gives features"):
        quick(model, images)


# 8. and 21. Words.


@pytest.mark.slow
def test_clean_is_a_number_and_a_worst_case_is_adaptive(images):
    report = quick(calibrated(), images, control=False)
    assert report.clean == sum(report.correct) / 60
    assert "worst case" not in str(report).replace("which is no worst case", "")
    adaptive = timm_nrpm.evaluate(calibrated(), images, THREAT, effort="fast", control=False)
    assert "in the worst case" in adaptive.verdict
    assert adaptive.worst_case < report.worst_case


@pytest.mark.slow
def test_effort_is_one_setting(images):
    small = [(images[0][0][:12], images[0][1][:12])]
    passes = {}
    for effort in ("fast", "default"):
        report = timm_nrpm.evaluate(calibrated(), small, THREAT, effort=effort, control=False)
        passes[effort] = sum(attack.forwards for attack in report.attacks)
        level = timm_nrpm.attacks.efforts.LEVELS[effort]
        assert (report.rounds, report.evolutions) == (level.rounds, level.evolutions)
    assert passes["fast"] < passes["default"]
    with pytest.raises(ValueError, match=r'effort="fast" is for the suite|effort=.fast. is for the suite'):
        quick(fresh(), small, effort="fast")
    with pytest.raises(ValueError, match=r"choose one of fast, default, exhaustive"):
        timm_nrpm.evaluate(fresh(), small, THREAT, effort="most")
