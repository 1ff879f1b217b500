"""Check steady states and bounds of the noise: Propositions 5, 6 and 10, Eq. (31) and (49), Peter 2024."""

from __future__ import annotations

import math

import torch

from dpm_scales.audit.dense import eigen, root
from dpm_scales.audit.lab import LIMIT, Finding, Lab, Verdict, not_applicable
from dpm_scales.processes import Osmosis

LEFT = 0.02
"""Fraction of the image that may remain at scale 1, relative to the noise or the value range, in a steady state."""

ENDS = "the chain ends before it gets there"


def steady_state(lab: Lab) -> Finding:
    """Check Propositions 5 and 6 (noise), 10 (a mixture of normal distributions, one per grey value), Eq. (49)."""
    if not lab.blurs:
        return _noise(lab)
    if lab.scales_grey:
        return _scheduled_blur(lab)
    return _blur(lab)


def _noise(lab: Lab) -> Finding:
    """Check processes without blur, L = 0."""
    source, printed = "Prop. 5, 6", "p(u_i) converges to N(0, gamma^2 I); gamma = 1 for the variance-preserving chain"
    law = lab.marginals[-1]
    left, gamma = float(law.matrix.diagonal().mean()), root(float(law.covariance.diagonal().mean()))
    if left > 1 - 1e-9:
        return Finding(
            name="steady state",
            source=source,
            direction="forward",
            printed=printed,
            verdict=Verdict.NOT_APPLICABLE,
            figure="signal to noise at scale 1",
            measured=left / gamma,
            expected=0.0,
            scale=1.0,
            note=f"alpha = 1: the mean stays and the noise grows to {gamma:.4g}; the paper leaves this case out",
        )
    drawn, error = _drawn_spread(lab)
    wanted = float(lab.noise[-1, 0])
    arrived = left <= LEFT * gamma
    fits = abs(gamma - wanted) <= lab.noise_tolerance * wanted and abs(drawn / wanted - 1) <= LIMIT * error
    return Finding(
        name="steady state",
        source=source,
        direction="forward",
        printed=printed,
        verdict=Verdict.IN_LAW if arrived and fits else Verdict.VIOLATED,
        figure="signal to noise at scale 1",
        measured=left / gamma,
        expected=0.0,
        tolerance=LEFT,
        scale=1.0,
        note=f"gamma_1 = {gamma:.6g}, of {lab.samples} paths {drawn:.4g} ± {drawn * error:.2g}"
        + ("" if arrived else f"; {ENDS}"),
    )


def _scheduled_blur(lab: Lab) -> Finding:
    """Check that blur combined with a variance-preserving schedule ends like a process without blur."""
    law, white = lab.marginals[-1], _white(lab)
    moved = law.matrix * white / white[:, None]
    left = root(float(eigen(moved @ moved.T)[0].max()))
    gamma = root(float(law.covariance.diagonal().mean()))
    drawn, error = _drawn_spread(lab)
    wanted = float(lab.noise[-1, 0])
    fits = abs(gamma / wanted - 1) <= lab.noise_tolerance
    fits = fits and abs(drawn / wanted - 1) <= LIMIT * error + lab.noise_tolerance
    return Finding(
        name="steady state",
        source="Prop. 10",
        direction="forward",
        printed="p(u_i) converges to a mixture of N(mu_k 1, Sigma) over the average grey values mu_k of the data",
        verdict=Verdict.CORRECTED if fits and left <= LEFT * gamma else Verdict.VIOLATED,
        figure="signal to noise at scale 1",
        measured=left / gamma,
        expected=0.0,
        tolerance=LEFT,
        corrected="a variance-preserving schedule times blur converges to N(0, gamma_1^2), the grey value too",
        scale=1.0,
        eigenvalue=0.0,
        note=f"gamma_1 = {gamma:.6g}, of {lab.samples} paths {drawn:.4g} ± {drawn * error:.2g}",
    )


def _blur(lab: Lab) -> Finding:
    """Check blur that preserves the average grey value."""
    osmosis = isinstance(lab.process, Osmosis)
    steady = lab.process.steady_state(lab.images[:1].mean((-2, -1)), lab.context).expand(1, 1, *lab.size).flatten()
    gap = float((lab.chain[-1].mean(lab.start) - steady).abs().max()) / lab.span
    guidance = "v mean(u) / mean(v)" if osmosis else "mean(u)"
    if not lab.noisy:
        path = float((lab.paths[-1] - steady).abs().max()) / lab.span
        fits = max(gap, path) <= LEFT
        return Finding(
            name="steady state",
            source="Eq. (49)" if osmosis else "Prop. 10, without noise",
            direction="forward",
            printed="u converges to the guidance image v" if osmosis else "u converges to its average grey value",
            verdict=(Verdict.CORRECTED if osmosis else Verdict.EXACTLY) if fits else Verdict.VIOLATED,
            figure="distance at scale 1, of the value range",
            measured=max(gap, path),
            expected=0.0,
            tolerance=LEFT,
            corrected=f"it converges to {guidance}" if osmosis else "",
            scale=1.0,
            note="; ".join(part for part in (_guidance_gap(lab) if osmosis else "", "" if fits else ENDS) if part),
        )
    settled, shape = lab.process.has_constant_noise(), "diag(v)" if osmosis else "I"
    gammas = lab.noise[-1]
    drawn, error = _drawn_spread(lab)
    wanted = root(float((gammas**2).mean()))
    fits = abs(drawn / wanted - 1) <= LIMIT * error + lab.noise_tolerance and gap <= LEFT
    if settled:
        printed_bound = f"the noise is {float(gammas[0]):.4g} at every scale and frequency"
        corrected = f"N({guidance}, gamma^2 {shape}), gamma the same at every scale"
    elif float((gammas.max() - gammas.min()) / gammas.max()) < 1e-9:
        halfway = float(lab.noise[len(lab.noise) // 2, 0])
        printed_bound = f"gamma goes from {halfway:.4g} half way to {float(gammas[0]):.4g}, at every frequency"
        corrected = f"N({guidance}, gamma_1^2 {shape}): the noise is what its schedule says, and blur does not bound it"
    else:
        middle = lab.noise[len(lab.noise) // 2]
        printed_bound = (
            f"gamma at mu = 0 goes from {float(middle[0]):.4g} half way to {float(gammas[0]):.4g}; "
            f"at mu = {float(lab.mu[-1]):.3g} it is {float(gammas[-1]):.4g}"
        )
        corrected = "for mu > 0 alone, with beta / sqrt(1 - alpha_j^2); at mu = 0 alpha is 1 and gamma^2 = sum beta_k^2"
    return Finding(
        name="steady state",
        source="Prop. 10",
        direction="forward",
        printed="p(u_i) converges to a mixture of N(mu_k 1, Sigma) over the average grey values mu_k of the data",
        verdict=Verdict.CORRECTED if fits else Verdict.VIOLATED,
        figure="distance of the mean at scale 1, of the value range",
        measured=gap,
        expected=0.0,
        tolerance=LEFT,
        corrected=corrected,
        scale=1.0,
        eigenvalue=float(lab.mu[lab.mu > 0].min()) if bool((lab.mu > 0).any()) else 0.0,
        note=f"{printed_bound}{'' if gap <= LEFT else '; ' + ENDS}; standard deviation of {lab.samples} paths "
        f"{drawn:.4g} ± {drawn * error:.2g}, closed form {wanted:.4g}",
    )


def _guidance_gap(lab: Lab) -> str:
    if lab.context is None:
        return ""
    grey, own = float(lab.start.mean()), float(lab.context.double().mean())
    return f"mean(u) = {grey:.4f}, mean(v) = {own:.4f}: the clipped noise image has not the image's mean"


def _drawn_spread(lab: Lab) -> tuple[float, float]:
    """Return the root mean square deviation of the paths at scale 1, in white coordinates with equal weights, and its
    relative standard error."""
    level = lab.deviations[-1].square().mean(0)
    weight = lab.marginals[-1].covariance.diagonal()
    wanted = float(lab.noise[-1].square().mean())
    per_path = lab.deviations[-1].square().sum(1)
    error = float(per_path.std() / per_path.mean()) / math.sqrt(lab.samples) / 2
    return root(float(level.sum() / weight.sum()) * wanted), error


def variance_bound(lab: Lab) -> Finding:
    """Check Propositions 6 and 10: b / sqrt(1 - a^2) bounds the noise, b / (1 - a) is too large."""
    source = "Prop. 10" if lab.blurs else "Prop. 6"
    printed = "gamma <= b / (1 - a) for alpha_i <= a < 1, beta_i <= b"
    a, b = lab.alpha.max(0).values, lab.beta.max(0).values
    inside = a < 1 - 1e-9
    if not lab.noisy or not bool(inside.any()):
        why = "there is no noise" if not lab.noisy else "alpha = 1, so no bound exists"
        return not_applicable("bound of the noise", source, printed, why)
    a, b, mu = a[inside], b[inside], lab.mu[inside]
    gamma = lab.noise[:, inside].max(0).values
    true, loose = b / (1 - a**2).sqrt(), b / (1 - a)
    ratio = gamma / true
    worst = int(ratio.argmax())
    dense = max(root(float(eigen(law.covariance)[0].max())) for law in lab.chain)
    own = float(lab.noise.max()) * float(_white(lab).max())
    fits = float(ratio[worst]) <= 1 + 1e-6 and dense <= own * (1 + lab.noise_tolerance)
    return Finding(
        name="bound of the noise",
        source=source,
        direction="forward",
        printed=printed,
        verdict=Verdict.CORRECTED if fits else Verdict.VIOLATED,
        figure="gamma over the corrected bound",
        measured=float(ratio[worst]),
        expected=1.0,
        tolerance=1e-6,
        corrected="gamma <= b / sqrt(1 - a^2)"
        + (", for mu > 0; at mu = 0 there is none" if not bool(inside[0]) else ""),
        eigenvalue=float(mu[worst]),
        note=f"a = {float(a[worst]):.6g}, b = {float(b[worst]):.4g}: gamma = {float(gamma[worst]):.4g}, "
        f"b / sqrt(1 - a^2) = {float(true[worst]):.4g}, printed {float(loose[worst]):.4g}",
    )


def _white(lab: Lab) -> torch.Tensor:
    """Return the factors from white coordinates to pixels, ``(N,)``: the noise of a pixel over gamma."""
    if lab.context is None:
        return torch.ones(lab.pixels, dtype=torch.float64)
    return (lab.context / lab.context.mean()).double().flatten().sqrt()
