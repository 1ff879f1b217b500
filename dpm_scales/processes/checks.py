"""Checks of a forward process at construction: of its arguments, and of its curves.

Every step of the chain must exist and have the properties that the process promises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dpm_scales.errors import UserError, is_whole, require
from dpm_scales.operators import Operator
from dpm_scales.processes.steps import Curves
from dpm_scales.schedules import BlurSchedule, Clock, Color, NoiseSchedule, is_number

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Chain:
    """The curves of a process at its scales k / K, k = 0..K, and at M eigenvalues that span the spectrum.

    Attributes:
        name: the name of the process's class, for messages.
        mu: eigenvalues ``(M,)``.
        log_signal: log lambda ``(K + 1, M)``.
        variance: gamma^2 ``(K + 1, M)``.
    """

    name: str
    mu: Tensor
    log_signal: Tensor
    variance: Tensor

    @classmethod
    def of(cls, name: str, mu: Tensor, log_signal: Tensor, noise: Tensor) -> Chain:
        """Return the chain of curves as a process gives them: log lambda and gamma, ``(K + 1, 1, M | 1)``."""
        shape = (len(log_signal), len(mu))
        return cls(name, mu, log_signal[:, 0].expand(shape), (noise[:, 0] ** 2).expand(shape))

    def check_image(self) -> None:
        """Raise UserError unless scale 0 is the image: no blur, no noise."""
        log_signal, variance = self.log_signal[0], self.variance[0]
        require(
            bool((log_signal.abs() <= TOLERANCE).all()) and bool((variance <= TOLERANCE**2).all()),
            f"{self.name}: scale 0 must be the image, and is {math.exp(log_signal.min()):.6g} times the image with "
            f"noise {variance.max().sqrt():.4g}; let the schedules start at signal 1, noise 0 and no blur",
        )

    def check_transitions(self) -> None:
        """Raise UserError if a step amplifies a frequency, or would need noise of negative variance."""
        growth = self.log_signal[1:] - self.log_signal[:-1]
        self._refuse(
            growth > TOLERANCE,
            lambda k, j: f"the signal grows by a factor {math.exp(growth[k, j]):.4g}; no step may sharpen or amplify",
        )
        added = self.variance[1:] - torch.exp(2 * growth) * self.variance[:-1]
        self._refuse(
            ~(added >= -TOLERANCE * (self.variance[1:] + 1e-30)),
            lambda k, j: (
                f"the transition would need the variance {added[k, j]:.4g}; noise must grow at least as the "
                "signal's square falls, so raise the noise there"
            ),
        )

    def check_variance_preserving(self, log_signal: Tensor, log_noise: Tensor, schedule: str) -> None:
        """Raise UserError unless a^2 + gamma^2 = 1 at every scale but 0.

        Args:
            log_signal, log_noise: log a and log gamma of the schedule, ``(K + 1,)``.
            schedule: the name of the noise schedule's class, for the message.
        """
        total = torch.exp(2 * log_signal) + torch.exp(2 * log_noise)
        worst = int((total[1:] - 1).abs().argmax()) + 1
        require(
            abs(float(total[worst]) - 1) < 1e-6,
            f"{self.name}: signal^2 + noise^2 is {total[worst]:.4g} at scale k={worst} of {len(total) - 1}, and must "
            f"be 1; take a variance-preserving schedule, or for {schedule} a process without this promise: rectified, "
            "ve, heat or osmosis_diffusion",
        )

    def check_lyapunov(self) -> None:
        """Raise UserError if gamma falls between two successive scales."""
        fall = self.variance[1:] - self.variance[:-1]

        def describe(k: int, j: int) -> str:
            levels = self.variance[k : k + 2, j].sqrt().tolist()
            before, after = (f"{level:.4g}" for level in levels)
            if before == after:
                before, after = (f"{level:.9g}" for level in levels)
            return (
                f"the noise falls from {before} to {after}, so entropy would fall (Lyapunov property); use a "
                "non-decreasing schedule"
            )

        self._refuse(fall < -TOLERANCE * self.variance[:-1], describe)

    def _refuse(self, bad: Tensor, describe: Callable[[int, int], str]) -> None:
        """Raise UserError at the first step k and eigenvalue j where `bad` ``(K, M)`` holds."""
        if bad.any():
            k, j = (int(i) for i in bad.nonzero()[0])
            raise UserError(
                f"{self.name}: at scale k={k + 1} of {len(bad)}, eigenvalue mu={self.mu[j]:.4g}: {describe(k, j)}"
            )


class Promises(Curves, Protocol):
    """The parts of a process that a chain is checked for, see `Process`."""

    num_scales: int
    noise: NoiseSchedule
    lyapunov: ClassVar[bool]
    variance_preserving: ClassVar[bool]


def require_chain(process: Promises, operator: Operator, device: torch.device) -> None:
    """Raise UserError unless every step of a process's chain exists and the class's promises hold."""
    ts = torch.arange(process.num_scales + 1, dtype=torch.float64, device=device) / process.num_scales
    mu = spanning(operator).to(device)
    log_signal, deviation = process.log_signal_scale(ts, mu), process.noise_scale(ts, mu)
    chain = Chain.of(type(process).__name__, mu, log_signal, deviation)
    chain.check_image()
    chain.check_transitions()
    if process.variance_preserving:
        log_a, log_noise = process.noise(ts)
        chain.check_variance_preserving(log_a, log_noise, type(process.noise).__name__)
    if process.lyapunov:
        chain.check_lyapunov()


def spanning(operator: Operator) -> Tensor:
    """Return eigenvalues ``(M,)`` that span the spectrum of L, float64; only 0 where L = 0."""
    largest = operator.eigenvalues(64, 64).max().item()
    return torch.linspace(0, 1, 24, dtype=torch.float64) ** 3 * largest if largest > 0 else torch.zeros(1).double()


def require_law(
    process: object,
    operator: Operator,
    num_scales: int,
    min_decay: float,
    value_range: Sequence[float],
    noise: NoiseSchedule,
    blur: BlurSchedule | None,
    color: Color | None,
    clock: Clock | None,
) -> tuple[float, float]:
    """Return the value range of a process. Raises UserError for arguments out of range."""
    name = type(process).__name__
    ok = is_whole(num_scales, 1)
    require(ok, f"{name}: num_scales must be a whole number >= 1, got {num_scales!r}")
    ok = is_number(min_decay) and 0 <= min_decay < 1
    require(ok, f"{name}: min_decay must lie in [0, 1), got {min_decay!r}")
    values = tuple(value_range) if isinstance(value_range, Sequence) else ()
    if len(values) != 2 or not all(is_number(v) for v in values) or not values[0] < values[1]:
        raise UserError(f"{name}: value_range must be [low, high] with low < high, got {value_range!r}")
    for key, ok, got in (
        ("noise", isinstance(noise, NoiseSchedule), noise),
        ("blur", blur is None or isinstance(blur, BlurSchedule), blur),
        ("color", color is None or isinstance(color, Color), color),
        ("clock", clock is None or isinstance(clock, Clock), clock),
    ):
        require(ok, f"{name}: {key}={got!r} is no {key} schedule; see dpm_scales.schedules")
    for key, curve in (("color", color), ("clock", clock)):
        ok = curve is None or operator.largest > 0
        require(ok, f"{name}: a {key} needs an operator with a spectrum, and {operator!r} has none")
    require(
        blur is None or blur.is_gaussian or min_decay > 0,
        f"{name}: {type(blur).__name__} removes frequencies at once; set min_decay to what is left "
        "of them, for example 0.01",
    )
    return float(values[0]), float(values[1])
