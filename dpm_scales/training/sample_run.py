"""What `sample.py` does: one function of the config for each task of configs/edit, and the first of them, `sample`."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dpm_scales.errors import UserError, require
from dpm_scales.images import load_image, make_grid, save_gif, save_png, to_range, to_uint8, write_text
from dpm_scales.progress import progress_bar
from dpm_scales.storage import check_writable
from dpm_scales.training.building import plain
from dpm_scales.training.export import Model, load_model, with_sampler
from dpm_scales.training.image_sets import read_images
from dpm_scales.training.sampling import check_counts, draw, pick_device, pick_labels, with_guidance
from dpm_scales.training.shards import leave, meet, own_device

TASKS = {
    "draw": ("dpm_scales.training.sample_run", "sample"),
    "inpaint": ("dpm_scales.training.edit_run", "inpaint"),
    "deblur": ("dpm_scales.training.edit_run", "deblur"),
    "superres": ("dpm_scales.training.edit_run", "superres"),
    "interpolate": ("dpm_scales.training.edit_run", "interpolate"),
    "vary": ("dpm_scales.training.edit_run", "vary"),
    "coarse": ("dpm_scales.training.edit_run", "coarse"),
}
"""Module and function of each task; a module is imported when its task is called."""

RECORD = "prior_images.json"
"""Which image each sample started from."""

GRID_IMAGES = 100  # more than that can't be told apart on a page
TRAJECTORY_ROWS, TRAJECTORY_COLUMNS = 6, 10


def run(cfg: DictConfig) -> None:
    """Do the task that the config names. Raises UserError for a user's mistakes."""
    module, function = TASKS[cfg.task]
    getattr(import_module(module), function)(cfg)


def choose_sampler(model: Model, cfg: DictConfig) -> Model:
    """The model with the sampler and number of steps that the config asks for, if it does."""
    settings = plain(cfg.sampler)
    if not settings.get("_target_"):
        settings = dict(model.recipe.parts["sampler"])
    if cfg.steps is not None:
        settings["steps"] = cfg.steps
    return with_sampler(model, OmegaConf.create(settings))


def choose_model(cfg: DictConfig) -> Model:
    """The model that the config names, with all that it asks for."""
    model = choose_sampler(load_model(str(cfg.model), cfg.weights), cfg)
    return with_guidance(model, cfg.guidance, plain(cfg.guidance_interval), cfg.guidance_variable)


def check_older(out: Path, count: int, reason: str) -> None:
    """Raises UserError where `out` holds numbered images beyond those that will be written."""
    older = [path for path in out.glob("[0-9]*.png") if path.stem.isdigit() and int(path.stem) >= count]
    require(not older, f"{out} holds more images than {reason} already; choose another out")


def _check(cfg: DictConfig, out: Path) -> tuple[int, int] | None:
    """The images' size that the config asks for, if it does. Raises UserError for values that can't be meant."""
    check_counts(cfg)
    require(isinstance(cfg.trajectory, bool), f"trajectory must be true or false, got {cfg.trajectory!r}")
    check_older(out, cfg.num_samples, f"num_samples={cfg.num_samples}")
    return image_size(cfg)


def image_size(cfg: DictConfig) -> tuple[int, int] | None:
    """H, W that the config asks for, if it does. Raises UserError for values that can't be meant."""
    size = plain(cfg.size)
    if size is None:
        return None
    sides = [size, size] if isinstance(size, int) else size
    pair = isinstance(sides, list) and len(sides) == 2 and all(isinstance(n, int) and n > 0 for n in sides)
    require(pair, f"size must be a number of pixels or [height,width], got {size!r}")
    return sides[0], sides[1]


def steer(model: Model, place: str) -> list[str]:
    """Start the model from the images of a file, folder or .zip file: sample i from image i mod N. Returns their names.

    Raises: UserError for images that can't be read, and for a model that they do not fit or that takes none.
    """
    names, images = read_images(place, model.recipe.channels)
    process = model.denoiser.process
    try:
        model.prior.steer(to_range(images, process.value_range), process)
    except UserError as error:
        raise UserError(f"prior_images={place}: {error}") from error
    return names


def sample(cfg: DictConfig) -> None:
    """Everything is checked before the first image is drawn."""
    out = Path(str(cfg.out))
    size = _check(cfg, out)
    shard = meet()
    numbers = shard.part(cfg.num_samples)
    device = own_device(pick_device(str(cfg.device)), shard)
    model = choose_model(cfg)
    labels = pick_labels(model, plain(cfg.labels), cfg.num_samples)
    labels = None if labels is None else labels[numbers.start : numbers.stop]
    names = None if cfg.prior_images is None else steer(model, str(cfg.prior_images))
    model.prior.check_size(size or model.recipe.image_size)
    check_writable(out)

    value_range = model.denoiser.process.value_range
    steps = len(model.sampler.scales(model.denoiser.process)) - 1
    batches = -(-len(numbers) // cfg.batch_size)
    frames: list[Tensor] = []
    first = numbers.start
    with progress_bar(shard.is_main) as progress:
        task = progress.add_task("sampling", total=steps * batches)

        def on_step(index: int, x: Tensor) -> None:
            progress.advance(task)
            if cfg.trajectory and first == 0:
                frames.append(to_uint8(x[:TRAJECTORY_ROWS], value_range).cpu())

        settings = (cfg.seed, cfg.batch_size, size, labels, device, on_step, first)
        for images in draw(model, len(numbers), *settings) if numbers else ():
            for i, image in enumerate(images, start=first):
                save_png(out / f"{i:06d}.png", image)
            first += len(images)
    leave()  # once all images are there
    if not shard.is_main:
        return
    shown = [load_image(out / f"{i:06d}.png") for i in range(min(cfg.num_samples, GRID_IMAGES))]
    save_png(out / "grid.png", make_grid(torch.stack(shown)))
    if frames:
        save_trajectory(out, frames)
    print(f"{cfg.num_samples} images in {out}, sampler {type(model.sampler).__name__}, {steps} steps, seed {cfg.seed}")
    if names is None:
        (out / RECORD).unlink(missing_ok=True)  # of earlier samples in the same folder
    else:
        save_record(out, str(cfg.prior_images), names, cfg.num_samples)


def save_record(out: Path, place: str, names: list[str], num_samples: int) -> None:
    """`prior_images.json`: the images, and for each sample the number of the one it started from."""
    start_of = [i % len(names) for i in range(num_samples)]
    record = {
        "prior_images": place,
        "order": "sample i starts from image i mod the number of images",
        "images": names,
        "image_of_sample": start_of,
    }
    write_text(out / RECORD, json.dumps(record, indent=1) + "\n")
    print(f"sample i starts from image i mod {len(names)} of {place}; listed in {out / RECORD}")


def save_trajectory(out: Path, frames: list[Tensor]) -> None:
    """`trajectory.png`: a row for each of the first samples, scales from left to right; `trajectory.gif`: all steps."""
    chosen = torch.linspace(0, len(frames) - 1, min(TRAJECTORY_COLUMNS, len(frames))).round().long().tolist()
    table = torch.stack([frames[i] for i in chosen], 1)
    save_png(out / "trajectory.png", make_grid(table.flatten(0, 1), columns=len(chosen)))
    moving = frames[:: max(1, len(frames) // 100)] + [frames[-1]] * 20
    save_gif(out / "trajectory.gif", [make_grid(frame) for frame in moving], 50)
