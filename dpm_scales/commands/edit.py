"""Run the editing tasks of `sample.py`: write numbered results, and `comparison.png` with inputs beside results.

Result j of input i has the number i * num_samples + j and depends only on the seed and on that number. Processes
started by torchrun or srun share the results; the first writes all other files.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from omegaconf import DictConfig
from torch import Tensor

from dpm_scales.cli.options import image_size
from dpm_scales.commands.shared import (
    SHOWN_ROWS,
    Setup,
    check_noise_std,
    check_scale,
    enlargement,
    prepare,
    produce,
    read_mask,
    refuse_sampler,
    save_comparison,
)
from dpm_scales.data.image_sets import size_of
from dpm_scales.editing import (
    Average,
    Blur,
    BranchingNoise,
    Consistent,
    Degradation,
    Mask,
    Resampling,
    between,
    check_covariance,
    check_estimates,
    context_of,
    encode,
    nearest_blur,
    noised,
    restore,
    scales_from,
)
from dpm_scales.errors import require, require_number, suggest
from dpm_scales.images import LEVELS, make_grid, psnr, save_gif, to_uint8
from dpm_scales.models.instantiate import plain
from dpm_scales.models.model import Model
from dpm_scales.networks import require_size
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Ancestral, OnStep, Sampler

ROUNDING = 12**-0.5 / LEVELS
"""Standard deviation of the rounding error of 8-bit images, where black is 0 and white 1."""

EVALUATIONS = 100
"""Default number of network evaluations, if steps= is not given."""

RESAMPLE = 2
METHODS = ("auto", "estimate", "scale")
THROUGH = ("auto", "flow", "noise")


def inpaint(cfg: DictConfig) -> None:
    """Fill the masked pixels of images. Raises UserError for invalid options, before sampling."""
    setup = prepare(cfg)
    images = setup.images("image")
    hole = read_mask(setup, images)
    known = (~hole).to(setup.device)
    size = (images.shape[1], images.shape[2], images.shape[3])
    grey = torch.where(hole, torch.full_like(images[:1], LEVELS // 2), images)
    with _restored(setup, Mask(known), images, size, 0.0, _resampling(setup)) as results:
        save_comparison(setup, [images, grey], results, cfg.num_samples)
    _say(setup, len(images), f"{int(hole.sum())} of {hole.numel()} pixels invented")


def deblur(cfg: DictConfig) -> None:
    """Restore blurred images. Raises UserError for invalid options, before sampling."""
    degradation = Blur(cfg.blur_sigma)
    require(cfg.method in METHODS, f"unknown method {cfg.method!r}: {suggest(str(cfg.method), METHODS)}")
    setup = prepare(cfg)
    noise_std = check_noise_std(setup)
    sharp, images = _degraded(setup, degradation, noise_std)
    low, high = setup.process.value_range
    noise_std = (noise_std**2 + (ROUNDING * (high - low)) ** 2) ** 0.5
    blurs_alone = setup.process.is_heat_blur and setup.process.has_constant_noise()
    if cfg.method == "scale" or (cfg.method == "auto" and blurs_alone):
        restored, note = _from_blur(setup, images, noise_std)
    else:
        size = (images.shape[1], images.shape[2], images.shape[3])
        restored = _restored(setup, degradation, images, size, noise_std, _resampling(setup))
        note = "each estimate guided towards the image"
    with restored as results:
        _finish(setup, sharp, images, results, note)


def superres(cfg: DictConfig) -> None:
    """Enlarge images by an integer factor. Raises UserError for invalid options, before sampling."""
    require_number("factor", cfg.factor, 2, whole=True)
    degradation = Average(cfg.factor)
    setup = prepare(cfg)
    noise_std = check_noise_std(setup)
    sharp, images = _degraded(setup, degradation, noise_std)
    size = (images.shape[1], cfg.factor * images.shape[2], cfg.factor * images.shape[3])
    setup.require_memory(size[1:], len(images) * cfg.num_samples, why=f"factor={cfg.factor}: images")
    with _restored(setup, degradation, images, size, noise_std, _resampling(setup)) as results:
        blocks = images[:SHOWN_ROWS].repeat_interleave(cfg.factor, 2).repeat_interleave(cfg.factor, 3)
        note = f"from {size_of(images)} to {size[1]}x{size[2]} pixels"
        _finish(setup, sharp, blocks, results, note)


def interpolate(cfg: DictConfig) -> None:
    """Interpolate between pairs of images. Raises UserError for invalid options, before sampling."""
    require(cfg.through in THROUGH, f"unknown through {cfg.through!r}: {suggest(str(cfg.through), THROUGH)}")
    require_number("frames", cfg.frames, 2, whole=True)
    require_number("refine", cfg.refine, 0, whole=True)
    start = check_scale("from", cfg["from"])
    refuse_sampler(cfg, "follows the probability flow by DDIM steps")
    setup = prepare(cfg)
    process, denoiser = setup.process, setup.denoiser
    require(process.has_noise(), f"{type(process).__name__} has no noise, so there is nothing to interpolate between")
    check_estimates(denoiser)
    flow = cfg.through == "flow" or (cfg.through == "auto" and not process.has_constant_noise())
    require(not flow or cfg.num_samples == 1, "through=flow leads to one sequence for each pair; drop num_samples=")
    ends = setup.images("start"), setup.images("end")
    same = ends[0].shape == ends[1].shape
    require(same, f"start has {len(ends[0])} of {size_of(ends[0])}, end {len(ends[1])} of {size_of(ends[1])} pixels")
    sampler = DDIM(0.0, min(EVALUATIONS, process.num_scales) if cfg.steps is None else cfg.steps)
    sampler.check(denoiser)
    scales = scales_from(sampler, process, start).to(setup.device)
    frames, per_pair = cfg.frames, cfg.frames * cfg.num_samples

    def make(numbers: Tensor, noise: CounterRNG, labels: Tensor | None, on_step: OnStep) -> Tensor:
        a, b = (setup.floats(images[numbers]) for images in ends)
        first = torch.arange(0, len(numbers), frames, device=setup.device)
        every = torch.arange(len(numbers), device=setup.device) // frames
        context = context_of(process, (a[first] + b[first]) / 2, noise)
        few = None if labels is None else labels[first]
        if flow:
            latents = [encode(denoiser, x[first], scales, context, few, cfg.refine, on_step) for x in (a, b)]
        else:
            white = noised(process, torch.zeros_like(a[first]), scales[0], noise, context)
            operator = process.operator(context)
            latents = [operator.apply(process.signal(scales[0]), operator.to_white(x[first])) + white for x in (a, b)]
        many = None if context is None else context[every]
        weight = torch.arange(len(numbers), device=setup.device) % frames / (frames - 1)
        y = between(process, (a, b), (latents[0][every], latents[1][every]), scales[0], weight, many)
        return sampler.reverse(denoiser, y, noise, many, labels, scales, on_step)

    def noise_of(count: int, first: int) -> CounterRNG:
        return CounterRNG(cfg.seed, count // frames, first // frames, setup.device)

    steps = (len(scales) - 1) * (3 if flow else 1)
    size = (ends[0].shape[2], ends[0].shape[3])
    with produce(setup, sampler, len(ends[0]), per_pair, size, steps, make, noise_of, together=frames) as results:
        _save_film(setup, results, frames)
        chosen = torch.linspace(0, frames - 1, min(frames, 10)).round().long().tolist()
        strips = [results[i + k] for i in range(0, len(results), per_pair) for k in chosen]
        save_comparison(setup, [ends[0]], strips, len(chosen), [ends[1]])
    _say(setup, len(ends[0]), f"mixed at t={float(scales[0]):g} through the {'flow' if flow else 'noise'}")


def vary(cfg: DictConfig) -> None:
    """Generate variations of images. Raises UserError for invalid options, before sampling."""
    start = check_scale("from", cfg["from"])
    setup = prepare(cfg)
    process, sampler = setup.process, setup.model.sampler
    require(process.has_noise(), f"{type(process).__name__} has no noise, so nothing varies; use task=deblur")
    images = setup.images("start")
    scales = scales_from(sampler, process, start).to(setup.device)

    def make(numbers: Tensor, noise: CounterRNG, labels: Tensor | None, on_step: OnStep) -> Tensor:
        x = setup.floats(images[numbers])
        context = context_of(process, x, noise)
        y = noised(process, x, scales[0], noise, context)
        return sampler.reverse(setup.denoiser, y, noise, context, labels, scales, on_step)

    size = (images.shape[2], images.shape[3])
    with produce(setup, sampler, len(images), cfg.num_samples, size, len(scales) - 1, make) as results:
        save_comparison(setup, [images], results, cfg.num_samples)
    _say(setup, len(images), f"from t={float(scales[0]):g}")


def coarse(cfg: DictConfig) -> None:
    """Sample images that share their coarse scales. Raises UserError for invalid options, before sampling."""
    require_number("starts", cfg.starts, 1, whole=True)
    branch_at = None if cfg.branch_at == "auto" else check_scale("branch_at", cfg.branch_at)
    setup = prepare(cfg)
    process, model = setup.process, setup.model
    if branch_at is None:
        branch_at = 1.0 if process.has_constant_noise() else 0.5
    require(process.has_noise(), f"{type(process).__name__} has no noise, so all that share a start are the same")
    sampler = random_sampler(setup.model, setup.cfg.steps, _chosen(setup))
    require(
        sampler.is_random,
        f"sampler {type(sampler).__name__} draws no noise on its way, so all that share a start are the same; "
        "use sampler=ancestral or ddim with sampler.eta=1",
    )
    height, width = image_size(cfg) or model.recipe.image_size
    model.prior.check_size((height, width))
    require_size(model.denoiser.network, (height, width))
    scales = sampler.scales(process)
    shared_steps = int((scales >= branch_at - 1e-9).sum()) - 1
    require(shared_steps < len(scales) - 2, f"branch_at={branch_at:g} leaves no steps to differ in; raise it or steps")
    scales = scales.to(setup.device)
    per_start = cfg.num_samples

    def noise_of(count: int, first: int) -> BranchingNoise:
        return BranchingNoise(cfg.seed, count, first, per_start, setup.device)

    def make(_: Tensor, noise: CounterRNG, labels: Tensor | None, on_step: OnStep) -> Tensor:
        assert isinstance(noise, BranchingNoise)
        y, context = model.prior.sample(process, noise, (model.recipe.channels, height, width))
        noise.shared = shared_steps > 0

        def then(index: int, x: Tensor) -> None:
            noise.shared = index + 1 < shared_steps
            on_step(index, x)

        return sampler.reverse(setup.denoiser, y, noise, context, labels, scales, then)

    with produce(setup, sampler, cfg.starts, per_start, (height, width), len(scales) - 1, make, noise_of) as results:
        if results:
            rows = torch.stack(results).unflatten(0, (-1, per_start))
            save_comparison(setup, [rows.float().mean(1).round().to(torch.uint8)], results, per_start)
    _say(setup, cfg.starts, f"all is shared down to t={float(scales[max(0, shared_steps)]):g}")


# --- shared by the tasks ----------------------------------------------------------------------------------------------


def _restored(
    setup: Setup,
    degradation: Degradation,
    observed: Tensor,
    size: tuple[int, int, int],
    noise_std: float,
    sampler: Sampler,
) -> AbstractContextManager[list[Tensor]]:
    """Return results whose estimates are guided towards `observed`, uint8 ``(N, C, h, w)``; see `produce`."""
    check_covariance(sampler)
    Consistent(setup.denoiser, degradation, setup.floats(observed[:1]), noise_std, setup.cfg.covariance)
    scales = sampler.scales(setup.process).to(setup.device)

    def make(numbers: Tensor, noise: CounterRNG, labels: Tensor | None, on_step: OnStep) -> Tensor:
        known = setup.floats(observed[numbers])
        denoiser = Consistent(setup.denoiser, degradation, known, noise_std, setup.cfg.covariance)
        return restore(denoiser, sampler, scales, noise, size, labels, on_step)

    return produce(setup, sampler, len(observed), setup.cfg.num_samples, size[1:], len(scales) - 1, make)


def _from_blur(setup: Setup, observed: Tensor, noise_std: float) -> tuple[AbstractContextManager[list[Tensor]], str]:
    """Return results of the reverse process from the scale with the closest blur, see `produce`, and a note on it."""
    process, cfg = setup.process, setup.cfg
    require(
        process.blur is None or process.is_heat_blur,
        f"a scale of {type(process).__name__} is no Gaussian blur; set method=estimate",
    )
    start, blur_sigma = nearest_blur(process, cfg.blur_sigma)
    sampler = setup.model.sampler
    scales = scales_from(sampler, process, start).to(setup.device)

    def make(numbers: Tensor, noise: CounterRNG, labels: Tensor | None, on_step: OnStep) -> Tensor:
        x, t = setup.floats(observed[numbers]), scales[0]
        signal = process.signal_scale(t, torch.zeros_like(t)).to(x.dtype)
        white, operator = noise.normal(tuple(x.shape[1:]), x.dtype), process.operator()
        # the image already contains noise
        missing = operator.apply(lambda mu: (process.noise_scale(t, mu) ** 2 - noise_std**2).clamp(min=0).sqrt(), white)
        return sampler.reverse(setup.denoiser, signal * x + missing, noise, None, labels, scales, on_step)

    size = (observed.shape[2], observed.shape[3])
    results = produce(setup, sampler, len(observed), cfg.num_samples, size, len(scales) - 1, make)
    return results, f"from t={float(scales[0]):g}, a blur of {blur_sigma:.3g} px"


def _degraded(setup: Setup, degradation: Degradation, noise_std: float) -> tuple[Tensor | None, Tensor]:
    """Return the sharp images, None if they are unknown, and the degraded ones, both uint8."""
    images = setup.images("image")
    if not setup.cfg.degrade:
        return None, images
    y = degradation.forward(setup.floats(images).cpu())
    if noise_std > 0:
        y = y + noise_std * CounterRNG(setup.cfg.seed, len(y)).normal(tuple(y.shape[1:]), y.dtype)
    return images, to_uint8(y, setup.process.value_range)


def random_sampler(model: Model, steps: int | None = None, chosen: bool = False, repeats: int = 0) -> Sampler:
    """Return the model's sampler if it was chosen, else the ancestral one, whose noise corrects guided estimates.

    Args:
        steps: number of steps of the ancestral sampler; None for as many as `EVALUATIONS` allows.
        chosen: whether the user chose the model's sampler.
        repeats: how often each step will be repeated.
    """
    process = model.denoiser.process
    if chosen or not process.has_noise():
        return model.sampler
    number = min(process.num_scales, max(1, EVALUATIONS // (1 + repeats))) if steps is None else steps
    sampler = Ancestral(number, noise_color=model.sampler.noise_color, covariance=model.sampler.covariance)
    sampler.check(model.denoiser)
    return sampler


def resampling(model: Model, steps: int | None = None, chosen: bool = False, repeats: object = "auto") -> Sampler:
    """Return a sampler with resampling; by default without it for constant noise, which is too weak for it to help.

    Args:
        steps, chosen: as in `random_sampler`.
        repeats: "auto", or a whole number from 0 to 1000.

    Raises: UserError for other values, and for a sampler that does not fit the model.
    """
    if repeats == "auto":
        repeats = 0 if model.denoiser.process.has_constant_noise() else RESAMPLE
    require_number("resample", repeats, 0, 1000, whole=True)
    assert isinstance(repeats, int)
    sampler = random_sampler(model, steps, chosen, repeats)
    if repeats == 0:
        return sampler
    repeated = Resampling(sampler, repeats)
    repeated.check(model.denoiser)
    return repeated


def _resampling(setup: Setup) -> Sampler:
    return resampling(setup.model, setup.cfg.steps, _chosen(setup), setup.cfg.resample)


def _chosen(setup: Setup) -> bool:
    """Return whether the config names a sampler."""
    return bool(plain(setup.cfg.sampler).get("_target_"))


def _finish(setup: Setup, sharp: Tensor | None, seen: Tensor, results: list[Tensor], note: str) -> None:
    """Write `comparison.png` and print a summary of the results."""
    if not setup.world.is_main:
        return
    per_image = setup.cfg.num_samples
    save_comparison(setup, [seen] if sharp is None else [sharp, seen], results, per_image)
    if sharp is not None:
        rows = min(SHOWN_ROWS, len(sharp))
        truth = sharp[:rows].repeat_interleave(per_image, 0)
        given, found = psnr(seen[:rows], sharp[:rows]), psnr(torch.stack(results), truth)
        note += f", PSNR {given:.2f} -> {found:.2f} dB"
    _say(setup, len(seen), note)


def _say(setup: Setup, inputs: int, note: str) -> None:
    if not setup.world.is_main:
        return
    per_input = setup.cfg.num_samples * (setup.cfg.frames if setup.cfg.task == "interpolate" else 1)
    done = f"{inputs * per_input} images in {setup.out}, comparison.png beside them; {note}"
    print(f"{done}, seed {setup.cfg.seed}{setup.cost()}")


def _save_film(setup: Setup, results: list[Tensor], frames: int) -> None:
    """Write `film.gif`: all sequences side by side, forwards and backwards."""
    if not results:
        return
    sequences = torch.stack(results).unflatten(0, (-1, frames))
    sheets = [make_grid(sequences[:, k], padding=2, upscale=enlargement(sequences)) for k in range(frames)]
    pause = [sheets[0]] * 4, [sheets[-1]] * 4
    save_gif(setup.out / "film.gif", [*pause[0], *sheets, *pause[1], *reversed(sheets)], 120)
