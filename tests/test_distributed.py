"""Several processes: whoever starts them, and however a batch is split, the run is that of one process."""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from cluster_shell import finish, free_port, srun, start, torchrun, wait_for
from shell import ROOT, SMALL, assert_equal, call, checkpoint, column, files, sample, settings, small_model, train

from dpm_scales.errors import UserError
from dpm_scales.noise import NoiseSource, white_noise
from dpm_scales.scale_sampling import spread_evenly
from dpm_scales.training.shards import Shard, first_host, this_shard

#: 359 images of validation are no multiple of a batch
OPTIONS = (
    *(*SMALL, "optimizer.learning_rate=0.002", "optimizer.warmup_steps=0"),
    *("trainer.max_steps=40", "trainer.limit_val_batches=1.0", "trainer.val_check_interval=20"),
    *("checkpoint.every_n_steps=2", "sampler.steps=2"),
)
STEPS, VALIDATIONS = 40, 2
CURVES = ("train/loss", "train/grad_norm", "val/loss", "val/loss_t0.25", "val/loss_t0.50", "val/loss_t1.00")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with the batch of two."""
    return train(tmp_path_factory.mktemp("alone") / "run", *OPTIONS, "data.batch_size=32")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes of a job step, started by the command of one."""
    folder = tmp_path_factory.mktemp("pair")
    ends = finish(*srun(2, "train.py", *OPTIONS, "run_dir=run", cwd=folder))
    assert [end.status for end in ends] == [0, 0], ends[0].err + ends[1].err
    assert ends[1].out == ends[1].err == "", "only the first process speaks"
    line = ends[0].out.splitlines()[0]
    assert "batch 16 x 2 = 32, learning rate 0.002, steps 40, cpu" in line
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
    assert sorted(files(alone)) == sorted(files(pair))  # one folder, with one process's files
    assert checkpoint(pair)["ImageDataModule"]["world_size"] == settings(pair)["trainer"]["devices"] == 2
    assert settings(pair)["trainer"]["strategy"] == "ddp"


@pytest.mark.slow
def test_two_machines_of_torchrun_train_as_one(pair: Path, tmp_path: Path) -> None:
    meeting = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", free_port())
    nodes = [
        torchrun((*meeting, "--node-rank", str(k)), "train.py", *OPTIONS, "run_dir=run", cwd=tmp_path) for k in range(2)
    ]
    ends = finish(*nodes)
    assert [end.status for end in ends] == [0, 0], ends[0].err + ends[1].err
    assert settings(tmp_path / "run")["trainer"]["num_nodes"] == 2 and "16 x 2 = 32" in ends[0].out
    assert (tmp_path / "run" / "metrics.csv").read_text() == (pair / "metrics.csv").read_text()
    assert files(tmp_path / "run" / "model") == files(pair / "model")


@pytest.mark.slow
def test_sweep_with_two_processes_leaves_a_folder_for_each_run(tmp_path: Path) -> None:
    sweep = ("seed=1,2", "optimizer.learning_rate=0.01,0.02", "trainer.max_steps=2", "run_dir=sweep")
    end, other = finish(*srun(2, "train.py", "-m", *SMALL, *sweep, cwd=tmp_path))
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
    sweep = start(sys.executable, str(ROOT / "train.py"), "-m", *options, cwd=tmp_path)
    root = tmp_path / "sweep"
    wait_for(lambda: bool(list(root.glob("*/checkpoints/last.ckpt"))), sweep)
    (run_dir,) = (path.parents[1] for path in root.glob("*/checkpoints/last.ckpt"))
    first = holder(run_dir)
    parent = Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[1]
    tasks = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    second = next(pid for pid in tasks if "SUBMITIT_LOCAL_GLOBALID=1\0" in Path(f"/proc/{pid}/environ").read_text())
    os.kill(int(second), signal.SIGUSR2)
    (outcome,) = finish(sweep)
    logs = "".join(path.read_text() for path in sorted(root.glob(".submitit/*/*_0_log.*")))
    assert outcome.status == 0, outcome.err + logs
    assert logs.count("stopped at step") == 1 and logs.count("Requeued job") == 1 and logs.count("resuming") == 1, logs
    assert holder(run_dir) != first  # went on in another process
    assert (run_dir / "metrics.csv").read_text() == (pair / "metrics.csv").read_text()
    assert files(run_dir / "model") == files(pair / "model")
    for name in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert_equal(checkpoint(run_dir)[name], checkpoint(pair)[name], name)


def holder(run_dir: Path) -> str:
    """Number of the process that trains there, or did."""
    return (run_dir / ".lock").read_text().split()[1]


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [7, 1])
def test_samples_of_two_processes_are_those_of_one(
    count: int, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is nothing for one of them to draw. Here one comes after the other, and nobody waits."""
    options = (f"num_samples={count}", "batch_size=2", "seed=5", "trajectory=true")
    one = files(sample(alone, tmp_path / "one", *options))
    assert len(one) == count + 3
    monkeypatch.setattr("dpm_scales.training.shards.barrier", lambda: None)
    for rank, own in ((1, count // 2), (0, count + 3)):
        ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        end = call("sample.py", f"model={alone}", *options, "out=two", cwd=tmp_path, environment=ranks)
        assert end.status == 0, end.err
        assert len(files(tmp_path / "two")) == own and (f"{count} images in two" in end.out) == (rank == 0)
    assert files(tmp_path / "two") == one


WAITING = """
import sys, time
from pathlib import Path
from dpm_scales.training.shards import barrier, leave, this_shard
rank, done = this_shard().rank, Path("done")
if rank == 1:
    time.sleep(1)
    done.touch()
barrier()
assert done.exists()
leave()
"""


@pytest.mark.slow
def test_nobody_leaves_before_all_are_there(tmp_path: Path) -> None:
    ends = finish(*srun(2, "-c", WAITING, cwd=tmp_path))
    assert [end.status for end in ends] == [0, 0], ends[0].err


# --- who is who -------------------------------------------------------------------------------------------------------

TORCHRUN = {"WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, Shard()),
        ({**TORCHRUN, "RANK": "5"}, Shard(5, 8, 1, 4, 1)),
        ({**SRUN, "SLURM_PROCID": "7"}, Shard(7, 8, 3, 4, 1)),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "9"}, Shard()),  # a batch script without srun
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, Shard()),  # a shell in a job
        ({"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1"}, Shard(1, 2, 1, 2)),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Shard()),  # a process that Lightning started
    ],
)
def test_processes_are_told_by_whoever_started_them(environment: dict[str, str], shard: Shard) -> None:
    assert this_shard(environment) == shard


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "process 2 of 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one'"),
        ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, "2 on each machine"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "7"}, "7 processes on 2 machines"),
    ],
)
def test_contradictions_of_the_environment_are_told(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        this_shard(environment)


@pytest.mark.parametrize("count", [0, 1, 5, 8, 9, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_parts_are_the_whole(count: int, world_size: int) -> None:
    parts = [Shard(rank, world_size).part(count) for rank in range(world_size)]
    assert [number for part in parts for number in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and len(parts[0]) >= min(count, 1)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("", "127.0.0.1"),
        ("login1", "login1"),
        ("a,b", "a"),
        ("node[003-006,9],login1", "node003"),
        ("node[7]", "node7"),
        ("node[7,9-12]-ib", "node7-ib"),
        ("gpu-a[01-02].example.org", "gpu-a01.example.org"),
    ],
)
def test_first_machine_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


# --- random numbers of a shared batch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), ()])
@pytest.mark.parametrize("world_size", [2, 3])
def test_noise_of_an_image_does_not_depend_on_who_draws_it(world_size: int, shape: tuple[int, ...]) -> None:
    whole, first = NoiseSource(4, 6 * world_size, 100), 100
    shares = [NoiseSource(4, 6, first + rank, stride=world_size) for rank in range(world_size)]
    for draw in ("quick_normal", "uniform", "quick_normal"):
        together = torch.stack([getattr(share, draw)(shape) for share in shares], 1).flatten(0, 1)
        assert_equal(getattr(whole, draw)(shape), together)


def test_quick_normal_is_standard_normal() -> None:
    """Kolmogorov and Smirnov's bound at 1e-4; neighbours, draws and the pairs of Box-Muller are independent."""
    source = NoiseSource(9, 1000)
    x, y = source.quick_normal((1001,)).double(), source.quick_normal((1001,)).double()
    assert x.shape == (1000, 1001) and torch.isfinite(x).all()
    for draw in (x, y):
        ordered = draw.flatten().sort().values
        law = torch.special.ndtr(ordered)
        steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
        assert float((law - steps).abs().max()) < 2.23 / len(ordered) ** 0.5
        assert float(draw.abs().max()) > 4.5
    pairs = [
        (x, y),
        (x[:, 1:], x[:, :-1]),
        (x[1:], x[:-1]),
        (x[:, :500], x[:, 501:]),
        (x[:, :500] ** 2, x[:, 501:] ** 2),
    ]
    for a, b in pairs:
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 5e-3
    assert white_noise(torch.empty(1000, 2, dtype=torch.float64), source).dtype == torch.float64


@pytest.mark.parametrize("world_size", [2, 3])
def test_loss_of_an_image_does_not_depend_on_whose_batch_it_is_in(world_size: int) -> None:
    """Also where the process draws something for each image."""
    model = small_model("process=osmosis_diffusion")
    x_0 = torch.rand(4 * world_size, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    t = torch.linspace(0.1, 1, len(x_0), dtype=torch.float64)
    with torch.no_grad():
        whole = model.denoiser.loss(x_0, t, generator=NoiseSource(3, len(x_0), 50))
        for rank in range(world_size):
            noise = NoiseSource(3, 4, 50 + rank, stride=world_size)
            part = model.denoiser.loss(x_0[rank::world_size], t[rank::world_size], generator=noise)
            torch.testing.assert_close(part, whole[rank::world_size], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("world_size", "count"), [(2, 8), (3, 9), (4, 7)])
def test_scales_of_a_shared_batch_are_those_of_one(world_size: int, count: int) -> None:
    whole = spread_evenly(torch.arange(count), count, 0.3)
    parts = [spread_evenly(torch.arange(rank, count, world_size), count, 0.3) for rank in range(world_size)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, whole[rank::world_size])


def test_stride_must_lead_on() -> None:
    with pytest.raises(UserError, match="stride=0"):
        NoiseSource(0, 2, stride=0)
