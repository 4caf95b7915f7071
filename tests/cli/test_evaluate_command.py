"""`timm-nrpm evaluate`, against the library's own results."""

import numpy as np
import pytest
import torch
from PIL import Image

import timm_nrpm
from timm_nrpm.cli.program import main
from timm_nrpm.data.loaders import digits, pixel_loader

QUICK = ["evaluate", "--samples", "24", "--steps", "2"]
EVALUATE = [*QUICK, "--queries", "3", "--calibrate", "64"]


def test_evaluate_prints_draws_and_goes_on(capsys, tmp_path):
    """Two bounds, then the same command again, which has nothing left to do."""
    call = [*EVALUATE, "--eps", "0.05", "38/255", "--lam", "0.5", "--output", str(tmp_path)]
    assert main(call) == 0
    out = capsys.readouterr().out
    assert out.count("24 images, Linf") == 2
    assert "the plain model" in out
    assert out.rstrip().endswith(f"Written: {tmp_path / 'report.html'}")
    files = {path.name for path in tmp_path.iterdir()}
    stems = ("adaptive-Linf-0.05", "adaptive-Linf-0.14902")
    assert files == {"attacks.png", "curves.png", "attacked.png", "report.html", "settings.json"} | {
        stem + end for stem in stems for end in (".json", ".jsonl")
    }
    reports = [timm_nrpm.RobustnessReport.from_json((tmp_path / f"{stem}.json").read_text()) for stem in stems]
    assert [report.threat.eps for report in reports] == [0.05, 38 / 255]
    assert reports[0].worst_case >= reports[1].worst_case
    assert reports[0].control is not None
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 2
    assert "data:image/svg" in page or "<svg" in page  # the curve
    journal = (tmp_path / "adaptive-Linf-0.05.jsonl").read_bytes()
    assert main(call) == 0
    assert (tmp_path / "adaptive-Linf-0.05.jsonl").read_bytes() == journal
    again = [timm_nrpm.RobustnessReport.from_json((tmp_path / f"{stem}.json").read_text()) for stem in stems]
    assert again == reports
    assert main([*call, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "seed: 0 then, 1 now" in error
    assert "or another folder as --output" in error


@pytest.mark.slow
def test_evaluate_takes_variants_plain_models_and_other_norms(capsys, tmp_path):
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.7)
    folder = str(timm_nrpm.save_pretrained(model, tmp_path / "variant"))
    calls = {
        "variant": [*QUICK, "--queries", "3", "--variant", folder, "--norm", "L0", "--eps", "3"],
        "plain": [*QUICK, "--lam", "none", "--suite", "quick"],
        "L1": [*EVALUATE, "--norm", "L1", "--eps", "2", "--no-control"],
    }
    titles = {"variant": f"{folder}, lambda 0.7", "plain": "resnet8_digits, plain", "L1": "resnet8_digits, lambda 0.8"}
    for name, call in calls.items():
        assert main([*call, "--output", str(tmp_path / name)]) == 0
        assert f"<h1>{titles[name]}</h1>" in (tmp_path / name / "report.html").read_text()
    out = capsys.readouterr().out
    assert "24 images, L0 3, adaptive" in out
    assert "24 images, L1 2, adaptive" in out
    report = timm_nrpm.RobustnessReport.from_json((tmp_path / "variant" / "adaptive-L0-3.json").read_text())
    assert report.sha256 == timm_nrpm.models.reprogramming.model_sha256(timm_nrpm.from_pretrained(folder))
    plain = timm_nrpm.RobustnessReport.from_json((tmp_path / "plain" / "quick-Linf-0.0313725.json").read_text())
    assert plain.control is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "2"], "--eps 2.0 is not allowed"),
        (["--estimator-eps", "0"], "--estimator-eps 0.0 is not allowed"),
        (["--norm", "L2"], "--eps is missing: under L2 it is the length of the change in pixel units, like 0.5"),
        (["--norm", "L0", "--eps", "0.5"], "a whole number of pixels"),
        (["--norm", "L1", "--eps", "2", "--suite", "paper"], "no attacks under L1"),
        (["--steps", "0"], "--steps 0 and --queries 3 are not allowed"),
        (["--training-split", "val"], "--training-split val: the digits have 'train' and 'test'"),
        (["--data", "folder", "--root", "/nowhere"], "/nowhere"),
    ],
)
def test_evaluate_refuses_in_one_line(capsys, tmp_path, arguments, message):
    assert main([*EVALUATE, *arguments, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("timm-nrpm: ")
    assert message in error


def test_an_output_that_is_no_folder_is_told_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["evaluate", "--model", "nosuch", "--output", str(tmp_path / "file")]) == 2
    assert f"--output {tmp_path / 'file'} cannot be written to" in capsys.readouterr().err


def test_evaluate_takes_the_first_images_of_a_split(tmp_path):
    assert main([*QUICK[:1], "--first", "7", "--steps", "1", "--suite", "quick", "--output", str(tmp_path)]) == 0
    report = timm_nrpm.RobustnessReport.from_json((tmp_path / "quick-Linf-0.0313725.json").read_text())
    pixels, labels = digits("test")
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.8)
    timm_nrpm.calibrate_(model, pixel_loader(samples=1000, batch_size=100))
    loader = [(pixels[:7], labels[:7])]
    expected = timm_nrpm.evaluate(model.eval(), loader, timm_nrpm.Threat(), "quick", steps=1)
    assert report.accuracy() == expected.accuracy()
    assert [attack.survived for attack in report.attacks] == [attack.survived for attack in expected.attacks]
    assert report.data == "digits, test, the first 7"


def folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 80 * i).save(root / name / f"{i}.png")
    return root


def test_folders_without_splits_are_told_about(tmp_path, capsys, monkeypatch):
    root = folders(tmp_path / "mine", *map(str, range(10)))
    more = ["--data", "folder", "--root", str(root), "--output"]
    call = ["evaluate", "--suite", "quick", "--steps", "1", *more, str(tmp_path / "out")]
    assert main(call) == 0
    error = capsys.readouterr().err
    assert f"timm-nrpm: {root} is not divided into splits, so the model is calibrated on images that are eval" in error
    report = timm_nrpm.RobustnessReport.from_json((tmp_path / "out" / "quick-Linf-0.0313725.json").read_text())
    assert report.data == "mine"
    assert report.samples == 30
    assert main(["tune", "--epochs", "1", "--steps", "1", *more, str(tmp_path / "run")]) == 0
    assert "so the validation images are among those tuned on" in capsys.readouterr().err


def test_another_number_of_classes_needs_a_class_map(tmp_path, capsys):
    root = folders(tmp_path / "mine", "train/one", "train/two", "test/two")
    (tmp_path / "map.txt").write_text("zero\none\ntwo\n")
    call = ["evaluate", "--suite", "quick", "--steps", "1", "--data", "folder", "--root", str(root)]
    call += ["--output", str(tmp_path / "out")]
    assert main(call) == 2
    error = capsys.readouterr().err
    assert f"'folder' in --root {root} has 2 classes (one, two), and the model has 10" in error
    assert "give a model with --num-classes 2, or the folder" in error
    assert "or the model's class of each name as --class-map" in error
    assert main([*call, "--class-map", str(tmp_path / "map.txt")]) == 0
    report = timm_nrpm.RobustnessReport.from_json((tmp_path / "out" / "quick-Linf-0.0313725.json").read_text())
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.8).eval()
    train = pixel_loader("folder", root, input_size=(1, 8, 8))
    timm_nrpm.calibrate_(model, train)
    pixels, _ = next(iter(pixel_loader("folder", root, split="test", input_size=(1, 8, 8))))
    with torch.no_grad():
        right = (model((pixels - 0.5) / 0.5).argmax(1) == 2).float().mean()
    assert report.accuracy() == pytest.approx(float(right))
    assert report.data == "mine, test"


def test_another_lambda_needs_another_folder(tmp_path, capsys):
    call = ["evaluate", "--suite", "quick", "--first", "3", "--steps", "1", "--output", str(tmp_path)]
    assert main([*call, "--lam", "0.4"]) == 0
    assert main([*call, "--lam", "0.4", "--eps", "0.1"]) == 0  # another bound is welcome
    for more in ([], ["--eps", "0.2"]):  # also where it would have a file of its own
        assert main([*call, "--lam", "0.9", *more]) == 2
        error = capsys.readouterr().err
        assert (
            f"{tmp_path} holds an evaluation of something else (--lam 0.4 then, 0.9 now): give another folder" in error
        )
        assert "as --output" in error
        assert "sha256" not in error
    page = (tmp_path / "report.html").read_text()
    assert "<h1>resnet8_digits, lambda 0.4</h1>" in page


def test_other_weights_need_another_folder_too(tmp_path, capsys):
    """The options may be the same, as where a variant was tuned further."""
    call = ["evaluate", "--variant", str(tmp_path / "v"), "--suite", "quick", "--first", "3", "--steps", "1"]
    call += ["--output", str(tmp_path / "out")]
    for lam, status in ((0.7, 0), (0.7, 0), (0.6, 2)):
        model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=lam)
        timm_nrpm.save_pretrained(model, tmp_path / "v")
        assert main(call) == status
    assert (
        "something else (the weights or statistics differ): give another folder as --output" in capsys.readouterr().err
    )


def test_what_failed_before_the_first_batch_claims_no_folder(tmp_path):
    call = ["evaluate", "--first", "3", "--output", str(tmp_path)]
    assert main([*call, "--steps", "0"]) == 2
    assert main([*call, "--suite", "quick", "--steps", "1", "--lam", "0.9"]) == 0


def test_a_failure_in_a_process_that_reads_is_one_line(tmp_path, capsys):
    root = folders(tmp_path / "mine", *(f"train/{i}" for i in range(10)))
    Image.fromarray(np.full((8, 8), -1, np.int32)).save(root / "train" / "3" / "deep.tif")
    (root / "train" / "3" / "deep.tif").rename(root / "train" / "3" / "deep.png")
    call = ["evaluate", "--data", "folder", "--root", str(root), "--split", "train", "--calibrate", "0"]
    assert main([*call, "--workers", "1", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("timm-nrpm: An image of mode 'I' has values from -1 to -1")
    assert error.count("\n") == 1


def test_warnings_speak_the_words_of_the_command(tmp_path, capsys):
    root = folders(tmp_path / "mine", "0", "1", "2")
    call = ["evaluate", "--suite", "quick", "--steps", "1", "--data", "folder", "--root", str(root)]
    assert main([*call, "--output", str(tmp_path / "out")]) == 0
    error = capsys.readouterr().err
    assert "timm-nrpm: warning: 'folder' in --root" in error
    assert "give a model with --num-classes 3, or --class-map." in error
    assert "UserWarning" not in error
