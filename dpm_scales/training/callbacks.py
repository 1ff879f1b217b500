"""Callbacks: average of the weights, checkpoints, sample grids, metrics.csv."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from dpm_scales.errors import UserError, require
from dpm_scales.images import atomic_write, make_grid, save_png, to_uint8, write_text
from dpm_scales.noise import NoiseSource
from dpm_scales.training.export import read_checkpoint
from dpm_scales.training.module import DiffusionModule


class WeightAverage(WeightAveraging):
    """Exponential moving average, decay min(`decay`, (1 + n) / (10 + n)) at update n."""

    def __init__(self, decay: float = 0.999) -> None:
        require(0 <= decay < 1, f"ema.decay must lie in [0, 1), got {decay}")
        self.decay = decay
        # buffers are constants of the model here; averaging would round the integer ones
        super().__init__(use_buffers=False, avg_fn=self._average)

    def _average(self, average: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        n = torch.as_tensor(count, dtype=torch.float32, device=average.device)
        decay = torch.clamp((1 + n) / (10 + n), max=self.decay)
        return torch.lerp(current, average, decay.to(average.dtype))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and are read without unpickling."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with atomic_write(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def checkpoints(folder: Path, every_n_steps: int) -> list[Callback]:
    """`last.ckpt` every n steps, and `best.ckpt` by validation loss."""
    require(every_n_steps >= 1, f"checkpoint.every_n_steps must be >= 1, got {every_n_steps}")
    last = ModelCheckpoint(
        folder,
        filename="last",
        every_n_train_steps=every_n_steps,
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    best = ModelCheckpoint(
        folder,
        filename="best",
        monitor="val/loss",
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    return [last, best]


class FinalCheckpoint(Callback):
    """`last.ckpt` at the end of training too. Must come before `WeightAverage`, which then replaces the raw weights."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class SampleGrid(Callback):
    """`samples/step-N.png` at each validation, from the averaged weights and always the same noise.

    Must come before `WeightAverage`, which swaps the raw weights back at the end of a validation.
    """

    def __init__(self, folder: Path, num_images: int = 64, seed: int = 0) -> None:
        require(num_images >= 0, f"samples.num_images must be >= 0, got {num_images}")
        self.folder, self.num_images, self.seed = folder, num_images, seed

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or self.num_images == 0 or trainer.global_rank != 0:
            return
        assert isinstance(pl_module, DiffusionModule)
        model = pl_module.parts
        process, recipe = model.denoiser.process, model.recipe
        noise = NoiseSource(self.seed, self.num_images, device=pl_module.device)
        labels = None
        if recipe.num_classes is not None:
            labels = torch.arange(self.num_images, device=pl_module.device) % recipe.num_classes
        x = model.sampler.sample(model.denoiser, model.prior, noise, (recipe.channels, *recipe.image_size), labels)
        grid = make_grid(to_uint8(x, process.value_range).cpu())
        save_png(self.folder / f"step-{trainer.global_step:06d}.png", grid)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples", [grid.permute(1, 2, 0).numpy()], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid, trainer.global_step)


class MetricsFile(Logger):
    """`metrics.csv`: one row for each time something is logged; a resumed run goes on in the same file.

    Lightning's CSVLogger rewrites from memory, so that a resumed run would lose the rows before it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._rows: list[dict[str, str]] = []
        self._columns: list[str] = ["step", "epoch"]
        if path.is_file():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self._rows = list(reader)
                self._columns = list(reader.fieldnames or self._columns)

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def forget_after(self, step: int) -> None:
        """Drop the rows that a resumed run will write again."""
        self._rows = [row for row in self._rows if int(row["step"]) <= step]

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._columns += [name for name in metrics if name not in self._columns]
        row = {"step": str(step or 0), **{name: f"{value:.8g}" for name, value in metrics.items()}}
        if self._rows and self._rows[-1]["step"] == row["step"]:
            self._rows[-1].update(row)
        else:
            self._rows.append(row)
        if any(name.startswith("val/") for name in metrics):
            self.save()

    @rank_zero_only
    def save(self) -> None:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self._columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self.path, buffer.getvalue())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def check_writable(folder: Path) -> None:
    """Raise UserError unless files can be made in `folder`, which is created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"can't write to {folder}: {error.strerror}; choose another folder") from error
