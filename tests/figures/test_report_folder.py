import pytest
import torch
from torch import nn

from timm_nrpm import NRPMConfig, Threat, evaluate, reprogram_
from timm_nrpm.figures.illustrations import attacks_in_words
from timm_nrpm.figures.report_folder import IMAGES, attack_one_batch, show


@pytest.fixture
def model():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    return reprogram_(net, NRPMConfig(lam=0.5, iterations=1, eps=0.01)).train()


@pytest.mark.parametrize(
    ("norm", "eps"),
    [("Linf", 0.2), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("L2", 1.0), ("L1", 5.0), ("L0", 4)))],
)
def test_the_pictures_are_of_real_attacks_and_the_model_is_left_alone(model, norm, eps, tmp_path):
    pixels = torch.rand(12, 1, 8, 8)
    labels = model.eval()(pixels).argmax(1)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    threat, data = Threat(norm, eps), [(pixels, labels)]
    report = evaluate(model, data, threat, "quick", steps=3, control=False)
    page = show([report], model, data, tmp_path / "new", title="four")
    assert page.read_text().count("data:image/png") == 2
    assert {path.name for path in page.parent.iterdir()} == {"report.html", "attacks.png", "attacked.png"}
    pixels, labels = pixels[:IMAGES], labels[:IMAGES]  # as the page does: under L2 the randomness is of a whole batch
    attacked, predictions = attack_one_batch(model, pixels, labels, report)
    assert bool(threat.allows(pixels, attacked).all())
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(predictions, model.eval()(attacked).argmax(1))
    text = page.read_text()
    changes = (attacked - pixels).abs().flatten(1).amax(1).tolist()
    wrong = int((predictions != labels).sum())
    assert f"8 images, each clean, attacked, and their difference, by at most {max(changes):.3g} in a pixel." in text
    assert f"The model is wrong on {wrong} attacked images" in text
    for i in range(IMAGES):
        cells = "".join(f"<td>{cell}</td>" for cell in (int(labels[i]), int(predictions[i]), f"{changes[i]:.3g}"))
        assert f'<tr><th scope="row">{i + 1}</th>{cells}</tr>' in text
    assert f'alt="{attacks_in_words(report)}"' in text


def test_curves_where_there_are_several_bounds(model, tmp_path):
    pixels, labels = torch.rand(6, 2, 8, 8)[:, :1], torch.tensor([0, 1, 2, 3, 4, 0])
    data = [(pixels, labels)]
    reports = [evaluate(model, data, Threat("Linf", eps), "quick", steps=2) for eps in (0.1, 0.2)]
    show(reports, model, data, tmp_path, title="two")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_bounds_of_two_norms_are_refused_before_anything_is_written(model, tmp_path):
    data = [(torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0]))]
    reports = [evaluate(model, data, threat, "quick", steps=2) for threat in (Threat("Linf", 0.1), Threat("L2", 1))]
    with pytest.raises(ValueError, match="norm"):
        show(reports, model, data, tmp_path, title="two")
    assert not list(tmp_path.iterdir())
