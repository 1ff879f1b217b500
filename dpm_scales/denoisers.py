"""A denoiser is a network together with its process, target and preconditioning.

predict(y_t, t)           prediction of the target's quantity
predict_mean(y_t, t, s)   m_s = lambda_s(L) y_0-hat, all that a sampler needs
loss(x_0, t)              training loss, one value per image
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpm_scales.covariance import ErrorVariance
from dpm_scales.describe import revise
from dpm_scales.errors import UserError
from dpm_scales.memory import require_memory
from dpm_scales.moments import Moments
from dpm_scales.operators import Operator
from dpm_scales.processes import Context, Process
from dpm_scales.processes.pairing import nearest_noise
from dpm_scales.rng import Randomness
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.targets import Target
from dpm_scales.weights import LossWeight


class BaseDenoiser(nn.Module, ABC):
    """Interface of denoisers for samplers, edits and likelihoods: the mean m_s, and process, target and spectrum."""

    process: Process
    target: Target
    spectrum: DataSpectrum
    #: variance of its estimates' error, for the optimal covariance of reverse steps; None if not measured
    error_variance: ErrorVariance | None

    def __init__(self) -> None:
        super().__init__()
        self.error_variance = None

    @abstractmethod
    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Context = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return m_s = lambda_s(L) y_0-hat, ``(B, C, H, W)`` in whitened coordinates; at s = 0 the estimate y_0-hat.

        Args:
            y_t: ``(B, C, H, W)`` in whitened coordinates, at scale t.
            t, s: float64, ``()`` or ``(B,)``, s <= t.
            labels: ``(B,)`` int64 or None.
        """

    def for_steps(self, starts: Tensor, ends: Tensor, labels: Tensor | None = None) -> Sequence[BaseDenoiser]:
        """Return the denoiser that each step of a loop evaluates: this one, or a cheaper one with the same answers.

        Samplers, encodings and flows ask once, before the first step, so this may wait for the device.

        Args:
            starts, ends: scales between which the steps evaluate it, ``(steps,)``, starts >= ends.
            labels: those of the evaluations, or None.
        """
        return [self] * len(starts)


class TargetDenoiser(BaseDenoiser):
    """A denoiser that predicts its target's quantity, which the target converts to m_s."""

    @abstractmethod
    def predict(
        self, operator: Operator, y_t: Tensor, t: Tensor, context: Context = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the prediction at scale t ``(B,)``, in pixels or whitened coordinates, depending on the target."""

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Context = None, labels: Tensor | None = None
    ) -> Tensor:
        operator = self.process.operator(context)
        prediction = self.predict(operator, y_t, t.expand(y_t.shape[0]), context, labels)
        return self.target.predict_mean(self.process, operator, prediction, y_t, t, s)


class WithoutNetwork(TargetDenoiser):
    """A denoiser whose network predicts 0, for rehearsing the functions that its target applies."""

    def __init__(self, denoiser: BaseDenoiser) -> None:
        super().__init__()
        self.process, self.target, self.spectrum = denoiser.process, denoiser.target, denoiser.spectrum

    def predict(
        self, operator: Operator, y_t: Tensor, t: Tensor, context: Context = None, labels: Tensor | None = None
    ) -> Tensor:
        return torch.zeros_like(y_t)


class Denoiser(TargetDenoiser):
    """A network with its process and target.

    Args:
        network: ``forward(x, t, labels)`` of x ``(B, C + context, H, W)`` and t ``(B,)`` in [0, 1]: ``(B, C, H, W)``.
        process: the forward law.
        target: the quantity that is predicted.
        data_std: standard deviation of the training images' pixels in the process's value range, > 0; its distribution
            over frequencies is measured from images, see `DataSpectrum`.

    Raises: UserError for an invalid data_std, and if the process can't be learnt through the target.
    """

    def __init__(self, network: nn.Module, process: Process, target: Target, data_std: float = 0.5) -> None:
        super().__init__()
        target.check(process)
        self.network, self.process, self.target = network, process, target
        self.spectrum = DataSpectrum(data_std)
        self._degree = self._filter_degree()

    def _filter_degree(self) -> int:
        """Return the degree that the preconditioning's filter needs for white data; the spectrum changes it little."""
        white, process = DataSpectrum(), self.process
        # seven curves of all eigenvalues, float64
        num_bytes = 56 * process.operator().eigenvalues(8, 8).numel() * process.num_scales
        require_memory(num_bytes, f"num_scales={process.num_scales}", "lower num_scales")
        scales = torch.arange(1, process.num_scales + 1, dtype=torch.float64) / process.num_scales
        basis = self.target.basis(process.operator())
        wiener = self.target.scalings(Moments(process, basis, scales, white, (8, 8))).filter
        return 0 if wiener is None else process.degree_of(wiener)

    def resolve_auto(self, size: tuple[int, int]) -> dict[str, str]:
        """Resolve the target's "auto" arguments for images of `size` (H, W); return them by name, for storing."""
        chosen = self.target.resolve_auto(self.process, self.spectrum, size)
        revise(self.target, chosen)
        self._degree = self._filter_degree()
        return chosen

    def _predict(
        self, operator: Operator, y_t: Tensor, t: Tensor, context: Context, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return prediction and loss weight; t is ``(B,)``."""
        size, dtype = (y_t.shape[-2], y_t.shape[-1]), y_t.dtype
        basis = self.target.basis(operator)
        # a sampler's t is one scale for all images: its moments, each of the size of an image, are computed once
        scales = t[:1] if t.stride() == (0,) else t
        c = self.target.scalings(Moments(self.process, basis, scales, self.spectrum, size))
        z = operator.to_pixels(y_t if c.filter is None else basis.at_degree(self._degree).apply(c.filter, y_t))
        seen = c.inner.to(dtype) * z
        features = self.process.context_features(context)
        if features is not None:
            seen = torch.cat([seen, features], 1)
        output = self.network(seen, t.to(dtype), labels).to(dtype)
        if output.shape != y_t.shape:  # broadcasting might hide it
            name, found, wanted = type(self.network).__name__, tuple(output.shape), tuple(y_t.shape)
            raise UserError(f"the network {name} returned {found} for images {wanted}; it must return their shape")
        return c.skip.to(dtype) * z + c.out.to(dtype) * output, c.weight.to(dtype)

    def predict(
        self, operator: Operator, y_t: Tensor, t: Tensor, context: Context = None, labels: Tensor | None = None
    ) -> Tensor:
        return self._predict(operator, y_t, t, context, labels)[0]

    def loss(
        self,
        x_0: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        generator: Randomness = None,
        context: Context = None,
        loss_weight: LossWeight | None = None,
        candidates: int = 1,
    ) -> Tensor:
        """Return the weighted squared error, averaged over each image, ``(B,)``; with `Learned`, the balanced loss.

        Args:
            x_0: ``(B, C, H, W)`` in the process's value range.
            t: ``(B,)`` in (0, 1].
            loss_weight: None for the target's own.
            candidates: number of noise draws for each image, of which the nearest is used, see `processes.pairing`.
        """
        if context is None:
            context = self.process.context(x_0, generator)
        operator = self.process.operator(context)
        t = t.to(torch.float64)
        y_0 = operator.to_white(x_0)
        noise = nearest_noise(self.process, operator, y_0, t, generator, candidates)
        y_t = self.process.perturb(y_0, t, noise, operator)
        x_t = operator.to_pixels(y_t)
        truth = self.target.regression_target(self.process, operator, x_0, x_t, noise, t)
        prediction, weight = self._predict(operator, y_t, t, context, labels)
        if loss_weight is not None and loss_weight.replaces:
            size = (x_0.shape[-2], x_0.shape[-1])
            weight = loss_weight(self.process, operator, self.target, t, self.spectrum, size).to(x_0.dtype)
        loss = (weight * (prediction - truth) ** 2).flatten(1).mean(1)
        return loss if loss_weight is None else loss_weight.balanced(loss, self.process, t)


def spread_evenly(places: Tensor, count: int, offset: Tensor | float) -> Tensor:
    """Return numbers in [0, 1), each uniform and together evenly spread (VDM, App. I): ``(B,)`` float64.

    Args:
        places: positions of this rank's images in the batch of all ranks, ``(B,)`` int64.
        count: number of images in that batch.
        offset: a uniform number in [0, 1), the same on all ranks.
    """
    return (places.to(torch.float64) + offset) / count


def uniform_scales(even: Tensor, num_scales: int) -> Tensor:
    """Return scales k / num_scales, k uniform on 1..num_scales, from uniform numbers in [0, 1)."""
    return (torch.floor(even * num_scales).clamp(max=num_scales - 1) + 1) / num_scales
