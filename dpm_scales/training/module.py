"""The LightningModule: draw scales, draw noise, loss, log. Nothing here depends on the process."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dpm_scales.denoisers import spread_evenly, uniform_scales
from dpm_scales.distributed.fsdp import clip_norm, like_parameters
from dpm_scales.distributed.lightning_private import batches_processed
from dpm_scales.errors import require, require_number, suggest
from dpm_scales.images import to_range
from dpm_scales.models.model import Model
from dpm_scales.rng import CounterRNG
from dpm_scales.training.muon import Muon, embedding_weights
from dpm_scales.training.pairing import candidates_of
from dpm_scales.training.scale_sampling import SCALE_SAMPLINGS, DensityScales, ImportanceScales, check_density
from dpm_scales.weights import LossWeight

DECAYS = ("cosine", "constant")
METHODS = ("adamw", "muon")
AUTO_WARMUP = 100
"""Largest number of steps of an automatic warm-up."""

BANDS = 4
MOST_STEPS = 10**9
"""Largest number of steps of a run, its warm-up or an interval."""

BETAS = "optimizer.betas must be two numbers in [0, 1)"
TRAINING, VALIDATION, LABELS = 2**32, 2**32 + 1, 2**32 + 2
"""Streams of random numbers; those below 2**32 are the ranks' own."""


class DiffusionModule(pl.LightningModule):
    """Trains a model's denoiser.

    Args:
        model: denoiser, prior, sampler and recipe; its network gets the labels where the recipe has classes.
        learning_rate: learning rate of AdamW, >= 0; Muon's steps follow from it.
        warmup_steps: optimiser steps of linear warm-up; "auto" for a tenth of the run, at most 100.
        decay: "cosine", to zero at the trainer's max_steps, or at its max_time if max_steps is -1; or "constant".
        betas, weight_decay: AdamW's.
        method: "adamw", or "muon" for the matrices among the weights, see `training.muon`.
        scale_sampling: "uniform", a published density, or "importance": scales whose loss varies more are drawn more
            often and weighted less; see `training.scale_sampling`.
        scale_mean, scale_std: parameters of the normal densities; None for the published ones.
        loss_weight: weight of each scale in the training loss; None for the target's own, which validation always uses.
            The parameters of a learned one are trained too, with the optimiser of the network.
        pairing: "none", or "nearest": each image gets the nearest of several noises, so that the two are no longer
            independent, see `processes.pairing`. Validation never pairs.
        candidates: number of these noises; None for 8.
        seed: seed of scales and noise, which depend on (seed, batch number, image) alone: a resumed run draws the same,
            and so does any number of ranks. Dropout differs between ranks.

    Raises: UserError for a value out of range, or a weight that does not fit the process and target.
    """

    def __init__(
        self,
        model: Model,
        learning_rate: float = 1e-3,
        warmup_steps: int | str = 100,
        decay: str = "cosine",
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        seed: int = 0,
        scale_sampling: str = "uniform",
        loss_weight: LossWeight | None = None,
        scale_mean: float | None = None,
        scale_std: float | None = None,
        pairing: str = "none",
        candidates: int | None = None,
        method: str = "adamw",
    ) -> None:
        super().__init__()
        require_number("optimizer.learning_rate", learning_rate, 0)
        if isinstance(warmup_steps, str):
            require(warmup_steps == "auto", f"optimizer.warmup_steps={warmup_steps}: allowed are numbers and auto")
        else:
            require_number("optimizer.warmup_steps", warmup_steps, 0, MOST_STEPS, whole=True)
        require(decay in DECAYS, f"unknown optimizer.decay {decay!r}: {suggest(str(decay), DECAYS)}")
        require(method in METHODS, f"unknown optimizer.method {method!r}: {suggest(str(method), METHODS)}")
        pair = isinstance(betas, list | tuple) and len(betas) == 2
        require(pair and all(isinstance(b, int | float) and 0 <= b < 1 for b in betas), BETAS + f", got {betas!r}")
        require_number("optimizer.weight_decay", weight_decay, 0)
        known = suggest(str(scale_sampling), SCALE_SAMPLINGS)
        require(scale_sampling in SCALE_SAMPLINGS, f"unknown scale_sampling {scale_sampling!r}: {known}")
        if loss_weight is not None:
            loss_weight.check(model.denoiser.process, model.denoiser.target)
            clash = "scale_sampling=importance draws scales by their losses, which weight=learned makes alike; use one"
            require(loss_weight.replaces or scale_sampling != "importance", clash)
        self.candidates = candidates_of(pairing, candidates, model.denoiser.process)
        self.model = model
        self.learning_rate, self.warmup_steps, self.decay = learning_rate, warmup_steps, decay
        self.betas, self.weight_decay, self.method = (betas[0], betas[1]), weight_decay, method
        self.seed = seed
        self.loss_weight = loss_weight
        #: share of the trainer's max_time that has passed, see `training.time_budget`
        self.passed = 0.0

        # Not buffers: EMA swaps those between the two models.
        #: numbers of steps skipped for non-finite gradients: in total, consecutive up to now, most consecutive
        self.bad_steps = torch.zeros(3)
        self._band_sums = torch.zeros(2, BANDS, dtype=torch.float64)
        num_scales = model.denoiser.process.num_scales
        check_density(scale_sampling, scale_mean, scale_std)
        self._importance = ImportanceScales(num_scales) if scale_sampling == "importance" else None
        self._density = (
            None
            if scale_sampling in ("uniform", "importance")
            else DensityScales(scale_sampling, model.denoiser.process, scale_mean, scale_std)
        )

    @property
    def parts(self) -> Model:
        """The model that is trained."""
        return self.model

    # --- training -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.bad_steps = self.bad_steps.to(self.device)
        if self._importance is not None:
            self._importance.state = self._importance.state.to(self.device)
        if self._density is not None:
            self._density.edges = self._density.edges.to(self.device)

    def on_train_start(self) -> None:
        """Apply this run's options in place of those that were restored from a checkpoint."""
        optimizer = cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))
        schedule = cast(torch.optim.lr_scheduler.LambdaLR, self.lr_schedulers())
        rate = self.learning_rate * self._rate(schedule.last_epoch)
        for group in optimizer.param_groups:
            group.update(lr=rate, initial_lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay)
        schedule.base_lrs, schedule._last_lr = [self.learning_rate], [rate]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        number = batches_processed(self.trainer)
        torch.manual_seed(step_seed(self.seed, self.global_rank, number))
        x_0, labels = self._images(batch)
        count = x_0.shape[0] * self.trainer.world_size
        noise = self._noise(TRAINING, x_0, number * count)
        even = self._even(TRAINING, noise.numbers - number * count, count, number)
        labels = self._dropped(labels, x_0, number * count)
        loss = self._loss(x_0, even, labels, noise)
        # not on Lightning's progress bar, for which it would wait for the device in each step
        self.log("train/loss", loss, on_step=True, sync_dist=True)
        return loss

    def _loss(self, x_0: Tensor, even: Tensor, labels: Tensor | None, noise: CounterRNG) -> Tensor:
        """Return the training loss, ``()``, at scales drawn from uniform numbers `even` ``(B,)``."""
        denoiser, weight, candidates = self.parts.denoiser, self.loss_weight, self.candidates
        if self._importance is None:
            drawn = self._density
            t = uniform_scales(even, denoiser.process.num_scales) if drawn is None else drawn.draw(even)
            return denoiser.loss(x_0, t, labels, noise, loss_weight=weight, candidates=candidates).mean()
        t, importance = self._importance.draw(even)
        losses = denoiser.loss(x_0, t, labels, noise, loss_weight=weight, candidates=candidates)
        observed = self._importance.observe(t, losses)
        # summed over ranks, so that all continue with the same density
        self._importance.update(cast(Tensor, self.trainer.strategy.reduce(observed, reduce_op="sum")))
        return (importance.to(losses.dtype) * losses).mean()

    def _dropped(self, labels: Tensor | None, x_0: Tensor, first: int) -> Tensor | None:
        """Return labels with the recipe's share of them dropped; which ones depends on the images' numbers alone."""
        recipe = self.parts.recipe
        if labels is None or recipe.num_classes is None or recipe.label_dropout == 0:
            return labels
        dropped = self._noise(LABELS, x_0, first).uniform() < recipe.label_dropout
        return torch.where(dropped, recipe.num_classes, labels)

    def make_optimizer(self) -> torch.optim.AdamW:
        """Return the optimiser of `method` for all parameters, at the largest learning rate."""
        # fused: one kernel, and it can skip a step on the device (see configure_gradient_clipping)
        rate, betas, decay = self.learning_rate, self.betas, self.weight_decay
        if self.method == "muon":
            return Muon(self.parameters(), rate, betas, decay, embedding_weights(self))
        return torch.optim.AdamW(self.parameters(), lr=rate, betas=betas, weight_decay=decay, fused=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        optimizer.register_load_state_dict_pre_hook(like_parameters)
        after_step = getattr(self.parts.denoiser.network, "after_step", None)
        if after_step is not None:  # a hook of the optimiser: before checkpoints and EMA see the weights
            optimizer.register_step_post_hook(lambda *_: after_step())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        return self.rate(step, self.trainer.max_steps, self.passed)

    def rate(self, step: int, max_steps: int, passed: float = 0.0) -> float:
        """Return the factor in [0, 1] on the learning rate.

        Args:
            step: number of the step, from 0.
            max_steps: number of steps of the run; -1 if it ends by time.
            passed: share of that time that has passed, in [0, 1].
        """
        share = min(step / max_steps, 1.0) if max_steps > 0 else passed
        warmup = self.warmup_steps
        sooner = 0.0
        if isinstance(warmup, str):
            warmup = min(AUTO_WARMUP, max_steps // 10) if max_steps > 0 else AUTO_WARMUP
            sooner = 0.0 if max_steps > 0 else 10 * passed
        rate = min(1.0, max((step + 1) / (warmup + 1), sooner))
        return rate * 0.5 * (1 + math.cos(math.pi * share)) if self.decay == "cosine" else rate

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients' norm; if it is not finite, the optimiser skips the step, without a host sync."""
        limit = math.inf if gradient_clip_val is None else float(gradient_clip_val)
        norm = clip_norm(self.parameters(), limit)
        bad = (~torch.isfinite(norm)).to(torch.float32)
        inner = getattr(optimizer, "optimizer", optimizer)
        inner.found_inf = bad
        total, row, longest = self.bad_steps.unbind()
        row = (row + bad) * bad
        self.bad_steps = torch.stack([total + bad, row, torch.maximum(longest, row)])
        self.log("train/grad_norm", norm, on_step=True)
        self.log("train/bad_steps", self.bad_steps[0], on_step=True)

    # --- validation ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._band_sums = torch.zeros(2, BANDS, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add up the losses by band of scales; scales and noise are the same at every validation."""
        x_0, labels = self._images(batch)
        loader = cast(DataLoader[Any], self.trainer.val_dataloaders)
        size = cast(int, loader.batch_size) * self.trainer.world_size
        first, images = batch_idx * size, len(cast(Sized, loader.dataset))
        noise = self._noise(VALIDATION, x_0, first)
        even = self._even(VALIDATION, noise.numbers - first, min(size, images - first), batch_idx)
        t = uniform_scales(even, self.parts.denoiser.process.num_scales)
        # with several ranks some images come twice, to fill the last batch
        counts = (noise.numbers < images).to(torch.float64)
        loss = self.parts.denoiser.loss(x_0, t, labels, noise) * counts
        band = ((t * BANDS).ceil() - 1).clamp(0, BANDS - 1).long()
        self._band_sums[0].index_add_(0, band, loss)
        self._band_sums[1].index_add_(0, band, counts)

    def on_validation_epoch_end(self) -> None:
        sums, counts = cast(Tensor, self.trainer.strategy.reduce(self._band_sums, reduce_op="sum"))
        values = sums / counts.clamp(min=1)
        # the same on all ranks already; `sync_dist` only silences Lightning's advice to use it
        self.log("val/loss", sums.sum() / counts.sum().clamp(min=1), sync_dist=True)
        for i in range(BANDS):
            self.log(f"val/loss_t{(i + 1) / BANDS:.2f}", values[i], sync_dist=True)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.parts.recipe.to_dict()
        checkpoint["bad_steps"] = self.bad_steps.tolist()
        if self._importance is not None:
            checkpoint["importance"] = self._importance.state.tolist()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        total, row, _ = checkpoint["bad_steps"]
        self.bad_steps = torch.tensor([total, row, row])  # the longest streak is counted anew in each session
        if self._importance is not None and "importance" in checkpoint:
            self._importance.load(checkpoint["importance"])

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _images(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        images, labels = batch
        x_0 = to_range(images, self.parts.denoiser.process.value_range)
        return x_0, None if self.parts.recipe.num_classes is None else labels

    def _noise(self, purpose: int, x_0: Tensor, first: int) -> CounterRNG:
        """Return the noise of this rank's images: every `world_size`-th of those numbered from `first`."""
        seed, world_size = step_seed(self.seed, purpose, 0), self.trainer.world_size
        return CounterRNG(seed, x_0.shape[0], first + self.global_rank, x_0.device, world_size)

    def _even(self, purpose: int, places: Tensor, count: int, number: int) -> Tensor:
        """Return uniform numbers for the images at `places` of batch `number`, `count` images on all ranks."""
        return spread_evenly(places, count, step_seed(self.seed, purpose, number + 1) / 2**63)


def step_seed(seed: int, stream: int, number: int) -> int:
    """Return a well-mixed 63-bit seed (SplitMix64's finaliser); those of neighbouring steps are unrelated."""
    x = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + (number + 1) * 0x8CB92BA72F3D8DD7) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return (x ^ (x >> 31)) >> 1
