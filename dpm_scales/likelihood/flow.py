r"""Likelihood under the probability flow, for every process with noise and any operator.

With kappa = lambda / gamma and z = gamma_t^{-1}(L) y_t the flow that has the marginals of the process is

    dz = y_0-hat(y_t) dkappa,      for each eigenvalue its own kappa_t(mu)

(for L = 0 the ODE of Song et al. 2021, Eq. (13); the exponential factors of the linear part are divided out). So

    log p(z_a) = log p(z_b) + int tr(dz' / dz) dt,     tr = tr(kappa'(L) d y_0-hat / dz),     a < b

and a step from t_a to t_b is a trapezoid in kappa, for both the image and the trace, of second order:

    z_b = z_a + (kappa_b - kappa_a)(L) (y_0-hat_a + y_0-hat_b) / 2,     y_0-hat_b at the end of the Euler step (Heun).

The trace of f(L) J is estimated without bias by <f(L) e, J e> with random signs e (Hutchinson; Grathwohl et al. 2019),
where J e enters through its adjoint, one backward pass. The error of the steps remains: unlike the variational bound,
this number is not a bound until more steps no longer change it.

The flow goes down to t_1, the first scale of the chain. From there to the 8-bit image the decoder of the variational
bound is used, so that, up to the steps' error,

    -log P(x_0) <= E_eps [ log N(eps) - log p(z_{t_1}) - log P(x_0 | y_{t_1}) ]:

a variational dequantisation. Conventions matter: values from uniform dequantisation, or truncated at another t, differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpm_scales.denoisers import BaseDenoiser, WithoutNetwork
from dpm_scales.errors import UserError, is_whole, require, require_number
from dpm_scales.likelihood.bound import Likelihood, OnStep, check_noise
from dpm_scales.likelihood.decoder import check_decoder, decode
from dpm_scales.likelihood.start import Start, start_law
from dpm_scales.operators import Operator, SpectralFunction
from dpm_scales.priors import Prior
from dpm_scales.processes import Context, Process, Step
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers.grids import logsnr_grid, tables_of
from dpm_scales.targets import NextScale

MOST_STEPS = 10**6
"""Largest number of steps, whose tables have to fit into memory."""


def flow_scales(process: Process, steps: int, device: torch.device | str | None = None) -> Tensor:
    """Return ``(steps + 1,)`` scales from 1 to 1 / num_scales, evenly spaced in logSNR if noise grows, else in t."""
    try:
        return logsnr_grid(process, steps + 1, device)[:-1]
    except UserError:
        return torch.linspace(1.0, 1 / process.num_scales, steps + 1, dtype=torch.float64, device=device)


class FlowLikelihood:
    """The likelihood of each image under the probability flow.

    Args:
        denoiser, prior, decoder_std, levels: as for `VariationalBound`.
        steps: number of ODE steps, each of two evaluations and two backward passes per probe.
        probes: number of random sign vectors for each trace.

    Raises: UserError for a process without noise, a network that predicts the next scale only, and values out of range.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        prior: Prior,
        steps: int = 64,
        probes: int = 1,
        decoder_std: float | None = None,
        levels: int | None = 256,
    ) -> None:
        process = denoiser.process
        require_number("likelihood: steps", steps, 1, MOST_STEPS, whole=True)
        require(is_whole(probes, 1), f"likelihood: probes must be a whole number >= 1, got {probes!r}")
        check_decoder(decoder_std, levels)
        require(
            not isinstance(denoiser.target, NextScale),
            "the flow's likelihood needs the clean image at every scale, and the finer-scale target predicts the next "
            "scale only; take the variational bound",
        )
        require(process.num_scales > 1, "the flow goes from t = 1 to t = 1 / num_scales, and num_scales is 1")
        check_noise(process, torch.ones((), dtype=torch.float64, device=tables_of(process)) / process.num_scales)
        self.scales = flow_scales(process, steps, tables_of(process))
        denoiser.target.check_scales(process, self.scales)
        with process.rehearsal((type(self), type(denoiser.target), *self.scales.tolist()), 1) as new:
            if new:
                step, absent = Step(process, self.scales[1:], self.scales[:-1]), WithoutNetwork(denoiser)
                y = torch.zeros(steps, 1, 1, 1, dtype=torch.float64, device=self.scales.device)
                absent.predict_mean(absent.predict_mean(y, step.t, step.s), step.s, step.s)
                for factor in _factors(step):
                    process.operator().apply(factor, y)
        self.denoiser, self.prior, self.probes = denoiser, prior, probes
        self.decoder_std, self.levels = decoder_std, levels

    @torch.no_grad()
    def __call__(
        self, x_0: Tensor, noise: CounterRNG, labels: Tensor | None = None, on_step: OnStep = lambda number: None
    ) -> Likelihood:
        """Return one draw for each image, whose expectation is the bound above up to the steps' error, O(steps^-2).

        Args and Raises: as for `VariationalBound`.
        """
        denoiser, process = self.denoiser, self.denoiser.process
        start, context = start_law(self.prior, process, x_0, noise)
        operator, scales = start.operator, self.scales.to(x_0.device)
        finest, white = scales[-1], noise.normal(tuple(x_0.shape[1:]), x_0.dtype)
        y = operator.combine(
            (process.signal(finest), operator.to_white(x_0)), (lambda mu: process.noise_scale(finest, mu), white)
        )
        last, traces = follow_flow(denoiser, start, y, scales, noise, context, labels, self.probes, on_step)
        square = white.to(torch.float64).square().flatten(1).sum(1)
        return Likelihood(
            context=start.context_cost,
            prior=last - 0.5 * (square + white[0].numel() * math.log(2 * math.pi)),
            steps=-traces,
            decoder=decode(denoiser, operator, y, finest, x_0, context, labels, self.decoder_std, self.levels),
            scales=scales,
        )


@torch.no_grad()
def follow_flow(
    denoiser: BaseDenoiser,
    start: Start,
    y: Tensor,
    scales: Tensor,
    noise: CounterRNG,
    context: Context = None,
    labels: Tensor | None = None,
    probes: int = 1,
    on_step: OnStep = lambda number: None,
) -> tuple[Tensor, Tensor]:
    """Integrate the flow from ``scales[-1]`` up to ``scales[0] = 1``, and return the log densities.

    Args:
        y: ``(B, C, H, W)`` in whitened coordinates, at ``scales[-1]``.
        scales: ``(n + 1,)``, descending.

    Returns: float64 ``(B,)``, -log p(z_1) at the end of the flow under `start`, and ``(B, n)``, the integral of the
        trace over each interval of `scales`. The first minus the sum of the second is -log p(z) of y, and adding
        sum_j log gamma_j gives -log p(y).
    """
    process, operator, steps = denoiser.process, start.operator, len(scales) - 1
    traces = torch.zeros(len(y), steps, dtype=torch.float64, device=y.device)
    denoisers = denoiser.for_steps(scales[:-1], scales[1:], labels)
    for i in range(steps):
        k = steps - 1 - i
        b, a, step_denoiser = scales[k], scales[k + 1], denoisers[k]
        growth, own, ahead = _factors(Step(process, a, b))
        m_a, first = _with_trace(step_denoiser, operator, own, y, a, a, noise, context, labels, probes)
        euler = operator.combine((growth, y), (ahead, m_a))
        m_b, second = _with_trace(step_denoiser, operator, ahead, euler, b, a, noise, context, labels, probes)
        y = euler + operator.apply(ahead, (m_b - m_a) / 2)
        traces[:, k] = (first + second) / 2
        on_step(i)
    return start.negative_log_density(y), traces


def _factors(step: Step) -> tuple[SpectralFunction, SpectralFunction, SpectralFunction]:
    """Return g = gamma_b / gamma_a, (kappa_b - kappa_a) / kappa_a, and their product, for a step from a up to b."""

    def growth(mu: Tensor) -> Tensor:
        return 1 / step.noise_ratio(mu)

    def own(mu: Tensor) -> Tensor:
        return torch.expm1(-step.half_log_snr_gain(mu))

    return growth, own, lambda mu: growth(mu) * own(mu)


def _with_trace(
    denoiser: BaseDenoiser,
    operator: Operator,
    f: SpectralFunction,
    y: Tensor,
    t: Tensor,
    s: Tensor,
    noise: CounterRNG,
    context: Context,
    labels: Tensor | None,
    probes: int,
) -> tuple[Tensor, Tensor]:
    """Return m_s at y, and the estimate of tr(f(L) dm_s / dy), float64 ``(B,)``."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        m = denoiser.predict_mean(y, t, s, context, labels)
        total = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        for i in range(probes):
            signs = torch.where(noise.uniform(tuple(y.shape[1:])) < 0.5, -1.0, 1.0).to(y.dtype)
            (row,) = torch.autograd.grad(m, y, operator.apply(f, signs), retain_graph=i < probes - 1)
            total = total + (row * signs).to(torch.float64).flatten(1).sum(1)
    return m.detach(), total / probes
