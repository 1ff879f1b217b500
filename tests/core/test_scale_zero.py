"""Scale 0 is the image: what samplers return, and what the decoder expects, has the image's own contrast.

The data are one image, which the denoiser knows: whatever is drawn must be that image, to 1e-10 in float64, for every
sampler, target and process, and however far the schedule of the noise is shifted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.editing import Consistent, Mask, encode, restore
from dpm_scales.likelihood.decoder import decode
from dpm_scales.operators import Operator
from dpm_scales.priors import auto_prior
from dpm_scales.processes import (
    VE,
    VP,
    Blurring,
    BlurringChain,
    Homogeneous,
    InverseHeat,
    InverseOsmosis,
    OsmosisDiffusion,
    OsmosisFilter,
    Process,
)
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Ancestral, Cold, Dissipation, DPMSolver, Heun, Sampler, UniPC, auto_sampler
from dpm_scales.schedules import (
    ConstantNoise,
    CosineLogSNR,
    LinearBeta,
    LogBlur,
    NoiseSchedule,
    SigmoidSignal,
    SinSquaredBlur,
)
from dpm_scales.targets import Clean, NextScale, Noise, Target, Velocity
from support.oracles import close, float64, images, refused

K, SIZE = 20, (2, 3, 5)
SHIFTS = [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]
SHIFTED: dict[str, Callable[[NoiseSchedule], Process]] = {
    "vp": lambda noise: VP(K, noise),
    "blurring": lambda noise: Blurring(K, noise, SinSquaredBlur(3.0)),
    "osmosis-diffusion": lambda noise: OsmosisDiffusion(K, noise, SinSquaredBlur(1.0), tolerance=1e-12),
}
OTHERS: dict[str, Callable[[], Process]] = {
    "vp-sigmoid": lambda: VP(K, SigmoidSignal(minimum=1e-3)),
    "vp-linear": lambda: VP(K, LinearBeta(0.01, 0.4)),
    "ve": lambda: VE(K),
    "heat": lambda: InverseHeat(K, ConstantNoise(0.1), LogBlur(0.5, 3.0)),
    "chain": lambda: BlurringChain(K, 0.1, LogBlur(0.5, 3.0)),
    "homogeneous": lambda: Homogeneous(K, LogBlur(0.5, 3.0)),
    "inverse-osmosis": lambda: InverseOsmosis(K, ConstantNoise(0.1), LogBlur(0.2, 1.0), tolerance=1e-12),
    "osmosis": lambda: OsmosisFilter(K, LogBlur(0.5, 3.0), tolerance=1e-12),
}
SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "ancestral": lambda: Ancestral(5),
    "ddim": lambda: DDIM(0.0, 5),
    "ddim-0.4": lambda: DDIM(0.4, 5),
    "heun": lambda: Heun(5, "uniform"),
    "heun-churned": lambda: Heun(5, "uniform", s_churn=4.0, s_noise=1.003),
    "dpmpp": lambda: DPMSolver(0.0, 5, "uniform"),
    "dpmpp-sde": lambda: DPMSolver(1.0, 5, "uniform"),
    "unipc-3": lambda: UniPC(3, 5, "uniform"),
    "dissipation": lambda: Dissipation(steps=5),
}


class OneImage(Denoiser):
    """Knows that the data are the image x_0, and gives what its target asks for."""

    def __init__(self, process: Process, target: Target, x_0: Tensor) -> None:
        super().__init__(nn.Linear(1, 1), process, target)
        self.x_0 = x_0

    def predict(
        self, operator: Operator, y_t: Tensor, t: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        y_0 = operator.to_white(self.x_0)
        rest = y_t - operator.apply(self.process.signal(t), y_0)
        noise = rest
        if self.process.has_noise():
            noise = operator.apply(lambda mu: 1 / self.process.noise_scale(t, mu), rest)
        return self.target.regression_target(self.process, operator, self.x_0, operator.to_pixels(y_t), noise, t)


def drawn(sampler: Sampler, process: Process, target: Target) -> tuple[Tensor, Tensor]:
    """What is drawn from data of one image, from the prior on, and the image."""
    low, high = process.value_range
    x_0 = (low + (high - low) * (1 + images(1, *SIZE)) / 2).expand(3, -1, -1, -1)
    denoiser, prior = OneImage(process, target, x_0), auto_prior(process)
    prior.fit(x_0[:1], process)
    return sampler.sample(denoiser, prior, CounterRNG(5, 3), SIZE, dtype=torch.float64), x_0


# --- the curves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", SHIFTED)
def test_scale_zero_has_all_of_the_signal_and_no_noise(name: str, shift: float) -> None:
    process, mu = SHIFTED[name](CosineLogSNR(shift=shift)), torch.linspace(0, 8, 5, dtype=torch.float64)
    assert bool((process.signal_scale(0.0, mu) == 1).all()) and not bool(process.noise_scale(0.0, mu).any())
    x = images(2, *SIZE)
    context = process.context(x)
    law = process.marginal(x, 0.0, context)
    close(law.mean.numpy(), x.numpy(), 1e-12)
    back = process.posterior(process.sample(x, 0.5, context=context), x, 0.0, 0.5, context)
    close(back.mean.numpy(), x.numpy(), 1e-10)
    before = torch.linspace(0, 1 / K, 9, dtype=torch.float64)  # continuous down to it, and falling
    ratio = torch.exp(-process.log_snr(before, mu[:1])).flatten()
    assert ratio[0] == 0 and bool((ratio.diff() > 0).all())
    later = float64([1 / K, 0.3, 1.0])  # from the first scale on the published curve
    close(process.log_snr(later, mu[:1]).flatten().numpy(), CosineLogSNR(shift=shift).log_snr(later).numpy(), 1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_so_it_is_for_every_other_process(name: str) -> None:
    process, mu = OTHERS[name](), torch.linspace(0, 8, 5, dtype=torch.float64)
    close(process.signal_scale(0.0, mu).flatten().numpy(), 1, 1e-15)
    assert not bool(process.noise_scale(0.0, mu).any())


def test_curves_whose_scale_zero_is_not_the_image_are_refused() -> None:
    class Faint(CosineLogSNR):
        def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
            log_signal, log_noise = super().forward(t)
            return log_signal - 1e-3, log_noise

    class Grainy(ConstantNoise):
        def variance(self, t: Tensor) -> Tensor:
            return torch.full_like(t, 1e-4)

    with refused("VP", "scale 0 must be the image", "0.999"):
        VP(K, Faint())
    with refused("VE", "scale 0 must be the image", "noise 0.01"):
        VE(K, Grainy())


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shift"),
    [(name, shift) for name in ("vp", "blurring") for shift in (1, 1 / 4, 1 / 32)] + [("osmosis-diffusion", 1 / 32)],
)
def test_samples_have_the_images_contrast_at_any_shift(name: str, shift: float) -> None:
    for make in SAMPLERS.values():
        x, x_0 = drawn(make(), SHIFTED[name](CosineLogSNR(shift=shift)), Clean())
        close(x.numpy(), x_0.numpy(), 1e-10)


@pytest.mark.parametrize("target", [Clean, Noise, Velocity, NextScale])
@pytest.mark.parametrize("name", SHIFTED)
def test_samples_have_the_images_contrast_with_every_target(name: str, target: type[Target]) -> None:
    sampler = Dissipation(steps=K) if target is NextScale else DDIM(0.4, K)
    x, x_0 = drawn(sampler, SHIFTED[name](CosineLogSNR(shift=1 / 32)), target())
    close(x.numpy(), x_0.numpy(), 1e-10)


@pytest.mark.parametrize("name", OTHERS)
def test_samples_have_the_images_contrast_with_every_other_process(name: str) -> None:
    process = OTHERS[name]()
    samplers = [make() for make in SAMPLERS.values()] if process.has_noise() else [Cold(5), Dissipation(steps=1)]
    for sampler in [*samplers, auto_sampler(OneImage(process, Clean(), images(1, *SIZE)), 5)]:
        x, x_0 = drawn(sampler, OTHERS[name](), Clean())
        close(x.numpy(), x_0.numpy(), 1e-10)


# --- likelihoods and edits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", SHIFTED)
def test_the_decoders_mean_is_the_image(name: str, shift: float) -> None:
    """So the image's density is the peak of the decoder's Gaussian."""
    process, x_0, std = SHIFTED[name](CosineLogSNR(shift=shift)), images(2, *SIZE), 1e-6
    context, t = process.context(x_0), float64(1 / K)
    operator, denoiser = process.operator(context), OneImage(process, Clean(), x_0)
    y = operator.apply(process.signal(t), operator.to_white(x_0)) + images(2, *SIZE, seed=1)
    found = decode(denoiser, operator, y, t, x_0, context, std=std, levels=None)
    peak = math.prod(SIZE) * (math.log(std) + 0.5 * math.log(2 * math.pi))
    volume = operator.log_volume()
    close((found - peak - (0.0 if isinstance(volume, float) else volume.sum(1))).numpy(), 0, 1e-6)


@pytest.mark.parametrize("shift", [1 / 2, 1 / 32])
@pytest.mark.parametrize("name", SHIFTED)
def test_edits_keep_the_contrast(name: str, shift: float) -> None:
    """A restored image, one that is encoded and drawn again, and one restored from scale 0 itself."""
    process, x_0 = SHIFTED[name](CosineLogSNR(shift=shift)), images(1, *SIZE).expand(2, -1, -1, -1)
    known = torch.arange(math.prod(SIZE[1:])).reshape(SIZE[1:]) % 2 == 0
    denoiser, sampler = OneImage(process, Clean(), x_0), DDIM(0.0, 8)
    consistent = Consistent(denoiser, Mask(known), Mask(known).forward(x_0))
    scales = sampler.scales(process)
    restored = restore(consistent, sampler, scales, CounterRNG(1, 2), SIZE, dtype=torch.float64)
    close(restored.numpy(), x_0.numpy(), 1e-10)
    context = process.context(x_0)
    y = encode(denoiser, x_0, scales, context)
    close(sampler.reverse(denoiser, y, CounterRNG(1, 2), context, scales=scales).numpy(), x_0.numpy(), 1e-10)
