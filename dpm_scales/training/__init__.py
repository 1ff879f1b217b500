"""Training: the LightningModule, callbacks, runs, exports; everything that knows Lightning and Hydra."""

from dpm_scales.training.export import Model, Recipe, build_model, load_model, save_model
from dpm_scales.training.sampling import draw

__all__ = ["Model", "Recipe", "build_model", "draw", "load_model", "save_model"]
