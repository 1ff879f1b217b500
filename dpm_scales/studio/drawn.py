"""Draw samples of a model with their trajectory, and inpaint images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dpm_scales.commands.edit import resampling
from dpm_scales.editing import Consistent, Mask, Resampling, restore
from dpm_scales.errors import UserError, require, require_number, suggest
from dpm_scales.images import make_class_grid, make_grid, to_range, to_uint8
from dpm_scales.memory import require_memory
from dpm_scales.models.generate import draw, finished, label_cycle, pick_labels, sample_bytes
from dpm_scales.models.io import checkpoints, load_model
from dpm_scales.models.model import Model
from dpm_scales.models.parts import part_names
from dpm_scales.rng import CounterRNG
from dpm_scales.run_folders.find import find_runs

MAX_SAMPLES, MAX_RESULTS, MAX_STEPS = 64, 12, 1000
FRAMES = 40
"""Largest number of frames kept of a trajectory."""

STRIP_ROWS, STRIP_COLUMNS = 4, 10
CELL = 64
"""Minimum side of an image in a grid, in pixels."""

OWN = "the model's own"
ALL = "all in turn"
SECONDS = 300
"""Time limit of one call."""

OnShare = Callable[[float], None]
"""Callback that receives the finished share of the work, in [0, 1]."""


@dataclass(frozen=True)
class Drawn:
    """Samples and frames of their trajectory.

    Attributes:
        images: uint8 ``(N, C, H, W)``.
        frames: likewise after some of the steps, the last one included.
        scales: t of each frame.
        labels: class of each sample; None without classes.
        names: names of the classes.
    """

    images: Tensor
    frames: list[Tensor]
    scales: list[float]
    labels: list[int] | None = None
    names: tuple[str, ...] | None = None

    def grid(self) -> Tensor:
        """Return the samples as one image, a row per class if there are classes."""
        if self.labels is not None:
            return make_class_grid(self.images, self.labels, self.names)
        return make_grid(self.images, padding=2, upscale=enlargement(self.images))

    def frame(self, number: int) -> Tensor:
        """Return frame `number` as a grid."""
        frame = self.frames[min(max(number, 0), len(self.frames) - 1)]
        return make_grid(frame, padding=2, upscale=enlargement(frame))

    def strip(self) -> Tensor:
        """Return a row for each of the first samples, from noise on the left to the image on the right."""
        chosen = torch.linspace(0, len(self.frames) - 1, min(STRIP_COLUMNS, len(self.frames))).round().long().tolist()
        table = torch.stack([self.frames[k][:STRIP_ROWS] for k in chosen], 1)
        return make_grid(table.flatten(0, 1), len(chosen), 2, enlargement(table))


@dataclass
class Models:
    """The models that can be chosen, of which the last one stays loaded.

    Attributes:
        places: folders, files or Hub addresses, by the name that is shown.
        allow: packages whose classes a model may name.
    """

    places: dict[str, str]
    allow: tuple[str, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _loaded: tuple[str, Model] | None = None

    def load(self, name: str | None) -> Model:
        """Return a model on the device. Raises UserError for a name that was not given at the start."""
        require(bool(self.places), "no model: start with dpm-scales studio RUN")
        known = list(self.places)
        require(name in self.places, f"unknown model {name!r}: {suggest(str(name), known)}")
        assert name is not None
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # two may not fit into memory together
            model = load_model(self.places[name], allow=self.allow)
            self._loaded = (name, model.to(self.device))
        return self._loaded[1]


def find_models(words: Iterable[str]) -> dict[str, str]:
    """Return the models that the words of a command line name, by the name that is shown.

    Args:
        words: models, as `load_model` takes them, or folders that hold runs or exports.

    Raises: UserError for a word that names none.
    """
    found: dict[str, str] = {}
    for word in words:
        if "://" in word or Path(word).is_file() or _holds_model(Path(word)):
            found[word] = word
            continue
        place = Path(word)
        require(place.is_dir(), f"no model at {word}: no such file or folder")
        folders = [run.folder for run in find_runs(place).runs if run.loadable]
        folders += [one for one in sorted(place.iterdir()) if one.is_dir() and one not in folders and _holds_model(one)]
        require(bool(folders), f"no model in {word}: neither a run nor an export")
        found |= {str(folder): str(folder) for folder in folders}
    return found


def _holds_model(folder: Path) -> bool:
    files = (folder / "model.safetensors", folder / "model/model.safetensors", folder / "model_index.json")
    return any(file.is_file() for file in files) or bool(checkpoints(folder / "checkpoints"))


def sampler_names() -> list[str]:
    """Return the samplers that can be chosen, the model's own first."""
    return [OWN, *part_names("sampler")]


def class_choices(model: Model) -> list[str]:
    """Return the choices of a label, all classes first; none for a model without labels."""
    classes = model.recipe.num_classes
    if classes is None:
        return []
    names = model.recipe.class_names or [str(k) for k in range(classes)]
    return [ALL, *(str(name) for name in names)]


def _label(model: Model, choice: str | None) -> int | None:
    """Return the number of a class that `class_choices` offers, or None for all of them."""
    choices = class_choices(model)
    if not choices or choice in (None, "", ALL):
        return None
    require(choice in choices, f"unknown label {choice!r}: {suggest(str(choice), choices)}")
    return choices.index(str(choice)) - 1


def sample(
    model: Model,
    number: int,
    seed: int = 0,
    sampler: str = OWN,
    steps: int | None = None,
    label: str | None = None,
    on_share: OnShare | None = None,
    seconds: float = SECONDS,
) -> Drawn:
    """Draw samples and keep frames of their trajectory; the images are those of `sample.py` for the same options.

    Args:
        sampler: a name of `sampler_names`.
        steps: None for the sampler's own number.
        label: one of `class_choices`.
        seconds: time limit.

    Raises: UserError for values out of range, a sampler that does not fit the model, and when time is up.
    """
    require_number("number", number, 1, MAX_SAMPLES, whole=True)
    require_number("seed", seed, 0, whole=True)
    if steps is not None:
        require_number("steps", steps, 1, MAX_STEPS, whole=True)
    chosen = (
        model if sampler == OWN and steps is None else model.with_sampler(None if sampler == OWN else sampler, steps)
    )
    size, value_range = model.recipe.image_size, model.denoiser.process.value_range
    require_memory(sample_bytes(model, size) * number, f"{number} samples", "draw fewer", model.device)
    labels = pick_labels(model, _label(model, label), number)
    scales = chosen.sampler.scales(model.denoiser.process)
    watch = _Watch(len(scales) - 1, on_share, seconds)
    frames: list[Tensor] = []

    def on_step(index: int, x: Tensor) -> None:
        watch(index, x)
        if index in watch.kept:
            frames.append(to_uint8(x, value_range).cpu())

    images = torch.cat([*draw(chosen, number, seed, number, None, labels, model.device, on_step)])
    kept = [float(scales[k + 1]) for k in sorted(watch.kept)]
    names = None if model.recipe.class_names is None else tuple(map(str, model.recipe.class_names))
    return Drawn(images, frames, kept, None if labels is None else labels.tolist(), names)


def inpaint(
    model: Model,
    image: Tensor,
    hole: Tensor,
    number: int = 4,
    seed: int = 0,
    steps: int | None = None,
    label: str | None = None,
    on_share: OnShare | None = None,
    seconds: float = SECONDS,
) -> Tensor:
    """Inpaint a part of an image, as ``sample.py task=inpaint`` does, and keep the rest.

    Args:
        image: uint8 ``(C, H, W)`` of the model's channels and size.
        hole: bool ``(H, W)``, True in the part to inpaint.
        steps, label, seconds: as in `sample`; steps without their repetitions.

    Returns: uint8 ``(number, C, H, W)``.
    Raises: UserError for values out of range, a hole that is empty or all of the image, and models without an estimate
    of the clean image.
    """
    require_number("number", number, 1, MAX_RESULTS, whole=True)
    require_number("seed", seed, 0, whole=True)
    if steps is not None:
        require_number("steps", steps, 1, MAX_STEPS, whole=True)
    require(bool(hole.any()), "nothing is painted; paint over the part to invent")
    require(not bool(hole.all()), "all of the image is painted; nothing would be left of it")
    process, device = model.denoiser.process, model.device
    shape = (model.recipe.channels, *model.recipe.image_size)
    require(tuple(image.shape) == shape, f"the image has shape {tuple(image.shape)}, the model's {shape}")
    require_memory(sample_bytes(model, shape[1:]) * number, f"{number} results", "draw fewer", device)
    sampler = resampling(model, steps)
    label_number = _label(model, label)
    classes = model.recipe.num_classes
    require(classes is None or label_number is not None, "this model has classes; choose what the image shows")
    cycle = label_cycle(model, label_number)
    labels = None if cycle is None else cycle[torch.zeros(number, dtype=torch.long)].to(device)
    known = to_range(image.to(device), process.value_range).expand(number, -1, -1, -1)
    denoiser = Consistent(model.denoiser, Mask((~hole).to(device)), known)
    scales = sampler.scales(process).to(device)
    watch = _Watch(len(scales) - 1, on_share, seconds)
    x = restore(denoiser, sampler, scales, CounterRNG(seed, number, 0, device), shape, labels, watch)
    return finished(x, process.value_range, 0)


def describe_sampler(model: Model, steps: int | None) -> str:
    """Return a line on the sampler that `inpaint` uses."""
    sampler = resampling(model, steps)
    count = len(sampler.scales(model.denoiser.process)) - 1
    repeats = sampler.repeats if isinstance(sampler, Resampling) else 0
    inner = sampler.sampler if isinstance(sampler, Resampling) else sampler
    return f"{type(inner).__name__}, {count} steps" + (f", each repeated {repeats} times" if repeats else "")


def enlargement(images: Tensor) -> int:
    """Return the integer factor that makes the shorter side at least `CELL` pixels."""
    return max(1, -(-CELL // min(images.shape[-2:])))


class _Watch:
    """Callback that reports each step, and raises UserError when time is up.

    Attributes:
        kept: numbers of the steps whose frame is kept.
    """

    def __init__(self, steps: int, on_share: OnShare | None, seconds: float) -> None:
        self.steps, self.on_share, self.seconds = steps, on_share, seconds
        self.end = time.monotonic() + seconds
        self.kept = set(torch.linspace(0, steps - 1, min(FRAMES, steps)).round().long().tolist())

    def __call__(self, index: int, x: Tensor) -> None:
        if time.monotonic() > self.end:
            raise UserError(f"stopped after {self.seconds:g} s, at step {index + 1} of {self.steps}; take fewer steps")
        if self.on_share is not None:
            self.on_share((index + 1) / self.steps)
