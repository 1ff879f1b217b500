"""What `sample.py` does: numbered images, a grid, on request the trajectory."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from dpm_scales.errors import require, require_number
from dpm_scales.images import make_grid, save_gif, save_png, to_uint8
from dpm_scales.training.callbacks import check_writable
from dpm_scales.training.export import Model, load_model, plain, with_sampler
from dpm_scales.training.sampling import draw, pick_device, pick_labels

GRID_IMAGES = 100  # more than that can't be told apart on a page
TRAJECTORY_ROWS, TRAJECTORY_COLUMNS = 6, 10


def choose_sampler(model: Model, cfg: DictConfig) -> Model:
    """The model with the sampler and number of steps that the config asks for, if it does."""
    settings = plain(cfg.sampler)
    if not settings.get("_target_"):
        settings = dict(model.recipe.parts["sampler"])
    if cfg.steps is not None:
        settings["steps"] = cfg.steps
    return with_sampler(model, OmegaConf.create(settings))


def _check(cfg: DictConfig, out: Path) -> tuple[int, int] | None:
    """The images' size that the config asks for, if it does. Raises UserError for values that can't be meant."""
    require_number("num_samples", cfg.num_samples, 1, whole=True)
    require_number("batch_size", cfg.batch_size, 1, whole=True)
    require_number("seed", cfg.seed, 0, whole=True)
    require(isinstance(cfg.trajectory, bool), f"trajectory must be true or false, got {cfg.trajectory!r}")
    older = [path for path in out.glob("[0-9]*.png") if path.stem.isdigit() and int(path.stem) >= cfg.num_samples]
    require(not older, f"{out} holds more images than num_samples={cfg.num_samples} already; choose another out")
    size = plain(cfg.size)
    if size is None:
        return None
    sides = [size, size] if isinstance(size, int) else size
    pair = isinstance(sides, list) and len(sides) == 2 and all(isinstance(n, int) and n > 0 for n in sides)
    require(pair, f"size must be a number of pixels or [height,width], got {size!r}")
    return sides[0], sides[1]


def sample(cfg: DictConfig) -> None:
    """Everything is checked before the first image is drawn."""
    out = Path(str(cfg.out))
    size = _check(cfg, out)
    device = pick_device(str(cfg.device))
    model = choose_sampler(load_model(str(cfg.model), cfg.weights), cfg)
    labels = pick_labels(model, plain(cfg.labels), cfg.num_samples)
    model.prior.check_size(size or model.recipe.image_size)
    check_writable(out)

    value_range = model.denoiser.process.value_range
    steps = len(model.sampler.scales(model.denoiser.process)) - 1
    batches = -(-cfg.num_samples // cfg.batch_size)
    frames: list[Tensor] = []
    shown: list[Tensor] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("sampling", total=steps * batches)
        first = 0

        def on_step(index: int, x: Tensor) -> None:
            progress.advance(task)
            if cfg.trajectory and first == 0:
                frames.append(to_uint8(x[:TRAJECTORY_ROWS], value_range).cpu())

        for images in draw(model, cfg.num_samples, cfg.seed, cfg.batch_size, size, labels, device, on_step):
            for i, image in enumerate(images, start=first):
                save_png(out / f"{i:06d}.png", image)
            shown.append(images[: max(0, GRID_IMAGES - first)])
            first += len(images)
    save_png(out / "grid.png", make_grid(torch.cat(shown)))
    if frames:
        save_trajectory(out, frames)
    print(f"{first} images in {out}, sampler {type(model.sampler).__name__}, {steps} steps, seed {cfg.seed}")


def save_trajectory(out: Path, frames: list[Tensor]) -> None:
    """`trajectory.png`: a row for each of the first samples, scales from left to right; `trajectory.gif`: all steps."""
    chosen = torch.linspace(0, len(frames) - 1, min(TRAJECTORY_COLUMNS, len(frames))).round().long().tolist()
    table = torch.stack([frames[i] for i in chosen], 1)
    save_png(out / "trajectory.png", make_grid(table.flatten(0, 1), columns=len(chosen)))
    moving = frames[:: max(1, len(frames) // 100)] + [frames[-1]] * 20
    save_gif(out / "trajectory.gif", [make_grid(frame) for frame in moving], 50)
