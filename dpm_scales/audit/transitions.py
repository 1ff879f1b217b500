"""Check two explicit transitions of Peter 2024: the variance-preserving one, Eq. (15), and the reverse, Eq. (32)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpm_scales.audit.dense import eigen, largest, solve
from dpm_scales.audit.findings import Verdict
from dpm_scales.audit.lab import LIMIT, Gap, Lab
from dpm_scales.audit.statements import Measured, statement


@statement(
    "variance-preserving transition",
    "Eq. (15)",
    "for alpha_i = sqrt(1 - beta_i^2): N(prod_j sqrt(1 - beta_j^2) u_0, (1 - prod_j (1 - beta_j^2)) I)",
    "composed transitions and marginals against the products",
    without_noise="there is no noise",
)
def preserving(lab: Lab) -> Measured | str:
    """Check Eq. (15): for alpha = sqrt(1 - beta^2), mean and variance are products of the betas alone."""
    off = (lab.alpha**2 + lab.beta**2 - 1).abs()
    if float(off.max()) > 1e-9:
        step, mode = divmod(int(off.argmax()), lab.pixels)
        values = f"{float(lab.alpha[step, mode]):.6g} and beta = {float(lab.beta[step, mode]):.4g}"
        return f"at mu = {float(lab.mu[mode]):.3g}, t = {float(lab.ts[step + 1]):.3g} alpha = {values}"
    kept = torch.cat([lab.beta.new_ones(1), 1 - lab.beta[:, 0] ** 2]).cumprod(0)
    gaps, units = [], lab.dense.units
    for t, chain, marginal in zip(lab.ladder, lab.chain, lab.marginals, strict=True):
        left = kept[round(t * lab.process.num_scales)]
        for law in (chain, marginal):
            mean = Gap(largest(law.matrix - left.sqrt() * units), lab.mean_tolerance)
            noise = Gap(largest(law.covariance - (1 - left) * units), lab.noise_tolerance)
            gaps.append(max(mean, noise, key=lambda gap: gap.size))
    worst, gap = lab.widest(gaps)
    # in the middle of the ladder, so that both products matter
    rung = len(lab.ladder) // 2
    wanted = 1 - kept[round(lab.ladder[rung] * lab.process.num_scales)]
    squares = lab.deviations[rung].square()
    drawn, error = float(squares.mean() / wanted) - 1, math.sqrt(2 / squares.numel())
    return Measured(
        Verdict.IN_LAW,
        gap.closed and abs(drawn) <= LIMIT * error + lab.noise_tolerance,
        gap.value,
        gap.tolerance,
        drawn=(drawn, error),
        scale=lab.ladder[worst // 2],
        note=f"drawn: variance of {lab.samples} paths at t = {lab.ladder[rung]:.3g}, relative; the printed variance is "
        f"{float(wanted):.4g} there",
    )


@statement(
    "transition",
    "Eq. (32), Sect. 5.2",
    "q(u_{i-1} | u_i) = N(mu(u_i, i), Sigma(u_i, i)), neither the same for all pixels",
    "posterior and ideal denoiser against Bayes' rule, mean and covariance, relative",
    direction="reverse",
    without_noise="without noise there is at most one reverse path",
)
def reverse_step(lab: Lab) -> Measured:
    """Check Eq. (32): a reverse step is normal. Bayes' rule for Gaussian data uses neither posterior nor denoiser."""
    tolerance = max(lab.noise_tolerance, 1e-6)
    gaps, uneven = [], []
    for k, posterior in enumerate(lab.back.posteriors[::-1]):
        early, late = lab.back.data[k], lab.back.data[k + 1]
        cross = lab.transitions[k].matrix @ early
        gain = solve(late, cross).T
        spread = early - gain @ cross
        w = lab.denoiser(late, k + 1)
        unknown = lab.data_covariance - w @ lab.chain[k + 1].matrix @ lab.data_covariance
        apart = posterior.keep + posterior.pull @ w - gain
        ideal = posterior.covariance + posterior.pull @ unknown @ posterior.pull.T
        scale = float(early.diagonal().max())
        means = largest(apart @ late @ apart.T) / scale  # their distance on images of that scale
        gaps.append(Gap(max(math.sqrt(means), largest(ideal - spread) / scale), tolerance))
        uneven.append(_unevenness(spread))
    worst, gap = lab.widest(gaps)
    note = f"Gaussian data, so that Sigma depends on the scale alone; its eigenvalues differ by up to {max(uneven):.3g}"
    note += f" of their mean, at t = {lab.ladder[uneven.index(max(uneven))]:.3g}"
    return Measured(Verdict.IN_LAW, gap.closed, gap.value, tolerance, scale=lab.ladder[worst], note=note)


def _unevenness(covariance: Tensor) -> float:
    values, _ = eigen(covariance)
    return float((values[-1] - values[0]) / values.mean())
