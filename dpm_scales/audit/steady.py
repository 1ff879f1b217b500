"""Check steady states and bounds on the noise: Propositions 5, 6 and 10, Eq. (31) and (49), Peter 2024."""

from __future__ import annotations

import functools
import math

from dpm_scales.audit.dense import eigen, root
from dpm_scales.audit.findings import Finding, Verdict
from dpm_scales.audit.lab import LIMIT, Lab
from dpm_scales.audit.statements import Measured, by_blur, statement

LEFT = 0.02
"""Largest fraction of the image left at scale 1, relative to the noise or the value range, for a steady state."""

ENDS = "the chain ends before it reaches the steady state"
_stated = functools.partial(statement, "steady state")
_mixture = _stated(
    "Prop. 10", "p(u_i) converges to a mixture of N(mu_k 1, Sigma) over the average grey values mu_k of the data"
)


def steady_state(lab: Lab) -> Finding:
    """Check Propositions 5 and 6 (noise), 10 (a mixture of normal distributions, one per grey value), Eq. (49)."""
    if not lab.blurs:
        return _noise(lab)
    if lab.scales_grey:
        return _scheduled_blur(lab)
    return _blur(lab) if lab.noisy else _filter(lab)


@_stated(
    "Prop. 5, 6",
    "p(u_i) converges to N(0, gamma^2 I); gamma = 1 for the variance-preserving chain",
    "signal to noise at scale 1",
)
def _noise(lab: Lab) -> Measured:
    """Check processes without blur, L = 0."""
    law = lab.marginals[-1]
    left, gamma = float(law.matrix.diagonal().mean()), root(float(law.covariance.diagonal().mean()))
    if left > 1 - 1e-9:
        note = f"alpha = 1: the mean is constant and the noise grows to {gamma:.4g}; the paper omits this case"
        return Measured(Verdict.NOT_APPLICABLE, True, left / gamma, scale=1.0, note=note)
    drawn, error, note = _drawn_spread(lab)
    wanted, arrived = float(lab.noise[-1, 0]), left <= LEFT * gamma
    fits = abs(gamma - wanted) <= lab.noise_tolerance * wanted and abs(drawn / wanted - 1) <= LIMIT * error
    note = f"gamma_1 = {gamma:.6g}, of {note}" + ("" if arrived else f"; {ENDS}")
    return Measured(Verdict.IN_LAW, arrived and fits, left / gamma, LEFT, scale=1.0, note=note)


@_mixture
def _scheduled_blur(lab: Lab) -> Measured:
    """Check that blur combined with a variance-preserving schedule ends like a process without blur."""
    law = lab.marginals[-1]
    moved = law.matrix * lab.white / lab.white[:, None]
    left = root(float(eigen(moved @ moved.T)[0].max()))
    gamma = root(float(law.covariance.diagonal().mean()))
    drawn, error, note = _drawn_spread(lab)
    wanted = root(float((lab.noise[-1] ** 2).mean()))  # of all frequencies: noise may have a colour
    fits = abs(gamma / wanted - 1) <= lab.noise_tolerance and left <= LEFT * gamma
    return Measured(
        Verdict.CORRECTED,
        fits and abs(drawn / wanted - 1) <= LIMIT * error + lab.noise_tolerance,
        left / gamma,
        LEFT,
        figure="signal to noise at scale 1",
        corrected="a variance-preserving schedule times blur converges to N(0, gamma_1^2), the grey value too",
        scale=1.0,
        eigenvalue=0.0,
        note=f"gamma_1 = {gamma:.6g}, of {note}",
    )


@_stated(
    lambda lab: "Eq. (49)" if lab.guided else "Prop. 10, without noise",
    lambda lab: f"u converges to {'the guidance image v' if lab.guided else 'its average grey value'}",
    "distance at scale 1, of the value range",
)
def _filter(lab: Lab) -> Measured:
    """Check blur that preserves the average grey value, without noise."""
    off = max(_distance(lab), float((lab.paths[-1] - lab.steady_pixels).abs().max()) / lab.span)
    notes = [] if off <= LEFT else [ENDS]
    if lab.guided and lab.context is not None:
        means = f"mean(u) = {float(lab.start.mean()):.4f}, mean(v) = {float(lab.context.double().mean()):.4f}"
        notes.insert(0, f"{means}: the clipped noise image does not have the image's mean")
    return Measured(
        Verdict.CORRECTED if lab.guided else Verdict.EXACTLY,
        off <= LEFT,
        off,
        LEFT,
        corrected=f"it converges to {_limit(lab)}" if lab.guided else "",
        scale=1.0,
        note="; ".join(notes),
    )


@_mixture
def _blur(lab: Lab) -> Measured:
    """Check blur that preserves the average grey value, with noise."""
    gap, limit, shape = _distance(lab), _limit(lab), "diag(v)" if lab.guided else "I"
    gammas, middle = lab.noise[-1], lab.noise[len(lab.noise) // 2]
    drawn, error, note = _drawn_spread(lab)
    wanted = root(float((gammas**2).mean()))
    if lab.process.has_constant_noise():
        bound = f"the noise is {float(gammas[0]):.4g} at every scale and frequency"
        corrected = f"N({limit}, gamma^2 {shape}), gamma the same at every scale"
    elif float((gammas.max() - gammas.min()) / gammas.max()) < 1e-9:
        bound = f"gamma goes from {float(middle[0]):.4g} half way to {float(gammas[0]):.4g}, at every frequency"
        corrected = f"N({limit}, gamma_1^2 {shape}): the schedule alone sets the noise, and blur does not bound it"
    else:
        bound = f"gamma at mu = 0 goes from {float(middle[0]):.4g} half way to {float(gammas[0]):.4g}; "
        bound += f"at mu = {float(lab.mu[-1]):.3g} it is {float(gammas[-1]):.4g}"
        corrected = "for mu > 0 alone, with beta / sqrt(1 - alpha_j^2); at mu = 0 alpha is 1 and gamma^2 = sum beta_k^2"
    return Measured(
        Verdict.CORRECTED,
        abs(drawn / wanted - 1) <= LIMIT * error + lab.noise_tolerance and gap <= LEFT,
        gap,
        LEFT,
        figure="distance of the mean at scale 1, of the value range",
        corrected=corrected,
        scale=1.0,
        eigenvalue=float(lab.mu[lab.mu > 0].min()) if bool((lab.mu > 0).any()) else 0.0,
        note=f"{bound}{'' if gap <= LEFT else '; ' + ENDS}; standard deviation of {note}, closed form {wanted:.4g}",
    )


def _distance(lab: Lab) -> float:
    """Return the distance of the mean at scale 1 from the steady state, relative to the value range."""
    return float((lab.chain[-1].mean(lab.start) - lab.steady_pixels).abs().max()) / lab.span


def _limit(lab: Lab) -> str:
    return "v mean(u) / mean(v)" if lab.guided else "mean(u)"


def _drawn_spread(lab: Lab) -> tuple[float, float, str]:
    """Return the root mean square deviation of the paths at scale 1, in whitened coordinates with equal weights, its
    relative standard error, and a note on both."""
    level = lab.deviations[-1].square().mean(0)
    weight = lab.marginals[-1].covariance.diagonal()
    wanted = float(lab.noise[-1].square().mean())
    per_path = lab.deviations[-1].square().sum(1)
    error = float(per_path.std() / per_path.mean()) / math.sqrt(lab.samples) / 2
    drawn = root(float(level.sum() / weight.sum()) * wanted)
    return drawn, error, f"{lab.samples} paths {drawn:.4g} ± {drawn * error:.2g}"


@statement(
    "bound of the noise",
    by_blur("Prop. 6", "Prop. 10"),
    "gamma <= b / (1 - a) for alpha_i <= a < 1, beta_i <= b",
    "gamma over the corrected bound",
    without_noise="there is no noise",
)
def variance_bound(lab: Lab) -> Measured | str:
    """Check Propositions 6 and 10: b / sqrt(1 - a^2) bounds the noise, b / (1 - a) is too large."""
    a, b = lab.alpha.max(0).values, lab.beta.max(0).values
    inside = a < 1 - 1e-9
    if not bool(inside.any()):
        return "alpha = 1, so no bound exists"
    a, b, mu = a[inside], b[inside], lab.mu[inside]
    gamma = lab.noise[:, inside].max(0).values
    true, loose = b / (1 - a**2).sqrt(), b / (1 - a)
    ratio = gamma / true
    worst = int(ratio.argmax())
    dense = max(root(float(eigen(law.covariance)[0].max())) for law in lab.chain)
    own = float(lab.noise.max()) * float(lab.white.max())
    return Measured(
        Verdict.CORRECTED,
        float(ratio[worst]) <= 1 + 1e-6 and dense <= own * (1 + lab.noise_tolerance),
        float(ratio[worst]),
        1e-6,
        expected=1.0,
        corrected="gamma <= b / sqrt(1 - a^2)"
        + (", for mu > 0; at mu = 0 there is none" if not bool(inside[0]) else ""),
        eigenvalue=float(mu[worst]),
        note=f"a = {float(a[worst]):.6g}, b = {float(b[worst]):.4g}: gamma = {float(gamma[worst]):.4g}, "
        f"b / sqrt(1 - a^2) = {float(true[worst]):.4g}, printed {float(loose[worst]):.4g}",
    )
