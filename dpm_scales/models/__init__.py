"""Build models from configs, sample them, and save and load them.

    model = load_model("runs/default")
    images = torch.cat(list(draw(model, num_samples=64, seed=0)))

Public names are imported on first use, so that `dpm_scales.models.instantiate` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpm_scales.models.generate import draw
    from dpm_scales.models.io import load_model, save_model
    from dpm_scales.models.model import Model, Recipe, build_model
    from dpm_scales.models.push import push_model
    from dpm_scales.models.to_diffusers import export_diffusers

__all__ = ["Model", "Recipe", "build_model", "draw", "export_diffusers", "load_model", "push_model", "save_model"]
_PLACES = {
    "draw": "generate",
    "export_diffusers": "to_diffusers",
    "load_model": "io",
    "push_model": "push",
    "save_model": "io",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'model')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
