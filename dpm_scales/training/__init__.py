"""Training: one run, its callbacks and its folder.

The names of `dpm_scales.models` can still be imported from here, as in the first release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpm_scales import models

if TYPE_CHECKING:
    from dpm_scales.models import Model, Recipe, build_model, draw, load_model, save_model

__all__ = ["Model", "Recipe", "build_model", "draw", "load_model", "save_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(models, name)
