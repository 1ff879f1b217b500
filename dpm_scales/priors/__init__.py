"""Priors, from which sampling starts: y at scale 1, and the context.

`GaussianPrior`: the process's own noise, for processes that end (almost) in noise: VP, VE, blurring diffusion.
`DataPrior`: a training image, blurred to scale 1, plus noise (IHDM), for processes that end in blur. The blurred images
are stored as the few DCT coefficients that remain, so an export can sample without its training data.
`OsmosisPrior`: the steady state of a guidance image around a training image's mean intensity, plus noise, for the
osmosis processes. Only those intensities are stored, and the images' guidance detail if the process uses it.
`ContextPrior`: the process's own noise, with contexts of training images, for any other process with a context.

The last three can be steered: sampling then starts from images that a user chooses, if the start shows images at all.

| prior | fits processes |
|---|---|
| GaussianPrior | those with noise, without a context, that leave at most 2 % of the mean at scale 1 if they blur |
| DataPrior | those that blur in the DCT basis, without a context |
| OsmosisPrior | those of osmosis |
| ContextPrior | those with a context |

Any other combination is refused when the model is built. `Prior.law` is the density of the start, for likelihoods.
"""

from __future__ import annotations

from dpm_scales.priors.base import Prior
from dpm_scales.priors.context import ContextPrior
from dpm_scales.priors.data import DataPrior
from dpm_scales.priors.noise import GaussianPrior
from dpm_scales.priors.osmosis import OsmosisPrior
from dpm_scales.priors.start import Mixture, Start
from dpm_scales.processes import Process

__all__ = [
    "ContextPrior",
    "DataPrior",
    "GaussianPrior",
    "GuidancePrior",
    "Mixture",
    "OsmosisPrior",
    "Prior",
    "Start",
    "auto_prior",
]


def auto_prior(process: Process) -> Prior:
    """Return the prior that fits the process, see `Process.default_prior`."""
    kinds: dict[str, type[Prior]] = {
        "gaussian": GaussianPrior,
        "data": DataPrior,
        "guidance": OsmosisPrior,
        "context": ContextPrior,
    }
    return kinds[process.default_prior()]()


GuidancePrior = OsmosisPrior
"""Name of `OsmosisPrior` in the first release."""
