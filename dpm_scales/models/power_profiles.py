"""Power-function averages of weights: exact decays, and the fit of one average by others (EDM2).

After T steps the average with exponent γ weighs the weights of time τ in (0, T] by the profile

    p(τ) = (γ + 1) τ^γ / T^(γ + 1)        standard deviation: length · T,  length = √((γ + 1) / (γ + 3)) / (γ + 2)

so a *length*, σ_rel in the paper, is a share of the run. The weights θ_i after step i count for the time (i - 1, i]:
the average Σ_i (i^(γ+1) - (i-1)^(γ+1)) / T^(γ+1) θ_i is updated by β(t) = (1 - 1/t)^(γ + 1), and inner products of
profiles, which are integrals, are exact for it too. The average of any length is then fitted by stored ones.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", Sect. 3.1 and Appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpm_scales.errors import require_number

SHORTEST, LONGEST = 0.001, 12**-0.5
"""Bounds of a length; that of the plain mean of all steps is the longest."""


def check_length(name: str, value: object) -> float:
    """Return the value of the option `name` as a length. Raises UserError unless it is one."""
    require_number(name, value, SHORTEST, LONGEST)
    return float(value)  # type: ignore[arg-type]


def exponent_of(length: float) -> float:
    """Return the exponent γ >= 0 of the profile with this length, in [SHORTEST, LONGEST].

    The largest root of γ³ + 7 γ² + (16 - length⁻²) γ + 12 - length⁻², all of whose roots are real: by cosines.
    """
    square = length**-2
    # x³ - 3 a² x + q with x = γ + 7/3
    a = math.sqrt(1 + 3 * square) / 3
    q = 2 / 27 + 4 * square / 3
    cosine = min(max(-q / (2 * a**3), -1.0), 1.0)
    return max(2 * a * math.cos(math.acos(cosine) / 3) - 7 / 3, 0.0)


def length_of(exponent: float) -> float:
    """Return the length of the profile with exponent γ >= 0, the inverse of `exponent_of`."""
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def newest_weight(step: int, exponent: float) -> float:
    """Return 1 - β(step), the weight of the newest weights in the average after `step` >= 1 steps; 1 at the first."""
    return 1.0 if step == 1 else -math.expm1((exponent + 1) * math.log1p(-1 / step))


def inner_products(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Return the integrals over time of products of two profiles (EDM2, Appendix C).

    Args:
        first, second: steps and exponents, broadcast, in float64.
    """
    (steps, exponents), (other_steps, other_exponents) = first, second
    # of the later profile only the part up to the earlier one's end counts
    power = torch.where(steps < other_steps, other_exponents, -exponents)
    scale = (exponents + 1) * (other_exponents + 1) / (exponents + other_exponents + 1)
    return scale * (steps / other_steps) ** power / torch.maximum(steps, other_steps)


def fit(steps: Sequence[int], lengths: Sequence[float], step: int, length: float) -> tuple[list[float], float]:
    """Return the combination of stored averages that is nearest to the average of a length, and its distance.

    The coefficients minimise the distance of the profiles in L2 under the condition that they add up to 1. The paper
    has no such condition, since its networks normalise their weights: here the part of a weight that never changes is
    to be reconstructed exactly.

    Args:
        steps, lengths: of the stored averages, all distinct.
        step, length: of the average to reconstruct.

    Returns: the coefficients, and the distance of the profiles divided by the norm of the wanted one.
    """
    own = torch.tensor(steps, dtype=torch.float64), torch.tensor([*map(exponent_of, lengths)], dtype=torch.float64)
    wanted = torch.tensor([step], dtype=torch.float64), torch.tensor([exponent_of(length)], dtype=torch.float64)
    gram = inner_products((own[0][:, None], own[1][:, None]), own)
    right, norm = inner_products(own, wanted), float(inner_products(wanted, wanted))
    scale = gram.diagonal().rsqrt()  # to unit profiles: the norms of early ones are far larger
    count, total = len(steps), float(scale.norm())
    system = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    system[:count, :count] = gram * scale[:, None] * scale
    system[count, :count] = system[:count, count] = scale / total
    values = torch.cat([right * scale, torch.tensor([1 / total], dtype=torch.float64)])
    found = torch.linalg.lstsq(system, values[:, None], driver="gelsd").solution[:count, 0] * scale
    squared = float(found @ gram @ found - 2 * found @ right) / norm + 1
    return found.tolist(), math.sqrt(max(squared, 0.0))
