r"""Check the reverse direction: Sect. 5.2, Peter 2024, and its analogues of Sect. 5.1 and 5.3.

The ideal result of training replaces the network: the law of u_0 given u_t, known in closed form for Gaussian data of
covariance C (the variance of the images, with a correlation that decays with distance) and u_t ~ N(A u_0 + b, S):

    W = C A' (A C A' + S)^{-1},     E[u_0 | u_t] = W u_t,     Cov[u_0 | u_t] = C - W A C

    ideal step    u_s = (keep + pull W) u_t + N(0, posterior + pull Cov[u_0 | u_t] pull')
    trained step  the same without the last term: the network's mean replaces u_0
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from dpm_scales.audit.dense import eigen, entropy, root, solve
from dpm_scales.audit.findings import Verdict
from dpm_scales.audit.lab import Lab, whitened
from dpm_scales.audit.statements import Measured, statement
from dpm_scales.metrics import reverse_entropy_bounds

reverse = functools.partial(statement, direction="reverse")
"""Decorate the check of a statement on the reverse process; see `statement`."""


@reverse(
    "initial state",
    "Property 1, Sect. 5.2",
    "q(u_M) = N(0, I)",
    "divergence of the law at scale 1 from N(0, I), nats per pixel",
    without_noise="without noise the reverse process starts at a single image, and nothing is drawn",
)
def initial_state(lab: Lab) -> Measured:
    """Check Property 1: the initial state of the reverse process."""
    law = lab.marginals[-1]
    energy = float(lab.images.square().mean())
    signal = float(law.matrix.square().sum()) / lab.pixels * energy
    # Kullback-Leibler divergence of N(A u + b, S) from N(0, I) per pixel, for an image with the energy of the data
    _, log_det = torch.linalg.slogdet(law.covariance)
    mean = law.mean(lab.start)
    nats = 0.5 * float(law.covariance.diagonal().sum() + mean @ mean - lab.pixels - log_det) / lab.pixels
    gamma = root(float(law.covariance.diagonal().mean()))
    verdict, fits, corrected = Verdict.CORRECTED, True, ""
    if nats <= 1e-2:
        verdict = Verdict.IN_LAW
    elif lab.blurs and not lab.scales_grey:
        corrected = "q(u_M) is the mixture of N(lambda_1(L) u, gamma_1^2) over the data: flat images and noise"
    else:
        fits = not signal > 2.5e-3 * gamma**2
        guided = "q(u_M) = N(0, gamma_1^2 diag(v)), v the guidance image with mean one"
        corrected = guided if lab.guided else "q(u_M) = N(0, gamma_1^2 I)"
    note = f"lambda_1 = {float(lab.log_signal[-1, 0].exp()):.4g} at mu = 0, gamma_1 = {gamma:.4g}"
    return Measured(verdict, fits, nats, 1e-2, corrected=corrected if fits else "", scale=1.0, note=note)


@reverse(
    "semigroup",
    "Property 2, Sect. 5.2",
    "q(u_i) is reached from q(u_M) in M - i steps or from q(u_{M-l}) in M - l - i steps",
    "law of the composed posteriors against the marginal",
)
def semigroup(lab: Lab) -> Measured:
    """Check Property 2: successive posteriors lead back through the marginals."""
    worst, gap = lab.widest([lab.gap(a, b) for a, b in zip(lab.back.given, lab.marginals, strict=True)])
    fits, drawn = gap.closed, None
    rung = (len(lab.ladder) - 1) // 2
    if lab.noisy and rung > 0:  # scale 0 may have no noise to compare
        spread, error = _drawn_back(lab, rung)
        fits, drawn = fits and lab.spreads(spread, error), (spread - 1, error)
    note = "drawn: variance of paths after one step back, relative" if lab.noisy else "no noise: one image"
    return Measured(lab.as_printed, fits, gap.value, gap.tolerance, drawn=drawn, scale=lab.ladder[worst], note=note)


def _drawn_back(lab: Lab, rung: int) -> tuple[float, float]:
    """Draw from the posterior at the end of the paths to the next rung.

    Return the variance of the draws relative to that of the marginal, and its standard error.
    """
    x_t = lab.paths[rung + 1].reshape(-1, 1, *lab.size)
    x_0 = lab.images[:1].expand_as(x_t)
    law = lab.process.posterior(x_t, x_0, lab.ladder[rung], lab.ladder[rung + 1], lab.context)
    drawn = law.sample(lab.generator).flatten(1) - lab.marginals[rung].mean(lab.start)
    return _energy(drawn, lab.marginals[rung].covariance)


def _energy(drawn: Tensor, covariance: Tensor) -> tuple[float, float]:
    """Return the mean square of draws ``(M, N)`` relative to that of their law, and its standard error."""
    energy, wanted = drawn.square().sum(1), float(covariance.diagonal().sum())
    return float(energy.mean()) / wanted, float(energy.std()) / wanted / math.sqrt(len(energy))


@reverse(
    "entropy of the images",
    "Property 3, Sect. 5.2",
    "H(U_{i-1}) < H(U_i)",
    "smallest rise of H(U_t) between scales, nats per pixel",
)
def image_entropy(lab: Lab) -> Measured:
    """Check Property 3: H(U_i) decreases in the reverse process."""
    total, tolerance = _entropies(lab.back.data), 1e-9 if not lab.expands else lab.noise_tolerance
    # with broken transitions, the chain may rise where the marginals fall, and vice versa
    own = _entropies(lab.over_the_data(lab.marginals))
    rises, worst = min((_smallest_rise(values) for values in (total, own)), key=lambda found: found[0])
    fits = rises >= -tolerance
    note = f"Gaussian data; {total[0]:.3f} at scale 0, {total[-1]:.3f} at scale 1"
    if lab.noisy:
        note += f"; {_surprise(lab, total[-1])}"
    if lab.blurs and not fits:
        note += "; it falls where blur removes more than noise adds"
    return Measured(Verdict.EXACTLY, fits, rises, tolerance, scale=lab.ladder[worst + 1], note=note)


@reverse(
    "entropy of the data given an image",
    "Property 3, Sect. 5.2",
    "H(U_0 | U_{i-1}) < H(U_0 | U_i)",
    "smallest rise of H(U_0 | U_t) between scales, nats per pixel",
    without_noise="without noise an image determines the data, and the entropy is -inf at every scale",
)
def data_entropy(lab: Lab) -> Measured:
    """Check Property 3: H(U_0 | U_i) decreases in the reverse process."""
    (data,), tolerance = _entropies([lab.data_covariance]), 1e-9 if not lab.expands else lab.noise_tolerance
    totals = _entropies(lab.back.data)
    unknown = [data + h / lab.pixels - total for h, total in zip(lab.chain_entropy, totals, strict=True)]
    rises, worst = _smallest_rise(unknown)
    note = f"Gaussian data; {unknown[-1]:.3f} at scale 1, of {data:.3f} in the data"
    return Measured(Verdict.EXACTLY, rises >= -tolerance, rises, tolerance, scale=lab.ladder[worst + 1], note=note)


def _entropies(covariances: list[Tensor]) -> list[float]:
    """Return entropies in nats per pixel."""
    return [entropy(c) / len(c) for c in covariances]


def _smallest_rise(values: list[float]) -> tuple[float, int]:
    """Return the smallest increase between successive values, -inf if one is not finite, and its index."""
    rises = [b - a if math.isfinite(b) and not math.isnan(a) else -math.inf for a, b in itertools.pairwise(values)]
    worst = rises.index(min(rises))
    return rises[worst], worst


def _surprise(lab: Lab, wanted: float) -> str:
    """Return a note on H(U_1), estimated from random data and paths as the mean of -ln p."""
    x_0 = _draw(lab, lab.data_covariance).reshape(-1, 1, *lab.size)
    u = lab.process.trajectory(x_0, [lab.ladder[1], 1.0], lab.generator, lab.context)[-1].flatten(1)
    distances = whitened(u, lab.back.data[-1]).square().sum(1)
    drawn = wanted + 0.5 * (float(distances.mean()) / lab.pixels - 1)
    return f"drawn {drawn:.3f} ± {float(distances.std()) / math.sqrt(lab.samples) / lab.pixels / 2:.3f}"


@reverse(
    "bounds of a reverse step's entropy",
    "Sect. 5.2, after Sohl-Dickstein et al. 2015",
    "H(U_t|U_s) + H(U_s|U_0) - H(U_t|U_0) <= H(U_s|U_t) <= H(U_t|U_s)",
    "smallest slack of the upper bound, nats per pixel",
    without_noise="without noise all of these entropies are -inf",
)
def entropy_bounds(lab: Lab) -> Measured | str:
    """Check H(U_t|U_s) + H(U_s|U_0) - H(U_t|U_0) <= H(U_s|U_t) <= H(U_t|U_s), Sohl-Dickstein et al. 2015."""
    scales = torch.tensor(lab.ladder, dtype=torch.float64)
    bounds = torch.stack(reverse_entropy_bounds(lab.process, scales, lab.size))  # in whitened coordinates
    below, above, where, apart = [], [], [], 0.0
    volume = float(torch.as_tensor(lab.dense.operator.log_volume()).sum())
    for k, posterior in enumerate(lab.back.posteriors[::-1]):
        if not math.isfinite(lab.chain_entropy[k]):
            continue
        step = lab.transitions[k].covariance
        values, vectors = eigen(step)
        noisy = vectors[:, values > 1e-9 * values.max()]  # directions in which the step adds noise
        early, late = lab.back.data[k], lab.back.data[k + 1]
        cross = lab.transitions[k].matrix @ early
        back = early - cross.T @ solve(late, cross)
        lower, own, upper = (entropy(noisy.T @ c @ noisy) for c in (posterior.covariance, back, step))
        below.append((own - lower) / lab.pixels)
        above.append((upper - own) / lab.pixels)
        where.append(lab.ladder[k])
        closed = bounds[:, k]
        if noisy.shape[1] == lab.pixels and bool(torch.isfinite(closed).all()):
            off = [abs(float(a) - (b - volume)) / lab.pixels for a, b in zip(closed, (lower, upper), strict=True)]
            apart = max(apart, *off)
    if not below:
        return "the chain has no step between two scales with noise"
    tolerance, low, high = 1e-6 if not lab.expands else lab.noise_tolerance, min(below), min(above)
    fits, corrected = low >= -tolerance and (lab.expands or apart <= 1e-4), ""
    if fits and high < -tolerance:
        corrected = "the lower bound always holds; the upper one needs H(U_t) >= H(U_s), which fails under blur"
    return Measured(
        Verdict.CORRECTED if corrected else Verdict.EXACTLY,
        fits,
        high,
        tolerance,
        corrected=corrected,
        scale=where[above.index(high) if fits else below.index(low)],
        note=f"smallest slack of the lower bound {low:.3g}; closed form and determinants differ by {apart:.2g}"
        + (", since it takes the spectrum of the constant guidance image" if lab.expands and apart > 0 else ""),
    )


@reverse(
    "steady state",
    "Property 4, Sect. 5.2",
    "the reverse process ends at the distribution of the training data, where p and q are the same",
    "covariance of the ideal reverse process against the data's, relative",
    without_noise="without noise there is nothing to draw from",
)
def steady_state(lab: Lab) -> Measured:
    """Check Property 4: the ideal reverse process ends at the data."""
    start, tolerance = lab.back.data[0], max(lab.noise_tolerance, 1e-6)
    off = float((lab.back.ideal[0] - start).abs().max()) / float(lab.data_covariance.diagonal().max())
    loss = float(lab.back.trained[0].diagonal().mean() / start.diagonal().mean())
    spread, error = _drawn_home(lab)
    return Measured(
        Verdict.IN_LAW,
        off <= tolerance and lab.spreads(spread, error),
        off,
        tolerance,
        drawn=(spread - 1, error),
        scale=0.0,
        note="Gaussian data; drawn: variance of paths, relative; with only the mean, as from a network, and "
        f"{len(lab.ladder) - 1} steps, the variance is {loss:.3f} of the data's",
    )


def _drawn_home(lab: Lab) -> tuple[float, float]:
    """Draw paths from scale 1 down the ladder; return their variance relative to the data's, and its standard error.

    Each step draws u_0 given u_t, then u_s from the posterior.
    """
    c, x = lab.data_covariance, _draw(lab, lab.back.data[-1])
    for k in range(len(lab.ladder) - 1, 0, -1):
        w = lab.denoiser(lab.back.data[k], k)
        x_0 = x @ w.T + _draw(lab, c - w @ lab.chain[k].matrix @ c)
        x_t, x_0 = (v.reshape(-1, 1, *lab.size) for v in (x, x_0))
        x = lab.process.posterior(x_t, x_0, lab.ladder[k - 1], lab.ladder[k], lab.context).sample(lab.generator)
        x = x.flatten(1)
    return _energy(x, lab.back.data[0])


def _draw(lab: Lab, covariance: Tensor) -> Tensor:
    """Return draws ``(M, N)`` of mean zero and this covariance."""
    values, vectors = eigen(covariance)
    white = torch.randn(lab.samples, lab.pixels, dtype=torch.float64, generator=lab.generator)
    return (white * values.clamp(min=0).sqrt()) @ vectors.T
