"""Several processes: whoever starts them, and however a batch is split, the run is that of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpm_scales.data import Digits
from dpm_scales.metrics import frechet_distance
from dpm_scales.models.checksums import read_tensors
from dpm_scales.models.generate import draw
from dpm_scales.models.io import load_model
from dpm_scales.training.ema import EMA
from dpm_scales.training.module import DiffusionModule
from dpm_scales.training.power_averages import PowerAverages
from support.cluster_shell import Forked, finish, free_port, job_step, torchrun, wait_for
from support.evaluate_helpers import Means, small_features
from support.shell import (
    SMALL,
    assert_equal,
    call,
    checkpoint,
    column,
    drawn,
    files,
    one_after_the_other,
    run,
    sample,
    settings,
    train,
)
from support.states import STATES, assert_close

#: 359 images of validation are no multiple of a batch
OPTIONS = (
    *(*SMALL, "optimizer.learning_rate=0.002", "optimizer.warmup_steps=0"),
    *("trainer.max_steps=20", "trainer.limit_val_batches=1.0", "trainer.val_check_interval=10"),
    *("checkpoint.every_n_steps=2", "sampler.steps=2", "training.pairing=nearest", "training.candidates=2"),
    *("ema.power_lengths=[0.05,0.1]", "ema.snapshot_every=7"),
)
STEPS, VALIDATIONS = 20, 2
CURVES = ("train/loss", "train/grad_norm", "val/loss", "val/loss_t0.25", "val/loss_t0.50", "val/loss_t1.00")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with the batch of two."""
    return train(tmp_path_factory.mktemp("alone") / "run", *OPTIONS, "data.batch_size=32")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes of a job step, started by the command of one."""
    folder = tmp_path_factory.mktemp("pair")
    ends = Forked(job_step(2), *OPTIONS, "run_dir=run", cwd=folder).finish()
    assert [end.status for end in ends] == [0, 0], ends[0].err + ends[1].err
    assert ends[1].out == ends[1].err == "", "only the first process speaks"
    line = ends[0].out.splitlines()[0]
    assert f"batch 16 x 2 = 32, learning rate 0.002, steps {STEPS}, cpu" in line
    return folder / "run"


@pytest.mark.slow
def test_two_processes_train_as_one_does_with_the_same_batch(alone: Path, pair: Path) -> None:
    """The loss of every step and of every band of scales in the validation, gradients and weights."""
    for name in CURVES:
        ours, theirs = column(pair, name), column(alone, name)
        assert len(ours) == (STEPS if name.startswith("train") else VALIDATIONS), name
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=name)
    before, after = checkpoint(alone)["state_dict"], checkpoint(pair)["state_dict"]
    for name, value in before.items():
        if value.is_floating_point():
            torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-4)
    assert_snapshots_close(pair, alone, 1e-3)
    assert sorted(files(alone)) == sorted(files(pair))  # one folder, with one process's files
    assert checkpoint(pair)["ImageDataModule"]["world_size"] == settings(pair)["trainer"]["devices"] == 2
    assert settings(pair)["trainer"]["strategy"] == "ddp"


@pytest.mark.slow
def test_two_machines_of_torchrun_go_on_after_sigterm(pair: Path, tmp_path: Path) -> None:
    """To all processes, wherever they are; what comes after is as if nothing had been."""
    last = tmp_path / "run/checkpoints/last.ckpt"
    step = Forked(job_step(2), *OPTIONS, "run_dir=run", cwd=tmp_path)
    wait_for(last.exists, step)
    step.signal(signal.SIGTERM)
    ends = step.finish()
    assert [end.status for end in ends] == [143, 0], ends[0].err + ends[1].err
    assert f"stopped at step {checkpoint(tmp_path / 'run')['global_step']};" in ends[0].err
    meeting = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", free_port())
    nodes = [
        torchrun((*meeting, "--node-rank", str(k)), "train.py", *OPTIONS, "run_dir=run", cwd=tmp_path) for k in range(2)
    ]
    ends = finish(*nodes)
    assert [end.status for end in ends] == [0, 0], ends[0].err + ends[1].err
    assert settings(tmp_path / "run")["trainer"]["num_nodes"] == 2 and "16 x 2 = 32" in ends[0].out
    assert f"resuming {Path('run/checkpoints/last.ckpt')}" in ends[0].out
    assert (tmp_path / "run" / "metrics.csv").read_text() == (pair / "metrics.csv").read_text()
    assert files(tmp_path / "run" / "model") == files(pair / "model")


@pytest.mark.slow
def test_sweep_with_two_processes_leaves_a_folder_for_each_run(tmp_path: Path) -> None:
    sweep = ("seed=1,2", "optimizer.learning_rate=0.01,0.02", "trainer.max_steps=2", "run_dir=sweep")
    end, other = Forked(job_step(2), "-m", *SMALL, *sweep, cwd=tmp_path).finish()
    assert (end.status, other.status, other.out) == (0, 0, ""), end.err + other.err
    results = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/result.json")]
    assert len(results) == 4 == len([path for path in (tmp_path / "sweep").iterdir() if path.is_dir()])
    assert end.out.count("batch 16 x 2 = 32") == 4 and end.out.count("sweep.csv") == 1
    assert len((tmp_path / "sweep" / "sweep.csv").read_text().splitlines()) == 5
    assert {tmp_path / "sweep"} == set(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("submitit") is None, reason="the slurm extra is not installed")
def test_job_that_is_signalled_is_queued_again_and_ends_with_the_same_bits(pair: Path, tmp_path: Path) -> None:
    """The signal of a time that is up reaches the second of two processes alone, somewhere in the run."""
    options = (*OPTIONS, "trainer=ddp", "trainer.devices=2", "hydra/launcher=slurm_local", "run_dir=sweep")
    sweep = Forked([{}], "-m", *options, cwd=tmp_path)
    root = tmp_path / "sweep"
    wait_for(lambda: bool(list(root.glob("*/checkpoints/last.ckpt"))), sweep)
    (run_dir,) = (path.parents[1] for path in root.glob("*/checkpoints/last.ckpt"))
    first = holder(run_dir)
    (second,) = (pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_second_task(pid, tmp_path))
    os.kill(second, signal.SIGUSR2)
    (outcome,) = sweep.finish()
    logs = "".join(path.read_text() for path in sorted(root.glob(".submitit/*/*_0_log.*")))
    assert outcome.status == 0, outcome.err + logs
    assert logs.count("stopped at step") == 1 and logs.count("Requeued job") == 1 and logs.count("resuming") == 1, logs
    assert holder(run_dir) != first  # went on in another process
    assert (run_dir / "metrics.csv").read_text() == (pair / "metrics.csv").read_text()
    assert files(run_dir / "model") == files(pair / "model")
    for name in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert_equal(checkpoint(run_dir)[name], checkpoint(pair)[name], name)


def is_second_task(process: int, folder: Path) -> bool:
    """Return whether a process was started as the second one of a job in a folder."""
    place = Path("/proc") / str(process)
    try:
        return "SUBMITIT_LOCAL_GLOBALID=1\0" in (place / "environ").read_text() and (place / "cwd").readlink() == folder
    except OSError:
        return False  # it has ended, or is another user's


def holder(run_dir: Path) -> str:
    """Number of the process that trains there, or did."""
    return (run_dir / ".lock").read_text().split()[1]


# --- sliced weights ---------------------------------------------------------------------------------------------------

#: as many checkpoints as are looked at
SLICED = (*OPTIONS, "trainer=fsdp", "checkpoint.every_n_steps=18")
SAMPLES = 9
#: whose batches are two for the first process and one for the second
EVALUATED = (
    *("evaluation.every_n_steps=10", f"evaluation.num_samples={SAMPLES}", "evaluation.num_reference=20"),
    *("evaluation.measures=[frechet]", "evaluation.batch_size=4"),
)


def counting(path: Path) -> None:
    """Let this process tell at the end of training how many numbers it holds, and how many there are."""

    def numbers(tensors: list[Tensor]) -> list[int]:
        held = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return [sum(t.numel() for t in held), sum(t.numel() for t in tensors)]

    def count(self: DiffusionModule) -> None:
        (optimizer,) = self.trainer.strategy.optimizers
        average = next(c for c in self.trainer.callbacks if isinstance(c, EMA))
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        powers = next(c for c in self.trainer.callbacks if isinstance(c, PowerAverages)).averages
        parts = {"weights": [*self.parameters()], "average": [*average.module.parameters()], "moments": moments}
        parts["powers"] = [value for one in powers for value in one.values()]
        path.write_text(json.dumps({name: numbers(tensors) for name, tensors in parts.items()}))

    DiffusionModule.on_train_end = count  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pair`, with the weights sliced over the processes, and figures of samples."""
    folder = tmp_path_factory.mktemp("sliced")
    with small_features(Means()), mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder)):
        step = Forked(
            *(job_step(2), *SLICED, *EVALUATED, "run_dir=run"),
            cwd=folder,
            prepare=lambda rank: counting(folder / f"{rank}.json"),
        )
        ends = step.finish()
    assert [end.status for end in ends] == [0, 0], ends[0].err + ends[1].err
    assert ends[0].err == ends[1].out == ends[1].err == ""
    return folder / "run"


def assert_snapshots_close(run_dir: Path, other: Path, tolerance: float) -> None:
    """Snapshots of power-function averages, by the largest relative error in the norm."""
    names = [f"step-{step:06d}.safetensors" for step in (7, 14, STEPS)]
    assert [path.name for path in sorted((run_dir / "ema").iterdir())] == names
    for name in names:
        ours, theirs = (read_tensors(folder / "ema" / name) for folder in (run_dir, other))
        assert ours.keys() == theirs.keys() and ours["lengths"].tolist() == [0.05, 0.1]
        for key, value in ours.items():
            difference = (value.double() - theirs[key].double()).norm()
            assert difference <= tolerance * theirs[key].double().norm() + tolerance / 10, (name, key)


@pytest.mark.slow
def test_sliced_weights_train_as_whole_ones_do(pair: Path, sliced: Path) -> None:
    for name in CURVES:
        ours, theirs = column(sliced, name), column(pair, name)
        assert len(ours) == len(theirs) == (STEPS if name.startswith("train") else VALIDATIONS), name
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=name)
    assert_close(checkpoint(sliced), checkpoint(pair), 1e-4)
    assert_snapshots_close(sliced, pair, 1e-4)
    assert sorted(files(sliced)) == sorted(files(pair))
    for ours, theirs in zip(sorted(sliced.glob("samples/*")), sorted(pair.glob("samples/*")), strict=True):
        difference = np.asarray(Image.open(ours)).astype(int) - np.asarray(Image.open(theirs))
        assert np.abs(difference).max() <= 1


@pytest.mark.slow
def test_each_process_holds_half_of_the_weights(sliced: Path) -> None:
    """Of their averages and the optimiser's moments too."""
    first, second = (json.loads((sliced.parent / f"{rank}.json").read_text()) for rank in range(2))
    size = sum(p.numel() for p in load_model(sliced).denoiser.parameters())
    for name, count in {"weights": size, "average": size, "moments": 2 * size, "powers": 2 * size}.items():
        (held, total), (other, _) = first[name], second[name]
        assert total == count == held + other and max(held, other) < 0.55 * total, name


@pytest.mark.slow
def test_models_of_sliced_weights_are_models(pair: Path, sliced: Path, tmp_path: Path) -> None:
    """One process draws from the export; its figure is the one that the processes measured together."""
    ours, theirs = (sample(run_dir, tmp_path / run_dir.parent.name, "num_samples=4") for run_dir in (sliced, pair))
    assert len(drawn(ours)) == 4
    for name in (*drawn(ours), "grid.png"):
        difference = np.asarray(Image.open(ours / name)).astype(int) - np.asarray(Image.open(theirs / name))
        assert np.abs(difference).max() <= 1
    fake = Means()(torch.cat(list(draw(load_model(sliced), SAMPLES, seed=0))))
    images = Digits().train().images
    real = Means()(images[[i * len(images) // 20 for i in range(20)]])
    assert column(sliced, "eval/fd_means")[-1] == pytest.approx(frechet_distance(real, fake), rel=1e-5)
    assert len(column(sliced, "eval/fd_means")) == 2


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_with_a_checkpoint(sliced: Path, tmp_path: Path) -> None:
    """As a terminal and torchrun send it, to each of them. The run goes on, with the same bits."""
    run_dir = tmp_path / "run"
    started = Forked(job_step(2), *SLICED, "checkpoint.every_n_steps=3", f"run_dir={run_dir}", cwd=tmp_path)
    wait_for((run_dir / "checkpoints/last.ckpt").exists, started)
    started.signal(signal.SIGINT)
    end, other = started.finish()
    steps = checkpoint(run_dir)["global_step"]
    assert (end.status, other.status, other.err) == (130, 0, "") and 3 <= steps < STEPS, end.err + other.err
    assert end.err.count("Ctrl-C once more stops at once") == 1 and "Traceback" not in end.err, end.err
    assert f"stopped at step {steps}; resume with: python train.py run_dir={run_dir}" in end.err
    ends = Forked(job_step(2), "checkpoint.every_n_steps=18", f"run_dir={run_dir}", cwd=tmp_path).finish()
    assert [end.status for end in ends] == [0, 0] and "resuming" in ends[0].out, ends[0].err + ends[1].err
    for name in STATES:
        assert_equal(checkpoint(run_dir)[name], checkpoint(sliced)[name], name)
    for name in CURVES:
        assert column(run_dir, name) == column(sliced, name)
    for folder in ("model", "samples", "ema"):
        assert files(run_dir / folder) == files(sliced / folder) != {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "now", "processes"),
    [("sliced", "default", 1), ("pair", "fsdp", 2)],
    ids=lambda value: str(value),
)
def test_checkpoints_go_on_with_any_strategy(
    before: str, now: str, processes: int, pair: Path, sliced: Path, tmp_path: Path
) -> None:
    """The last two steps, with whole weights and sliced ones."""
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    shutil.copy((sliced if before == "sliced" else pair) / "checkpoints/step-000018.ckpt", folder / "last.ckpt")
    steps = job_step(2) if processes == 2 else [{}]
    batch = f"data.batch_size={32 // processes}"
    rare = ("checkpoint.every_n_steps=18", "checkpoint.keep_best=0")
    ends = Forked(steps, *OPTIONS, *rare, f"trainer={now}", batch, "run_dir=run", cwd=tmp_path).finish()
    assert [end.status for end in ends] == [0] * processes and "resuming" in ends[0].out, ends[0].err
    assert checkpoint(tmp_path / "run")["global_step"] == STEPS
    assert_close(checkpoint(tmp_path / "run"), checkpoint(pair), 1e-4)


def spoil(rank: int) -> None:
    """The second process's gradients are not finite in the second step."""
    original = DiffusionModule.training_step

    def step(self: DiffusionModule, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = original(self, batch, batch_idx)
        return loss * torch.nan if self.global_step == 1 and rank == 1 else loss

    DiffusionModule.training_step = step  # type: ignore[method-assign]


@pytest.mark.slow
def test_sliced_weights_skip_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With accumulated gradients."""
    options = (*SMALL, "trainer.accumulate_grad_batches=2", "optimizer.warmup_steps=0", "trainer.max_steps=4")
    ends = Forked(job_step(2), *options, "trainer=fsdp", "run_dir=run", cwd=tmp_path, prepare=spoil).finish()
    assert [end.status for end in ends] == [0, 0], ends[0].err + ends[1].err
    monkeypatch.setattr(DiffusionModule, "training_step", DiffusionModule.training_step)
    spoil(1)
    alone, run_dir = train(tmp_path / "alone", *options, "data.batch_size=32"), tmp_path / "run"
    assert checkpoint(run_dir)["bad_steps"] == checkpoint(alone)["bad_steps"] == [1, 0, 1]
    assert_close(checkpoint(run_dir), checkpoint(alone), 1e-4)
    norms = column(run_dir, "train/grad_norm")
    np.testing.assert_allclose(norms, column(alone, "train/grad_norm"), rtol=1e-5)
    assert np.isnan(norms).tolist() == [False, True, False, False]


@pytest.mark.slow
def test_one_process_may_hold_the_only_slice(tmp_path: Path) -> None:
    """In half precision, which is that of the operations alone."""
    options = (*SMALL, "trainer.precision=bf16-mixed", "channels_last=false", "trainer.max_steps=3")
    (end,) = Forked([{}], *options, "trainer=fsdp", "trainer.devices=1", "run_dir=run", cwd=tmp_path).finish()
    assert end.status == 0 and "bf16-mixed" in end.out, end.err
    alone = train(tmp_path / "alone", *options)
    assert_close(checkpoint(tmp_path / "run"), checkpoint(alone), 1e-2)
    assert {value.dtype for value in load_model(tmp_path / "run").denoiser.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sliced_weights_on_gpus_train_as_whole_ones_do(tmp_path: Path) -> None:
    """With NCCL, over all GPUs that there are; in processes of their own, since CUDA does not survive a fork."""
    gpus = ("trainer.accelerator=cuda", f"trainer.devices={torch.cuda.device_count()}")
    for precision, tolerance in (("32-true", 1e-3), ("bf16-mixed", 2e-2)):
        for strategy in ("ddp", "fsdp"):
            options = (*OPTIONS, f"trainer={strategy}", *gpus, f"trainer.precision={precision}")
            end = run("train.py", *options, f"run_dir={strategy}-{precision}", cwd=tmp_path)
            assert end.status == 0, end.err
        ours, theirs = tmp_path / f"fsdp-{precision}", tmp_path / f"ddp-{precision}"
        for name in CURVES:
            np.testing.assert_allclose(column(ours, name), column(theirs, name), rtol=tolerance, err_msg=name)
    end = run("train.py", f"run_dir={ours}", "trainer=fsdp", *gpus, "trainer.max_steps=32", cwd=tmp_path)
    assert end.status == 0 and checkpoint(ours)["global_step"] == 32, end.err


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [7, 1])
def test_samples_of_two_processes_are_those_of_one(
    count: int, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is nothing for one of them to draw. Here one comes after the other, and nobody waits."""
    options = (f"num_samples={count}", "batch_size=2", "seed=5", "trajectory=true")
    one = files(sample(alone, tmp_path / "one", *options))
    assert len(one) == count + 5
    one_after_the_other(monkeypatch)
    for rank, own in ((1, count // 2 + 2), (0, count + 5)):
        ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        end = call("sample.py", f"model={alone}", *options, "out=two", cwd=tmp_path, environment=ranks)
        assert end.status == 0, end.err
        assert len(files(tmp_path / "two")) == own and (f"{count} images in two" in end.out) == (rank == 0)
    assert files(tmp_path / "two") == one
