"""Curves of a process that samplers ask for again and again are computed once, with the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.sampling import Kernels
from dpm_scales.denoisers import Denoiser
from dpm_scales.moments import Moments
from dpm_scales.operators import HeatOperator, Operator
from dpm_scales.processes import VE, VP, Blurring, BlurringChain, Process, Spectral, Warm
from dpm_scales.processes.kept import KeptValues
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Ancestral, DPMSolver, Heun, Sampler, UniPC
from dpm_scales.schedules import PowerLaw, Rectified, SpectralClock
from dpm_scales.targets import Clean, Flow, Target
from support.oracles import TinyNetwork

SHAPE = (2, 1, 6, 5)
PROCESSES: dict[str, Callable[[], Process]] = {
    "vp": VP,
    "ve": VE,
    "coloured": lambda: VP(color=PowerLaw(0.5)),
    "clocked": lambda: Spectral(noise=Rectified(), clock=SpectralClock()),
    "blurring": Blurring,
    "warm": Warm,
    "chain": BlurringChain,
}
SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "2m": lambda: DPMSolver(0.0, 7, "uniform"),
    "sde": lambda: DPMSolver(1.0, 7, "uniform"),
    "unipc": lambda: UniPC(steps=7, grid="uniform"),
    "ddim": lambda: DDIM(0.5, 7),
    "ancestral": lambda: Ancestral(7),
    "heun": lambda: Heun(7, "uniform", s_churn=3.0),
}


def drawn(process: Process, sampler: Sampler) -> Tensor:
    denoiser = Denoiser(TinyNetwork(), process, Clean("scalar"))
    y = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sampler.reverse(denoiser, y, CounterRNG(1, SHAPE[0]))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", PROCESSES)
def test_samples_are_the_same_to_the_bit(name: str, sampler: str) -> None:
    process = PROCESSES[name]()
    process.bind_size((6, 5))
    found = drawn(process, SAMPLERS[sampler]())
    with mock.patch.object(Process, "kept_curves", nullcontext):
        expected = drawn(process, SAMPLERS[sampler]())
    assert torch.isfinite(found).all() and torch.equal(found, expected)
    assert process.kept._found is None


TARGETS: dict[str, Callable[[], Target]] = {
    "clean": lambda: Clean("scalar"),
    "wiener": lambda: Clean("wiener"),
    "spectral": lambda: Clean("spectral"),
    "flow": Flow,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["vp", "coloured", "blurring"])
def test_one_scale_for_all_images_has_its_moments_computed_once(name: str, target: str) -> None:
    """In place of once for each image, with the same bits."""
    process = PROCESSES[name]()
    process.bind_size((6, 5))
    denoiser = Denoiser(TinyNetwork(), process, TARGETS[target]())
    y = torch.randn(3, 1, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, s = (torch.tensor(value, dtype=torch.float64) for value in (0.6, 0.4))
    shapes = []

    def moments(process: Process, operator: Operator, t: Tensor, *rest: Any) -> Moments:
        shapes.append(tuple(t.shape))
        return Moments(process, operator, t, *rest)

    with mock.patch("dpm_scales.denoisers.Moments", moments):
        found = denoiser.predict_mean(y, t, s)
        expected = denoiser.predict_mean(y, t.repeat(3), s)
    assert shapes == [(1,), (3,)] and torch.equal(found, expected)


@pytest.mark.parametrize(("name", "share"), [("vp", 0.55), ("coloured", 0.6), ("blurring", 0.5)])
def test_steps_launch_about_half_as_many_kernels(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # constants are kept, as without the mode that counts
    monkeypatch.setattr("dpm_scales.operators.constants._get_current_dispatch_mode", lambda: None)
    process = PROCESSES[name]()
    process.bind_size((6, 5))

    def kernels() -> int:
        found = []
        for steps in (4, 9):
            sampler = DPMSolver(0.0, steps, "uniform")
            drawn(process, sampler)
            with Kernels() as count:
                drawn(process, sampler)
            found.append(count.number)
        return found[1] - found[0]

    with mock.patch.object(Process, "kept_curves", nullcontext):
        before = kernels()
    assert 0 < kernels() < share * before


def test_values_are_kept_for_the_same_tensors_while_the_body_runs() -> None:
    kept, calls = KeptValues(), []
    t, mu = torch.tensor(0.5), torch.ones(2, 2)

    def value() -> Tensor:
        calls.append(None)
        return torch.full((), float(len(calls)))

    assert [float(kept.of("a", t, mu, value)) for _ in range(2)] == [1, 2]
    with kept.keeping():
        assert [float(kept.of("a", t, mu, value)) for _ in range(2)] == [3, 3]
        assert float(kept.of("b", t, mu, value)) == 4 and float(kept.of("a", t.clone(), mu, value)) == 5
        with kept.keeping():
            assert float(kept.of("a", t, mu, value)) == 3
        assert float(kept.of("a", t, mu, value)) == 3  # the outer body goes on
        each = torch.tensor([0.5, 0.5])
        assert float(kept.of("a", each, mu, value)) == 6 and float(kept.of("a", each, mu, value)) == 7
        other = copy.deepcopy(kept)
        assert float(other.of("a", t, mu, value)) == 8
        for _ in range(100):
            kept.of("a", torch.rand(()), mu, value)
        assert kept._found is not None and len(kept._found) <= 32
        assert float(kept.of("a", t, mu, value)) > 100  # no longer kept
    assert kept._found is None
    with pytest.raises(ZeroDivisionError), kept.keeping():
        raise ZeroDivisionError
    assert kept._found is None


def test_derivatives_are_those_of_the_curves() -> None:
    process, mu = Blurring(), HeatOperator().eigenvalues(6, 5, "cpu")
    t = torch.tensor(0.4, dtype=torch.float64)
    expected = process.rates(t, mu)
    with process.kept_curves():
        process.signal_scale(t, mu), process.noise_scale(t, mu)
        found = process.rates(t, mu)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
