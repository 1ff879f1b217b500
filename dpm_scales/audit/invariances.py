"""Check invariances (Sect. 5.1, 5.3) and properties of osmosis (Sect. 6) of the forward direction, Peter 2024."""

from __future__ import annotations

import math

import torch

from dpm_scales.audit.dense import DenseProcess, permutation_matrix, rotation_matrix
from dpm_scales.audit.lab import LIMIT, Finding, Lab, Verdict, not_applicable
from dpm_scales.metrics import relative_entropy
from dpm_scales.processes import Osmosis


def permutation(lab: Lab) -> Finding:
    """Check Proposition 4 and Corollary 5, which hold if pixels do not interact."""
    order = torch.randperm(lab.pixels, generator=torch.Generator().manual_seed(lab.seed))
    matrix = permutation_matrix(order)
    worst, gap = lab.widest([lab.gap(law.moved(matrix), law) for law in lab.marginals + lab.transitions])
    claimed = not lab.blurs
    note = "" if claimed else "processes that blur see neighbours; Sect. 5.3 makes no such claim"
    verdict = (Verdict.EXACTLY if gap.closed else Verdict.VIOLATED) if claimed else Verdict.NOT_APPLICABLE
    return Finding(
        name="permutation of pixels",
        source="Prop. 4, Cor. 5",
        direction="forward",
        printed="paths from the permuted image are the permuted paths",
        verdict=verdict,
        figure="law of the permuted image against the permuted law",
        measured=gap.value,
        expected=0.0,
        tolerance=gap.tolerance,
        scale=(lab.ladder + lab.ladder[1:])[worst],
        note=note,
    )


def rotation(lab: Lab) -> Finding:
    """Check Proposition 9, also a case of Proposition 4: rotations by 90 degrees, on a rectangle."""
    context = None if lab.context is None else torch.rot90(lab.context, 1, (-2, -1))
    other = DenseProcess(lab.process, (lab.size[1], lab.size[0]), context)
    matrix = rotation_matrix(lab.size)
    gaps = [lab.gap(law.moved(matrix), other.marginal(t)) for t, law in zip(lab.ladder, lab.marginals, strict=True)]
    gaps += [
        lab.gap(law.moved(matrix), other.transition(s, t))
        for (s, t), law in zip(lab.steps, lab.transitions, strict=True)
    ]
    worst, gap = lab.widest(gaps)
    random = lab.noisy or lab.context is not None
    good = Verdict.IN_LAW if random else Verdict.EXACTLY
    return Finding(
        name="rotation by 90 degrees",
        source="Prop. 9" if lab.blurs else "Prop. 4",
        direction="forward",
        printed="paths from the rotated image are the rotated paths",
        verdict=good if gap.closed else Verdict.VIOLATED,
        figure="law of the rotated image against the rotated law",
        measured=gap.value,
        expected=0.0,
        tolerance=gap.tolerance,
        corrected="path by path only if the noise is rotated with the image; in law without" if random else "",
        scale=(lab.ladder + lab.ladder[1:])[worst],
        note="the guidance image is rotated with it" if lab.context is not None else "",
    )


def average_grey(lab: Lab) -> Finding:
    """Check Proposition 8: exact without noise, else in expectation; a sample's mean moves by N(0, gamma^2 / N)."""
    ones = torch.full((lab.pixels,), 1 / lab.pixels, dtype=torch.float64)
    drifts = [
        float((law.matrix.T @ ones - ones).abs().max()) * lab.pixels + abs(float(law.offset @ ones)) / lab.span
        for law in lab.chain + lab.marginals
    ]
    worst = max(range(len(drifts)), key=drifts.__getitem__)
    scale = (lab.ladder + lab.ladder)[worst]
    greys = lab.paths.mean(-1) - lab.start.mean()
    moved, wanted = float(greys[-1].std()) if lab.noisy else 0.0, float(lab.noise[-1, 0]) / math.sqrt(lab.pixels)
    error = moved / math.sqrt(2 * max(lab.samples - 1, 1))
    mean_error = moved / math.sqrt(lab.samples)
    tolerance = lab.mean_tolerance
    kept = drifts[worst] <= tolerance
    drawn = float(greys[-1].mean())
    fits = (
        abs(drawn) <= LIMIT * mean_error + lab.mean_tolerance * lab.span and abs(moved - wanted) <= LIMIT * error + 1e-9
    )
    noise_spread = (
        f"the grey value of {lab.samples} paths moves by {moved:.4g} ± {error:.2g}, gamma / sqrt(N) = {wanted:.4g}"
    )
    corrected = note = ""
    if not lab.blurs:
        verdict = Verdict.NOT_APPLICABLE
        note = "the paper claims it for processes that blur; " + (
            f"this one keeps it in expectation; {noise_spread}" if kept else "this one's grey value goes to 0 with a_t"
        )
    elif kept and fits and not lab.noisy:
        verdict = Verdict.EXACTLY
    elif kept and fits:
        verdict, note = Verdict.IN_EXPECTATION, noise_spread
        grows = float(lab.noise[-1, 0]) > 1.001 * float(lab.noise[1, 0])
        corrected = "in expectation alone; the sample mean moves by N(0, gamma_t(0)^2 / N)" + (
            ", a random walk of the scales" if grows else ""
        )
    else:
        verdict = Verdict.VIOLATED
        note = f"mean of the paths' shift {drawn:+.4g} ± {mean_error:.2g}"
        if lab.scales_grey:
            note += "; a_t < 1 scales the average grey value like all the rest, unlike in the paper's chain"
    return Finding(
        name="average grey value",
        source="Prop. 8" if not isinstance(lab.process, Osmosis) else "Prop. 8, Sect. 6.2",
        direction="forward",
        printed="all images of a path have the same average grey value",
        verdict=verdict,
        figure="drift of the mean's average grey value, of an image of ones; drawn: of this image",
        measured=drifts[worst],
        expected=0.0,
        tolerance=tolerance,
        drawn=drawn / lab.span,
        std_error=mean_error / lab.span if lab.noisy else None,
        corrected=corrected,
        scale=scale,
        eigenvalue=0.0,
        note=note,
    )


def positivity(lab: Lab) -> Finding:
    """Check that osmosis keeps positive images positive: no entry of its matrix is negative."""
    name, source, printed = "positivity", "Sect. 6.1", "positive images stay positive"
    if not isinstance(lab.process, Osmosis):
        return not_applicable(name, source, printed, "a property of osmosis")
    if lab.process.value_range[0] < 0:
        return not_applicable(name, source, printed, "images of this process are not positive")
    # with noise, only the mean can stay positive; the marginal's is used, as a step with a decay floor sharpens
    laws = lab.marginals if lab.noisy else lab.marginals + lab.transitions
    lowest = [float(law.matrix.min()) for law in laws]
    worst = min(range(len(lowest)), key=lowest.__getitem__)
    path = float(lab.paths.min())
    fine = lowest[worst] >= -lab.mean_tolerance and float(lab.chain[-1].offset.min()) >= -lab.mean_tolerance
    good = Verdict.IN_EXPECTATION if lab.noisy else Verdict.EXACTLY
    if not lab.noisy:
        fine = fine and path >= -lab.mean_tolerance
    return Finding(
        name=name,
        source=source,
        direction="forward",
        printed=printed,
        verdict=good if fine else Verdict.VIOLATED,
        figure="smallest entry of the evolution's matrix",
        measured=lowest[worst],
        expected=0.0,
        tolerance=lab.mean_tolerance,
        corrected="the mean stays positive; noise is added to it" if lab.noisy else "",
        scale=(lab.ladder + lab.ladder[1:])[worst],
        note=f"smallest pixel of the paths: {path:.3g}",
    )


def osmosis_entropy(lab: Lab) -> Finding:
    """Check Eq. (50): the relative entropy with respect to the steady state never decreases."""
    name, source, printed = "relative entropy", "Eq. (50)", "-int u ln(u / w) increases, w the steady state"
    if not isinstance(lab.process, Osmosis):
        return not_applicable(name, source, printed, "a property of osmosis")
    if lab.process.value_range[0] < 0:
        return not_applicable(name, source, printed, "images of this process are not positive")
    means = torch.stack([law.mean(lab.start) for law in lab.chain]).reshape(-1, 1, 1, *lab.size).clamp(min=0)
    steady = lab.process.steady_state(lab.images[:1].mean((-2, -1)), lab.context)
    if float(steady.min()) <= 0:
        return not_applicable(name, source, printed, "the image is black, and so is its steady state")
    values = relative_entropy(means, steady).flatten() / lab.pixels
    rises = values.diff()
    worst = int(rises.argmin())
    fine = float(rises[worst]) >= -lab.mean_tolerance
    return Finding(
        name=name,
        source=source,
        direction="forward",
        printed=printed,
        verdict=(Verdict.IN_EXPECTATION if lab.noisy else Verdict.EXACTLY) if fine else Verdict.VIOLATED,
        figure="smallest rise between scales, nats per pixel",
        measured=float(rises[worst]),
        expected=0.0,
        tolerance=lab.mean_tolerance,
        corrected="for the mean of the paths" if lab.noisy else "",
        scale=lab.ladder[worst + 1],
        note=f"from {float(values[0]):.4f} at scale 0 to {float(values[-1]):.2g} at scale 1",
    )
