r"""Images as states at a scale, from which edits start: noised, encoded, interpolated.

    marginal     y_t = lambda_t(L) y_0 + gamma_t(L) eps                      SDEdit (Meng et al. 2022), at any scale
    flow         the probability-flow ODE from y_0 up to y_t                 DDIM's inversion (Song et al. 2021)

A DDIM step from t to s is y_s = r y_t + (1 - r rho) m_s(y_t), r = gamma_s / gamma_t. In the inverse y_t is unknown:

    y_t = y_s / r + (rho - 1 / r) m_s,

with m_s first from the estimate at s, then from the y_t just found, repeatedly: the fixed point is the y_t that the
step maps to y_s. The last step, to s = 0, is y_0 = m_0(y_t); its inverse is found in the same way, by repeatedly adding
lambda_t (y_0 - m_0(y_t)).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpm_scales.denoisers import BaseDenoiser
from dpm_scales.errors import UserError, require
from dpm_scales.processes import Context, Process, Step
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import OnStep, Sampler
from dpm_scales.samplers.grids import tables_of


def context_of(process: Process, x: Tensor, noise: CounterRNG) -> Context:
    """Draw the process's context for images ``(B, C, H, W)`` in pixels; None for a process without one.

    Raises: UserError for a process whose context comes from images other than x.
    """
    return process.context_from(x, noise)


def noised(process: Process, x: Tensor, t: Tensor, noise: CounterRNG, context: Context = None) -> Tensor:
    """Draw y_t ``(B, C, H, W)`` from the marginal q(x_t | x), in whitened coordinates; t is ``()``."""
    operator, white = process.operator(context), noise.normal(tuple(x.shape[1:]), x.dtype)
    return process.perturb(operator.to_white(x), t, white, operator)


def scales_from(sampler: Sampler, process: Process, start: float) -> Tensor:
    """Return `start`, rounded to k / num_scales with k >= 1, followed by the sampler's scales below it."""
    device = tables_of(process)
    scales = sampler.scales(process, device)
    first = max(1, round(start * process.num_scales)) / process.num_scales
    return torch.cat([torch.full_like(scales[:1], first), scales[scales < first - 1e-9]])


def nearest_blur(process: Process, blur_sigma: float) -> tuple[float, float]:
    """Return the scale k / num_scales, k >= 1, whose blur is nearest to `blur_sigma`, and that blur, in px.

    Raises: UserError for a process that does not blur.
    """
    if process.blur is None:
        raise UserError(f"{type(process).__name__} does not blur, so no scale of it is the blurred image")
    ts = torch.arange(1, process.num_scales + 1, dtype=torch.float64, device=tables_of(process)) / process.num_scales
    sigmas = (2 * process.blur(ts)).sqrt()
    best = int((sigmas - blur_sigma).abs().argmin())
    return (best + 1) / process.num_scales, float(sigmas[best])


@torch.no_grad()
def encode(
    denoiser: BaseDenoiser,
    x: Tensor,
    scales: Tensor,
    context: Context = None,
    labels: Tensor | None = None,
    refine: int = 3,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return y at ``scales[0]`` from which DDIM (eta = 0) along `scales` reaches x: ``(B, C, H, W)``, whitened.

    Args:
        x: ``(B, C, H, W)`` in pixels.
        scales: descending to 0, as samplers take them.
        refine: fixed-point steps at each scale; 0 is the usual, explicit inversion.
        on_step: called with the index of each finished step, counted as a sampler does, and the image there (pixels).

    Raises: UserError for a process with a clock, under which frequencies start without noise.
    """
    process = denoiser.process
    require(
        process.clock is None,
        f"the probability flow of {type(process).__name__} can't be followed upwards, since its clock leaves "
        "frequencies without noise until they start; use through=noise, or a model without a clock",
    )
    operator = process.operator(context)
    y_0 = y = operator.to_white(x)
    steps, denoisers = scales.unbind(), denoiser.for_steps(scales[:-1], scales[1:], labels)
    with process.kept_curves():
        for i in range(len(scales) - 1, 0, -1):
            s, t, predict_mean = steps[i], steps[i - 1], denoisers[i - 1].predict_mean
            step = Step(process, s, t)
            if i == len(scales) - 1:
                y = operator.apply(process.signal(t), y_0)
                for _ in range(refine):
                    y = y + operator.apply(process.signal(t), y_0 - predict_mean(y, t, s, context, labels))
            else:
                below, m = y, predict_mean(y, s, s, context, labels)
                for again in range(refine + 1):
                    if again > 0:
                        m = predict_mean(y, t, s, context, labels)
                    y = operator.combine((_inverse_coef_xs(step), below), (_inverse_coef_m(step), m))
            if on_step is not None:
                on_step(i - 1, operator.to_pixels(y))
    return y


def _inverse_coef_xs(step: Step) -> Callable[[Tensor], Tensor]:
    return lambda mu: 1 / step.noise_ratio(mu)


def _inverse_coef_m(step: Step) -> Callable[[Tensor], Tensor]:
    return lambda mu: step.rho(mu) - 1 / step.noise_ratio(mu)


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Return images on the arc from a (weight 0) to b (weight 1), image by image; interpolated linearly if parallel.

    Args:
        a, b: ``(B, C, H, W)``.
        weight: ``(B,)`` in [0, 1].
    """
    w = weight.to(a.dtype)[:, None, None, None]
    dims = (-3, -2, -1)
    norms = torch.linalg.vector_norm(a, dim=dims, keepdim=True) * torch.linalg.vector_norm(b, dim=dims, keepdim=True)
    cosine = (a * b).sum(dims, keepdim=True) / norms.clamp(min=torch.finfo(a.dtype).tiny)
    angle = torch.acos(cosine.clamp(-1, 1))
    straight = torch.sin(angle) < 1e-4
    safe = torch.where(straight, torch.ones_like(angle), angle)
    of_a = torch.where(straight, 1 - w, torch.sin((1 - w) * safe) / torch.sin(safe))
    of_b = torch.where(straight, w, torch.sin(w * safe) / torch.sin(safe))
    return of_a * a + of_b * b


def between(
    process: Process,
    ends: tuple[Tensor, Tensor],
    latents: tuple[Tensor, Tensor],
    t: Tensor,
    weight: Tensor,
    context: Context,
) -> Tensor:
    """Return y_t between two images: means are interpolated linearly, noise along the arc.

    Args:
        ends: both images in pixels, ``(B, C, H, W)``.
        latents: y_t of both.
        weight: ``(B,)`` in [0, 1].
    """
    operator = process.operator(context)
    means = [operator.apply(process.signal(t), operator.to_white(x)) for x in ends]
    noises = [y - mean for y, mean in zip(latents, means, strict=True)]
    w = weight.to(means[0].dtype)[:, None, None, None]
    return (1 - w) * means[0] + w * means[1] + slerp(noises[0], noises[1], weight)


class BranchingNoise(CounterRNG):
    """Noise that the samples of a group share until `shared` is set to False, and independent noise from then on.

    Sample i belongs to group i // group. Both streams advance with every draw, so no draw is used twice.

    Args:
        seed, count, first, device: as for `CounterRNG`.
        group: number of samples in a group, >= 1.
    """

    def __init__(self, seed: int, count: int, first: int, group: int, device: torch.device | str | None = None) -> None:
        super().__init__(seed, count, first, device)
        groups = torch.arange(first, first + count, dtype=torch.int64, device=self.device) // group - first // group
        self._common = CounterRNG(seed, (first + count - 1) // group - first // group + 1, first // group, device)
        self._groups = groups
        self.shared = True

    def uniform(self, shape: tuple[int, ...] = ()) -> Tensor:
        common, own = self._common.uniform(shape), super().uniform(shape)
        return common.index_select(0, self._groups) if self.shared else own
