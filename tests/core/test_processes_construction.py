"""What processes are built of: entropy that never falls, underflow, what is refused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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
    Spectral,
    as_scale,
    title_of,
)
from dpm_scales.schedules import (
    ConstantNoise,
    FlowBlur,
    GeometricNoise,
    ListedBlurSigmas,
    ListedDissipationTimes,
    ListedNoise,
    LogBlur,
    NoiseSchedule,
    PowerLaw,
    Rectified,
    SpectralClock,
)
from support.laws import dense, lyapunov_twins, twins
from support.oracles import H, W, float64, generator, images, refused
from support.reference import Twin

# --- entropy ----------------------------------------------------------------------------------------------------------


@twins
def test_conditional_entropy_is_that_of_the_dense_covariance(twin: Twin) -> None:
    process = twin.build()
    scales = [0.05, 0.125, 0.6, 1.0]
    entropy = process.conditional_entropy(float64(scales), (H, W))
    assert entropy.dtype == torch.float64 and entropy.shape == (4,)
    for b, t in enumerate(scales):
        covariance = dense(twin, lambda mu, t=t: twin.variance(t, mu))
        one = process.conditional_entropy(t, (H, W))
        assert one.shape == () and one == entropy[b]
        if not covariance.any():
            assert entropy[b] == -math.inf
            continue
        sign, log_det = np.linalg.slogdet(2 * math.pi * math.e * covariance)
        assert sign == 1
        assert float(entropy[b]) == pytest.approx(0.5 * log_det, rel=1e-8, abs=1e-8)
    assert process.conditional_entropy(float64([0.4]), (H, W)).shape == (1,)


@lyapunov_twins
def test_entropy_and_noise_never_fall_where_the_lyapunov_property_is_promised(twin: Twin) -> None:
    process, t = twin.build(), torch.linspace(0, 1, 201, dtype=torch.float64)
    assert process.lyapunov
    mu = torch.from_numpy(twin.mu(H, W))
    assert (process.noise_scale(t, mu).diff(dim=0) >= -1e-12).all()
    entropy = process.conditional_entropy(t, (H, W))
    assert ((entropy[1:] >= entropy[:-1] - 1e-9) | (entropy[1:] == entropy[:-1])).all()


def test_chain_form_with_growing_steps_breaks_the_lyapunov_property() -> None:
    """Longer steps of blur take more from the noise than beta adds, at some mu: so it is not promised."""
    process = BlurringChain(200, 0.1, LogBlur(0.5, 24))
    assert not process.lyapunov
    t, mu = torch.arange(201).double() / 200, torch.linspace(0, 5, 100, dtype=torch.float64).reshape(1, -1)
    noise = process.noise_scale(t, mu)[:, 0, 0]
    fall = noise.diff(dim=0)
    assert (fall[:, 0] > 0).all(), "the mean only gains noise"
    assert fall.min() < -1e-3 * noise.max()


# --- underflow --------------------------------------------------------------------------------------------------------


HEAVY: dict[str, Callable[[], Process]] = {
    "inverse-heat": lambda: InverseHeat(200, blur=LogBlur(0.5, 128)),
    "homogeneous": lambda: Homogeneous(200, LogBlur(0.5, 128)),
    "blurring": lambda: Blurring(200, blur=LogBlur(0.5, 128)),
    "blurring-no-floor": lambda: Blurring(200, blur=LogBlur(0.5, 128), min_decay=0.0),
    "chain": lambda: BlurringChain(200, blur=LogBlur(0.5, 128)),
}


@pytest.mark.parametrize("name", [*list(HEAVY)[:-1], pytest.param("chain", marks=pytest.mark.slow)])
def test_heavy_blur_underflows_to_nothing_worse_than_zero(name: str) -> None:
    """128 px at 32 x 24 pixels: lambda_t is 0 in float32 nearly everywhere, so lambda_t / lambda_s would be NaN."""
    process = HEAVY[name]()
    x_0, x_t = images(2, 1, 32, 24).float(), images(2, 1, 32, 24, seed=1).float()
    mu = process.operator().eigenvalues(32, 24)
    for s, t in [(0.0, 0.005), (0.005, 0.01), (0.5, 0.505), (0.5, 1.0), (0.995, 1.0), (0.0, 1.0)]:
        step = process.step(s, t)
        for part in (step.rho, step.posterior_coef_xt, step.tau, step.transition_std, step.posterior_std):
            value = part(mu)
            assert torch.isfinite(value).all() and (value >= 0).all()
        assert (step.rho(mu) <= 1 + 1e-12).all()
        for law in (
            process.marginal(x_0, t),
            process.transition(x_t, s, t),
            process.posterior(x_t, x_0, s, t),
            process.posterior(x_t, x_0, float64([s, s]), float64([t, t])),
        ):
            assert law.mean.isfinite().all() and law.mean.abs().max() < 100
            assert law.sample(generator()).isfinite().all()


def test_ratio_of_underflowing_signals_is_the_blur_between_the_scales() -> None:
    process = InverseHeat(200, blur=LogBlur(0.5, 128))
    mu = process.operator().eigenvalues(64, 64)
    s, t = 0.99, 0.995
    naive = (process.signal_scale(t, mu).float() / process.signal_scale(s, mu).float()).isnan()
    assert naive.double().mean() > 0.3, "the case that the logarithm is for"
    sigma = [0.5 * (128 / 0.5) ** ((200 * v - 1) / 199) for v in (s, t)]
    expected = torch.exp(-mu * (sigma[1] ** 2 - sigma[0] ** 2) / 2)
    torch.testing.assert_close(process.step(s, t).rho(mu), expected, rtol=1e-8, atol=1e-300)


# --- construction -----------------------------------------------------------------------------------------------------


PROCESSES: list[Callable[..., Process]] = [VP, VE, Homogeneous, InverseHeat, Blurring, BlurringChain]


@pytest.mark.parametrize("make", PROCESSES)
def test_processes_are_built_without_arguments(make: Callable[..., Process]) -> None:
    process = make()
    assert process.sample(torch.zeros(1, 1, 4, 6), 0.5).shape == (1, 1, 4, 6)
    assert process.value_range[0] < process.value_range[1]


@pytest.mark.parametrize("make", PROCESSES)
@pytest.mark.parametrize("num_scales", [0, -3, True, 2.5, "8", None])
def test_num_scales_must_be_a_whole_number(make: Callable[..., Process], num_scales: Any) -> None:
    with refused(getattr(make, "__name__", ""), "num_scales", "whole number >= 1", repr(num_scales)):
        make(num_scales)


@pytest.mark.parametrize("make", PROCESSES)
def test_one_scale_is_enough(make: Callable[..., Process]) -> None:
    process, x = make(1), images(2, 1, H, W)
    assert process.sample(x, 1.0).isfinite().all()
    assert process.posterior(x, x, 0.0, 1.0).sample().isfinite().all()


@pytest.mark.parametrize("make", PROCESSES)
@pytest.mark.parametrize("value_range", [(1.0, -1.0), (0.0, 0.0), (0.0,), (0.0, 1.0, 2.0), (math.nan, 1.0)])
def test_value_range_must_ascend(make: Callable[..., Process], value_range: tuple[float, ...]) -> None:
    with refused(getattr(make, "__name__", ""), "value_range", "low < high"):
        make(value_range=value_range)


@pytest.mark.parametrize("min_decay", [-0.1, 1.0, 1.5, math.nan])
def test_min_decay_must_lie_below_one(min_decay: float) -> None:
    with refused("Blurring", "min_decay", "[0, 1)", repr(min_decay)):
        Blurring(min_decay=min_decay)


@pytest.mark.parametrize("make", [*PROCESSES, OsmosisFilter, InverseOsmosis, OsmosisDiffusion])
@pytest.mark.parametrize("value", [0, False, "", [], 0.1])
def test_schedule_must_be_one(make: Callable[..., Process], value: Any) -> None:
    """What is false is not taken for the default."""
    keys = {"noise", "blur"} & set(inspect.signature(make).parameters)
    assert keys
    for key in keys:
        with refused(getattr(make, "__name__", ""), f"{key}={value!r} is no {key} schedule"):
            make(**{key: value})


@pytest.mark.parametrize("std", [-0.1, 0.0, math.inf, "0.1"])
def test_noise_must_be_positive(std: Any) -> None:
    with refused("BlurringChain", "step_noise", "positive", repr(std)):
        BlurringChain(step_noise=std)
    with refused("ConstantNoise", "noise_std", "positive", repr(std)):
        InverseHeat(noise=ConstantNoise(std))


@pytest.mark.parametrize("make", [Homogeneous, InverseHeat, Blurring, BlurringChain])
def test_blur_out_of_order_names_the_scale(make: Callable[..., Process]) -> None:
    with refused("blur_sigmas", "scale k=3", "1 follows 2", "increasing"):
        make(4, blur=ListedBlurSigmas([1.0, 2.0, 1.0, 3.0]))
    with refused("dissipation_times", "num_scales=2"):
        make(4, blur=ListedDissipationTimes([1.0, 2.0]))


@pytest.mark.parametrize("make", [Homogeneous, InverseHeat, Blurring, BlurringChain])
def test_unknown_spectrum_is_refused(make: Callable[..., Process]) -> None:
    with refused("spectrum", "'discreet'", "did you mean 'discrete'"):
        make(spectrum="discreet")


@pytest.mark.parametrize("make", [VE, InverseHeat])
def test_noise_that_falls_names_scale_eigenvalue_and_negative_variance(make: Callable[..., Process]) -> None:
    with refused(make.__name__ if isinstance(make, type) else "", "k=3 of 4", "mu=0", "variance -0.16", "raise"):
        make(4, ListedNoise([0.1, 0.5, 0.3, 0.6]))


class Curves(NoiseSchedule):
    """Any (a_k, gamma_k)."""

    def __init__(self, signal: list[float], noise: list[float]) -> None:
        super().__init__()
        self.table = torch.log(float64([signal, noise]))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        index = (t * self.num_scales).round().long()
        return self.table[0, index], self.table[1, index]


def test_noise_that_falls_with_the_signal_breaks_the_lyapunov_property() -> None:
    """The chain exists, but entropy would fall: refused where the property is promised, and only there."""
    curves = Curves([1.0, 0.5, 0.1], [0.0, 0.5, 0.3])
    with refused("VE", "k=2 of 2", "mu=0", "falls from 0.5 to 0.3", "Lyapunov", "non-decreasing"):
        VE(2, curves)
    with refused("falls from 0.5 to 0.49999999,"):  # by less than four digits show
        VE(2, Curves([1.0, 0.5, 0.1], [0.0, 0.5, 0.49999999]))

    class Free(VE):
        lyapunov = False

    Free(2, curves)


@pytest.mark.parametrize("make", [VP, Blurring])
def test_variance_must_be_preserved_where_it_is_promised(make: Callable[..., Process]) -> None:
    name = make.__name__ if isinstance(make, type) else ""
    with refused(name, "is 1.25 at scale k=4 of 4", "for GeometricNoise", "rectified, ve, heat or osmosis_diffusion"):
        make(4, noise=GeometricNoise(0.1, 0.5))
    with refused(name, "is 0.5 at scale k=2 of 4", "for Rectified", "rectified, ve, heat or osmosis_diffusion"):
        make(4, noise=Rectified())
    for other in (Spectral, VE, InverseHeat, OsmosisDiffusion):  # those that the message names
        for noise in (GeometricNoise(0.1, 0.5), Rectified()):
            other(4, noise=noise)


def test_noise_that_grows_too_slowly_for_the_signal_is_refused() -> None:
    """gamma_2^2 < rho^2 gamma_1^2 in spite of a falling signal."""
    with refused("VP", "k=2 of 2", "variance -0.08", "noise must grow"):
        VP(2, Curves([1.0, 0.9, 0.81], [0.0, 0.5, 0.35]))


def test_signal_that_grows_is_refused() -> None:
    with refused("VP", "k=2 of 2", "mu=0", "grows by a factor 2", "amplify"):
        VP(2, Curves([1.0, 0.4, 0.8], [0.0, 0.5, 2.0]))


@pytest.mark.parametrize("t", [-0.1, 1.5, math.nan])
def test_numbers_outside_the_unit_interval_are_no_scales(t: float) -> None:
    with refused("scale t", "[0, 1]", str(t)):
        as_scale(t)
    with refused("scale t", "[0, 1]"):
        VP(4).sample(images(1, 1, 2, 2), t)


def test_title_names_the_curves_that_the_class_leaves_open() -> None:
    titles = {
        "VP": VP(4),
        "VP (PowerLaw, SpectralClock)": VP(4, color=PowerLaw(0.5), clock=SpectralClock(1.0)),
        "Spectral (Rectified)": Spectral(4),
        "Spectral (Rectified, FlowBlur)": Spectral(4, blur=FlowBlur()),
        "OsmosisDiffusion": OsmosisDiffusion(4),
    }
    assert {title: title_of(process) for title, process in titles.items()} == {title: title for title in titles}
