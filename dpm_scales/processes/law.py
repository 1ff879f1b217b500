r"""A process is an operator L and two curves, lambda_t(mu) and gamma_t(mu); the whole law follows.

    marginal     y_t = lambda_t(L) y_0 + gamma_t(L) eps                                             Eq. (13), (38)
    transition   y_t = rho(L) y_s + beta(L) eps,   rho = lambda_t / lambda_s,   beta^2 = gamma_t^2 - rho^2 gamma_s^2
    posterior    y_s = lambda_s(L) y_0 + a(L) (y_t - lambda_t(L) y_0) + gamma_s sqrt(tau)(L) eps,
                 a = rho gamma_s^2 / gamma_t^2,   tau = 1 - rho^2 gamma_s^2 / gamma_t^2 = beta^2 / gamma_t^2

Variances of independent noise add, gamma_k^2 = alpha_k^2 gamma_{k-1}^2 + beta_k^2: the printed Eqs. (8), (12), (14),
(23)-(25), (31), (40), (43) add standard deviations and are corrected here. log lambda is stored instead of lambda,
since blur underflows; all curves are float64 and only the factors that multiply an image are cast.

Scale 0 is the image: lambda_0 = 1 and gamma_0 = 0 at every eigenvalue, for every process. So the last step of a
sampler, from t down to s = 0, returns m_0 = y_0-hat itself, with the image's full contrast, which is also the mean of
the likelihood's decoder.

Throughout, `t` is a float tensor in [0, 1] of shape ``()`` or ``(B,)`` on the images' device (or a Python float);
functions of t and mu have shape ``mu.shape`` or ``(B, 1, *mu.shape)``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from dpm_scales.describe import Describable
from dpm_scales.errors import UserError
from dpm_scales.memory import require_memory
from dpm_scales.operators import Decay, LogCurve, Operator, SpectralFunction, batch_view
from dpm_scales.processes.checks import require_chain, require_law, spanning
from dpm_scales.processes.kept import KeptValues, kept_curve
from dpm_scales.processes.steps import Gaussian, Scale, Step, as_scale
from dpm_scales.rng import CounterRNG, Randomness, white_noise
from dpm_scales.schedules import BlurSchedule, Clock, Color, NoiseSchedule

MAX_MEAN_LEFT = 0.02
"""Largest lambda_1 / gamma_1 of the mean intensity (mu = 0) for which sampling starts from noise alone."""

DEFAULT_SIZE = (64, 64)
"""(H, W) of the spectrum to which a colour's energy refers until the process is bound to the images' size."""

Context = Tensor | None


class Process(Describable, nn.Module):
    """The law of one forward process.

    Args:
        operator: L.
        num_scales: number K of steps of the chain; t = k / K.
        noise: schedule of (a_t, gamma_t).
        blur: schedule of T(t), or None for no diffusion.
        color: spectrum of the noise, or None for white noise.
        clock: the time of each eigenvalue, or None for the same time.
        min_decay: Hoogeboom & Salimans' d_min, the factor to which blur reduces the highest frequencies.
        value_range: the pixel values to which 0 and 255 are mapped.

    Raises: UserError for values out of range, for curves that no Markov chain has (negative transition variance, blur
    that sharpens, gamma that falls where the Lyapunov property is promised), naming scale and eigenvalue, and for
    curves whose scale 0 is not the image. OutOfMemoryError for more scales than the machine's memory can hold.
    """

    #: number of context channels that the network receives for each image channel
    context_channels: int = 0
    #: bound on the error of f(L), relative to the largest f, where the operator expands its functions
    tolerance: float = 0.0
    #: whether gamma_t never falls, the Lyapunov property (Prop. 3, 7), which is checked at construction
    lyapunov: ClassVar[bool] = True
    #: whether a_t^2 + gamma_t^2 = 1, which is checked at construction
    variance_preserving: ClassVar[bool] = False
    #: whether `sampler=auto` follows the probability flow, in place of the SDE, where the process blurs
    deterministic_sampling: ClassVar[bool] = False

    def __init__(
        self,
        operator: Operator,
        num_scales: int,
        noise: NoiseSchedule,
        blur: BlurSchedule | None = None,
        min_decay: float = 0.0,
        value_range: Sequence[float] = (-1.0, 1.0),
        color: Color | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__()
        self.value_range = require_law(self, operator, num_scales, min_decay, value_range, noise, blur, color, clock)
        self._operator, self._largest = operator, operator.largest
        # peak memory of `_check_consistency`; all tables together take less
        num_bytes = num_scales * (80 + 40 * len(spanning(operator)))
        require_memory(num_bytes, f"{type(self).__name__}: num_scales={num_scales}", "lower num_scales")
        self.num_scales = num_scales
        self.kept = KeptValues()
        self.min_decay = float(min_decay)
        self.noise, self.blur, self.color, self.clock = noise, blur, color, clock
        noise.bind(num_scales)
        if blur is not None:
            blur.bind(num_scales)
        if color is None:
            self._check_curves()
        else:
            self.bind_size(DEFAULT_SIZE)

    def bind_size(self, size: tuple[int, int]) -> None:
        """Set the size (H, W) of the images, to which the energy of a colour refers; without a colour, do nothing.

        Raises: UserError for a colour that vanishes or overflows at some frequency, or for which no chain exists.
        """
        if self.color is not None:
            self.color.bind_spectrum(self._operator.eigenvalues(*size, self.color.spectrum.device).expand(size))
            self._check_curves()

    def _check_curves(self) -> None:
        """Record the properties of the curves at the first and the last scale, and check the curves."""
        self._look_at_ends()
        require_chain(self, self._operator, self._scale(0.0).device)

    def fit_color(self, power: SpectralFunction) -> None:
        """Fit the colour of the noise, if any, to the power P(mu) of the training images; see `Color.fit`."""
        if self.color is not None:
            self.color.fit(power)
            self._look_at_ends()

    def _look_at_ends(self) -> None:
        """Record the properties of the curves at the first and the last scale."""
        zero = torch.zeros(1, dtype=torch.float64, device=self._scale(0.0).device)
        first, last = (self.log_noise_scale(t, zero) for t in (1 / self.num_scales, 1.0))
        if self.clock is not None:  # which starts later than the first scale, with the noise of the schedule
            first, last = (self.noise(zero + t)[1] for t in (1 / self.num_scales, 1.0))
        self._constant, self._noisy = torch.allclose(first, last, 0, 1e-9), bool((last > -math.inf).all())
        self._mean_left = float((0.5 * self.log_snr(1.0, zero)).exp())

    # --- context and operator -----------------------------------------------------------------------------------------

    def context(self, x_0: Tensor, generator: Randomness = None) -> Context:
        """Return the context of images, drawn once per sample; None for processes without a context."""
        return None

    @property
    def has_context(self) -> bool:
        """Return whether samples carry a context, that is, whether the class overrides `context`."""
        return type(self).context is not Process.context

    @property
    def is_heat_blur(self) -> bool:
        """Return whether means are images blurred by the heat equation: diagonal in the DCT, without a context."""
        gaussian = self.blur is not None and self.blur.is_gaussian and self.clock is None
        return gaussian and not self.has_context and self._operator.is_diagonal

    @property
    def is_scalar(self) -> bool:
        """Return whether logSNR changes equally at all eigenvalues between scales, as with white noise and no blur."""
        return self.blur is None and self.clock is None and (self.color is None or self.color.is_fixed)

    def context_from(self, x: Tensor, noise: CounterRNG) -> Context:
        """Return the context of given images ``(B, C, H, W)`` in pixels, drawn by the number of each.

        Raises: UserError for a process whose context does not come from the image itself.
        """
        return self.context(x, noise)

    def context_features(self, context: Context) -> Context:
        """Return the context as channels for the network, ``(B, context_channels * C, H, W)``, or None."""
        return None

    def operator(self, context: Context = None) -> Operator:
        """Return the operator that acts on samples with this context."""
        return self._operator

    def steady_state(self, mean: Tensor, context: Context = None) -> Tensor:
        """Return the limit of infinite blur in pixels, ``(B, C, H | 1, W | 1)``, for mean intensities ``(B, C)``."""
        return mean[..., None, None]

    def degree_of(self, *functions: SpectralFunction) -> int:
        """Return a degree for `Operator.at_degree` sufficient for these functions; 0 where nothing is expanded."""
        return 0

    def rehearsal(self, key: Hashable, calls: int) -> AbstractContextManager[bool]:
        """Return a context manager in whose body degrees are learnt, see `operators.degrees`.

        They are those of all functions applied by the operator without a context.

        Args:
            key: identifies the work, which is rehearsed once.
            calls: expected number of functions of each kind.

        Yields: whether to do the work: True for an operator that expands its functions, and a new `key`.
        """
        return nullcontext(False)

    def kept_curves(self) -> AbstractContextManager[None]:
        """Return a context manager in whose body the curves are computed once for the same tensors t and mu."""
        return self.kept.keeping()

    # --- curves -------------------------------------------------------------------------------------------------------

    def signal(self, t: Scale) -> Decay | LogCurve:
        """Return lambda_t as a spectral function."""
        t = self._scale(t)
        if self.clock is not None or not (self.blur is None or self.blur.is_gaussian):
            return LogCurve(lambda mu: self._log_signal(t, mu))
        return Decay(self.noise(t)[0], None if self.blur is None else self.blur(t), self.min_decay)

    def white_signal(self, t: Scale) -> SpectralFunction:
        """Return w_t^-1 lambda_t, the signal scale after the noise, of colour w_t(mu), is whitened."""
        t, signal, color = self._scale(t), self.signal(t), self.color
        if color is None:
            return signal
        return LogCurve(lambda mu: signal.log(mu) - color.log(batch_view(t, mu), mu))

    def _log_signal(self, t: Tensor, mu: Tensor) -> Tensor:
        """Return log lambda_t(mu) where lambda_t is not a `Decay`."""
        time = self._time(t, mu)
        log_scale, _ = self.noise(time)
        if self.blur is None:
            return log_scale
        log_left = self.blur.log_factor(time, mu)
        if self.min_decay > 0:
            log_left = torch.log(self.min_decay + (1 - self.min_decay) * torch.exp(log_left))
        return log_scale + log_left

    def _time(self, t: Tensor, mu: Tensor) -> Tensor:
        """Return the time of each eigenvalue; without a clock it is t, with trailing dimensions of size one."""
        time = batch_view(t, mu)
        return time if self.clock is None else self.clock(time, mu, self._largest)

    @kept_curve
    def log_signal_scale(self, t: Tensor, mu: Tensor) -> Tensor:
        """Return log lambda_t(mu); trailing dimensions have size one if it does not depend on mu."""
        return self.signal(t).log(mu)

    @kept_curve
    def log_noise_scale(self, t: Tensor, mu: Tensor) -> Tensor:
        """Return log gamma_t(mu), -inf without noise; trailing dimensions have size one if it does not depend on mu."""
        _, log_noise = self.noise(self._time(t, mu))
        return log_noise if self.color is None else log_noise + self.color.log(batch_view(t, mu), mu)

    def rates(self, t: Scale, mu: Tensor) -> tuple[Tensor, Tensor]:
        """Return d lambda_t(mu) / dt and d gamma_t(mu) / dt for t > 0, float64, in the shapes of the curves.

        The derivatives are taken from the left, since curves have knots: lists at each scale, others at the first.
        """
        t = as_scale(t, mu) * (1 - 1e-9)

        def curves(t: Tensor) -> tuple[Tensor, Tensor]:
            return self.signal_scale(t, mu), self.noise_scale(t, mu)

        rates: tuple[Tensor, Tensor] = torch.func.jvp(curves, (t,), (torch.ones_like(t),))[1]
        return rates

    def flow_speed(self, t: Scale, mu: Tensor, rates: tuple[Tensor, Tensor]) -> Tensor:
        """Return D = lambda gamma' - lambda' gamma, the speed at which signal turns into noise, from the `rates`."""
        return self.signal_scale(t, mu) * rates[1] - rates[0] * self.noise_scale(t, mu)

    def signal_scale(self, t: Scale, mu: Tensor) -> Tensor:
        """Return lambda_t(mu), float64 (VDM: alpha_t, DDPM: sqrt of alpha-bar)."""
        return torch.exp(self.log_signal_scale(t, mu))

    def noise_scale(self, t: Scale, mu: Tensor) -> Tensor:
        """Return gamma_t(mu), float64, a standard deviation."""
        return torch.exp(self.log_noise_scale(t, mu))

    def log_snr(self, t: Scale, mu: Tensor) -> Tensor:
        """Return l_t(mu) = log(lambda_t^2 / gamma_t^2), +inf where there is no noise."""
        return 2 * (self.log_signal_scale(t, mu) - self.log_noise_scale(t, mu))

    def noise_level(self, t: Tensor) -> Tensor:
        """Return gamma_t / lambda_t at mu = 0, by which grids choose scales: float64 ``()`` or ``(B,)``, like t; with a
        colour or a clock, under which frequencies differ, that of the noise schedule."""
        if self.color is None and self.clock is None:
            mu = torch.zeros((), dtype=torch.float64, device=t.device)
            return torch.exp(-0.5 * self.log_snr(t, mu)).reshape(t.shape)
        log_signal, log_noise = self.noise(t)
        return torch.exp(log_noise - log_signal)

    def has_constant_noise(self) -> bool:
        """Return whether gamma is the same at all scales but 0 (or 0 at all), so that only blur distinguishes them."""
        return self._constant

    def has_noise(self) -> bool:
        """Return whether gamma is positive at scale 1."""
        return self._noisy

    @property
    def mean_left(self) -> float:
        """Return lambda_1 / gamma_1 at mu = 0: the mean intensity left at scale 1 over its noise, inf without noise."""
        return self._mean_left

    # --- models -------------------------------------------------------------------------------------------------------

    def default_prior(self) -> str:
        """Return the kind of prior that fits: "gaussian", "data", "guidance" or "context", see `priors`.

        It is "context" for a process with one, and "data" if the process blurs and leaves more than 2 % of the mean
        intensity at scale 1, relative to its noise.
        """
        if self.has_context:
            return "context"
        return "gaussian" if self.blur is None or self.mean_left <= MAX_MEAN_LEFT else "data"

    @property
    def condition(self) -> str | None:
        """Return the name of the condition of likelihoods: the context, if the model has no law for it, else None."""
        return "context" if self.has_context else None

    # --- laws ---------------------------------------------------------------------------------------------------------

    def step(self, s: Scale, t: Scale) -> Step:
        """Return the functions of mu that lead from scale s to t > s and back."""
        return Step(self, self._scale(s), self._scale(t))

    def marginal(self, x_0: Tensor, t: Scale, context: Context = None) -> Gaussian:
        """Return q(x_t | x_0), Eq. (13), (38)."""
        op, t = self.operator(context), as_scale(t, x_0)
        mean = op.to_pixels(op.apply(self.signal(t), op.to_white(x_0)))
        return Gaussian(mean, lambda mu: self.noise_scale(t, mu), op)

    def transition(self, x_s: Tensor, s: Scale, t: Scale, context: Context = None) -> Gaussian:
        """Return q(x_t | x_s) for s <= t, Eq. (3), (37)."""
        op, step = self.operator(context), self.step(as_scale(s, x_s), as_scale(t, x_s))
        return Gaussian(op.to_pixels(op.apply(step.rho, op.to_white(x_s))), step.transition_std, op)

    def posterior(self, x_t: Tensor, x_0: Tensor, s: Scale, t: Scale, context: Context = None) -> Gaussian:
        """Return q(x_s | x_t, x_0) for s < t."""
        op, step = self.operator(context), self.step(as_scale(s, x_0), as_scale(t, x_0))
        y_0, y_t = op.to_white(x_0), op.to_white(x_t)
        mean = op.combine((step.posterior_coef_x0, y_0), (step.posterior_coef_xt, y_t))
        return Gaussian(op.to_pixels(mean), step.posterior_std, op)

    def perturb(self, y_0: Tensor, t: Scale, white: Tensor, operator: Operator) -> Tensor:
        """Return y_t = lambda_t(L) y_0 + gamma_t(L) eps, ``(B, C, H, W)`` in whitened coordinates, Eq. (13), (38).

        Args:
            y_0: images ``(B, C, H, W)`` in whitened coordinates.
            white: eps, white noise ``(B, C, H, W)``.
            operator: L, as `operator` returns it for the images' context.
        """
        return operator.apply(self.signal(as_scale(t, y_0)), y_0) + self.noise_at(t, white, operator)

    def noise_at(self, t: Scale, white: Tensor, operator: Operator) -> Tensor:
        """Return gamma_t(L) eps, the noise of scale t ``(B, C, H, W)`` in whitened coordinates."""
        t = as_scale(t, white)
        return operator.apply(lambda mu: self.noise_scale(t, mu), white)

    def sample(self, x_0: Tensor, t: Scale, generator: Randomness = None, context: Context = None) -> Tensor:
        """Draw x_t from the marginal: ``(B, C, H, W)`` in pixels."""
        op, white = self.operator(context), white_noise(x_0, generator)
        return op.to_pixels(self.perturb(op.to_white(x_0), t, white, op))

    def trajectory(
        self, x_0: Tensor, ts: Sequence[float], generator: torch.Generator | None = None, context: Context = None
    ) -> Tensor:
        """Draw one Markov path at the scales `ts`, ascending in [0, 1], Eq. (2): ``(len(ts), B, C, H, W)``.

        Without noise the only path is that of the means, all of which come from one sweep.

        Raises: UserError if `ts` is empty, unsorted or leaves [0, 1].
        """
        scales = [float(t) for t in ts]
        if not scales or sorted(scales) != scales or not all(0 <= t <= 1 for t in scales):
            raise UserError(f"trajectory: scales must be ascending numbers in [0, 1], got {scales}")
        if not self.has_noise():
            op, later = self.operator(context), [t for t in scales if t > 0]
            means = op.apply_all([self.signal(as_scale(t, x_0)) for t in later], op.to_white(x_0))
            return torch.stack([x_0] * (len(scales) - len(later)) + [op.to_pixels(y) for y in means])
        path, x, s = [], x_0, 0.0
        for t in scales:
            if t > 0 and t > s:
                law = self.marginal(x_0, t, context) if s == 0 else self.transition(x, s, t, context)
                x, s = law.sample(generator), t
            path.append(x)
        return torch.stack(path)

    def conditional_entropy(self, t: Scale, size: tuple[int, int], context: Context = None) -> Tensor:
        """Return H(U_t | U_0) = sum_j 1/2 ln(2 pi e gamma_t(mu_j)^2) in nats per image channel, Eq. (42) corrected.

        Args:
            t: ``()`` or ``(B,)``.
            size: (H, W).

        Returns: float64 ``()`` or ``(B,)``, with a guidance image ``(B, C)``; -inf for a deterministic process.
        """
        t, op = self._scale(t), self.operator(context)
        mu = op.eigenvalues(*size, t.device).expand(size)
        per_mode = 0.5 * math.log(2 * math.pi * math.e) + self.log_noise_scale(t, mu)
        total = per_mode.expand(*per_mode.shape[: -mu.ndim], *size).sum((-2, -1))
        volume = op.log_volume()
        # a tensor is (B, C), and total () or (B, 1)
        return (total if isinstance(volume, Tensor) or not t.ndim else total.squeeze(-1)) + volume

    def _scale(self, t: Scale) -> Tensor:
        """Return t as a tensor; a Python number is placed on the device of the curves' tables."""
        return as_scale(t, next(self.buffers(), None))
