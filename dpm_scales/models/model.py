"""Define a model (denoiser, prior and sampler) and its recipe, the plain containers from which it is rebuilt."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.errors import UserError, require
from dpm_scales.models.checksums import FORMAT
from dpm_scales.models.instantiate import build, plain
from dpm_scales.models.seals import VERSION
from dpm_scales.models.trust import check_targets, current_names, trusted_names
from dpm_scales.models.weights_fit import require_fit, within_memory
from dpm_scales.priors import Prior
from dpm_scales.processes import Process
from dpm_scales.samplers import Sampler
from dpm_scales.targets import Target

#: parts of a model; each is a config with a `_target_` of this package
PARTS = ("process", "target", "network", "prior", "sampler")

MAX_SIDE = 2**20


@dataclass(frozen=True)
class Recipe:
    """Everything needed to rebuild a model, in plain containers, as in `config.yaml`.

    Args:
        parts: configs of process, target, network, prior and sampler.
        channels, image_size: of the training images.
        num_classes: number of classes that the network was trained on, or None for no labels.
        label_dropout: fraction of labels dropped in training, so that the network also learns "no label".
    """

    parts: dict[str, Any]
    channels: int
    image_size: tuple[int, int]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    label_dropout: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        image = {"channels": self.channels, "height": self.image_size[0], "width": self.image_size[1]}
        names = list(self.class_names) if self.class_names else None
        labels: dict[str, Any] = {"num_classes": self.num_classes, "class_names": names}
        if self.label_dropout > 0:  # absent from files of models trained without it
            labels["label_dropout"] = self.label_dropout
        return {"format": FORMAT, "version": VERSION, "image": image, "labels": labels, **self.parts}

    @staticmethod
    def from_dict(values: Any, source: str, allow: Collection[str] = ()) -> Recipe:
        """Return the recipe in a file.

        Args:
            values: content of the file.
            source: path of the file, for messages.
            allow: packages whose classes it may name besides those of the core; see `models.trust`.

        Raises: UserError unless it is a recipe of this version that names only allowed classes.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(f"{source} is not a dpm_scales model; give a run folder, its model/ folder or a checkpoint")
        if values.get("version") != VERSION:
            raise UserError(f"{source} has model format {values.get('version')!r}; this version reads {VERSION}")
        check_targets(values, source, trusted_names(allow))
        try:
            image, labels = values["image"], values["labels"]
            parts = {name: current_names(values[name]) for name in PARTS}
            size = (int(image["height"]), int(image["width"]))
            names = labels["class_names"] or None
            if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise ValueError("class_names are no list of names")
            dropout = float(labels.get("label_dropout", 0.0))
            if not 0 <= dropout < 1:
                raise ValueError(f"label_dropout={dropout}")
            names = None if names is None else tuple(names)
            recipe = Recipe(parts, int(image["channels"]), size, labels["num_classes"], names, dropout)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{source}: the model's config is incomplete or damaged ({error!r})") from error
        sides = (recipe.channels, *recipe.image_size)
        require(all(0 < side <= MAX_SIDE for side in sides), f"{source}: the model's images can't be {sides}")
        return recipe


@dataclass
class Model:
    """A model, trained or untrained."""

    denoiser: Denoiser
    prior: Prior
    sampler: Sampler
    recipe: Recipe

    def modules(self) -> nn.ModuleDict:
        """Return the denoiser and the prior under the names used in exports and checkpoints."""
        return named_modules(self.denoiser, self.prior)


def named_modules(denoiser: Denoiser, prior: Prior) -> nn.ModuleDict:
    """Return the parts with weights under the names used in exports and checkpoints."""
    return nn.ModuleDict({"denoiser": denoiser, "prior": prior})


def build_model(recipe: Recipe, data_std: float = 0.5, weights: Mapping[str, Tensor] | None = None) -> Model:
    """Return an untrained model; arguments and errors are those of `build_denoiser`."""
    denoiser, prior = build_denoiser(recipe, data_std, weights)
    return Model(denoiser, prior, build_sampler(recipe.parts["sampler"], denoiser), recipe)


def build_denoiser(
    recipe: Recipe, data_std: float = 0.5, weights: Mapping[str, Tensor] | None = None
) -> tuple[Denoiser, Prior]:
    """Return the parts of a model that have weights.

    Args:
        data_std: as in `Denoiser`.
        weights: weights to be loaded later, named as in `Model.modules`: the network is compared with them before its
            memory is allocated.

    Raises: UserError for parts that do not fit together, MisfitError for weights of another network, OutOfMemoryError
    for a network larger than the machine's memory.
    """
    parts = recipe.parts
    process = build(parts["process"], Process, "process")
    inputs = recipe.channels * (1 + process.context_channels)
    kwargs = {"in_channels": inputs, "out_channels": recipe.channels, "num_classes": recipe.num_classes}
    make = partial(build, parts["network"], nn.Module, "network", kwargs=kwargs)
    if weights is not None:
        require_fit(make, weights, "denoiser.network.")
    with within_memory("this network"):
        network = make()
    trainable = any(parameter.requires_grad for parameter in network.parameters())
    require(trainable, f"network: {type(network).__name__} has no weights to train")
    target = build(parts["target"], Target, "target")
    prior = build(parts["prior"], Prior, "prior", {"process": process})
    prior.check(process)
    return Denoiser(network, process, target, data_std), prior


def build_sampler(settings: Any, denoiser: Denoiser) -> Sampler:
    """Return the sampler that a config describes. Raises UserError if it does not fit the denoiser."""
    sampler: Sampler = build(settings, Sampler, "sampler", {"denoiser": denoiser})
    sampler.check(denoiser)
    return sampler


def with_sampler(model: Model, settings: Any) -> Model:
    """Return the model with the sampler that a config describes. Raises UserError if it does not fit the denoiser."""
    parts = {**model.recipe.parts, "sampler": plain(settings)}
    sampler = build_sampler(settings, model.denoiser)
    return replace(model, sampler=sampler, recipe=replace(model.recipe, parts=parts))
