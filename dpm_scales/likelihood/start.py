"""The law of y_1 under a model's prior, with checks of the prior."""

from __future__ import annotations

from torch import Tensor

from dpm_scales.priors import Prior, Start
from dpm_scales.processes import Context, Process
from dpm_scales.rng import CounterRNG

__all__ = ["Start", "start_law"]


def start_law(prior: Prior, process: Process, x_0: Tensor, noise: CounterRNG) -> tuple[Start, Context]:
    """Return the law of y_1 and a context for each image, drawn from the inference law q(z | x_0); see `Prior.law`.

    Args:
        x_0: images ``(B, C, H, W)`` in the process's value range.
        noise: one stream for each image; used if the process has a context.

    Raises: UserError for a prior that does not suit the process, has no known density (or `noise_ratio` 0), was not
        fitted, or was fitted to images of another size.
    """
    prior.check_kind(process)
    prior.check_size((x_0.shape[-2], x_0.shape[-1]))
    return prior.law(process, x_0, noise)
