"""Train and draw with this package, as one of `benchmarks.peer_models`."""

from __future__ import annotations

import importlib.metadata
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.peer_base import Budget, Peer

SAVING = {"cuda": 3.0, "cpu": 0.5}
"""Seconds of a budget that a run of ours leaves for its checkpoint and its export, by the kind of device."""


class Ours(Peer):
    """This package: one run of `train.py` that ends by the clock."""

    package = "dpm_scales"

    @property
    def version(self) -> str:
        """The version of this package."""
        return importlib.metadata.version("dpm-scales")

    def build(self) -> None:
        import numpy as np
        from hydra import compose, initialize_config_dir

        from dpm_scales.training.run import train

        path = self.folder / "images.npz"
        np.savez(path, images=self.images.permute(0, 2, 3, 1).cpu().numpy())
        accelerator = "gpu" if self.images.is_cuda else "cpu"
        recipe, network = ("fast_photos", "fine") if self.shape[0] == 3 else ("fast", "small")
        self.options = [
            *("data=array", f"data.path={path}", "data.val_fraction=0", f"data.batch_size={self.batch_size}"),
            *(f"experiment={recipe}", f"network={self._of('tiny', network, 'ddpm')}", f"seed={self.seed}"),
            *(["network.embedding_dim=256"] if self.large else []),
            *(f"trainer.accelerator={accelerator}", "trainer.enable_progress_bar=false"),
        ]
        self._compose, self._at, self._train = compose, initialize_config_dir, train

    def loss(self, x: Tensor) -> Tensor:
        raise NotImplementedError("train.py computes it")

    def train(self, left: Budget) -> None:
        """Train one run of at least one step, and save it before the time is over."""
        from lightning.pytorch.callbacks import Timer

        from dpm_scales.training.module import DiffusionModule

        whole, saving = max(1, math.ceil(left())), SAVING[self.images.device.type]
        start = DiffusionModule.on_train_start

        def on_train_start(module: Any) -> None:
            start(module)
            timer = next(callback for callback in module.trainer.callbacks if isinstance(callback, Timer))
            # the time is given in whole seconds, and counted from here on
            timer.load_state_dict({"time_elapsed": {"train": whole - left() + saving}})

        minutes, seconds = divmod(whole, 60)
        hours, minutes = divmod(minutes, 60)
        days, hours = divmod(hours, 24)
        ends = ("trainer.max_steps=-1", f"trainer.max_time={days:02}:{hours:02}:{minutes:02}:{seconds:02}")
        # on a GPU `left` waits for the device; on a CPU it may count CPU time, which the run then goes by
        clock = time.monotonic if self.images.is_cuda else lambda: -left()
        with (
            mock.patch.object(DiffusionModule, "on_train_start", on_train_start),
            mock.patch("lightning.pytorch.callbacks.timer.time", SimpleNamespace(monotonic=clock)),
        ):
            self.steps = self._run("run", ends)["steps"]

    def run(self, name: str, steps: int) -> None:
        """Train for some steps in a folder of this name."""
        self._run(name, (f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"))

    def _run(self, name: str, ends: Sequence[str]) -> dict[str, Any]:
        configs = Path(__file__).resolve().parents[1] / "configs"
        with self._at(str(configs), version_base="1.3"):
            cfg = self._compose("train", overrides=[*self.options, *ends])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._train(cfg, self.folder / name, [])

    def inputs(self) -> tuple[Any, ...]:
        channels = self.network.in_channels
        device = self.images.device
        return torch.zeros(1, channels, *self.shape[1:], device=device), torch.ones(1, device=device)

    @property
    def network(self) -> torch.nn.Module:
        """The trained network."""
        return self._model().denoiser.network

    def _model(self) -> Any:
        from dpm_scales.models.io import load_model

        return load_model(self.folder / "run").to(self.images.device)

    def generate(self, number: int) -> Tensor:
        raise NotImplementedError("samplers() draws bytes")

    def samplers(self) -> dict[str, Callable[[int], Tensor]]:
        from dpm_scales.models.generate import draw
        from dpm_scales.samplers import DPMSolver

        model = self._model()

        def of(sampler: Any) -> Callable[[int], Tensor]:
            chosen = model.replaced(sampler=sampler)

            def images(number: int) -> Tensor:
                return torch.cat(list(draw(chosen, number, self.seed, batch_size=100, device=self.images.device)))

            return images

        own = model.sampler
        name = f"DPM-Solver++(2M), {own.steps}" if isinstance(own, DPMSolver) and own.eta == 0 else "auto"
        return {"DPM-Solver++(2M), 10": of(DPMSolver(0.0, 10, "logsnr")), name: of(own)}
