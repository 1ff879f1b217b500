"""Check permutations, rotations and the average grey value in the reverse process: Sect. 5.2, 5.3, Peter 2024."""

from __future__ import annotations

import torch

from dpm_scales.audit.dense import Law, largest, permutation_matrix, rotation_matrix
from dpm_scales.audit.findings import Verdict
from dpm_scales.audit.lab import Gap, Lab
from dpm_scales.audit.reverse import reverse
from dpm_scales.audit.statements import Measured

CARRIES_OVER = "the remaining properties carry over"


@reverse(
    "permutation of pixels",
    "Sect. 5.2",
    "permutation invariance does in general not apply to the reverse process",
    "ideal step of the permuted image against the permuted step",
    without_noise="without noise there is no step that a network would have to learn",
)
def permutation(lab: Lab) -> Measured:
    """Measure how a permutation changes the ideal step; the paper claims no invariance: it depends on the network."""
    order = permutation_matrix(torch.randperm(lab.pixels, generator=torch.Generator().manual_seed(lab.seed)))
    middle = len(lab.ladder) // 2
    posterior = lab.back.posteriors[len(lab.back.posteriors) - middle]
    step = posterior.keep + posterior.pull @ lab.denoiser(lab.back.data[middle], middle)
    moved, note = largest(order @ step - step @ order), "estimates of a pixel depend on its neighbours, whatever the"
    return Measured(Verdict.NOT_APPLICABLE, True, moved, scale=lab.ladder[middle - 1], note=f"{note} forward process")


@reverse(
    "rotation by 90 degrees",
    "Sect. 5.2, 5.3",
    CARRIES_OVER,
    "posterior of rotated images against the rotated posterior",
)
def rotation(lab: Lab) -> Measured:
    """Check that posteriors rotate by 90 degrees with their images."""
    r, other, gaps = rotation_matrix(lab.size), lab.rotated(), []
    for (s, t), own in zip(lab.steps[::-1], lab.back.posteriors, strict=True):
        turned = other.posterior(s, t)
        of_image = lab.gap(
            Law(own.keep, own.offset, own.covariance).moved(r), Law(turned.keep, turned.offset, turned.covariance)
        )
        of_start = Gap(largest(r @ own.pull @ r.T - turned.pull), lab.mean_tolerance)
        gaps.append(lab.widest([of_image, of_start])[1])
    worst, gap = lab.widest(gaps)
    return Measured(
        Verdict.IN_LAW if lab.noisy or lab.context is not None else Verdict.EXACTLY,
        gap.closed,
        gap.value,
        gap.tolerance,
        corrected="given u_0; a network has the invariances of its architecture",
        scale=lab.steps[::-1][worst][0],
    )


@reverse(
    "average grey value",
    "Prop. 8, backwards",
    CARRIES_OVER,
    "drift of the mean's average grey value given u_0, relative",
)
def average_grey(lab: Lab) -> Measured:
    """Check that posteriors preserve grey values like the forward process."""
    drifts = [
        float((law.matrix.sum(0) - 1).abs().max()) + abs(float(law.offset.mean())) / lab.span for law in lab.back.given
    ]
    worst = drifts.index(max(drifts))
    kept, note, verdict = drifts[worst] <= lab.mean_tolerance, "", Verdict.EXACTLY
    if not lab.blurs:
        kept, note, verdict = True, "the paper claims it for processes that blur", Verdict.NOT_APPLICABLE
    elif lab.noisy:
        verdict = Verdict.IN_EXPECTATION
    return Measured(
        verdict, kept, drifts[worst], lab.mean_tolerance, scale=lab.ladder[worst], eigenvalue=0.0, note=note
    )
