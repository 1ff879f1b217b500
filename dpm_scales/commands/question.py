"""Compare image sets: a question with everything that it needs, and its answer, which is saved and shown."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dpm_scales.data.image_sets import ImageSet
from dpm_scales.distributed.ranks import World
from dpm_scales.evaluation.choices import described
from dpm_scales.evaluation.generated import ModelSamples, sample_features
from dpm_scales.evaluation.likelihood import BitsPerDim, bits_per_dim, save_plot
from dpm_scales.evaluation.reference_cache import reference_features
from dpm_scales.metrics import FeatureNetwork, FeatureSet, Measure, Metric, compare, few_images
from dpm_scales.metrics.figures import extractors, needs_rows
from dpm_scales.models.model import Model
from dpm_scales.progress import Report
from dpm_scales.storage import write_text

RESULT = "evaluation.json"
FORMAT = "dpm_scales evaluation"
VERSION = 1
PACKAGES = ("dpm-scales", "torch", "torchvision", "numpy", "pillow")
SMALL_SIDE = 32
"""Shorter side below which images are enlarged so much that features trained on photos miss most of what matters."""


@dataclass(frozen=True)
class LikelihoodQuestion:
    """Bits per dimension of `held` images under a model; the other fields are arguments of `bits_per_dim`."""

    model: Model
    held: ImageSet
    method: str
    scales: int | None
    draws: int | None
    seed: int


@dataclass(frozen=True)
class Question:
    """Two sets of images to compare, with the settings of the comparison, all checked.

    Attributes:
        metrics: metrics to compute.
        network: feature network, on `device`; None if no metric uses one.
        real: the reference.
        fake: images, or samples of a model, which the processes of `world` share.
        yardstick: further real images, compared like `fake`; None for none.
        likelihood: question for bits per dimension; None for none.
        batch_size: images at a time.
        cache: folder for the features of real images; None for no cache.
        out: folder for the results, writable; None for none.
    """

    metrics: tuple[Metric, ...]
    network: FeatureNetwork | None
    real: ImageSet
    fake: ImageSet | ModelSamples
    yardstick: ImageSet | None
    likelihood: LikelihoodQuestion | None
    batch_size: int
    cache: Path | None
    device: torch.device
    world: World
    out: Path | None


@dataclass(frozen=True)
class Answer:
    """The measures of a question.

    Attributes:
        figures: measures of `fake` by name.
        bounds: measures of the yardstick by name; None without one.
        bits: bits per dimension of the held-out images, given their labels if the model has any; None if not wanted.
        bits_without_labels: the same without labels; None if not wanted, or unless trained with label dropout.
        doubts: caveats, one line each.
    """

    question: Question
    figures: dict[str, Measure]
    bounds: dict[str, Measure] | None
    bits: BitsPerDim | None
    bits_without_labels: BitsPerDim | None
    doubts: list[str]

    def save(self, folder: Path) -> Path:
        """Write `evaluation.json`, and `likelihood.png` if there are bits per dimension; return the former's path."""
        if self.bits is not None:
            save_plot(folder / "likelihood.png", self.bits)
        write_text(folder / RESULT, json.dumps(self.to_dict(), indent=1) + "\n")
        return folder / RESULT

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`."""
        asked = self.question
        network, fake, yardstick = asked.network, asked.fake, asked.yardstick
        return {
            "format": FORMAT,
            "version": VERSION,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "figures": _as_table(self.figures),
            **_own(asked.metrics),
            "features": None
            if network is None
            else {
                "network": network.name,
                "weights_sha256": network.hash,
                "dim": network.dim,
                "resizing": network.resizing,
                **(described(network) or {}),
            },
            "real": _origin(asked.real),
            "fake": fake.origin() if isinstance(fake, ModelSamples) else _origin(fake),
            "yardstick": None
            if yardstick is None or self.bounds is None
            else _origin(yardstick) | {"figures": _as_table(self.bounds)},
            "likelihood": self._bits(),
            "warnings": self.doubts,
            "device": str(asked.device),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }

    def _bits(self) -> dict[str, Any] | None:
        if self.bits is None or self.question.likelihood is None:
            return None
        kept: dict[str, Any] = {**self.bits.to_dict(), "images": _origin(self.question.likelihood.held)}
        if self.bits_without_labels is not None:
            kept["without_labels"] = self.bits_without_labels.to_dict()
        return kept

    def show(self) -> None:
        """Print the measures as a table."""
        asked, bounds = self.question, self.bounds
        features = "" if asked.network is None else f", features {asked.network.name}"
        title = f"{len(asked.fake)} samples by {len(asked.real)} real images{features}"
        table = Table(title=title, title_justify="left")
        for column in ("figure", "value", "standard error", *(["yardstick"] if bounds else []), "better"):
            table.add_column(column, justify="left" if column in ("figure", "better") else "right")
        for key, figure in self.figures.items():
            error = "" if figure.std_error is None else f"{figure.std_error:.2g}"
            name = key if figure.neighbours is None else f"{key}, k = {figure.neighbours}"
            yardstick = [f"{bounds[key].value:.4g}"] if bounds else []
            table.add_row(name, f"{figure.value:.4g}", error, *yardstick, figure.better)
        Console().print(table)


def measure(question: Question) -> Answer | None:
    """Return the answer to a question, in the first process; the others share the sampling and return None.

    Bits per dimension are printed as soon as they are known.
    """
    network, fake, world = question.network, question.fake, question.world
    rows, sources = needs_rows(question.metrics), extractors(question.metrics, network)
    if not world.is_main:
        if isinstance(fake, ModelSamples):
            sample_features(fake, sources, question.batch_size, True, world, None)
        return None

    with Report() as report:

        def known(name: str, pictures: ImageSet) -> list[FeatureSet]:
            advance = report.part(f"{name} features", len(pictures) * len(sources))
            settings = (question.batch_size, rows, question.cache, advance)
            return [reference_features(pictures, source, *settings) for source in sources]

        reference = known("reference", question.real)
        bound = None if question.yardstick is None else known("yardstick", question.yardstick)
        judged = sample_features(fake, sources, question.batch_size, rows, world, report)
        figures = compare(reference, judged, network, question.metrics, track=report.part)
        bounds = None
        if bound is not None:

            def of_yardstick(name: str, steps: int) -> Callable[[float], None]:
                return report.part(f"{name} of the yardstick", steps)

            bounds = compare(reference, bound, network, question.metrics, track=of_yardstick)
        bits = bits_without = None
        if question.likelihood is not None:
            bits, bits_without = _likelihood(question.likelihood, question.batch_size, question.device, report)
    doubts = [] if network is None else find_doubts(len(question.real), len(fake), network, question.real.sizes)
    doubts += [doubt for doubt in [_part_alone(figures, len(question.real), len(fake))] if doubt is not None]
    return Answer(question, figures, bounds, bits, bits_without, doubts)


def _likelihood(
    question: LikelihoodQuestion, batch_size: int, device: torch.device, report: Report
) -> tuple[BitsPerDim, BitsPerDim | None]:
    """Return the bits per dimension, and those without labels if the model was also trained without."""
    held, model, recipe = question.held, question.model, question.model.recipe
    wanted = (question.method, question.scales, question.draws, question.seed, device)
    batches = held.batches(batch_size) if recipe.num_classes is None else held.labelled(batch_size)
    advance = report.part(f"likelihood ({question.method})", len(held))
    bits = bits_per_dim(model, batches, *wanted, on_images=advance)
    print(f"likelihood: {bits.line()}")
    if recipe.num_classes is None or recipe.label_dropout <= 0:
        return bits, None
    advance = report.part("likelihood without labels", len(held))
    without = bits_per_dim(model, held.batches(batch_size), *wanted, on_images=advance, use_labels=False)
    print(f"without labels: {without.line()}")
    return bits, without


def find_doubts(real: int, fake: int, network: FeatureNetwork, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Return caveats for measures of so many images, one line each."""
    counted = (few_images(number, name, network) for number, name in ((real, "real images"), (fake, "samples")))
    doubts = [doubt for doubt in counted if doubt is not None]
    if min(min(size) for size in sizes) < SMALL_SIDE:
        doubts.append(
            f"images below {SMALL_SIDE} px are enlarged to {network.input_side} px for features of photos: figures "
            "rank models of one data set, and mean little beside those of another"
        )
    return doubts


def _part_alone(figures: dict[str, Measure], real: int, fake: int) -> str | None:
    """Return a caveat if some measures use only part of the images, else None."""
    parts = {name: figure.images for name, figure in figures.items() if figure.images is not None}
    if not parts:
        return None
    (taken, drawn), names = next(iter(parts.values())), list(parts)
    return (
        f"{', '.join(names[:-1])} and {names[-1]} are those of {taken} of {real} real images and {drawn} of {fake} "
        "samples (manifold_images); compare them with figures of as many alone"
    )


def _own(metrics: Sequence[Metric]) -> dict[str, Any]:
    """Return the classes and options of metrics from outside this package, by name, as an entry of the result."""
    own = {metric.name: described(metric) for metric in metrics}
    kept = {name: entry for name, entry in own.items() if entry is not None}
    return {"own_metrics": kept} if kept else {}


def _as_table(figures: dict[str, Measure]) -> dict[str, dict[str, Any]]:
    return {name: {key: v for key, v in asdict(figure).items() if v is not None} for name, figure in figures.items()}


def _origin(pictures: ImageSet) -> dict[str, Any]:
    return {
        "source": pictures.source,
        "number": len(pictures),
        "sizes": [list(size) for size in pictures.sizes],
        "sha256": pictures.digest(),
    }
