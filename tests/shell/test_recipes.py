"""The recipes of published models say what the papers say; formulas written out anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.errors import UserError
from dpm_scales.processes import VP, Blurring, InverseHeat, Process
from dpm_scales.samplers import Ancestral, Dissipation
from dpm_scales.targets import Clean, NextScale, Noise, Target
from support.shell import composed


def recipe(name: str, *overrides: str) -> tuple[Process, Target, DictConfig]:
    config = composed(f"experiment={name}", *overrides)
    return instantiate(config.process), instantiate(config.target), config


def test_cifar10_vp_is_ddpm() -> None:
    process, target, config = recipe("cifar10_vp")
    assert isinstance(process, VP) and process.num_scales == 1000 and isinstance(target, Noise)
    signal = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    mu = torch.zeros(1, dtype=torch.float64)
    for k in (1, 2, 500, 1000):
        np.testing.assert_allclose(process.signal_scale(k / 1000, mu).item(), signal[k - 1], rtol=1e-10)
        np.testing.assert_allclose(process.noise_scale(k / 1000, mu).item() ** 2, 1 - signal[k - 1] ** 2, rtol=1e-8)
    sampler = instantiate(config.sampler)
    assert isinstance(sampler, Ancestral) and len(sampler.scales(process)) == 1001
    assert (config.ema.decay, config.optimizer.learning_rate, config.data.batch_size) == (0.9999, 2e-4, 128)
    with torch.device("meta"):
        network = instantiate(config.network, in_channels=3, out_channels=3)
    # 35.7 M in the paper, whose scale embedding enters by addition; ours scales and shifts
    assert 35e6 < sum(p.numel() for p in network.parameters()) < 45e6


def test_cifar10_heat_is_ihdm() -> None:
    process, target, config = recipe("cifar10_heat")
    assert isinstance(process, InverseHeat) and process.num_scales == 200 and isinstance(target, NextScale)
    assert not target.equal_weight
    mu = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64)
    sigmas = np.exp(np.linspace(np.log(0.5), np.log(24), 200))
    for k in (1, 2, 100, 200):
        blur = np.exp(-mu.numpy() * sigmas[k - 1] ** 2 / 2)
        np.testing.assert_allclose(process.signal_scale(k / 200, mu).numpy(), blur, rtol=1e-9)
        np.testing.assert_allclose(process.noise_scale(k / 200, mu).numpy(), 0.01, rtol=1e-12)
    sampler, prior = instantiate(config.sampler), instantiate(config.prior)
    assert isinstance(sampler, Dissipation) and sampler.noise_ratio == 1.25 and len(sampler.scales(process)) == 201
    assert prior.ratio(process) == 1.25 and process.value_range == (0.0, 1.0)


def test_cifar10_blurring_is_hoogeboom_and_salimans() -> None:
    process, target, _ = recipe("cifar10_blurring")
    assert isinstance(process, Blurring) and process.num_scales == 1000 and isinstance(target, Noise)
    mu = np.array([0.0, 0.01, 1.0])
    low, high = np.arctan(np.exp(-5.0)), np.arctan(np.exp(5.0))
    for t in (0.1, 0.5, 1.0):
        log_snr = -2 * np.log(np.tan(low + t * (high - low)))
        a, gamma = np.sqrt(1 / (1 + np.exp(-log_snr))), np.sqrt(1 / (1 + np.exp(log_snr)))
        blur = 0.999 * np.exp(-mu * (20 * np.sin(np.pi * t / 2) ** 2) ** 2 / 2) + 0.001
        np.testing.assert_allclose(process.signal_scale(t, torch.from_numpy(mu)).numpy(), a * blur, rtol=1e-9)
        np.testing.assert_allclose(process.noise_scale(t, torch.from_numpy(mu)).numpy(), gamma, rtol=1e-9)


@pytest.mark.parametrize("name", ["bsds500_vp", "bsds500_blurring"])
def test_bsds500_shifts_the_noise_for_64_pixels(name: str) -> None:
    """ "Simple diffusion": logSNR of d pixels = logSNR of 32 + 2 log(32 / d)."""
    shifted, _, _ = recipe(name, "data.root=DIR")
    plain, _, _ = recipe(name, "data.root=DIR", "process.noise.shift=1.0")
    mu = torch.zeros(1, dtype=torch.float64)
    for t in (0.2, 0.7):
        change = shifted.log_snr(t, mu) - plain.log_snr(t, mu)
        assert change.item() == pytest.approx(2 * np.log(32 / 64), rel=1e-9)


def test_clean_is_the_default_target() -> None:
    assert isinstance(instantiate(composed().target), Clean)


def test_finer_target_refuses_the_default_sampler_with_fewer_steps() -> None:
    config = composed("experiment=cifar10_heat", "sampler.steps=50")
    denoiser = Denoiser(nn.Identity(), instantiate(config.process), instantiate(config.target))
    with pytest.raises(UserError, match="steps of 1/200"):
        instantiate(config.sampler).check(denoiser)
