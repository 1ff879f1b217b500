"""Hold the parts of a model together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

from torch import nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.errors import require
from dpm_scales.models.parts import described
from dpm_scales.models.recipe import Recipe
from dpm_scales.priors import Prior
from dpm_scales.samplers import Sampler


class Parts(nn.Module):
    """The parts of a model and its recipe; state and parameters are those of denoiser and prior.

    Attributes:
        denoiser: network, process and target.
        prior: where sampling starts.
        sampler: the default sampler; another one that fits can be assigned.
        recipe: describes all of them.
    """

    denoiser: Denoiser
    prior: Prior
    recipe: Recipe
    _sampler: Sampler

    @property
    def sampler(self) -> Sampler:
        """The default sampler. Setting it updates the recipe; raises UserError if it does not fit the denoiser."""
        return self._sampler

    @sampler.setter
    def sampler(self, sampler: Sampler) -> None:
        if "recipe" in self.__dict__:
            require(isinstance(sampler, Sampler), f"sampler must be a Sampler, got {sampler!r:.100}; see with_sampler")
            sampler.check(self.denoiser)
            self.recipe = replace(self.recipe, parts={**self.recipe.parts, "sampler": described(sampler)})
        self._sampler = sampler

    @classmethod
    def of(cls, denoiser: Denoiser, prior: Prior, sampler: Sampler, recipe: Recipe) -> Self:
        """Return a model made of parts that fit each other and the recipe."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        # in the order of their names in files
        model.denoiser, model.prior = denoiser, prior
        model.sampler, model.recipe = sampler, recipe
        return model

    def replaced(self, **parts: Any) -> Self:
        """Return a model with some of the parts replaced; it shares the others."""
        own = {name: getattr(self, name) for name in ("denoiser", "prior", "sampler", "recipe")}
        model = type(self).of(**{**own, **parts})
        model.training = self.training
        return model
