"""Check permutations, rotations and the average grey value in the reverse process: Sect. 5.2, 5.3, Peter 2024."""

from __future__ import annotations

import torch

from dpm_scales.audit.dense import DenseProcess, Law, largest, permutation_matrix, rotation_matrix
from dpm_scales.audit.lab import Finding, Gap, Lab, Verdict, not_applicable
from dpm_scales.audit.reverse import REVERSE, Return, denoiser


def invariances(lab: Lab, back: Return) -> list[Finding]:
    """Check that posteriors rotate by 90 degrees with their images, and preserve grey values like the forward process.

    Invariance under permutations depends on the network alone.
    """
    name, printed = "permutation of pixels", "permutation invariance does in general not apply to the reverse process"
    if not lab.noisy:
        why = "without noise there is no step that a network would have to learn"
        nothing = not_applicable(name, "Sect. 5.2", printed, why, REVERSE)
        return [nothing, _rotation(lab, back), _grey(lab, back)]
    order = permutation_matrix(torch.randperm(lab.pixels, generator=torch.Generator().manual_seed(lab.seed)))
    middle = len(lab.ladder) // 2
    posterior = back.posteriors[len(back.posteriors) - middle]
    step = posterior.keep + posterior.pull @ denoiser(lab, back.data[middle], middle)
    moved = float((order @ step - step @ order).abs().max())
    permutation = Finding(
        name=name,
        source="Sect. 5.2",
        direction=REVERSE,
        printed=printed,
        verdict=Verdict.NOT_APPLICABLE,
        figure="ideal step of the permuted image against the permuted step",
        measured=moved,
        expected=0.0,
        scale=lab.ladder[middle - 1],
        note="the neighbours of a pixel say what it was, whatever the forward process",
    )
    return [permutation, _rotation(lab, back), _grey(lab, back)]


def _rotation(lab: Lab, back: Return) -> Finding:
    context = None if lab.context is None else torch.rot90(lab.context, 1, (-2, -1))
    other = DenseProcess(lab.process, (lab.size[1], lab.size[0]), context)
    r = rotation_matrix(lab.size)
    gaps = []
    for (s, t), own in zip(lab.steps[::-1], back.posteriors, strict=True):
        turned = other.posterior(s, t)
        of_image = lab.gap(
            Law(own.keep, own.offset, own.covariance).moved(r), Law(turned.keep, turned.offset, turned.covariance)
        )
        of_start = Gap(largest(r @ own.pull @ r.T - turned.pull), lab.mean_tolerance)
        gaps.append(lab.widest([of_image, of_start])[1])
    worst, gap = lab.widest(gaps)
    return Finding(
        name="rotation by 90 degrees",
        source="Sect. 5.2, 5.3",
        direction=REVERSE,
        printed="the remaining properties carry over",
        verdict=(Verdict.IN_LAW if lab.noisy or lab.context is not None else Verdict.EXACTLY)
        if gap.closed
        else Verdict.VIOLATED,
        figure="posterior of rotated images against the rotated posterior",
        measured=gap.value,
        expected=0.0,
        tolerance=gap.tolerance,
        corrected="given u_0; a network has the invariances that it is built with",
        scale=lab.steps[::-1][worst][0],
    )


def _grey(lab: Lab, back: Return) -> Finding:
    drifts = [
        float((law.matrix.sum(0) - 1).abs().max()) + abs(float(law.offset.mean())) / lab.span for law in back.given
    ]
    worst = max(range(len(drifts)), key=drifts.__getitem__)
    tolerance = lab.mean_tolerance
    kept = drifts[worst] <= tolerance
    note = ""
    if not lab.blurs:
        verdict, note = Verdict.NOT_APPLICABLE, "the paper claims it for processes that blur"
    elif kept:
        verdict = Verdict.IN_EXPECTATION if lab.noisy else Verdict.EXACTLY
    else:
        verdict = Verdict.VIOLATED
    return Finding(
        name="average grey value",
        source="Prop. 8, backwards",
        direction=REVERSE,
        printed="the remaining properties carry over",
        verdict=verdict,
        figure="drift of the mean's average grey value given u_0, relative",
        measured=drifts[worst],
        expected=0.0,
        tolerance=tolerance,
        scale=lab.ladder[worst],
        eigenvalue=0.0,
        note=note,
    )
