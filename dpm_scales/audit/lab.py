"""Quantities of an audit: a process on a small image, its curves at every scale, its laws as matrices on a ladder of
scales, and random paths."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dpm_scales.audit.dense import DenseProcess, Law, Posterior, eigen, entropy, largest, solve
from dpm_scales.audit.findings import Verdict
from dpm_scales.images import resize, to_range
from dpm_scales.metrics import entropy_increments
from dpm_scales.processes import Process

RUNGS = 8
"""Number of evenly spaced steps of the ladder, besides the first and the steepest ones."""

LIMIT = 5.0
"""Tolerance for results from random paths, in standard errors."""


@dataclass(frozen=True)
class Return:
    """Laws of the reverse process down the ladder, with the steps of `audit.reverse`.

    Attributes:
        posteriors: q(u_s | u_t, u_0), from the top rung down.
        given: laws of u_s given u_0, composed from the marginal at scale 1 and the posteriors, from rung 0 up.
        data: covariances of u_t over the data, from the forward chain, from rung 0 up.
        ideal, trained: covariances from the ideal and the trained steps, composed from the marginal at scale 1.
    """

    posteriors: list[Posterior]
    given: list[Law]
    data: list[Tensor]
    ideal: list[Tensor]
    trained: list[Tensor]


@dataclass(frozen=True)
class Gap:
    """Distance between two laws, and its tolerance."""

    value: float
    tolerance: float

    @property
    def closed(self) -> bool:
        return self.value <= self.tolerance

    @property
    def size(self) -> float:
        """Return the distance in units of the tolerance; inf for NaN."""
        return math.inf if math.isnan(self.value) else self.value / self.tolerance


class Lab:
    """One process on small grey images.

    Args:
        process: any process; it is copied, not modified.
        images: uint8 ``(B, C, H, W)``; scaled down to at most 6 x 9 pixels and converted to grey.
        seed: seed of the guidance image and the paths.
        samples: number of paths.
    """

    def __init__(self, process: Process, images: Tensor, seed: int = 0, samples: int = 1000) -> None:
        self.process = copy.deepcopy(process).cpu()
        self.seed, self.samples = seed, samples
        self.images = _small(images, self.process.value_range)
        self.size = (self.images.shape[-2], self.images.shape[-1])
        self.pixels = self.size[0] * self.size[1]
        self.generator = torch.Generator().manual_seed(seed)
        self.context = self.process.context(self.images[:1], self.generator)
        self.dense = DenseProcess(self.process, self.size, self.context)
        self.expands = not self.dense.operator.is_diagonal
        low, high = self.process.value_range
        self.span = high - low
        #: tolerances: of means in units of the value range; of covariances and entropies per pixel, relative
        self.mean_tolerance = max(1e-9, 20 * self.process.tolerance)
        self.noise_tolerance = 5e-3 if self.expands else 1e-7  # limited by the expansion of a square root

    # --- curves at every scale of the chain, (K + 1, N) ---------------------------------------------------------------

    @cached_property
    def ts(self) -> Tensor:
        """Return all scales of the chain, ``(K + 1,)``."""
        return torch.arange(self.process.num_scales + 1, dtype=torch.float64) / self.process.num_scales

    @cached_property
    def mu(self) -> Tensor:
        """Return the operator's eigenvalues, ascending, ``(N,)``; for osmosis, those of a constant guidance image."""
        return self.process.operator().eigenvalues(*self.size).expand(self.size).flatten().sort().values

    @cached_property
    def log_signal(self) -> Tensor:
        return self._table(self.process.signal(self.ts).log(self.mu))

    @cached_property
    def noise(self) -> Tensor:
        """Return gamma, ``(K + 1, N)``."""
        return self._table(self.process.noise_scale(self.ts, self.mu))

    @cached_property
    def alpha(self) -> Tensor:
        """Return the factor rho on the mean of each step of the chain, ``(K, N)``."""
        return self._table(self.process.step(self.ts[:-1], self.ts[1:]).rho(self.mu))

    @cached_property
    def beta(self) -> Tensor:
        """Return the standard deviation of the noise of each step, ``(K, N)``."""
        return self._table(self.process.step(self.ts[:-1], self.ts[1:]).transition_std(self.mu))

    def _table(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), -1).expand(len(values), self.pixels)

    @cached_property
    def increments(self) -> Tensor:
        """Return H(U_k | U_0) - H(U_{k-1} | U_0) in nats per pixel in closed form, ``(K,)``."""
        return entropy_increments(self.process, self.ts, self.size) / self.pixels

    # --- kinds of processes -------------------------------------------------------------------------------------------

    @property
    def noisy(self) -> bool:
        return self.process.has_noise()

    @property
    def blurs(self) -> bool:
        """Return whether pixels interact."""
        return bool(self.mu.max() > 0)

    @property
    def as_printed(self) -> Verdict:
        """Return the verdict for statements that hold as printed: in law if there is noise, otherwise exactly."""
        return Verdict.IN_LAW if self.noisy else Verdict.EXACTLY

    @cached_property
    def steady(self) -> Tensor:
        """Return the limit of infinite blur of the first image in pixels, ``(1, 1, H | 1, W | 1)``."""
        return self.process.steady_state(self.images[:1].mean((-2, -1)), self.context)

    @property
    def steady_pixels(self) -> Tensor:
        """Return the steady state as a vector, ``(N,)``."""
        return self.steady.expand(1, 1, *self.size).flatten()

    @property
    def guided(self) -> bool:
        """Return whether blur ends in a guidance image instead of a flat one, as in osmosis."""
        return self.steady.shape[-2:] == self.size

    @cached_property
    def white(self) -> Tensor:
        """Return the factors from whitened coordinates to pixels, ``(N,)``: the noise of a pixel over gamma."""
        if self.context is None or not self.guided:
            return torch.ones(self.pixels, dtype=torch.float64)
        return (self.context / self.context.mean()).double().flatten().sqrt()

    @property
    def scales_grey(self) -> bool:
        """Return whether noise replaces the signal at all eigenvalues, including that of the average grey value."""
        last = self.log_signal[-1, 0]
        return bool(last < -1e-6) and bool(last < self.noise[-1, 0].log())

    # --- laws as matrices ---------------------------------------------------------------------------------------------

    @cached_property
    def ladder(self) -> list[float]:
        """Return a few scales of the chain, including 0, 1 and both ends of the steps with least entropy increase."""
        last = self.process.num_scales
        numbers = {round(last * k / RUNGS) for k in range(RUNGS + 1)} | {min(1, last), min(2, last)}
        finite = self.increments.nan_to_num(nan=torch.inf)
        worst = int(finite.argmin())
        numbers |= {worst, worst + 1}
        return [k / last for k in sorted(numbers)]

    @property
    def steps(self) -> list[tuple[float, float]]:
        """Return the pairs of successive rungs (s, t), s < t."""
        return list(zip(self.ladder, self.ladder[1:], strict=False))

    @cached_property
    def marginals(self) -> list[Law]:
        """Return q(u_t | u_0) on the ladder."""
        return [self.dense.marginal(t) for t in self.ladder]

    @cached_property
    def transitions(self) -> list[Law]:
        """Return q(u_t | u_s) between successive rungs."""
        return [self.dense.transition(s, t) for s, t in self.steps]

    @cached_property
    def chain(self) -> list[Law]:
        """Return the laws given u_0 on the ladder, composed from the law at scale 0 and the transitions alone."""
        laws = [self.marginals[0]]
        for step in self.transitions:
            laws.append(step.after(laws[-1]))
        return laws

    def rotated(self) -> DenseProcess:
        """Return the process on images rotated by 90 degrees, with the context rotated too."""
        context = None if self.context is None else torch.rot90(self.context, 1, (-2, -1))
        return DenseProcess(self.process, (self.size[1], self.size[0]), context)

    def gap(self, a: Law, b: Law) -> Gap:
        """Return the distance between two laws in their means or in their covariances, whichever is larger."""
        mean = Gap(max(largest(a.matrix - b.matrix), largest(a.offset - b.offset) / self.span), self.mean_tolerance)
        spread = max(largest(a.covariance), largest(b.covariance), 1e-9 * float(self.noise.max()) ** 2)
        noise = Gap(largest(a.covariance - b.covariance) / spread if spread > 0 else 0.0, self.noise_tolerance)
        return max(mean, noise, key=lambda gap: gap.size)

    def widest(self, gaps: Sequence[Gap]) -> tuple[int, Gap]:
        """Return the index of the largest gap, and that gap."""
        index = max(range(len(gaps)), key=lambda k: gaps[k].size)
        return index, gaps[index]

    def spreads(self, ratio: float, error: float) -> bool:
        """Return whether the variance of draws agrees with the true one, from their ratio and its standard error."""
        return abs(ratio - 1) <= LIMIT * error + 2 * self.noise_tolerance

    def over_the_data(self, laws: Sequence[Law]) -> list[Tensor]:
        """Return the covariances of u_t, for laws of u_t given u_0 and the covariance `data_covariance` of u_0."""
        c = self.data_covariance
        return [law.matrix @ c @ law.matrix.T + law.covariance for law in laws]

    @cached_property
    def chain_entropy(self) -> list[float]:
        """Return H(U_t | U_0) in nats from the determinants of the covariances of the chain."""
        return [entropy(law.covariance) for law in self.chain]

    @cached_property
    def data_covariance(self) -> Tensor:
        """Return a model covariance of the data, ``(N, N)``: the images' variance, with correlation exp(-d / 4 px)."""
        rows, columns = torch.meshgrid(*(torch.arange(float(n)) for n in self.size), indexing="ij")
        place = torch.stack([rows.flatten(), columns.flatten()], 1).double()
        variance = self.images.var(unbiased=False).clamp(min=1e-2 * self.span**2)
        return variance * torch.exp(-torch.cdist(place, place) / 4)

    # --- the reverse process ------------------------------------------------------------------------------------------

    @cached_property
    def back(self) -> Return:
        """Return the laws of the reverse process."""
        ladder, c, data = self.ladder, self.data_covariance, self.over_the_data(self.chain)
        given, ideal, trained, posteriors = [self.marginals[-1]], [data[-1]], [data[-1]], []
        for k in range(len(ladder) - 1, 0, -1):
            posterior = self.dense.posterior(ladder[k - 1], ladder[k])
            posteriors.append(posterior)
            given.append(posterior.after(given[-1]))
            w = self.denoiser(data[k], k)
            unknown = c - w @ self.chain[k].matrix @ c
            step = posterior.keep + posterior.pull @ w
            ideal.append(step @ ideal[-1] @ step.T + posterior.covariance + posterior.pull @ unknown @ posterior.pull.T)
            trained.append(step @ trained[-1] @ step.T + posterior.covariance)
        return Return(posteriors, given[::-1], data, ideal[::-1], trained[::-1])

    def denoiser(self, total: Tensor, k: int) -> Tensor:
        """Return W of `audit.reverse` at rung k, where u_t has covariance `total`."""
        cross = self.data_covariance @ self.chain[k].matrix.T
        return solve(total, cross.T).T

    # --- random paths -------------------------------------------------------------------------------------------------

    @cached_property
    def start(self) -> Tensor:
        """Return the first image as a vector, ``(N,)``."""
        return self.images[0].flatten()

    @cached_property
    def paths(self) -> Tensor:
        """Return independent paths from the first image up the ladder, ``(T, M, N)``; a single path without noise."""
        number = self.samples if self.noisy else 1
        x_0 = self.images[:1].expand(number, -1, -1, -1)
        return self.process.trajectory(x_0, self.ladder, self.generator, self.context).flatten(2)

    @cached_property
    def samples_at_the_end(self) -> Tensor:
        """Return draws of `process.sample` at scale 1, directly from the first image, ``(M, N)``."""
        number = self.samples if self.noisy else 1
        x_0, generator = self.images[:1].expand(number, -1, -1, -1), torch.Generator().manual_seed(self.seed + 1)
        return self.process.sample(x_0, 1.0, generator, self.context).flatten(1)

    @cached_property
    def deviations(self) -> Tensor:
        """Return the paths minus the means of the marginals, ``(T, M, N)``."""
        return torch.stack([path - law.mean(self.start) for path, law in zip(self.paths, self.marginals, strict=True)])


def whitened(deviation: Tensor, covariance: Tensor) -> Tensor:
    """Return deviations ``(M, N)`` in coordinates of unit covariance; those in directions without noise become huge."""
    values, vectors = eigen(covariance)
    return deviation @ vectors / values.clamp(min=1e-12 * float(values.max())).sqrt()


def _small(images: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Return grey float64 images ``(B, 1, H, W)`` of at most 6 x 9 or 9 x 6 pixels."""
    height, width = images.shape[-2:]
    most = (6, 9) if width >= height else (9, 6)
    size = (min(height, most[0]), min(width, most[1]))
    return to_range(resize(images, size), value_range, torch.float64).mean(1, keepdim=True)
