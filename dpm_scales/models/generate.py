"""Draw images from a model in batches: the same bytes for the same seed, whatever the batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unicodedata import normalize

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dpm_scales.covariance import tensors_digest
from dpm_scales.errors import UserError, is_whole, require, require_number
from dpm_scales.images import to_uint8
from dpm_scales.memory import lacks_memory
from dpm_scales.models.base import Parts
from dpm_scales.networks import evaluated, require_size
from dpm_scales.networks.precision import BFLOAT16, FULL, precision_name
from dpm_scales.rng import CounterRNG


def label_cycle(model: Parts, labels: int | str | Sequence[int | str] | None) -> Tensor | None:
    """Return int64 labels ``(n,)`` to assign cyclically, sample i gets label i mod n; None for a model without labels.

    Args:
        labels: one class or a list, by number or name; None takes every class.

    Raises: UserError for labels outside the model's classes.
    """
    classes = model.recipe.num_classes
    if classes is None:
        require(labels is None, "labels were given, but this model was trained without; drop labels=")
        return None
    if labels is None:
        return torch.arange(classes)
    chosen: list[Any] = list(labels) if isinstance(labels, list | tuple | range) else [labels]
    names = list(model.recipe.class_names or ())
    numbers = [_class_number(label, names) for label in chosen]
    known = f"0..{classes - 1}" + (f" or {', '.join(names)}" if names else "")
    for label in numbers:
        require(is_whole(label, 0) and label < classes, f"unknown label {label!r}; allowed: {known}")  # type: ignore[operator]
    require(len(numbers) > 0, "labels is empty; give one class or a list")
    return torch.tensor(numbers, dtype=torch.int64)


def _class_number(label: int | str, names: list[str]) -> int | str:
    """Return the number of the class that `label` names, or `label` itself if there is no such name.

    Names that differ only in the encoding of accents, as file names do between systems, are equal if only one class
    matches.

    Raises: UserError for a number that is also another class's name.
    """
    if isinstance(label, str):
        if label in names:
            return names.index(label)
        same = [i for i, name in enumerate(names) if normalize("NFC", name) == normalize("NFC", label)]
        return same[0] if len(same) == 1 else label
    if is_whole(label, 0) and label < len(names) and str(label) in names and names[label] != str(label):
        raise UserError(
            f"label {label} is the name of one class and the number of another, {names[label]!r}; "
            f"give names, in quotes of their own: labels=\"'{label}'\" or labels=\"'{names[label]}'\""
        )
    return label


def pick_labels(model: Parts, labels: int | str | Sequence[int | str] | None, count: int) -> Tensor | None:
    """Return the ``(count,)`` labels of the first samples, see `label_cycle`."""
    cycle = label_cycle(model, labels)
    return None if cycle is None else cycle[torch.arange(count) % len(cycle)]


def draw(
    model: Parts,
    num_samples: int,
    seed: int = 0,
    batch_size: int = 250,
    size: tuple[int, int] | None = None,
    labels: Tensor | None = None,
    device: torch.device | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    first: int = 0,
) -> Iterator[Tensor]:
    """Yield batches of samples, uint8 ``(b, C, H, W)`` on the CPU, `num_samples` in all, numbered from `first`.

    Sample i depends only on (seed, i) and its label ``labels[i - first]``. `on_step` is called with the index of each
    step and the batch after it, in pixels of the process's value range, on the device.
    """
    require_number("num_samples", num_samples, 1, whole=True)
    require_number("batch_size", batch_size, 1, whole=True)
    device = device or torch.device("cpu")
    model.to(device).eval()
    process = model.denoiser.process
    height, width = size or model.recipe.image_size
    model.prior.check_size((height, width))
    require_size(model.denoiser.network, (height, width))
    model.sampler.require_covariance(model.denoiser)
    scales = model.sampler.scales(process).to(device)
    for start in range(0, num_samples, batch_size):
        count = min(batch_size, num_samples - start)
        noise = CounterRNG(seed, count, first + start, device)
        batch_labels = None if labels is None else labels[start : start + count].to(device)
        shape = (model.recipe.channels, height, width)
        x = model.sampler.sample(model.denoiser, model.prior, noise, shape, batch_labels, scales, on_step)
        yield finished(x, process.value_range, first + start)


def finished(x: Tensor, value_range: tuple[float, float], first: int) -> Tensor:
    """Return samples ``(B, C, H, W)`` in pixels, numbered from `first`, as uint8 on the CPU.

    Raises: UserError for samples that are not finite.
    """
    finite = x.isfinite().flatten(1).all(1).cpu()
    if not finite.all():
        number = first + int(finite.logical_not().nonzero()[0])
        raise UserError(f"sample {number} is not finite; take another sampler, more steps or less guidance")
    return to_uint8(x, value_range).cpu()


def networks_of(model: Parts) -> dict[str, nn.Module]:
    """Return the networks that sampling evaluates, by name: "model", and "guide" if it has one."""
    guide = getattr(model.denoiser, "guide", None)
    return {"model": model.denoiser.network} | ({} if guide is None else {"guide": guide.network})


@contextmanager
def computed(model: Parts, precision: str = FULL, compile: bool = False) -> Iterator[None]:
    """Evaluate each of `networks_of` in a given precision, and compiled on request, while the body runs.

    The state and the sampler's arithmetic keep their precision.

    Args:
        precision: "32-true" or "bf16-mixed", also "32" and "bf16".
        compile: whether to compile the networks, on CUDA as CUDA graphs.

    Raises: UserError for an unknown precision, and if compiling fails.
    """
    bfloat16 = precision_name("precision", precision) == BFLOAT16
    require(isinstance(compile, bool), f"compile must be true or false, got {compile!r}")

    def failed(reason: str) -> None:
        raise UserError(f"compile=true: compiling the network failed ({reason}); leave it out to sample uncompiled")

    with evaluated(networks_of(model).values(), bfloat16, compile, failed):
        yield


@contextmanager
def evaluations(model: Parts) -> Iterator[dict[str, int]]:
    """Count the images that pass through each of `networks_of` while the body runs."""
    counts = dict.fromkeys(networks_of(model), 0)

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        counts[name] += len(inputs[0])

    hooks = [part.register_forward_pre_hook(partial(note, name)) for name, part in networks_of(model).items()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def sample_bytes(model: Parts, size: tuple[int, int]) -> int:
    """Return a lower bound on the bytes needed to draw one sample of `size` (H, W).

    It counts four images (the sample, its noise, the network's input and output) and the networks' largest
    activation, if they run on the meta device.
    """
    channels = model.recipe.channels
    images = 4 * channels * size[0] * size[1]
    inputs = (channels * (1 + model.denoiser.process.context_channels), *size)
    try:
        largest = max(largest_activation(network, inputs) for network in networks_of(model).values())
    except Exception as error:  # not every network runs on the meta device
        largest = 0 if lacks_memory(error) is None else 2**63
    return 4 * (images + largest)


def largest_activation(network: nn.Module, size: tuple[int, int, int]) -> int:
    """Return the number of values in the largest activation of a network, for one image of `size` (C, H, W)."""
    largest = 0

    def note(module: nn.Module, inputs: Any, result: Any) -> None:
        nonlocal largest
        if isinstance(result, Tensor):
            largest = max(largest, result.numel())

    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    meta = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    hooks = [part.register_forward_hook(note) for part in network.modules()]
    try:
        with torch.no_grad():
            functional_call(network, meta, (torch.empty(1, *size, device="meta"), torch.empty(1, device="meta")))
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def weights_digest(model: Parts) -> str:
    """Return the SHA-256 of a model's named weights as hexadecimal digits; it does not depend on the file's format.

    The weights of a guide are left out.
    """
    return tensors_digest(entry for entry in model.state_dict().items() if not entry[0].startswith("denoiser.guide."))
