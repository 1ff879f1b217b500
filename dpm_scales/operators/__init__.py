"""Operators: the functional calculus f(L) on which every process is built."""

from dpm_scales.operators.base import Decay, Operator, PixelOperator, SpectralFunction, batch_view
from dpm_scales.operators.heat import HeatOperator, dct_matrix, heat_blur

__all__ = [
    "Decay",
    "HeatOperator",
    "Operator",
    "PixelOperator",
    "SpectralFunction",
    "batch_view",
    "dct_matrix",
    "heat_blur",
]
