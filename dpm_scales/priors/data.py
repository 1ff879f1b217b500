"""A prior of blurred training images."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dpm_scales.errors import require
from dpm_scales.operators import HeatOperator, Operator
from dpm_scales.priors.base import FittedPrior, require_no_context
from dpm_scales.priors.start import Mixture, Start, one_like, squared_distances
from dpm_scales.processes import Context, Process, as_scale
from dpm_scales.rng import CounterRNG
from dpm_scales.schedules import is_number

DCT = HeatOperator()
"""The basis in which blurred images are stored."""


class DataPrior(FittedPrior):
    """y_1 = lambda_1(L) x + r gamma_1(L) eps, x a random training image (Rissanen et al. 2023).

    Args:
        noise_ratio: r, the noise of the start relative to the process's; None for 1.25 under constant noise (IHDM:
            delta / sigma), else 1.
        max_images: number of training images to store.
        tolerance: DCT coefficients whose factor lambda_1 is below this are dropped.
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
        require_no_context(self, process)
        require(
            process.clock is None or process.blur is None,
            f"DataPrior starts from images blurred by one time for all frequencies, and {type(process).__name__} has a "
            "clock; leave process/clock out, or take a process that ends in noise, such as blurring",
        )
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

    def law(self, process: Process, x_0: Tensor, noise: CounterRNG) -> tuple[Start, Context]:
        def distances(operator: Operator, y: Tensor) -> Tensor:
            # coefficients that are not stored are 0
            one = one_like(y)
            mu = operator.eigenvalues(y.shape[-2], y.shape[-1], y.device)
            std = process.noise_scale(one, mu).expand(mu.shape)
            rows, columns = self.coefficients.shape[-2:]
            kept = (slice(None), slice(None), slice(rows), slice(columns))
            scale = (process.signal_scale(one, mu) / std)[:rows, :columns]
            centres = scale * self.coefficients.to(torch.float64)
            u = DCT.analysis(y) / std
            rest = u.square().flatten(1).sum(1) - u[kept].square().flatten(1).sum(1)
            return rest[:, None] + squared_distances(u[kept].flatten(1), centres.flatten(1))

        log_weights = self._require_density(process, x_0.shape[1])
        zero = torch.zeros(x_0.shape[0], dtype=torch.float64, device=x_0.device)
        return Mixture(process.operator(), zero, log_weights, distances, self.ratio(process)), None
