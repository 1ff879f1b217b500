"""Operators and processes of one's own, of kinds that the package does not have: bounds, starts and edits are right for
them, or refuse them; nothing takes them for one of its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.editing import Consistent, Mask, context_of, encode, noised, restore
from dpm_scales.likelihood import FlowLikelihood, VariationalBound, start_law
from dpm_scales.operators import HeatOperator, Operator, PixelOperator, SpectralFunction, dct_matrix
from dpm_scales.priors import ContextPrior, DataPrior, GaussianPrior, auto_prior
from dpm_scales.processes import VP, Blurring, Context, InverseHeat, OsmosisDiffusion, Process
from dpm_scales.rng import CounterRNG, Randomness, white_noise
from dpm_scales.samplers import DDIM
from dpm_scales.schedules import CosineLogSNR, LinearTimeBlur
from dpm_scales.targets import Clean
from support.oracles import close, float64, images, refused

H, W, K = 3, 4, 6


class Rotated(Operator):
    """Diagonal in a basis that nobody knows, with eigenvalues in an order of its own."""

    def __init__(self) -> None:
        self.basis = torch.linalg.qr(images(H * W, H * W, seed=7)).Q

    def eigenvalues(self, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        mu = torch.linspace(0, 5, height * width, dtype=torch.float64, device=device)
        return mu.flip(0).reshape(height, width)

    def apply(self, f: SpectralFunction, y: Tensor) -> Tensor:
        values = f(self.eigenvalues(H, W)).expand(*y.shape[:2], H, W).flatten(-2)
        return ((y.to(torch.float64).flatten(-2) @ self.basis * values) @ self.basis.T).view(y.shape).to(y.dtype)


class RotatedDiffusion(Process):
    def __init__(self, operator: Operator | None = None) -> None:
        super().__init__(operator or Rotated(), K, CosineLogSNR(-8, 6), LinearTimeBlur(2.0), 0.01)


class Uneven(PixelOperator):
    """Noise that is white once pixels are divided by a field."""

    def __init__(self, field: Tensor) -> None:
        self.field = field

    def to_white(self, x: Tensor) -> Tensor:
        return x / self.field.to(x.dtype)

    def to_pixels(self, y: Tensor) -> Tensor:
        return y * self.field.to(y.dtype)


class UnevenNoise(Process):
    """Each sample has a field of its own, and there is no law without one."""

    def __init__(self) -> None:
        super().__init__(PixelOperator(), K, CosineLogSNR(-8, 8))

    def context(self, x_0: Tensor, generator: Randomness = None) -> Context:
        return torch.exp(0.3 * white_noise(x_0, generator))

    def operator(self, context: Context = None) -> Operator:
        return self._operator if context is None else Uneven(context)


class Wrong(Denoiser):
    """Half of what is there, and a sine of it."""

    def __init__(self, process: Process) -> None:
        super().__init__(nn.Linear(1, 1), process, Clean(clip=False))

    def predict(
        self, operator: Operator, y_t: Tensor, t: Tensor, context: Context = None, labels: Tensor | None = None
    ) -> Tensor:
        x = operator.to_pixels(y_t)
        return 0.5 * x + 0.1 * torch.sin(3 * x)


# --- a basis of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", ["ancestral", "dissipation"])
@pytest.mark.parametrize("make", [RotatedDiffusion, lambda: Blurring(K), lambda: OsmosisDiffusion(K)])
def test_bands_add_up_and_leave_the_bound_as_it_is(make: Any, reverse: str) -> None:
    process, x_0 = make(), images(2, 2, H, W)
    prior = auto_prior(process) if process.has_context else GaussianPrior()
    prior.fit(x_0, process)

    def bound(**options: Any) -> Any:
        return VariationalBound(Wrong(process), prior, reverse=reverse, **options)(x_0, CounterRNG(4, 2))

    plain = bound()
    for number in (1, 3, 5):
        split = bound(num_bands=number)
        close(split.total.numpy(), plain.total.numpy(), 1e-9, 1e-12)
        close(split.bands.sum(2).numpy(), plain.steps.numpy(), 1e-9, 1e-12)
        assert split.bands.shape == (2, K - 1, number)


def test_steps_of_the_bound_are_those_of_the_operators_own_basis() -> None:
    """Against the sum over its eigenvectors, written out."""
    process, x_0 = RotatedDiffusion(), images(2, 1, H, W)
    operator, noise = process.operator(), CounterRNG(4, 2)
    assert isinstance(operator, Rotated)
    found = VariationalBound(Wrong(process), GaussianPrior(), num_bands=3)(x_0, CounterRNG(4, 2))
    mu = operator.eigenvalues(H, W)
    for i in range(K - 1):
        t, s = float64((K - i) / K), float64((K - i - 1) / K)
        y_t = noised(process, x_0, t, noise)
        m = operator.apply(process.signal(s), Wrong(process).predict(operator, y_t, t))
        d = ((operator.apply(process.signal(s), x_0) - m).flatten(-2) @ operator.basis).numpy()[:, 0]
        snr_s, snr_t = (torch.exp(process.log_snr(v, mu)).flatten().numpy() for v in (s, t))
        weight = (snr_s - snr_t) / process.signal_scale(s, mu).flatten().numpy() ** 2
        close(found.steps[:, i].numpy(), 0.5 * (weight * d**2).sum(1), 1e-9, 1e-9)
    assert np.isfinite(found.total.numpy()).all()


class Reordered(Rotated):
    """The heat operator as a dense matrix with eigenvalues in another order, so that nothing takes its shortcuts."""

    def __init__(self) -> None:
        cosines = torch.kron(dct_matrix(H), dct_matrix(W))
        self.basis = cosines.flip(0).T.contiguous()

    def eigenvalues(self, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        # a process looks at the spectrum of 64 x 64 pixels when it is built
        return HeatOperator().eigenvalues(height, width, device).flatten().flip(0).reshape(height, width)


def test_likelihoods_and_encodings_of_a_dense_operator_are_those_of_the_transform() -> None:
    """Bound, its draws, flow and inversion: the same numbers by the heat operator and by its matrix."""
    blurring, x_0 = Blurring(K, CosineLogSNR(-8, 6), LinearTimeBlur(2.0), 0.01), images(2, 2, H, W)
    dense = RotatedDiffusion(Reordered())
    found: list[list[Tensor]] = []
    for process in (blurring, dense):
        denoiser, prior = Wrong(process), GaussianPrior()
        scales = DDIM(0.0, K).scales(process)
        made = [
            VariationalBound(denoiser, prior, levels=None),
            VariationalBound(denoiser, prior, reverse="dissipation", draws=2),
            FlowLikelihood(denoiser, prior, steps=4),
        ]
        totals = [likelihood(x_0, CounterRNG(4, 2)) for likelihood in made]
        found.append([*(t.total for t in totals), *(t.steps for t in totals), encode(denoiser, x_0, scales)])
    for ours, theirs in zip(*found, strict=True):
        close(ours.numpy(), theirs.numpy(), 1e-8)


def test_what_needs_the_cosine_basis_refuses_another() -> None:
    """DataPrior, degraded images, and in `edit=deblur` the scale that is as blurred as the image."""
    process, x_0 = RotatedDiffusion(), images(2, 1, H, W)
    assert not process.is_heat_blur and not OsmosisDiffusion(K).is_heat_blur and not VP(K).is_heat_blur
    assert Blurring(K).is_heat_blur and InverseHeat(K).is_heat_blur
    with refused("DataPrior", "RotatedDiffusion"):
        DataPrior().fit(x_0, process)
    with refused("cosine basis", "RotatedDiffusion"):
        Consistent(Wrong(process), Mask(torch.ones(H, W, dtype=torch.bool)), x_0)


# --- a context of one's own -------------------------------------------------------------------------------------------


def test_edits_draw_the_context_and_use_it() -> None:
    """noised, encode and restore in the coordinates of the field; the same field for a sample, whatever its batch."""
    process, x_0 = UnevenNoise(), images(3, 1, H, W)
    context = context_of(process, x_0, CounterRNG(5, 3))
    same, rest = process.context(x_0, CounterRNG(5, 3)), context_of(process, x_0[1:], CounterRNG(5, 2, 1))
    assert context is not None and same is not None and rest is not None
    assert torch.equal(context, same) and torch.equal(context[1:], rest)
    t, mu = float64(0.5), torch.zeros(1, 1, dtype=torch.float64)
    y = noised(process, x_0, t, CounterRNG(6, 3), context)
    white = CounterRNG(6, 3).normal((1, H, W), torch.float64)
    expected = process.signal_scale(t, mu) * x_0 / context + process.noise_scale(t, mu) * white
    close(y.numpy(), expected.numpy())
    sampler, denoiser = DDIM(0.0, K), Contextual(process)
    scales = sampler.scales(process)
    again = sampler.reverse(denoiser, encode(denoiser, x_0, scales, context, refine=60), CounterRNG(0, 3), context)
    close(again.numpy(), x_0.numpy(), 1e-6)
    known = torch.arange(H * W).reshape(H, W) % 2 == 0
    consistent = Consistent(denoiser, Mask(known), Mask(known).forward(x_0))
    restored = restore(consistent, sampler, scales, CounterRNG(1, 3), (1, H, W), dtype=torch.float64)
    close(restored[..., known].numpy(), x_0[..., known].numpy())
    assert denoiser.calls > 2 * K


class Contextual(Wrong):
    """Never asked without a context."""

    calls = 0

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Context = None, labels: Tensor | None = None
    ) -> Tensor:
        assert context is not None and context.shape == y_t.shape
        self.calls += 1
        return super().predict_mean(y_t, t, s, context, labels)


def test_priors_without_a_context_refuse_one() -> None:
    process, x_0 = UnevenNoise(), images(2, 1, H, W)
    assert process.has_context and not Blurring(4).has_context
    assert isinstance(auto_prior(process), ContextPrior)
    for start in (GaussianPrior(), DataPrior()):
        with refused("draws no context", "UnevenNoise"):
            start.check(process)
        with refused("draws no context", "UnevenNoise"):
            start.sample(process, CounterRNG(0, 2), (1, H, W))
        with refused("draws no context", "UnevenNoise"):
            start_law(start, process, x_0, CounterRNG(0, 2))
    with refused("draws no context"):
        DDIM(0.0, 2).sample(Wrong(process), GaussianPrior(), CounterRNG(0, 2), (1, H, W))
    assert math.isfinite(process.mean_left)
