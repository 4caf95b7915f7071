"""The command `advise` from a user's files to a variant that can be pushed, which takes minutes."""

import json

import pytest
import timm
import torch
from torch import nn
from torchvision.utils import save_image

import timm_nrpm
from timm_nrpm.cli.program import main
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.corruptions import corrupt
from timm_nrpm.evaluation.trials import Advice
from timm_nrpm.hub.publishing import push_to_hub
from timm_nrpm.nn.pixel_model import PixelModel


@pytest.mark.slow
def test_the_digits_in_ten_minutes_end_to_end(tmp_path, monkeypatch, capsys):
    """The command of the README: its variant loads, evaluates to the same numbers, and can be pushed."""
    monkeypatch.chdir(tmp_path)
    assert main(["advise", "--eps", "0.15", "--samples", "360", "--seconds", "600", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["advice"]
    advice = Advice.from_json(json.dumps(told))
    assert advice.helps
    assert advice.advised.strategy in ("tuning a few layers", "tuning all")
    effect = advice.effect(advice.advised)
    assert effect.low > 10
    assert advice.loss(advice.advised, "report") <= 2
    folder = tmp_path / "advised" / "Linf-0.15" / "variant"
    call = [
        "evaluate",
        "--variant",
        str(folder),
        "--samples",
        "180",
        "--eps",
        "0.15",
        "--effort",
        "fast",
        "--no-control",
    ]
    assert main([*call, "--output", "checked", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    report = timm_nrpm.RobustnessReport.from_dict(report)
    assert "".join(str(int(each)) for each in report.survivors) == advice.advised.report.threat
    published = push_to_hub(folder, "me/advised", dry_run=True)
    assert "evaluation.json" in published.files


@pytest.mark.slow
def test_a_users_own_model_of_five_classes_end_to_end(tmp_path, monkeypatch, capsys):
    """A folder of images, a checkpoint, and one command; what it writes is loaded, gains under the noise on images of
    which half were never shown to it, is evaluated, and can be pushed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    pixels, labels = (torch.cat(parts) for parts in zip(digits("train"), digits("test"), strict=True))
    rows = (labels < 5).nonzero().squeeze(1)[:700]
    labels = labels[rows]
    pixels = nn.functional.interpolate(pixels[rows].expand(-1, 3, -1, -1), (64, 64), mode="bilinear").clamp(0, 1)
    for split, part in (("train", slice(0, 400)), ("test", slice(400, 700))):
        for number, (image, label) in enumerate(zip(pixels[part], labels[part], strict=True)):
            place = tmp_path / "photos" / split / str(int(label))
            place.mkdir(parents=True, exist_ok=True)
            save_image(image, place / f"{number}.png")
    net = timm.create_model("resnet18", num_classes=5)
    whole = PixelModel(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for _ in range(3):
        for batch, wanted in zip(pixels[:400].split(50), labels[:400].split(50), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(whole.train()(batch), wanted).backward()
            optimizer.step()
    torch.save({"state_dict": net.state_dict(), "epoch": 3, "arch": "resnet18"}, "mine.pth.tar")

    model = ["--model", "resnet18", "--weights", "mine.pth.tar", "--num-classes", "5", "--image-size", "64"]
    images = ["--data", "folder", "--root", "photos"]
    asked = ["--kinds", "salt_and_pepper", "--samples", "80", "--effect", "15", "--seconds", "100"]
    assert main(["advise", *model, *images, *asked, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["advice"]
    shifted = Advice.from_json(json.dumps(told))
    assert shifted.helps
    variant = str(tmp_path / "advised" / "salt_and_pepper-of-severity-5" / "variant")
    same = timm_nrpm.from_pretrained(variant).eval()
    noisy = corrupt(pixels[400:], "salt_and_pepper", 5, first=1000)
    with torch.no_grad():
        ours, plain = (PixelModel(each).eval()(noisy).argmax(1).eq(labels[400:]).sum() for each in (same, net.eval()))
    assert ours > plain + 30  # a tenth of the images
    assert (
        main(["evaluate", "--variant", variant, *images, "--samples", "20", "--eps", "1/255", "--suite", "quick"]) == 0
    )
    published = push_to_hub(variant, "me/advised", dry_run=True, license="mit")
    assert "nrpm_config.json" in published.files
