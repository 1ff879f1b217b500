"""One sampler of each kind, by name."""

from __future__ import annotations

from collections.abc import Callable

from dpm_scales.samplers import DDIM, Ancestral, Cold, Dissipation, Heun, Sampler

SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "ancestral": Ancestral,
    "ddim-0": lambda: DDIM(0.0, None),
    "ddim-0.4": lambda: DDIM(0.4, None),
    "heun": lambda: Heun(None, "uniform"),
    "dissipation": Dissipation,
    "cold": Cold,
}
