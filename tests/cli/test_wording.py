"""Messages of the library as the command line says them."""

import argparse
import ast
from pathlib import Path

import pytest

import timm_nrpm
from timm_nrpm.cli import options
from timm_nrpm.cli import program as cli
from timm_nrpm.cli.wording import COMMON, called, message_of, worded

PACKAGE = Path(timm_nrpm.__file__).parent


def said(command, text):
    parser = cli._parsers()[1][command]
    return worded(text, parser, parser.get_default("command").names)


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        ("tune", "lr=0.1 and lam_lr=1e-05 are low.", "--lr 0.1 and --lam-lr 1e-05 are low."),
        ("tune", "go on with it by resume=True, or give another output.",
         "go on with it by --resume, or give another folder as --output."),
        ("tune", "'tar' needs root=. Give as root= a folder", "'tar' needs --root. Give as --root a folder"),
        ("tune", "root='/no where' does not exist", "--root '/no where' does not exist"),
        ("tune", "root='/x' does not exist. Give download=True.", "--root /x does not exist. Give --download."),
        ("tune", "hflip=0.5 without augment=True mirrors", "--hflip 0.5 without --augment mirrors"),
        ("tune", "give drop_last=True or another batch_size.", "give --drop-last or another --batch-size."),
        ("tune", "trainable=('*.lam', 'a b') matches", "--trainable '*.lam' 'a b' matches"),
        ("tune", "trainable=('fc (2)',) matches", "--trainable 'fc (2)' matches"),
        ("tune", r"""root='/it\'s "x"' is no folder""", """--root '/it'"'"'s "x"' is no folder"""),
        ("tune", "root='/my batch_size runs' is no folder", "--root '/my batch_size runs' is no folder"),
        ("tune", 'objective="awp" perturbs, or paradigm="all"', "--objective awp perturbs, or --paradigm all"),
        ("tune", "The base says none: give one as license=, an id", "The base says none: give one as --license, an id"),
        ("tune", "step_size: None then, 0.1 now", "--step-size: None then, 0.1 now"),
        ("tune", "give --drop-last or drop_last=False.", "give --drop-last or no --drop-last."),
        ("evaluate", 'choose suite="adaptive" or "quick".', 'choose --suite adaptive or "quick".'),
        ("evaluate", "steps=0 and queries=-3 are", "--steps 0 and --queries -3 are"),
        ("evaluate", "give eps=8 / 255.", "give --eps 8/255."),
        ("evaluate", "or a model with num_classes=11)", "or a model with --num-classes 11)"),
        ("evaluate", "give resume= another file", "give --output another folder as --output"),
        ("evaluate", "a copy: checkpoint_path=FILE with pretrained=False, or pretrained_cfg_overlay=dict(file=FILE).",
         "a copy: --weights FILE."),
        ("evaluate", "timm_nrpm.list_models() lists all.", "timm-nrpm models lists all."),
        ("push", "leave out revision='x'", "leave out --revision x"),
        ("pull", "give local_files_only=True", "give --offline"),
        # What has no flag, and what is no argument, is left.
        ("evaluate", "give input_size=(C, H, W), or", "give --image-size H W, or"),
        ("push", "mean=(0.5,) of model=x", None),
        ("evaluate", "mean=(0.5,) and std=(0.5, 0.4)", "--mean 0.5 and --std 0.5 0.4"),
        ("evaluate", "gradient_masking at layer1.0.conv1 of tf_efficientnet_lite0", None),
        ("evaluate", "/data/batch_size/x and 'batch_size' and model.eps=3", None),
        ("models", "root= and samples=3", None),
    ],
)  # fmt: skip
def test_arguments_are_flags(command, text, expected):
    assert said(command, text) == (text if expected is None else expected)


def test_the_place_of_an_error_says_which_flag_it_was():
    parser = cli._parsers()[1]["evaluate"]
    for flags, expected in (({}, "--eps 0"), ({"eps": "--estimator-eps"}, "--estimator-eps 0")):
        with pytest.raises(ValueError, match="eps=0") as caught, called(eps="--outer"), called(**flags):
            raise ValueError("eps=0")
        assert message_of(caught.value, parser, {}) == (expected if flags else "--outer 0")


def test_every_phrase_that_a_command_replaces_is_one_of_the_librarys():
    """A message that is reworded must not leave the command line with words of Python."""
    nodes = [node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for parser in cli._parsers()[1].values():
        for phrase in {**COMMON, **parser.get_default("command").names}:
            assert phrase.isidentifier() or sum(phrase in text for text in texts) > 1, phrase


def test_an_error_without_a_message_is_named():
    assert message_of(ValueError(), argparse.ArgumentParser(), {}) == "ValueError()"


def test_a_number_may_be_a_fraction():
    assert options.number("8/255") == 8 / 255
    assert options.number_or_none("None") is None
    for text in ("1/0", "nan", "", "inf", "1e400", "1e999999999"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is no number, such as 0.03 or 8/255"):
            options.number(text)
