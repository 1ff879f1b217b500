"""Check the forward direction: the architecture and the entropies, Sect. 5.1 and 5.3, Peter 2024."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpm_scales.audit.dense import eigen, entropy, largest, root
from dpm_scales.audit.findings import Verdict
from dpm_scales.audit.lab import LIMIT, Lab, whitened
from dpm_scales.audit.statements import Measured, by_blur, statement

NO_ENTROPY = "without noise the entropy is -inf at every scale"


@statement(
    "initial state",
    "Property 1, Sect. 5.1, 5.3",
    "p(u_0) is the distribution of the training data",
    "law at scale 0 against the identity",
)
def initial_state(lab: Lab) -> Measured:
    """Check Property 1: scale 0 is the image itself."""
    first = lab.marginals[0]
    off = max(largest(first.matrix - lab.dense.units), largest(first.offset) / lab.span)
    off = max(off, root(largest(first.covariance)) / lab.span)
    path = largest(lab.paths[0] - lab.start) / lab.span
    holds = path <= lab.mean_tolerance and off <= lab.mean_tolerance
    curves = f"lambda_0 = {float(lab.log_signal[0, 0].exp()):.6g}, gamma_0 = {float(lab.noise[0, 0]):.4g}"
    note = "" if holds else f"{curves}; a path starts {path:.2g} of the value range off the image"
    return Measured(Verdict.EXACTLY, holds, off, lab.mean_tolerance, scale=0.0, note=note)


@statement(
    "Markov property",
    "Eq. (1)",
    "p(u_i | u_{i-1}, ..., u_0) = p(u_i | u_{i-1})",
    "correlation of what a step adds with the noise before it",
)
def markov(lab: Lab) -> Measured:
    """Check Eq. (1): the noise of a step is independent of the past."""
    slack = lab.noise_tolerance
    if not lab.noisy:
        note = "nothing is random, and each image follows from the one before"
        return Measured(Verdict.EXACTLY, True, 0.0, slack, note=note)
    worst, error, where = 0.0, float("nan"), None
    for k in range(2, len(lab.ladder)):
        added = lab.paths[k] - lab.transitions[k - 1].mean(lab.paths[k - 1])
        past = lab.deviations[k - 1]
        level = _level(past)
        if level == 0:
            continue
        # a step without noise leaves rounding errors, which may depend on the past
        products = (added * past).mean(1) / math.sqrt(max(_level(added), 1e-12 * level) * level)
        mean, std = float(products.mean()), float(products.std()) / math.sqrt(len(products))
        if where is None or abs(mean) / max(std, 1e-12) > abs(worst) / max(error, 1e-12):
            worst, error, where = mean, std, lab.ladder[k]
    tolerance = slack + LIMIT * error
    fits = where is None or abs(worst) <= tolerance
    return Measured(Verdict.IN_LAW, fits, worst, tolerance, drawn=(worst, error), scale=where)


def _level(values: Tensor) -> float:
    return float(values.square().mean())


def spread_at_the_end(deviation: Tensor, covariance: Tensor) -> tuple[float, float, float]:
    """Compare draws, as deviations ``(M, N)`` from their law's mean, with its covariance.

    Return their variance in units of the covariance; the standard error of that; and the deviation of their mean in
    standard errors.
    """
    white = whitened(deviation, covariance)
    number, pixels = white.shape
    spread, error = float(white.square().mean()), math.sqrt(2 / (number * pixels))
    # Wilson and Hilferty: the cube root of a chi-squared variable is nearly normal even for few pixels
    root = (float((number * white.mean(0).square()).sum()) / pixels) ** (1 / 3)
    off = (root - 1 + 2 / (9 * pixels)) / math.sqrt(2 / (9 * pixels))
    return spread, error, off


@statement(
    "semigroup",
    by_blur("Prop. 2", "Property 2, Sect. 5.3"),
    "p(u_i) is reached from p(u_0) in i steps or from p(u_{i-l}) in l steps",
    "law of the composed transitions against the marginal",
)
def semigroup(lab: Lab) -> Measured:
    """Check Proposition 2: one long step equals many short ones."""
    worst, gap = lab.widest([lab.gap(a, b) for a, b in zip(lab.chain, lab.marginals, strict=True)])
    fits, drawn = gap.closed, None
    if lab.noisy:
        spread, error, off = spread_at_the_end(lab.deviations[-1], lab.marginals[-1].covariance)
        fits = fits and lab.spreads(spread, error) and abs(off) <= LIMIT
        drawn = spread - 1, error
        note = f"drawn: variance of {lab.samples} paths, relative; their mean is off by {off:+.1f} standard errors"
    else:
        off = max(largest(p - law.mean(lab.start)) for p, law in zip(lab.paths, lab.chain, strict=True)) / lab.span
        fits = fits and off <= lab.mean_tolerance
        note = f"a path differs from the composed steps by {off:.2g} of the value range"
    return Measured(lab.as_printed, fits, gap.value, gap.tolerance, drawn=drawn, scale=lab.ladder[worst], note=note)


@statement(
    "transition from the initial state",
    by_blur("Prop. 1, Eq. (14)", "Eq. (38)-(40)"),
    "gamma_i = sum_k beta_k prod_{l>k} alpha_l + beta_i",
    "standard deviation at scale 1, root mean square over the pixels",
)
def initial_transition(lab: Lab) -> Measured:
    """Check Proposition 1, Eq. (8), (14), (40): standard deviations do not add."""
    if not lab.noisy:
        _, gap = lab.widest([lab.gap(a, b) for a, b in zip(lab.chain, lab.marginals, strict=True)])
        own = largest(lab.samples_at_the_end - lab.marginals[-1].mean(lab.start)) / lab.span
        fits, note = gap.closed and own <= lab.mean_tolerance, "no noise: both forms give gamma = 0"
        figure = "lambda_i = prod alpha_k: composed means against the marginal's"
        return Measured(Verdict.EXACTLY, fits, gap.value, gap.tolerance, figure=figure, note=note)
    wrong, right = [lab.noise[0]], [lab.noise[0] ** 2]
    for alpha, beta in zip(lab.alpha, lab.beta, strict=True):
        wrong.append(alpha * wrong[-1] + beta)
        right.append(alpha**2 * right[-1] + beta**2)
    printed_gamma, true = torch.stack(wrong), torch.stack(right).sqrt()
    ratio = printed_gamma / true.clamp(min=1e-300)
    number, mode = divmod(int(ratio.argmax()), lab.pixels)
    recursion = float((true - lab.noise).abs().max() / lab.noise.max())
    last, law = lab.chain[-1].covariance, lab.marginals[-1].covariance
    dense = root(float(last.diagonal().mean()))
    closed = root(float((lab.noise[-1] ** 2).mean()))
    spread, error, off = spread_at_the_end(lab.samples_at_the_end - lab.marginals[-1].mean(lab.start), law)
    marginal = root(float(law.diagonal().mean()))
    fits = abs(dense / closed - 1) <= lab.noise_tolerance and abs(marginal / closed - 1) <= lab.noise_tolerance
    fits = fits and lab.spreads(spread, error) and abs(off) <= LIMIT
    return Measured(
        Verdict.CORRECTED,
        fits and recursion <= 1e-6,
        marginal,
        lab.noise_tolerance * closed,
        expected=closed,
        drawn=(marginal * root(spread), marginal * error / 2),
        corrected="variances add: gamma_i^2 = sum_k beta_k^2 prod_{l>k} alpha_l^2 + beta_i^2",
        scale=float(lab.ts[number]),
        eigenvalue=float(lab.mu[mode]),
        note=f"the printed sum gives {float(printed_gamma[number, mode]):.4g} there, and the true gamma is "
        f"{float(true[number, mode]):.4g}; at scale 1 composed transitions give {dense:.4g}",
    )


@statement(
    "conditional entropy",
    by_blur("Prop. 3", "Prop. 7"),
    "H(U_i | U_0) increases with i",
    "smallest rise in a step, nats per pixel",
    without_noise=NO_ENTROPY,
)
def conditional_entropy(lab: Lab) -> Measured | str:
    """Check Propositions 3 and 7: H(U_i | U_0) never decreases."""
    closed, tolerance = lab.increments, lab.noise_tolerance
    if not bool(closed.isfinite().any()):
        return "the chain has no step between two scales with noise"
    finite = closed.nan_to_num(nan=0.0)
    worst = int(finite.argmin())
    dense = [(b - a) / lab.pixels for a, b in zip(lab.chain_entropy, lab.chain_entropy[1:], strict=False)]
    by_table = [float(finite[round(s * len(closed)) : round(t * len(closed))].sum()) for s, t in lab.steps]
    apart = max((abs(a - b) for a, b in zip(dense, by_table, strict=True) if math.isfinite(a)), default=0.0)
    rises = float(finite[worst]) >= -1e-9 and min(dense) >= -tolerance
    drawn = _drawn_rise(lab, worst)
    per_mode = (lab.noise[2:] ** 2 - lab.noise[1:-1] ** 2) / lab.noise[1:-1] ** 2
    lowest = float(per_mode.min()) if per_mode.numel() else 0.0
    contradicts = drawn is not None and abs(drawn[0] - float(finite[worst])) > LIMIT * drawn[1] + tolerance
    eigenvalue, note = None, f"by determinants: {min(dense):+.3g}"
    if not apart <= tolerance:
        note = f"closed form and determinants of composed transitions differ by {apart:.3g}"
    if lowest < -1e-9:  # the sum over all frequencies may compensate for it
        step, mode = divmod(int(per_mode.argmin()), per_mode.shape[1])
        eigenvalue = float(lab.mu[mode])
        note += f"; the variance of one frequency falls by {-lowest:.3g} of itself at t = {float(lab.ts[step + 2]):.3g}"
    return Measured(
        Verdict.EXACTLY,
        rises and apart <= tolerance and not contradicts,
        float(finite[worst]),
        1e-9,
        drawn=drawn,
        scale=float(lab.ts[worst + 1]),
        eigenvalue=eigenvalue,
        note=note + ("; the entropy is constant" if lab.process.has_constant_noise() else ""),
    )


def _drawn_rise(lab: Lab, number: int) -> tuple[float, float] | None:
    """Return the entropy increase in a step of the chain, in nats per pixel, and a bound on its standard error.

    It is computed from the determinants of the covariances of the paths, whose biases cancel. The bound assumes
    independent draws. Return None for the step from scale 0, where a path is the image itself.
    """
    if number == 0:
        return None
    step = lab.steps.index((number / lab.process.num_scales, (number + 1) / lab.process.num_scales))
    early, late = (entropy(d.T @ d / len(d)) for d in (lab.deviations[step], lab.deviations[step + 1]))
    error = math.sqrt(-math.log1p(-lab.pixels / lab.samples))
    return (late - early) / lab.pixels, error / lab.pixels


@statement(
    "condition for the entropy",
    by_blur("Prop. 3, Eq. (24)", "Prop. 7, Eq. (44)"),
    "beta_{i+1} >= (1 - alpha_{i+1}) gamma_i is enough",
    "smallest growth of the covariance in a direction, relative",
    without_noise="there is no noise",
)
def entropy_condition(lab: Lab) -> Measured:
    """Check the assumption of Propositions 3 and 7, Eq. (24), (44), which holds with squares."""
    before, after = lab.noise[:-1], lab.noise[1:]
    falls = after < before * (1 - 1e-9)
    weak = lab.beta >= (1 - lab.alpha) * before * (1 - 1e-9)
    misled = falls & weak
    # as matrices between the rungs: does the covariance grow in every direction?
    gaps, wanted = [], []
    for (s, t), early, late in zip(lab.steps, lab.chain, lab.chain[1:], strict=False):
        scale = float(late.covariance.diagonal().max()) or 1.0  # a clock may not have started
        gaps.append(float(eigen(late.covariance - early.covariance)[0].min()) / scale)
        i, j = round(s * lab.process.num_scales), round(t * lab.process.num_scales)
        wanted.append(float((lab.noise[j] ** 2 - lab.noise[i] ** 2).min()) / scale)
    apart = max(abs(min(g, 0.0) - min(w, 0.0)) for g, w in zip(gaps, wanted, strict=True))
    worst = gaps.index(min(gaps))
    same = bool((lab.alpha > 1 - 1e-12).all())  # both conditions then reduce to beta >= 0
    return Measured(
        Verdict.EXACTLY if same else Verdict.CORRECTED,
        apart <= 2 * lab.noise_tolerance,
        gaps[worst],
        2 * lab.noise_tolerance,
        expected=wanted[worst],
        corrected="" if same else "beta_{i+1}^2 >= (1 - alpha_{i+1}^2) gamma_i^2 for every eigenvalue, and no less",
        scale=lab.ladder[worst + 1],
        eigenvalue=float(lab.mu[int(misled.nonzero()[0, 1])]) if bool(misled.any()) else None,
        note=f"of {int(falls.sum())} steps of a frequency in which its noise falls, the printed condition lets "
        f"{int(misled.sum())} pass",
    )


@statement(
    "entropy by the determinant",
    by_blur("Eq. (22)", "Eq. (42)"),
    by_blur("H = 1/2 ln((2 pi e gamma^2)^n)", "H = 1/2 ln((2 pi e)^N prod_j gamma_j)"),
    "H(U_i | U_0) by determinants, nats per pixel",
    without_noise=NO_ENTROPY,
)
def entropy_formula(lab: Lab) -> Measured:
    """Check Eq. (22), (42): the determinant of the covariance is the product of the squares."""
    rung = len(lab.ladder) // 2
    t = lab.ladder[rung]
    dense, own = lab.chain_entropy[rung], entropy(lab.marginals[rung].covariance)
    closed = lab.process.conditional_entropy(t, lab.size, lab.context).reshape(-1)[0]
    wrong = float(closed - 0.5 * lab.noise[round(t * lab.process.num_scales)].log().sum())
    surprise = 0.5 * whitened(lab.deviations[rung], lab.marginals[rung].covariance).square().sum(1)
    drawn = own - 0.5 * lab.pixels + float(surprise.mean())
    error = float(surprise.std()) / math.sqrt(lab.samples) / lab.pixels
    tolerance = lab.noise_tolerance
    apart = max(abs(dense - float(closed)), abs(own - float(closed))) / lab.pixels
    fits = apart <= tolerance and abs(drawn - float(closed)) / lab.pixels <= LIMIT * error + tolerance
    return Measured(
        Verdict.CORRECTED if lab.blurs else Verdict.EXACTLY,
        fits,
        dense / lab.pixels,
        tolerance,
        expected=float(closed) / lab.pixels,
        corrected="H = 1/2 ln((2 pi e)^N prod_j gamma_j^2)" if lab.blurs and fits else "",
        drawn=(drawn / lab.pixels, error),
        scale=t,
        note=f"the printed formula gives {wrong / lab.pixels:.4f}" if lab.blurs else "",
    )
