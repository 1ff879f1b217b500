r"""Scalar curves of the scale t in [0, 1]: how much noise, how much blur.

t = k / num_scales; t = 0 is the image itself. All values are float64. Curves given by a formula are evaluated exactly;
curves given by a list (beta_k, blur sigmas, ...) have knots at k / num_scales and are linear in between in the quantity
that adds up along the chain (log signal scale, noise variance, dissipation time), so that every t in between is also a
scale of a consistent Markov chain.

| class | gives | source |
|---|---|---|
| ConstantBeta, LinearBeta, ListedBeta | a_t = prod sqrt(1 - beta_k^2), gamma^2 = 1 - a^2 | Eq. (16); Ho 2020 |
| CosineLogSNR | logSNR = -2 log tan(pi/2 t) truncated to [min, max], shifted by 2 log(shift) | Hoogeboom et al. 2023 |
| SigmoidSignal | a_t^2 a normalised sigmoid | Jabri et al. 2022; Chen 2023 |
| GeometricNoise, EDMNoise, ListedNoise | a = 1, increasing gamma_t | Song et al. 2021; Karras et al. 2022 |
| ConstantNoise, NoNoise | a = 1, gamma the same at every scale but 0 | Rissanen et al. 2023 |
| LogBlur, LinearTimeBlur, ListedBlurSigmas, ListedDissipationTimes | T(t) in px^2 | Rissanen et al. 2023 |
| SinSquaredBlur | blur_sigma = max sin^2(pi t / 2) | Hoogeboom & Salimans 2023 |
| Rectified | a_t = 1 - t, gamma_t = t | Lipman et al. 2023; Liu et al. 2023 |
| FlowBlur, NoiseBlur, CutOff | T = ln(1 / (1 - t)) / 2; blur_sigma = b gamma_t; an ideal low-pass | `blur` |
| WhiteColor, PowerLaw, DataPower, KernelColor, LowPass, ListedColor | the noise's spectrum w_t(mu) | `color` |
| SpectralClock | t_mu, a separate time for each frequency | GUD |

beta_k here is the paper's: a standard deviation (its square is DDPM's beta).
"""

from __future__ import annotations

from dpm_scales.errors import is_number, require_finite, require_positive
from dpm_scales.schedules.base import Schedule
from dpm_scales.schedules.blur import (
    BlurSchedule,
    CutOff,
    FlowBlur,
    LinearTimeBlur,
    ListedBlurSigmas,
    ListedDissipationTimes,
    LogBlur,
    NoiseBlur,
    SinSquaredBlur,
)
from dpm_scales.schedules.clock import Clock, SpectralClock
from dpm_scales.schedules.color import Color, DataPower, KernelColor, ListedColor, LowPass, PowerLaw, WhiteColor
from dpm_scales.schedules.noise import (
    ConstantBeta,
    ConstantNoise,
    CosineLogSNR,
    EDMNoise,
    GeometricNoise,
    LinearBeta,
    ListedBeta,
    ListedNoise,
    NoiseSchedule,
    NoNoise,
    Rectified,
    SigmoidSignal,
)

__all__ = [
    "BlurSchedule",
    "Clock",
    "Color",
    "ConstantBeta",
    "ConstantNoise",
    "CosineLogSNR",
    "CutOff",
    "DataPower",
    "EDMNoise",
    "FlowBlur",
    "GeometricNoise",
    "KernelColor",
    "LinearBeta",
    "LinearTimeBlur",
    "ListedBeta",
    "ListedBlurSigmas",
    "ListedColor",
    "ListedDissipationTimes",
    "ListedNoise",
    "LogBlur",
    "LowPass",
    "NoNoise",
    "NoiseBlur",
    "NoiseSchedule",
    "PowerLaw",
    "Rectified",
    "Schedule",
    "SigmoidSignal",
    "SinSquaredBlur",
    "SpectralClock",
    "WhiteColor",
    "is_number",
    "require_finite",
    "require_positive",
]
