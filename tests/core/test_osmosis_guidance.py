"""Guidance images of the osmosis processes: how they are drawn, what the network sees of them, and what is refused."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from dpm_scales.denoisers import Denoiser
from dpm_scales.priors import OsmosisPrior
from dpm_scales.processes import VP, OsmosisDiffusion
from dpm_scales.rng import CounterRNG
from dpm_scales.targets import Clean
from support.oracles import TinyNetwork, close, generator, refused
from support.osmosis_twins import guidance_images, images


def test_guidance_images_follow_the_mean_grey_value_and_are_clipped() -> None:
    process = OsmosisDiffusion(20, guidance_noise=0.1, guidance_min=0.05)
    dark, bright = torch.full((1, 1, 64, 64), -0.9), torch.full((1, 1, 64, 64), 0.6)
    v = process.context(torch.cat([dark, bright]), generator())
    assert v is not None and float(v.min()) == pytest.approx(0.05) and float(v.max()) <= 1
    assert float(v[1].mean()) == pytest.approx(0.8, abs=0.01)  # grey value 0.6 in [-1, 1] is 0.8 in [0, 1]
    assert float((v[0] == 0.05).float().mean()) == pytest.approx(0.5, abs=0.03)
    flat = OsmosisDiffusion(20, guidance_noise=0.0).context(dark)
    assert flat is not None and float(flat.max() - flat.min()) == 0


def test_smooth_guidance_is_blurred_noise_of_the_same_deviation() -> None:
    """400 images of 24 x 36: standard deviation, and the correlation exp(-d^2 / 4 sigma^2) of blurred noise."""
    process = OsmosisDiffusion(20, guidance_noise=0.05, guidance_pattern="smooth", guidance_blur_sigma=2.0)
    v = process.context(torch.zeros(400, 1, 24, 36, dtype=torch.float64), generator())
    assert v is not None
    field = (v - 0.5) / 0.05
    assert float(field.std()) == pytest.approx(1, abs=0.02)
    inner = field[..., 8:16, 8:28]  # reflecting boundaries add to the variance near them
    for d in (1, 2, 4):
        product = (inner * field[..., 8:16, 8 + d : 28 + d]).mean() / inner.square().mean()
        assert float(product) == pytest.approx(math.exp(-(d**2) / (4 * 2.0**2)), abs=0.04)


def test_edges_are_the_sign_of_smooth_guidance() -> None:
    make = functools.partial(OsmosisDiffusion, 20, guidance_noise=0.05, guidance_blur_sigma=3.0)
    x_0 = torch.zeros(4, 2, 16, 20, dtype=torch.float64)
    edges, smooth = (make(guidance_pattern=p).context(x_0, generator()) for p in ("edges", "smooth"))
    assert edges is not None and smooth is not None
    close(edges, 0.5 + 0.05 * torch.sign(smooth - 0.5), 1e-12)
    with refused("unknown guidance_pattern 'edge'", "did you mean 'edges'"):
        make(guidance_pattern="edge")
    with refused("guidance_blur_sigma"):
        OsmosisDiffusion(20, guidance_blur_sigma=0.0)


def test_network_need_not_see_the_guidance_image() -> None:
    process = OsmosisDiffusion(20, guidance_input=False)
    assert process.context_channels == 0 and OsmosisDiffusion(20).context_channels == 1
    assert process.context_features(guidance_images(2, 3, 4, 6)) is None
    network = TinyNetwork(1).double()
    denoiser = Denoiser(network, process, Clean()).double()
    x_0 = torch.rand(3, 1, 4, 6, dtype=torch.float64)
    assert torch.isfinite(denoiser.loss(x_0, torch.rand(3, dtype=torch.float64), generator=generator())).all()
    with refused("guidance_input must be true or false"):
        OsmosisDiffusion(20, guidance_input=1)  # type: ignore[arg-type]


def test_features_have_mean_zero_and_a_missing_context_is_told() -> None:
    process = OsmosisDiffusion(20)
    features = process.context_features(guidance_images(2, 3, 4, 6))
    assert features is not None and features.shape == (2, 3, 4, 6)
    close(features.mean((-2, -1)), torch.zeros(2, 3, dtype=torch.float64))
    with refused("OsmosisDiffusion", "guidance image", "process.context"):
        process.context_features(None)


def test_prior_depends_on_seed_and_number_alone_and_survives_a_state_dict() -> None:
    process, prior = OsmosisDiffusion(20), OsmosisPrior()
    prior.fit(images(7, 2, 5, 4), process)
    again = OsmosisPrior()
    again.load_state_dict(prior.state_dict())
    whole = prior.sample(process, CounterRNG(1, 5), (2, 5, 4))
    part = again.sample(process, CounterRNG(1, 2, first=3), (2, 5, 4))
    assert torch.equal(whole[0][3:], part[0])
    assert whole[1] is not None and part[1] is not None and torch.equal(whole[1][3:], part[1])


def test_prior_says_what_is_missing() -> None:
    with refused("train the model first"):
        OsmosisPrior().sample(OsmosisDiffusion(20), CounterRNG(0, 1), (1, 4, 4))
    with refused("osmosis process", "VP"):
        OsmosisPrior().fit(images(2, 1, 4, 4), VP(10))
    prior = OsmosisPrior()
    prior.fit(images(2, 1, 4, 4), OsmosisDiffusion(20))
    with refused("1 channel(s)", "3"):
        prior.sample(OsmosisDiffusion(20), CounterRNG(0, 1), (3, 4, 4))
    for bad in ({"noise_ratio": -1.0}, {"noise_ratio": None}, {"max_images": 0}):
        with refused("OsmosisPrior"):
            OsmosisPrior(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"guidance_noise": -0.1}, ["guidance_noise", "-0.1"]),
        ({"guidance_min": 0.0}, ["guidance_min", "0.0"]),
        ({"guidance_min": 1.0}, ["guidance_min", "1.0"]),
        ({"tolerance": 0.0}, ["tolerance"]),
        ({"num_scales": 0}, ["num_scales"]),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], words: list[str]) -> None:
    with refused("OsmosisDiffusion", *words):
        OsmosisDiffusion(**({"num_scales": 4} | arguments))
