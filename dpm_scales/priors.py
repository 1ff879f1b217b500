"""Where sampling starts: y at scale 1, and the context.

`GaussianPrior`: the process's own noise, for processes that end (almost) in noise: VP, VE, blurring diffusion.
`DataPrior`: a training image, blurred to scale 1, plus noise (IHDM): for processes that end in blur. The blurred images
are stored as the few DCT coefficients that are left of them, so an export samples without its training data.
`OsmosisPrior`: the steady state of a guidance image around a training image's mean intensity, plus noise, for the
osmosis processes. Only those intensities are stored, and what images guide with where the process asks for them.

The last two can be steered: then sampling starts from images that a user chooses, if the start shows images at all.

| prior | fits processes |
|---|---|
| GaussianPrior | those with noise, without a context, that leave at most 2 % of the mean at scale 1 if they blur |
| DataPrior | those that blur in the DCT basis, without a context |
| OsmosisPrior | those of osmosis |

Every other pair is refused when the model is built.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpm_scales.errors import UserError, is_whole, require
from dpm_scales.operators import HeatOperator
from dpm_scales.processes import MAX_MEAN_LEFT, Context, Osmosis, Process, as_scale
from dpm_scales.rng import CounterRNG
from dpm_scales.schedules import is_number

DCT = HeatOperator()
"""The basis that blurred images are stored in."""

STEERABLE = "those of heat, of blurring_constant, and of osmosis trained with process.guidance_image=own (or other)"
"""Models whose start shows an image, in words, for messages."""


class Prior(nn.Module, ABC):
    """The distribution of y_1 at scale 1, where sampling starts."""

    def check(self, process: Process) -> None:
        """Raise UserError, before any training, for a process whose law at scale 1 is not this prior's."""
        self.check_kind(process)

    def check_kind(self, process: Process) -> None:  # noqa: B027 - a prior of one's own may fit all
        """Raise UserError for a kind of process that this prior can't start, one of another operator."""

    def fit(self, images: Tensor, process: Process) -> None:
        """Fit to training images ``(N, C, H, W)`` in the process's value range, if the prior learns from data."""

    @property
    def max_images(self) -> int:
        """Number of training images that `fit` uses at most; 0 for none."""
        return 0

    def steer(self, images: Tensor, process: Process) -> None:
        """Start from these images ``(N, C, H, W)`` in place of training images: sample i from image i mod N.

        Raises: UserError if no image can choose what this prior starts from, or if they are not of the size trained on.
        """
        raise UserError(
            f"{type(process).__name__} starts from noise alone here, and no image can choose its start; models "
            f"whose start can be chosen are {STEERABLE}"
        )

    def check_size(self, size: tuple[int, int]) -> None:  # noqa: B027 - most priors serve any size
        """Raise UserError if images of `size` (H, W) can't be sampled."""

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


class GaussianPrior(Prior):
    """y_1 = gamma_1(L) eps."""

    def check(self, process: Process) -> None:
        self.check_kind(process)
        name = type(process).__name__
        require(process.has_noise(), f"GaussianPrior starts from noise, and {name} has none; set prior=data (or auto)")
        require(
            process.blur is None or process.mean_left <= MAX_MEAN_LEFT,
            f"GaussianPrior starts from noise alone, and {name} ends in blurred images: of a grey value "
            f"{process.mean_left:.3g} times the noise is left at scale 1; set prior=data (or auto)",
        )

    def check_kind(self, process: Process) -> None:
        _require_no_context(self, process)

    def sample(
        self, process: Process, noise: CounterRNG, size: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Context]:
        self.check_kind(process)
        return process.noise_at(1.0, noise.normal(size, dtype), process.operator()), None


class _FittedPrior(Prior):
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
        """Return r: by default 1, the law at scale 1, but 1.25 where the noise is constant (Rissanen et al. 2023)."""
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
        """Return the number of images that `fit` stores at most."""
        return self._max_images

    @abstractmethod
    def _store(self, images: Tensor, process: Process) -> None:
        """Store what sampling starts from, for all images ``(N, C, H, W)``."""

    def _pick(self, noise: CounterRNG, count: int) -> Tensor:
        """Return ``(B,)`` indices of stored images: at random, or in turn where a user has chosen the images."""
        return noise.numbers % count if self._in_turn else (noise.uniform() * count).long()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # the data decide how much is stored; torch still refuses other numbers of dimensions
        for name in self.stored:
            values, own = state_dict.get(prefix + name), getattr(self, name)
            if values is not None and values.ndim == own.ndim:
                setattr(self, name, own.new_zeros(values.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class DataPrior(_FittedPrior):
    """y_1 = lambda_1(L) x + r gamma_1(L) eps, x a random training image (Rissanen et al. 2023).

    Args:
        noise_ratio: r, the noise of the start over the process's own; None for 1.25 where the noise is constant (IHDM:
            delta / sigma), else 1.
        max_images: how many training images to keep.
        tolerance: coefficients that the blur scales below this are dropped.
    """

    stored: ClassVar[tuple[str, ...]] = ("coefficients",)
    coefficients: Tensor
    image_size: Tensor

    def __init__(self, noise_ratio: float | None = None, max_images: int = 10000, tolerance: float = 1e-4) -> None:
        super().__init__(noise_ratio, max_images)
        ok = is_number(tolerance) and 0 < tolerance < 1
        require(ok, f"DataPrior: tolerance must lie in (0, 1), got {tolerance!r}")
        self.tolerance = tolerance
        self.register_buffer("coefficients", torch.zeros(0, 1, 1, 1))
        self.register_buffer("image_size", torch.zeros(2, dtype=torch.int64))

    def check_kind(self, process: Process) -> None:
        _require_no_context(self, process)
        require(
            process.is_heat_blur,
            f"DataPrior starts from blurred training images and needs a process that blurs, not "
            f"{type(process).__name__}; set prior=gaussian (or auto)",
        )

    def _store(self, images: Tensor, process: Process) -> None:
        self.check_kind(process)
        operator = process.operator()
        height, width = images.shape[-2:]
        kept = process.signal_scale(1.0, operator.eigenvalues(height, width)) >= self.tolerance
        rows, columns = int(kept.any(1).sum()), int(kept.any(0).sum())
        spectrum = DCT.analysis(images.to(torch.float32))
        self.coefficients = spectrum[..., :rows, :columns].contiguous().to(self.coefficients.device)
        self.image_size = torch.tensor([height, width], device=self.coefficients.device)

    def sample(
        self, process: Process, noise: CounterRNG, size: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Context]:
        self.check_kind(process)
        operator = process.operator()
        count, channels, rows, columns = self.coefficients.shape
        require(count > 0, "DataPrior: no training images stored yet; train the model first")
        require(
            channels == size[0],
            f"this model starts from blurred training images of {channels} channel(s); it can't sample {size[0]}",
        )
        index = self._pick(noise, count)
        u = self.coefficients.new_zeros((noise.count, *size), dtype=dtype)
        u[..., :rows, :columns] = self.coefficients[index].to(dtype)
        mean = operator.apply(process.signal(as_scale(1.0, u)), DCT.synthesis(u))
        return mean + self.ratio(process) * process.noise_at(1.0, noise.normal(size, dtype), operator), None

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise UserError unless images of `size` (H, W) were fitted."""
        trained = tuple(self.image_size.tolist())
        require(
            trained == tuple(size),
            f"this model starts from blurred training images of {trained[0]}x{trained[1]} pixels; "
            f"it can't sample {size[0]}x{size[1]}",
        )
        rows, columns = self.coefficients.shape[-2:]
        require(
            rows <= size[0] and columns <= size[1],
            f"this model's prior has {rows}x{columns} coefficients of images of {size[0]}x{size[1]} pixels: its file "
            "is damaged; train it again",
        )


class OsmosisPrior(_FittedPrior):
    """y_1 = lambda_1(0) V^{-1/2} (v m) + r gamma_1(L) eps.

    m are the mean intensities of a random training image, v is the guidance image that the process draws around them,
    of mean one. Where images guide, the same training image does, or any other with `guidance_image="other"`. The
    buffer `grey` holds the mean intensities, `relief` the detail of the images that guide.

    Args:
        noise_ratio: r, the noise of the start over the process's own.
        max_images: how many training images to take the mean intensity of, and at most 1000 that guide.
    """

    max_guides: ClassVar[int] = 1000

    stored: ClassVar[tuple[str, ...]] = ("grey", "relief")
    grey: Tensor
    relief: Tensor

    def __init__(self, noise_ratio: float = 1.0, max_images: int = 10000) -> None:
        require(noise_ratio is not None, "OsmosisPrior: noise_ratio must be >= 0, got None")
        super().__init__(noise_ratio, max_images)
        self.register_buffer("grey", torch.zeros(0, 1))
        self.register_buffer("relief", torch.zeros(0, 1, 1, 1))

    def check_kind(self, process: Process) -> None:
        as_osmosis(process)

    def steer(self, images: Tensor, process: Process) -> None:
        osmosis = as_osmosis(process)
        require(
            osmosis.guidance.image != "none",
            f"this model's {type(process).__name__} takes an image's mean grey values alone, and no image can choose "
            f"its start; models whose start can be chosen are {STEERABLE}",
        )
        super().steer(images, process)

    def _limit(self, process: Process) -> int:
        guides = as_osmosis(process).guidance.image != "none"
        return min(self.max_images, self.max_guides) if guides else self.max_images

    def _store(self, images: Tensor, process: Process) -> None:
        images, device = images.to(torch.float32), self.grey.device
        detail = as_osmosis(process).guidance_detail(images)
        self.grey = images.mean((-2, -1)).to(device)
        if detail is not None:
            self.relief = detail.to(device)

    def sample(
        self, process: Process, noise: CounterRNG, size: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Context]:
        osmosis = as_osmosis(process)
        count, channels = self.grey.shape
        require(count > 0, "OsmosisPrior: no grey values stored yet; train the model first")
        require(channels == size[0], f"this model was trained on {channels} channel(s); it can't sample {size[0]}")
        one = torch.ones((), dtype=torch.float64, device=noise.device)
        index = self._pick(noise, count)
        mean, detail = self.grey[index].to(dtype), None
        if len(self.relief) > 0:
            self.check_size(size[1:])
            guides = self._pick(noise, count) if osmosis.guidance.image == "other" else index
            detail = self.relief[guides].to(dtype)
        context = osmosis.draw_guidance(mean, noise.normal(size, dtype), detail)
        operator = osmosis.operator(context)
        signal = osmosis.signal_scale(one, torch.zeros_like(one)).to(dtype)
        start = signal * operator.to_white(osmosis.steady_state(mean, context))
        return start + self.ratio(process) * osmosis.noise_at(1.0, noise.normal(size, dtype), operator), context

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise UserError unless images of `size` (H, W) were fitted, where images guide."""
        trained = tuple(self.relief.shape[-2:])
        require(
            len(self.relief) == 0 or trained == tuple(size),
            f"this model is guided by images of {trained[0]}x{trained[1]} pixels; it can't sample {size[0]}x{size[1]}",
        )
        require(
            len(self.relief) == 0 or self.relief.shape[:2] == self.grey.shape,
            f"this model's prior has {tuple(self.grey.shape)} grey values and {tuple(self.relief.shape[:2])} guidance "
            "images: its file is damaged; train it again",
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # models from before images could guide have none
        state_dict.setdefault(prefix + "relief", torch.zeros(0, 1, 1, 1))
        super()._load_from_state_dict(state_dict, prefix, *args)


def as_osmosis(process: Process) -> Osmosis:
    """Return the process as one of osmosis. Raises UserError for any other."""
    if not isinstance(process, Osmosis):
        raise UserError(
            f"OsmosisPrior starts from guidance images and needs an osmosis process, not {type(process).__name__}; "
            "set prior=auto"
        )
    return process


def _require_no_context(prior: Prior, process: Process) -> None:
    require(
        not process.has_context,
        f"{type(prior).__name__} draws no context (guidance image), and {type(process).__name__} needs one for every "
        "sample; set prior=auto",
    )


def auto_prior(process: Process) -> Prior:
    """Return the prior that fits the process, see `Process.default_prior`."""
    kinds: dict[str, type[Prior]] = {"gaussian": GaussianPrior, "data": DataPrior, "guidance": OsmosisPrior}
    return kinds[process.default_prior()]()


GuidancePrior = OsmosisPrior
"""The name of the first release."""
