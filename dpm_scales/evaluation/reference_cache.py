"""Cache features of reference images in the user's cache folder.

A file is named by the SHA-256 of the images' content, the network's weights and the resizing and, for a custom class,
its module's source and its options, so that a change of any of them gives another file. It holds the mean and a factor
of the covariance, and the features themselves up to `KEPT_BYTES`. Files are safetensors, from which nothing is
executed; a checksum over the tensors detects damage that the format would miss.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from dpm_scales.data.image_sets import ImageSet
from dpm_scales.errors import UserError
from dpm_scales.metrics import FeatureSet, FeatureStatistics, gather
from dpm_scales.metrics.base import Extractor, identity_of
from dpm_scales.storage import write_bytes

VERSION = 1
"""Version of the features; increase it when the same images and weights give different features."""

REFERENCES = "references"
"""Name of the folder of these files in the user's cache folder."""

KEPT_BYTES = 512 * 2**20
"""Maximum size of the features in a file: 65536 images with Inception's 2048 features."""


def reference_key(content: str, network: Extractor) -> str:
    """Return the name of the cache file for images with the digest `content` and the extractor `network`."""
    made_of = [VERSION, content, *identity_of(network)]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def reference_features(
    pictures: ImageSet,
    network: Extractor,
    batch_size: int,
    keep_rows: bool = True,
    folder: Path | None = None,
    on_images: Callable[[float], None] | None = None,
) -> FeatureSet:
    """Return the features of images from the cache, computing and caching them if necessary.

    Args:
        keep_rows: return the features of all images, not only their statistics.
        folder: the cache folder; None for no cache. If it can't be written, or a file is damaged, a warning is issued.
        on_images: called with the number of images of each finished batch.
    """
    path = None
    if folder is not None:
        path = folder / f"{reference_key(pictures.digest(), network)}.safetensors"
        found = _read(path, network.dim) if path.is_file() else None
        if found is not None and (found.rows is not None or not keep_rows) and found.number == len(pictures):
            if on_images is not None:
                on_images(len(pictures))
            return found
    fits = len(pictures) * network.dim * 4 <= KEPT_BYTES
    features = gather(network, pictures.batches(batch_size), keep_rows or (fits and path is not None), on_images)
    if path is not None:
        try:
            _write(path, features, network)
        except UserError as error:
            warnings.warn(f"the reference's features are not kept: {error}", stacklevel=2)
    return features


def _write(path: Path, features: FeatureSet, network: Extractor) -> None:
    statistics = features.statistics
    tensors = {"mean": torch.from_numpy(statistics.mean), "root": torch.from_numpy(statistics.root)}
    if features.rows is not None and features.rows.nbytes <= KEPT_BYTES:
        tensors["rows"] = torch.from_numpy(features.rows)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"number": str(features.number), "network": network.name, "weights": network.hash}
    # a single entry, since the order of several is not fixed
    described = json.dumps(metadata | {"sha256": _checksum(tensors, metadata)}, sort_keys=True)
    write_bytes(path, save(tensors, metadata={"dpm_scales": described}))


def _read(path: Path, dim: int) -> FeatureSet | None:
    """Return the features in a file, or None with a warning if it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})["dpm_scales"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if described.pop("sha256") != _checksum(tensors, described):
            raise ValueError("its checksum is another")
        statistics = FeatureStatistics.of(int(described["number"]), tensors["mean"], tensors["root"])
        rows = tensors["rows"].numpy() if "rows" in tensors else None
        if statistics.dim != dim or (rows is not None and rows.shape != (statistics.number, dim)):
            raise ValueError(f"features of dimension {statistics.dim}, not {dim}")
        return FeatureSet(statistics, rows)
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        warnings.warn(f"{path} is damaged ({error}); the reference's features are computed again", stacklevel=3)
        return None


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return total.hexdigest()
