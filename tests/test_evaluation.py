import pytest
import timm
import torch
import torch.nn as nn

import timm_nrpm
from timm_nrpm import NRPMConfig, RobustnessReport, Threat, evaluate, reprogram_
from timm_nrpm.attacks import PixelModel, fgsm, pgd
from timm_nrpm.data import digits
from timm_nrpm.evaluation import MASKED, NON_FINITE
from timm_nrpm.registry import DIGITS


@pytest.fixture(scope="module")
def data():
    pixels, labels = (t[:60] for t in digits("test"))
    return list(zip(pixels.split(32), labels.split(32), strict=True))


def linear(weight, bias=(0.0, 0.0)):
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(weight[0]), 2))
    model[1].weight.data, model[1].bias.data = torch.tensor(weight), torch.tensor(bias)
    return model


def test_a_linear_model_falls_where_it_must():
    """Margin 2 * 0.2 between the logits of two pixels: Linf 0.05 keeps it, 0.25 does not."""
    model = linear([[1.0, 0.0], [0.0, 1.0]])
    pixels, labels = torch.tensor([[0.7, 0.3], [0.2, 0.6]]).view(2, 2, 1, 1), torch.tensor([0, 1])
    for eps, worst in ((0.05, 1.0), (0.15, 1.0), (0.25, 0.0)):
        report = evaluate(model, [(pixels, labels)], Threat("Linf", eps))
        assert report.accuracy("clean") == 1.0
        assert report.worst_case == report.accuracy("fgsm") == report.accuracy("pgd") == worst


def test_attacks_stay_in_bounds_and_in_pixels():
    model = timm.create_model(DIGITS, pretrained=True).eval()
    pixels, labels = (t[:20] for t in digits("test"))
    for attack in (fgsm("fgsm", PixelModel(model), 0.1), pgd("pgd", PixelModel(model), 0.1, 5, seed=0)):
        attacked = attack.run(pixels, labels)
        assert (attacked - pixels).abs().max() <= 0.1 + 1e-6
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        assert torch.equal(attacked, attack.run(pixels, labels))  # seeded


def test_pgd_leaves_the_global_generator_alone():
    model = linear([[1.0, 0.0], [0.0, 1.0]])
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    pgd("pgd", PixelModel(model), 0.1, 2, seed=0).run(torch.rand(1, 2, 1, 1).zero_(), torch.tensor([0]))
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), want)


def test_normalisation_happens_inside(data):
    model = timm.create_model(DIGITS, pretrained=True).eval()
    pixels, _ = data[0]
    torch.testing.assert_close(PixelModel(model)(pixels), model((pixels - 0.5) / 0.5))
    torch.testing.assert_close(PixelModel(model, (0.0,), (1.0,))(pixels), model(pixels))


def test_the_report_is_per_image_and_adds_up(data):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.9)
    report = evaluate(model, data, Threat("Linf", 0.1), steps=3)
    assert list(report.correct) == ["clean", "fgsm", "pgd", "pgd_plain"]
    assert report.samples == 60
    images = torch.tensor([report.correct[a] for a in report.correct])
    assert report.worst_case == pytest.approx(images.all(0).double().mean().item())
    assert not (images[1:] & ~images[0]).any()  # wrong when clean is wrong under attack
    assert report.worst_case <= min(map(report.accuracy, report.correct))
    assert str(report).startswith("60 images, Linf 0.1: clean ")
    assert "True" not in repr(report)
    with pytest.raises(ValueError, match="it has clean, fgsm, pgd, pgd_plain"):
        report.accuracy("cleann")
    assert RobustnessReport.from_json(report.to_json()) == report
    assert evaluate(model, data, Threat("Linf", 0.1), steps=3) == report


def test_a_plain_model_has_no_transfer_and_equals_lambda_one(data):
    plain = timm.create_model(DIGITS, pretrained=True)
    ours = timm_nrpm.create_model(DIGITS, pretrained=True, lam=1.0)
    a, b = (evaluate(m, data, Threat("Linf", 0.1), steps=3) for m in (plain, ours))
    assert "pgd_plain" not in a.correct
    assert all(b.correct[name] == images for name, images in a.correct.items())
    assert b.correct["pgd_plain"] == b.correct["pgd"]


def test_gradient_masking_is_flagged(data):
    """The bundled model at lambda 0.4: the transfer attack leaves far fewer images right than its own gradient."""
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.4)
    timm_nrpm.calibrate_(model, [(digits("train")[0][:300] - 0.5) / 0.5])
    report = evaluate(model, data, Threat("Linf", 0.15), steps=5)
    assert report.accuracy("pgd_plain") < report.accuracy("pgd") - 0.1
    assert report.flags == (MASKED,)
    assert evaluate(reprogram_(model, NRPMConfig(lam=1.0)), data, Threat("Linf", 0.15), steps=5).flags == ()


class Cliff(nn.Linear):
    """A correct model whose gradient is not a number."""

    def forward(self, x):
        return super().forward(x.flatten(1)) + 0 * (x - x).abs().sqrt().sum()


def test_a_gradient_that_is_not_a_number_is_flagged():
    model = Cliff(2, 2)
    model.weight.data, model.bias.data = torch.eye(2), torch.zeros(2)
    pixels = torch.tensor([[0.9, 0.1]]).view(1, 2, 1, 1)
    report = evaluate(model, [(pixels, torch.tensor([0]))], Threat("Linf", 0.1), steps=2)
    assert report.flags == (NON_FINITE,)
    assert report.worst_case == 1.0


def test_the_model_is_left_as_it_was(data):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.9).train()
    model.fc.weight.requires_grad_(False)
    model.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, data[:1], Threat("Linf", 0.1), steps=2)
    assert model.training
    assert not model.bn1.training
    assert not model.fc.weight.requires_grad
    assert model.conv1.weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_and_no_grad(data):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.9).bfloat16()
    with torch.no_grad():
        report = evaluate(model, data[:1], Threat("Linf", 0.1), steps=2)
    assert report.accuracy("pgd") < report.accuracy("clean")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Threat("L7", 0.1), "norm='L7' is not known"),
        (lambda: Threat("Linf", 8), "like 8 / 255"),
        (lambda: Threat("Linf", 0), "eps=0"),
        (lambda: Threat("Linf", "8/255"), "eps='8/255'"),
        (lambda: evaluate(linear([[1.0], [0.0]]), [], steps=0), "steps=0"),
        (lambda: evaluate(linear([[1.0], [0.0]]), [], 0.1), "is no Threat"),
        (lambda: evaluate(linear([[1.0], [0.0]]), []), "gave no images"),
        (
            lambda: PixelModel(linear([[1.0], [0.0]]), (0.5,) * 3, (0.5,) * 3)(torch.zeros(1, 1, 1, 1)),
            "have 1 channels, and the model's normalisation has 3",
        ),
        (
            lambda: evaluate(linear([[1.0], [0.0]]), [(torch.full((1, 1, 1, 1), -2.0), torch.tensor([0]))]),
            r"from -2 to -2: give pixels in \[0, 1\]",
        ),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()
