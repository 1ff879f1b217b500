"""Check invariances (Sect. 5.1, 5.3) and properties of osmosis (Sect. 6) of the forward direction, Peter 2024."""

from __future__ import annotations

import math

import torch

from dpm_scales.audit.dense import permutation_matrix, rotation_matrix
from dpm_scales.audit.findings import Verdict
from dpm_scales.audit.lab import LIMIT, Lab
from dpm_scales.audit.statements import Measured, by_blur, statement
from dpm_scales.metrics import relative_entropy


@statement(
    "permutation of pixels",
    "Prop. 4, Cor. 5",
    "paths from the permuted image are the permuted paths",
    "law of the permuted image against the permuted law",
)
def permutation(lab: Lab) -> Measured:
    """Check Proposition 4 and Corollary 5, which hold if pixels do not interact."""
    order = torch.randperm(lab.pixels, generator=torch.Generator().manual_seed(lab.seed))
    matrix = permutation_matrix(order)
    worst, gap = lab.widest([lab.gap(law.moved(matrix), law) for law in lab.marginals + lab.transitions])
    note = "blur makes neighbouring pixels interact; Sect. 5.3 makes no such claim" if lab.blurs else ""
    verdict = Verdict.NOT_APPLICABLE if lab.blurs else Verdict.EXACTLY
    where = (lab.ladder + lab.ladder[1:])[worst]
    return Measured(verdict, lab.blurs or gap.closed, gap.value, gap.tolerance, scale=where, note=note)


@statement(
    "rotation by 90 degrees",
    by_blur("Prop. 4", "Prop. 9"),
    "paths from the rotated image are the rotated paths",
    "law of the rotated image against the rotated law",
)
def rotation(lab: Lab) -> Measured:
    """Check Proposition 9, which is also a case of Proposition 4: rotations by 90 degrees, on a rectangle."""
    matrix, other = rotation_matrix(lab.size), lab.rotated()
    turned = [other.marginal(t) for t in lab.ladder] + [other.transition(s, t) for s, t in lab.steps]
    laws = zip(lab.marginals + lab.transitions, turned, strict=True)
    worst, gap = lab.widest([lab.gap(law.moved(matrix), law_turned) for law, law_turned in laws])
    random = lab.noisy or lab.context is not None
    return Measured(
        Verdict.IN_LAW if random else Verdict.EXACTLY,
        gap.closed,
        gap.value,
        gap.tolerance,
        corrected="path by path only if the noise is rotated with the image; in law without" if random else "",
        scale=(lab.ladder + lab.ladder[1:])[worst],
        note="the guidance image is rotated with it" if lab.context is not None else "",
    )


@statement(
    "average grey value",
    lambda lab: "Prop. 8, Sect. 6.2" if lab.guided else "Prop. 8",
    "all images of a path have the same average grey value",
    "drift of the mean's average grey value, of an image of ones; drawn: of this image",
)
def average_grey(lab: Lab) -> Measured:
    """Check Proposition 8: exact without noise, else in expectation; a sample's mean moves by N(0, gamma^2 / N)."""
    ones = torch.full((lab.pixels,), 1 / lab.pixels, dtype=torch.float64)
    drifts = [
        float((law.matrix.T @ ones - ones).abs().max()) * lab.pixels + abs(float(law.offset @ ones)) / lab.span
        for law in lab.chain + lab.marginals
    ]
    worst = drifts.index(max(drifts))
    greys = lab.paths.mean(-1) - lab.start.mean()
    moved, wanted = float(greys[-1].std()) if lab.noisy else 0.0, float(lab.noise[-1, 0]) / math.sqrt(lab.pixels)
    error, mean_error = moved / math.sqrt(2 * max(lab.samples - 1, 1)), moved / math.sqrt(lab.samples)
    kept, drawn = drifts[worst] <= lab.mean_tolerance, float(greys[-1].mean())
    fits = kept and abs(drawn) <= LIMIT * mean_error + lab.mean_tolerance * lab.span
    fits = fits and abs(moved - wanted) <= LIMIT * error + 1e-9
    spread = f"the grey value of {lab.samples} paths moves by {moved:.4g} ± {error:.2g}, gamma / sqrt(N) = {wanted:.4g}"
    verdict = Verdict.IN_EXPECTATION if lab.noisy else Verdict.EXACTLY
    corrected = note = ""
    if not lab.blurs:
        verdict, fits = Verdict.NOT_APPLICABLE, True
        note = "the paper claims it for processes that blur; " + (
            f"this one keeps it in expectation; {spread}" if kept else "this one's grey value goes to 0 with a_t"
        )
    elif fits and lab.noisy:
        note, corrected = spread, "in expectation alone; the sample mean moves by N(0, gamma_t(0)^2 / N)"
        if float(lab.noise[-1, 0]) > 1.001 * float(lab.noise[1, 0]):
            corrected += ", a random walk of the scales"
    elif not fits:
        note = f"mean of the paths' shift {drawn:+.4g} ± {mean_error:.2g}"
        if lab.scales_grey:
            note += "; a_t < 1 scales the average grey value like all other frequencies, unlike in the paper's chain"
    return Measured(
        verdict,
        fits,
        drifts[worst],
        lab.mean_tolerance,
        drawn=(drawn / lab.span, mean_error / lab.span if lab.noisy else None),
        corrected=corrected,
        scale=(lab.ladder + lab.ladder)[worst],
        eigenvalue=0.0,
        note=note,
    )


def _beyond_osmosis(lab: Lab) -> str:
    """Return why a property of positive images under osmosis does not apply; empty if it does."""
    if not lab.guided:
        return "a property of osmosis"
    return "images of this process are not positive" if lab.process.value_range[0] < 0 else ""


@statement("positivity", "Sect. 6.1", "positive images stay positive", "smallest entry of the evolution's matrix")
def positivity(lab: Lab) -> Measured | str:
    """Check that osmosis keeps positive images positive: no entry of its matrix is negative."""
    if why := _beyond_osmosis(lab):
        return why
    # with noise, only the mean can stay positive; that of the marginals is used, since steps with a decay floor sharpen
    laws = lab.marginals if lab.noisy else lab.marginals + lab.transitions
    lowest, path = [float(law.matrix.min()) for law in laws], float(lab.paths.min())
    bounded = [min(lowest), float(lab.chain[-1].offset.min()), *([] if lab.noisy else [path])]
    return Measured(
        Verdict.IN_EXPECTATION if lab.noisy else Verdict.EXACTLY,
        all(value >= -lab.mean_tolerance for value in bounded),
        min(lowest),
        lab.mean_tolerance,
        corrected="the mean stays positive; noise is added to it" if lab.noisy else "",
        scale=(lab.ladder + lab.ladder[1:])[lowest.index(min(lowest))],
        note=f"smallest pixel of the paths: {path:.3g}",
    )


@statement(
    "relative entropy",
    "Eq. (50)",
    "-int u ln(u / w) increases, w the steady state",
    "smallest rise between scales, nats per pixel",
)
def osmosis_entropy(lab: Lab) -> Measured | str:
    """Check Eq. (50): the relative entropy with respect to the steady state never decreases."""
    if why := _beyond_osmosis(lab):
        return why
    if float(lab.steady.min()) <= 0:
        return "the image is black, and so is its steady state"
    means = torch.stack([law.mean(lab.start) for law in lab.chain]).reshape(-1, 1, 1, *lab.size).clamp(min=0)
    values = relative_entropy(means, lab.steady).flatten() / lab.pixels
    rises = values.diff()
    worst = int(rises.argmin())
    return Measured(
        Verdict.IN_EXPECTATION if lab.noisy else Verdict.EXACTLY,
        float(rises[worst]) >= -lab.mean_tolerance,
        float(rises[worst]),
        lab.mean_tolerance,
        corrected="for the mean of the paths" if lab.noisy else "",
        scale=lab.ladder[worst + 1],
        note=f"from {float(values[0]):.4f} at scale 0 to {float(values[-1]):.2g} at scale 1",
    )
