"""A step of training never waits for the device, so that the host can be some steps ahead of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from dpm_scales.training.ema import EMA
from dpm_scales.training.module import DiffusionModule
from dpm_scales.training.run import train
from support.pretended_run import waits
from support.shell import SMALL, composed

RUNS = {
    "adamw": ("ema.power_lengths=[0.05,0.1]",),
    "muon": ("optimizer.method=muon", "network.widths=[16,16]", "ema.length=0.1"),
    "loaded": ("data.on_device=false", "scale_sampling=importance", "trainer.precision=bf16-mixed"),
    "classes": ("conditional=true", "scale_sampling=logit_normal", "trainer.accumulate_grad_batches=2"),
    "weight": ("process=blurring", "weight=learned", "training.pairing=nearest"),
    "osmosis": ("process=osmosis_diffusion", "trainer.max_steps=-1", "trainer.max_time=01:00:00:00"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_nowhere(name: str, tmp_path: Path) -> None:
    """Loss, clipping, optimiser, averages and all callbacks, between two logged steps."""
    assert waits(tmp_path / "run", *RUNS[name]) == []


@pytest.mark.parametrize("name", ["adamw", "weight"])
def test_gradients_wait_nowhere(name: str, tmp_path: Path) -> None:
    """On a pretended CPU, where fake gradients can be computed."""
    assert waits(tmp_path / "run", *RUNS[name], device="cpu", steps=2) == []


def test_reading_a_count_from_the_device_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's averages do, which Lightning's class updates."""
    monkeypatch.setattr(EMA, "on_train_batch_end", WeightAveraging.on_train_batch_end)
    with pytest.raises(DataDependentOutputException):
        waits(tmp_path / "run")


def test_copies_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the host and from it; not one that is asked not to wait."""
    clip = DiffusionModule.configure_gradient_clipping

    def copying(self: DiffusionModule, *args: Any, **kwargs: Any) -> None:
        clip(self, *args, **kwargs)
        self.bad_steps.cpu()
        self.bad_steps + torch.tensor([1.0, 2.0], device=self.device)[0]
        self.bad_steps.to("cpu", non_blocking=True)

    monkeypatch.setattr(DiffusionModule, "configure_gradient_clipping", copying)
    assert waits(tmp_path / "run", steps=2) == ["_to_copy of [(3,)]", "_to_copy of [(2,)]"]


def test_a_loss_on_lightnings_progress_bar_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = DiffusionModule.log

    def shown(self: DiffusionModule, *args: Any, **kwargs: Any) -> None:
        log(self, *args, **kwargs, prog_bar=True)

    monkeypatch.setattr(DiffusionModule, "log", shown)
    with pytest.raises(DataDependentOutputException):
        waits(tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RUNS)
def test_ten_steps_on_a_gpu_wait_nowhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own watch; the network is not compiled."""
    step, seen = DiffusionModule.training_step, iter(range(10**6))

    def training_step(self: DiffusionModule, *args: Any) -> Tensor:
        number = next(seen)
        torch.cuda.set_sync_debug_mode("error" if 0 < number < 11 else "default")
        if number == 11:
            raise ZeroDivisionError
        return step(self, *args)

    monkeypatch.setattr(DiffusionModule, "training_step", training_step)
    options = (*SMALL, "trainer.accelerator=gpu", "compile=false", "trainer.max_steps=1000")
    rows = ("trainer.log_every_n_steps=1000", "trainer.val_check_interval=1000")
    try:
        with pytest.raises(ZeroDivisionError):
            train(composed(*options, *rows, *RUNS[name]), tmp_path / "run", [])
    finally:
        torch.cuda.set_sync_debug_mode("default")
