"""Likelihoods of images under a denoiser: a variational bound, and the probability flow; see docs/likelihood.md."""

from dpm_scales.likelihood.bound import REVERSE, Likelihood, VariationalBound
from dpm_scales.likelihood.decoder import negative_log_likelihood, wiener_std
from dpm_scales.likelihood.flow import FlowLikelihood, flow_scales, follow_flow
from dpm_scales.likelihood.start import Start, start_law

__all__ = [
    "REVERSE",
    "FlowLikelihood",
    "Likelihood",
    "Start",
    "VariationalBound",
    "flow_scales",
    "follow_flow",
    "negative_log_likelihood",
    "start_law",
    "wiener_std",
]
