"""Training: the LightningModule, callbacks, runs, exports; everything that knows Lightning and Hydra.

What it offers is imported when it is asked for: the command line says its help, and what is wrong with it, without
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpm_scales.training.export import Model, Recipe, build_model, load_model, save_model
    from dpm_scales.training.sampling import draw

__all__ = ["Model", "Recipe", "build_model", "draw", "load_model", "save_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'sampling' if name == 'draw' else 'export'}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
