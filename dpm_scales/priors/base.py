"""Base class of all priors, and of those that store summaries of the training images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpm_scales.describe import Describable
from dpm_scales.errors import UserError, is_whole, require
from dpm_scales.priors.start import Start
from dpm_scales.processes import Context, Process
from dpm_scales.rng import CounterRNG
from dpm_scales.schedules import is_number

STEERABLE = "those of heat, of blurring_constant, and of osmosis trained with process.guidance_image=own (or other)"
"""Description, for messages, of the models whose start shows an image."""


class Prior(Describable, nn.Module, ABC):
    """The distribution of y_1 at scale 1, from which sampling starts."""

    def check(self, process: Process) -> None:
        """Raise UserError, before any training, for a process whose law at scale 1 is not this prior's."""
        self.check_kind(process)

    def check_kind(self, process: Process) -> None:  # noqa: B027 - a custom prior may suit all processes
        """Raise UserError for a kind of process that this prior can't start, such as one of another operator."""

    def fit(self, images: Tensor, process: Process) -> None:
        """Fit to training images ``(N, C, H, W)`` in the process's value range, if the prior learns from data."""

    @property
    def max_images(self) -> int:
        """Return the largest number of training images that `fit` uses; 0 if it uses none."""
        return 0

    def steer(self, images: Tensor, process: Process) -> None:
        """Start from these images ``(N, C, H, W)`` in place of training images: sample i from image i mod N.

        Raises: UserError if this prior's start does not depend on images, or if these are not of the training size.
        """
        raise UserError(
            f"{type(process).__name__} starts from noise alone here, and no image can choose its start; models "
            f"whose start can be chosen are {STEERABLE}"
        )

    def check_size(self, size: tuple[int, int]) -> None:  # noqa: B027 - most priors serve any size
        """Raise UserError if images of `size` (H, W) can't be sampled."""

    def law(self, process: Process, x_0: Tensor, noise: CounterRNG) -> tuple[Start, Context]:
        """Return the law of y_1, and a context for each image, drawn from the inference law q(z | x_0).

        Args:
            x_0: images ``(B, C, H, W)`` in the process's value range.
            noise: one stream for each image; used if the process has a context.

        Raises: UserError for a prior whose density is not known.
        """
        raise UserError(f"the density of the prior {type(self).__name__} is not known, so there is no likelihood")

    @abstractmethod
    def sample(
        self, process: Process, noise: CounterRNG, size: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Context]:
        """Draw y_1 and the context.

        Args:
            noise: one stream for each sample.
            size: (C, H, W).

        Returns: y_1 ``(B, C, H, W)`` in whitened coordinates, and the context or None.
        """


class FittedPrior(Prior):
    """A prior that stores a summary of each training image in the buffers `stored`, and adds noise to it."""

    stored: ClassVar[tuple[str, ...]]

    def __init__(self, noise_ratio: float | None, max_images: int) -> None:
        super().__init__()
        name = type(self).__name__
        ok = noise_ratio is None or (is_number(noise_ratio) and noise_ratio >= 0)
        require(ok, f"{name}: noise_ratio must be >= 0 or null, got {noise_ratio!r}")
        ok = is_whole(max_images, 1)
        require(ok, f"{name}: max_images must be a whole number >= 1, got {max_images!r}")
        self.noise_ratio, self._max_images = None if noise_ratio is None else float(noise_ratio), max_images
        self._in_turn = False

    def ratio(self, process: Process) -> float:
        """Return r: by default 1, the law at scale 1, or 1.25 under constant noise (Rissanen et al. 2023)."""
        if self.noise_ratio is not None:
            return self.noise_ratio
        return 1.25 if process.has_constant_noise() else 1.0

    @property
    def max_images(self) -> int:
        return self._max_images

    def fit(self, images: Tensor, process: Process) -> None:
        self._store(images[: self._limit(process)], process)
        self._in_turn = False

    def steer(self, images: Tensor, process: Process) -> None:
        self.check_size((images.shape[-2], images.shape[-1]))
        self._store(images, process)  # all of them, however many
        self._in_turn = True

    def _limit(self, process: Process) -> int:
        """Return the largest number of images that `fit` stores."""
        return self._max_images

    @abstractmethod
    def _store(self, images: Tensor, process: Process) -> None:
        """Store the summary from which sampling starts, for all images ``(N, C, H, W)``."""

    def _require_density(self, process: Process, channels: int) -> Tensor:
        """Return the log weights log(1 / M) of the M stored images, float64 ``(1, M)``.

        Raises: UserError without stored images, without noise, and if the stored images don't have `channels` channels.
        """
        name, stored = type(self).__name__, getattr(self, self.stored[0])
        require(len(stored) > 0, f"{name}: no training images stored yet; train the model first")
        require(
            self.ratio(process) > 0,
            f"{name}: noise_ratio=0 leaves no density at scale 1, so there is no likelihood; raise it",
        )
        require(stored.shape[1] == channels, f"{name} has images of {stored.shape[1]} channel(s), not of {channels}")
        return torch.full((1, len(stored)), -math.log(len(stored)), dtype=torch.float64, device=stored.device)

    def _pick(self, noise: CounterRNG, count: int) -> Tensor:
        """Return ``(B,)`` indices of stored images: random ones, or in order if a user has chosen the images."""
        return noise.numbers % count if self._in_turn else (noise.uniform() * count).long()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # the size of the buffers depends on the data; torch still refuses another number of dimensions
        for name in self.stored:
            values, own = state_dict.get(prefix + name), getattr(self, name)
            if values is not None and values.ndim == own.ndim:
                setattr(self, name, own.new_zeros(values.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def require_no_context(prior: Prior, process: Process) -> None:
    """Raise UserError for a process with a context, which the prior does not draw."""
    require(
        not process.has_context,
        f"{type(prior).__name__} draws no context (guidance image), and {type(process).__name__} needs one for every "
        "sample; set prior=auto",
    )
