r"""A denoiser conditioned on a degraded image: y = A x_0 + sigma eps.

The network estimates E[x_0 | x_t]. If p(x_0 | x_t) were Gaussian with the covariance C_t, then

    E[x_0 | x_t, y] = x_0-hat + C_t A' (A C_t A' + sigma^2)^-1 (y - A x_0-hat),      x_0-hat = E[x_0 | x_t]

and the reverse process with that estimate would end in p(x_0 | y). C_t is approximated by that of Gaussian data with
the power spectrum P(mu) of the training images (`spectrum`),

    C_t = P gamma_t^2 / (lambda_t^2 P + gamma_t^2)

"spectrum": a known pixel informs about its neighbours as far as images are smooth and x_t is less informative.
"white": P is one number, C_t a multiple of the identity, and the estimate is x_0-hat with the known part replaced
(DDNM, Wang et al. 2023; PiGDM with the identity as covariance, Song et al. 2023). Both are exact for Gaussian data with
that P. Without noise, sigma = 0, a projection enforces A x_0-hat = y up to rounding.

Every sampler accepts it, since it is a denoiser. `Resampling` adds RePaint's steps back up (Lugmayr et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpm_scales.denoisers import BaseDenoiser
from dpm_scales.editing.degradations import HEAT, Degradation
from dpm_scales.editing.latents import context_of, noised
from dpm_scales.errors import UserError, is_whole, require, require_choice
from dpm_scales.moments import visible_noise, wiener_error
from dpm_scales.operators import SpectralFunction
from dpm_scales.processes import Context, Process
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import OnStep, Sampler, StepContext
from dpm_scales.targets import NextScale

COVARIANCES = ("spectrum", "white")


class Consistent(BaseDenoiser):
    """The denoiser's estimates, conditioned on a degraded image.

    Args:
        denoiser: the unconditional denoiser.
        degradation: A.
        observed: y, in the process's value range, of the shape that A returns, ``(B, C, h, w)``.
        noise_std: sigma >= 0, in units of the value range; 0 makes A x = y exact.
        covariance: "spectrum" or "white", or a function P(mu).

    Raises: UserError for another covariance, and for a network whose output does not determine x_0.
    """

    def __init__(
        self,
        denoiser: BaseDenoiser,
        degradation: Degradation,
        observed: Tensor,
        noise_std: float = 0.0,
        covariance: str | SpectralFunction = "spectrum",
    ) -> None:
        super().__init__()
        check_estimates(denoiser)
        self.inner, self.process, self.target = denoiser, denoiser.process, denoiser.target
        self.spectrum = denoiser.spectrum
        self.degradation, self.observed, self.noise_std = degradation, observed, float(noise_std)
        if isinstance(covariance, str):
            require_choice("covariance", covariance, COVARIANCES)
            self.power: SpectralFunction = denoiser.spectrum if covariance == "spectrum" else self._white
        else:
            self.power = covariance

    def _white(self, mu: Tensor) -> Tensor:
        return self.spectrum.variance.expand(mu.shape)

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Context = None, labels: Tensor | None = None
    ) -> Tensor:
        operator = self.process.operator(context)
        m_0 = self.inner.predict_mean(y_t, t, torch.zeros_like(t), context, labels)
        estimate = self.conditioned(operator.to_pixels(m_0), t)
        return operator.apply(self.process.signal(s), operator.to_white(estimate))

    def for_steps(self, starts: Tensor, ends: Tensor, labels: Tensor | None = None) -> Sequence[BaseDenoiser]:
        """Return this denoiser, or one like it where `inner` names another one for a step."""
        inner = self.inner.for_steps(starts, ends, labels)
        settings = (self.degradation, self.observed, self.noise_std, self.power)
        made: dict[BaseDenoiser, BaseDenoiser] = {one: Consistent(one, *settings) for one in {*inner} - {self.inner}}
        return [made.get(one, self) for one in inner]

    def conditioned(self, x: Tensor, t: Tensor) -> Tensor:
        """Return E[x_0 | x_t, y] from x = E[x_0 | x_t], ``(B, C, H, W)`` in pixels."""
        residual = self.observed - self.degradation.forward(x)
        x = x + self.degradation.gain(self.uncertainty(t, x), self.noise_std, residual)
        return x if self.noise_std > 0 else self.degradation.project(x, self.observed)

    def uncertainty(self, t: Tensor, like: Tensor) -> Tensor:
        """Return C_t of each DCT coefficient, float64 ``(H, W)`` or ``(B, 1, H, W)``."""
        mu = _eigenvalues(self.process, like)
        noise = visible_noise(self.process, t, mu, self.spectrum)
        return wiener_error(self.process.signal_scale(t, mu), self.power(mu), noise)

    def first_guess(self, noise: CounterRNG, size: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw from the Gaussian model's posterior given y, by Matheron's rule: x + G (y - A x - sigma eps).

        Args:
            size: (C, H, W).

        Returns: ``(B, C, H, W)`` in pixels.
        """
        white = noise.normal(size, dtype)
        power = self.power(_eigenvalues(self.process, white)).expand(size[1:])
        x = self.degradation.level(self.observed) + HEAT.synthesis(power.sqrt().to(dtype) * HEAT.analysis(white))
        residual = self.observed - self.degradation.forward(x)
        if self.noise_std > 0:
            residual = residual - self.noise_std * noise.normal(tuple(residual.shape[1:]), dtype)
        return x + self.degradation.gain(power, self.noise_std, residual)


@torch.no_grad()
def restore(
    denoiser: Consistent,
    sampler: Sampler,
    scales: Tensor,
    noise: CounterRNG,
    size: tuple[int, int, int],
    labels: Tensor | None = None,
    on_step: OnStep | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw images whose degradation is the denoiser's observation: ``(B, C, H, W)`` in pixels.

    The sampler starts at ``scales[0]``, from a noised draw of `Consistent.first_guess`.

    Raises: UserError for a sampler with an optimal covariance.
    """
    check_covariance(sampler)
    process = denoiser.process
    guess = denoiser.first_guess(noise, size, dtype)
    context = context_of(process, guess, noise)
    y = noised(process, guess, scales[0], noise, context)
    x = sampler.reverse(denoiser, y, noise, context, labels, scales, on_step)
    if process.clock is None or denoiser.noise_std > 0:
        return x
    # frequencies whose clock stood still in the last steps have missed what they changed at the others
    return denoiser.degradation.project(x, denoiser.observed)


class Resampling(Sampler):
    """RePaint's resampling: after each step to s, return to t by the forward process and repeat the step.

    This harmonises known and generated parts (Lugmayr et al. 2022, with jumps of one step). Multistep samplers fall
    back to their first-order step, and churn is left out, since repeated steps invalidate both.

    Args:
        sampler: the sampler that defines the steps.
        repeats: how often each step is repeated, >= 0.

    Raises: UserError for other values of `repeats`.
    """

    def __init__(self, sampler: Sampler, repeats: int) -> None:
        require(is_whole(repeats, 0), f"resample must be a whole number >= 0, got {repeats!r}")
        super().__init__(sampler.steps, sampler.grid, sampler.rho, sampler.noise_color)
        self.sampler, self.repeats, self.covariance = sampler, repeats, sampler.covariance

    def step(self, move: StepContext, y: Tensor, m: Tensor) -> Tensor:
        y = self.sampler.step(move, y, m)
        for _ in range(self.repeats):
            y = move.operator.combine((move.curves.rho, y), (move.curves.transition_std, move.white(y)))
            y = self.sampler.step(move, y, move.predict_mean(y))
        return y


def check_covariance(sampler: Sampler) -> None:
    """Raise UserError for a sampler with the optimal covariance, which was measured for unconditional estimates."""
    require(
        sampler.covariance is None,
        f"covariance={sampler.covariance} is for drawing: here the estimates are guided towards the given image, and "
        "their error is not what was measured; leave sampler.covariance out",
    )


def check_estimates(denoiser: BaseDenoiser) -> None:
    """Raise UserError unless the network's output at every scale determines x_0-hat."""
    if isinstance(denoiser.target, NextScale):
        raise UserError(
            "this task needs an estimate of the clean image at each scale, and a model trained with target=finer "
            "predicts the next scale only; train with target=clean"
        )
    require(
        denoiser.process.operator().is_diagonal,
        "this task takes the process to be diagonal in the cosine basis, and the operator of "
        f"{type(denoiser.process).__name__} is not",
    )
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64, device=denoiser.spectrum.std.device)
    denoiser.target.check_scales(denoiser.process, ends)


def _eigenvalues(process: Process, like: Tensor) -> Tensor:
    """Return mu of each DCT coefficient ``(H, W)``, in the discretisation of the process."""
    size = (like.shape[-2], like.shape[-1])
    mu = process.operator().eigenvalues(*size, like.device)
    # L = 0 has a single eigenvalue
    return mu if mu.shape == size else HEAT.eigenvalues(*size, like.device)
