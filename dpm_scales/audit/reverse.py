r"""Check the reverse direction: Sect. 5.2, Peter 2024, and its analogues of Sect. 5.1 and 5.3.

The ideal result of training replaces the network: the law of u_0 given u_t, known in closed form for Gaussian data with
covariance C (the variance of the images, with a correlation that decays with distance) and u_t ~ N(A u_0 + b, S):

    W = C A' (A C A' + S)^{-1},     E[u_0 | u_t] = W u_t,     Cov[u_0 | u_t] = C - W A C

    ideal step    u_s = (keep + pull W) u_t + N(0, posterior + pull Cov[u_0 | u_t] pull')
    trained step  the same without the last term: the mean of the network replaces u_0
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpm_scales.audit.dense import Law, Posterior, eigen, entropy, root, solve
from dpm_scales.audit.lab import LIMIT, Finding, Lab, Verdict, not_applicable, whitened
from dpm_scales.metrics import reverse_entropy_bounds

REVERSE = "reverse"


@dataclass(frozen=True)
class Return:
    """Laws of the reverse process down the ladder.

    Attributes:
        posteriors: q(u_s | u_t, u_0), from the top.
        given: laws of u_s given u_0 that they compose from the marginal at scale 1, rung by rung from 0.
        data: covariances of u_t over the data, from the forward chain, rung by rung from 0.
        ideal, trained: covariances from the steps above, starting from the marginal at scale 1.
    """

    posteriors: list[Posterior]
    given: list[Law]
    data: list[Tensor]
    ideal: list[Tensor]
    trained: list[Tensor]


def way_back(lab: Lab) -> Return:
    """Return the laws that the findings below examine."""
    ladder, c, data = lab.ladder, lab.data_covariance, lab.over_the_data(lab.chain)
    given, ideal, trained, posteriors = [lab.marginals[-1]], [data[-1]], [data[-1]], []
    for k in range(len(ladder) - 1, 0, -1):
        posterior = lab.dense.posterior(ladder[k - 1], ladder[k])
        posteriors.append(posterior)
        given.append(posterior.after(given[-1]))
        w = denoiser(lab, data[k], k)
        unknown = c - w @ lab.chain[k].matrix @ c
        step = posterior.keep + posterior.pull @ w
        ideal.append(step @ ideal[-1] @ step.T + posterior.covariance + posterior.pull @ unknown @ posterior.pull.T)
        trained.append(step @ trained[-1] @ step.T + posterior.covariance)
    return Return(posteriors, given[::-1], data, ideal[::-1], trained[::-1])


def denoiser(lab: Lab, total: Tensor, k: int) -> Tensor:
    """Return W at rung k, where u_t has covariance `total`."""
    cross = lab.data_covariance @ lab.chain[k].matrix.T
    return solve(total, cross.T).T


def initial_state(lab: Lab) -> Finding:
    """Check Property 1: the initial state of the reverse process."""
    name, source, printed = "initial state", "Property 1, Sect. 5.2", "q(u_M) = N(0, I)"
    if not lab.noisy:
        note = "without noise the way back begins at one image and has nothing to draw from"
        return not_applicable(name, source, printed, note, REVERSE)
    law = lab.marginals[-1]
    energy = float(lab.images.square().mean())
    signal = float(law.matrix.square().sum()) / lab.pixels * energy
    # Kullback-Leibler divergence of N(A u + b, S) from N(0, I) per pixel, for an image with the energy of the data
    _, log_det = torch.linalg.slogdet(law.covariance)
    mean = law.mean(lab.start)
    nats = 0.5 * float(law.covariance.diagonal().sum() + mean @ mean - lab.pixels - log_det) / lab.pixels
    gamma = root(float(law.covariance.diagonal().mean()))
    if nats <= 1e-2:
        verdict, corrected = Verdict.IN_LAW, ""
    elif lab.scales_grey or not lab.blurs:
        plain = "q(u_M) = N(0, gamma_1^2 I)"
        guided = "q(u_M) = N(0, gamma_1^2 diag(v)), v the guidance image with mean one"
        verdict, corrected = Verdict.CORRECTED, plain if lab.context is None else guided
        if signal > 2.5e-3 * gamma**2:
            corrected, verdict = "", Verdict.VIOLATED
    else:
        verdict = Verdict.CORRECTED
        corrected = "q(u_M) is the mixture of N(lambda_1(L) u, gamma_1^2) over the data: flat images and noise"
    return Finding(
        name=name,
        source=source,
        direction=REVERSE,
        printed=printed,
        verdict=verdict,
        figure="divergence of the law at scale 1 from N(0, I), nats per pixel",
        measured=nats,
        expected=0.0,
        tolerance=1e-2,
        corrected=corrected,
        scale=1.0,
        note=f"lambda_1 = {float(lab.log_signal[-1, 0].exp()):.4g} at mu = 0, gamma_1 = {gamma:.4g}",
    )


def semigroup(lab: Lab, back: Return) -> Finding:
    """Check Property 2: successive posteriors lead back through the marginals."""
    worst, gap = lab.widest([lab.gap(a, b) for a, b in zip(back.given, lab.marginals, strict=True)])
    fits, drawn, error = gap.closed, None, None
    rung = (len(lab.ladder) - 1) // 2
    if lab.noisy and rung > 0:  # scale 0 may have no noise to compare
        spread, error = _drawn_back(lab, rung)
        fits = fits and abs(spread - 1) <= LIMIT * error + 2 * lab.noise_tolerance
        drawn = spread - 1
    good = Verdict.IN_LAW if lab.noisy else Verdict.EXACTLY
    return Finding(
        name="semigroup",
        source="Property 2, Sect. 5.2",
        direction=REVERSE,
        printed="q(u_i) is reached from q(u_M) in M - i steps or from q(u_{M-l}) in M - l - i steps",
        verdict=good if fits else Verdict.VIOLATED,
        figure="law of the composed posteriors against the marginal",
        measured=gap.value,
        expected=0.0,
        tolerance=gap.tolerance,
        drawn=drawn,
        std_error=error,
        scale=lab.ladder[worst],
        note="drawn: variance of paths after one step back, relative" if lab.noisy else "no noise: one image",
    )


def _drawn_back(lab: Lab, rung: int) -> tuple[float, float]:
    """Draw paths up to the next rung, then from the posterior.

    Return the variance of the draws over that of the marginal, and its standard error.
    """
    x_t = lab.paths[rung + 1].reshape(-1, 1, *lab.size)
    x_0 = lab.images[:1].expand_as(x_t)
    law = lab.process.posterior(x_t, x_0, lab.ladder[rung], lab.ladder[rung + 1], lab.context)
    drawn = law.sample(lab.generator).flatten(1) - lab.marginals[rung].mean(lab.start)
    energy = drawn.square().sum(1)
    wanted = float(lab.marginals[rung].covariance.diagonal().sum())
    return float(energy.mean()) / wanted, float(energy.std()) / wanted / math.sqrt(len(energy))


def entropies(lab: Lab, back: Return) -> list[Finding]:
    """Check Property 3: H(U_i) and H(U_0 | U_i) decrease in the reverse process."""
    source = "Property 3, Sect. 5.2"
    total = [entropy(c) / lab.pixels for c in back.data]
    tolerance = 1e-9 if not lab.expands else lab.noise_tolerance
    # with broken transitions, the chain may rise where the marginals fall, and vice versa
    own = [entropy(c) / lab.pixels for c in lab.over_the_data(lab.marginals)]
    rises, worst = min((_smallest_rise(values) for values in (total, own)), key=lambda found: found[0])
    falls = not rises >= -tolerance
    blurs_more = lab.blurs and falls
    note = f"Gaussian data; {total[0]:.3f} at scale 0, {total[-1]:.3f} at scale 1"
    if lab.noisy:
        note += f"; {_surprise(lab, back, total[-1])}"
    first = Finding(
        name="entropy of the images",
        source=source,
        direction=REVERSE,
        printed="H(U_{i-1}) < H(U_i)",
        verdict=(Verdict.VIOLATED if falls else Verdict.EXACTLY),
        figure="smallest rise of H(U_t) between scales, nats per pixel",
        measured=rises,
        expected=0.0,
        tolerance=tolerance,
        scale=lab.ladder[worst + 1],
        note=note + ("; blur lowers it where it takes more than noise adds" if blurs_more else ""),
    )
    name, printed = "entropy of the data given an image", "H(U_0 | U_{i-1}) < H(U_0 | U_i)"
    if not lab.noisy:
        why = "without noise an image determines the data, and the entropy is -inf at every scale"
        return [first, not_applicable(name, source, printed, why, REVERSE)]
    data = entropy(lab.data_covariance) / lab.pixels
    unknown = [data + h / lab.pixels - own for h, own in zip(lab.chain_entropy, total, strict=True)]
    rises, worst = _smallest_rise(unknown)
    second = Finding(
        name=name,
        source=source,
        direction=REVERSE,
        printed=printed,
        verdict=Verdict.EXACTLY if rises >= -tolerance else Verdict.VIOLATED,
        figure="smallest rise of H(U_0 | U_t) between scales, nats per pixel",
        measured=rises,
        expected=0.0,
        tolerance=tolerance,
        scale=lab.ladder[worst + 1],
        note=f"Gaussian data; {unknown[-1]:.3f} at scale 1, of {data:.3f} in the data",
    )
    return [first, second]


def _smallest_rise(values: list[float]) -> tuple[float, int]:
    """Return the smallest increase between successive values, -inf if one is not finite, and its index."""
    rises = [b - a if math.isfinite(b) and not math.isnan(a) else -math.inf for a, b in itertools.pairwise(values)]
    worst = min(range(len(rises)), key=rises.__getitem__)
    return rises[worst], worst


def _surprise(lab: Lab, back: Return, wanted: float) -> str:
    """Return a note on H(U_1), estimated from random data and paths as the mean of -ln p."""
    x_0 = _draw(lab, lab.data_covariance).reshape(-1, 1, *lab.size)
    u = lab.process.trajectory(x_0, [lab.ladder[1], 1.0], lab.generator, lab.context)[-1].flatten(1)
    distances = whitened(u, back.data[-1]).square().sum(1)
    drawn = wanted + 0.5 * (float(distances.mean()) / lab.pixels - 1)
    return f"drawn {drawn:.3f} ± {float(distances.std()) / math.sqrt(lab.samples) / lab.pixels / 2:.3f}"


def entropy_bounds(lab: Lab, back: Return) -> Finding:
    """Check H(U_t|U_s) + H(U_s|U_0) - H(U_t|U_0) <= H(U_s|U_t) <= H(U_t|U_s), Sohl-Dickstein et al. 2015."""
    name, source = "bounds of a reverse step's entropy", "Sect. 5.2, after Sohl-Dickstein et al. 2015"
    printed = "H(U_t|U_s) + H(U_s|U_0) - H(U_t|U_0) <= H(U_s|U_t) <= H(U_t|U_s)"
    if not lab.noisy:
        note = "without noise all of these entropies are -inf"
        return not_applicable(name, source, printed, note, REVERSE)
    scales = torch.tensor(lab.ladder, dtype=torch.float64)
    bounds = torch.stack(reverse_entropy_bounds(lab.process, scales, lab.size))  # in white coordinates
    below, above, where, apart = [], [], [], 0.0
    approximate = not lab.dense.operator.is_diagonal
    volume = float(torch.as_tensor(lab.dense.operator.log_volume()).sum())
    for k, posterior in enumerate(back.posteriors[::-1]):
        if not math.isfinite(lab.chain_entropy[k]):
            continue
        step = lab.transitions[k].covariance
        values, vectors = eigen(step)
        noisy = vectors[:, values > 1e-9 * values.max()]  # directions in which the step adds noise
        early, late = back.data[k], back.data[k + 1]
        cross = lab.transitions[k].matrix @ early
        reverse = early - cross.T @ solve(late, cross)
        lower, own, upper = (entropy(noisy.T @ c @ noisy) for c in (posterior.covariance, reverse, step))
        below.append((own - lower) / lab.pixels)
        above.append((upper - own) / lab.pixels)
        where.append(lab.ladder[k])
        closed = bounds[:, k]
        if noisy.shape[1] == lab.pixels and bool(torch.isfinite(closed).all()):
            off = [abs(float(a) - (b - volume)) / lab.pixels for a, b in zip(closed, (lower, upper), strict=True)]
            apart = max(apart, *off)
    if not below:
        note = "the chain has no step between two scales with noise"
        return not_applicable(name, source, printed, note, REVERSE)
    tolerance = 1e-6 if not lab.expands else lab.noise_tolerance
    low, high = min(below), min(above)
    verdict, corrected = Verdict.EXACTLY, ""
    if not (low >= -tolerance and (approximate or apart <= 1e-4)):
        verdict = Verdict.VIOLATED
    elif high < -tolerance:
        verdict = Verdict.CORRECTED
        corrected = "the lower bound always holds; the upper one needs H(U_t) >= H(U_s), which blur breaks"
    worst = below.index(low) if verdict is Verdict.VIOLATED else above.index(high)
    return Finding(
        name=name,
        source=source,
        direction=REVERSE,
        printed=printed,
        verdict=verdict,
        figure="smallest slack of the upper bound, nats per pixel",
        measured=high,
        expected=0.0,
        tolerance=tolerance,
        corrected=corrected,
        scale=where[worst],
        note=f"smallest slack of the lower bound {low:.3g}; closed form and determinants differ by {apart:.2g}"
        + (", since it takes the spectrum of the constant guidance image" if approximate and apart > 0 else ""),
    )


def steady_state(lab: Lab, back: Return) -> Finding:
    """Check Property 4: the ideal reverse process ends at the data."""
    name, source = "steady state", "Property 4, Sect. 5.2"
    printed = "the way back ends at the distribution of the training data, where p and q are the same"
    if not lab.noisy:
        note = "without noise there is nothing to draw from"
        return not_applicable(name, source, printed, note, REVERSE)
    c = lab.data_covariance
    scale = float(c.diagonal().max())
    start = back.data[0]
    off = float((back.ideal[0] - start).abs().max()) / scale
    loss = float(back.trained[0].diagonal().mean() / start.diagonal().mean())
    spread, error = _drawn_home(lab, back)
    fits = off <= max(lab.noise_tolerance, 1e-6) and abs(spread - 1) <= LIMIT * error + 2 * lab.noise_tolerance
    return Finding(
        name=name,
        source=source,
        direction=REVERSE,
        printed=printed,
        verdict=Verdict.IN_LAW if fits else Verdict.VIOLATED,
        figure="covariance of the ideal way back against the data's, relative",
        measured=off,
        expected=0.0,
        tolerance=max(lab.noise_tolerance, 1e-6),
        drawn=spread - 1,
        std_error=error,
        scale=0.0,
        note="Gaussian data; drawn: variance of paths, relative; with the mean alone, as a network gives it, and "
        f"{len(lab.ladder) - 1} steps, the variance is {loss:.3f} of the data's",
    )


def _drawn_home(lab: Lab, back: Return) -> tuple[float, float]:
    """Draw paths from scale 1 down the ladder; return their variance over that of the data, and its standard error.

    Each step draws u_0 given u_t, then from the posterior.
    """
    c, x = lab.data_covariance, _draw(lab, back.data[-1])
    for k in range(len(lab.ladder) - 1, 0, -1):
        w = denoiser(lab, back.data[k], k)
        x_0 = x @ w.T + _draw(lab, c - w @ lab.chain[k].matrix @ c)
        x_t, x_0 = (v.reshape(-1, 1, *lab.size) for v in (x, x_0))
        x = lab.process.posterior(x_t, x_0, lab.ladder[k - 1], lab.ladder[k], lab.context).sample(lab.generator)
        x = x.flatten(1)
    energy, wanted = x.square().sum(1), float(back.data[0].diagonal().sum())
    return float(energy.mean()) / wanted, float(energy.std()) / wanted / math.sqrt(len(energy))


def _draw(lab: Lab, covariance: Tensor) -> Tensor:
    """Return draws ``(M, N)`` with mean zero."""
    values, vectors = eigen(covariance)
    white = torch.randn(lab.samples, lab.pixels, dtype=torch.float64, generator=lab.generator)
    return (white * values.clamp(min=0).sqrt()) @ vectors.T
