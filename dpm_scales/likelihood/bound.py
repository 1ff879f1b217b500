r"""The variational bound on -log P(x_0), for every process with noise.

Scales 1 = t_n > ... > t_1 > 0 are the latent variables of a chain from the prior to the image. With two reverse chains,

    ancestral      p(y_s | y_t) = q(y_s | y_t, y_0-hat(y_t)), the posterior with the estimate in place of the image;
                   inference is the process itself, one Markov chain           Ho et al. 2020, Eq. (5)
    dissipation    p(y_s | y_t) = N(m_s(y_t), r^2 gamma_s^2); inference draws scales independently, from q(y_s | x_0)
                                                                               Rissanen et al. 2023, Eq. (8)

the bound is, in nats and on average over x_0's latent variables,

    -log P(x_0) <= context + prior + sum over steps (t, s > 0) of KL_ts  -  log P(x_0 | y_{t_1}),

    ancestral      KL_ts = 1/2 < d, (tau / gamma_s^2)(L) d >                   d = lambda_s(L) y_0 - m_s(y_t)
    dissipation    KL_ts = 1/2 < d, (r gamma_s)^{-2}(L) d > + n/2 (1 / r^2 - 1 + log r^2)

since the covariances of both are functions of L; tau / gamma_s^2 = (SNR_s - SNR_t) / lambda_s^2. That function is
smooth, unlike the posterior's standard deviation, whose square root at mu = 0 an expansion would miss. Each chain's
bound applies to the images drawn by the sampler of its name, with the decoder's noise at the end; other samplers have
other likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpm_scales.denoisers import BaseDenoiser, WithoutNetwork
from dpm_scales.errors import is_whole, require, require_choice, require_number
from dpm_scales.likelihood.decoder import check_decoder, decode
from dpm_scales.likelihood.start import start_law
from dpm_scales.moments import wiener_error
from dpm_scales.operators import HeatOperator, Operator, SpectralFunction
from dpm_scales.priors import Prior
from dpm_scales.processes import Process, Step
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers.grids import tables_of, uniform_grid

REVERSE = ("ancestral", "dissipation")

OnStep = Callable[[int], None]

_DCT = HeatOperator()


@dataclass(frozen=True)
class Likelihood:
    """Terms of (a bound on) -log P(x_0) for each image, float64, in nats; `total` is their sum."""

    #: ``(B,)``, 0 without a context
    context: Tensor
    #: ``(B,)``, from scale 1
    prior: Tensor
    #: ``(B, n)``, between successive `scales`
    steps: Tensor
    #: ``(B,)``, from the finest scale to the image
    decoder: Tensor
    #: ``(n + 1,)``, from 1 down to the finest scale
    scales: Tensor
    #: ``(B, n, bands)``, `steps` split by frequency band, if requested; they add up to `steps`
    bands: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """Return the sum of all terms, ``(B,)``."""
        return self.context + self.prior + self.steps.sum(1) + self.decoder


def check_noise(process: Process, finest: Tensor) -> None:
    """Raise UserError unless latent variables have a density at every scale down to the finest."""
    name = type(process).__name__
    mu = process.operator().eigenvalues(64, 64, finest.device).flatten()
    require(
        process.has_noise() and bool(torch.isfinite(process.log_noise_scale(finest, mu)).all()),
        f"{name} has no noise at scale t={float(finest):.4g}: its images have no density, and no likelihood; "
        "take a process with noise (heat for homogeneous, inverse_osmosis for osmosis)",
    )


class VariationalBound:
    """The variational bound on -log P(x_0) of each image.

    Args:
        denoiser, prior: the model.
        steps: number of steps of the chain, between equally spaced scales; None for all scales of the process.
        draws: number of steps evaluated for each image: same expectation, more variance; None for all. Steps are
            drawn, stratified, in proportion to the term that linear filtering would leave.
        reverse: "ancestral" or "dissipation".
        noise_ratio: r of the dissipation chain.
        decoder_std: standard deviation of the decoder, in whitened coordinates and units of the value range; None for
            `wiener_std`.
        levels: number of values a pixel can have, see `negative_log_likelihood`.
        num_bands: number of frequency bands into which the steps' terms are split, by the DCT in whitened coordinates,
            equally wide in the square root of the Laplacian's eigenvalues; 0 for none. If the operator mixes
            frequencies, as in osmosis, their common part is divided between them, and a term can be negative.

    Raises: UserError for a process without noise, and for invalid arguments.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        prior: Prior,
        steps: int | None = None,
        draws: int | None = None,
        reverse: str = "ancestral",
        noise_ratio: float = 1.25,
        decoder_std: float | None = None,
        levels: int | None = 256,
        num_bands: int = 0,
    ) -> None:
        process = denoiser.process
        count = process.num_scales if steps is None else steps
        ok = is_whole(count, 1) and count <= process.num_scales
        require(
            ok, f"likelihood: steps must be whole, from 1 to num_scales={process.num_scales}, or null, got {steps!r}"
        )
        ok = draws is None or is_whole(draws, 1)
        require(ok, f"likelihood: draws must be a whole number >= 1 or null, got {draws!r}")
        require(is_whole(num_bands, 0), f"likelihood: num_bands must be a whole number >= 0, got {num_bands!r}")
        require_choice("reverse chain", reverse, REVERSE, "likelihood")
        require_number("likelihood: noise_ratio", noise_ratio, 1e-6)
        check_decoder(decoder_std, levels)
        self.scales = uniform_grid(process, count, tables_of(process))
        check_noise(process, self.scales[-2])
        denoiser.target.check_scales(process, self.scales)
        self.denoiser, self.prior, self.draws, self.num_bands = denoiser, prior, draws, num_bands
        self.decoder_std, self.levels = decoder_std, levels
        self._weight = _Weight(process, reverse, noise_ratio)
        key = (type(self), reverse, noise_ratio, type(denoiser.target), *self.scales.tolist())
        with process.rehearsal(key, 1) as new:
            if new and count > 1:
                chain = Step(process, self.scales[1:-1], self.scales[:-2])
                y = torch.zeros(count - 1, 1, 1, 1, dtype=torch.float64, device=self.scales.device)
                WithoutNetwork(denoiser).predict_mean(y, chain.t, chain.s)
                self._weight.divergence(process.operator(), chain, y, None)

    @torch.no_grad()
    def __call__(
        self, x_0: Tensor, noise: CounterRNG, labels: Tensor | None = None, on_step: OnStep = lambda number: None
    ) -> Likelihood:
        """Return one draw of the bound for each image, whose expectation bounds -log P(x_0).

        Where each image guides itself (`Process.condition`) it bounds -log P(x_0 | v). Labels, if any, are conditions.

        Args:
            x_0: images ``(B, C, H, W)`` in the process's value range.
            noise: one stream for each image, so that an image's result does not depend on its batch.
            labels: ``(B,)`` int64 or None.
            on_step: called with the number of each finished evaluation.

        Raises: UserError for a prior whose density is not known, and for images that do not fit it.
        """
        denoiser, process, weight = self.denoiser, self.denoiser.process, self._weight
        start, context = start_law(self.prior, process, x_0, noise)
        operator = start.operator
        bands = _band_matrix(x_0, self.num_bands) if self.num_bands else None
        scales = self.scales.to(x_0.device)
        y_0, size, count = operator.to_white(x_0), tuple(x_0.shape[1:]), len(scales) - 2

        def at(t: Tensor) -> Tensor:
            return process.perturb(y_0, t, noise.normal(size, x_0.dtype), operator)

        def term(t: Tensor, s: Tensor) -> Tensor:
            m = denoiser.predict_mean(at(t), t, s, context, labels)
            difference = operator.apply(process.signal(s), y_0) - m
            return weight.divergence(operator, Step(process, s, t), difference, bands)

        prior_term = start.divergence(operator.apply(process.signal(scales[0]), y_0))
        width = 1 if bands is None else self.num_bands
        terms = torch.zeros(len(x_0), count, width, dtype=torch.float64, device=x_0.device)
        if self.draws is None or self.draws >= count:
            steps = scales.unbind()
            with process.kept_curves():
                for i in range(count):
                    terms[:, i] = term(steps[i], steps[i + 1])
                    on_step(i)
        else:
            shares = _shares(denoiser, weight, scales, x_0)
            for i in range(self.draws):
                place = (i + noise.uniform()) / self.draws
                index = torch.searchsorted(shares.cumsum(0), place).clamp(max=count - 1)
                share = self.draws * shares.take(index)
                values = term(scales.take(index), scales.take(index + 1)) / share[:, None]
                terms.scatter_add_(1, index[:, None, None].expand(-1, 1, width), values[:, None])
                on_step(i)
        finest = scales[-2]
        return Likelihood(
            context=start.context_cost,
            prior=prior_term,
            steps=terms.sum(2),
            decoder=decode(denoiser, operator, at(finest), finest, x_0, context, labels, self.decoder_std, self.levels),
            scales=scales[:-1],
            bands=None if bands is None else terms,
        )


@dataclass(frozen=True)
class _Weight:
    """The function of L that weights the error of a step, and the constant added to it."""

    process: Process
    reverse: str
    ratio: float

    def function(self, step: Step) -> SpectralFunction:
        if self.reverse == "ancestral":
            return lambda mu: step.tau(mu) * torch.exp(-2 * self.process.log_noise_scale(step.s, mu))
        return lambda mu: torch.exp(-2 * self.process.log_noise_scale(step.s, mu)) / self.ratio**2

    @property
    def excess(self) -> float:
        """Return the cost, in nats per pixel, of noise that differs from the posterior's."""
        return 0.0 if self.reverse == "ancestral" else 0.5 * (1 / self.ratio**2 - 1 + 2 * math.log(self.ratio))

    def divergence(self, operator: Operator, step: Step, difference: Tensor, bands: Tensor | None) -> Tensor:
        """Return KL_ts by bands, ``(B, bands)``; a single band for None.

        With P_b the projection onto band b, <d, f(L) d> = sum_b <P_b d, f(L) d> for any L.
        """
        # float64: the weight spans many orders of magnitude, and multiplies tiny remainders of d
        d = difference.to(torch.float64)
        weighted = operator.apply(self.function(step), d)
        if bands is None:
            return 0.5 * (d * weighted).flatten(1).sum(1, keepdim=True) + d[0].numel() * self.excess
        terms = (0.5 * _DCT.analysis(d) * _DCT.analysis(weighted) + self.excess).sum(1)
        return terms.flatten(1) @ bands


def _shares(denoiser: BaseDenoiser, weight: _Weight, scales: Tensor, like: Tensor) -> Tensor:
    """Return the probability that a draw evaluates each step, ``(n,)``: its expected share of the sum of terms."""
    process = denoiser.process
    mu = process.operator().eigenvalues(like.shape[-2], like.shape[-1], scales.device)
    step = Step(process, scales[1:-1], scales[:-2])
    uncertain = wiener_error(step.signal_t(mu), denoiser.spectrum.on(mu), step.noise_t(mu) ** 2)
    left = weight.function(step)(mu) * step.signal_s(mu) ** 2 * uncertain
    terms = 0.5 * left.expand(len(step.s), 1, *mu.shape).mean((-3, -2, -1)) + weight.excess
    return 0.9 * terms / terms.sum() + 0.1 / len(terms)  # no probability is near 0, however wrong the spectrum


def _band_matrix(like: Tensor, number: int) -> Tensor:
    """Return the band of each DCT coefficient, one-hot: ``(H * W, number)``, float64."""
    mu = _DCT.eigenvalues(like.shape[-2], like.shape[-1], like.device).flatten()
    largest = mu.max().clamp(min=1e-30)
    band = ((mu / largest).sqrt() * number).long().clamp(max=number - 1)
    return torch.nn.functional.one_hot(band, number).to(torch.float64)
