"""Priors: where sampling starts, against dense matrices and the laws they promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpm_scales.priors import DataPrior, GaussianPrior, OsmosisPrior, auto_prior
from dpm_scales.processes import (
    VE,
    VP,
    Blurring,
    BlurringChain,
    Homogeneous,
    InverseHeat,
    InverseOsmosis,
    Osmosis,
    OsmosisDiffusion,
    OsmosisFilter,
    Process,
)
from dpm_scales.rng import CounterRNG
from dpm_scales.schedules import ConstantBeta, ConstantNoise, CosineLogSNR, LogBlur, SinSquaredBlur
from support.oracles import (
    BY_NAME,
    MEMBERS,
    NOISY_MEMBERS,
    H,
    W,
    close,
    coefficients,
    curves,
    images,
    named,
    over,
    pixels,
    pretended_gpu,
    refused,
)
from support.reference import TWINS, Twin, dense_function

BLURRED = [twin for twin in TWINS if twin.spectrum is not None]


def fitted(twin: Twin, prior: DataPrior, data: Tensor) -> tuple[DataPrior, Process]:
    process = twin.build()
    prior.fit(data, process)
    return prior, process


# --- noise alone ------------------------------------------------------------------------------------------------------


@over(named(*NOISY_MEMBERS))
def test_gaussian_prior_is_the_processs_noise_at_scale_one(twin: Twin) -> None:
    """gamma_1(L) applied to the source's draw, mode by mode."""
    prior, process = GaussianPrior(), twin.build()
    y, context = prior.sample(process, CounterRNG(3, 4), (2, H, W), torch.float64)
    white = CounterRNG(3, 4).normal((2, H, W), torch.float64)
    assert context is None and y.dtype == torch.float64
    close(y.numpy(), pixels(curves(twin, 1.0)[1] * coefficients(white.numpy())), 1e-12)
    single, _ = prior.sample(process, CounterRNG(3, 4), (2, H, W))
    assert single.dtype == torch.float32
    close(single.numpy(), y.numpy(), 1e-5 * float(y.abs().max()))
    assert prior.max_images == 0 and not list(prior.state_dict())
    prior.fit(images(2, 2, H, W), process)  # nothing to learn, and no error


@over(named(*NOISY_MEMBERS))
def test_gaussian_prior_has_mean_zero_and_the_variance_of_each_frequency(twin: Twin) -> None:
    """20000 samples; each coefficient within 5 standard errors."""
    rows = 20000
    y, _ = GaussianPrior().sample(twin.build(), CounterRNG(1, rows), (1, H, W), torch.float64)
    u, std = coefficients(y.numpy())[:, 0], curves(twin, 1.0)[1]
    assert (np.abs(u.mean(0)) < 5 * std / math.sqrt(rows)).all()
    assert (np.abs((u**2).mean(0) / std**2 - 1) < 5 * math.sqrt(2 / rows)).all()


# --- blurred training images ------------------------------------------------------------------------------------------


@over(BLURRED)
def test_data_prior_is_a_blurred_training_image_and_noise(twin: Twin) -> None:
    """lambda_1(L) x + r gamma_1(L) eps against dense matrices, for the image and noise of the source."""
    data = images(7, 2, H, W)
    prior, process = fitted(twin, DataPrior(noise_ratio=1.5, tolerance=1e-12), data)
    y, context = prior.sample(process, CounterRNG(3, 40), (2, H, W), torch.float64)
    source = CounterRNG(3, 40)
    index = (source.uniform() * 7).floor().long()
    noise = source.normal((2, H, W), torch.float64)
    blur = dense_function(twin.matrix(H, W), lambda mu: twin.signal(1.0, mu))
    std = dense_function(twin.matrix(H, W), lambda mu: np.sqrt(twin.variance(1.0, mu).clip(0)))
    expected = data[index].flatten(-2).numpy() @ blur + 1.5 * noise.flatten(-2).numpy() @ std
    assert context is None and y.dtype == torch.float64
    close(y.flatten(-2).numpy(), expected, 1e-6)  # the images are stored in float32
    assert set(index.tolist()) == set(range(7))
    single, _ = prior.sample(process, CounterRNG(3, 40), (2, H, W))
    assert single.dtype == torch.float32
    close(single.numpy(), y.numpy(), 1e-5)


def test_every_training_image_is_drawn_equally_often_and_with_noise_of_its_own() -> None:
    rows, count = 20000, 5
    data = torch.arange(count).reshape(count, 1, 1, 1).expand(count, 1, 2, 3) / count
    prior, process = DataPrior(noise_ratio=2.0), InverseHeat(8, ConstantNoise(0.01))
    prior.fit(data, process)
    y, _ = prior.sample(process, CounterRNG(4, rows), (1, 2, 3), torch.float64)
    which = (y.mean((1, 2, 3)) * count).round()
    shares = torch.bincount(which.long(), minlength=count) / rows
    assert (shares - 1 / count).abs().max() < 5 * math.sqrt(0.16 / rows)
    rest = y - which.reshape(-1, 1, 1, 1) / count
    assert float((rest**2).mean()) == pytest.approx(0.02**2, rel=5 * math.sqrt(2 / rest.numel()))
    assert abs(float(rest.mean())) < 5 * 0.02 / math.sqrt(rest.numel())


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.25])
def test_noise_ratio_scales_the_noise_alone(ratio: float) -> None:
    twin, data = BY_NAME["inverse-heat-0.1"], images(3, 1, H, W)
    start = [fitted(twin, DataPrior(noise_ratio=r), data) for r in (0.0, 1.0, ratio)]
    none, one, some = (prior.sample(process, CounterRNG(2, 9), (1, H, W), torch.float64)[0] for prior, process in start)
    close((some - none).numpy(), (ratio * (one - none)).numpy(), 1e-12)
    assert float((one - none).std()) == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (21, 8)])
def test_dropped_coefficients_change_the_start_by_less_than_the_tolerance(
    size: tuple[int, int], tolerance: float
) -> None:
    """Norm of the error <= tolerance * norm of the image; few coefficients are kept, and all that matter."""
    process, data = InverseHeat(8, blur=LogBlur(0.5, 4)), images(5, 1, *size).float()
    prior = DataPrior(noise_ratio=0.0, tolerance=tolerance)
    prior.fit(data, process)
    y, _ = prior.sample(process, CounterRNG(0, 30), (1, *size), torch.float64)
    index = (CounterRNG(0, 30).uniform() * 5).long()
    exact = process.marginal(data[index].double(), 1.0).mean
    error = (y - exact).flatten(1).norm(dim=1) / data[index].flatten(1).norm(dim=1)
    assert error.max() < tolerance
    kept = prior.coefficients.shape[-2:]
    # exp(-mu T) >= tolerance along each axis: (pi k / n)^2 <= -log(tolerance) / 8
    for n, rows in zip(size, kept, strict=True):
        assert rows == math.floor(n / math.pi * math.sqrt(-math.log(tolerance) / 8)) + 1 < n


def test_rows_and_columns_are_not_mixed_up() -> None:
    """A wide image keeps more columns than rows, and its stripes come back the right way."""
    process = InverseHeat(8, blur=LogBlur(0.5, 4))
    data = torch.cos(math.pi * (torch.arange(32) + 0.5) / 32 * 2).expand(1, 1, 6, 32)
    prior = DataPrior(noise_ratio=0.0)
    prior.fit(data, process)
    assert prior.coefficients.shape[-2] < prior.coefficients.shape[-1]
    y, _ = prior.sample(process, CounterRNG(0, 1), (1, 6, 32))
    close(y.numpy(), (math.exp(-8 * (2 * math.pi / 32) ** 2) * data).numpy(), 1e-6, 1e-5)


def test_no_more_images_are_stored_than_allowed() -> None:
    prior = DataPrior(max_images=3)
    assert prior.max_images == 3
    prior.fit(images(10, 1, H, W), InverseHeat(8))
    assert prior.coefficients.shape[0] == 3 and prior.coefficients.dtype == torch.float32


def test_fitting_again_replaces_the_images() -> None:
    prior, process = DataPrior(noise_ratio=0.0), InverseHeat(8)
    prior.fit(torch.zeros(4, 1, H, W), process)
    prior.fit(torch.ones(2, 1, W, H), process)
    y, _ = prior.sample(process, CounterRNG(0, 5), (1, W, H))
    close(y.numpy(), 1.0, 1e-6)
    prior.check_size((W, H))


# --- storage ----------------------------------------------------------------------------------------------------------


def test_a_stored_prior_samples_without_its_training_data(tmp_path: Path) -> None:
    """Through a file, inside another module, into one that was built with nothing or fitted to something else."""
    process = BY_NAME["inverse-heat"].build()
    prior = DataPrior()
    prior.fit(images(6, 2, H, W), process)
    torch.save(nn.ModuleDict({"prior": prior}).state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    used = DataPrior()
    used.fit(images(2, 1, W, H), process)
    for other in (DataPrior(), used):
        nn.ModuleDict({"prior": other}).load_state_dict(state)
        other.check_size((H, W))
        expected, _ = prior.sample(process, CounterRNG(1, 5), (2, H, W))
        assert torch.equal(other.sample(process, CounterRNG(1, 5), (2, H, W))[0], expected)
    assert set(state) == {"prior.coefficients", "prior.image_size"}


def test_a_state_without_images_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="coefficients"):
        DataPrior().load_state_dict({"image_size": torch.tensor([3, 5])})


def test_an_empty_prior_survives_a_round_trip_and_still_says_so() -> None:
    prior = DataPrior()
    prior.load_state_dict(DataPrior().state_dict())
    with refused("no training images", "train the model first"):
        prior.sample(InverseHeat(8), CounterRNG(0, 1), (1, H, W))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_sampling_before_training_is_refused() -> None:
    with refused("DataPrior", "no training images", "train the model first"):
        DataPrior().sample(InverseHeat(8), CounterRNG(0, 1), (1, H, W))


def test_sizes_other_than_the_training_images_are_refused() -> None:
    prior = DataPrior()
    prior.fit(images(2, 1, H, W), InverseHeat(8))
    prior.check_size((H, W))
    with refused("3x5 pixels", "can't sample 5x3"):
        prior.check_size((W, H))


def test_channels_other_than_the_training_images_are_refused() -> None:
    prior = DataPrior()
    prior.fit(images(2, 1, H, W), InverseHeat(8))
    with refused("1 channel", "can't sample 3"):
        prior.sample(InverseHeat(8), CounterRNG(0, 1), (3, H, W))


@pytest.mark.parametrize("make", [VP, VE])
def test_data_prior_needs_blur(make: Callable[..., Process]) -> None:
    name = getattr(make, "__name__", "")
    with refused("needs a process that blurs", name):
        DataPrior().fit(images(2, 1, H, W), make(8))
    prior = DataPrior()
    prior.fit(images(2, 1, H, W), InverseHeat(8))
    with refused("needs a process that blurs", name):
        prior.sample(make(8), CounterRNG(0, 1), (1, H, W))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("noise_ratio", -0.1),
        ("noise_ratio", math.nan),
        ("noise_ratio", math.inf),
        ("noise_ratio", "1"),
        ("max_images", 0),
        ("max_images", 2.5),
        ("max_images", True),
        ("tolerance", 0.0),
        ("tolerance", 1.0),
        ("tolerance", math.nan),
    ],
)
def test_arguments_out_of_range_are_refused(argument: str, value: Any) -> None:
    with refused("DataPrior", argument, repr(value)):
        DataPrior(**{argument: value})


# --- guidance images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [InverseOsmosis, OsmosisDiffusion])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.25])
def test_guidance_prior_is_the_steady_state_and_noise(make: Callable[..., Osmosis], ratio: float) -> None:
    """x_1 = a_1 v m + r gamma_1 sqrt(v) eps in pixels, v = clip(m + 0.1 N(0, 1), 0.01, 1) / its mean, by the source."""
    process, data = make(8), images(5, 2, H, W).clamp(-0.5, 0.5)
    low, high = process.value_range
    data = low + (high - low) * (data + 1) / 2
    prior = OsmosisPrior(noise_ratio=ratio)
    prior.fit(data, process)
    y, context = prior.sample(process, CounterRNG(3, 30), (2, H, W), torch.float64)
    source = CounterRNG(3, 30)
    index = (source.uniform() * 5).floor().long()
    white, noise = source.normal((2, H, W), torch.float64), source.normal((2, H, W), torch.float64)
    mean = data[index].mean((-2, -1), keepdim=True)
    v = ((mean - low) / (high - low) + 0.1 * white).clamp(0.01, 1)
    assert context is not None and set(index.tolist()) == set(range(5))
    close(context.numpy(), v.numpy(), 1e-6)  # grey values are stored in float32
    v = v / v.mean((-2, -1), keepdim=True)
    mu = torch.zeros(1, 1, dtype=torch.float64)
    expected = process.signal_scale(1.0, mu) * v * mean + ratio * process.noise_scale(1.0, mu) * v.sqrt() * noise
    close(process.operator(context).to_pixels(y).numpy(), expected.numpy(), 1e-5)


def test_guidance_prior_is_stored_and_refuses_what_it_does_not_know() -> None:
    process, prior = InverseOsmosis(8), OsmosisPrior(max_images=3)
    with refused("no grey values", "train the model first"):
        prior.sample(process, CounterRNG(0, 1), (2, H, W))
    prior.fit(images(5, 2, H, W).clamp(0, 1), process)
    assert prior.max_images == 3 and prior.grey.shape == (3, 2)
    other = OsmosisPrior()
    other.load_state_dict(prior.state_dict())
    expected, got = (p.sample(process, CounterRNG(1, 4), (2, H, W)) for p in (prior, other))
    assert torch.equal(got[0], expected[0])
    assert got[1] is not None and expected[1] is not None and torch.equal(got[1], expected[1])
    with refused("2 channel", "can't sample 3"):
        prior.sample(process, CounterRNG(0, 1), (3, H, W))
    for call in (
        lambda: prior.fit(images(1, 1, H, W), VP(8)),
        lambda: prior.sample(VP(8), CounterRNG(0, 1), (2, 1, 1)),
    ):
        with refused("needs an osmosis process", "VP"):
            call()
    for argument, value in [("noise_ratio", -1.0), ("noise_ratio", math.nan), ("max_images", 0), ("max_images", 1.5)]:
        with refused("OsmosisPrior", argument, repr(value)):
            OsmosisPrior(**{argument: value})


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "ratio"),
    [
        (VP(), None),
        (VP(100, ConstantBeta(0.1)), None),
        (VE(), None),
        (Blurring(), None),
        (Blurring(blur=SinSquaredBlur(4.0)), None),
        (Blurring(noise=CosineLogSNR(-7.9)), None),  # 1.9 % of the grey value, in units of the noise
        (Blurring(noise=CosineLogSNR(-7.7)), 1.0),  # 2.1 %
        (InverseHeat(), 1.25),
        (InverseHeat(noise=ConstantNoise(0.1)), 1.25),
        (Homogeneous(), 1.25),
        (BlurringChain(), 1.0),
        (BlurringChain(num_scales=10), 1.0),
    ],
)
def test_auto_prior_starts_from_data_where_the_process_ends_in_blur(process: Process, ratio: float | None) -> None:
    prior = auto_prior(process)
    if ratio is None:
        assert isinstance(prior, GaussianPrior)
    else:
        assert isinstance(prior, DataPrior) and prior.ratio(process) == ratio


@pytest.mark.parametrize("make", [OsmosisFilter, InverseOsmosis, OsmosisDiffusion])
def test_auto_prior_of_osmosis_draws_guidance_images(make: Callable[..., Process]) -> None:
    assert isinstance(auto_prior(make(8)), OsmosisPrior)


# --- devices ----------------------------------------------------------------------------------------------------------


@over(named(*MEMBERS))
def test_starts_are_made_on_the_device(twin: Twin) -> None:
    process, prior = twin.build(), auto_prior(twin.build())
    prior.fit(images(3, 2, H, W), process)
    with pretended_gpu(process, prior):
        for start in (prior, GaussianPrior()):
            y, _ = start.sample(process, CounterRNG(1, 4, device="cuda"), (2, H, W))
            assert y.device.type == "cuda" and y.shape == (4, 2, H, W)


def test_the_start_of_a_sample_does_not_depend_on_its_batch() -> None:
    process = BY_NAME["inverse-heat"].build()
    prior = DataPrior()
    prior.fit(images(6, 2, H, W), process)
    for start in (prior, GaussianPrior()):
        whole, _ = start.sample(process, CounterRNG(1, 7), (2, H, W), torch.float64)
        parts = [start.sample(process, CounterRNG(1, n, f), (2, H, W), torch.float64)[0] for f, n in ((0, 3), (3, 4))]
        close(torch.cat(parts).numpy(), whole.numpy(), 1e-14)
