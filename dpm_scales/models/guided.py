"""Guide a model: the weight of guidance from a number, a curve or a config, and the checks of labels and guides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dpm_scales.describe import DescriptionError, describe
from dpm_scales.errors import UserError, require, require_number, suggest
from dpm_scales.guidance import (
    MAX_WEIGHT,
    Autoguidance,
    ClassifierFreeGuidance,
    GuidanceCurve,
    ListedGuidance,
    LowHigh,
    guided_interval,
)
from dpm_scales.models.base import Parts
from dpm_scales.models.instantiate import arguments_of, build
from dpm_scales.processes import Process

M = TypeVar("M", bound=Parts)
Weight = float | GuidanceCurve

CURVES = (LowHigh, ListedGuidance)
"""Curves that a config can give by their arguments alone; arguments that fit several mean the first."""
NAMED = 3  # largest number of differences in a message


def guidance_weight(value: object) -> Weight:
    """Return the weight that an option gives: a number, or a curve that is not constant.

    Args:
        value: a number from 0 to 1e30, a curve, the arguments of one in `CURVES`, or those of a class as `_target_`.

    Raises: UserError for anything else, and for curves whose weights are out of range.
    """
    if isinstance(value, Mapping):
        value = build(_with_target(value), GuidanceCurve, "guidance")
    if isinstance(value, GuidanceCurve):
        value.check()
        return value if value.constant is None else value.constant
    kinds = "a number >= 0 and <= 1e+30, or one by frequency, {low: 1, high: 3} or {weights: [1, 2, 3]}"
    require(isinstance(value, float | int), f"guidance must be {kinds}, got {value!r:.100}")
    require_number("guidance", value, 0, MAX_WEIGHT)
    return value  # type: ignore[return-value]


def _with_target(settings: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the config of a curve with its class. Raises UserError for arguments that no curve has."""
    if "_target_" in settings:
        return dict(settings)
    names = {kind: list(arguments_of(kind) or ()) for kind in CURVES}
    every = [f"guidance.{name}" for kind in CURVES for name in names[kind]]
    require(len(settings) > 0, f"guidance is empty; give a number or some of {', '.join(every)}")
    for key in settings:
        full = f"guidance.{key}"
        require(full in every, f"unknown option {full!r}: {suggest(full, every)}")
    kind = next((kind for kind in CURVES if settings.keys() <= set(names[kind])), None)
    mixed = " and ".join(f"guidance.{key}" for key in settings)
    if kind is None:
        raise UserError(f"{mixed} belong to different curves; give low and high, or weights")
    return {"_target_": f"dpm_scales.guidance.{kind.__name__}", **settings}


def weight_settings(value: object) -> Any:
    """Return an option's weight of guidance as plain values: a number as it is, a curve with its class and defaults.

    Raises: UserError for an invalid one.
    """
    weight = guidance_weight(value)
    return describe(weight) if isinstance(weight, GuidanceCurve) else weight


def with_guidance(
    model: M,
    guidance: Any,
    interval: Sequence[float] | None = None,
    variable: str = "t",
    guide: Parts | None = None,
    guide_name: str = "guide",
) -> M:
    """Return the model guided by its labels or by a guide, see `dpm_scales.guidance`; itself for a weight of 1.

    Args:
        guidance: as for `guidance_weight`.
        interval, variable: as for `ClassifierFreeGuidance`.
        guide: a worse model of the same process, whose prediction replaces the one without labels.
        guide_name: name of the guide in messages.

    Raises: UserError for invalid values, for models that were trained without label dropout and have no guide, and for
    guides that do not fit or would have no effect.
    """
    weight = guidance_weight(guidance)
    guided_interval(interval)  # checked even for a weight of 1, where it has no effect
    if weight == 1:
        require(guide is None, f"{guide_name} has no effect with guidance=1; set more, guidance=2, or leave it out")
        return model
    if guide is not None:
        return _autoguided(model, guide, weight, interval, variable, guide_name)
    classes, shown = model.recipe.num_classes, "{...}" if isinstance(weight, GuidanceCurve) else f"{weight:g}"
    if classes is None:
        raise UserError(
            f"guidance={shown} needs labels, and this model was trained without; drop guidance=, or give a worse model "
            "of the same process, guide=MODEL"
        )
    require(
        model.recipe.label_dropout > 0,
        f"guidance={shown} needs a model trained with and without labels, and this one was trained with labels "
        "only; drop guidance=, train with label_dropout=0.1, or give a worse model, guide=MODEL",
    )
    guided = ClassifierFreeGuidance(model.denoiser, classes, weight, interval, variable)
    return model.replaced(denoiser=guided)  # has every attribute of a denoiser that sampling uses


def _autoguided(
    model: M, guide: Parts, weight: Weight, interval: Sequence[float] | None, variable: str, name: str
) -> M:
    """Return the model guided by a worse one. Raises UserError if that does not fit."""
    require(isinstance(guide, Parts), f"guide must be a model, ds.load(PATH), got {guide!r:.100}")
    mismatch = _mismatch(model, guide)
    require(mismatch is None, f"{name}: {mismatch}")
    labelled = model.recipe.num_classes is not None and guide.recipe.num_classes is not None
    guided = Autoguidance(model.denoiser, guide.denoiser, weight, interval, variable, labelled)
    # predictions without labels, as for a likelihood, need label dropout in both
    dropout = 0.0 if labelled and guide.recipe.label_dropout == 0 else model.recipe.label_dropout
    return model.replaced(denoiser=guided, recipe=replace(model.recipe, label_dropout=dropout))


def _mismatch(model: Parts, guide: Parts) -> str | None:
    """Return in one line why a guide does not fit the model; None if it fits.

    It must have the model's process, image shape and target, and the model's classes or none.
    """
    advice = "give a worse model of the same process and images"
    own, other = model.recipe, guide.recipe
    shapes = ["x".join(map(str, (one.channels, *one.image_size))) for one in (own, other)]
    if shapes[0] != shapes[1]:
        return f"its images are {shapes[1]} and the model's {shapes[0]}; {advice}"
    changes = _differences(model.denoiser.process, guide.denoiser.process)
    if changes:
        more = len(changes) - NAMED
        shown = "; ".join(changes[:NAMED]) + (f"; and {more} more" if more > 0 else "")
        return f"its process is not the model's ({shown}); {advice}"
    targets = [type(one.denoiser.target).__name__ for one in (model, guide)]
    if targets[0] != targets[1]:
        return f"its target is {targets[1]} and the model's {targets[0]}; {advice}, with the same target"
    if own.num_classes is None and other.num_classes is not None and other.label_dropout == 0:
        return "it was trained with labels only, and the model has none; give one that was trained without labels too"
    if own.num_classes is None or other.num_classes is None:
        return None
    if own.num_classes != other.num_classes:
        count = f"it has {other.num_classes} classes and the model {own.num_classes}"
        return f"{count}; {advice}, with the same labels or none"
    pairs = zip(own.class_names or (), other.class_names or (), strict=False)
    unlike = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if unlike is None:
        return None
    return f"its class {unlike[1]!r} is {unlike[0]!r} in the model; {advice}, with the same labels or none"


def _differences(own: Process, other: Process) -> list[str]:
    """Return the differences between two processes: ``"num_scales is 500 there and 1000 here"``.

    Raises: UserError for processes that can't be described.
    """
    if own is other:
        return []
    if type(own) is not type(other):
        return [f"{type(other).__name__} there and {type(own).__name__} here"]
    try:
        here, there = (dict(_leaves(describe(process), "")) for process in (own, other))
    except DescriptionError as error:
        raise UserError(f"guide: its process can't be compared with the model's: {error}") from error
    keys = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    changes = [f"{key} is {there.get(key)!r:.40} there and {here.get(key)!r:.40} here" for key in keys]
    learnt, theirs = own.state_dict(), other.state_dict()
    unlike = [] if changes else [name for name in learnt if not _equal(learnt[name], theirs.get(name))]
    return changes + [f"{name}, measured from the training images, differs" for name in unlike]


def _equal(own: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(own.cpu().double(), other.cpu().double())


def _leaves(settings: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the values in nested mappings by dotted key."""
    if not isinstance(settings, dict):
        yield where, settings
        return
    for key, value in settings.items():
        yield from _leaves(value, f"{where}.{key}".lstrip("."))
