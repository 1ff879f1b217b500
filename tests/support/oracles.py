"""Help to test the reverse process: images, scripted noise, a fake GPU, and optimal denoisers.

Data for which the optimal denoiser is known:

    GaussianData   independent Gaussian DCT coefficients: E[y_0 | y_t] is linear, coefficient by coefficient
    PointData      finitely many images with probabilities: E[y_0 | y_t] is their softmax average

Both use numpy, DCT coefficients by scipy, and the curves of `reference.Twin`, but nothing of the package. A process
without diffusion multiplies all coefficients by the same factor, so DCT coefficients suit it too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpm_scales.denoisers import BaseDenoiser, Denoiser
from dpm_scales.errors import UserError
from dpm_scales.operators import chebyshev
from dpm_scales.processes import Process
from dpm_scales.rng import CounterRNG
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.targets import Clean, Target
from support.reference import TWINS, Array, Twin, dct_basis

H, W = 3, 5

NOISY = [twin for twin in TWINS if twin.variance(1.0, np.zeros((1, 1))).any()]
BY_NAME = {twin.name: twin for twin in TWINS}
#: one of each member of the package
MEMBERS = ["vp-cosine", "ve-edm", "inverse-heat", "inverse-heat-0.1", "blurring", "chain", "homogeneous-log"]
NOISY_MEMBERS = MEMBERS[:-1]


def over(chosen: Sequence[Twin]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("twin", chosen, ids=lambda twin: twin.name)


def named(*names: str) -> list[Twin]:
    return [BY_NAME[name] for name in names]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int, seed: int = 0) -> Tensor:
    """Draw uniform values in [-1, 1], float64."""
    return 2 * torch.rand(shape, generator=generator(seed), dtype=torch.float64) - 1


def float64(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def close(actual: Any, expected: Any, atol: float = 1e-10, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(actual, expected, atol=atol, rtol=rtol)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """Expect a UserError of one line that contains all `words`."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert all(word in message for word in words), message


@contextmanager
def pretended_gpu(*modules: nn.Module, device: str = "cuda") -> Iterator[None]:
    """Fake a GPU: no arithmetic, but mixed devices and reads by the host raise; modules are moved, as by a trainer.

    Sweeps of Chebyshev series end after four terms, since all later ones do the same with the same shapes.
    """
    signed = chebyshev._signed
    short = mock.patch.object(chebyshev, "_signed", lambda c: signed(c[..., :4] if isinstance(c, Tensor) else c[:4]))
    with FakeTensorMode(allow_non_fake_inputs=True), short:
        for module in modules:
            module.to(device)
        yield


# --- DCT coefficients -------------------------------------------------------------------------------------------------


_basis = functools.cache(dct_basis)


def coefficients(x: Array) -> Array:
    """Return the orthonormal DCT-II of the last two axes."""
    return np.asarray(_basis(x.shape[-2]) @ x @ _basis(x.shape[-1]).T)


def pixels(u: Array) -> Array:
    """Invert `coefficients`."""
    return np.asarray(_basis(u.shape[-2]).T @ u @ _basis(u.shape[-1]))


def per_mode(function: Callable[[Array], Array], x: Tensor) -> Tensor:
    """Apply `function` to an image's DCT coefficients and return pixels."""
    return torch.from_numpy(pixels(function(coefficients(x.detach().numpy()))))


@functools.cache
def curves(twin: Twin, t: float, height: int = H, width: int = W) -> tuple[Array, Array]:
    """Return lambda_t and gamma_t of each DCT coefficient, ``(height, width)``."""
    mu = twin.mu(height, width)
    signal, noise = twin.signal(t, mu) * np.ones_like(mu), np.sqrt(twin.variance(t, mu).clip(0))
    signal.flags.writeable = noise.flags.writeable = False  # shared by all callers
    return signal, noise


def each(x: Tensor, t: float | Sequence[float], one: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Apply `one(image, t)` to each image, with one t for all or one per image."""
    if isinstance(t, Sequence):
        assert len(t) == len(x)
        return torch.cat([one(x[b : b + 1], v) for b, v in enumerate(t)])
    return one(x, t)


def scaled(twin: Twin, x_0: Tensor, t: float | Sequence[float]) -> Tensor:
    """Return lambda_t(L) x_0."""
    return each(x_0, t, lambda x, v: per_mode(lambda u: curves(twin, v, *x.shape[-2:])[0] * u, x))


def spread(twin: Twin, noise: Tensor, t: float | Sequence[float]) -> Tensor:
    """Return gamma_t(L) noise."""
    return each(noise, t, lambda x, v: per_mode(lambda u: curves(twin, v, *x.shape[-2:])[1] * u, x))


def noised(twin: Twin, x_0: Tensor, noise: Tensor, t: float | Sequence[float]) -> Tensor:
    """Return y_t, mode by mode."""
    return scaled(twin, x_0, t) + spread(twin, noise, t)


# --- data with a known denoiser ---------------------------------------------------------------------------------------


class Data(Protocol):
    """A distribution of images whose optimal denoiser is known."""

    def estimate(self, u: Array, signal: Array, noise: Array) -> Array:
        """Return E[u_0 | u_t] for coefficients ``(..., H, W)`` and curves ``(H, W)``."""


@dataclass(frozen=True)
class GaussianData:
    """Independent DCT coefficients of means and variances ``(H, W)``."""

    mean: Array
    variance: Array

    def estimate(self, u: Array, signal: Array, noise: Array) -> Array:
        gain = self.variance * signal / (signal**2 * self.variance + noise**2)
        return np.asarray(self.mean + gain * (u - signal * self.mean))

    def uncertainty(self, signal: Array, noise: Array) -> Array:
        """Return Var(u_0 | u_t)."""
        return np.asarray(self.variance * noise**2 / (signal**2 * self.variance + noise**2))

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Draw images ``(count, 1, H, W)``."""
        white = np.random.default_rng(seed).standard_normal((count, 1, *self.mean.shape))
        return torch.from_numpy(pixels(self.mean + np.sqrt(self.variance) * white))


@dataclass(frozen=True)
class PointData:
    """Images given by coefficients ``(N, H, W)``, drawn with the given probabilities."""

    points: Array
    probabilities: Array

    def estimate(self, u: Array, signal: Array, noise: Array) -> Array:
        if len(self.points) == 1:
            return np.broadcast_to(self.points[0], u.shape)
        distance = (((u[..., None, :, :] - signal * self.points) / noise) ** 2).sum((-2, -1))
        log_weight = np.log(self.probabilities) - distance / 2
        weight = np.exp(log_weight - log_weight.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        return np.asarray(np.einsum("...n,nhw->...hw", weight, self.points))


def gaussian_data(height: int = H, width: int = W, seed: int = 3) -> GaussianData:
    """Return means and variances that differ for each coefficient."""
    rng = np.random.default_rng(seed)
    return GaussianData(rng.normal(size=(height, width)), np.exp(rng.normal(size=(height, width))) / 2)


class OracleDenoiser(Denoiser):
    """lambda_s(L) E[y_0 | y_t], computed from the twin's curves, without network and target."""

    def __init__(self, twin: Twin, data: Data) -> None:
        super().__init__(nn.Identity(), twin.build(), Clean())
        self.twin, self.data = twin, data

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        size = y_t.shape[-2:]
        estimate = self.data.estimate(coefficients(y_t.numpy()), *curves(self.twin, float(t), *size))
        return torch.from_numpy(pixels(curves(self.twin, float(s), *size)[0] * estimate))


class Estimating(BaseDenoiser):
    """A denoiser without a network: subclasses give m_s by `predict_mean`, of an estimate that is not clipped."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process, self.target, self.spectrum = process, Clean("none", clip=False), DataSpectrum()


class Answer(nn.Module):
    """A network that returns a given answer and records its inputs."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output
        self.seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.seen.append((x, t, labels))
        return self.output


class TinyNetwork(nn.Module):
    """Smooth, and different at every pixel, scale and label: a stand-in for a U-Net, in the images' number format."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        shape = (channels, channels, 3, 3)
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.4, math.prod(shape)).reshape(shape))
        self.bias = nn.Parameter(torch.linspace(0.1, 0.3, channels))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        shift = t if labels is None else t + labels
        x = F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=1)
        return torch.tanh(x * torch.cos(shift)[:, None, None, None])


# --- noise ------------------------------------------------------------------------------------------------------------


class ScriptedNoise(CounterRNG):
    """Return the listed draws, one after another."""

    def __init__(self, draws: Sequence[Tensor]) -> None:
        super().__init__(0, draws[0].shape[0] if draws else 1)
        self.draws = list(draws)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        draw = self.draws.pop(0)
        assert draw.shape[1:] == shape and draw.dtype == dtype
        return draw


class Hadamard(ScriptedNoise):
    """Sign vectors, as many as pixels, whose outer products average to the identity: exact traces.

    Args:
        count: number of images.
        pixels: number of pixels of an image with its channels, a power of 2.
        draws: normal draws, as for `ScriptedNoise`.
    """

    def __init__(self, count: int, pixels: int, draws: Sequence[Tensor] = ()) -> None:
        CounterRNG.__init__(self, 0, count)
        self.draws = list(draws)
        self._rows, self._next = scipy.linalg.hadamard(pixels), 0

    def uniform(self, shape: tuple[int, ...] = ()) -> Tensor:
        signs = self._rows[self._next % len(self._rows)].reshape(1, *shape)
        self._next += 1
        return torch.from_numpy(0.5 + 0.25 * signs).expand(self.count, *shape)


def with_target(twin: Twin, target: Target, network: nn.Module, data_std: float = 0.5) -> Denoiser:
    return Denoiser(network, twin.build(), target, data_std).double()
