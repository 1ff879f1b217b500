"""Check every proposition and property of Peter 2024 for any process, forward and reverse.

Each finding compares a closed form with independent results: laws composed as matrices from the transitions of the
public interface (see `dense`), and random paths. Small images make both cheap, and the laws hold at any size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpm_scales.audit import forward, invariances, reverse, reverse_invariances
from dpm_scales.audit.findings import Finding, Verdict
from dpm_scales.audit.lab import Lab
from dpm_scales.audit.steady import steady_state, variance_bound
from dpm_scales.audit.transitions import preserving, reverse_step
from dpm_scales.errors import require
from dpm_scales.processes import Process

__all__ = ["Finding", "Verdict", "audit"]

CHECKS = (
    forward.initial_state,
    forward.markov,
    forward.initial_transition,
    preserving,
    forward.semigroup,
    forward.conditional_entropy,
    forward.entropy_condition,
    forward.entropy_formula,
    invariances.permutation,
    steady_state,
    variance_bound,
    invariances.average_grey,
    invariances.rotation,
    invariances.positivity,
    invariances.osmosis_entropy,
    reverse_step,
    reverse.initial_state,
    reverse.semigroup,
    reverse.image_entropy,
    reverse.data_entropy,
    reverse.entropy_bounds,
    reverse.steady_state,
    reverse_invariances.permutation,
    reverse_invariances.rotation,
    reverse_invariances.average_grey,
)


@torch.no_grad()
def audit(process: Process, images: Tensor, seed: int = 0, samples: int = 1000) -> list[Finding]:
    """Check the statements of the paper for one process and return the findings.

    Args:
        process: any process with any schedule; it is not modified.
        images: uint8 ``(B, C, H, W)``; scaled down to at most 6 x 9 pixels.
        seed: seed of the guidance image and the random paths.
        samples: number of random paths, at least 100.

    Returns: findings of the forward direction in the paper's order, then of the reverse direction.
    Raises: UserError for images that are not a uint8 batch or have fewer than 2 x 2 pixels, for fewer than 100 samples,
    and for a process in which only some frequencies have noise, so that it has no densities to compare.
    """
    _require_density(process)
    fits = images.ndim == 4 and images.dtype == torch.uint8 and len(images) > 0 and min(images.shape[-2:]) >= 2
    require(fits, f"audit: images must be uint8 (B, C, H, W) of 2 x 2 pixels or more, got {tuple(images.shape)}")
    require(samples >= 100, f"audit: samples must be at least 100, got {samples}")
    lab = Lab(process, images, seed, samples)
    return [check(lab) for check in CHECKS]


def _require_density(process: Process) -> None:
    """Raise UserError if at some scale some frequencies have noise and others have none."""
    mu = process.operator().eigenvalues(8, 8).flatten()
    t = torch.linspace(1 / process.num_scales, 1, 100, dtype=torch.float64)
    silent = torch.isneginf(process.log_noise_scale(t, mu))
    require(
        bool((silent.all(-1) | ~silent.any(-1)).all()),
        f"audit: {type(process).__name__} has frequencies without noise at scales where others have some, so its "
        "images have no density to check; if that is by a clock, set process.clock.spread=0 or leave it out",
    )
