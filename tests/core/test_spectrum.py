"""The data's spectrum: measured from images of a known one, against plain loops, at any size."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.operators import HeatOperator
from dpm_scales.processes import VE, VP, Blurring, InverseHeat, OsmosisDiffusion, Process
from dpm_scales.spectrum import HIGHEST, KNOTS, LOWEST, DataSpectrum
from dpm_scales.targets import Clean, Noise
from support.oracles import close, coefficients, float64, generator, pixels, refused


def coloured(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Images of power (0.05 + mu)^-1 beside the mean and of average grey values of variance 0.04; the greys."""
    mu = HeatOperator().eigenvalues(height, width).numpy()
    white = torch.randn(count, 1, height, width, generator=generator(1), dtype=torch.float64).numpy()
    u = white / np.sqrt(0.05 + mu)
    u[..., 0, 0] = (0.3 + 0.2 * white[..., 0, 0]) * math.sqrt(height * width)
    x = torch.from_numpy(pixels(u))
    return x, x.mean((-2, -1))


def fitted(x: Tensor, grey: Tensor, size: int = 50) -> DataSpectrum:
    spectrum = DataSpectrum(float(((x - grey.mean()) ** 2).mean().sqrt()))
    spectrum.fit([(a - b[..., None, None], b) for a, b in zip(x.split(size), grey.split(size), strict=True)])
    return spectrum.double()


@pytest.mark.parametrize("size", [(16, 16), (12, 30)])
def test_measured_spectrum_is_the_true_one(size: tuple[int, int]) -> None:
    """400 images; a knot averages the frequencies around it, and the curve is straight in between."""
    x, grey = coloured(400, *size)
    spectrum = fitted(x, grey)
    mu = HeatOperator().eigenvalues(*size).flatten()[1:]
    truth = 1 / (0.05 + mu)
    ratio = spectrum(mu) / truth
    assert 0.85 < float(ratio.min()) and float(ratio.max()) < 1.18
    assert float(ratio.log().std()) < 0.05
    grey_power = size[0] * size[1] * float(grey.var(unbiased=False))
    assert float(spectrum(float64([0.0]))) == pytest.approx(grey_power, rel=0.03)


def test_average_over_the_spectrum_is_the_variance_of_the_pixels() -> None:
    """Parseval: the shares are those of the images, so what the coefficients have on average the pixels have."""
    x, grey = coloured(300, 12, 18)
    spectrum = fitted(x, grey)
    mu = HeatOperator().eigenvalues(12, 18)
    assert float(spectrum.on(mu).mean()) == pytest.approx(float(spectrum.variance), rel=1e-6)
    u = coefficients((x - grey.mean()).numpy())
    assert float((u**2).mean()) == pytest.approx(float(spectrum.variance), rel=1e-6)


def test_curve_is_a_weighted_line_at_each_knot() -> None:
    """numpy's polyfit, knot by knot, where there are frequencies enough for a line."""
    x, grey = coloured(20, 25, 40)
    spectrum = fitted(x, grey, size=7)
    u = coefficients((x - grey[..., None, None]).numpy())[:, 0]
    power = (u**2).mean(0).ravel()
    log_mu = np.log(HeatOperator().eigenvalues(25, 40).numpy().ravel()[1:])
    step = (HIGHEST - LOWEST) / (KNOTS - 1)
    knots = [LOWEST + k * step for k in range(KNOTS) if -2 < LOWEST + k * step < log_mu.max()]
    assert len(knots) > 5
    lines = []
    for knot in knots:
        weights = np.exp(-0.25 * ((log_mu - knot) / (step / 2)) ** 2)  # polyfit squares them
        lines.append(np.polyval(np.polyfit(log_mu - knot, np.log(power[1:]), 1, w=weights), 0))
    curve = spectrum(torch.tensor(knots).double().exp()).log().numpy()
    close(curve - curve.mean(), np.array(lines) - np.mean(lines), 1e-5)


def test_data_are_white_until_they_are_measured() -> None:
    mu = float64([0.0, 1e-7, 0.01, 1.0, 8.0, 19.0, 100.0])
    close(DataSpectrum(0.5)(mu).numpy(), 0.25, 1e-12)


def test_one_eigenvalue_stands_for_the_whole_spectrum() -> None:
    """Without blur there is nothing but the variance; a single node of an expansion is still a frequency."""
    spectrum = fitted(*coloured(50, 8, 8))
    assert float(spectrum.on(torch.zeros(1, 1).double())) == float(spectrum.variance)
    assert float(spectrum(float64([8.0]))) < 0.5 * float(spectrum.variance)


def test_constant_parts_leave_a_floor_and_nothing_that_is_not_finite() -> None:
    flat = torch.full((10, 1, 6, 6), 0.5, dtype=torch.float64)
    spectrum = DataSpectrum(0.5)
    spectrum.fit([(flat - 0.5, flat.mean((-2, -1)))])
    assert torch.isfinite(spectrum.log_factor).all()
    single = DataSpectrum(0.5)
    single.fit([(torch.zeros(4, 1, 1, 1), torch.rand(4, 1))])
    assert torch.isfinite(single(float64([0.0, 1.0]))).all()
    with refused("no images"):
        DataSpectrum(0.5).fit([])


@pytest.mark.parametrize("std", [0.0, -1.0, math.inf, "1"])
def test_std_must_be_positive(std: float) -> None:
    with refused("data_std must be positive", repr(std)):
        DataSpectrum(std)


@pytest.mark.parametrize(("power", "filtered"), [(0.0, False), (1.5, True)])
@pytest.mark.parametrize(
    ("make", "filter_name"), [(Blurring, "wiener"), (OsmosisDiffusion, "wiener"), (VP, "spectral"), (VE, "spectral")]
)
def test_auto_preconditioning_follows_the_datas_spectrum(
    make: Callable[[], Process], filter_name: str, power: float, filtered: bool
) -> None:
    """White data gain nothing from a filter for each frequency, power laws like those of photos do."""
    height, width = 16, 24
    mu = HeatOperator().eigenvalues(height, width).numpy()
    white = torch.randn(200, 1, height, width, generator=generator(2), dtype=torch.float64).numpy()
    x = torch.from_numpy(pixels(white * (0.05 + mu) ** -power))
    x = 0.3 * x / x.std()
    grey = x.mean((-2, -1))
    process, target = make(), Clean()
    spectrum, expected = fitted(x, grey), filter_name if filtered else "scalar"
    assert target.resolve_auto(process, spectrum, (height, width)) == {"preconditioning": expected}
    assert target.preconditioning == expected
    for chosen in ("scalar", "wiener", "none"):
        assert Clean(chosen).resolve_auto(process, spectrum, (height, width)) == {"preconditioning": chosen}


def test_auto_preconditioning_without_a_spectrum_to_follow() -> None:
    """Constant noise takes the filter whatever the data; other targets have no preconditioning to choose."""
    assert Clean().resolve_auto(InverseHeat(), DataSpectrum(0.3), (8, 8)) == {"preconditioning": "wiener"}
    assert Noise().resolve_auto(VP(), DataSpectrum(0.3), (8, 8)) == {}
