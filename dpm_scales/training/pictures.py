"""Draw pictures at each validation, on the first rank: samples, their trajectories, and the run's curves.

Loggers that take images get each picture, identical to the file in the run's folder. Nothing here draws from the
random streams of training.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from dpm_scales.distributed.fsdp import is_sharded
from dpm_scales.errors import OutOfMemoryError, require_number
from dpm_scales.images import load_image, make_class_grid, make_grid, save_png, to_uint8
from dpm_scales.memory import lacks_memory
from dpm_scales.plots import curves
from dpm_scales.plots.rows import titled_columns
from dpm_scales.rng import CounterRNG
from dpm_scales.storage import FolderGoneError
from dpm_scales.training.module import DiffusionModule
from dpm_scales.training.reporting import MetricsFile

TRAJECTORY_COLUMNS = 8
"""Largest number of scales in the strip of trajectories."""


def show(trainer: pl.Trainer, name: str, image: Tensor) -> None:
    """Send a uint8 image ``(C, H, W)`` to the loggers that take images."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(name, [image.permute(1, 2, 0).numpy()], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, image, trainer.global_step)


class SampleGrid(Callback):
    """Writes `samples/step-N.png` at each validation, from the EMA weights and always the same noise.

    Beside it, `samples/trajectory-N.png` shows the first samples at several scales of the reverse process, which cost
    no further evaluations of the network.

    Args:
        folder: folder of the pictures.
        num_images: number of samples in the grid; 0 for no pictures.
        seed: seed of the noise.
        num_trajectories: number of samples in the strip; 0 for no strip.

    Raises: UserError for a number below 0.
    """

    def __init__(self, folder: Path, num_images: int = 64, seed: int = 0, num_trajectories: int = 4) -> None:
        require_number("samples.num_images", num_images, 0, whole=True)
        require_number("samples.num_trajectories", num_trajectories, 0, whole=True)
        self.folder, self.num_images, self.seed, self.num_trajectories = folder, num_images, seed, num_trajectories

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        together = is_sharded(pl_module)
        if trainer.sanity_checking or self.num_images == 0 or not (together or trainer.is_global_zero):
            return
        assert isinstance(pl_module, DiffusionModule)
        model = pl_module.parts
        process, recipe = model.denoiser.process, model.recipe
        noise = CounterRNG(self.seed, self.num_images, device=pl_module.device)
        labels = None
        if recipe.num_classes is not None:
            labels = torch.arange(self.num_images, device=pl_module.device) % recipe.num_classes
        size = (recipe.channels, *recipe.image_size)
        scales = model.sampler.scales(process).tolist()
        chosen = shown_steps(scales) if self.num_trajectories else set()
        titles: list[str] = []
        columns: list[Tensor] = []

        def keep(index: int, x: Tensor) -> None:
            if index in chosen:
                titles.append(f"t = {scales[index + 1]:.3g}")
                columns.append(visible(x[: self.num_trajectories], process.value_range))

        try:
            x = model.sampler.sample(model.denoiser, model.prior, noise, size, labels, on_step=keep)
        except (RuntimeError, MemoryError) as error:
            place = lacks_memory(error)
            if place is None:
                raise
            what = f"samples.num_images={self.num_images} images of {size[1]}x{size[2]}"
            raise OutOfMemoryError(f"{place} has no memory to draw {what}; lower samples.num_images") from error
        if not trainer.is_global_zero:
            return
        if not x.isfinite().all():
            warnings.warn(f"samples at step {trainer.global_step} are not finite: black in the grid", stacklevel=2)
        images = to_uint8(x, process.value_range).cpu()
        grid = make_grid(images) if labels is None else make_class_grid(images, labels.tolist(), recipe.class_names)
        pictures = {"samples": (f"step-{trainer.global_step:06d}.png", grid)}
        if columns:
            strip = titled_columns(titles, [column.cpu() for column in columns])
            pictures["trajectories"] = (f"trajectory-{trainer.global_step:06d}.png", strip)
        for name, (file, picture) in pictures.items():
            with suppress(FolderGoneError):  # in the middle of a validation, where no checkpoint can be made
                save_png(self.folder / file, picture)
            show(trainer, name, picture)


def shown_steps(scales: Sequence[float]) -> set[int]:
    """Return the numbers of the steps whose results are shown, at most `TRAJECTORY_COLUMNS`, the last among them.

    Of many steps, those are shown that end nearest to evenly spaced scales, since grids are dense where little changes.

    Args:
        scales: the grid, one more than there are steps, descending to 0.
    """
    ends = scales[1:]
    if len(ends) <= TRAJECTORY_COLUMNS:
        return set(range(len(ends)))
    targets = (column / TRAJECTORY_COLUMNS for column in range(TRAJECTORY_COLUMNS))
    return {min(range(len(ends)), key=lambda step: abs(ends[step] - target)) for target in targets}


def visible(x: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Return images ``(B, C, H, W)`` at one scale as uint8, with less contrast where noise exceeds the range by far.

    Deviations from the middle of the range are divided by their root mean square in half ranges, if that is above 1.
    """
    low, high = value_range
    middle, half = (low + high) / 2, (high - low) / 2
    deviation = x - middle
    spread = (deviation.square().mean((1, 2, 3), keepdim=True).sqrt() / half).clamp(min=1)
    return to_uint8(middle + deviation / spread, value_range)


class Curves(Callback):
    """Draws `curves.png` of a run's metrics at each validation, once they are in `metrics.csv`.

    Args:
        path: file to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        logged = next(logger.curves() for logger in trainer.loggers if isinstance(logger, MetricsFile))
        if not logged:
            return
        with suppress(FolderGoneError):
            curves.draw_run(self.path, logged)
            if len(trainer.loggers) > 1:
                show(trainer, "curves", load_image(self.path))
