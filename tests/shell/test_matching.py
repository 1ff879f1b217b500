"""Schedules fitted to another process: planted ones are found again, and what is saved trains."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate

from dpm_scales.commands.match import energies
from dpm_scales.commands.processes import comparison_entries
from dpm_scales.data.image_sets import numbered_images
from dpm_scales.processes import VP
from dpm_scales.schedules import ConstantBeta
from dpm_scales.study.matching import fit_blur_and_noise, fit_log_snr, octave_index, octave_sums
from support.oracles import close, coefficients, float64, refused
from support.shell import SMALL, call, composed, photos

TIMES = [1.0, 5.0, 20.0, 100.0, 400.0]


def spectrum(height: int = 48, width: int = 72) -> torch.Tensor:
    """Energies that fall as those of photos do."""
    k, j = np.arange(height)[:, None] / height, np.arange(width) / width
    mu = np.pi**2 * (k**2 + j**2)
    mu[0, 0] = 1.0
    return torch.from_numpy(0.05 / mu)


def planted(times: list[float], noise: list[float], power: torch.Tensor) -> torch.Tensor:
    """Octave by octave, by loops over the frequencies."""
    height, width = power.shape
    index = octave_index(height, width)
    result = np.zeros((len(times), int(index.max()) + 1))
    for row, (t, std) in enumerate(zip(times, noise, strict=True)):
        for k, j in itertools.product(range(height), range(width)):
            mu = np.pi**2 * ((k / height) ** 2 + (j / width) ** 2)
            result[row, int(index[k, j])] += math.exp(-2 * mu * t) * float(power[k, j]) + std**2
    return torch.from_numpy(result)


@pytest.mark.parametrize("size", [(48, 72), (30, 17), (8, 8)])
def test_octaves_double(size: tuple[int, int]) -> None:
    """Frequency of a mode over the lowest one, in powers of two; every mode in one octave."""
    index = octave_index(*size)
    lowest = 1 / max(size)
    last = max(1, math.ceil(math.log2(1 / lowest)))
    for k, j in itertools.product(range(size[0]), range(size[1])):
        frequency = math.hypot(k / size[0], j / size[1]) / lowest
        expected = 0 if k == j == 0 else min(last, math.floor(math.log2(frequency) + 1e-9) + 1)
        assert int(index[k, j]) == expected
    power = torch.rand(3, *size, dtype=torch.float64)
    sums = octave_sums(power, index)
    close(sums.sum(-1).numpy(), power.sum((-2, -1)).numpy())
    close(sums[:, 0].numpy(), power[:, 0, 0].numpy())


def test_planted_blur_and_noise_are_found() -> None:
    """Three rounds of refinement leave a hundredth in T and noise where both can be told from the energies."""
    noise, power = [0.02, 0.03, 0.05, 0.08, 0.1], spectrum()
    result = fit_blur_and_noise(planted(TIMES, noise, power), power, TIMES)
    close(result.dissipation_times, TIMES, 0, 0.02)
    close(result.noise_stds, noise, 0, 0.01)
    assert max(result.error) < 0.01
    close(result.fitted.numpy(), planted(result.dissipation_times, result.noise_stds, power)[:, 1:].numpy(), 0, 1e-9)


def test_schedules_never_fall() -> None:
    noise, power = [0.1, 0.05, 0.05, 0.2, 0.01], spectrum(20, 30)
    result = fit_blur_and_noise(planted([50.0, 5.0, 20.0, 100.0, 1.0], noise, power), power, TIMES)
    for values in (result.dissipation_times, result.noise_stds):
        assert sorted(values) == values
    assert result.error[0] < 0.01 < result.error[1]


def test_variance_is_met_for_the_given_blur() -> None:
    """Energy without noise and what is missing, spread over all frequencies but the mean."""
    noise, power = [0.02, 0.03, 0.05, 0.08, 0.1], spectrum()
    wanted = planted([t * 1.5 for t in TIMES], noise, power)
    result = fit_blur_and_noise(wanted, power, TIMES, "variance")
    assert result.dissipation_times == TIMES
    totals = planted(TIMES, result.noise_stds, power)[:, 1:].sum(1)
    free = [k for k, std in enumerate(result.noise_stds) if std > 1.01 * max([1e-4, *result.noise_stds[:k]])]
    assert len(free) >= 3
    close(totals[free].numpy(), wanted[free, 1:].sum(1).numpy(), 0, 1e-6)


def test_a_chain_with_the_same_snr_is_the_same_chain() -> None:
    process = VP(6, ConstantBeta(0.2))
    log_snr = process.log_snr(torch.arange(1, 7, dtype=torch.float64) / 6, torch.zeros(()).double())
    close(fit_log_snr(log_snr.flatten()), 0.2, 1e-12)
    with refused("no noise, so no SNR"):
        fit_log_snr(float64([math.inf, 1.0]))
    with refused("rises with t"):
        fit_log_snr(float64([1.0, 2.0]))
    with refused("unknown criterion", "octaves, variance"):
        fit_blur_and_noise(torch.ones(1, 3), spectrum(4, 4), [1.0], "entropy")


def test_energies_are_those_of_the_images(tmp_path: Path) -> None:
    """By numpy from the files; portrait images are turned, larger ones cut to the middle."""
    folder = photos(photos(photos(tmp_path, 2), 1, (20, 12), first=2), 1, (16, 21), first=3)
    images = numbered_images(str(folder))
    entry = {e.name: e for e in comparison_entries(composed("out=x", "times=[3,9]", name="evolve"))}["homogeneous"]
    power, octaves = energies(entry, images, 0, torch.device("cpu"))
    expected = []
    for i in range(4):
        x = images.load(i).double().numpy() / 255
        x = np.rot90(x, 1, (1, 2)) if i == 2 else x[:, 2:14, :20] if i == 3 else x
        expected.append((coefficients(x) ** 2).mean(0))
    close(power.numpy(), np.mean(expected, axis=0), 1e-6, 1e-5)  # levels are float32
    index = octave_index(12, 20)
    close(octaves.numpy(), planted([3.0, 9.0], [0.0, 0.0], power).numpy(), 1e-6, 1e-4)
    assert octaves.shape == (2, int(index.max()) + 1)


@pytest.mark.slow
def test_blurring_fitted_to_osmosis_is_a_process_that_trains(tmp_path: Path) -> None:
    """Nearer to osmosis than the paper's parameters, by its own table; `train.py` takes the file."""
    folder, out = photos(tmp_path / "set", 4, (32, 48)), tmp_path / "out"
    outcome = call("evolve.py", "task=match", f"data={folder}", "times=[1,4,16]", f"out={out}", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    process = instantiate(yaml.safe_load((out / "process/matched.yaml").read_text()))
    assert process.num_scales == 3 and (out / "match.png").is_file()
    with (out / "match.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert all(row["error"] <= row["error_unfitted"] + 1e-9 for row in rows)
    mu = torch.zeros(1, 1, dtype=torch.float64)
    for k, row in enumerate(rows, start=1):
        assert float(process.noise_scale(k / 3, mu)) == pytest.approx(row["noise_std"], rel=1e-5)
    small = [o for o in SMALL if not o.startswith("trainer.max_steps")]
    arguments = (
        f"--config-dir={out}",
        "process=matched",
        *small,
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
    )
    trained = call("train.py", *arguments, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert trained.status == 0, trained.err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("like=osmoses",), "did you mean 'osmosis'"),
        (("criterion=octave",), "did you mean 'octaves'"),
        (("criterion=snr",), "no noise, so no SNR"),
        ((), "data=DIR"),
        (("data=nowhere",), "nowhere: no such folder"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    outcome = call("evolve.py", "task=match", *overrides, f"out={tmp_path / 'out'}", cwd=tmp_path)
    assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1
