"""Compute bits per dimension of 8-bit images under a model, batch by batch, and plot their parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpm_scales.data.files import listed
from dpm_scales.data.image_sets import ImageSet
from dpm_scales.errors import UserError, require, require_number, suggest
from dpm_scales.images import LEVELS, to_range
from dpm_scales.likelihood import FlowLikelihood, VariationalBound
from dpm_scales.models.model import Model
from dpm_scales.plots import COLOURS, figure
from dpm_scales.rng import CounterRNG

METHODS = ("vlb", "dissipation", "flow")
DRAWS = 32
FLOW_STEPS = 64
NUM_BANDS = 4
BARS = 24
"""Number of bars into which the figure groups the steps of the chain."""


@dataclass(frozen=True)
class BitsPerDim:
    """Bits per dimension (per pixel and channel), averaged over images.

    Attributes:
        method: "vlb", "dissipation" or "flow".
        number, shape: number of images and their shape (C, H, W).
        bits: the sum of the four parts.
        standard_error: standard error of `bits` from the spread over images, due to images, noise and sampled steps.
        context, prior, steps, decoder: the parts, see `dpm_scales.likelihood`.
        scales: ``(n + 1,)``, from 1 down to the finest.
        per_scale: ``(n,)``, the part of `steps` between successive `scales`.
        per_band: ``(n, bands)``, the same by frequency band, of equal width in the square root of the Laplacian's
            eigenvalues; None for the flow.
        settings: arguments on which the result depends.
        given: conditions of the likelihood, any of "guidance image" and "label"; values under different conditions are
            not comparable.
    """

    method: str
    number: int
    shape: tuple[int, int, int]
    bits: float
    standard_error: float
    context: float
    prior: float
    steps: float
    decoder: float
    scales: list[float]
    per_scale: list[float]
    per_band: list[list[float]] | None
    settings: dict[str, Any]
    given: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain containers for JSON."""
        return {**asdict(self), "shape": list(self.shape), "given": list(self.given)}

    def line(self) -> str:
        """Return a one-line summary."""
        kind = "bits/dim of the flow, up to its steps' error" if self.method == "flow" else "bits/dim at most"
        kind += f", {self.condition}" if self.given else ""
        return f"{self.bits:.3f} ± {self.standard_error:.3f} {kind} ({self.method}, {self.number} images)"

    @property
    def condition(self) -> str:
        """Return `given` in words."""
        return "given " + " and ".join(f"the {name}" for name in self.given) if self.given else ""


def bits_per_dim(
    model: Model,
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    method: str = "vlb",
    scales: int | None = None,
    draws: int | None = DRAWS,
    seed: int = 0,
    device: torch.device | None = None,
    noise_ratio: float = 1.25,
    decoder_std: float | None = None,
    probes: int = 1,
    on_images: Callable[[int], None] | None = None,
    use_labels: bool = True,
) -> BitsPerDim:
    """Return the bits per dimension of images under a model, independent of the batch size.

    Args:
        batches: uint8 ``(B, C, H, W)``, all of one size, or (images, labels) for a model with labels. RGB images with
            equal channels are accepted by a grey model.
        method: "vlb", "dissipation" (IHDM's chain) or "flow".
        scales: number of steps; None for all steps of the process's chain, or 64 for the flow.
        draws: number of steps of the chain evaluated per image; None for all.
        noise_ratio: noise ratio of the dissipation.
        decoder_std: see `VariationalBound`.
        probes: number of probes of the flow.
        on_images: called after each batch with its number of images.
        use_labels: for a model with labels, condition on the images' labels; if False, use none, which needs a model
            trained with `label_dropout`.

    Raises: UserError for a process without noise, for a model trained without `label_dropout` if labels are not used,
        and for invalid images, labels or values.
    """
    require_number("seed", seed, 0, whole=True)
    device = device or torch.device("cpu")
    model.to(device).eval()
    given = conditions(model, use_labels)
    look = estimator(model, method, scales, draws, noise_ratio, decoder_std, probes)
    results: list[tuple[Tensor, ...]] = []
    sums: list[tuple[Tensor, Tensor | None]] = []
    shape: tuple[int, int, int] | None = None
    finest_first: list[float] = []
    number = 0
    for batch in batches:
        images, labels = batch if isinstance(batch, tuple | list) else (batch, None)
        images, labels = fitting(model, images, labels, shape, "label" in given)
        shape = (images.shape[1], images.shape[2], images.shape[3])
        x_0 = to_range(images.to(device), model.denoiser.process.value_range)
        noise = CounterRNG(seed, len(images), number, device)
        found = look(x_0, noise, None if labels is None else labels.to(device))
        results.append(tuple(v.cpu() for v in (found.context, found.prior, found.steps.sum(1), found.decoder)))
        bands = None if found.bands is None else found.bands.sum(0).cpu()
        sums.append((found.steps.sum(0).cpu(), bands))
        finest_first = found.scales.tolist()
        number += len(images)
        if on_images is not None:
            on_images(len(images))
    require(number > 0 and shape is not None, "likelihood: there are no images")
    assert shape is not None
    unit = 1 / (math.prod(shape) * math.log(2))
    parts = [torch.cat(column) * unit for column in zip(*results, strict=True)]
    every = torch.stack(parts).sum(0)
    error = float(every.std() / math.sqrt(number)) if number > 1 else math.nan
    per_scale = torch.stack([steps for steps, _ in sums]).sum(0) * (unit / number)
    split = [bands for _, bands in sums if bands is not None]
    per_band = torch.stack(split).sum(0) * (unit / number) if split else None
    settings = {"seed": seed, "scales": len(finest_first), "decoder_std": decoder_std}
    settings |= {"probes": probes} if method == "flow" else {"draws": draws}
    settings |= {"noise_ratio": noise_ratio} if method == "dissipation" else {}
    context, start, chain, decoder = (float(part.mean()) for part in parts)
    return BitsPerDim(
        method=method,
        number=number,
        shape=shape,
        bits=float(every.mean()),
        standard_error=error,
        context=context,
        prior=start,
        steps=chain,
        decoder=decoder,
        scales=finest_first,
        per_scale=per_scale.tolist(),
        per_band=None if per_band is None else per_band.tolist(),
        settings=settings,
        given=given,
    )


def conditions(model: Model, use_labels: bool = True) -> tuple[str, ...]:
    """Return the conditions of a likelihood under the model, see `BitsPerDim`.

    Raises: UserError for a model trained without `label_dropout` if labels are not used.
    """
    recipe = model.recipe
    image = model.denoiser.process.condition
    ok = use_labels or recipe.num_classes is None or recipe.label_dropout > 0
    require(ok, "likelihood: this model was trained with labels only, never without; set use_labels=True")
    names = (image, "label" if use_labels and recipe.num_classes is not None else None)
    return tuple(name for name in names if name is not None)


def estimator(
    model: Model,
    method: str = "vlb",
    scales: int | None = None,
    draws: int | None = DRAWS,
    noise_ratio: float = 1.25,
    decoder_std: float | None = None,
    probes: int = 1,
) -> FlowLikelihood | VariationalBound:
    """Return the likelihood estimator for these arguments of `bits_per_dim`. Raises UserError for invalid ones."""
    if method not in METHODS:
        raise UserError(f"unknown method {method!r} of likelihood: {suggest(str(method), METHODS)}")
    denoiser, prior = model.denoiser, model.prior
    if method == "flow":
        steps = FLOW_STEPS if scales is None else scales
        return FlowLikelihood(denoiser, prior, steps, probes, decoder_std, LEVELS + 1)
    reverse = "ancestral" if method == "vlb" else method
    return VariationalBound(denoiser, prior, scales, draws, reverse, noise_ratio, decoder_std, LEVELS + 1, NUM_BANDS)


def fitting(
    model: Model,
    images: Tensor,
    labels: Tensor | None,
    shape: tuple[int, int, int] | None,
    use_labels: bool,
    what: str = "likelihood",
) -> tuple[Tensor, Tensor | None]:
    """Return the batch in the form that the model takes. Raises UserError, beginning with `what`, if it can't be."""
    recipe = model.recipe
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(f"{what}: images must be uint8 (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if recipe.channels == 1 and images.shape[1] == 3 and bool((images == images[:, :1]).all()):
        images = images[:, :1]
    seen = tuple(images.shape[1:])
    require(
        seen[0] == recipe.channels,
        f"{what}: images of {seen[0]} channels for a model of {recipe.channels}; give images of its kind",
    )
    ok = shape is None or seen == shape
    require(ok, f"{what}: images must be of one size, got {seen} after {shape}; bring them to one")
    if recipe.num_classes is None or not use_labels:
        return images, None
    if labels is None:
        raise UserError(f"{what}: this model was trained with labels, and the images have none")
    ok = bool(((labels >= 0) & (labels < recipe.num_classes)).all())
    require(ok, f"{what}: labels must be 0..{recipe.num_classes - 1}")
    return images, labels


def check_classes(model: Model, held: ImageSet, what: str = "likelihood", option: str = "reference") -> None:
    """Raise UserError unless the images have labels of the classes that the model was trained with, if any.

    Args:
        what: beginning of the message.
        option: the option that names the images.
    """
    recipe = model.recipe
    if recipe.num_classes is None:
        return
    many = f"of {recipe.num_classes} classes" + (f" ({listed(recipe.class_names)})" if recipe.class_names else "")
    if held.num_classes is None:
        raise UserError(
            f"{what}: this model was trained with labels {many}, and the images of {held.source} have none; give "
            f"{option}=data, or a data set or .npz file with labels"
        )
    same = not (recipe.class_names and held.class_names) or recipe.class_names == held.class_names
    names = f" ({listed(held.class_names)})" if held.class_names else ""
    require(
        same and held.num_classes <= recipe.num_classes,
        f"{what}: this model was trained with labels {many}, and the images of {held.source} have "
        f"{held.num_classes}{names}; give {option}=data, or images of the same classes",
    )


def save_plot(path: Path, result: BitsPerDim) -> None:
    """Write `likelihood.png`: bits per dimension by part, and those of the steps by scale (and frequency band)."""
    with figure(path, 6.4, 3.2, ncols=2, width_ratios=(1, 2.4)) as (_, (parts, steps)):
        names = ("context", "prior", "steps", "decoder")
        values = [getattr(result, name) for name in names]
        shown = [i for i, name in enumerate(names) if name != "context" or values[i] != 0]
        parts.bar([names[i] for i in shown], [values[i] for i in shown], color=COLOURS[0], width=0.6)
        parts.set_ylabel("bits/dim")
        title = f"{result.bits:.3f} ± {result.standard_error:.3f}"
        parts.set_title(f"{title}\n{result.condition}" if result.given else title, fontsize=9)
        parts.tick_params(axis="x", rotation=30)
        scales = np.asarray(result.scales)
        by_band = np.asarray(result.per_scale)[:, None] if result.per_band is None else np.asarray(result.per_band)
        number, bands = by_band.shape
        edges = np.unique(np.linspace(0, number, min(BARS, number) + 1).round().astype(int))
        width = np.diff(edges)  # the area is then the sum, whatever a bar's number of steps
        base = np.zeros(len(width))
        for band in range(bands):
            height = np.diff(np.concatenate([[0.0], by_band[:, band].cumsum()])[edges]) / width
            label = None if bands == 1 else f"{band / bands:g}–{(band + 1) / bands:g}"
            colour = COLOURS[band % len(COLOURS)]
            steps.bar(edges[:-1], height, width, base, align="edge", color=colour, edgecolor="white", label=label)
            base = base + height
        ticks = edges[:: max(1, len(edges) // 6)]
        steps.set_xticks(ticks, [f"{scales[i]:.2g}" for i in ticks])
        steps.set_xlabel("scale t, one step after the other")
        steps.set_title("bits/dim of a step", fontsize=9)
        if bands > 1 and number:
            steps.legend(title="frequency / highest", fontsize=8, title_fontsize=8)
