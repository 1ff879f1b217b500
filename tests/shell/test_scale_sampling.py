"""Importance sampling of the scales: the mean stays, the variance falls, runs resume exactly, processes agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from dpm_scales.denoisers import spread_evenly, uniform_scales
from dpm_scales.processes import VE, VP, InverseHeat, Process, Spectral
from dpm_scales.training.scale_sampling import (
    BINS,
    FLOOR,
    MEMORY,
    WARMUP,
    DensityScales,
    ImportanceScales,
    check_density,
)
from support.oracles import close, float64, generator, pretended_gpu, refused
from support.shell import FAST, assert_equal, attempt, checkpoint, column, train


def measured(num_scales: int, losses: Tensor, rounds: int = 30) -> ImportanceScales:
    """After seeing the losses ``(num_scales,)`` of every scale, again and again."""
    scales = ImportanceScales(num_scales)
    t = torch.arange(1, num_scales + 1) / num_scales
    for _ in range(rounds):
        scales.update(scales.observe(t, losses))
    return scales


def profile(num_scales: int) -> Tensor:
    """Losses that differ by a factor of 100 along the scales."""
    t = torch.arange(1, num_scales + 1, dtype=torch.float64) / num_scales
    return torch.exp(4.6 * torch.cos(3 * t) ** 2)


@pytest.mark.parametrize("num_scales", [1, 3, 64, 100, 1000])
def test_until_enough_is_seen_scales_are_the_uniform_ones(num_scales: int) -> None:
    scales, t = ImportanceScales(num_scales), torch.arange(1, num_scales + 1) / num_scales
    even = spread_evenly(torch.arange(500), 500, 0.37)
    for _ in range(WARMUP - 1 if num_scales <= BINS else 0):
        scales.update(scales.observe(t, t))
    drawn, weights = scales.draw(even)
    assert torch.equal(drawn, uniform_scales(even, num_scales))
    close(weights.numpy(), np.ones(500), 1e-12)
    close(scales.density().numpy(), np.full(num_scales, 1 / num_scales), 1e-12)


@pytest.mark.parametrize("num_scales", [2, 7, 64, 100, 1000])
def test_drawn_scales_follow_the_density_and_weights_are_its_inverse(num_scales: int) -> None:
    """200 000 even numbers: the share of each k is p_k to within one number; w = 1 / (K p_k)."""
    scales = measured(num_scales, profile(num_scales))
    density = scales.density()
    close(float(density.sum()), 1.0, 1e-12)
    even = spread_evenly(torch.arange(200_000), 200_000, 0.5)
    t, weights = scales.draw(even)
    k = (t * num_scales).round().long()
    assert torch.equal(k.double() / num_scales, t) and int(k.min()) == 1 and int(k.max()) == num_scales
    counts = torch.bincount(k - 1, minlength=num_scales)
    assert float((counts - 200_000 * density).abs().max()) < 1.5
    close(weights.numpy(), (1 / (num_scales * density[k - 1])).numpy(), 0, 1e-12)
    assert float(weights.max()) <= 1 / FLOOR + 1e-9
    if num_scales > 2:
        assert float(density.max() / density.min()) > 3


@pytest.mark.parametrize("num_scales", [7, 1000])
def test_expected_loss_is_the_uniform_mean_for_any_losses(num_scales: int) -> None:
    """sum_k p_k w_k L_k = mean_k L_k, for losses that the density knows nothing of."""
    scales = measured(num_scales, profile(num_scales))
    other = torch.rand(num_scales, generator=generator(3), dtype=torch.float64)
    density = scales.density()
    close(float((density * other / (num_scales * density)).sum()), float(other.mean()), 1e-12)
    even = torch.rand(400_000, generator=generator(4), dtype=torch.float64)
    t, weights = scales.draw(even)
    weighted = weights * other[(t * num_scales).round().long() - 1]
    error = float(weighted.std()) / 400_000**0.5
    assert abs(float(weighted.mean()) - float(other.mean())) < 4 * error


def test_density_is_proportional_to_the_root_of_the_second_moment() -> None:
    """Nichol & Dhariwal 2021, Eq. (18), beside the uniform share; random losses of known spread."""
    scales, t = ImportanceScales(16), torch.arange(1, 17).double().repeat(50) / 16
    squares = []
    for seed in range(4):
        losses = profile(16).repeat(50) * torch.rand(800, generator=generator(seed), dtype=torch.float64)
        squares.append((losses**2).reshape(50, 16))
        scales.update(scales.observe(t, losses))
    root = torch.cat(squares).mean(0).sqrt()  # 4 x 50 is all the memory there is
    close(scales.density().numpy(), ((1 - FLOOR) * root / root.sum() + FLOOR / 16).numpy(), 1e-12)


def test_variance_of_the_loss_falls() -> None:
    """Nearly to nothing where a scale's loss is always the same."""
    losses, scales = profile(64), measured(64, profile(64))
    t, weights = scales.draw(torch.rand(20_000, generator=generator(), dtype=torch.float64))
    weighted = weights * losses[(t * 64).round().long() - 1]
    assert float(weighted.std()) < 0.1 * float(losses.std())


def test_old_observations_are_forgotten_and_bad_ones_never_taken_in() -> None:
    scales, t = ImportanceScales(4), torch.arange(1, 5) / 4
    for _ in range(50):
        scales.update(scales.observe(t, float64([1.0, 1.0, 1.0, 1.0])))
    scales.update(scales.observe(t, float64([np.nan, np.inf, 1.0, 1.0])))
    close(scales.state.numpy(), [[1, 1, 1, 1], [50, 50, 51, 51]])
    for _ in range(8 * MEMORY):
        scales.update(scales.observe(t, float64([3.0, 1.0, 1.0, 1.0])))
    close(scales.state.numpy(), [[9, 1, 1, 1], [MEMORY] * 4], 1e-2)
    many = scales.observe(t.repeat(3 * MEMORY), torch.full((12 * MEMORY,), 2.0))
    scales.update(many)
    close(scales.state[0].numpy(), [4, 4, 4, 4], 1e-12)


def test_processes_that_sum_what_they_saw_have_one_density() -> None:
    """Two halves of a batch, summed, are the batch."""
    one, two = ImportanceScales(100), ImportanceScales(100)
    for step in range(40):
        even = spread_evenly(torch.arange(64), 64, 0.1 * (step % 10))
        (t, _), (t_2, _) = one.draw(even), two.draw(even)
        close(t.numpy(), t_2.numpy(), 1e-12)
        losses = 1 + t**2
        one.update(one.observe(t, losses))
        two.update(two.observe(t[::2], losses[::2]) + two.observe(t[1::2], losses[1::2]))
    close(one.state.numpy(), two.state.numpy(), 1e-12)


def test_nothing_waits_for_the_device() -> None:
    scales = ImportanceScales(100)
    with pretended_gpu():
        scales.state = torch.zeros(2, BINS, dtype=torch.float64, device="cuda")
        t, weights = scales.draw(spread_evenly(torch.arange(8, device="cuda"), 8, 0.5))
        scales.update(scales.observe(t, weights.float()))
        assert {t.device.type, weights.device.type, scales.state.device.type} == {"cuda"}


def test_state_of_another_chain_is_refused() -> None:
    with refused("shape (2, 8)", "(2, 4)"):
        ImportanceScales(4).load(ImportanceScales(8).state.tolist())


# --- runs -------------------------------------------------------------------------------------------------------------

IMPORTANCE = ("scale_sampling=importance", "process.num_scales=4", *FAST)


@pytest.mark.slow
def test_resumed_run_has_the_same_density_and_bits(tmp_path: Path) -> None:
    """6 steps, and 4 followed by 2; by then the density is no longer uniform, and the losses' curve says so."""
    whole = train(tmp_path / "whole", *IMPORTANCE)
    first = train(tmp_path / "cut", *IMPORTANCE, "trainer.max_steps=4")
    state = np.array(checkpoint(first)["importance"])
    assert state.shape == (2, 4) and (state[1] >= WARMUP).all()
    train(first, *IMPORTANCE)
    assert_equal(checkpoint(first)["state_dict"], checkpoint(whole)["state_dict"])
    assert checkpoint(first)["importance"] == checkpoint(whole)["importance"]
    plain = train(tmp_path / "plain", *(o for o in IMPORTANCE if "sampling" not in o))
    assert "importance" not in checkpoint(plain)
    losses, other = (np.array(column(run, "train/loss")) for run in (whole, plain))
    assert losses[0] == other[0] and losses[-1] != other[-1]
    # the scales of validation stay even: only the weights of the network differ
    assert column(whole, "val/loss")[-1] == pytest.approx(column(plain, "val/loss")[-1], rel=0.5)


def test_unknown_way_of_sampling_is_refused(tmp_path: Path) -> None:
    outcome = attempt(tmp_path / "run", "scale_sampling=important")
    assert outcome.status == 2 and "did you mean 'importance'" in outcome.err


# --- published densities ----------------------------------------------------------------------------------------------


def shares(kind: str, process: Process, **parameters: float) -> np.ndarray:
    """The share of each scale among 200 000 evenly spread numbers."""
    even = spread_evenly(torch.arange(200_000), 200_000, 0.5)
    k = (DensityScales(kind, process, **parameters).draw(even) * process.num_scales).round().long()
    return (torch.bincount(k, minlength=process.num_scales + 1)[1:] / 200_000).numpy()


@pytest.mark.parametrize("mean, std", [(None, None), (-0.5, 0.6)])
def test_logit_normal_scales_have_its_distribution_function(mean: float | None, std: float | None) -> None:
    process = VP(40)
    parameters = {key: value for key, value in (("mean", mean), ("std", std)) if value is not None}
    t = np.arange(1, 41) / 40
    with np.errstate(divide="ignore"):
        logit = np.log(t) - np.log1p(-t)
    edges = scipy.stats.norm.cdf((logit - (mean or 0.0)) / (std or 1.0))
    close(shares("logit_normal", process, **parameters), np.diff([0.0, *edges]), 2e-5, 0)


def test_log_normal_scales_have_its_distribution_function_in_the_noise_level() -> None:
    process = VE(40)
    level = process.noise_scale(torch.arange(1, 41) / 40, torch.zeros(1)).flatten().log().numpy()
    edges = scipy.stats.norm.cdf((level + 1.2) / 1.2)
    edges[-1] = 1.0
    close(shares("log_normal", process), np.diff([0.0, *edges]), 2e-5, 0)


@pytest.mark.parametrize("make", [lambda: VP(40), lambda: Spectral(40)])
def test_logsnr_scales_are_uniform_in_it(make: Callable[[], Process]) -> None:
    process = make()
    level = -0.5 * process.log_snr(torch.arange(1, 41) / 40, torch.zeros(1)).flatten().numpy()
    found = shares("logsnr", process)
    if isinstance(process, Spectral):  # with noise alone at t = 1, which continues from the scale before it
        level[-1] = 2 * level[-2] - level[-3]
    steps = np.diff(level)
    nearest = (np.append(steps, 0) + np.append(0, steps)) / 2  # half of the way to either neighbour
    close(found, nearest / nearest.sum(), 2e-4, 0)
    if isinstance(process, Spectral):
        assert found[-1] < 0.2  # pure noise at t = 1 counts no more than its neighbours


@pytest.mark.parametrize("kind", ["logit_normal", "log_normal", "logsnr"])
def test_scales_of_a_density_are_those_of_any_number_of_ranks(kind: str) -> None:
    scales, whole = DensityScales(kind, VP(30)), torch.arange(12)
    together = scales.draw(spread_evenly(whole, 12, 0.3))
    apart = torch.cat([scales.draw(spread_evenly(part, 12, 0.3)) for part in (whole[::2], whole[1::2])])
    close(apart, torch.cat([together[::2], together[1::2]]), 0, 0)
    assert set((together * 30).round().tolist()) <= set(range(1, 31)) and len(set(together.tolist())) > 3
    assert float(scales.draw(float64([0.0]))) >= 1 / 30


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("logit_normal", {"std": 0.0}, ("scale_std", "> 0")),
        ("logit_normal", {"std": float("nan")}, ("scale_std",)),
        ("logit_normal", {"mean": 1e9}, ("scale_mean",)),
        ("logsnr", {"std": 1.0}, ("scale_std", "not of logsnr")),
        ("uniform", {"mean": 1.0}, ("scale_mean", "not of uniform")),
    ],
)
def test_bad_parameters_of_a_density_are_refused(kind: str, options: dict[str, float], words: tuple[str, ...]) -> None:
    with refused(*words):
        check_density(kind, options.get("mean"), options.get("std"))


def test_a_density_of_noise_levels_needs_noise_that_grows() -> None:
    for kind in ("log_normal", "logsnr"):
        with refused(kind, "InverseHeat", "uniform"):
            DensityScales(kind, InverseHeat(20))
    assert DensityScales("logit_normal", InverseHeat(20)).draw(float64([0.5])).shape == (1,)


def test_a_density_of_noise_levels_asks_the_process_for_them() -> None:
    class Louder(VE):
        """Its level is another than that of its curves."""

        def noise_level(self, t: Tensor) -> Tensor:
            return 2.0 * torch.exp(3 * t)

    edges = DensityScales("log_normal", Louder(40)).edges
    close(edges, math.log(2) + 3 * np.arange(1, 41) / 40, 1e-12, 0)


def test_a_run_with_a_density_resumes_exactly(tmp_path: Path) -> None:
    options = ("scale_sampling=logit_normal", "scale_std=0.7", *FAST)
    whole = train(tmp_path / "whole", *options)
    train(tmp_path / "part", *options, "trainer.max_steps=3")
    part = train(tmp_path / "part", *options)
    assert_equal(checkpoint(whole)["state_dict"], checkpoint(part)["state_dict"])
    other = train(tmp_path / "other", *FAST)
    assert column(other, "train/loss") != column(whole, "train/loss")


@pytest.mark.parametrize("kind", ["logit_normal", "logsnr"])
def test_drawing_from_a_density_never_waits_for_the_device(kind: str) -> None:
    scales = DensityScales(kind, VP(30))
    with pretended_gpu():
        scales.edges = scales.edges.to("cuda")
        even = spread_evenly(torch.arange(8, device="cuda"), 8, 0.5)
        assert scales.draw(even).device.type == "cuda"
