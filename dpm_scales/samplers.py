r"""One loop over pairs of scales (t, s), from 1 to 0, for every process.

    y_s = m_s + a (y_t - rho m_s) + b eps'          a, b, rho functions of L; m_s = lambda_s(L) y_0-hat

| sampler | a | b | source |
|---|---|---|---|
| Ancestral | gamma_s sqrt(1 - tau) / gamma_t | gamma_s sqrt(tau) | Ho et al. 2020 |
| DDIM(eta) | gamma_s sqrt(1 - eta^2 tau) / gamma_t | eta gamma_s sqrt(tau) | Song et al. 2021, Eq. (16) |
| Heun | gamma_s / gamma_t, then a second evaluation at s | 0 | Karras et al. 2022, Algorithm 1 |
| Dissipation | 0 | delta | Rissanen et al. 2023, Algorithm 2 |
| Cold | 1 | 0 | Bansal et al. 2022, Algorithm 2 |

The last step returns m_0 without noise.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.errors import UserError, is_whole, require, suggest
from dpm_scales.noise import NoiseSource
from dpm_scales.operators import PixelOperator
from dpm_scales.priors import Prior
from dpm_scales.processes import Context, Process, Step
from dpm_scales.schedules import is_number, require_positive
from dpm_scales.targets import MAX_DIVISION, FinerScale, steepest_blur

GRIDS = ("uniform", "karras")
OnStep = Callable[[int, Tensor], None]


def _tables(process: Process) -> torch.device | None:
    """Where the curves of a process are: grids are made there, before they are moved to the images."""
    return next((buffer.device for buffer in process.buffers()), None)


def uniform_grid(process: Process, steps: int, device: torch.device | str | None = None) -> Tensor:
    """``steps + 1`` scales from 1 to 0, equally spaced, each a multiple of 1 / num_scales; float64."""
    k = torch.linspace(process.num_scales, 0, steps + 1, dtype=torch.float64, device=device)
    return k.round() / process.num_scales


def karras_grid(process: Process, steps: int, rho: float = 7.0, device: torch.device | str | None = None) -> Tensor:
    """EDM's grid: (gamma / lambda)^(1/rho) equally spaced from t = 1 to k = 1, then 0 (Karras et al. 2022, Eq. (5)).

    Raises: UserError if gamma / lambda does not grow strictly, so that no t belongs to a noise level.
    """
    tables = _tables(process)
    mu = torch.zeros((), dtype=torch.float64, device=tables)

    def level(t: Tensor) -> Tensor:
        return torch.exp(-0.5 * process.log_snr(t, mu)).reshape(t.shape)

    low = torch.full((steps,), 1 / process.num_scales, dtype=torch.float64, device=tables)
    high = torch.ones_like(low)
    smallest, largest = level(low[:1]), level(high[:1])
    if not bool(largest > smallest * (1 + 1e-6)) or not bool(torch.isfinite(largest)):
        raise UserError(
            f"the karras grid needs noise that grows with t, and that of {type(process).__name__} does not; "
            "set sampler.grid=uniform"
        )
    progress = torch.linspace(0, 1, steps, dtype=torch.float64, device=tables) if steps > 1 else torch.zeros_like(low)
    wanted = (largest ** (1 / rho) + progress * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho
    for _ in range(60):  # bisection: to the last bit of a float64
        middle = (low + high) / 2
        above = level(middle) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    ts = (low + high) / 2
    ts[0] = 1.0
    return torch.cat([ts, torch.zeros_like(ts[:1])]).to(device)


class Sampler:
    """The loop; members give one step.

    Args:
        steps: number of steps, at most the process's num_scales; None for all of them.
        grid: "uniform" in t, or "karras" (EDM's, in the noise level).
        rho: exponent of the karras grid.
    """

    #: may be used where the network knows only the next finer scale
    one_scale_at_a_time = True

    def __init__(self, steps: int | None = None, grid: str = "uniform", rho: float = 7.0) -> None:
        require(steps is None or is_whole(steps, 1), f"steps must be a whole number >= 1 or null, got {steps!r}")
        if grid not in GRIDS:
            raise UserError(f"unknown grid {grid!r}: {suggest(str(grid), GRIDS)}")
        require_positive(self, rho=rho)
        self.steps, self.grid, self.rho = steps, grid, float(rho)

    def scales(self, process: Process, device: torch.device | str | None = None) -> Tensor:
        """``(steps + 1,)`` scales from 1 down to 0. Raises UserError for more steps than scales."""
        steps = process.num_scales if self.steps is None else self.steps
        require(
            steps <= process.num_scales,
            f"steps={steps} exceeds the process's num_scales={process.num_scales}; lower steps",
        )
        if self.grid == "karras":
            return karras_grid(process, steps, self.rho, device)
        return uniform_grid(process, steps, device)

    def check(self, denoiser: Denoiser) -> None:
        """Raise UserError, before any work, if this sampler can't run with this denoiser."""
        scales = self.scales(denoiser.process, _tables(denoiser.process))
        if isinstance(denoiser.target, FinerScale):
            if not self.one_scale_at_a_time:
                raise UserError(
                    f"sampler {type(self).__name__} looks at other scales than the next one, which the finer-scale "
                    "target does not know; use sampler=dissipation or ancestral"
                )
            require(self.grid == "uniform", "the finer-scale target needs sampler.grid=uniform")
        denoiser.target.check_scales(denoiser.process, scales)

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        prior: Prior,
        noise: NoiseSource,
        size: tuple[int, int, int],
        labels: Tensor | None = None,
        scales: Tensor | None = None,
        on_step: OnStep | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw images from the prior at scale 1 to scale 0.

        Args:
            noise: one stream per sample; B is its count.
            size: (C, H, W).
            labels: ``(B,)`` int64 or None.
            scales: another grid than the sampler's own, descending to 0; whoever gives one has called `check`.
            on_step: called with the index of each finished step and the image there (pixels).

        Returns: ``(B, C, H, W)`` in pixels (the process's value range, not clipped).
        Raises: UserError if this sampler can't run with this denoiser.
        """
        if scales is None:
            self.check(denoiser)
        y, context = prior.sample(denoiser.process, noise, size, dtype)
        return self.reverse(denoiser, y, noise, context, labels, scales, on_step)

    @torch.no_grad()
    def reverse(
        self,
        denoiser: Denoiser,
        y: Tensor,
        noise: NoiseSource,
        context: Context = None,
        labels: Tensor | None = None,
        scales: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """The loop itself, from y (white coordinates) at ``scales[0]``; see `sample`."""
        operator = denoiser.process.operator(context)
        if scales is None:
            scales = self.scales(denoiser.process, y.device)
        last = len(scales) - 2
        for i in range(last + 1):
            t, s = scales[i], scales[i + 1]
            m = denoiser.clean(y, t, s, context, labels)
            y = m if i == last else self.step(denoiser, y, m, t, s, noise, context, labels)
            if on_step is not None:
                on_step(i, operator.to_pixels(y))
        return operator.to_pixels(y)

    @abstractmethod
    def step(
        self,
        denoiser: Denoiser,
        y: Tensor,
        m: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource,
        context: Context,
        labels: Tensor | None,
    ) -> Tensor:
        """y_s from y_t and m_s."""


class DDIM(Sampler):
    """From deterministic (eta = 0: the probability-flow ODE, exact in the posterior's mean) to ancestral (eta = 1)."""

    def __init__(self, eta: float = 0.0, steps: int | None = 50, grid: str = "uniform", rho: float = 7.0) -> None:
        super().__init__(steps, grid, rho)
        require(is_number(eta) and 0 <= eta <= 1, f"eta must lie in [0, 1], got {eta!r}")
        self.eta = float(eta)

    def step(
        self,
        denoiser: Denoiser,
        y: Tensor,
        m: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource,
        context: Context,
        labels: Tensor | None,
    ) -> Tensor:
        step = Step(denoiser.process, s, t)
        square = self.eta**2

        def keep(mu: Tensor) -> Tensor:
            # 1 - eta^2 tau with tau = 1 - exp(-2h), kept apart from cancellation where tau is nearly 1
            rest = (1 - square) + square * torch.exp(-2 * step.half_log_snr_gain(mu).clamp(min=0))
            return step.noise_ratio(mu) * rest.sqrt()

        terms = [(keep, y), (lambda mu: 1 - keep(mu) * step.rho(mu), m)]
        if self.eta > 0:
            white = noise.normal(tuple(y.shape[1:]), y.dtype)
            terms.append((lambda mu: self.eta * step.posterior_std(mu), white))
        return denoiser.process.operator(context).combine(*terms)


class Ancestral(DDIM):
    """The reverse chain with the posterior's own noise: DDIM with eta = 1."""

    def __init__(self, steps: int | None = None, grid: str = "uniform", rho: float = 7.0) -> None:
        super().__init__(1.0, steps, grid, rho)


class Heun(DDIM):
    """Second order on the probability-flow ODE: a DDIM step, then a correction with the clean image seen at its end.

    y_s += w(h) (m_s(y_s) - m_s(y_t)), h = (l_s - l_t) / 2, with 2 steps - 1 evaluations in all and

    - variable="noise":  w = (exp(h) - 1) / 2, the trapezoid in gamma / lambda, exactly EDM's;
    - variable="logsnr": w = 1 - (1 - exp(-h)) / h, the exponential integrator of the same order: bounded where a step
      spans many nats, as it does at the high frequencies of a blur;
    - variable=None: "noise" where nothing blurs, else "logsnr".

    Where scale s has no noise there is nothing left to correct in "noise", as in EDM's last step.
    """

    one_scale_at_a_time = False
    variables = ("noise", "logsnr")

    def __init__(
        self, steps: int | None = 18, grid: str = "karras", rho: float = 7.0, variable: str | None = None
    ) -> None:
        super().__init__(0.0, steps, grid, rho)
        if variable is not None and variable not in self.variables:
            raise UserError(f"unknown variable {variable!r}: {suggest(str(variable), self.variables)}, or null")
        self.variable = variable

    def check(self, denoiser: Denoiser) -> None:
        super().check(denoiser)
        process = denoiser.process
        if self._in_noise(process):
            blur = steepest_blur(process, self.scales(process, _tables(process)))
            require(
                blur <= math.log(MAX_DIVISION),
                f"Heun in the noise level amplifies what a step of {type(process).__name__} has blurred away, here by "
                f"1e{blur / math.log(10):.0f}; set sampler.variable=logsnr (or null)",
            )

    def _in_noise(self, process: Process) -> bool:
        return self.variable == "noise" or (self.variable is None and process.blur is None)

    def step(
        self,
        denoiser: Denoiser,
        y: Tensor,
        m: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource,
        context: Context,
        labels: Tensor | None,
    ) -> Tensor:
        first = super().step(denoiser, y, m, t, s, noise, context, labels)
        step = Step(denoiser.process, s, t)
        in_noise = self._in_noise(denoiser.process)

        def weight(mu: Tensor) -> Tensor:
            h = step.half_log_snr_gain(mu)
            if in_noise:
                return torch.where(torch.isinf(h), 0.0, torch.expm1(h) / 2)
            safe = h.clamp(min=1e-8)
            return torch.where(h > 1e-4, 1 + torch.expm1(-safe) / safe, h / 2)

        change = denoiser.clean(first, s, s, context, labels) - m
        return first + denoiser.process.operator(context).apply(weight, change)


class Dissipation(Sampler):
    """IHDM's: y_s = m_s + delta eps', delta = `noise_ratio` gamma_s.

    Args:
        noise_ratio: delta / sigma, published 1.25; samples collapse near 2.
        steps: None for all scales.
    """

    def __init__(self, noise_ratio: float = 1.25, steps: int | None = None, grid: str = "uniform") -> None:
        super().__init__(steps, grid)
        require(is_number(noise_ratio) and noise_ratio >= 0, f"noise_ratio must be >= 0, got {noise_ratio!r}")
        self.noise_ratio = float(noise_ratio)

    def step(
        self,
        denoiser: Denoiser,
        y: Tensor,
        m: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource,
        context: Context,
        labels: Tensor | None,
    ) -> Tensor:
        white = noise.normal(tuple(y.shape[1:]), y.dtype)
        operator = denoiser.process.operator(context)
        return m + self.noise_ratio * operator.apply(lambda mu: denoiser.process.noise_scale(s, mu), white)


class Cold(Sampler):
    """Cold diffusion: y_s = y_t - lambda_t(L) y_0-hat + lambda_s(L) y_0-hat, for processes without noise.

    (Bansal et al. 2022, Algorithm 2; their Algorithm 1 is `Dissipation` with noise_ratio 0.)
    """

    def __init__(self, steps: int | None = None, grid: str = "uniform") -> None:
        super().__init__(steps, grid)

    def step(
        self,
        denoiser: Denoiser,
        y: Tensor,
        m: Tensor,
        t: Tensor,
        s: Tensor,
        noise: NoiseSource,
        context: Context,
        labels: Tensor | None,
    ) -> Tensor:
        rho = Step(denoiser.process, s, t).rho
        return y + m - denoiser.process.operator(context).apply(rho, m)


def auto_sampler(process: Process, steps: int | None = None) -> Sampler:
    """What suits a process: Heun without blur, dissipation without noise, else ancestral.

    Under the small constant noise of the heat process the posterior keeps nearly all of y_t, and that pays: on 8 px
    digits the ancestral sampler came to a tenth of the Fréchet distance of IHDM's, which builds on m_s alone. Without
    any noise a chain amplifies its own errors, so one step goes all the way.

    Args:
        steps: None for 18 (Heun, 35 evaluations), 1 (no noise), all scales (constant noise) or at most 250 (else).
    """
    if isinstance(process.operator(), PixelOperator):
        return Heun(steps=min(18, process.num_scales) if steps is None else steps)
    if process.has_constant_noise():
        return Ancestral(steps=steps) if process.has_noise() else Dissipation(steps=1 if steps is None else steps)
    return Ancestral(steps=min(250, process.num_scales) if steps is None else steps)
