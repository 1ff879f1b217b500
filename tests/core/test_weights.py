"""Weights of the loss against their published formulas, and averaged over the spectrum where frequencies differ."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dpm_scales.denoisers import Denoiser
from dpm_scales.processes import VE, VP, Blurring, Homogeneous, InverseHeat
from dpm_scales.targets import Clean, NextScale, Noise, Target, Velocity
from dpm_scales.weights import EDM, P2, Learned, LossWeight, MinSNR
from support.oracles import (
    NOISY,
    Answer,
    H,
    TinyNetwork,
    W,
    close,
    curves,
    float64,
    generator,
    images,
    named,
    noised,
    over,
    pretended_gpu,
    refused,
    with_target,
)
from support.reference import Array, Twin

TARGETS: dict[str, Callable[[], Target]] = {"clean": Clean, "noise": Noise, "velocity": Velocity}

# of the squared error of eps, from SNR and the data's variance
WEIGHTS: dict[str, tuple[LossWeight, Callable[[Array, float], Array]]] = {
    "min-snr-5": (MinSNR(), lambda snr, s2: np.minimum(snr, 5.0) / snr),
    "min-snr-0.5": (MinSNR(0.5), lambda snr, s2: np.minimum(snr, 0.5) / snr),
    "p2": (P2(), lambda snr, s2: 1 / (1 + snr)),
    "p2-0.5": (P2(0.5, 2.0), lambda snr, s2: 1 / np.sqrt(2 + snr)),
    "edm": (EDM(), lambda snr, s2: (snr * s2 + 1) / (s2 * snr)),
}


def weights_of(denoiser: Denoiser, weight: LossWeight, t: list[float], size: tuple[int, int] = (H, W)) -> Array:
    process, target = denoiser.process, denoiser.target
    values = weight(process, process.operator(), target, float64(t), denoiser.spectrum, size)
    assert values.shape == (len(t), 1, 1, 1) and values.dtype == torch.float64
    return values.flatten().numpy()


@pytest.mark.parametrize("name", list(WEIGHTS))
@pytest.mark.parametrize("steps", [20, 1000])
def test_variance_preserving_weights_are_the_published_ones(name: str, steps: int) -> None:
    """Of eps as printed; of x_0 and v by SNR and SNR / (SNR + 1) (Hang et al. 2023, Sect. 3.4)."""
    weight, published = WEIGHTS[name]
    process, t = VP(steps), [1 / steps, 0.1, 0.35, 0.5, 0.8, 1.0]
    snr = np.exp(process.log_snr(float64(t), torch.zeros(1, 1).double()).flatten().numpy())
    factors = {"noise": 1, "clean": snr, "velocity": snr / (snr + 1)}
    for target, factor in factors.items():
        denoiser = Denoiser(TinyNetwork(), process, TARGETS[target](), 0.7)
        close(weights_of(denoiser, weight, t), published(snr, float(np.float32(0.7)) ** 2) * factor, 0, 1e-9)


def test_min_snr_and_p2_as_printed() -> None:
    """w_t = min(SNR, gamma) for x_0; lambda'_t = lambda_t / (k + SNR)^gamma with lambda_t = 1 for eps."""
    denoiser = Denoiser(TinyNetwork(), VP(1000), Clean())
    t = [0.02, 0.3, 0.9]
    a2 = denoiser.process.signal_scale(float64(t), torch.zeros(1, 1).double()).flatten().numpy() ** 2
    snr = a2 / (1 - a2)
    assert snr[0] > 5 > snr[-1]
    close(weights_of(denoiser, MinSNR(5.0), t), np.minimum(snr, 5), 0, 1e-9)
    close(weights_of(Denoiser(TinyNetwork(), VP(1000), Noise()), P2(1.0, 1.0), t), 1 - a2, 0, 1e-9)


@pytest.mark.parametrize("data_std", [0.5, 0.2])
@over(named("ve-edm", "vp-cosine", "ve-listed"))
def test_edms_weight_is_the_clean_targets_own_where_nothing_blurs(twin: Twin, data_std: float) -> None:
    """lambda(sigma) = (sigma^2 + s^2) / (sigma s)^2 (Karras et al. 2022, Table 1)."""
    denoiser, t = with_target(twin, Clean("scalar"), TinyNetwork(), data_std), [1 / twin.num_scales, 0.5, 1.0]
    own = denoiser._predict(denoiser.process.operator(), images(3, 1, H, W), float64(t), None, None)[1]
    close(weights_of(denoiser, EDM(), t), own.detach().flatten().numpy(), 0, 1e-6)


@pytest.mark.parametrize("name", list(WEIGHTS))
@over(NOISY)
def test_weights_are_means_over_the_spectrum_of_each_frequencys_own(twin: Twin, name: str) -> None:
    """Frequency by frequency from the slow curves, counted by a power that falls from low to high."""
    weight, published = WEIGHTS[name]
    denoiser = with_target(twin, Clean(), TinyNetwork(), 0.4)
    denoiser.spectrum.log_factor.copy_(torch.linspace(2.0, -3.0, 26))
    power = denoiser.spectrum(torch.from_numpy(twin.mu(H, W))).numpy() if twin.spectrum else np.ones((H, W))
    variance, t = float(denoiser.spectrum.variance), [1 / twin.num_scales, 0.5, 1.0]
    for name_, factor in (
        ("clean", lambda a, g: (a / g) ** 2),
        ("noise", lambda a, g: np.ones_like(a)),
        ("velocity", lambda a, g: (a / (a**2 + g**2)) ** 2),
    ):
        expected = []
        for one in t:
            signal, noise = curves(twin, one)
            signal = np.maximum(signal, 1e-100)
            with np.errstate(over="ignore", divide="ignore"):
                values = published((signal / noise) ** 2, variance) * factor(signal, noise)
            expected.append(float((values * power).sum() / power.sum()))
        denoiser.target = TARGETS[name_]()
        close(weights_of(denoiser, weight, t), expected, 1e-12, 1e-7)


@pytest.mark.parametrize("name", list(WEIGHTS))
@over(named("vp-cosine", "ve-edm", "vp-listed"))
def test_the_same_estimate_costs_the_same_through_every_target(twin: Twin, name: str) -> None:
    """A wrong x_0 and what it says of eps and v: equal weighted losses, image by image."""
    weight, _ = WEIGHTS[name]
    x_0, wrong, t = images(2, 1, H, W), images(2, 1, H, W, seed=7), [0.5, 1.0]
    eps = torch.randn(x_0.shape, generator=generator(3), dtype=torch.float64)
    x_t = noised(twin, x_0, eps, t)
    signal, noise = (float64([curves(twin, v)[i][0, 0] for v in t])[:, None, None, None] for i in (0, 1))
    eps_hat = (x_t - signal * wrong) / noise
    answers = {"clean": wrong, "noise": eps_hat, "velocity": signal * eps_hat - noise * wrong}
    costs = []
    for target, answer in answers.items():
        made = Clean("none") if target == "clean" else TARGETS[target]()
        denoiser = with_target(twin, made, Answer(answer))
        costs.append(denoiser.loss(x_0, float64(t), generator=generator(3), loss_weight=weight).numpy())
    close(costs[1], costs[0], 1e-12, 1e-8)
    close(costs[2], costs[0], 1e-12, 1e-8)


def test_weight_replaces_the_targets_own() -> None:
    denoiser, t = Denoiser(TinyNetwork(), Blurring(8), Noise()).double(), float64([0.25, 1.0])
    x_0 = images(2, 1, H, W)
    plain = denoiser.loss(x_0, t, generator=generator(1))
    weighted = denoiser.loss(x_0, t, generator=generator(1), loss_weight=P2())
    ratio = (weighted / plain).detach().numpy()
    close(ratio, weights_of(denoiser, P2(), t.tolist()), 0, 1e-9)
    assert ratio[0] < 0.95 * ratio[1]


def test_heavy_blur_leaves_weights_finite_or_is_refused() -> None:
    """lambda underflows, also in the square; what blur leaves nothing of can't be told from eps."""
    for target in (Clean(), Noise(), Velocity()):
        denoiser = Denoiser(TinyNetwork(), InverseHeat(200), target)
        for weight, _ in WEIGHTS.values():
            if isinstance(weight, EDM) and isinstance(target, Noise):
                with refused("EDM", "Noise target", "InverseHeat", "target=clean"):
                    weight.check(denoiser.process, target)
            else:
                weight.check(denoiser.process, target)
                assert np.isfinite(weights_of(denoiser, weight, [0.005, 0.5, 1.0], (32, 48))).all()


def test_what_has_no_signal_to_noise_ratio_is_refused() -> None:
    for weight, _ in WEIGHTS.values():
        with refused("NextScale", "weight=target"):
            weight.check(VP(8), NextScale())
        with refused("Homogeneous", "needs noise", "weight=target"):
            weight.check(Homogeneous(8), Clean())
        for target in (Clean(), Noise(), Velocity()):
            weight.check(VP(8), target)
            weight.check(VE(8), target)
    with refused("gamma", "0"):
        MinSNR(0)
    with refused("gamma", "-1"):
        P2(-1.0)
    with refused("k", "0"):
        P2(k=0.0)


def test_weights_are_made_on_the_device() -> None:
    denoiser = Denoiser(TinyNetwork(), Blurring(8), Velocity())
    with pretended_gpu(denoiser):
        t = torch.rand(4, device="cuda", dtype=torch.float64)
        for weight, _ in WEIGHTS.values():
            assert denoiser.loss(torch.rand(4, 1, H, W, device="cuda"), t, loss_weight=weight).device.type == "cuda"


# --- learned ----------------------------------------------------------------------------------------------------------


def test_the_learned_weight_is_least_at_the_expected_losses() -> None:
    """Of losses by scale, exp(u) becomes their mean: the closed form of min_u E[loss] / exp(u) + u."""
    torch.manual_seed(0)
    process, weight = VP(1000), Learned(terms=16).double()
    t = float64([0.001, 0.003, 0.03, 0.3, 0.6, 1.0])
    mean = float64([1e-3, 4e-3, 0.02, 0.3, 2.0, 1.0])
    losses = torch.stack([0.5 * mean, 1.5 * mean])
    optimizer = torch.optim.LBFGS(
        weight.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-10
    )

    def total() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.stack([weight.balanced(row, process, t) for row in losses]).mean()
        value.backward()
        return value

    optimizer.step(total)
    close(weight.log_level(process, t).detach().exp().numpy(), mean.numpy(), 0, 1e-4)
    close(float(total().detach()), float(1 + mean.log().mean()), 0, 1e-6)


def test_a_new_learned_weight_is_the_targets_own() -> None:
    for process in (VP(), InverseHeat(), Homogeneous()):
        denoiser = Denoiser(TinyNetwork(), process, Clean())
        x_0, t, weight = images(3, 1, H, W), float64([0.125, 0.5, 1.0]), Learned()
        weight.check(process, denoiser.target)
        plain = denoiser.loss(x_0, t, generator=generator(1))
        assert torch.equal(denoiser.loss(x_0, t, generator=generator(1), loss_weight=weight), plain)
        with torch.no_grad():
            weight.series.weight.fill_(0.1)
        level = weight.log_level(process, t)
        found = denoiser.loss(x_0, t, generator=generator(1), loss_weight=weight)
        close(found.detach().numpy(), (plain * (-level).exp() + level).detach().numpy(), 1e-12, 1e-6)


def test_the_series_is_a_cosine_series_of_t_and_log_t() -> None:
    weight, process = Learned(terms=2).double(), VP(100)
    t = np.array([0.01, 0.2, 1.0])
    late = 1 + np.log(t) / np.log(100)
    rows = (np.ones(3), np.cos(np.pi * t), np.cos(np.pi * late), np.cos(2 * np.pi * late))
    for i, row in enumerate(rows):
        with torch.no_grad():
            weight.series.weight.zero_()[0, i] = 1
        close(weight.log_level(process, torch.tensor(t)).detach().numpy(), row, 0, 1e-12)
    with refused("terms must be a whole number from 1"):
        Learned(terms=0)
