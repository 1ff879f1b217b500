"""Planted faults: the audit finds each where it shows, and leaves the other findings as they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpm_scales.audit import audit, forward, invariances
from dpm_scales.audit.findings import Verdict
from dpm_scales.errors import UserError
from dpm_scales.operators import Decay, HeatOperator, PixelOperator
from dpm_scales.processes import (
    VP,
    Blurring,
    Context,
    Gaussian,
    Homogeneous,
    InverseHeat,
    OsmosisFilter,
    Process,
    Scale,
    as_scale,
)
from dpm_scales.schedules import ConstantNoise, LinearTimeBlur, LogBlur, NoiseSchedule, NoNoise
from support.audit_helpers import by_name, changed, finding, photo


class Falling(NoiseSchedule):
    """Signal and noise both fall: a valid Markov chain whose entropy does not grow."""

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        gamma = torch.where(t > 0, 1 - 0.5 * t, torch.zeros_like(t))
        return -5 * t, torch.log(gamma)


class NoPromise(Process):
    lyapunov = False

    def __init__(self, noise: NoiseSchedule) -> None:
        super().__init__(PixelOperator(), 16, noise)


def test_fault_falling_entropy() -> None:
    found = changed(VP(16), NoPromise(Falling()))
    assert found == {("forward", "conditional entropy"), ("reverse", "entropy of the images")}
    row = finding(forward.conditional_entropy, NoPromise(Falling()), samples=200)
    assert row.measured == pytest.approx(math.log(0.5 / (1 - 0.5 * 15 / 16))) and row.scale == 1


class Draining(NoNoise):
    """The grey value drains away, ten per cent in all."""

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_signal, log_noise = super().forward(t)
        return log_signal + math.log(0.9) * t, log_noise


class DrainingNoise(ConstantNoise):
    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_signal, log_noise = super().forward(t)
        return log_signal + math.log(0.9) * t, log_noise


GREY = {("forward", "average grey value"), ("reverse", "average grey value")}


def drained(process: Process, noise: NoiseSchedule) -> Process:
    noise.bind(process.num_scales)
    process.noise = noise
    return process


def test_fault_drifting_grey_value() -> None:
    noisy = InverseHeat(10, DrainingNoise(0.05), LogBlur(0.5, 24.0))
    ends = {("forward", "steady state")}
    assert changed(InverseHeat(10, ConstantNoise(0.05), LogBlur(0.5, 24.0)), noisy) == GREY | ends
    assert changed(Homogeneous(10), drained(Homogeneous(10), Draining())) == GREY | ends
    row = finding(invariances.average_grey, noisy, samples=200)
    assert row.measured == pytest.approx(0.1, rel=1e-6) and row.scale == 1


def test_fault_osmosis_that_loses_mass() -> None:
    found = changed(OsmosisFilter(10), drained(OsmosisFilter(10), Draining()))
    assert found == GREY | {("forward", "steady state")}


class Slanted(HeatOperator):
    """Rows diffuse twice as fast as columns."""

    def eigenvalues(self, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        rows, columns = (super(Slanted, self).eigenvalues(h, w, device) for h, w in ((height, 1), (1, width)))
        return 2 * rows + columns

    def _apply_decay(self, f: Decay, y: Tensor) -> Tensor:
        values = f(self.eigenvalues(y.shape[-2], y.shape[-1], y.device)).to(y.dtype)
        return self.synthesis(values * self.analysis(y))


class SlantedHeat(InverseHeat):
    def operator(self, context: Context = None) -> HeatOperator:
        return Slanted("continuous")


def test_fault_rotation() -> None:
    found = changed(InverseHeat(10, ConstantNoise(0.1)), SlantedHeat(10, ConstantNoise(0.1)))
    assert found == {("forward", "rotation by 90 degrees"), ("reverse", "rotation by 90 degrees")}


class Inconsistent(Blurring):
    """More noise in the marginal than the transitions make."""

    def marginal(self, x_0: Tensor, t: Scale, context: Context = None) -> Gaussian:
        t = as_scale(t, x_0)
        law = super().marginal(x_0, t, context)
        return Gaussian(law.mean, lambda mu: (1 + 0.1 * t) * self.noise_scale(t, mu), law.operator)


class Forgetful(Blurring):
    """Transitions that add the noise of half a step."""

    def transition(self, x_s: Tensor, s: Scale, t: Scale, context: Context = None) -> Gaussian:
        law = super().transition(x_s, s, t, context)
        return Gaussian(law.mean, lambda mu: 0.7 * law.std(mu), law.operator)


class Remembering(Blurring):
    """Paths whose noise is one and the same draw at all scales: right marginals, no Markov chain."""

    def trajectory(self, x_0: Tensor, ts: Any, generator: Any = None, context: Context = None) -> Tensor:
        noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)
        laws = [self.marginal(x_0, t, context) for t in ts]
        path = [law.mean + law.operator.apply(law.std, noise) for law in laws]
        return torch.stack([x_0 if t == 0 else x for t, x in zip(ts, path, strict=True)])


@pytest.mark.slow
def test_fault_marginal_is_no_composition() -> None:
    healthy = Blurring(20)
    law = {("forward", "transition from the initial state"), ("forward", "semigroup"), ("reverse", "semigroup")}
    entropy = {("forward", "entropy by the determinant")}
    assert changed(healthy, Inconsistent(20)) >= law | entropy
    assert changed(healthy, Forgetful(20)) >= (law | entropy) - {("reverse", "semigroup")}
    untouched = {"initial state", "average grey value", "rotation by 90 degrees", "permutation of pixels"}
    for broken in (Inconsistent(20), Forgetful(20)):
        assert not untouched & {name for _, name in changed(healthy, broken)}


def test_fault_paths_that_remember() -> None:
    assert changed(Blurring(20), Remembering(20)) == {("forward", "Markov property")}


class Quiet(Blurring):
    """Paths with too little noise, from right laws."""

    def trajectory(self, x_0: Tensor, ts: Any, generator: Any = None, context: Context = None) -> Tensor:
        path = super().trajectory(x_0, ts, generator, context)
        means = torch.stack([x_0 if t == 0 else self.marginal(x_0, t, context).mean for t in ts])
        return means + 0.9 * (path - means)


def test_fault_paths_with_too_little_noise() -> None:
    """Only random paths tell."""
    drawn = {"semigroup", "entropy by the determinant", "steady state"}
    found = changed(Blurring(20), Quiet(20))
    assert found == {("forward", name) for name in drawn} | {("reverse", "semigroup")}


class Shifted(Blurring):
    """Samples off their law, beside right paths and laws."""

    def sample(self, x_0: Tensor, t: Scale, generator: Any = None, context: Context = None) -> Tensor:
        return super().sample(x_0, t, generator, context) + 0.1


class Loud(Blurring):
    def sample(self, x_0: Tensor, t: Scale, generator: Any = None, context: Context = None) -> Tensor:
        return 1.1 * super().sample(x_0, t, generator, context)


class Brightened(Homogeneous):
    def sample(self, x_0: Tensor, t: Scale, generator: Any = None, context: Context = None) -> Tensor:
        return 1.001 * super().sample(x_0, t, generator, context)


def test_fault_samples_off_their_law() -> None:
    from_image = {("forward", "transition from the initial state")}
    assert changed(Blurring(20), Shifted(20)) == from_image
    assert changed(Blurring(20), Loud(20)) == from_image
    assert changed(Homogeneous(10), Brightened(10)) == from_image


class Swelling(VP):
    """Paths whose noise is stretched more and more: their entropy rises more than that of the laws."""

    def trajectory(self, x_0: Tensor, ts: Any, generator: Any = None, context: Context = None) -> Tensor:
        path = super().trajectory(x_0, ts, generator, context)
        means = torch.stack([x_0 if t == 0 else self.marginal(x_0, t, context).mean for t in ts])
        stretch = torch.tensor([1 + 0.2 * float(t) for t in ts], dtype=x_0.dtype).reshape(-1, 1, 1, 1, 1)
        return means + stretch * (path - means)


def test_fault_entropy_of_the_paths() -> None:
    assert ("forward", "conditional entropy") in changed(VP(4), Swelling(4))


class Printed(InverseHeat):
    """Eq. (42) as it is printed."""

    def conditional_entropy(self, t: Scale, size: tuple[int, int], context: Context = None) -> Tensor:
        mu = self.operator().eigenvalues(*size).expand(size)
        log_noise = self.log_noise_scale(t, mu).expand(size)
        return super().conditional_entropy(t, size, context) - 0.5 * log_noise.sum()


def test_fault_entropy_as_printed() -> None:
    found = changed(InverseHeat(10, ConstantNoise(0.1)), Printed(10, ConstantNoise(0.1)))
    assert found == {("forward", "entropy by the determinant")}


class Tilted(Blurring):
    """A posterior that keeps too much of the image."""

    def posterior(self, x_t: Tensor, x_0: Tensor, s: Scale, t: Scale, context: Context = None) -> Gaussian:
        law = super().posterior(x_t, x_0, s, t, context)
        return Gaussian(law.mean + 0.05 * x_t, law.std, law.operator)


def test_fault_posterior() -> None:
    found = changed(Blurring(20), Tilted(20))
    assert {key for key in found if key[0] == "forward"} == set()
    assert found >= {("reverse", "semigroup"), ("reverse", "steady state"), ("reverse", "transition")}


class TooMuch(VP):
    """Marginals of a variance above that of the steps."""

    def marginal(self, x_0: Tensor, t: Scale, context: Context = None) -> Gaussian:
        law = super().marginal(x_0, t, context)
        return Gaussian(law.mean, lambda mu: 1.01 * law.std(mu), law.operator)


class TooLittle(VP):
    """Paths of too little noise."""

    def trajectory(self, x_0: Tensor, ts: Any, generator: Any = None, context: Context = None) -> Tensor:
        path = super().trajectory(x_0, ts, generator, context)
        means = torch.stack([x_0 if t == 0 else self.marginal(x_0, t, context).mean for t in ts])
        return means + 0.9 * (path - means)


@pytest.mark.parametrize("broken", [TooMuch(8), TooLittle(8)], ids=["law", "paths"])
def test_fault_variance_that_is_not_preserved(broken: VP) -> None:
    assert ("forward", "variance-preserving transition") in changed(VP(8), broken)


class Still(Gaussian):
    """A law that draws its mean."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.mean


class QuietReturn(VP):
    """A way back whose laws are right and whose draws are not."""

    def posterior(self, x_t: Tensor, x_0: Tensor, s: Scale, t: Scale, context: Context = None) -> Gaussian:
        law = super().posterior(x_t, x_0, s, t, context)
        return Still(law.mean, law.std, law.operator)


def test_fault_draws_on_the_way_back() -> None:
    assert changed(VP(8), QuietReturn(8)) == {("reverse", "semigroup"), ("reverse", "steady state")}


class Lopsided(VP):
    """More noise on the left than on the right."""

    def marginal(self, x_0: Tensor, t: Scale, context: Context = None) -> Gaussian:
        law = super().marginal(x_0, t, context)
        ramp = torch.linspace(1, 1.2, x_0.shape[-1], dtype=x_0.dtype)
        return Gaussian(law.mean * ramp, law.std, law.operator)


def test_fault_permutation() -> None:
    found = changed(VP(20), Lopsided(20))
    assert {("forward", "permutation of pixels"), ("forward", "rotation by 90 degrees")} <= found


class Growing(NoNoise):
    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 0.1 * t, torch.log(t)


class Unchecked(Process):
    """No look at the curves when it is made."""

    lyapunov = False

    def _check_curves(self) -> None:
        self._look_at_ends()


class Sharpening(LinearTimeBlur):
    """Blurs, and then sharpens: transitions of negative variance, and factors without bound."""

    def forward(self, t: Tensor) -> Tensor:
        return 2 * self.dissipation_time_max * t * (1 - t)


class FadingNoise(NoiseSchedule):
    """The noise falls and the signal does not: transitions of negative variance."""

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.log(torch.where(t > 0, 0.3 - 0.05 * t, torch.zeros_like(t)))


@pytest.mark.parametrize("noise", [ConstantNoise, NoNoise])
@pytest.mark.parametrize("time", [4.0, 400.0, 40000.0])
def test_fault_laws_that_are_none_are_violated_and_no_crash(time: float, noise: Callable[[], NoiseSchedule]) -> None:
    """Finite, beyond 1e300, and inf - inf: every finding has a verdict, and none that rests on no number."""
    rows = audit(Unchecked(HeatOperator(), 10, noise(), Sharpening(time)), photo(), samples=200)
    broken = {(row.direction, row.name) for row in rows if row.verdict is Verdict.VIOLATED}
    assert {("forward", "semigroup"), ("forward", "steady state"), ("reverse", "entropy of the images")} <= broken
    for row in rows:
        assert row.verdict in (Verdict.VIOLATED, Verdict.NOT_APPLICABLE) or not math.isnan(row.measured), row


def test_fault_entropy_that_falls_in_the_marginals_alone() -> None:
    """The composed transitions can't take noise away; the marginals do."""
    rows = audit(Unchecked(PixelOperator(), 10, FadingNoise()), photo(), samples=200)
    for row in (by_name(rows, "entropy of the images", "reverse"), by_name(rows, "conditional entropy")):
        assert row.verdict is Verdict.VIOLATED and row.measured < -0.01


@pytest.mark.parametrize(("noise", "line"), [(Falling(), "noise falls"), (Growing(), "amplify")])
def test_fault_that_the_constructor_sees(noise: NoiseSchedule, line: str) -> None:
    with pytest.raises(UserError, match=line):
        Process(PixelOperator(), 16, noise)
