"""Make the parts of a model: from the configs in a recipe, or from objects, whose configs then make up the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dpm_scales.denoisers import Denoiser
from dpm_scales.describe import Configured, DescriptionError, describe
from dpm_scales.errors import UserError, require, suggest
from dpm_scales.models.instantiate import CONFIGS, arguments_of, build, read_config, root_cause_line
from dpm_scales.models.recipe import UNDESCRIBED, Recipe
from dpm_scales.models.weights_fit import require_fit, within_memory
from dpm_scales.networks import require_forward, require_size
from dpm_scales.priors import Prior
from dpm_scales.processes import Process
from dpm_scales.samplers import Sampler
from dpm_scales.targets import Target

#: parts whose configs are composed of others
COMPOSED = ("process", "network")
#: arguments that a network gets from its model
CHANNELS = ("in_channels", "out_channels", "num_classes")


def build_denoiser(
    recipe: Recipe, data_std: float = 0.5, weights: Mapping[str, Tensor] | None = None
) -> tuple[Denoiser, Prior]:
    """Return the parts of a model that have weights.

    Args:
        data_std: as in `Denoiser`.
        weights: weights to be loaded later, named as in `Model.state_dict`: the network is compared with them before
            its memory is allocated.

    Raises: UserError for parts that do not fit together, MisfitError for weights of another network, OutOfMemoryError
    for a network larger than the machine's memory.
    """
    parts, reason = recipe.parts, recipe.undescribed
    require(reason is None, f"the model can't be rebuilt: {reason}")
    process = build(parts["process"], Process, "process")
    process.bind_size(recipe.image_size)
    inputs = recipe.channels * (1 + process.context_channels)
    kwargs = {"in_channels": inputs, "out_channels": recipe.channels, "num_classes": recipe.num_classes}
    make = partial(build, parts["network"], nn.Module, "network", kwargs=kwargs)
    if weights is not None:
        require_fit(make, weights, "denoiser.network.")
    with within_memory("this network"):
        network = make()
    check_network(network, recipe.label_dropout)
    require_size(network, recipe.image_size)
    target = build(parts["target"], Target, "target")
    prior = build(parts["prior"], Prior, "prior", {"process": process})
    prior.check(process)
    return Denoiser(network, process, target, data_std), prior


def check_network(network: nn.Module, label_dropout: float) -> None:
    """Raise UserError for a network without trainable weights or with another `forward`, and for label dropout if the
    network has no index for "no label".
    """
    trainable = any(parameter.requires_grad for parameter in network.parameters())
    require(trainable, f"network: {type(network).__name__} has no weights to train")
    require_forward(network)
    require(
        label_dropout == 0 or getattr(network, "no_label", True),
        f"network: {type(network).__name__} with no_label=false has no index for labels that are dropped; set "
        "label_dropout=0, or no_label=true",
    )


def build_sampler(settings: Any, denoiser: Denoiser) -> Sampler:
    """Return the sampler that a config describes. Raises UserError if it does not fit the denoiser."""
    sampler: Sampler = build(settings, Sampler, "sampler", {"denoiser": denoiser})
    sampler.check(denoiser)
    return sampler


def make_part(value: object, kind: type, where: str, given: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """Return a part of a model, and its config.

    Args:
        value: an object, which is used as it is; a class with arguments; or the name of a file in ``configs/WHERE``.
        kind: what the part must be.
        where: the part's name.
        given: arguments for a config with `_partial_`, a function of other parts.

    Raises: UserError for anything else.
    """
    if isinstance(value, kind):
        return value, described(value)
    if isinstance(value, Configured):
        return realised(value, kind, where), described(value)
    names = part_names(where)
    allowed = f"{kind.__name__} or one of {', '.join(names)}" if names else kind.__name__
    require(isinstance(value, str) and bool(names), f"{where} must be a {allowed}; got {value!r:.100}")
    require(value in names, f"unknown {where} {value!r}: {suggest(str(value), names)}")
    settings = read_config(CONFIGS / where / f"{value}.yaml", where)
    return build(settings, kind, where, given), settings


def part_names(where: str) -> list[str]:
    """Return the names of the files in configs/WHERE that describe a part on their own; none for composed parts."""
    files = [] if where in COMPOSED else sorted((CONFIGS / where).glob("*.yaml"))
    return [file.stem for file in files if read_config(file, where).get("_target_") is not None]


def realised(value: Configured, kind: type, where: str, **given: Any) -> Any:
    """Return the object that a class makes of its arguments and those in `given`.

    Raises: UserError if the class does not take them, or makes something other than `kind`.
    """
    name, known = value.kind.__name__, arguments_of(value.kind)
    for key in given:
        require(known is None or key in known, f"{where}: {name} takes no argument {key}, which the model gives it")
    try:
        built: Any = value.kind(**{key: _objects(entry, key) for key, entry in value.arguments.items()}, **given)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {name} can't be made: {root_cause_line(error)}") from error
    require(isinstance(built, kind), f"{where}: {name} makes no {kind.__name__}")
    return built


def _objects(value: Any, where: str) -> Any:
    """Return a value in which every nested `Configured` is replaced with its object."""
    if isinstance(value, Configured):
        return realised(value, object, where)
    if isinstance(value, list | tuple):
        return [_objects(entry, where) for entry in value]
    return {key: _objects(entry, where) for key, entry in value.items()} if isinstance(value, dict) else value


def described(value: object) -> dict[str, Any]:
    """Return an object's config; if it can't be described, its class and the reason."""
    try:
        settings: dict[str, Any] = describe(value)
        return settings
    except DescriptionError as error:
        kind = value.kind if isinstance(value, Configured) else type(value)
        return {"class": f"{kind.__module__}.{kind.__qualname__}", UNDESCRIBED: str(error)}


def make_network(
    value: nn.Module | Configured,
    inputs: int,
    channels: int,
    size: tuple[int, int],
    num_classes: int | None,
    label_dropout: float,
) -> tuple[nn.Module, Any]:
    """Return a network that fits a model's images, and its config without `CHANNELS`.

    Args:
        inputs: channels of the network's input.
        channels: channels of its output.
        size: (H, W) of the images, for which it is tried on the meta device.

    Raises: UserError if it does not fit, is no network or has no weights; OutOfMemoryError if it is too large.
    """
    arguments = {"in_channels": inputs, "out_channels": channels, "num_classes": num_classes}
    kind = f"network must be a torch.nn.Module or ds.configured(CLASS, ...), got {value!r:.100}"
    require(isinstance(value, nn.Module | Configured), kind)
    settings = described(value)
    with within_memory("this network"):
        if isinstance(value, Configured):
            network: nn.Module = realised(value, nn.Module, "network", **arguments)
        else:
            network = value
            complete = getattr(network, "complete", None)
            if callable(complete):
                complete(**arguments)
    name = type(network).__name__
    for key, needed in arguments.items():
        own = getattr(network, key, needed)
        require(own == needed, f"network: {name} has {key}={own}, and this model needs {key}={needed}")
    check_network(network, label_dropout)
    _try(network, (inputs, *size), channels, num_classes)
    return network, {key: value for key, value in settings.items() if key not in CHANNELS}


def _try(network: nn.Module, shape: tuple[int, int, int], channels: int, num_classes: int | None) -> None:
    """Raise UserError if a network can't map one image of `shape` to `channels` channels of its size.

    A network that does not run on the meta device is not tried.
    """
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    meta = {key: torch.empty_like(value, device="meta") for key, value in state.items()}
    x, t = torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta")
    labels = None if num_classes is None else torch.zeros(1, dtype=torch.int64, device="meta")
    name = type(network).__name__
    try:
        with torch.no_grad():
            found = functional_call(network, meta, (x, t, labels))
    except NotImplementedError:  # an operation without a kernel for the meta device
        return
    except Exception as error:
        reason = root_cause_line(error)
        if "meta" in reason:
            return
        raise UserError(
            f"network: {name} can't be called with (x, t, labels), x of shape {(1, *shape)}: {reason}"
        ) from error
    expected = (1, channels, *shape[1:])
    shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    require(shown == expected, f"network: {name} returns {shown} for x of shape {(1, *shape)}; it must be {expected}")
