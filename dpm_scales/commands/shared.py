"""Provide what the tasks of `sample.py` share: the model, input images, numbered results in batches, the record."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from dpm_scales.cli.options import check_counts, guidance_settings, pick_device
from dpm_scales.commands import sample_folder, sample_shards
from dpm_scales.data.image_sets import read_images, size_of
from dpm_scales.denoisers import Denoiser
from dpm_scales.describe import Describable
from dpm_scales.distributed import ranks
from dpm_scales.distributed.ranks import World
from dpm_scales.errors import UserError, require, require_number
from dpm_scales.images import LEVELS, load_image, make_grid, png_bytes, save_png, to_range, write_bytes
from dpm_scales.memory import require_memory
from dpm_scales.models.generate import computed, evaluations, finished, label_cycle, sample_bytes, weights_digest
from dpm_scales.models.guided import with_guidance
from dpm_scales.models.instantiate import plain
from dpm_scales.models.io import chosen_average, load_model
from dpm_scales.models.model import Model, with_sampler
from dpm_scales.models.parts import described
from dpm_scales.models.post_hoc import Reconstruction
from dpm_scales.networks.precision import FULL, precision_name
from dpm_scales.processes import Process
from dpm_scales.progress import Report
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import OnStep, Sampler

SHOWN_ROWS, SHOWN_COLUMNS, SHOWN_SIDE = 8, 10, 64
"""Rows, results per row, and minimum side of a cell in pixels in comparison.png."""

Make = Callable[[Tensor, CounterRNG, "Tensor | None", OnStep], Tensor]


SHARED_OPTIONS = (
    *("task", "model", "allow", "plugins", "weights", "out", "overwrite", "seed", "batch_size", "device", "size"),
    *("trajectory", "shards", "sampler", "steps", "labels", "guidance", "guidance_interval", "guidance_variable"),
    *("guide", "guide_weights", "guide_ema", "guide_ema_step", "ema", "ema_step", "precision", "compile"),
)
"""Options of all tasks that the record stores elsewhere or that change no image; the rest belong to the task."""

GUIDE_OPTIONS = {"guide_weights": "averaged", "guide_ema": None, "guide_ema_step": None}
"""Options of a guide, with their defaults."""


@dataclass(frozen=True)
class Setup:
    """A model and the output folder of its results, both checked.

    Attributes:
        world: this process among those that share the results; the first writes the common files.
        labels: ``(n,)``, assigned to inputs cyclically, or None.
        weights_sha256: SHA-256 of the model's weights.
        inputs: the images read so far, by option, for the record.
        ema: the record of the average that was reconstructed; None for the one that the run exported.
        guide: the record of the guide's weights; None without a guide.
        spent: evaluations of each network per result, by the network's name; filled once there are results.
    """

    model: Model
    device: torch.device
    out: Path
    cfg: DictConfig
    world: World
    labels: Tensor | None
    weights_sha256: str
    inputs: dict[str, Any] = field(default_factory=dict)
    ema: dict[str, Any] | None = None
    guide: dict[str, Any] | None = None
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def denoiser(self) -> Denoiser:
        return self.model.denoiser

    @property
    def process(self) -> Process:
        return self.model.denoiser.process

    @property
    def in_shards(self) -> bool:
        """True if results are written as tar shards."""
        return bool(self.cfg.get("shards", False))

    def images(self, key: str) -> Tensor:
        """Return the images that the config's `key` names, uint8 ``(N, C, H, W)``; see `read_images`."""
        images = read_images(str(self.cfg[key]), self.model.recipe.channels)[1]
        self.note(key, images)
        return images

    def note(self, key: str, images: Tensor) -> None:
        """Add the images that the config's `key` names to the record."""
        digest = hashlib.sha256(str(tuple(images.shape)).encode() + images.contiguous().numpy().tobytes()).hexdigest()
        self.inputs[key] = {"path": str(self.cfg[key]), "number": len(images), "sha256": digest}

    def floats(self, images: Tensor) -> Tensor:
        """Return uint8 images as floats in the process's value range, on the device."""
        return to_range(images.to(self.device), self.process.value_range)

    def require_memory(self, size: tuple[int, int], count: int, together: int = 1, why: str = "images") -> None:
        """Raise OutOfMemoryError unless a batch of `count` results of `size` (H, W) fits, see `produce`.

        Args:
            why: what needs the memory, with the option that determines its size.
        """
        each = sample_bytes(self.model, size)
        batch = min(count, max(self.cfg.batch_size // together, 1) * together)
        smaller = "ask for smaller images" if together == 1 else "lower frames"
        for number, remedy in ((min(together, batch), smaller), (batch, "lower batch_size")):
            what = f"{why} of {size[0]}x{size[1]} pixels, {number} at a time,"
            require_memory(each * number, what, remedy, self.device)

    def cost(self) -> str:
        """Return the evaluations of guided results as the end of a line; empty without guidance."""
        if not self.spent or guidance_settings(self.cfg) is None:
            return ""
        return f", evaluations an image: {' and '.join(f'{n:g} of the {name}' for name, n in self.spent.items())}"

    def record(self, sampler: Sampler, steps: int, number: int, size: tuple[int, int]) -> dict[str, Any]:
        """Return the content of `sample.json`."""
        cfg, process = self.cfg, self.process
        options = {str(key): plain(value) for key, value in cfg.items() if key not in SHARED_OPTIONS}
        for key in (*self.inputs, "prior_images"):
            options.pop(key, None)
        if cfg.task == "draw":
            options.pop("num_samples")  # stored as the number of images
        table = self.denoiser.error_variance if sampler.covariance is not None else None
        shards = {"shards": sample_shards.PER_SHARD} if self.in_shards else {}
        precision = precision_name("precision", cfg.precision)
        return shards | {
            "format": sample_folder.FORMAT,
            "version": sample_folder.VERSION,
            "task": cfg.task,
            "model": str(cfg.model),
            "weights": cfg.weights,
            **({} if self.ema is None else {"ema": self.ema}),
            "weights_sha256": self.weights_sha256,
            # left out where nothing was chosen, as in records from before there was a choice
            **({} if precision == FULL else {"precision": precision}),
            **({"compile": True} if cfg.compile else {}),
            "process": type(process).__name__,
            "process_settings": self.model.recipe.parts["process"],
            "sampler": type(sampler).__name__,
            "sampler_settings": settings_of(sampler),
            "steps": steps,
            "guidance": guidance_settings(cfg),
            "guide": self.guide,
            "seed": cfg.seed,
            "labels": None if self.labels is None else self.labels.tolist(),
            **({} if self.labels is None else {"class_names": self.model.recipe.class_names}),
            "size": list(size),
            "number": number,
            "options": options,
            "inputs": self.inputs,
            **({} if table is None else {"covariance": table.record()}),
            "versions": {"dpm-scales": version("dpm-scales"), "torch": torch.__version__},
        }


def settings_of(sampler: Sampler) -> dict[str, Any]:
    """Return a sampler's arguments by name, as plain values where they can be described."""
    settings: dict[str, Any] = {}
    for name in inspect.signature(type(sampler)).parameters:
        value = getattr(sampler, name, None)
        if isinstance(value, Sampler):
            value = {"name": type(value).__name__, **settings_of(value)}
        elif isinstance(value, Describable):
            value = described(value)
        elif isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        settings[name] = value
    return settings


@dataclass(frozen=True)
class Chosen:
    """A model with the settings of a command, and the records of its average and its guide; None without."""

    model: Model
    ema: dict[str, Any] | None
    guide: dict[str, Any] | None


def choose_model(cfg: DictConfig) -> Chosen:
    """Return the model named in the config, with the average, sampler, steps and guidance set there.

    Raises: UserError for invalid options, and for a guide that does not fit the model.
    """
    sampler = plain(cfg.sampler)
    chosen = sampler if sampler.get("_target_") else None
    path, average = str(cfg.model), {"ema": cfg.ema, "ema_step": cfg.ema_step}
    model = load_model(path, cfg.weights, allow=plain(cfg.allow), sampler=chosen, steps=cfg.steps, **average)
    ema = record_of(chosen_average(path, cfg.weights, **average))
    changes = {key: value for key, value in sampler.items() if value is not None}
    if chosen is None and changes:
        model = with_sampler(model, {**model.recipe.parts["sampler"], **changes})
    settings = (plain(cfg.guidance), plain(cfg.guidance_interval), cfg.guidance_variable)
    if cfg.guide is None:
        for key, usual in GUIDE_OPTIONS.items():
            require(cfg[key] == usual, f"{key}={cfg[key]} is of a guide; give guide=MODEL")
        return Chosen(with_guidance(model, *settings), ema, None)
    average = {"ema": cfg.guide_ema, "ema_step": cfg.guide_ema_step}
    own = record_of(chosen_average(str(cfg.guide), cfg.guide_weights, **average, prefix="guide_"))
    guide = load_model(str(cfg.guide), cfg.guide_weights, allow=plain(cfg.allow), **average)
    record = {"model": str(cfg.guide), "weights": cfg.guide_weights, "weights_sha256": weights_digest(guide)}
    guided = with_guidance(model, *settings, guide, f"guide={cfg.guide}")
    return Chosen(guided, ema, record | ({} if own is None else {"ema": own}))


def record_of(average: Reconstruction | None) -> dict[str, Any] | None:
    """Return the record of an average that a command has chosen; None for the one that the run exported."""
    return None if average is None else average.record()


def prepare(cfg: DictConfig) -> Setup:
    """Return the checked model, sampler and device; write nothing."""
    check_counts(cfg)
    precision_name("precision", cfg.precision)
    world = ranks.meet()
    device = ranks.own_device(pick_device(str(cfg.device)), world)
    chosen = choose_model(cfg)
    model = chosen.model.to(device)
    labels = plain(cfg.labels)
    require(
        cfg.task == "draw" or model.recipe.num_classes is None or labels is not None,
        f"this model was trained with labels; say for task={cfg.task} what it shows: labels=CLASS",
    )
    cycle = label_cycle(model, labels)
    return Setup(
        model, device, Path(str(cfg.out)), cfg, world, cycle, weights_digest(model), ema=chosen.ema, guide=chosen.guide
    )


def read_mask(setup: Setup, like: Tensor) -> Tensor:
    """Return the mask for the images `like`, bool ``(H, W)``, thresholded at half.

    Raises: UserError unless it has the size of the images and both values.
    """
    place, name = str(setup.cfg.mask), str(setup.cfg.image)
    grey = load_image(place, channels=1)[0]
    require(
        grey.shape == like.shape[-2:],
        f"{place} has {size_of(grey)} pixels, {name} {size_of(like)} (height x width); a mask needs the same size",
    )
    mask = grey > LEVELS // 2
    require(bool(mask.any()), f"{place} is black everywhere; a mask is white where the image is to be invented")
    require(not bool(mask.all()), f"{place} is white everywhere; nothing of the image would be left")
    setup.note("mask", mask[None])
    return mask


def check_scale(name: str, value: object) -> float:
    """Return the value as a float. Raises UserError unless 0 < value <= 1."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
    require(fits, f"{name} must be a scale in (0, 1], got {value!r}")
    return float(value)  # type: ignore[arg-type]


def check_noise_std(setup: Setup) -> float:
    """Return noise_std in units of the process's value range. Raises UserError unless it is from 0 to 1."""
    require_number("noise_std", setup.cfg.noise_std, 0, 1)
    low, high = setup.process.value_range
    return float(setup.cfg.noise_std) * (high - low)


@contextmanager
def produce(
    setup: Setup,
    sampler: Sampler,
    inputs: int,
    per_input: int,
    size: tuple[int, int],
    steps: int,
    make: Make,
    noise_of: Callable[[int, int], CounterRNG] | None = None,
    together: int = 1,
    shown: int | None = None,
) -> Iterator[list[Tensor]]:
    """Write `per_input` numbered results for each of `inputs`, shared with the other processes; wait for all of them.

    The folder stays reserved for this command while the body runs, see `sample_folder.claimed`.

    Args:
        sampler: the sampler that `make` uses, for the record.
        size: H, W of the results.
        steps: number of calls of `on_step` per batch.
        make: returns results in pixels ``(B, C, H, W)`` from input numbers ``(B,)``, noise, labels and a callback.
        noise_of: returns the noise for the size and first number of a batch; by default one stream per result.
        together: number of consecutive results kept in one batch; divides `per_input`.
        shown: number of results to yield; by default those in the rows of `comparison.png`.

    Yields: the first results, uint8 on the CPU; an empty list in all processes but the first.
    """
    cfg, total, out = setup.cfg, inputs * per_input, setup.out
    part = setup.world.part(total // together)
    setup.require_memory(size, (part.stop - part.start) * together, together)
    record = setup.record(sampler, steps, total, size)
    batch_size = max(1, cfg.batch_size // together) * together

    def files(numbers: range, on_step: OnStep) -> Iterator[tuple[str, bytes, int | None]]:
        """Yield (name, content, label) of the files of these results."""
        for first in range(numbers.start, numbers.stop, batch_size):
            count = min(batch_size, numbers.stop - first)
            noise = noise_of(count, first) if noise_of else CounterRNG(cfg.seed, count, first, setup.device)
            of_input = torch.arange(first, first + count) // per_input
            labels = None if setup.labels is None else setup.labels[of_input % len(setup.labels)]
            x = make(of_input, noise, None if labels is None else labels.to(setup.device), on_step)
            known = [None] * count if labels is None else labels.tolist()
            for number, image in enumerate(finished(x, setup.process.value_range, first), start=first):
                content = png_bytes(image, sample_folder.image_text(record, number))
                yield sample_folder.image_name(number), content, known[number - first]

    with ExitStack() as held:
        ranks.first_decides(lambda: held.enter_context(sample_folder.claimed(out, record, cfg.overwrite)))
        own = range(part.start * together, part.stop * together)
        jobs = sample_shards.unfinished(out, total, setup.world) if setup.in_shards else [own]
        batches = sum(-(-len(job) // batch_size) for job in jobs)
        how = computed(setup.model, cfg.precision, cfg.compile)
        with Report(shown=setup.world.is_main) as report, evaluations(setup.model) as counts, how:
            advance = report.part(str(cfg.task), steps * batches)
            for job in jobs:
                made = files(job, lambda *_: advance(1))
                if setup.in_shards:
                    sample_shards.write(out, job, made)
                    continue
                for name, content, _ in made:
                    write_bytes(out / name, content)
        setup.spent.update({name: count / max(1, sum(map(len, jobs))) for name, count in counts.items()})
        ranks.leave()  # returns when all results exist
        count = min(total, SHOWN_ROWS * per_input if shown is None else shown) if setup.world.is_main else 0
        if setup.in_shards and setup.world.is_main:
            recipe = setup.model.recipe
            names = None if recipe.class_names is None else tuple(recipe.class_names)
            sample_shards.finish(out, record, recipe.num_classes, names)
            yield sample_shards.first_images(out, count)
        else:
            yield [load_image(out / sample_folder.image_name(number)) for number in range(count)]


def save_comparison(
    setup: Setup, before: list[Tensor], results: list[Tensor], per_input: int, after: list[Tensor] | None = None
) -> None:
    """Write `comparison.png`, one row per input; nothing if there are no results.

    Args:
        before, after: images to the left and right of the results, uint8 ``(N, C, H, W)`` each.
        results: `per_input` for each input, uint8 ``(C, H, W)``.
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
    """Return the integer factor that makes the shorter side at least `SHOWN_SIDE` pixels."""
    return max(1, -(-SHOWN_SIDE // min(images.shape[-2:])))


def refuse_sampler(cfg: DictConfig, reason: str) -> None:
    sampler = plain(cfg.sampler)
    if sampler.get("_target_"):
        raise UserError(f"task={cfg.task} {reason}; drop sampler=, and set steps= for their number")
    if sampler.get("noise_color") is not None:
        raise UserError(f"task={cfg.task} {reason}; drop sampler/noise_color=")
    if sampler.get("covariance") is not None:
        raise UserError(f"task={cfg.task} {reason}; drop sampler.covariance=")
