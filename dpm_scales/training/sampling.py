"""Drawing images from a model in batches: the same bytes for the same seed, however they are batched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from omegaconf import DictConfig
from torch import Tensor

from dpm_scales.conditioning import Guided
from dpm_scales.errors import UserError, require, require_number, suggest
from dpm_scales.images import to_uint8
from dpm_scales.noise import NoiseSource
from dpm_scales.training.export import Model

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


def check_counts(cfg: DictConfig, numbers: Sequence[str] = ("num_samples",), least: int = 1) -> None:
    """Raises UserError for a seed, a batch size, or a value of the keys `numbers`, at `least`, that can't be meant."""
    for name, low in {**dict.fromkeys(numbers, least), "batch_size": 1, "seed": 0}.items():
        require_number(name, cfg[name], low, whole=True)


def pick_device(name: str) -> torch.device:
    """A device from "auto" or a name. Raises UserError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.partition(":")[0]
    require(kind in DEVICES, f"unknown device {name!r}: {suggest(kind, DEVICES)}")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name} is not to be had here ({reason}); use device=auto") from error


def pick_labels(model: Model, labels: int | str | Sequence[int | str] | None, count: int) -> Tensor | None:
    """``(count,)`` labels from one class or a list that is repeated; None takes every class in turn."""
    classes = model.recipe.num_classes
    if classes is None:
        require(labels is None, "labels were given, but this model was trained without; drop labels=")
        return None
    if labels is None:
        chosen: Sequence[int | str] = range(classes)
    else:
        chosen = [labels] if isinstance(labels, int | str) else list(labels)
    names = list(model.recipe.class_names or ())
    numbers = [names.index(c) if isinstance(c, str) and c in names else c for c in chosen]
    for label in numbers:
        ok = isinstance(label, int) and 0 <= label < classes
        known = f"0..{classes - 1}" + (f" or {', '.join(names)}" if names else "")
        require(ok, f"unknown label {label!r}; allowed: {known}")
    require(len(numbers) > 0, "labels is empty; give one class or a list")
    return torch.tensor(numbers, dtype=torch.int64)[torch.arange(count) % len(numbers)]


def with_guidance(model: Model, scale: float, interval: Sequence[float] | None = None, variable: str = "t") -> Model:
    """The model guided by its labels, see `dpm_scales.conditioning`; as it is for a scale of 1.

    Raises: UserError for values that can't be meant, and for models that have not learnt to do without labels.
    """
    require_number("guidance", scale, 0)
    if scale == 1:
        return model
    classes = model.recipe.num_classes
    if classes is None:
        raise UserError(f"guidance={scale:g} needs labels, and this model was trained without; drop guidance=")
    require(
        model.recipe.label_dropout > 0,
        f"guidance={scale:g} needs a model that also knows images without labels, and this one was trained with all of "
        "them; drop guidance=, or train with label_dropout=0.1",
    )
    return replace(model, denoiser=Guided(model.denoiser, classes, scale, interval, variable))


def draw(
    model: Model,
    num_samples: int,
    seed: int = 0,
    batch_size: int = 250,
    size: tuple[int, int] | None = None,
    labels: Tensor | None = None,
    device: torch.device | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    first: int = 0,
) -> Iterator[Tensor]:
    """Batches of samples, uint8 ``(b, C, H, W)`` on the CPU, `num_samples` in all, numbered from `first`.

    Sample i depends on (seed, i) and its label ``labels[i - first]`` alone. `on_step` is called with the step's index
    and the batch there, in pixels of the process's value range, on the device.
    """
    require_number("num_samples", num_samples, 1, whole=True)
    require_number("batch_size", batch_size, 1, whole=True)
    device = device or torch.device("cpu")
    model.modules().to(device).eval()
    process = model.denoiser.process
    height, width = size or model.recipe.image_size
    model.prior.check_size((height, width))
    scales = model.sampler.scales(process).to(device)
    for start in range(0, num_samples, batch_size):
        count = min(batch_size, num_samples - start)
        noise = NoiseSource(seed, count, first + start, device)
        batch_labels = None if labels is None else labels[start : start + count].to(device)
        shape = (model.recipe.channels, height, width)
        x = model.sampler.sample(model.denoiser, model.prior, noise, shape, batch_labels, scales, on_step)
        yield to_uint8(x, process.value_range).cpu()
