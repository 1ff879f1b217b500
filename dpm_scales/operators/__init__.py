"""Operators: the functional calculus f(L) on which every process is built."""

from dpm_scales.operators.base import (
    Decay,
    LogCurve,
    Operator,
    PixelOperator,
    SpectralFunction,
    Term,
    Weights,
    batch_view,
)
from dpm_scales.operators.chebyshev import chebyshev_degree
from dpm_scales.operators.degrees import Degrees
from dpm_scales.operators.evolution import evolve
from dpm_scales.operators.expanded import ExpandedOperator, StencilOperator
from dpm_scales.operators.heat import HeatOperator, dct_matrix, heat_blur, spectral_of
from dpm_scales.operators.implicit import ImplicitEvolution, implicit_euler, steady_state
from dpm_scales.operators.osmosis import OsmosisOperator
from dpm_scales.operators.stencil import canonical_drift, drift_stencil

__all__ = [
    "Decay",
    "Degrees",
    "ExpandedOperator",
    "HeatOperator",
    "ImplicitEvolution",
    "LogCurve",
    "Operator",
    "OsmosisOperator",
    "PixelOperator",
    "SpectralFunction",
    "StencilOperator",
    "Term",
    "Weights",
    "batch_view",
    "canonical_drift",
    "chebyshev_degree",
    "dct_matrix",
    "drift_stencil",
    "evolve",
    "heat_blur",
    "implicit_euler",
    "spectral_of",
    "steady_state",
]
