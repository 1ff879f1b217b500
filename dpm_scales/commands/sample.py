"""Run `sample.py`: choose the task, one function of the config per file in configs/edit; `sample` draws images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from dpm_scales.cli.options import image_size
from dpm_scales.commands.sample_folder import PRIOR_RECORD
from dpm_scales.commands.shared import Setup, enlargement, prepare, produce
from dpm_scales.data.image_sets import read_images
from dpm_scales.errors import UserError
from dpm_scales.images import make_class_grid, make_grid, save_gif, save_png, to_range, to_uint8
from dpm_scales.models.model import Model
from dpm_scales.networks import require_size
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import OnStep
from dpm_scales.storage import write_text

GRID_IMAGES = 100  # more would be too small to see
TRAJECTORY_ROWS, TRAJECTORY_COLUMNS = 6, 10


def run(cfg: DictConfig) -> None:
    """Run the task named in the config. Raises UserError for a user's mistakes."""
    TASKS[cfg.task](cfg)


def start_from(model: Model, place: str) -> tuple[list[str], Tensor]:
    """Start the model from the images of a file, folder or .zip file: sample i from image i mod N.

    Returns: the names, and the images, uint8 ``(N, C, H, W)``.
    Raises: UserError for unreadable images, and for a model that they do not fit or that starts from no images.
    """
    names, images = read_images(place, model.recipe.channels)
    process = model.denoiser.process
    try:
        model.prior.steer(to_range(images, process.value_range), process)
    except UserError as error:
        raise UserError(f"prior_images={place}: {error}") from error
    return names, images


def sample(cfg: DictConfig) -> None:
    """Draw images from the prior and write them. Raises UserError for invalid options, before sampling."""
    size = image_size(cfg)
    setup = prepare(cfg)
    model, process = setup.model, setup.process
    names = None
    if cfg.prior_images is not None:
        names, images = start_from(model, str(cfg.prior_images))
        setup.note("prior_images", images)
    size = size or model.recipe.image_size
    model.prior.check_size(size)
    require_size(model.denoiser.network, size)
    scales = model.sampler.scales(process).to(setup.device)
    frames: list[Tensor] = []

    def make(numbers: Tensor, noise: CounterRNG, labels: Tensor | None, on_step: OnStep) -> Tensor:
        def watched(index: int, x: Tensor) -> None:
            on_step(index, x)
            if cfg.trajectory and numbers[0] == 0:
                frames.append(to_uint8(x[:TRAJECTORY_ROWS], process.value_range).cpu())

        shape = (model.recipe.channels, *size)
        return model.sampler.sample(model.denoiser, model.prior, noise, shape, labels, scales, watched)

    steps, out = len(scales) - 1, setup.out
    with produce(setup, model.sampler, cfg.num_samples, 1, size, steps, make, shown=GRID_IMAGES) as shown:
        if not setup.world.is_main:
            return
        save_png(out / "grid.png", _grid(setup, shown))
        if frames:
            save_trajectory(out, frames)
        if names is None:
            (out / PRIOR_RECORD).unlink(missing_ok=True)  # of earlier samples in the same folder
        else:
            save_record(out, str(cfg.prior_images), names, cfg.num_samples)
    drawn = f"{cfg.num_samples} images in {out}, sampler {type(model.sampler).__name__}, {steps} steps"
    print(f"{drawn}, seed {cfg.seed}{setup.cost()}")


def _grid(setup: Setup, images: list[Tensor]) -> Tensor:
    """Return a grid of the first images, with one row per class if there are classes."""
    if setup.labels is None:
        return make_grid(torch.stack(images))
    labels = setup.labels[torch.arange(len(images)) % len(setup.labels)].tolist()
    return make_class_grid(torch.stack(images), labels, setup.model.recipe.class_names)


def save_record(out: Path, place: str, names: list[str], num_samples: int) -> None:
    """Write `prior_images.json`: the images, and for each sample the number of the image that it started from."""
    start_of = [i % len(names) for i in range(num_samples)]
    record = {
        "prior_images": place,
        "order": "sample i starts from image i mod the number of images",
        "images": names,
        "image_of_sample": start_of,
    }
    write_text(out / PRIOR_RECORD, json.dumps(record, indent=1) + "\n")
    print(f"sample i starts from image i mod {len(names)} of {place}; listed in {out / PRIOR_RECORD}")


def save_trajectory(out: Path, frames: list[Tensor]) -> None:
    """Write `trajectory.png`, a row per sample with scales from left to right, and `trajectory.gif` with all steps."""
    chosen = torch.linspace(0, len(frames) - 1, min(TRAJECTORY_COLUMNS, len(frames))).round().long().tolist()
    table, factor = torch.stack([frames[i] for i in chosen], 1), enlargement(frames[0])
    save_png(out / "trajectory.png", make_grid(table.flatten(0, 1), columns=len(chosen), upscale=factor))
    moving = frames[:: max(1, len(frames) // 100)] + [frames[-1]] * 20
    save_gif(out / "trajectory.gif", [make_grid(frame, upscale=factor) for frame in moving], 50)


def edit(cfg: DictConfig) -> None:
    """Run an editing task, importing its module first."""
    from dpm_scales.commands import edit as tasks

    functions = (tasks.inpaint, tasks.deblur, tasks.superres, tasks.interpolate, tasks.vary, tasks.coarse)
    {function.__name__: function for function in functions}[cfg.task](cfg)


TASKS: dict[str, Callable[[DictConfig], None]] = {
    "draw": sample,
    **dict.fromkeys(("inpaint", "deblur", "superres", "interpolate", "vary", "coarse"), edit),
}
