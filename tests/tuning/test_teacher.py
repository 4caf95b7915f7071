"""Tuning of plain models, and by a teacher."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm import NRPMConfig, TuneConfig, tune
from timm_nrpm.data.loaders import digits
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.tuning.plain import tune_weights
from timm_nrpm.tuning.teacher import tune_by_teacher

FAST = {"eps": 0.1, "steps": 1, "epochs": 1}


def plain() -> nn.Module:
    return timm.create_model("resnet8_digits", pretrained=True).eval()


def blank() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def loader(count: int = 64) -> DataLoader:
    pixels, labels = digits("train")
    return DataLoader(TensorDataset(pixels[:count], labels[:count]), batch_size=32, shuffle=True)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_plain_model_is_tuned_as_the_reprogrammed_one_at_lambda_1():
    ours, theirs = plain(), timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=1.0).eval()
    names = tuple(name for name, _ in ours.named_parameters())
    tune_weights(ours, loader(), TuneConfig(**FAST, lr=0.05))
    tune(theirs, loader(), TuneConfig(**FAST, paradigm="all", trainable=names, lr=0.05))
    assert not timm_nrpm.lambdas(ours)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert not torch.equal(ours.bn1.running_mean, plain().bn1.running_mean)


def test_globs_and_frozen_weights_of_a_plain_model_are_respected():
    model = plain()
    before = state(model)
    tune_weights(model, loader(), TuneConfig(**FAST, trainable="fc.*"))
    assert {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])} == {"fc.weight", "fc.bias"}
    model.requires_grad_(False).fc.bias.requires_grad_(True)
    before = state(model)
    tune_weights(model, loader(), TuneConfig(**FAST))
    assert {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])} == {"fc.bias"}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["fc.bias"]
    with pytest.raises(ValueError, match="trainable='nope' matches no parameter"):
        tune_weights(model, loader(), TuneConfig(**FAST, trainable="nope"))
    assert not timm_nrpm.lambdas(model)


def test_a_reprogrammed_model_stays_reprogrammed():
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5).eval()
    tune_weights(model, loader(32), TuneConfig(**FAST, trainable="fc.weight"))
    assert set(timm_nrpm.lambdas(model).values()) == {0.5}


def test_a_student_comes_to_predict_what_its_teacher_does():
    teacher, student = plain(), blank()
    before = state(teacher)
    pixels = digits("test")[0][:100]
    config = TuneConfig(eps=0.0, epochs=5, optimizer="adamw", lr=0.01)

    def apart():
        with torch.no_grad():
            ours, theirs = student(pixels).log_softmax(1), PixelModel(teacher)(pixels).log_softmax(1)
        return float((theirs.exp() * (theirs - ours)).sum(1).mean())

    start = apart()
    history = tune_by_teacher(student, teacher, loader(320), config)
    assert apart() < start / 2
    assert history.config.objective == "teacher"
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not student.training or student[1].training  # modes are as they were


def test_only_the_named_part_learns():
    student, teacher = blank(), plain()
    before = state(student)
    tune_by_teacher(student, teacher, loader(), TuneConfig(**FAST, trainable="3.*"))
    assert {n for n, v in student.state_dict().items() if not torch.equal(v, before[n])} == {"3.weight", "3.bias"}


def test_a_teacher_of_other_classes_or_none_is_refused():
    student = timm_nrpm.reprogram_(blank(), NRPMConfig(lam=0.5))
    before = state(student)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with pytest.raises(ValueError, match="The teacher has 7 classes, and the model 10"):
        tune_by_teacher(student, other, loader(), TuneConfig(**FAST))
    with pytest.raises(ValueError, match="with no teacher: give both"):
        tune(student, loader(), TuneConfig(**FAST, objective="teacher"))
    with pytest.raises(ValueError, match="objective='pgd' with a teacher"):
        tune(student, loader(), TuneConfig(**FAST), teacher=plain())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_run_does_not_go_on_under_another_teacher(tmp_path):
    student = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=1.0).eval()
    config = TuneConfig(**FAST, paradigm="all", objective="teacher", trainable="fc.*", output=str(tmp_path))
    tune(student, loader(32), config, teacher=plain())
    other = plain()
    with torch.no_grad():
        other.fc.bias.add_(1.0)
    with pytest.raises(ValueError, match="the teacher"):
        tune(student, loader(32), config, teacher=other, resume=True)
