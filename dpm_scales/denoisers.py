"""A denoiser is a network with its meaning: process, target and preconditioning.

clean(y_t, t, s)   m_s = lambda_s(L) y_0-hat, all that a sampler needs
loss(x_0, t)       what training minimises, one value per image
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpm_scales.operators import Operator
from dpm_scales.processes import Context, Process
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.targets import Target, moments


class Denoiser(nn.Module):
    """Network + process + target.

    Args:
        network: ``forward(x, t, labels)``, x ``(B, C + context, H, W)``, t ``(B,)`` in [0, 1]; gives ``(B, C, H, W)``.
        process: the forward law.
        target: what the network's output means.
        data_std: standard deviation of the training images' pixels in the process's value range, > 0; how it is spread
            over the frequencies is measured from images, see `DataSpectrum`.

    Raises: UserError for another data_std, and if the process can't be learnt through the target.
    """

    def __init__(self, network: nn.Module, process: Process, target: Target, data_std: float = 0.5) -> None:
        super().__init__()
        target.check(process)
        self.network, self.process, self.target = network, process, target
        self.spectrum = DataSpectrum(data_std)
        # for white data; the measured spectrum bends the filter little
        scales = torch.arange(1, process.num_scales + 1, dtype=torch.float64) / process.num_scales
        wiener = target.scalings(moments(process, process.operator(), scales, self.spectrum, (8, 8))).filter
        self._degree = 0 if wiener is None else process.degree_of(wiener)

    def _predict(
        self, operator: Operator, y_t: Tensor, t: Tensor, context: Context, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Prediction and loss weight; t is ``(B,)``."""
        size, dtype = (y_t.shape[-2], y_t.shape[-1]), y_t.dtype
        c = self.target.scalings(moments(self.process, operator, t, self.spectrum, size))
        z = operator.to_pixels(y_t if c.filter is None else operator.at_degree(self._degree).apply(c.filter, y_t))
        seen = c.inner.to(dtype) * z
        features = self.process.context_features(context)
        if features is not None:
            seen = torch.cat([seen, features], 1)
        output = self.network(seen, t.to(dtype), labels).to(dtype)
        return c.skip.to(dtype) * z + c.out.to(dtype) * output, c.weight.to(dtype)

    def clean(self, y_t: Tensor, t: Tensor, s: Tensor, context: Context = None, labels: Tensor | None = None) -> Tensor:
        """m_s in white coordinates.

        Args:
            y_t: ``(B, C, H, W)`` in white coordinates, at scale t.
            t, s: float64, ``()`` or ``(B,)``, s <= t.
            labels: ``(B,)`` int64 or None.
        """
        operator = self.process.operator(context)
        prediction, _ = self._predict(operator, y_t, t.expand(y_t.shape[0]), context, labels)
        return self.target.clean(self.process, operator, prediction, y_t, t, s)

    def loss(
        self,
        x_0: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        context: Context = None,
    ) -> Tensor:
        """Weighted squared error, averaged over each image: ``(B,)``.

        Args:
            x_0: ``(B, C, H, W)`` in the process's value range.
            t: ``(B,)`` in (0, 1].
        """
        if context is None:
            context = self.process.context(x_0, generator)
        operator = self.process.operator(context)
        t = t.to(torch.float64)
        noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device)
        y_t = operator.apply(self.process.signal(t), operator.to_white(x_0))
        y_t = y_t + operator.apply(lambda mu: self.process.noise_scale(t, mu), noise)
        x_t = operator.to_pixels(y_t)
        truth = self.target.truth(self.process, operator, x_0, x_t, noise, t)
        prediction, weight = self._predict(operator, y_t, t, context, labels)
        return (weight * (prediction - truth) ** 2).flatten(1).mean(1)
