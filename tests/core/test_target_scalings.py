"""Preconditioning: scalings of each target against EDM's table, dense second moments and the best linear estimate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.moments import Moments
from dpm_scales.processes import VE, VP, Homogeneous, Process
from dpm_scales.schedules import ListedBeta, ListedDissipationTimes, LogBlur
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.targets import Clean, NextScale, Noise, Target, Velocity
from support.oracles import BY_NAME, H, W, close, curves, float64, generator, images, noised, over, refused
from support.reference import TWINS, Array, Twin
from support.targets import TARGETS, dense, vectors

SCALAR = [twin for twin in TWINS if twin.spectrum is None]


BLURRED = [twin for twin in TWINS if twin.spectrum is not None]


def white(std: float) -> DataSpectrum:
    spectrum = DataSpectrum(std).double()
    spectrum.std.fill_(std)  # not rounded on the way
    return spectrum


def scalings(process: Process, target: Target, t: list[float], data_std: float, size: tuple[int, int] = (H, W)) -> Any:
    m = Moments(process, process.operator(), float64(t), white(data_std), size)
    return target.scalings(m)


def filtered(c: Any, x: Tensor) -> Tensor:
    """w x for the processes without blur."""
    return x if c.filter is None else c.filter(torch.zeros(1, 1, dtype=torch.float64)) * x


def flat(value: Tensor) -> Array:
    return value.flatten().numpy()


@pytest.mark.parametrize("kind", ["scalar", "wiener"])
@pytest.mark.parametrize("data_std", [0.5, 1.3])
def test_scalings_of_an_exploding_process_are_edms_table_1(data_std: float, kind: str) -> None:
    """c_skip, c_out, c_in and lambda(sigma) as printed there, at EDM's own noise levels."""
    t = [0.01, 0.2, 0.5, 0.9, 1.0]
    sigma = np.array(
        [(0.002 ** (1 / 7) + (k - 1) / 99 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for k in (1, 20, 50, 90, 100)]
    )
    c = scalings(VE(100), Clean(kind), t, data_std)
    one = torch.ones((), dtype=torch.float64)
    close(flat(c.skip * filtered(c, one)), data_std**2 / (sigma**2 + data_std**2), 1e-13)
    close(flat(c.out), sigma * data_std / np.sqrt(data_std**2 + sigma**2), 1e-13)
    close(flat(c.inner * filtered(c, one)), 1 / np.sqrt(sigma**2 + data_std**2), 1e-13)
    close(flat(c.weight), (sigma**2 + data_std**2) / (sigma * data_std) ** 2, 1e-6)


@pytest.mark.parametrize("kind", ["scalar", "wiener"])
@over(SCALAR)
def test_scalings_without_blur_are_those_of_signal_and_noise(twin: Twin, kind: str) -> None:
    """c_skip = a s^2 / V, c_out = gamma s / sqrt(V), c_in = 1 / sqrt(V), V = a^2 s^2 + gamma^2."""
    process, s, t = twin.build(), 0.7, [0.125, 0.3, 0.625, 1.0]
    a = np.array([float(curves(twin, v)[0][0, 0]) for v in t])
    gamma = np.array([float(curves(twin, v)[1][0, 0]) for v in t])
    finer = np.array([float(curves(twin, v - 1 / 8)[0][0, 0]) for v in t])
    total = a**2 * s**2 + gamma**2
    c, one = scalings(process, Clean(kind), t, s), torch.ones((), dtype=torch.float64)
    close(flat(c.skip * filtered(c, one)), a * s**2 / total)
    close(flat(c.out), gamma * s / np.sqrt(total))
    close(flat(c.inner * filtered(c, one)), 1 / np.sqrt(total))
    close(flat(c.weight), total / (gamma * s) ** 2)
    step = (finer - a) ** 2 * s**2 + gamma**2
    for target, out, weight in [
        (Clean(preconditioning="none"), 1, 1),
        (Noise(), 1, 1),
        (Velocity(), 1, 1),
        (NextScale(), np.sqrt(step), 1),
        (NextScale(equal_weight=True), np.sqrt(step), 1 / step),
    ]:
        c = scalings(process, target, t, s)
        assert not c.skip.any() and c.skip.shape == c.out.shape == c.inner.shape == c.weight.shape == (4, 1, 1, 1)
        close(flat(c.inner), 1 / np.sqrt(total))
        close(flat(c.out), out)
        close(flat(c.weight), weight)


@over(BLURRED)
def test_scalings_under_blur_are_second_moments_averaged_over_the_spectrum(twin: Twin) -> None:
    """For coloured data, by loops over the frequencies: "scalar" takes the regression of x_0 on x_t, "wiener" that of
    each coefficient; c_out is the error's standard deviation, c_in that of what the network sees."""
    process, t = twin.build(), [0.125, 0.3, 0.625, 1.0]
    spectrum = white(0.6)
    spectrum.log_factor.copy_(torch.linspace(2, -2, len(spectrum.log_factor)))
    mu = twin.mu(H, W).ravel()
    power = spectrum(float64(mu.tolist())).tolist()
    m = Moments(process, process.operator(), float64(t), spectrum, (H, W))
    targets = (Clean("scalar"), Clean("wiener"), Velocity(), NextScale(equal_weight=True))
    scalar, c, plain, finer = (target.scalings(m) for target in targets)
    assert c.filter is not None and scalar.filter is plain.filter is finer.filter is None
    gains = c.filter(float64(mu.tolist()))
    for b, v in enumerate(t):
        signal, noise = (curve.ravel() for curve in curves(twin, v))
        before = curves(twin, v - 1 / 8)[0].ravel()
        estimate = residual = total = cross = step = 0.0
        for j, (p, a, n, f) in enumerate(zip(power, signal, noise, before, strict=True)):
            floor = n * n if n > 0 else 1e-4 * 0.6**2
            wiener = a * p / (a * a * p + floor)
            assert float(gains[b].flatten()[j]) == pytest.approx(wiener, rel=1e-7)
            estimate += wiener**2 * (a * a * p + floor) / len(mu)
            residual += ((1 - wiener * a) ** 2 * p + wiener**2 * floor) / len(mu)
            total += (a * a * p + n * n) / len(mu)
            cross += a * p / len(mu)
            step += ((a - f) ** 2 * p + n * n) / len(mu)
        close(float(c.skip[b]), 1)
        close(float(c.inner[b]), 1 / math.sqrt(estimate), 0, 1e-7)
        close(float(c.out[b]), math.sqrt(residual), 1e-9, 1e-6)
        close(float(c.weight[b]), 1 / residual, 0, 1e-5)
        mean_power = sum(power) / len(power)
        close(float(scalar.skip[b]), cross / total)
        close(float(scalar.out[b]), math.sqrt(mean_power - cross**2 / total), 1e-7, 1e-6)
        close([float(x[b]) for x in (scalar.inner, plain.inner, finer.inner)], 1 / math.sqrt(total))
        assert (float(plain.skip[b]), float(plain.out[b]), float(plain.weight[b])) == (0, 1, 1)
        close([float(finer.out[b]), float(finer.weight[b])], [math.sqrt(step), 1 / step])


@over([twin for twin in BLURRED if twin.name in BY_NAME])
def test_wiener_estimate_is_the_best_linear_one(twin: Twin) -> None:
    """Against the normal equations of dense covariance matrices, for data of a measured spectrum."""
    process, t = twin.build(), 0.5
    spectrum = white(0.6)
    spectrum.log_factor.copy_(torch.linspace(2, -2, len(spectrum.log_factor)))
    m = Moments(process, process.operator(), float64([t]), spectrum, (H, W))
    data = dense(twin, lambda mu: spectrum(torch.from_numpy(mu)).numpy())
    blur = dense(twin, lambda mu: twin.signal(t, mu) * np.ones_like(mu))
    noise = dense(twin, lambda mu: np.maximum(twin.variance(t, mu), 0) * np.ones_like(mu))
    if not noise.any():
        noise = 1e-4 * 0.6**2 * np.eye(H * W)
    best = np.linalg.solve(blur @ data @ blur.T + noise, blur @ data)  # symmetric: all commute
    x = images(2, 1, H, W)
    z = process.operator().apply(m.wiener, x)
    scale = float(np.abs(best).max())
    close(vectors(z), vectors(x) @ best, 1e-6 * scale)
    uncertainty = np.trace(data - data @ blur @ best) / (H * W)
    assert float(m.wiener_residual) == pytest.approx(uncertainty, rel=1e-5, abs=1e-9)


def white_images(twin: Twin, data_std: float, count: int) -> tuple[Tensor, Tensor]:
    """Images of independent pixels, and noise."""
    white = torch.randn(2, count, 1, 16, 16, generator=generator(5), dtype=torch.float64)
    return data_std * white[0], white[1]


@pytest.mark.parametrize("name", ["clean", "clean-wiener", "finer", "finer-equal"])
@over(SCALAR)
def test_networks_see_and_give_unit_variance(twin: Twin, name: str) -> None:
    """(truth - c_skip x_t) / c_out and c_in x_t on white data: 51200 pixels, within 5 standard errors of 1."""
    s, count, target = 0.7, 200, TARGETS[name]()
    process = twin.build()
    x_0, noise = white_images(twin, s, count)
    for t in (0.125, 0.5, 1.0):
        scale = torch.full((count,), t, dtype=torch.float64)
        x_t = noised(twin, x_0, noise, t)
        c = scalings(process, target, [t], s, (16, 16))
        z = filtered(c, x_t)
        asked = (target.regression_target(process, process.operator(), x_0, x_t, noise, scale) - c.skip * z) / c.out
        for value in (asked, c.inner * z):
            assert float((value**2).mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / value.numel()))
        if name != "finer":  # every scale counts the same
            close(flat(c.weight * c.out**2), 1)


@over([twin for twin in SCALAR if twin.name.startswith("vp")])
def test_velocity_asks_for_unit_variance_where_variance_is_preserved(twin: Twin) -> None:
    process = twin.build()
    x_0, noise = white_images(twin, 1.0, 200)
    t = torch.full((200,), 0.5, dtype=torch.float64)
    for target in (Noise(), Velocity()):
        asked = target.regression_target(process, process.operator(), x_0, noised(twin, x_0, noise, 0.5), noise, t)
        assert float((asked**2).mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / asked.numel()))


@pytest.mark.parametrize("name", list(TARGETS))
def test_scales_that_differ_by_nothing_ask_for_nothing(name: str) -> None:
    """The first of a list may be the image itself: no 0 / 0, and 0 asked for stays 0."""
    target = TARGETS[name]()
    still: list[Process] = [VP(4, ListedBeta([0.0, 0.1, 0.1, 0.1]))]
    if name not in ("noise", "velocity"):
        still += [Homogeneous(4, ListedDissipationTimes([0.0, 1.0, 1.0, 2.0]))]
    x_0 = images(2, 1, H, W)
    for process in still:
        for t in (0.25, 0.75):
            c = scalings(process, target, [t, t], 0.5)
            assert all(torch.isfinite(value).all() for value in (c.skip, c.out, c.inner, c.weight))
            x_t = process.sample(x_0, t)
            asked = target.regression_target(
                process, process.operator(), x_0, x_t, torch.zeros_like(x_0), float64([t, t])
            )
            z = x_t if c.filter is None else process.operator().apply(c.filter, x_t)
            assert torch.isfinite(z).all()
            loss = c.weight * (c.skip * z + c.out * 1.0 - asked) ** 2
            assert torch.isfinite(loss).all()


def test_wiener_is_chosen_where_only_blur_tells_the_scales_apart() -> None:
    """And refused by another name."""
    for twin in TWINS:
        process = twin.build()
        noise = [float(curves(twin, t)[1].max()) for t in (1 / twin.num_scales, 1.0)]
        sharpened = scalings(process, Clean(), [0.5], 0.5).filter is not None
        assert sharpened == math.isclose(*noise, rel_tol=1e-8)
    with refused("unknown preconditioning 'winer'", "did you mean 'wiener'"):
        Clean("winer")


def test_heavy_blur_without_noise_leaves_scalings_finite() -> None:
    """128 px on 8 x 8 pixels: every factor but the mean's underflows."""
    process = Homogeneous(8, LogBlur(0.5, 128))
    c = scalings(process, Clean("wiener"), [0.125, 0.5, 1.0], 0.5, (8, 8))
    assert torch.isfinite(c.filter(process.operator().eigenvalues(8, 8))).all()
    assert all(torch.isfinite(value).all() for value in (c.skip, c.out, c.inner, c.weight))
