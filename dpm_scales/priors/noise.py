"""A prior of noise alone."""

from __future__ import annotations

import torch
from torch import Tensor

from dpm_scales.errors import require
from dpm_scales.operators import Operator
from dpm_scales.priors.base import Prior, require_no_context
from dpm_scales.priors.start import Mixture, Start, one_like
from dpm_scales.processes import MAX_MEAN_LEFT, Context, Process
from dpm_scales.rng import CounterRNG


class GaussianPrior(Prior):
    """y_1 = gamma_1(L) eps, the process's own noise at scale 1."""

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
        require_no_context(self, process)

    def sample(
        self, process: Process, noise: CounterRNG, size: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Context]:
        self.check_kind(process)
        return process.noise_at(1.0, noise.normal(size, dtype), process.operator()), None

    def law(self, process: Process, x_0: Tensor, noise: CounterRNG) -> tuple[Start, Context]:
        def distances(operator: Operator, y: Tensor) -> Tensor:
            one = one_like(y)
            white = operator.apply(lambda mu: 1 / process.noise_scale(one, mu), y)
            return white.square().flatten(1).sum(1, keepdim=True)

        zero = torch.zeros(x_0.shape[0], dtype=torch.float64, device=x_0.device)
        return Mixture(process.operator(), zero, zero[:1, None], distances), None
