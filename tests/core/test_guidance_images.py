"""Guidance by images, and priors that start from images of the user's choice, against SciPy and by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor

from dpm_scales.priors import DataPrior, GaussianPrior, OsmosisPrior, Prior
from dpm_scales.processes import VP, InverseHeat, InverseOsmosis, OsmosisDiffusion, Process
from dpm_scales.rng import CounterRNG
from support.oracles import close, generator, images, refused

H, W = 6, 9
unit_diffusion = functools.partial(OsmosisDiffusion, 8, value_range=(0.0, 1.0), guidance_min=0.05)


def blurred(x: Tensor, sigma: float) -> np.ndarray:
    """Gaussian blur with reflecting boundaries, by SciPy's DCT."""
    k, m = np.arange(x.shape[-2])[:, None] / x.shape[-2], np.arange(x.shape[-1]) / x.shape[-1]
    decay = np.exp(-(np.pi**2) * (k**2 + m**2) * sigma**2 / 2)
    return scipy.fft.idctn(decay * scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho"), axes=(-2, -1), norm="ortho")


def positive(number: int, channels: int = 2) -> Tensor:
    return torch.rand(number, channels, H, W, dtype=torch.float64, generator=generator())


@pytest.mark.parametrize("sigma", [0.5, 2.0])
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_an_image_guides_itself(sigma: float, low: float) -> None:
    process = OsmosisDiffusion(
        8,
        guidance_image="own",
        guidance_noise=0.0,
        guidance_min=0.3,
        guidance_blur_sigma=sigma,
        value_range=(low, 1.0),
    )
    x_0 = positive(4)
    v = process.context(low + (1 - low) * x_0, generator())
    assert v is not None
    close(v.numpy(), blurred(x_0, sigma).clip(0.3, 1.0), 1e-12)


def test_noise_is_added_to_the_image() -> None:
    make = functools.partial(unit_diffusion, guidance_noise=0.01, guidance_blur_sigma=1.0)
    x_0 = 0.4 + 0.2 * positive(4)
    own, plain = (make(guidance_image=name).context(x_0, generator()) for name in ("own", "none"))
    assert own is not None and plain is not None
    close((own - plain).numpy(), blurred(x_0, 1.0) - x_0.numpy().mean((-2, -1), keepdims=True), 1e-12)


def test_the_next_image_of_the_batch_guides() -> None:
    process = unit_diffusion(guidance_image="other", guidance_noise=0.0, guidance_blur_sigma=1.0)
    x_0 = 0.3 + 0.3 * positive(3)
    v = process.context(x_0, generator())
    assert v is not None
    smooth = np.roll(blurred(x_0, 1.0), 1, axis=0)
    mean = x_0.numpy().mean((-2, -1), keepdims=True)
    close(v.numpy(), mean + smooth - smooth.mean((-2, -1), keepdims=True), 1e-12)


def test_the_process_ends_at_what_the_image_shows() -> None:
    """Own, unblurred guidance of positive images: their steady state is the image itself."""
    process = unit_diffusion(guidance_image="own", guidance_noise=0.0, guidance_blur_sigma=1e-3)
    x_0 = 0.2 + 0.5 * positive(3)
    context = process.context(x_0, generator())
    close(process.steady_state(x_0.mean((-2, -1)), context).numpy(), x_0.numpy(), 1e-5)


@pytest.mark.parametrize("which", ["own", "other"])
def test_prior_draws_guidance_of_training_images(which: str) -> None:
    process = unit_diffusion(guidance_image=which, guidance_noise=0.02, guidance_blur_sigma=1.0)
    data, prior = 0.3 + 0.3 * positive(5), OsmosisPrior()
    prior.fit(data, process)
    _, v = prior.sample(process, CounterRNG(3, 40), (2, H, W), torch.float64)
    source = CounterRNG(3, 40)
    index = (source.uniform() * 5).floor().long()
    guides = (source.uniform() * 5).floor().long() if which == "other" else index
    white = source.normal((2, H, W), torch.float64).numpy()
    smooth, mean = blurred(data, 1.0), data.numpy().mean((-2, -1), keepdims=True)
    relief = smooth - smooth.mean((-2, -1), keepdims=True)
    assert v is not None and (which == "own") == torch.equal(index, guides)
    close(v.numpy(), (mean[index] + relief[guides] + 0.02 * white).clip(0.05, 1), 1e-6)


def test_guidance_is_stored_with_the_model_and_sized() -> None:
    process = unit_diffusion(guidance_image="own")
    prior, again = OsmosisPrior(max_images=3), OsmosisPrior()
    prior.fit(positive(5), process)
    assert prior.relief.shape == (3, 2, H, W)
    again.load_state_dict(prior.state_dict())
    for a, b in zip(*(p.sample(process, CounterRNG(1, 4), (2, H, W)) for p in (prior, again)), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    with refused("guided by images of 6x9", "can't sample 8x8"):
        again.check_size((8, 8))
    OsmosisPrior().check_size((8, 8))


def test_models_without_guiding_images_are_still_read() -> None:
    prior, again = OsmosisPrior(), OsmosisPrior()
    prior.fit(positive(4), unit_diffusion())
    state = {name: value for name, value in prior.state_dict().items() if name != "relief"}
    again.load_state_dict(state)
    assert torch.equal(again.grey, prior.grey) and again.relief.shape == (0, 1, 1, 1)


@pytest.mark.parametrize(
    ("prior", "process"),
    [
        (DataPrior(noise_ratio=0.0), InverseHeat(8)),
        (OsmosisPrior(noise_ratio=0.0), InverseOsmosis(8, guidance_noise=0.0, guidance_image="own")),
    ],
)
def test_chosen_images_start_in_turn(prior: Prior, process: Process) -> None:
    """Samples 4, 5, 6, ... start from images 4 mod 3, 5 mod 3, ...; each as if it were the only one."""
    prior.fit(positive(7), process)
    chosen = 0.2 + 0.6 * positive(3)
    prior.steer(chosen, process)
    starts, _ = prior.sample(process, CounterRNG(0, 5, first=4), (2, H, W), torch.float64)
    for row, number in enumerate([1, 2, 0, 1, 2]):
        prior.steer(chosen[number : number + 1], process)
        alone, _ = prior.sample(process, CounterRNG(8, 1), (2, H, W), torch.float64)
        close(starts[row].numpy(), alone[0].numpy(), 1e-6)
    assert not torch.allclose(starts[0], starts[1], atol=1e-3)
    with refused("of 6x9", "can't sample 5x9"):
        prior.steer(chosen[..., 1:, :], process)


def test_noise_can_not_be_steered() -> None:
    with refused("VP", "starts from noise alone"):
        GaussianPrior().steer(images(1, 1, H, W), VP(8))


@pytest.mark.parametrize("make", [InverseOsmosis, OsmosisDiffusion])
def test_unknown_guides_are_told(make: Callable[..., Process]) -> None:
    with refused(make.__name__, "unknown guidance_image 'self'", "allowed: none, other, own"):
        make(8, guidance_image="self")
