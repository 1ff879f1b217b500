r"""Scalar curves of the scale t in [0, 1]: how much noise, how much blur.

t = k / num_scales; t = 0 is the image itself. All values are float64. Curves that are a formula are evaluated as one;
curves that are a list (beta_k, blur sigmas, ...) are knots at k / num_scales, linear in between in the quantity that
adds up along the chain (log signal scale, noise variance, dissipation time), so that every t in between is a scale of
a consistent Markov chain too.

| class | gives | source |
|---|---|---|
| ConstantBeta, LinearBeta, ListedBeta | a_t = prod sqrt(1 - beta_k^2), gamma^2 = 1 - a^2 | Eq. (16); Ho 2020 |
| CosineLogSNR | logSNR = -2 log tan(pi/2 t) truncated to [min, max], shifted by 2 log(shift) | Hoogeboom et al. 2023 |
| SigmoidSignal | a_t^2 a normalised sigmoid | Jabri et al. 2022; Chen 2023 |
| GeometricNoise, EDMNoise, ListedNoise | a = 1, gamma_t growing | Song et al. 2021; Karras et al. 2022 |
| ConstantNoise, NoNoise | a = 1, gamma the same at every scale but 0 | Rissanen et al. 2023 |
| LogBlur, LinearTimeBlur, ListedBlurSigmas, ListedDissipationTimes | T(t) in px^2 | Rissanen et al. 2023 |
| SinSquaredBlur | blur_sigma = max sin^2(pi t / 2) | Hoogeboom & Salimans 2023 |

beta_k here is the paper's: a standard deviation (its square is DDPM's beta).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpm_scales.errors import UserError, require


def is_number(value: object) -> bool:
    """Whether `value` is a finite real number, of Python's or NumPy's kinds; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def require_positive(owner: object, **values: float) -> None:
    """Raise UserError, naming owner and argument, unless every value is a positive finite number."""
    for name, value in values.items():
        ok = is_number(value) and value > 0
        require(ok, f"{type(owner).__name__}: {name} must be a positive number, got {value!r}")


def require_finite(owner: object, **values: float) -> None:
    """Raise UserError, naming owner and argument, unless every value is a finite number."""
    for name, value in values.items():
        require(is_number(value), f"{type(owner).__name__}: {name} must be a number, got {value!r}")


def _ordered(owner: object, low: str, low_value: float, high: str, high_value: float) -> None:
    require_positive(owner, **{low: low_value, high: high_value})
    if low_value > high_value:
        raise UserError(
            f"{type(owner).__name__}: {low}={low_value:g} exceeds {high}={high_value:g}; swap them or raise {high}"
        )


def _numbers(owner: object, name: str, values: Sequence[float]) -> list[float]:
    """A list from YAML or Python as floats, finite and >= 0."""
    label = f"{type(owner).__name__}: {name}"
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise UserError(f"{label} must be a list of numbers, got {values!r}")
    numbers = list(values)
    require(len(numbers) > 0, f"{label} is empty; give one number per scale")
    for k, value in enumerate(numbers, start=1):
        ok = is_number(value) and value >= 0
        require(ok, f"{label}: entry {k} is {value!r}; every entry must be a number >= 0")
    return [float(value) for value in numbers]


class Schedule(nn.Module):
    """A curve of t. `bind` is called once by the process that owns it; lists are checked and tabulated there."""

    knots: Tensor
    num_scales: int = 0

    def bind(self, num_scales: int) -> None:
        """Fix the number of scales.

        Raises: UserError if a list has another length, or if the schedule belongs to a process of another length.
        """
        require(
            self.num_scales in (0, num_scales),
            f"{type(self).__name__}: already bound to a process of {self.num_scales} scales, so it can't serve one of "
            f"{num_scales}; give each process a schedule of its own",
        )
        self.num_scales = num_scales

    def _tabulate(self, values: Sequence[float] | Tensor) -> None:
        """Knots at k / num_scales, the first of which belongs to t = 0."""
        table = torch.as_tensor(values, dtype=torch.float64)
        self.register_buffer("knots", table, persistent=False)

    def _interpolate(self, t: Tensor) -> Tensor:
        position = (t.to(torch.float64) * self.num_scales).clamp(0, self.num_scales)
        index = position.floor().clamp(max=self.num_scales - 1).long()
        # take: indexing with a 0-dim tensor would wait for the device
        return torch.lerp(self.knots.take(index), self.knots.take(index + 1), position - index)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Schedule:
        """Follow a model to its device, but stay float64 when it is cast."""
        knots = self._buffers.get("knots")
        super()._apply(fn, recurse)
        if knots is not None:
            self.knots = knots.to(self.knots.device)
        return self

    def _progress(self, t: Tensor) -> Tensor:
        """From 0 at k = 1 to 1 at t = 1; with one scale only, that scale is the last."""
        first = 1 / self.num_scales
        return ((t - first) / (1 - first)).clamp(0, 1) if self.num_scales > 1 else torch.ones_like(t)

    def _fits(self, name: str, values: Sequence[float], num_scales: int) -> None:
        require(
            len(values) == num_scales,
            f"{type(self).__name__}: {name} has {len(values)} entries, but num_scales is {num_scales}; "
            f"set num_scales={len(values)}",
        )

    def _log_ramp_squared(self, t: Tensor, low: float, high: float) -> Tensor:
        """The square of a value log-spaced from `low` at k = 1 to `high` at t = 1; linear from 0 before k = 1."""
        t = t.to(torch.float64)
        ramp = 2 * (math.log(low) + self._progress(t) * math.log(high / low))
        return torch.exp(ramp) * (t * self.num_scales).clamp(0, 1)


# --- noise ------------------------------------------------------------------------------------------------------------


class NoiseSchedule(Schedule):
    """Signal and noise of the eigenvalue 0: ``forward(t) -> (log a_t, log gamma_t)``, float64, the shape of t."""

    @abstractmethod
    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class _LogSNR(NoiseSchedule):
    """Variance preserving, a^2 + gamma^2 = 1, given by logSNR = log(a^2 / gamma^2)."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = self.log_snr(t)
        return 0.5 * F.logsigmoid(log_snr), 0.5 * F.logsigmoid(-log_snr)


class CosineLogSNR(_LogSNR):
    """logSNR(t) = -2 log tan(a + t (b - a)), between `logsnr_max` at t = 0 and `logsnr_min` at t = 1.

    Args:
        logsnr_min, logsnr_max: the ends, in nats.
        shift: factor on the signal-to-noise amplitude, 32 / d for d-pixel images ("simple diffusion").
    """

    def __init__(self, logsnr_min: float = -10.0, logsnr_max: float = 10.0, shift: float = 1.0) -> None:
        super().__init__()
        require_positive(self, shift=shift)
        require_finite(self, logsnr_min=logsnr_min, logsnr_max=logsnr_max)
        if not logsnr_min < logsnr_max:
            raise UserError(f"CosineLogSNR: logsnr_min={logsnr_min:g} must be below logsnr_max={logsnr_max:g}")
        self.logsnr_min, self.logsnr_max, self.shift = logsnr_min, logsnr_max, shift

    def log_snr(self, t: Tensor) -> Tensor:
        start = math.atan(math.exp(-0.5 * self.logsnr_max))
        end = math.atan(math.exp(-0.5 * self.logsnr_min))
        angle = start + t.to(torch.float64) * (end - start)
        return -2 * torch.log(torch.tan(angle)) + 2 * math.log(self.shift)


class SigmoidSignal(_LogSNR):
    """a_t^2 = (s(end) - s(start + t (end - start))) / (s(end) - s(start)), s(x) = sigmoid(x / tau), >= `minimum`."""

    def __init__(self, start: float = -3.0, end: float = 3.0, tau: float = 1.0, minimum: float = 1e-5) -> None:
        super().__init__()
        require_positive(self, tau=tau, minimum=minimum)
        require_finite(self, start=start, end=end)
        if not start < end:
            raise UserError(f"SigmoidSignal: start={start:g} must be below end={end:g}")
        require(minimum < 0.5, f"SigmoidSignal: minimum must be below 0.5, got {minimum:g}")
        self.start, self.end, self.tau, self.minimum = start, end, tau, minimum

    def log_snr(self, t: Tensor) -> Tensor:
        first, last = (1 / (1 + math.exp(-x / self.tau)) for x in (self.start, self.end))
        now = torch.sigmoid((self.start + t.to(torch.float64) * (self.end - self.start)) / self.tau)
        signal = ((last - now) / (last - first)).clamp(self.minimum, 1 - self.minimum)
        return torch.logit(signal)


class ListedBeta(NoiseSchedule):
    """Variance preserving chain U_k = sqrt(1 - beta_k^2) U_{k-1} + beta_k G, any beta_k in [0, 1) (Eq. (7), (16))."""

    def __init__(self, betas: Sequence[float]) -> None:
        super().__init__()
        self.betas = self._checked(_numbers(self, "betas", betas))

    def _checked(self, betas: list[float]) -> list[float]:
        for k, beta in enumerate(betas, start=1):
            require(beta < 1, f"{type(self).__name__}: beta at scale k={k} is {beta:g}; it must lie in [0, 1)")
        return betas

    def bind(self, num_scales: int) -> None:
        self._fits("betas", self.betas, num_scales)
        super().bind(num_scales)
        betas = torch.tensor(self.betas, dtype=torch.float64)
        self._tabulate(F.pad(torch.cumsum(0.5 * torch.log1p(-(betas**2)), 0), (1, 0)))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_signal = self._interpolate(t)
        return log_signal, 0.5 * torch.log(-torch.expm1(2 * log_signal))


class ConstantBeta(ListedBeta):
    """A chain of steps with the same beta (the paper's experiments: 0.1).

    Args:
        beta: standard deviation of the noise of one step, in (0, 1).
        steps: how many steps of the chain lead from 0 to each scale, ascending; None for one step a scale.
    """

    def __init__(self, beta: float = 0.1, steps: Sequence[float] | None = None) -> None:
        require_positive(self, beta=beta)
        super().__init__([beta])
        self.beta, self.steps = beta, None if steps is None else _numbers(self, "steps", steps)
        if self.steps is not None:
            require(sorted(self.steps) == self.steps, f"ConstantBeta: steps must be ascending, got {self.steps}")

    def bind(self, num_scales: int) -> None:
        steps = [float(k) for k in range(1, num_scales + 1)] if self.steps is None else self.steps
        self._fits("steps", steps, num_scales)
        NoiseSchedule.bind(self, num_scales)
        log_keep = math.log1p(-(self.beta**2))
        taken = [b - a for a, b in zip([0.0, *steps], steps, strict=False)]
        self.betas = [math.sqrt(-math.expm1(number * log_keep)) for number in taken]
        # not from the betas: that of thousands of steps rounds to 1
        self._tabulate([0.0, *(0.5 * log_keep * k for k in steps)])


class LinearBeta(ListedBeta):
    """DDPM's: beta_k^2 linear from `ddpm_beta_min` to `ddpm_beta_max` (Ho et al. 2020: 1e-4 to 0.02, 1000 scales)."""

    def __init__(self, ddpm_beta_min: float = 1e-4, ddpm_beta_max: float = 0.02) -> None:
        _ordered(self, "ddpm_beta_min", ddpm_beta_min, "ddpm_beta_max", ddpm_beta_max)
        super().__init__([math.sqrt(ddpm_beta_min), math.sqrt(ddpm_beta_max)])
        self.ddpm_beta_min, self.ddpm_beta_max = ddpm_beta_min, ddpm_beta_max

    def bind(self, num_scales: int) -> None:
        variances = torch.linspace(self.ddpm_beta_min, self.ddpm_beta_max, num_scales, dtype=torch.float64)
        self.betas = variances.sqrt().tolist()
        super().bind(num_scales)


class _Exploding(NoiseSchedule):
    """a = 1: only the noise grows, gamma_t^2 given by `variance`."""

    @abstractmethod
    def variance(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        variance = self.variance(t)
        return torch.zeros_like(variance), 0.5 * torch.log(variance)


class GeometricNoise(_Exploding):
    """gamma_k log-spaced from `noise_min` at k = 1 to `noise_max` (Song et al. 2021), in units of the images."""

    def __init__(self, noise_min: float = 0.002, noise_max: float = 80.0) -> None:
        super().__init__()
        _ordered(self, "noise_min", noise_min, "noise_max", noise_max)
        self.noise_min, self.noise_max = noise_min, noise_max

    def variance(self, t: Tensor) -> Tensor:
        return self._log_ramp_squared(t, self.noise_min, self.noise_max)


class EDMNoise(_Exploding):
    """gamma^(1/rho) linear in k from `noise_min` at k = 1 to `noise_max` at t = 1 (Karras et al. 2022, Eq. (5))."""

    def __init__(self, noise_min: float = 0.002, noise_max: float = 80.0, rho: float = 7.0) -> None:
        super().__init__()
        _ordered(self, "noise_min", noise_min, "noise_max", noise_max)
        require_positive(self, rho=rho)
        self.noise_min, self.noise_max, self.rho = noise_min, noise_max, rho

    def variance(self, t: Tensor) -> Tensor:
        t = t.to(torch.float64)
        low, high = self.noise_min ** (1 / self.rho), self.noise_max ** (1 / self.rho)
        return (low + self._progress(t) * (high - low)) ** (2 * self.rho) * (t * self.num_scales).clamp(0, 1)


class ListedNoise(_Exploding):
    """Any gamma_k, one per scale, non-decreasing, in units of the images."""

    def __init__(self, noise_scales: Sequence[float]) -> None:
        super().__init__()
        self.noise_scales = _numbers(self, "noise_scales", noise_scales)

    def bind(self, num_scales: int) -> None:
        self._fits("noise_scales", self.noise_scales, num_scales)
        super().bind(num_scales)
        self._tabulate([0.0, *(g * g for g in self.noise_scales)])

    def variance(self, t: Tensor) -> Tensor:
        return self._interpolate(t)


class ConstantNoise(_Exploding):
    """The same gamma = `noise_std` at every scale but 0 (IHDM: 0.01 for images in [0, 1])."""

    def __init__(self, noise_std: float = 0.01) -> None:
        super().__init__()
        require_positive(self, noise_std=noise_std)
        self.noise_std = noise_std

    def variance(self, t: Tensor) -> Tensor:
        return self.noise_std**2 * (t.to(torch.float64) * self.num_scales).clamp(0, 1)


class NoNoise(_Exploding):
    """gamma = 0: a deterministic scale-space."""

    def variance(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=torch.float64)


# --- blur -------------------------------------------------------------------------------------------------------------


class BlurSchedule(Schedule):
    """``forward(t) -> T(t)``: dissipation time in px^2 (blur_sigma^2 / 2), float64, non-decreasing, 0 at t = 0."""

    @abstractmethod
    def forward(self, t: Tensor) -> Tensor:
        raise NotImplementedError


class LogBlur(BlurSchedule):
    """blur_sigma log-spaced from `blur_sigma_min` at k = 1 to `blur_sigma_max` px (IHDM; CIFAR-10: 0.5 to 24)."""

    def __init__(self, blur_sigma_min: float = 0.5, blur_sigma_max: float = 24.0) -> None:
        super().__init__()
        _ordered(self, "blur_sigma_min", blur_sigma_min, "blur_sigma_max", blur_sigma_max)
        self.blur_sigma_min, self.blur_sigma_max = blur_sigma_min, blur_sigma_max

    def forward(self, t: Tensor) -> Tensor:
        return 0.5 * self._log_ramp_squared(t, self.blur_sigma_min, self.blur_sigma_max)


class SinSquaredBlur(BlurSchedule):
    """blur_sigma(t) = blur_sigma_max sin^2(pi t / 2) px (Hoogeboom & Salimans 2023)."""

    def __init__(self, blur_sigma_max: float = 20.0) -> None:
        super().__init__()
        require_positive(self, blur_sigma_max=blur_sigma_max)
        self.blur_sigma_max = blur_sigma_max

    def forward(self, t: Tensor) -> Tensor:
        return 0.5 * (self.blur_sigma_max * torch.sin(t.to(torch.float64) * (math.pi / 2)) ** 2) ** 2


class LinearTimeBlur(BlurSchedule):
    """T(t) = t dissipation_time_max px^2: plain diffusion with equal steps."""

    def __init__(self, dissipation_time_max: float = 100.0) -> None:
        super().__init__()
        require_positive(self, dissipation_time_max=dissipation_time_max)
        self.dissipation_time_max = dissipation_time_max

    def forward(self, t: Tensor) -> Tensor:
        return self.dissipation_time_max * t.to(torch.float64)


class _ListedBlur(BlurSchedule):
    """Knots of T, one per scale."""

    values: list[float]
    argument: str

    def bind(self, num_scales: int) -> None:
        self._fits(self.argument, self.values, num_scales)
        super().bind(num_scales)
        for k in range(1, num_scales):
            before, after = self.values[k - 1], self.values[k]
            require(
                after >= before,
                f"{type(self).__name__}: {self.argument} sharpen at scale k={k + 1}: {after:g} follows {before:g}; "
                "blur can only grow, so list them in increasing order",
            )
        self._tabulate([0.0, *(self.time(value) for value in self.values)])

    @staticmethod
    @abstractmethod
    def time(value: float) -> float:
        raise NotImplementedError

    def forward(self, t: Tensor) -> Tensor:
        return self._interpolate(t)


class ListedBlurSigmas(_ListedBlur):
    """Any blur sigmas in px, one per scale, non-decreasing."""

    argument = "blur_sigmas"

    def __init__(self, blur_sigmas: Sequence[float]) -> None:
        super().__init__()
        self.values = _numbers(self, self.argument, blur_sigmas)

    @staticmethod
    def time(value: float) -> float:
        return value**2 / 2


class ListedDissipationTimes(_ListedBlur):
    """Any dissipation times in px^2, one per scale, non-decreasing (the paper's experiments: 1, 5, ..., 10000)."""

    argument = "dissipation_times"

    def __init__(self, dissipation_times: Sequence[float]) -> None:
        super().__init__()
        self.values = _numbers(self, self.argument, dissipation_times)

    @staticmethod
    def time(value: float) -> float:
        return value
