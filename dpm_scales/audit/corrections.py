"""Corrections to printed formulas of Peter 2024, each with a numerical example that is independent of the process.

The chain U_k = alpha U_{k-1} + beta G is drawn directly, so that most of the values `measured` use no process code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpm_scales.processes import VE, VP, BlurringChain, InverseHeat
from dpm_scales.schedules import ConstantBeta, ConstantNoise, LinearTimeBlur, ListedNoise

SIZE = (6, 9)


@dataclass(frozen=True)
class Correction:
    """Printed and corrected formula at an example.

    Attributes:
        source: place in the paper.
        statement: the printed statement.
        corrected: the correct statement.
        example: parameters and quantity.
        printed: value of the printed formula; None if it gives none.
        true: value of the corrected formula, from a process of this package.
        measured, std_error: value and standard error from random draws of the chain.
    """

    source: str
    statement: str
    corrected: str
    example: str
    printed: float | None
    true: float
    measured: float
    std_error: float


@torch.no_grad()
def corrections(seed: int = 0) -> list[Correction]:
    """Return all corrections, which takes a second or two."""
    generator = torch.Generator().manual_seed(seed)

    def spread(alphas: Sequence[float], betas: Sequence[float], start: float = 0.0) -> tuple[float, float]:
        """Return the standard deviation at the end of the chain, and its standard error."""
        number = 20_000
        u = start * torch.randn(number, generator=generator, dtype=torch.float64)
        for alpha, beta in zip(alphas, betas, strict=True):
            u = alpha * u + beta * torch.randn(number, generator=generator, dtype=torch.float64)
        std = float(u.std())
        return std, std / math.sqrt(2 * number)

    keep, grey, pixels = math.sqrt(0.99), torch.zeros(1, dtype=torch.float64), SIZE[0] * SIZE[1]
    chain = BlurringChain(200, 0.1, LinearTimeBlur(200.0))  # 1 px^2 per step
    mu = chain.operator().eigenvalues(*SIZE)
    low = float(mu.flatten().sort().values[1])
    heat = InverseHeat(10, ConstantNoise(0.1))
    halves = [0.5**k for k in range(40)]

    vp, long = VP(100, ConstantBeta(0.1)), VP(1000, ConstantBeta(0.1))
    ve = VE(40, ListedNoise([math.sqrt((1 - 0.25**k) / (1 - 0.25)) for k in range(1, 41)]))
    found = [
        Correction(
            "Eq. (8), (12), (14), (23), (40), (43)",
            "gamma_i = sum_k beta_k prod_{l>k} alpha_l + beta_i: standard deviations add",
            "gamma_i^2 = alpha_i^2 gamma_{i-1}^2 + beta_i^2: variances add; Eq. (15) agrees",
            "gamma_100, beta = 0.1, alpha = sqrt(0.99)",
            sum(0.1 * keep**k for k in range(100)),
            float(vp.noise_scale(1.0, grey)),
            *spread([keep] * 100, [0.1] * 100),
        ),
        Correction(
            "Prop. 3, 7, Eq. (24), (44)",
            "entropy rises if beta_{i+1} >= (1 - alpha_{i+1}) gamma_i",
            "if and only if beta_{i+1}^2 >= (1 - alpha_{i+1}^2) gamma_i^2",
            "gamma_{i+1} from gamma_i = 1, alpha = 0.9, beta = 0.1, which the printed condition allows",
            0.9 + 0.1,
            math.sqrt(0.9**2 + 0.1**2),
            *spread([0.9], [0.1], start=1.0),
        ),
        Correction(
            "Prop. 6, Eq. (29)",
            "gamma <= b / (1 - a)",
            "gamma <= b / sqrt(1 - a^2), which the chain reaches",
            "bound and gamma_1000, b = 0.1, a = sqrt(0.99)",
            0.1 / (1 - keep),
            float(long.noise_scale(1.0, grey)),
            *spread([keep] * 1000, [0.1] * 1000),
        ),
        Correction(
            "Sect. 5.1, after Eq. (31)",
            "alpha = 1, beta_k = beta_0^(k-1): the variance converges to 1 / (1 - beta_0)",
            "gamma^2 converges to 1 / (1 - beta_0^2)",
            "gamma, beta_0 = 0.5",
            math.sqrt(1 / (1 - 0.5)),
            float(ve.noise_scale(1.0, grey)),
            *spread([1.0] * 40, halves),
        ),
    ]
    gammas = chain.noise_scale(1.0, mu).flatten()
    x = torch.full((2000, 1, *SIZE), 0.5, dtype=torch.float64)
    end = chain.sample(x, 1.0, generator)
    coefficients = chain.operator().analysis(end - x).flatten(1)  # type: ignore[attr-defined]
    surprise = (0.5 * (2 * math.pi * gammas**2).log().sum() + 0.5 * (coefficients / gammas).square().sum(1)) / pixels
    true_entropy = float(chain.conditional_entropy(1.0, SIZE)) / pixels
    found.append(
        Correction(
            "Eq. (42)",
            "det Sigma = prod_j gamma_j",
            "det Sigma = prod_j gamma_j^2",
            "entropy in nats per pixel, blurring chain, beta = 0.1, 1 px^2 a step, 200 steps, 6 x 9 px",
            true_entropy - 0.5 * float(gammas.log().mean()),
            true_entropy,
            float(surprise.mean()),
            float(surprise.std()) / math.sqrt(len(surprise)),
        )
    )
    for name, process, gamma in (
        ("heat, sigma = 0.1", heat, 0.1),
        ("blurring chain, beta = 0.1, 200 steps: a random walk", chain, 0.1 * math.sqrt(200)),
    ):
        moved = float((process.sample(x, 1.0, generator) - x).mean((-3, -2, -1)).std())
        found.append(
            Correction(
                "Prop. 8",
                "all images of a path have the same average grey value",
                "in expectation; it moves by N(0, gamma_t(0)^2 / N), exactly kept only without noise",
                f"standard deviation of the average grey value, {name}, 6 x 9 px",
                0.0,
                gamma / math.sqrt(pixels),
                moved,
                moved / math.sqrt(2 * len(x)),
            )
        )
    decay = math.exp(-low)
    found += [
        Correction(
            "Prop. 10",
            "sigma_j <= b / (1 - a_j), the lowest frequency included",
            "at mu = 0 alpha is 1, and gamma grows like beta sqrt(k) without bound",
            "gamma at mu = 0, blurring chain, beta = 0.1, 200 steps",
            None,
            float(chain.noise_scale(1.0, grey)),
            *spread([1.0] * 200, [0.1] * 200),
        ),
        Correction(
            "Prop. 10",
            "sigma_j <= b / (1 - a_j)",
            "gamma_j converges to beta / sqrt(1 - alpha_j^2), far above beta for low frequencies",
            f"gamma at mu = {low:.4f}, the same chain",
            0.1 / (1 - decay),
            float(chain.noise_scale(1.0, torch.tensor([low], dtype=torch.float64)).flatten()[0]),
            *spread([decay] * 200, [0.1] * 200),
        ),
    ]
    return found
