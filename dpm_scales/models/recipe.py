"""Define a model's recipe, the plain containers from which it is rebuilt."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dpm_scales.errors import UserError, require
from dpm_scales.models.checksums import FORMAT
from dpm_scales.models.seals import VERSION
from dpm_scales.models.trust import check_targets, current_names, trusted_names

#: parts of a model; each is a config with a `_target_` of this package
PARTS = ("process", "target", "network", "prior", "sampler")

#: key of a part that can't be rebuilt from plain values, with the reason
UNDESCRIBED = "undescribed"

MAX_SIDE = 2**20


@dataclass(frozen=True)
class Recipe:
    """Everything needed to rebuild a model, in plain containers, as in `config.yaml`.

    Args:
        parts: configs of process, target, network, prior and sampler.
        channels, image_size: number of channels, and (H, W) in pixels, of the training images.
        num_classes: number of classes that the network was trained on, or None for no labels.
        label_dropout: fraction of labels dropped in training, so that the network also learns "no label".
    """

    parts: dict[str, Any]
    channels: int
    image_size: tuple[int, int]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    label_dropout: float = 0.0

    @property
    def undescribed(self) -> str | None:
        """Why the model can't be rebuilt from this recipe, in one line; None if it can."""
        found = (part for part in self.parts.values() if isinstance(part, dict) and UNDESCRIBED in part)
        return next((str(part[UNDESCRIBED]) for part in found), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `config.yaml` as plain containers."""
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
