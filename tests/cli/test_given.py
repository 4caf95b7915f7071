"""Options that have no effect, which are refused, and defaults, which are not."""

import re
from pathlib import Path

import pytest

import timm_nrpm
from timm_nrpm.cli import program as cli
from timm_nrpm.cli.given import completed
from timm_nrpm.cli.program import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--samples", "5", "--first", "5"],
        ["tune", "--validation-samples", "5", "--validation-first", "5"],
        ["tune", "--lam", "none"],
        ["tune", "--objective", "teacher"],  # a teacher is a model, which no option gives
    ],
)
def test_options_that_exclude_each_other_are_a_wrong_call(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


USELESS = [  # the call, the flags that the message names, and some of the reason
    ("evaluate --variant VARIANT --lam 0.9 --iterations 1 --layers nosuch --num-classes 77",
     "--num-classes, --lam, --iterations and --layers have no effect: VARIANT is", "give its base as --model"),
    ("evaluate --variant VARIANT --weights w.pth --no-pretrained --penalty l2", "--weights, --no-pretrained and", ""),
    ("evaluate --variant VARIANT --lam none", "--lam has no effect: VARIANT is a variant", ""),
    ("evaluate --variant VARIANT --calibrate 100", "--calibrate has no effect", "brings its own statistics"),
    ("evaluate --variant VARIANT --calibrate 0 --training-split a", "--calibrate and --training-split have no", ""),
    ("evaluate --variant me/somebodys --lam 0.5", "--lam has no effect: me/somebodys is a variant", ""),
    ("tune --variant VARIANT --lam 0.5", "--lam has no effect: VARIANT is a variant", ""),
    ("evaluate --weights w.pth --no-pretrained", "--no-pretrained has no effect", "those of --weights"),
    ("evaluate --lam none --iterations 2 --layers fc", "--iterations and --layers have no effect", "model is plain"),
    ("evaluate --lam none --calibrate 10 --no-control", "--calibrate has no effect", "--no-control has no effect"),
    ("evaluate --calibrate 0 --training-split val", "--training-split has no effect", "--calibrate 0 takes no images"),
    ("evaluate --suite quick --queries 10", "--queries has no effect", "no random search"),
    ("evaluate --root photos", "--root has no effect", "Give --data folder, tar or torch/NAME with it"),
    ("evaluate --data folder --root FOLDER --download", "--download has no effect", "torch/NAME"),
    ("evaluate --data folder --root FOLDER --split test", "--split has no effect: FOLDER is one set", "is read whole"),
    ("tune --data folder --root FOLDER --validation-split a", "--validation-split has no effect", "the splits"),
    ("tune --hflip 0.5", "--hflip has no effect", "with --augment alone"),
    ("tune --lr 0.1 --weight-decay 0", "--lr and --weight-decay have no effect", "Give --paradigm all"),
    ("tune --objective fgsm --steps 3", "--steps has no effect", "the objective fgsm"),
    ("tune --eps 0 --steps 3 --gradient bpda", "--steps has no effect", "nor does --eps 0"),
    ("tune --objective clean --step-size 0.1 --gradient plain", "--step-size and --gradient have no effect", ""),
    ("tune --objective clean --eps 0.1 --evaluate-eps 0.2", "--eps has no effect", "--evaluate-eps"),
    ("tune --beta 2", "--beta has no effect: the objective pgd has no second term", "srat and comp-sum"),
    ("tune --objective weat --temperature 2", "--temperature has no effect: the objective weat", "kl-dro and srat"),
    ("tune --objective trades --weight-perturbation 0.1", "--weight-perturbation has no effect", "--objective awp"),
    ("tune --target-momentum 0.5 --target-start 2", "--target-momentum and --target-start have no effect", "sat"),
    ("tune --schedule constant --warmup-epochs 1", "--warmup-epochs has no effect", "the schedule is constant"),
    ("tune --license mit", "--license has no effect", "Give --push-to with it"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "flags", "reason"), USELESS, ids=[call for call, *_ in USELESS])
def test_an_option_without_effect_is_refused(tmp_path, monkeypatch, capsys, call, flags, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "VARIANT").mkdir()
    (tmp_path / "VARIANT" / "nrpm_config.json").write_text("{}")
    (tmp_path / "FOLDER" / "a").mkdir(parents=True)
    assert main(call.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("timm-nrpm: ")
    assert flags in error
    assert reason in error


def test_arguments_that_are_left_out_have_their_defaults():
    parser, commands = cli._parsers()
    for call, expected in ((["tune"], "resnet8_digits"), (["evaluate", "--model", "lenet"], "lenet")):
        args = completed(parser.parse_args(call), commands[call[0]])
        assert args.model == expected
        assert args.data == "digits"


def test_what_is_default_was_not_given(tmp_path, capsys):
    """The defaults of the options above are no reason to refuse."""
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.7)
    folder = str(timm_nrpm.save_pretrained(model, tmp_path / "variant"))
    more = ["--suite", "quick", "--first", "3", "--steps", "1", "--output"]
    assert main(["evaluate", "--variant", folder, *more, str(tmp_path / "a")]) == 0
    assert main(["evaluate", "--lam", "none", *more, str(tmp_path / "b")]) == 0


def test_every_call_in_the_documents_has_only_options_with_an_effect(monkeypatch, tmp_path):
    lines = [path.read_text().replace("\\\n", " ") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))]
    names = "|".join(cli._parsers()[1])
    calls = re.findall(rf"(?:timm-nrpm|timm_nrpm\.cli) ((?:{names}) [^#\n`]*)", "\n".join(lines))
    calls = [call for call in calls if call.split()[1][0] == "-" or " --" in call]
    assert len(calls) >= 15
    monkeypatch.chdir(tmp_path)
    parser, commands = cli._parsers()
    for call in calls:
        if "..." not in call:
            args = parser.parse_args(call.split())
            completed(args, commands[args.command_name], args.command.useless)
