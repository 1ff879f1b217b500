"""What the editing tasks of `sample.py` share: reading images, checking all before work begins, results in batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.errors import UserError, require, require_number
from dpm_scales.images import LEVELS, load_image, make_grid, save_png, to_range, to_uint8
from dpm_scales.noise import NoiseSource
from dpm_scales.processes import Process
from dpm_scales.progress import progress_bar
from dpm_scales.samplers import OnStep
from dpm_scales.storage import check_writable
from dpm_scales.training.building import plain
from dpm_scales.training.export import Model
from dpm_scales.training.image_sets import read_images, size_of
from dpm_scales.training.sample_run import check_older, choose_model
from dpm_scales.training.sampling import check_counts, pick_device, pick_labels
from dpm_scales.training.shards import Shard, leave, meet, own_device

SHOWN_ROWS, SHOWN_COLUMNS, SHOWN_SIDE = 8, 10, 64
"""Of comparison.png: rows, results in a row, and the side in pixels that its cells have at least."""

Make = Callable[[Tensor, NoiseSource, "Tensor | None", OnStep], Tensor]


@dataclass(frozen=True)
class Setup:
    """A model and where its results go; all checked.

    Attributes:
        shard: which of the processes that share the results; the first writes what there is one of.
    """

    model: Model
    device: torch.device
    out: Path
    cfg: DictConfig
    shard: Shard

    @property
    def denoiser(self) -> Denoiser:
        return self.model.denoiser

    @property
    def process(self) -> Process:
        return self.model.denoiser.process

    def images(self, key: str) -> Tensor:
        """uint8 ``(N, C, H, W)``, the images that the config's `key` names; see `read_images`."""
        return read_images(str(self.cfg[key]), self.model.recipe.channels)[1]

    def floats(self, images: Tensor) -> Tensor:
        """uint8 images in the process's value range, on the device."""
        return to_range(images.to(self.device), self.process.value_range)


def prepare(cfg: DictConfig) -> Setup:
    """Model, sampler and device, checked; nothing is written yet."""
    check_counts(cfg)
    shard = meet()
    device = own_device(pick_device(str(cfg.device)), shard)
    model = choose_model(cfg)
    model.modules().to(device)
    needs_labels = model.recipe.num_classes is not None and plain(cfg.labels) is None
    require(
        not needs_labels, f"this model was trained with labels; say for task={cfg.task} what it shows: labels=CLASS"
    )
    return Setup(model, device, Path(str(cfg.out)), cfg, shard)


def read_mask(place: str, like: Tensor, name: str) -> Tensor:
    """Bool ``(H, W)``, white from half on. Raises UserError for another size, and for one colour alone."""
    grey = load_image(place, channels=1)[0]
    require(
        grey.shape == like.shape[-2:],
        f"{place} has {size_of(grey)} pixels, {name} {size_of(like)} (height x width); a mask needs the same size",
    )
    mask = grey > LEVELS // 2
    require(bool(mask.any()), f"{place} is black everywhere; a mask is white where the image is to be invented")
    require(not bool(mask.all()), f"{place} is white everywhere; nothing of the image would be left")
    return mask


def check_scale(name: str, value: object) -> float:
    """Raises UserError unless 0 < value <= 1."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
    require(fits, f"{name} must be a scale in (0, 1], got {value!r}")
    return float(value)  # type: ignore[arg-type]


def check_noise_std(setup: Setup) -> float:
    """noise_std of the config in units of the value range. Raises UserError for another number than 0 to 1."""
    require_number("noise_std", setup.cfg.noise_std, 0, 1)
    low, high = setup.process.value_range
    return float(setup.cfg.noise_std) * (high - low)


def produce(
    setup: Setup,
    inputs: int,
    per_input: int,
    steps: int,
    make: Make,
    noise_of: Callable[[int, int], NoiseSource] | None = None,
    together: int = 1,
) -> list[Tensor]:
    """Write `per_input` numbered results for each of `inputs`, with the other processes, and wait for all of them.

    Args:
        steps: calls of `on_step` that a batch makes.
        make: results in pixels ``(B, C, H, W)`` from numbers of inputs ``(B,)``, noise, labels and a callback.
        noise_of: noise from the count and the first number of a batch; by default one stream for each result.
        together: results that can't be parted, one after the other; divides `per_input`.

    Returns: those of the first rows, uint8 on the CPU; nothing in other processes than the first.
    """
    cfg, total = setup.cfg, inputs * per_input
    check_older(setup.out, total, f"the {total} that task={cfg.task} makes here")
    check_writable(setup.out)
    labels = pick_labels(setup.model, plain(cfg.labels), inputs) if setup.model.recipe.num_classes else None
    size = max(1, cfg.batch_size // together) * together
    part = setup.shard.part(total // together)
    own = range(part.start * together, part.stop * together, size)
    with progress_bar(setup.shard.is_main) as progress:
        bar = progress.add_task(str(cfg.task), total=steps * len(own))
        for first in own:
            count = min(size, own.stop - first)
            noise = NoiseSource(cfg.seed, count, first, setup.device) if noise_of is None else noise_of(count, first)
            numbers = torch.arange(first, first + count) // per_input
            of_batch = None if labels is None else labels[numbers].to(setup.device)
            x = make(numbers, noise, of_batch, lambda *_: progress.advance(bar))
            images = to_uint8(x, setup.process.value_range).cpu()
            for i, image in enumerate(images, start=first):
                save_png(setup.out / f"{i:06d}.png", image)
    leave()  # once all results are there
    if not setup.shard.is_main:
        return []
    return [load_image(setup.out / f"{i:06d}.png") for i in range(min(total, SHOWN_ROWS * per_input))]


def save_comparison(
    setup: Setup, before: list[Tensor], results: list[Tensor], per_input: int, after: list[Tensor] | None = None
) -> None:
    """`comparison.png`: a row for each input; nothing for no results.

    Args:
        before, after: what stands on either side of the results, uint8 ``(N, C, H, W)`` each.
        results: `per_input` of each input, uint8 ``(C, H, W)``.
    """
    if not results:
        return
    after = after or []
    rows = min(SHOWN_ROWS, len(results) // per_input)
    columns = min(per_input, SHOWN_COLUMNS)
    cells = []
    for row in range(rows):
        cells += [images[row] for images in before] + results[row * per_input : row * per_input + columns]
        cells += [images[row] for images in after]
    grid = make_grid(torch.stack(cells), len(cells) // rows, padding=2, upscale=enlargement(cells[0]))
    save_png(setup.out / "comparison.png", grid)


def enlargement(images: Tensor) -> int:
    """The factor that makes the shorter side at least `SHOWN_SIDE` pixels."""
    return max(1, -(-SHOWN_SIDE // min(images.shape[-2:])))


def refuse_sampler(cfg: DictConfig, reason: str) -> None:
    if plain(cfg.sampler).get("_target_"):
        raise UserError(f"task={cfg.task} {reason}; drop sampler=, and set steps= for their number")
