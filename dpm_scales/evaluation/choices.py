"""Choose what an evaluation measures: metrics and feature networks by name, or custom classes by `_target_`."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpm_scales.data.image_sets import ImageSet
from dpm_scales.errors import UserError, require
from dpm_scales.metrics import FeatureNetwork, ImageMetric, Metric, pick_features
from dpm_scales.metrics.base import Extractor, check_attributes
from dpm_scales.metrics.features import FEATURES
from dpm_scales.metrics.figures import METRICS, check_measures, compare, extractors, gather_all, metric_of
from dpm_scales.models.instantiate import build, plain


def choose_metrics(measures: Any, manifold_images: int | None = None, key: str = "measures") -> tuple[Metric, ...]:
    """Return the metrics that an option selects, in the order of `METRICS`, then custom classes.

    Args:
        measures: list of names in `METRICS` and of configs ``{_target_: mynet.metrics.Mine, …}``.
        manifold_images: the argument `images` of `ManifoldMetric`.
        key: the option, for messages.

    Raises: UserError for anything else.
    """
    listed = [plain(one) for one in check_measures(plain(measures))]
    names = [one for one in listed if not isinstance(one, dict)]
    shipped = {name: metric_of(name, manifold_images) for name in names}
    metrics = [shipped[name] for name in METRICS if name in shipped]
    for number, config in enumerate(listed):
        if isinstance(config, dict):
            metric: Metric = build(config, Metric, f"{key}[{number}]")
            metric.options = _options(config)
            check_attributes(metric, ("name", "dim", "batch_size") if isinstance(metric, ImageMetric) else ("name",))
            metrics.append(metric)
    return tuple(metrics)


def choose_features(
    features: Any,
    inception: str | Path | None = None,
    device: torch.device | str = "cpu",
    download: bool = False,
    key: str = "features",
) -> FeatureNetwork:
    """Return the feature network that an option selects, on a device.

    Args:
        features: a name as in `pick_features`, or a config ``{_target_: mynet.features.Mine, …}``.
        inception, download: for Inception's weights, see `pick_features`.
        key: the option, for messages.

    Raises: UserError for an unknown network, one that is not available, or options that it does not use.
    """
    config = plain(features)
    if not isinstance(config, dict):
        return pick_features(str(config), inception, device, download)
    network: FeatureNetwork = build(config, FeatureNetwork, key)
    kind = config["_target_"]
    for name, value in {"inception": inception, "download": download}.items():
        option = f"{key.removesuffix('features')}{name}"
        require(not value, f"{option}={value} is for {key}=inception, and {key} is {kind}; leave {option} out")
    reserved = network.name in FEATURES and type(network) is not FEATURES[network.name]
    require(not reserved, f"{key}: {kind} has the name {network.name!r} of another network; give it one of its own")
    network.options = _options(config)
    return network.to(device)


def _options(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "_target_"}


def rehearse(
    metrics: Sequence[Metric], network: FeatureNetwork | None, pictures: ImageSet, key: str = "measures"
) -> None:
    """Try metrics from outside this package on the first images of a reference, before any work is done.

    Numerical errors are ignored, since they may be due to the small number of images.

    Raises: UserError for features of another shape or that are not finite, a result other than a `Measure` for each
        name, and a bug in the code.
    """
    own = [metric for metric in metrics if described(metric) is not None]
    if not own:
        return
    fewest = max(metric.fewest for metric in own)
    images = next(iter(pictures.batches(2 * fewest)))
    sources = extractors([*own, *(metric for metric in metrics if not isinstance(metric, ImageMetric))], network)
    try:
        halves = [gather_all(sources, [half]) for half in images.chunk(2)]
        for metric in own:
            used = metric if isinstance(metric, ImageMetric) else network
            index = next(index for index, source in enumerate(sources) if source is used)
            if len(images) >= 2 * metric.fewest:
                compare([halves[0][index]], [halves[1][index]], network, [metric])
    except UserError:
        raise
    except (AttributeError, ImportError, LookupError, NameError, TypeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        raise UserError(f"{key}: a metric fails on the first images of the reference ({where}): {error!r}") from error
    except (ArithmeticError, ValueError):
        return


def described(chosen: Extractor | Metric) -> dict[str, Any] | None:
    """Return the class and options of a feature network or metric from outside this package, None for one of it."""
    kind = type(chosen)
    if kind.__module__.partition(".")[0] == "dpm_scales":
        return None
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "options": dict(chosen.options)}
