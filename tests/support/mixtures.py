"""Networks that return the exact posterior means of Gaussian images, with and without labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.targets import Clean
from support.oracles import GaussianData, coefficients, curves, gaussian_data, pixels, with_target
from support.reference import Array, Twin

NULL = 2
"""The label that means "no label"."""


class Mixture(nn.Module):
    """E[x_0 | x_t, label] and E[x_0 | x_t] of two Gaussians, in closed form for each DCT coefficient; sees c_in x_t."""

    def __init__(self, twin: Twin, classes: list[GaussianData], shares: list[float], data_std: float = 0.5) -> None:
        super().__init__()
        self.twin, self.classes, self.shares, self.data_std = twin, classes, shares, data_std
        self.calls = 0

    def estimate(self, u: Array, t: float, label: int) -> Array:
        signal, noise = curves(self.twin, t)
        each = [data.estimate(u, signal, noise) for data in self.classes]
        if label < NULL:
            return each[label]
        logs = []
        for data, share in zip(self.classes, self.shares, strict=True):
            variance = signal**2 * data.variance + noise**2
            logs.append(np.log(share) - ((u - signal * data.mean) ** 2 / variance + np.log(variance)).sum() / 2)
        weights = np.exp(np.array(logs) - max(logs))
        return np.asarray(sum(w * e for w, e in zip(weights / weights.sum(), each, strict=True)))

    def forward(self, seen: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None and labels.dtype == torch.int64
        self.calls += 1
        answers = []
        for x, one, label in zip(seen.numpy(), t.tolist(), labels.tolist(), strict=True):
            signal, noise = curves(self.twin, one)
            total = self.data_std**2 * (signal**2).mean() + (noise**2).mean()
            answers.append(self.estimate(coefficients(x) * np.sqrt(total), one, label))
        return torch.from_numpy(pixels(np.stack(answers)))


def mixture(twin: Twin, seed: int = 3) -> tuple[Mixture, Denoiser]:
    """Return the network and its denoiser for images drawn by a seed."""
    network = Mixture(twin, [gaussian_data(seed=seed), gaussian_data(seed=seed + 1)], [0.3, 0.7])
    return network, with_target(twin, Clean("none", clip=False), network)
