import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import forked
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import timm_nrpm
from timm_nrpm import NRPMConfig, TuneConfig, tune
from timm_nrpm.choices import OPTIMIZERS
from timm_nrpm.data.loaders import digits
from timm_nrpm.errors import CheckpointWarning
from timm_nrpm.evaluation.history import History

PROGRAM = Path(__file__).parents[1] / "tune_digits.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(PROGRAM.parents[1]),
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
}
FAST = {"eps": 0.1, "steps": 2, "epochs": 1, "evaluate_steps": 2}


def small() -> nn.Module:
    """Without BatchNorm."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return timm_nrpm.reprogram_(net, NRPMConfig(lam=0.5))


def bundled(lam: float = 0.5) -> nn.Module:
    return timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=lam).eval()


def loader(count: int = 64, batch: int = 16, split: str = "train") -> DataLoader:
    pixels, labels = digits(split)
    return DataLoader(TensorDataset(pixels[:count], labels[:count]), batch_size=batch, shuffle=split == "train")


def program(processes: int = 1, *runs: dict) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, str(PROGRAM), json.dumps(runs)]


Outcome = tuple[History, dict[str, torch.Tensor]]


def run_all(folder: Path, processes: int, runs: list[dict]) -> list[Outcome]:
    """Tune in processes of their own, once for each of the settings; the histories and the tuned weights."""
    results = [folder / f"{number}-of-{processes}.pt" for number in range(len(runs))]
    given = [{**settings, "result": str(result)} for settings, result in zip(runs, results, strict=True)]
    done = forked.run(program(processes, *given), capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    histories = [History.from_json(line) for line in done.stdout.splitlines()[-len(runs) :]]
    return [
        (history, torch.load(result, weights_only=True)) for history, result in zip(histories, results, strict=True)
    ]


def run(folder: Path, processes: int = 1, **settings) -> Outcome:
    return run_all(folder, processes, [settings])[0]


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], only: str = "") -> float:
    assert one.keys() == other.keys()
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one if k.endswith(only))


# --- what trains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_paradigm_2_leaves_every_weight_bit_identical(optimizer):
    model = bundled()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = TuneConfig(**FAST, lam_lr=0.5, weight_decay=0.1, optimizer=optimizer)
    history = tune(model, loader(), config)
    after = model.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == [k for k in before if k.endswith(".lam")]
    assert all(0 <= lam <= 1 for row in history.steps for lam in row.lams)
    assert {lam for row in history.steps for lam in row.lams} & {0.0, 1.0}  # at such a rate it meets an end
    assert all(p.grad is None for p in model.parameters())


def test_paradigm_3_moves_everything():
    model = bundled()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tune(model, loader(), TuneConfig(**FAST, paradigm="all"))
    same = [k for k, v in model.state_dict().items() if torch.equal(before[k], v)]
    assert all(name.endswith(".plain_num_batches_tracked") for name in same)  # which the plain model never counts


def test_what_is_frozen_stays_frozen_with_its_statistics():
    model = bundled()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tune(model, loader(), TuneConfig(**FAST, trainable=("layer3.*", "fc.*")))
    moved = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
    assert moved == {"layer3", "fc"}


def test_the_optimizer_holds_only_what_trains():
    seen = []

    class Spy(torch.optim.SGD):
        def __init__(self, groups, **options):
            super().__init__(groups, **options)
            seen.append([(len(g["params"]), g["lr"], g["weight_decay"]) for g in self.param_groups])

    with pytest.MonkeyPatch.context() as patch:
        create = lambda groups, name, lr: Spy(groups, lr=lr)  # noqa: E731
        patch.setattr("timm_nrpm.tuning.setup.create_optimizer_v2", create)
        tune(bundled(), loader(16), TuneConfig(**FAST, lam_lr=0.3, weight_decay=0.1))
        tune(bundled(), loader(16), TuneConfig(**FAST, lam_lr=0.3, lr=0.02, weight_decay=0.1, paradigm="all"))
    assert seen[0] == [(10, 0.3, 0.0)]
    assert seen[1] == [(10, 0.3, 0.0), (10, 0.02, 0.1), (19, 0.02, 0.0)]


def test_the_model_is_given_back_as_it_was():
    model = bundled().train()
    model.layer1.eval()
    learning = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    expected = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    tune(model, loader(), TuneConfig(**FAST))
    assert learning == {n: p.requires_grad for n, p in model.named_parameters()}
    assert modes == {n: m.training for n, m in model.named_modules()}
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))


def test_calibration_follows_lambda():
    still, following = bundled(), bundled()
    history = tune(following, loader(128), TuneConfig(**FAST, calibrate=64), validation=loader(40, split="test"))
    stale = tune(still, loader(128), TuneConfig(**FAST), validation=loader(40, split="test"))
    assert history.evaluations[0].clean > stale.evaluations[0].clean + 0.5
    weights = [k for k in still.state_dict() if not k.endswith((".lam", "running_mean", "running_var"))]
    assert all(torch.equal(still.state_dict()[k], following.state_dict()[k]) for k in weights)
    timm_nrpm.restore_(following)
    original = timm_nrpm.restore_(bundled()).state_dict()
    assert all(torch.equal(v, original[k]) for k, v in following.state_dict().items())


# --- several processes -------------------------------------------------------------------------------------------

SHARED = {
    # name: (model, number of steps, settings)
    "paradigm 2, an MLP": ("mlp", 20, {"objective": "pgd", "gradient": "mixture"}),
    "paradigm 3, an MLP, AWP": ("mlp", 20, {"objective": "awp", "paradigm": "all"}),
    "paradigm 3, an MLP, SAT": ("mlp", 20, {"objective": "sat", "paradigm": "all", "target_start": 0}),
    "paradigm 3, an MLP, KL-DRO": ("mlp", 20, {"objective": "kl-dro", "paradigm": "all", "temperature": 0.5}),
    "paradigm 3, an MLP, SRAT": ("mlp", 20, {"objective": "srat", "paradigm": "all"}),
    "paradigm 3, an MLP, WEAT": ("mlp", 20, {"objective": "weat", "paradigm": "all"}),
    "paradigm 3, an MLP, comp-sum": ("mlp", 20, {"objective": "comp-sum", "paradigm": "all"}),
    "paradigm 2, the bundled ResNet": ("resnet", 4, {"objective": "trades", "calibrate": 64}),
}


STATISTICS = {**FAST, "paradigm": "all", "eps": 0.0, "objective": "clean", "lr": 0.0, "lam_lr": 0.0, "weight_decay": 0}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> dict[str, tuple[Outcome, Outcome]]:
    """Each run of one process, and of two at the same batch of both together.

    The ResNet takes few steps, and the estimate's eps is 0.05: at a learning rate of 0.05 it is chaotic, and a weight
    that differs by 1e-7 makes lambdas differ by 0.01 after twenty steps; at eps 1e-3, much sooner. The kernels run
    along the rows of a batch of 16 and along the outputs for one of 8, so that sums have another order: lambdas
    differed by 3e-6.
    """
    runs = [
        {"model": model, "eps": 0.05, "images": 16 * steps, "batch": 16, "validation": True, "config": FAST | settings}
        for model, steps, settings in SHARED.values()
    ]
    runs.append({"config": STATISTICS, "images": 64, "batch": 32})
    folder = tmp_path_factory.mktemp("shared")
    one, two = (
        run_all(folder, count, [{**settings, "batch": settings["batch"] // count} for settings in runs])
        for count in (1, 2)
    )
    return dict(zip([*SHARED, "statistics"], zip(one, two, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_two_processes_learn_what_one_learns(shared, name):
    (one, alone), (two, together) = shared[name]
    assert len(one.steps) == len(two.steps) == SHARED[name][1]
    assert differ(alone, together, ".lam") < 1e-5
    assert max(abs(a.loss - b.loss) for a, b in zip(one.steps, two.steps, strict=True)) < 1e-3
    # 45 images in batches of 10 and two processes: some are evaluated twice, and none is counted twice.
    assert [e.clean * 45 for e in one.evaluations] == [e.clean * 45 for e in two.evaluations]
    assert one.evaluations[0] == two.evaluations[0]


@pytest.mark.slow
def test_three_processes_leave_frozen_statistics_alone(tmp_path):
    """The mean of three equal numbers is not always that number. The variant, lambda alone, is the test of it."""
    settings = {"config": {**FAST, "output": str(tmp_path / "run")}, "images": 24, "batch": 4}
    _, after = run(tmp_path, 3, **settings)
    before = bundled().state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k]) and not k.endswith(".lam")] == []
    assert (tmp_path / "run" / "variant" / "nrpm.safetensors").stat().st_size < 5000


@pytest.mark.slow
def test_moving_statistics_are_the_mean_of_all_processes(shared):
    """Those of the first BatchNorm, since those after it see what it made of each process's images."""
    (_, one), (_, two) = shared["statistics"]
    assert not torch.equal(one["bn1.running_mean"], bundled().bn1.running_mean)
    torch.testing.assert_close(two["bn1.running_mean"], one["bn1.running_mean"])


@pytest.mark.slow
def test_processes_that_would_each_tune_alone_are_refused(tmp_path):
    """As they would on a machine without CUDA, where ACCELERATE_USE_CPU was forgotten."""
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
    command = program(2, {"model": "mlp", "images": 16, "config": FAST, "result": str(tmp_path / "x")})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0
    assert "2 processes were started, and accelerate would let each tune alone" in done.stderr


def test_accumulated_batches_are_one_batch(tmp_path):
    config = TuneConfig(**FAST, paradigm="all", objective="trades")
    one, parts = small(), small()
    tune(one, loader(128, 32), config)
    history = tune(parts, loader(128, 8), replace(config, accumulate=4))
    assert len(history.steps) == 4
    assert differ(one.state_dict(), parts.state_dict()) < 1e-5


def test_what_is_left_at_the_end_of_an_epoch_is_a_whole_step():
    """accelerate divides by what was asked for, also where fewer batches are left."""
    norms = []
    for accumulate in (1, 4):
        config = TuneConfig(**FAST, objective="clean", accumulate=accumulate)
        norms.append(tune(small(), loader(16, 16), config).steps[0].norm[0])
    assert norms[0] == norms[1]


def test_bf16_trains():
    history = tune(bundled(), loader(), TuneConfig(**FAST, precision="bf16", calibrate=64))
    assert all(row.loss is not None and not row.skipped for row in history.steps)
    tune(bundled(), loader(16), TuneConfig(**FAST))  # and the next may have another precision


# --- killed and taken up -----------------------------------------------------------------------------------------

KILLED = {
    "model": "resnet",
    "images": 96,
    "batch": 8,
    "validation": True,
    "config": {"paradigm": "all", "objective": "sat", "optimizer": "adamw", "eps": 0.1, "steps": 1, "epochs": 2,
               "calibrate": 32, "checkpoint_every": 5, "evaluate_steps": 1, "accumulate": 2, "target_start": 0},
}  # fmt: skip


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Outcome:
    """The run that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, **{**KILLED, "config": {**KILLED["config"], "output": str(folder / "run")}})


# Seed 7 kills it after its first checkpoint, 1 before, and 5 after its second.
@pytest.mark.slow
@pytest.mark.parametrize("seed", [7, 1, 5])
def test_killed_at_any_moment_and_taken_up_it_is_as_if_nothing_had_happened(tmp_path, whole, seed):
    chance = random.Random(seed)
    folder = tmp_path / "killed"
    settings = {**KILLED, "config": {**KILLED["config"], "output": str(folder)}}
    wanted = chance.choice([0, 1, 2])  # checkpoints to wait for
    command = program(1, {**settings, "delay": 0.01, "result": str(tmp_path / "killed.pt")})
    with forked.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        wait_for(lambda: len(list(folder.glob("checkpoints/step-*"))) >= wanted, process)
        time.sleep(chance.random())
        process.send_signal(signal.SIGKILL)
    resumed, after = run(tmp_path, **settings, resume=True)
    history, untouched = whole
    assert resumed.steps == history.steps
    assert resumed.evaluations == history.evaluations
    assert differ(untouched, after) == 0.0


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_the_step_it_was_in(tmp_path, processes):
    folder = tmp_path / "run"
    config = {**KILLED["config"], "output": str(folder), "checkpoint_every": 2}
    settings = {**KILLED, "config": config}
    command = program(processes, {**settings, "delay": 0.05, "result": str(tmp_path / "stopped.pt")})
    with forked.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        wait_for((folder / "checkpoints" / "step-00000002").exists, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGTERM, 1)  # torchrun says 1
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]
    assert len(History.from_json((folder / "history.json").read_text()).steps) == 3
    resumed, _ = run(tmp_path, processes, **settings, resume=True)
    assert [row.step for row in resumed.steps] == list(range(1, len(resumed.steps) + 1))
    assert [row.step for row in resumed.evaluations] == [0, len(resumed.steps) // 2, len(resumed.steps)]


def test_ctrl_c_saves_and_is_still_ctrl_c(tmp_path):
    config = TuneConfig(**FAST, output=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        tune(small(), DataLoader(Faulty(at=40, do=lambda: signal.raise_signal(signal.SIGINT)), batch_size=16), config)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]  # the next batch is read ahead
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert tune(small(), DataLoader(Faulty(), batch_size=16), config, resume=True).steps[-1].step == 4


def test_ctrl_c_in_the_last_evaluation_is_not_lost(tmp_path):
    config = TuneConfig(**FAST, output=str(tmp_path))
    stop = DataLoader(Late(), batch_size=16)
    with pytest.raises(KeyboardInterrupt):
        tune(small(), loader(), config, validation=stop)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_signal_that_was_ignored_stays_so():
    """Under nohup, or in the background of a shell: the run is to go on to its end."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        history = tune(
            small(), DataLoader(Faulty(at=40, do=lambda: signal.raise_signal(signal.SIGINT)), batch_size=16),
            TuneConfig(**FAST),
        )  # fmt: skip
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert history.steps[-1].step == 4


def test_srat_is_taken_up_with_what_it_has_counted(tmp_path):
    taken_up_as_it_was(
        tmp_path, TuneConfig(**{**FAST, "epochs": 2}, paradigm="all", objective="srat", checkpoint_every=2)
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_taken_up_as_it_was(tmp_path, optimizer):
    config = TuneConfig(**{**FAST, "epochs": 2}, paradigm="all", optimizer=optimizer, checkpoint_every=2, lr=1e-3)
    taken_up_as_it_was(tmp_path, config)


def taken_up_as_it_was(tmp_path, config: TuneConfig) -> None:
    whole, resumed = small(), small()
    tune(whole, DataLoader(Faulty(), batch_size=16), config)
    config = replace(config, output=str(tmp_path))
    with pytest.raises(RuntimeError, match="is gone"):
        tune(small(), DataLoader(Faulty(at=60, do=fail, skip=1), batch_size=16), config)
    with pytest.warns(UserWarning, match="no timm classifier"):
        history = tune(resumed, DataLoader(Faulty(), batch_size=16), config, resume=True)
    assert len(history.steps) == 8
    assert differ(whole.state_dict(), resumed.state_dict()) == 0.0


# --- nothing is lost ---------------------------------------------------------------------------------------------


class Faulty(Dataset):
    """64 digits; reading image `at` does something once, after `skip` times. The next batch is read ahead."""

    def __init__(self, at: int = -1, do=lambda: None, skip: int = 0) -> None:
        self.pixels, self.labels = digits("train")
        self.at, self.do, self.calls = at, do, -skip

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int):
        if index == self.at:
            self.calls += 1
            if self.calls == 1:
                self.do()
        return self.pixels[index], int(self.labels[index])


class Late(Faulty):
    """Ctrl-C while the first image is read for the second time."""

    def __init__(self) -> None:
        super().__init__(at=0, do=lambda: signal.raise_signal(signal.SIGINT), skip=1)


def fail() -> None:
    raise RuntimeError("the disk of the images is gone")


def test_a_loader_that_raises_leaves_the_last_checkpoint(tmp_path):
    config = TuneConfig(**FAST, output=str(tmp_path), checkpoint_every=1)
    with pytest.raises(RuntimeError, match="the disk of the images is gone"):
        tune(small(), DataLoader(Faulty(at=50, do=fail), batch_size=16), config)
    whole, resumed = small(), small()
    history = tune(resumed, DataLoader(Faulty(), batch_size=16), config, resume=True)
    tune(whole, DataLoader(Faulty(), batch_size=16), replace(config, output=None))
    assert len(history.steps) == 4
    assert differ(whole.state_dict(), resumed.state_dict()) == 0.0


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    resource = pytest.importorskip("resource", reason="there are no limits to set on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = Faulty(at=50, do=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard)))
    config = TuneConfig(**FAST, output=str(tmp_path), checkpoint_every=1)
    try:
        with pytest.raises(OSError, match=r"step \d could not be written .* good one is step-0000000\d: make room"):
            tune(small(), DataLoader(full, batch_size=16), config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("checkpoints/.*"))
    history = tune(small(), DataLoader(Faulty(), batch_size=16), config, resume=True)
    assert [row.step for row in history.steps] == [1, 2, 3, 4]


@pytest.mark.parametrize("harm", ["cut", "changed", "missing", "not json"])
def test_a_broken_checkpoint_is_passed_over(tmp_path, harm):
    config = TuneConfig(**FAST, output=str(tmp_path), checkpoint_every=1)
    whole, resumed = small(), small()
    expected = tune(whole, loader(), config)
    last = sorted((tmp_path / "checkpoints").iterdir())[-1]
    tensors, state = last / "state.safetensors", last / "state.json"
    if harm == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif harm == "changed":
        state.write_text(state.read_text().replace('"skipped": false', '"skipped": true', 1))
    elif harm == "missing":
        tensors.unlink()
    else:
        state.write_text("{")
    with pytest.warns(CheckpointWarning, match=f"{last.name} is broken .*: the one before it is taken"):
        history = tune(resumed, loader(), config, resume=True)
    assert history == expected
    assert differ(whole.state_dict(), resumed.state_dict()) == 0.0


def test_a_folder_that_cannot_be_written_to_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(OSError, match=r"cannot be written to .* give another folder"):
        tune(model, loader(), TuneConfig(**FAST, output=str(tmp_path / "file" / "run")))
    assert differ(before, model.state_dict()) == 0.0


def test_a_run_is_not_overwritten_and_not_mixed_with_another(tmp_path):
    config = TuneConfig(**FAST, output=str(tmp_path))
    tune(small(), loader(), config)
    with pytest.raises(ValueError, match="holds a run: go on with it by resume=True"):
        tune(small(), loader(), config)
    with pytest.raises(ValueError, match=r"had other settings: eps: 0.1 then, 0.2 now"):
        tune(small(), loader(), replace(config, eps=0.2), resume=True)
    with pytest.raises(ValueError, match="batch of all processes: 16 then, 8 now"):
        tune(small(), loader(batch=8), config, resume=True)
    other = small()
    with torch.no_grad():
        other[1].weight += 1
    with pytest.raises(ValueError, match=r"sha256 of what is frozen"):
        tune(other, loader(), config, resume=True)
    steeper = timm_nrpm.reprogram_(small(), NRPMConfig(lam=0.5, iterations=1, eps=0.1))
    with pytest.raises(ValueError, match=r"estimate's iterations: 3 then, 1 now; estimate's eps: 0.001 then, 0.1 now"):
        tune(steeper, loader(), config, resume=True)
    with pytest.raises(ValueError, match=r"mean: \[0.0\] then, \[0.5\] now"):
        tune(small(), loader(), config, mean=(0.5,), resume=True)
    with pytest.raises(ValueError, match=r"needs config\.output"):
        tune(small(), loader(), replace(config, output=None), resume=True)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    tune(small(), loader(128), TuneConfig(**FAST, output=str(tmp_path), checkpoint_every=1, keep=2))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000007", "step-00000008"]


WRONG = {
    "labels out of range": (lambda x, y: (x, y + 5), "labels .* from . to 14, and the model has 10 classes"),
    "negative labels": (lambda x, y: (x, y - 1), "labels .* from -1"),
    "labels that are not integers": (lambda x, y: (x, y.float()), "float32"),
    "pixels above 1": (lambda x, y: (x * 255, y), r"values from 0 to 2\d\d"),
    "normalised pixels": (lambda x, y: (x * 2 - 1, y), "values from -1 to"),
    "pixels that are not numbers": (lambda x, y: (x * float("nan"), y), "pixels in"),
    "no labels": (lambda x, y: (x,), "pairs of pixels"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_images_are_refused_before_anything_changes(tmp_path, change, message):
    pixels, labels = digits("train")
    data = TensorDataset(*change(pixels[:64], labels[:64]))
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        tune(model, DataLoader(data, batch_size=16), TuneConfig(**FAST, output=str(tmp_path)))
    assert differ(before, model.state_dict()) == 0.0


def test_labels_of_any_whole_kind():
    pixels, labels = digits("train")
    runs = []
    for kind in (torch.int64, torch.int32, torch.uint8):
        images = DataLoader(TensorDataset(pixels[:32], labels[:32].to(kind)), batch_size=16)
        runs.append(tune(small(), images, TuneConfig(**FAST), validation=images))
    assert runs[0] == runs[1] == runs[2]


def test_calibration_sees_what_the_loader_gives():
    """Images of bytes, which the loader makes pixels of."""
    pixels, labels = digits("train")
    data = [
        ((image * 255).round().byte().numpy(), int(label)) for image, label in zip(pixels[:64], labels, strict=False)
    ]

    def collate(items):
        images = torch.stack([torch.from_numpy(image) for image, _ in items]) / 255
        return images, torch.tensor([label for _, label in items])

    models = [bundled(), bundled()]
    tensors = TensorDataset(*collate(data))
    for model, images in zip(models, (DataLoader(data, 16, collate_fn=collate), DataLoader(tensors, 16)), strict=True):
        tune(model, images, TuneConfig(**FAST, calibrate=32))
    assert differ(models[0].state_dict(), models[1].state_dict()) == 0.0


def test_a_batch_that_batchnorm_would_choke_on_is_told_at_once():
    with pytest.raises(ValueError, match="would be a batch of its own"):
        tune(bundled(), loader(17), TuneConfig(**FAST, paradigm="all"))
    tune(bundled(), loader(17), TuneConfig(**FAST))
    with pytest.raises(ValueError, match="The loader gives no batch"):
        tune(bundled(), DataLoader(loader(8).dataset, 16, drop_last=True), TuneConfig(**FAST))


def test_a_validation_loader_may_choose():
    chosen = DataLoader(loader(64).dataset, batch_size=50, sampler=list(range(60)))
    history = tune(small(), loader(), TuneConfig(**FAST), validation=chosen)
    right = 60 * history.evaluations[0].clean  # and not of fewer images
    assert right == pytest.approx(round(right), abs=1e-9)


def test_a_loader_that_is_none_is_told():
    with pytest.raises(ValueError, match="give a torch DataLoader"):
        tune(small(), [(torch.rand(2, 1, 8, 8), torch.tensor([1, 2]))], TuneConfig(**FAST))
    with pytest.raises(ValueError, match="is no TuneConfig"):
        tune(small(), loader(), NRPMConfig())
    with pytest.raises(ValueError, match="is not reprogrammed"):
        tune(nn.Linear(2, 2), loader(), TuneConfig(**FAST))


# --- stability ---------------------------------------------------------------------------------------------------


class Trip(nn.Module):
    """Makes the gradient of some calls in training infinite."""

    def __init__(self, calls: set[int]) -> None:
        super().__init__()
        self.calls, self.count = calls, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count += 1
            return x * float("inf") if self.count in self.calls else x
        return x


def test_no_step_is_taken_along_a_gradient_that_is_not_finite():
    model = timm_nrpm.reprogram_(nn.Sequential(*timm_nrpm.restore_(small()), Trip({2})), NRPMConfig(lam=0.5))
    history = tune(model, loader(), TuneConfig(**FAST, paradigm="all", objective="clean", lr=0.1))
    assert [row.skipped for row in history.steps] == [False, True, False, False]
    assert history.steps[1].lams == history.steps[0].lams
    assert history.steps[1].norm == (None, None)
    assert all(bool(v.isfinite().all()) for v in model.state_dict().values())


def test_a_run_that_diverges_ends_with_advice(tmp_path):
    model = timm_nrpm.reprogram_(nn.Sequential(*timm_nrpm.restore_(small()), Trip({2, 3, 4, 5})), NRPMConfig(lam=0.5))
    config = TuneConfig(**FAST, paradigm="all", objective="clean", patience=3, output=str(tmp_path), checkpoint_every=1)
    with pytest.raises(timm_nrpm.errors.Diverged, match=r"not finite 3 steps in a row, up to step 4, .* Lower lr=0.01"):
        tune(model, loader(128), config)
    assert all(bool(v.isfinite().all()) for v in model.state_dict().values())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir())[-1] == "step-00000003"


@pytest.mark.parametrize("clip", [1e-3, 100.0, None])
def test_the_gradient_is_clipped_by_norm(clip):
    model = small()
    config = TuneConfig(eps=0.0, objective="clean", epochs=1, schedule="constant", lam_lr=1.0, optimizer="momentum")
    before = torch.tensor(list(timm_nrpm.lambdas(model).values()))
    history = tune(model, loader(16), replace(config, clip=clip))
    (norm, rest), after = history.steps[0].norm, torch.tensor(history.steps[0].lams)
    assert rest == 0.0
    assert norm > 1e-3
    assert float((before - after).norm()) == pytest.approx(min(norm, clip or norm), rel=1e-3)


# --- to watch ----------------------------------------------------------------------------------------------------


def test_what_is_left_behind_can_be_read(tmp_path):
    model = bundled()
    config = TuneConfig(**FAST, output=str(tmp_path), trackers=("tensorboard",), calibrate=64, log_every=2)
    history = tune(model, loader(), config, validation=loader(20, split="test"), progress=True)
    assert History.from_json((tmp_path / "history.json").read_text()) == history
    assert [row.step for row in history.steps] == [2, 4]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    again = timm_nrpm.from_pretrained(tmp_path / "variant")
    assert tuple(timm_nrpm.lambdas(again).values()) == history.steps[-1].lams
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next(p for p in (tmp_path / "logs").rglob("events*") if p.parent.name == "timm_nrpm").parent
    events = EventAccumulator(str(folder)).Reload()
    assert events.Scalars("loss")[0].value == pytest.approx(history.steps[0].loss)
    assert events.Scalars("lambda/fc")[1].value == pytest.approx(history.steps[1].lams[-1])
    assert events.Scalars("validation/quick")[0].value == pytest.approx(history.evaluations[0].quick)


def test_paradigm_3_leaves_a_full_variant(tmp_path):
    model = bundled()
    tune(model, loader(), TuneConfig(**FAST, paradigm="all", output=str(tmp_path), calibrate=64))
    again, images = timm_nrpm.from_pretrained(tmp_path / "variant"), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))


def test_weights_that_were_tuned_before_are_not_lost(tmp_path):
    model = bundled()
    tune(model, loader(), TuneConfig(**FAST, paradigm="all"))
    tune(model, loader(), TuneConfig(**FAST, output=str(tmp_path)))
    again, images = timm_nrpm.from_pretrained(tmp_path / "variant"), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))


def test_a_model_that_is_not_timms_is_told_where_its_weights_are(tmp_path):
    with pytest.warns(UserWarning, match="Sequential is no timm classifier"):
        tune(small(), loader(), TuneConfig(**FAST, paradigm="all", output=str(tmp_path)))


def test_the_bar_shows_loss_accuracies_and_lambdas(capsys):
    tune(bundled(), loader(), TuneConfig(**FAST), validation=loader(20, split="test"), progress=True)
    text = capsys.readouterr().err
    for part in ("Tuning", "4/4", "loss ", "clean ", "quick attacks ", "attacked ", "lambda 0."):
        assert part in text


def test_a_history_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match=r"pip install 'timm_nrpm\[demo\]'"):
        tune(small(), loader(), TuneConfig(**FAST, output=str(tmp_path)))
    assert (tmp_path / "history.json").exists()


def test_a_history_is_json_both_ways():
    history = tune(small(), loader(), TuneConfig(**FAST), validation=loader(20, split="test"))
    assert History.from_json(history.to_json()) == history
    assert asdict(history)["evaluations"][0]["step"] == 0
