"""A checkpoint that is not what a run writes ends with one line, whatever is odd in it."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_scales.errors import UserError
from dpm_scales.training.resumable import require_resumable
from support.shell import FAST, call, checkpoint, files, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a data prior and a density of scales, so that every kind of state is in its checkpoint."""
    heat = ("process=heat", "process.num_scales=4", "sampler.steps=null", "scale_sampling=importance")
    run = train(tmp_path_factory.mktemp("resumable") / "run", *heat, *FAST, "trainer.max_steps=2")
    for path in (run / "checkpoints").glob("*.ckpt"):
        if path.name != "last.ckpt":
            path.unlink()
    return run


def seal(path: Path, values: dict[str, Any]) -> None:
    """Write a checkpoint as a stranger may, whatever its step is."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    body = buffer.getvalue() + b"\ndpm_scales checkpoint 0003 step 000000000002 sha256 "
    path.write_bytes(body + hashlib.sha256(body).hexdigest().encode() + b"\n")


def first_moment(values: dict[str, Any]) -> dict[str, Any]:
    moments: dict[str, Any] = values["optimizer_states"][0]["state"][0]
    return moments


Change = Callable[[dict[str, Any]], Any]
CHANGES: dict[str, tuple[Change, str]] = {
    "no groups": (
        lambda c: c.update(optimizer_states=[{"state": "x"}]),
        "optimizer_states.param_groups must be a list",
    ),
    "moments a word": (
        lambda c: c["optimizer_states"][0].update(state="x"),
        "optimizer_states.state must be a mapping",
    ),
    "two optimisers": (lambda c: c.update(optimizer_states=c["optimizer_states"] * 2), "optimizer_states must be"),
    "moments of another shape": (
        lambda c: first_moment(c).update(exp_avg=torch.zeros(2, 3)),
        r"optimizer_states.state.0.exp_avg must be a tensor torch.float32 \(16, 16\)",
    ),
    "moments of another type": (
        lambda c: first_moment(c).update(exp_avg_sq=torch.zeros(16, 16, dtype=torch.int32)),
        "optimizer_states.state.0.exp_avg_sq must be a tensor torch.float32",
    ),
    "moments of nothing": (lambda c: c["optimizer_states"][0]["state"].update({999: {}}), "no parameter 999"),
    "other flags": (
        lambda c: c["optimizer_states"][0]["param_groups"][0].update(amsgrad=True),
        "amsgrad must be False",
    ),
    "epsilon a word": (lambda c: c["optimizer_states"][0]["param_groups"][0].update(eps="x"), "eps must be a number"),
    "fewer parameters": (
        lambda c: c["optimizer_states"][0]["param_groups"][0].update(params=[0]),
        "does not number the",
    ),
    "loops": (lambda c: c.update(loops={"fit_loop": 5}), "loops.fit_loop must be a mapping, and is 5"),
    "no fit loop": (lambda c: c.update(loops={}), "can't be resumed: 'fit_loop' is missing"),
    "a counter": (
        lambda c: c["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"].update(ready="x"),
        "loops.fit_loop.epoch_loop.batch_progress.total.ready must be a number of steps, and is 'x'",
    ),
    "step a word": (lambda c: c.update(global_step="abc"), "global_step must be a number of steps, and is 'abc'"),
    "step infinite": (lambda c: c.update(global_step=float("inf")), "global_step must be a number of steps"),
    "step of 10^30": (lambda c: c.update(global_step=10**30), "global_step must be a number of steps"),
    "epoch": (lambda c: c.update(epoch=[1]), "epoch must be a number of steps"),
    "bad steps": (lambda c: c.update(bad_steps=[1.0]), "bad_steps must be a list of 3"),
    "bad steps nan": (lambda c: c.update(bad_steps=[0.0, float("nan"), 0.0]), r"bad_steps\[1\] must be a number"),
    "average": (lambda c: c.update(averaging_state={"n_averaged": "x"}), "averaging_state.n_averaged must be a tensor"),
    "schedule": (lambda c: c["lr_schedulers"][0].update(base_lrs=["x"]), r"lr_schedulers\[0\].base_lrs\[0\] must be"),
    "no schedule": (lambda c: c.update(lr_schedulers=[]), "lr_schedulers must be a list of 1"),
    "ranking": (lambda c: c["callbacks"]["BestCheckpoint"].update(ranked=[[1.0]]), "can't be resumed"),
    "callbacks": (lambda c: c.update(callbacks=3), "callbacks must be a mapping"),
    "order": (lambda c: c["ImageDataModule"].update(next_batch=-1), "ImageDataModule.next_batch must be a number"),
    "density": (lambda c: c.update(importance=[["x"]]), "importance must be a list of 2"),
    "density a tensor": (lambda c: c.update(importance=torch.zeros(3)), "importance must be a list of 2"),
    "version": (lambda c: c.update({"pytorch-lightning_version": 5}), "can't be resumed"),
    "recipe of tensors": (lambda c: c["recipe"]["process"].update(num_scales=torch.zeros(3)), "holds a Tensor"),
    "raw weights of another shape": (
        lambda c: c["current_model_state"].update({"model.denoiser.network.conv_in.weight": torch.zeros(3)}),
        "current_model_state.model.denoiser.network.conv_in.weight must be a tensor torch.float32",
    ),
    "weights of another type": (
        lambda c: c["state_dict"].update({k: v.double() for k, v in c["state_dict"].items()}),
        "must be a tensor torch.float32",
    ),
    "raw weights not finite": (
        lambda c: c["current_model_state"]["model.denoiser.network.conv_in.weight"].fill_(float("nan")),
        "current_model_state.model.denoiser.network.conv_in.weight is not finite, so that training had diverged",
    ),
    "average infinite": (
        lambda c: c["state_dict"]["model.denoiser.network.conv_in.bias"].fill_(float("inf")),
        "state_dict.model.denoiser.network.conv_in.bias is not finite",
    ),
    "weights missing": (lambda c: c["state_dict"].popitem(), "state_dict lacks or adds model"),
}


#: that are found while a checkpoint is restored, by those whose state it is
LATE = {"no fit loop", "ranking", "version"}


@pytest.fixture(scope="module")
def resumed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What a resumed run compares a checkpoint with: trainer, module and data."""
    caught: list[Any] = []

    def refuse(checkpoint: Any, path: Path, *parts: Any) -> None:
        caught.extend(parts)
        raise UserError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpm_scales.training.run.require_resumable", refuse)
        call("train.py", f"run_dir={run}", "trainer.max_steps=3", cwd=run.parent)
    return tuple(caught)


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in LATE])
def test_odd_checkpoints_are_told(name: str, run: Path, resumed: tuple[Any, ...]) -> None:
    change, message = CHANGES[name]
    values = checkpoint(run)
    require_resumable(values, Path("a.ckpt"), *resumed)
    change(values)
    with pytest.raises(UserError, match=f"a.ckpt.*{message}") as caught:
        require_resumable(values, Path("a.ckpt"), *resumed)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["no groups", *sorted(LATE)])
def test_odd_checkpoints_end_with_a_line(name: str, run: Path, tmp_path: Path) -> None:
    """Sealed, so that nothing but its structure tells."""
    change, message = CHANGES[name]
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    values = checkpoint(copied)
    change(values)
    seal(copied / "checkpoints" / "last.ckpt", values)
    before = files(copied)
    outcome = call("train.py", f"run_dir={copied}", "trainer.max_steps=3", cwd=tmp_path)
    lines = outcome.err.splitlines()
    assert outcome.status == 2 and len(lines) == 1 and lines[0].startswith("error: "), outcome.out + outcome.err
    assert re.search(message, lines[0]), lines[0]
    if name not in LATE:
        assert files(copied) == before


def test_the_checkpoint_itself_is_resumed(run: Path, tmp_path: Path) -> None:
    """Sealed by the same means: or the refusals above might be of the seal."""
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    seal(copied / "checkpoints" / "last.ckpt", checkpoint(copied))
    outcome = call("train.py", f"run_dir={copied}", "trainer.max_steps=3", cwd=tmp_path)
    assert outcome.status == 0 and "resuming" in outcome.out, outcome.err
