import pytest
import torch
from torch import nn

import timm_nrpm
from timm_nrpm import NRPMConfig
from timm_nrpm.errors import CheckpointWarning
from timm_nrpm.nn.fitted import Correction, StandardUnits
from timm_nrpm.tuning.checkpoints import Checkpoints, collect, install_


def names(checkpoints: Checkpoints) -> list[str]:
    return [path.name for path in checkpoints.paths()]


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, {"lam": torch.tensor(step / 100)}, {"step": step})


def test_what_was_saved_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "folder")
    assert checkpoints.last() is None
    shared = torch.arange(6.0)
    path = checkpoints.save(7, {"a": shared, "b": shared[::2], "c": torch.tensor(True)}, {"step": 7, "rows": [1, None]})
    last = checkpoints.last()
    assert (last.path, last.content["step"], last.content["rows"]) == (path, 7, [1, None])
    assert torch.equal(last.tensors["b"], shared[::2])
    assert last.tensors["c"].dtype == torch.bool


def test_only_the_last_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 8, 9, 10, 100)
    assert names(checkpoints) == ["step-00000010", "step-00000100"]


@pytest.mark.parametrize("keep", [1, 3])
def test_a_run_that_starts_over_keeps_what_it_saves(tmp_path, keep):
    """All that were kept are broken, so it goes on from the beginning, at steps before theirs."""
    checkpoints = Checkpoints(tmp_path, keep=keep)
    save(checkpoints, 80, 90, 100)
    for path in checkpoints.paths():
        (path / "state.json").write_text("{}")
    with pytest.warns(CheckpointWarning, match="is broken"):
        assert checkpoints.last() is None
    save(checkpoints, 10)
    assert checkpoints.last().content["step"] == 10
    save(checkpoints, 20)
    assert names(checkpoints) == ["step-00000010", "step-00000020"][-keep:]


def test_a_step_that_is_saved_again_is_never_missing(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5, 5, 5)
    assert names(checkpoints) == ["step-00000005+", "step-00000005++"]
    assert checkpoints.last().content["step"] == 5


def test_drafts_of_a_killed_process_are_swept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    draft = next(iter(tmp_path.iterdir())).rename(tmp_path / ".draft-killed")
    from timm_nrpm.models.saving import DRAFT

    draft.rename(tmp_path / f"{DRAFT}killed")
    assert checkpoints.last() is None
    save(checkpoints, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_what_calibration_fitted_comes_back():
    def network():
        layers = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
        return timm_nrpm.reprogram_(nn.Sequential(*layers), NRPMConfig(lam={"0": 0.5, "2": 1.0}, standardize=True))

    images = torch.rand(32, 1, 1, 6)
    model, other = (nn.Sequential(nn.Flatten(), network()) for _ in range(2))
    units = model[1][0].add_part(StandardUnits)
    units.distance.fill_(2.0)
    model[1][2].add_part(Correction).gain.fill_(3.0)
    other[1][2].add_part(StandardUnits)  # which the checkpoint does not have
    state = collect(model[1], model, torch.optim.SGD(model.parameters(), 0.1))
    install_(other[1], other, torch.optim.SGD(other.parameters(), 0.1), state)
    assert [sorted(layer.parts()) for layer in (other[1][0], other[1][2])] == [["units"], ["correction"]]
    with torch.no_grad():
        assert torch.equal(other(images), model(images))
