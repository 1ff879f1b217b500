"""Choose what an evaluation measures: metrics and feature networks by name, or classes of one's own by `_target_`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dpm_scales.errors import require
from dpm_scales.metrics import FeatureNetwork, ImageMetric, Metric, pick_features
from dpm_scales.metrics.base import Extractor, check_attributes
from dpm_scales.metrics.features import FEATURES
from dpm_scales.metrics.figures import METRICS, check_measures, metric_of
from dpm_scales.models.instantiate import build, plain


def choose_metrics(measures: Any, manifold_images: int | None = None, key: str = "measures") -> tuple[Metric, ...]:
    """Return the metrics that an option asks for, in the order of `METRICS`, then classes of one's own.

    Args:
        measures: list of names in `METRICS` and of configs ``{_target_: mynet.metrics.Mine, …}``.
        manifold_images: of `ManifoldMetric`.
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
    """Return the feature network that an option asks for, on a device.

    Args:
        features: a name as of `pick_features`, or a config ``{_target_: mynet.features.Mine, …}``.
        inception, download: for Inception's weights, see `pick_features`.
        key: the option, for messages.

    Raises: UserError for an unknown network, one that can't be had, or options that it does not use.
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


def described(chosen: Extractor | Metric) -> dict[str, Any] | None:
    """Return the class and options of a feature network or a metric from outside this package; None for its own."""
    kind = type(chosen)
    if kind.__module__.partition(".")[0] == "dpm_scales":
        return None
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "options": dict(chosen.options)}
