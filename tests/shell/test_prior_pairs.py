"""Every process with every prior: sampling starts from the process's law at scale 1, or the pair is refused before any
training, in one line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpm_scales.likelihood import start_law
from dpm_scales.priors import DataPrior, GaussianPrior, OsmosisPrior, Prior, auto_prior
from dpm_scales.processes import Blurring, InverseHeat, OsmosisDiffusion, Process
from dpm_scales.rng import CounterRNG
from dpm_scales.schedules import CosineLogSNR
from support.oracles import generator, images, refused
from support.shell import CONFIGS, attempt, small_model

PROCESSES = sorted(path.stem for path in (CONFIGS / "process").glob("*.yaml"))
SPECTRAL = [
    *("clocked", "cut_off", "equal_snr", "flicker", "hdfm", "low_pass_flow", "power_law", "rectified", "warm"),
]
OSMOSIS = ["inverse_osmosis", "osmosis", "osmosis_diffusion"]
PRIORS = {"gaussian": GaussianPrior, "data": DataPrior, "guidance": OsmosisPrior}
FITS = {
    "gaussian": {"vp", "ve", "blurring", *SPECTRAL},
    "data": {"blurring", "blurring_chain", "blurring_constant", "heat", "homogeneous", "hdfm", "warm"},
    "guidance": set(OSMOSIS),
}
WHY = {"gaussian": "GaussianPrior", "data": "DataPrior", "guidance": "OsmosisPrior"}
SHORT = "process.num_scales=20"
PAIRS = [(process, prior) for process in PROCESSES for prior in PRIORS]


def test_every_process_has_a_prior_that_fits() -> None:
    assert set().union(*FITS.values()) == set(PROCESSES) and len(PROCESSES) == 19


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and mean square of each pixel and of the grey value, and their standard errors."""
    grey = x.mean((-2, -1)).flatten()
    rows = torch.cat([x.flatten(1), x.flatten(1) ** 2, grey[:, None], grey[:, None] ** 2], 1)
    return rows.mean(0), rows.std(0) / math.sqrt(len(rows)), rows, grey


def assert_law(process: Process, prior: Prior) -> None:
    """6000 starts against 6000 images that the process itself took from the data to scale 1: first and second moments
    of each pixel and of the grey value, in pixels, within 5 standard errors of both."""
    count, (low, high) = 6000, process.value_range
    data = low + (high - low) * (0.2 + 0.6 * torch.rand(3, 1, 4, 5, generator=generator(2), dtype=torch.float64))
    prior.fit(data, process)
    y, context = prior.sample(process, CounterRNG(1, count), (1, 4, 5), torch.float64)
    start = process.operator(context).to_pixels(y)
    rng = generator(3)
    x_0 = data[torch.randint(3, (count,), generator=rng)]
    ends = process.sample(x_0, 1.0, rng, process.context(x_0, rng))
    (a, of_a, *_), (b, of_b, *_) = moments(start), moments(ends)
    assert bool(((a - b).abs() <= 5 * (of_a**2 + of_b**2).sqrt() + 2e-4 * (high - low)).all())


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_pair_starts_from_the_processes_own_law_or_is_refused(name: str, kind: str) -> None:
    if name not in FITS[kind]:
        with refused(WHY[kind], "set prior="):
            small_model(f"process={name}", f"prior={kind}", SHORT)
        return
    model = small_model(f"process={name}", f"prior={kind}", SHORT, *(["prior.noise_ratio=1"] if kind == "data" else []))
    assert type(model.prior) is PRIORS[kind]
    assert_law(model.denoiser.process, model.prior)


@pytest.mark.parametrize("name", PROCESSES)
def test_auto_takes_a_prior_that_fits(name: str) -> None:
    prior = small_model(f"process={name}", "prior=auto", SHORT).prior
    assert any(name in FITS[kind] and type(prior) is PRIORS[kind] for kind in PRIORS)


@pytest.mark.parametrize("kind", ["gaussian", "data"])
@pytest.mark.parametrize("name", OSMOSIS)
def test_osmosis_without_sight_of_its_guidance_is_refused_as_well(name: str, kind: str, tmp_path: Path) -> None:
    """Where the network does not ask for the guidance image nothing else would miss it."""
    with refused(WHY[kind], "guidance image", "set prior=auto"):
        small_model(f"process={name}", f"prior={kind}", SHORT, "process.guidance_input=false")


def test_a_wrong_pair_ends_before_any_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = attempt(run, "process=inverse_osmosis", "prior=gaussian", SHORT, "process.guidance_input=false")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and "GaussianPrior draws no context" in outcome.err
    assert not run.exists()


def test_no_other_way_leads_around_the_check() -> None:
    """From Python a prior can meet a process without a model around them: starts and densities look again."""
    process, x_0 = OsmosisDiffusion(4, guidance_input=False), images(2, 1, 4, 5).float()
    data = DataPrior()
    data.fit(x_0, InverseHeat(4))
    for prior in (GaussianPrior(), data):
        with refused("draws no context"):
            prior.sample(process, CounterRNG(0, 2), (1, 4, 5))
        with refused("draws no context"):
            start_law(prior, process, x_0, CounterRNG(0, 2))
    with refused("draws no context"):
        DataPrior().fit(x_0, process)
    guidance = OsmosisPrior()
    guidance.fit(x_0, process)
    for call in (guidance.sample, lambda *a: start_law(guidance, a[0], x_0, a[1])):
        with refused("needs an osmosis process, not Blurring"):
            call(Blurring(4), CounterRNG(0, 2), (1, 4, 5))


@pytest.mark.parametrize(("lowest", "fits"), [(-7.9, True), (-7.7, False)])
def test_noise_alone_is_no_start_where_grey_values_are_left(lowest: float, fits: bool) -> None:
    """As `auto_prior` has it: 1.9 and 2.1 % of a grey value, in units of the noise."""
    process = Blurring(8, CosineLogSNR(lowest))
    assert isinstance(auto_prior(process), GaussianPrior if fits else DataPrior)
    if fits:
        GaussianPrior().check(process)
    else:
        with refused("GaussianPrior", "0.0213 times the noise", "set prior=data"):
            GaussianPrior().check(process)


def test_the_noise_of_the_start_is_the_processes_own_but_for_constant_noise() -> None:
    """IHDM's 1.25 where all scales have the same noise; a number of the user's own always."""
    for process, ratio in ((InverseHeat(4), 1.25), (Blurring(4), 1.0)):
        assert DataPrior().ratio(process) == ratio and DataPrior(0.7).ratio(process) == 0.7
        prior = DataPrior()
        prior.fit(images(1, 1, 4, 5), process)
        y = [p.sample(process, CounterRNG(3, 2), (1, 4, 5), torch.float64)[0] for p in (prior, _silent(prior))]
        white = CounterRNG(3, 2)
        white.uniform()
        gamma = process.noise_scale(1.0, torch.zeros(1, 1, dtype=torch.float64))
        torch.testing.assert_close(y[0] - y[1], ratio * gamma * white.normal((1, 4, 5), torch.float64))


def _silent(prior: DataPrior) -> DataPrior:
    silent = DataPrior(0.0)
    silent.load_state_dict(prior.state_dict())
    return silent
