"""`dpm-scales measure`: measure a model's covariance, for the samplers that use it, and store it with the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpm_scales.cli.program import program
from dpm_scales.cli.words import split_words
from dpm_scales.errors import printable, require
from dpm_scales.storage import check_names, guarded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dpm_scales.data.image_sets import ImageSet
    from dpm_scales.models.model import Model

HELP = """\
usage: {0} MODEL [images=data|NAME|DIR] [num_images=N] [seed=N]
                       [batch_size=N] [device=NAME] [allow=PACKAGE,...]

Measure how far the network's estimates are from clean images, at each scale and frequency, and store it with the model,
in covariance.safetensors beside model.safetensors. Samplers use it with sampler.covariance=optimal.

  MODEL         a run folder or an export; its EMA weights are measured
  images=data   the training images of its run; or a data set, a folder, a .zip, .npy or .npz file
  num_images=N  of these, evenly spaced; by default 1000. The network is evaluated 32 times for each
  seed=N        of the noise; by default 0
  batch_size=N  by default 250; affects only speed and memory
  allow=NAMES   packages whose classes the model may name

Once for each model: it is measured again only if the weights change."""
HELP_FLAGS = ("-h", "--help")
OPTIONS = ("images", "num_images", "seed", "batch_size", "device", "allow")
NUM_IMAGES = 1000
BATCH_SIZE = 250
WHAT = "measure"


def run(argv: Sequence[str]) -> None:
    """Measure the model that `argv`, the arguments after `dpm-scales measure`, names.

    Raises: UserError for arguments that can't be used, before anything is measured.
    """
    usage = f"{program('measure')} MODEL"
    if not set(HELP_FLAGS).isdisjoint(argv):
        print(HELP.format(program("measure")))
        return
    asked = split_words(argv, 1, OPTIONS, (), usage)
    require(len(asked.words) == 1, f"name one model: {usage}")
    number, batch_size = asked.number("num_images", NUM_IMAGES, 2), asked.number("batch_size", BATCH_SIZE)
    seed = asked.number("seed", 0, 0)
    allow = [name for name in asked.options.get("allow", "").strip("[]").split(",") if name]

    from dpm_scales.cli.options import pick_device  # these load torch
    from dpm_scales.evaluation.likelihood import check_classes
    from dpm_scales.evaluation.references import open_images
    from dpm_scales.models.export import save_covariance
    from dpm_scales.models.io import export_folder, load_to_measure
    from dpm_scales.progress import progress_bar
    from dpm_scales.samplers.measuring import measure_error_variance, measured_scales, require_measurable

    device = pick_device(asked.options.get("device", "auto"))
    place = Path(asked.words[0]) if "://" not in asked.words[0] else asked.words[0]
    folder = export_folder(place)
    named = Path(place)  # typed, and may be a link; the export below a run may not
    if folder != named:
        check_names(named, [folder.name])
    model = load_to_measure(folder, allow)
    require_measurable(model.denoiser)
    images = open_images(asked.options.get("images", "data"), "images", "train", number, folder, allow)
    check_classes(model, images, WHAT, "images")
    _check_size(model, images, batch_size, device)
    model.to(device)
    scales = len(measured_scales(model.denoiser.process))
    with progress_bar(True) as bar:
        task = bar.add_task(WHAT, total=scales * len(images), unit="evaluations")
        table = measure_error_variance(
            model.denoiser, _batches(model, images, batch_size, device), seed, lambda count: bar.advance(task, count)
        )
    with guarded(named):
        path = save_covariance(folder, table)
    what = f"{table.num_images} images of {images.source}, {scales} scales, seed {seed}, EMA weights"
    print(printable(f"{path}: {what}; sample with sampler.covariance=optimal"))


def _check_size(model: Model, images: ImageSet, batch_size: int, device: torch.device) -> None:
    """Raise UserError for images of another size than the model's, OutOfMemoryError for a batch that does not fit."""
    from dpm_scales.memory import require_memory
    from dpm_scales.models.generate import sample_bytes

    size = model.recipe.image_size
    for found in images.sizes:
        require(
            found == size,
            f"{images.source}: images of {found[0]}x{found[1]} pixels, and the model's are {size[0]}x{size[1]}; give "
            "its training images",
        )
    number = min(batch_size, len(images))
    needed = sample_bytes(model, size) * number
    require_memory(needed, f"batch_size={number} images of {size[0]}x{size[1]}", "lower batch_size", device)


def _batches(
    model: Model, images: ImageSet, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield images in the process's value range, and their labels if the model has any, on the device."""
    from dpm_scales.evaluation.likelihood import fitting
    from dpm_scales.images import to_range

    labelled = model.recipe.num_classes is not None
    for batch in images.labelled(batch_size) if labelled else images.batches(batch_size):
        given, labels = batch if isinstance(batch, tuple) else (batch, None)
        given, labels = fitting(model, given, labels, None, labelled, WHAT)
        x_0 = to_range(given.to(device), model.denoiser.process.value_range)
        yield x_0, None if labels is None else labels.to(device)
