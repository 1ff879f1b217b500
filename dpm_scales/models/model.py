"""Define a model: a denoiser, a prior and a sampler, with methods that draw images, compute the loss and save it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser, spread_evenly, uniform_scales
from dpm_scales.describe import Configured
from dpm_scales.errors import UserError, is_whole, require, require_number
from dpm_scales.guidance import GuidanceCurve
from dpm_scales.images import size_pair, to_range
from dpm_scales.models.base import Parts
from dpm_scales.models.export import save_folder
from dpm_scales.models.generate import computed, draw, pick_labels
from dpm_scales.models.guided import with_guidance
from dpm_scales.models.instantiate import plain, root_cause_line
from dpm_scales.models.parts import build_denoiser, build_sampler, make_network, make_part
from dpm_scales.models.push import push_model
from dpm_scales.models.recipe import MAX_SIDE, PARTS, UNDESCRIBED, Recipe
from dpm_scales.models.to_diffusers import export_diffusers
from dpm_scales.networks import UNet
from dpm_scales.networks.precision import FULL
from dpm_scales.priors import Prior
from dpm_scales.processes import VP, Process
from dpm_scales.progress import progress_bar
from dpm_scales.rng import CounterRNG, Randomness
from dpm_scales.samplers import Sampler
from dpm_scales.samplers.measuring import measure_error_variance, measured_scales, require_measurable
from dpm_scales.targets import Target
from dpm_scales.weights import LossWeight

__all__ = ["PARTS", "Model", "Recipe", "build_denoiser", "build_model", "build_sampler", "with_sampler"]


class Model(Parts):
    """A generative model of images, trained or not: ``Model(UNet(width=32), Blurring(), image_size=32, channels=1)``.

    Its parameters are the network's. `forward` is `loss`, so that wrappers of modules, such as
    DistributedDataParallel, can train it.

    Args:
        network: a module with ``forward(x, t, labels=None)``, such as `networks.UNet`, which gets its channels and
            classes from the model; or ``configured(MyNet, ...)``, which gets `in_channels`, `out_channels` and
            `num_classes`. None for `UNet()`.
        process: the forward process. None for `VP()`.
        image_size: side of the images in pixels, or (height, width).
        channels: number of image channels, 1 for grey or 3 for RGB.
        target: what the network predicts: a `Target`, or the name of a file in configs/target.
        prior: where sampling starts: a `Prior`, or the name of a file in configs/prior; "auto" suits the process.
        sampler: a `Sampler`, or the name of a file in configs/sampler; "auto" suits process and target.
        num_classes: number of labels of a conditional model; None for a model without labels.
        class_names: one name per label.
        label_dropout: share of the labels to drop while training, for classifier-free guidance; in [0, 1).

    Raises: UserError for values out of range and for parts that do not fit together.
    """

    def __init__(
        self,
        network: nn.Module | Configured | None = None,
        process: Process | Configured | None = None,
        *,
        image_size: int | Sequence[int],
        channels: int = 3,
        target: Target | Configured | str = "clean",
        prior: Prior | Configured | str = "auto",
        sampler: Sampler | Configured | str = "auto",
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        size = size_pair(image_size, "image_size")
        require(max(size) <= MAX_SIDE, f"image_size={image_size}: allowed are at most {MAX_SIDE} pixels")
        require_number("channels", channels, 1, MAX_SIDE, whole=True)
        names = _class_names(class_names, num_classes)
        require_number("label_dropout", label_dropout, 0, 1)
        require(label_dropout < 1, "label_dropout=1 leaves no label to learn from; choose less")
        law, law_settings = make_part(VP() if process is None else process, Process, "process")
        law.bind_size(size)
        inputs = channels * (1 + law.context_channels)
        dropout, given = float(label_dropout) if num_classes else 0.0, UNet() if network is None else network
        net, net_settings = make_network(given, inputs, channels, size, num_classes, dropout)
        meaning, meaning_settings = make_part(target, Target, "target")
        start, start_settings = make_part(prior, Prior, "prior", {"process": law})
        start.check(law)
        self.denoiser, self.prior = Denoiser(net, law, meaning), start
        chosen, chosen_settings = make_part(sampler, Sampler, "sampler", {"denoiser": self.denoiser})
        chosen.check(self.denoiser)
        self.sampler = chosen
        settings = (law_settings, meaning_settings, net_settings, start_settings, chosen_settings)
        self.recipe = Recipe(dict(zip(PARTS, settings, strict=True)), channels, size, num_classes, names, dropout)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    # --- sampling -----------------------------------------------------------------------------------------------------

    def sample(
        self,
        num_samples: int = 16,
        *,
        seed: int = 0,
        sampler: Sampler | Configured | str | None = None,
        steps: int | None = None,
        labels: int | str | Sequence[int | str] | None = None,
        guidance: float | GuidanceCurve | Mapping[str, Any] = 1.0,
        guidance_interval: Sequence[float] | None = None,
        guidance_variable: str = "t",
        guide: Model | None = None,
        size: int | Sequence[int] | None = None,
        batch_size: int = 250,
        device: torch.device | str | None = None,
        progress: bool = False,
        precision: str = FULL,
        compile: bool = False,
    ) -> Tensor:
        """Draw images: uint8 ``(num_samples, C, H, W)`` on the CPU, the same as `sample.py` for the same options.

        Args:
            seed: image i depends on (seed, i) and its label alone.
            sampler: replaces the model's own: a `Sampler`, or the name of a file in configs/sampler.
            steps: number of steps; None for the sampler's own.
            labels: one class or a list to repeat, by number or name; None for all in turn.
            guidance: weight of guidance: 0 ignores the labels, 1 follows them, more exaggerates them; or a curve of
                weights by frequency, `LowHigh(1, 3)`, or its arguments, ``{"low": 1, "high": 3}``.
            guidance_interval: (low, high), the scales to guide; None for all.
            guidance_variable: variable of the interval: "t" or "logsnr".
            guide: a worse model of the same process, whose prediction replaces the one without labels (autoguidance).
                It is moved to the model's device.
            size: size of the images in pixels, one side or (height, width); None for that of the training images.
            batch_size: images drawn at once; affects speed and memory only.
            device: device to which the model is moved first; None leaves it where it is.
            progress: whether to show a progress bar.
            precision: precision of the networks, "32-true" or "bf16-mixed"; the sampler's arithmetic keeps its own.
            compile: whether to compile the networks, once per batch size; pays off for thousands of images.

        Raises: UserError for values out of range, a sampler or guide that does not fit the model, and if compiling
            fails.
        """
        require_number("num_samples", num_samples, 1, whole=True)
        chosen = self if sampler is None and steps is None else self.with_sampler(sampler, steps)
        chosen = with_guidance(chosen, guidance, guidance_interval, guidance_variable, guide)
        numbers = pick_labels(self, labels, num_samples)
        place = self.device if device is None else _existing(device)
        shape = None if size is None else size_pair(size, "size")
        training = [(one, one.training) for one in (self, guide) if one is not None]
        total = -(-num_samples // batch_size) if is_whole(batch_size, 1) else 0
        try:
            with progress_bar(progress) as bar, computed(chosen, precision, compile):
                task = bar.add_task("sample", total=total * (len(chosen.sampler.scales(self.denoiser.process)) - 1))

                def advance(index: int, x: Tensor) -> None:
                    bar.advance(task)

                return torch.cat([*draw(chosen, num_samples, seed, batch_size, shape, numbers, place, advance)])
        finally:
            for one, mode in training:
                one.train(mode)

    def with_sampler(self, sampler: Sampler | Configured | str | None = None, steps: int | None = None) -> Model:
        """Return the model with another sampler, or another number of steps; it shares the weights.

        Raises: UserError for an unknown name, or a sampler that does not fit the model.
        """
        settings = self.recipe.parts["sampler"]
        made = self.sampler
        if sampler is not None:
            made, settings = make_part(sampler, Sampler, "sampler", {"denoiser": self.denoiser})
        if steps is not None:
            require(UNDESCRIBED not in settings, f"steps={steps}: give it to {type(made).__name__} itself")
            made = build_sampler(settings := {**settings, "steps": steps}, self.denoiser)
        made.check(self.denoiser)
        recipe = replace(self.recipe, parts={**self.recipe.parts, "sampler": settings})
        return self.replaced(sampler=made, recipe=recipe)

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(
        self,
        x_0: Tensor,
        t: Tensor | float | None = None,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | int | None = None,
        loss_weight: LossWeight | None = None,
    ) -> Tensor:
        """Return the training loss ``()``, the weighted squared error averaged over images and pixels.

        Args:
            x_0: images ``(B, C, H, W)``, uint8, or floating point in the process's value range.
            t: scales in (0, 1], ``(B,)`` or one number; None draws them, uniformly and spread evenly over the batch.
            labels: ``(B,)`` integers, for a conditional model, which drops some of them in training mode.
            generator: source of scales and noise: a generator on the model's device, or a seed, which gives the same
                noise on every device; None for torch's own generator.
            loss_weight: weight of each scale; None for the target's own.

        Raises: UserError for images or labels of another type or shape. Values out of range are detected only in
            tensors on the CPU.
        """
        x_0 = self._images(x_0)
        count, device = x_0.shape[0], x_0.device
        noise: Randomness = CounterRNG(generator, count, device=device) if isinstance(generator, int) else generator
        if t is None:
            places = torch.arange(count, device=device)
            scales = uniform_scales(spread_evenly(places, count, _uniform(noise, 1, device)), self._num_scales)
        else:
            scales = torch.as_tensor(t, dtype=torch.float64, device=device)
            ok = scales.shape in ((), (count,))
            require(ok, f"t has shape {tuple(scales.shape)}; allowed is one number, or one for each of {count} images")
            scales = scales.expand(count)
        numbers = self._labels(labels, count, device)
        classes = self.recipe.num_classes
        if numbers is not None and classes is not None and self.training and self.recipe.label_dropout > 0:
            dropped = _uniform(noise, count, device) < self.recipe.label_dropout
            numbers = torch.where(dropped, classes, numbers)
        return self.denoiser.loss(x_0, scales, numbers, noise, loss_weight=loss_weight).mean()

    forward = loss

    @property
    def _num_scales(self) -> int:
        return self.denoiser.process.num_scales

    def _images(self, x_0: Tensor) -> Tensor:
        """Return images as floats in the process's value range, on the model's device."""
        value_range, channels = self.denoiser.process.value_range, self.recipe.channels
        require(isinstance(x_0, Tensor), f"images must be a tensor (B, {channels}, H, W), got {type(x_0).__name__}")
        shape = f"images have shape {tuple(x_0.shape)}; this model needs (B, {channels}, H, W)"
        require(x_0.ndim == 4 and x_0.shape[1] == channels and x_0.numel() > 0, shape)
        if x_0.dtype == torch.uint8:
            return to_range(x_0.to(self.device), value_range)
        low, high = value_range
        need = f"give uint8, 0 to 255, or floats from {low:g} to {high:g}"
        require(x_0.is_floating_point(), f"images are {x_0.dtype}; {need}")
        if x_0.device.type == "cpu":  # elsewhere the check would wait for the device
            least, most = (float(value) for value in x_0.detach().aminmax())
            ok = low - 1e-3 <= least and most <= high + 1e-3
            require(ok, f"images have values from {least:.4g} to {most:.4g}; {need}")
        return x_0.to(self.device)

    def _labels(self, labels: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """Return int64 labels ``(B,)`` on the device of the images; None for a model without labels."""
        classes = self.recipe.num_classes
        if classes is None:
            require(labels is None, "labels were given, but this model has none; leave them out, or set num_classes=")
            return None
        need = f"this model needs labels, ({count},) integers from 0 to {classes - 1}"
        require(labels is not None, need)
        numbers = torch.as_tensor(labels)
        whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
        ok = whole and numbers.shape == (count,)
        require(ok, f"labels are {numbers.dtype} of shape {tuple(numbers.shape)}; {need}")
        if numbers.device.type == "cpu":
            require(bool(((numbers >= 0) & (numbers < classes)).all()), f"labels go beyond 0..{classes - 1}; {need}")
        return numbers.to(device, torch.int64)

    # --- covariance ---------------------------------------------------------------------------------------------------

    def measure_covariance(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        seed: int = 0,
        batch_size: int = 250,
        progress: bool = False,
    ) -> None:
        """Measure the network's error by scale and frequency, for samplers with ``covariance="optimal"``.

        The result is saved with the model, and must be measured again after the weights have changed.

        Args:
            images: training images ``(N, C, H, W)``, uint8, or floating point in the process's value range; about 1000.
                The network is evaluated 32 times for each.
            labels: ``(N,)`` integers, for a conditional model.
            seed: seed of the noise; that of image i depends on (seed, i) alone.
            batch_size: images at once; affects speed and memory only.
            progress: whether to show a progress bar.

        Raises: UserError for images or labels as in `loss`, and for a model whose error has no variance by frequency:
            osmosis, the finer-scale target, processes without noise.
        """
        require_number("seed", seed, 0, whole=True)
        require_number("batch_size", batch_size, 1, whole=True)
        require_measurable(self.denoiser)
        x_0 = self._images(images)
        numbers = self._labels(labels, len(x_0), x_0.device)
        parts = [None] * len(x_0) if numbers is None else numbers.split(batch_size)
        training = self.training
        self.eval()
        try:
            with progress_bar(progress) as bar:
                scales = len(measured_scales(self.denoiser.process))
                task = bar.add_task("measure", total=scales * len(x_0), unit="evaluations")
                self.denoiser.error_variance = measure_error_variance(
                    self.denoiser,
                    zip(x_0.split(batch_size), parts, strict=False),
                    seed,
                    lambda count: bar.advance(task, count),
                )
        finally:
            self.train(training)

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.yaml` into a folder, made if missing; `load_model` reads them.

        Also write `covariance.safetensors`, if it was measured for these weights. An earlier model in the folder is
        replaced.

        Raises: UserError, and writes nothing, if the folder holds anything else, if a part can't be described by plain
        values, or if a weight is not finite.
        """
        save_folder(Path(folder), self)

    def push(
        self,
        repo: str,
        *,
        private: bool | None = None,
        licence: str | None = None,
        run: str | Path | None = None,
        message: str | None = None,
        card: bool = True,
    ) -> str:
        """Upload the model to the Hugging Face Hub; arguments, result and errors are those of `push_model`."""
        return push_model(self, repo, private=private, licence=licence, run=run, message=message, card=card)

    def to_diffusers(self, folder: str | Path, kind: str | None = None) -> None:
        """Write the model as a pipeline of diffusers; arguments and errors are those of `export_diffusers`."""
        export_diffusers(self, folder, kind)


def _existing(device: torch.device | str) -> torch.device:
    """Return the device. Raises UserError if this machine has none of that name."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={str(device)!r} is not available here ({root_cause_line(error)})") from error


def _uniform(noise: Randomness, count: int, device: torch.device) -> Tensor:
    """Return numbers uniform in [0, 1), float64 ``(count,)``."""
    if isinstance(noise, CounterRNG):
        return noise.uniform()[:count]
    return torch.rand(count, generator=noise, dtype=torch.float64, device=device)


def _class_names(names: Sequence[str] | None, num_classes: int | None) -> tuple[str, ...] | None:
    """Return the names of classes as a tuple. Raises UserError unless there is one for each class."""
    if num_classes is not None:
        require_number("num_classes", num_classes, 1, whole=True)
    if names is None:
        return None
    ok = not isinstance(names, str) and len(names) == num_classes and all(isinstance(name, str) for name in names)
    require(ok, f"class_names must be {num_classes or 'no'} names, one for each of num_classes, got {names!r:.100}")
    return tuple(names)


def build_model(recipe: Recipe, data_std: float = 0.5, weights: Mapping[str, Tensor] | None = None) -> Model:
    """Return an untrained model; arguments and errors are those of `build_denoiser`."""
    denoiser, prior = build_denoiser(recipe, data_std, weights)
    return Model.of(denoiser, prior, build_sampler(recipe.parts["sampler"], denoiser), recipe)


def with_sampler(model: Model, settings: Any) -> Model:
    """Return the model with the sampler that a config describes. Raises UserError if it does not fit the denoiser."""
    parts = {**model.recipe.parts, "sampler": plain(settings)}
    sampler = build_sampler(settings, model.denoiser)
    return model.replaced(sampler=sampler, recipe=replace(model.recipe, parts=parts))
