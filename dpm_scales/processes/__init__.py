"""Processes: the law of every forward process, and its members."""

from dpm_scales.processes.expanded import ExpandedProcess, StencilProcess
from dpm_scales.processes.law import MAX_MEAN_LEFT, Context, Process
from dpm_scales.processes.members import (
    VE,
    VP,
    Blurring,
    BlurringChain,
    Homogeneous,
    InverseHeat,
    Spectral,
    Warm,
    title_of,
)
from dpm_scales.processes.osmosis import InverseOsmosis, Osmosis, OsmosisDiffusion, OsmosisFilter
from dpm_scales.processes.steps import Gaussian, Scale, Step, as_scale, few_scales

__all__ = [
    "MAX_MEAN_LEFT",
    "VE",
    "VP",
    "Blurring",
    "BlurringChain",
    "Context",
    "ExpandedProcess",
    "Gaussian",
    "Homogeneous",
    "InverseHeat",
    "InverseOsmosis",
    "Osmosis",
    "OsmosisDiffusion",
    "OsmosisFilter",
    "Process",
    "Scale",
    "Spectral",
    "StencilProcess",
    "Step",
    "Warm",
    "as_scale",
    "few_scales",
    "title_of",
]
