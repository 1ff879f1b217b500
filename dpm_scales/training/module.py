"""The LightningModule: draw scales, draw noise, loss, log. Nothing here knows which process it trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from dpm_scales.data import ImageDataModule
from dpm_scales.errors import UserError, require, require_number, suggest
from dpm_scales.images import to_range
from dpm_scales.training.export import Model

DECAYS = ("cosine", "constant")
BANDS = 4
BETAS = "optimizer.betas must be two numbers in [0, 1)"
SPECTRUM_IMAGES = 2000  # enough for a curve of 26 numbers
HEALTH_CHECK_STEPS = 50  # the host waits for the device only this often


def stratified_scales(
    count: int, num_scales: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """``(count,)`` scales k / num_scales, k uniform on 1..num_scales, spread evenly over the batch (VDM, App. I)."""
    offset = torch.rand((), generator=generator, device=device, dtype=torch.float64)
    even = (torch.arange(count, device=device, dtype=torch.float64) + offset) / count
    return (torch.floor(even * num_scales).clamp(max=num_scales - 1) + 1) / num_scales


class DiffusionModule(pl.LightningModule):
    """Trains a model's denoiser.

    Args:
        model: denoiser, prior, sampler and recipe.
        learning_rate: of Adam, > 0.
        warmup_steps: linear warm-up, in optimiser steps.
        decay: "cosine" to zero at the trainer's max_steps, or "constant".
        betas, weight_decay: AdamW's.
        max_bad_steps: non-finite steps in a row before training ends with an error.
        conditional: give the labels to the network.
        seed: of scales and noise; every step has its own, so a resumed run draws what an undisturbed one draws.
        compile_network: torch.compile the network.
    """

    def __init__(
        self,
        model: Model,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        decay: str = "cosine",
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        max_bad_steps: int = 20,
        conditional: bool = False,
        seed: int = 0,
        compile_network: bool = False,
    ) -> None:
        super().__init__()
        require_number("optimizer.learning_rate", learning_rate, 0)
        require_number("optimizer.warmup_steps", warmup_steps, 0, whole=True)
        require(decay in DECAYS, f"unknown optimizer.decay {decay!r}: {suggest(str(decay), DECAYS)}")
        pair = isinstance(betas, list | tuple) and len(betas) == 2
        require(pair and all(isinstance(b, int | float) and 0 <= b < 1 for b in betas), BETAS + f", got {betas!r}")
        require_number("optimizer.weight_decay", weight_decay, 0)
        require_number("optimizer.max_bad_steps", max_bad_steps, 1, whole=True)
        self.parts = model
        self.model = model.modules()
        self.learning_rate, self.warmup_steps, self.decay = learning_rate, warmup_steps, decay
        self.betas, self.weight_decay = (betas[0], betas[1]), weight_decay
        self.max_bad_steps, self.conditional, self.seed = max_bad_steps, conditional, seed
        if compile_network:
            model.denoiser.network.compile(fullgraph=True)

        # Not buffers: weight averaging swaps those between the two models.
        #: steps skipped for non-finite gradients: in all, in a row until now, and the longest row
        self.bad_steps = torch.zeros(3)
        self._band_sums = torch.zeros(2, BANDS, dtype=torch.float64)

    # --- training -----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.bad_steps = self.bad_steps.to(self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self._seed_step()
        x_0, labels = self._images(batch)
        t = stratified_scales(x_0.shape[0], self.parts.denoiser.process.num_scales, x_0.device)
        loss = self.parts.denoiser.loss(x_0, t, labels).mean()
        self.log("train/loss", loss, prog_bar=True, on_step=True)
        return loss

    def configure_optimizers(self) -> Any:
        # fused: one kernel, and it skips a step on the device when told so (see below)
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        rate = min(1.0, (step + 1) / (self.warmup_steps + 1))
        total = self.trainer.max_steps
        if self.decay == "cosine" and total > 0:
            rate *= 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
        return rate

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm; where it is not finite, the optimiser skips the step on the device, without a host sync."""
        limit = math.inf if gradient_clip_val is None else float(gradient_clip_val)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
        bad = (~torch.isfinite(norm)).to(torch.float32)
        inner = getattr(optimizer, "optimizer", optimizer)
        inner.found_inf = bad
        total, row, longest = self.bad_steps.unbind()
        row = (row + bad) * bad
        self.bad_steps = torch.stack([total + bad, row, torch.maximum(longest, row)])
        self.log("train/grad_norm", norm, on_step=True)
        self.log("train/bad_steps", self.bad_steps[0], on_step=True)
        if (self.global_step + 1) % HEALTH_CHECK_STEPS == 0:
            self._check_health()

    def on_train_end(self) -> None:
        self._check_health()

    def _check_health(self) -> None:
        bad = int(self.bad_steps[2])
        if bad >= self.max_bad_steps:
            raise UserError(
                f"the loss was not finite for {bad} steps in a row before step {self.global_step}; the last "
                "checkpoint is kept: lower optimizer.learning_rate or set trainer.precision=32-true, then resume"
            )

    # --- validation ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._band_sums = torch.zeros(2, BANDS, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The same scales and noise at every validation, so that curves can be compared."""
        x_0, labels = self._images(batch)
        generator = torch.Generator(x_0.device)
        generator.manual_seed(_step_seed(self.seed + 1, self.global_rank, batch_idx))
        t = stratified_scales(x_0.shape[0], self.parts.denoiser.process.num_scales, x_0.device, generator)
        loss = self.parts.denoiser.loss(x_0, t, labels, generator).to(torch.float64)
        band = ((t * BANDS).ceil() - 1).clamp(0, BANDS - 1).long()
        self._band_sums[0].index_add_(0, band, loss)
        self._band_sums[1].index_add_(0, band, torch.ones_like(loss))

    def on_validation_epoch_end(self) -> None:
        gathered = cast(Tensor, self.all_gather(self._band_sums))
        sums, counts = gathered.reshape(-1, 2, BANDS).sum(0)
        values = sums / counts.clamp(min=1)
        # gathered, so the same everywhere; `sync_dist` spares Lightning's advice to use it
        self.log("val/loss", sums.sum() / counts.sum().clamp(min=1), prog_bar=True, sync_dist=True)
        for i in range(BANDS):
            self.log(f"val/loss_t{(i + 1) / BANDS:.2f}", values[i], sync_dist=True)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.parts.recipe.to_dict()
        checkpoint["bad_steps"] = self.bad_steps.tolist()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        total, row, _ = checkpoint["bad_steps"]
        self.bad_steps = torch.tensor([total, row, row])  # a longer row before was a matter of the run before

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _images(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        images, labels = batch
        x_0 = to_range(images, self.parts.denoiser.process.value_range)
        return x_0, labels if self.conditional else None

    def _seed_step(self) -> None:
        """Everything random in a step follows from (seed, rank, number of the batch)."""
        number = int(getattr(self.trainer.fit_loop.epoch_loop.batch_progress.total, "processed", 0))
        torch.manual_seed(_step_seed(self.seed, self.global_rank, number))


def _step_seed(seed: int, rank: int, number: int) -> int:
    """Well-mixed 63 bits (SplitMix64's finaliser), so that neighbouring steps share nothing."""
    x = (seed * 0x9E3779B97F4A7C15 + rank * 0xD1B54A32D192ED03 + (number + 1) * 0x8CB92BA72F3D8DD7) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return (x ^ (x >> 31)) >> 1


def fit_to_data(model: Model, data: ImageDataModule) -> None:
    """Measure the data's spectrum, and hand training images to a prior that starts from them."""
    process, spectrum = model.denoiser.process, model.denoiser.spectrum
    low, high = process.value_range
    std = data.statistics()["std"] * (high - low)
    require(std > 0, "all training images are the same grey: nothing to learn")
    spectrum.std.fill_(std)
    train = data.train_set

    def spread(count: int) -> list[int]:
        """Numbers of at most `count` training images, evenly over the set."""
        return torch.linspace(0, len(train) - 1, min(count, len(train))).round().long().tolist()

    def loaded(index: list[int]) -> Tensor:
        return to_range(torch.stack([train[i][0] for i in index]), (low, high))

    def white_batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator, chosen = torch.Generator().manual_seed(0), spread(SPECTRUM_IMAGES)
        for start in range(0, len(chosen), 64):
            x = loaded(chosen[start : start + 64])
            context, grey = process.context(x, generator), x.mean((-2, -1))
            yield process.operator(context).to_white(x - process.steady_state(grey, context)), grey

    spectrum.fit(white_batches())
    if model.prior.max_images > 0:
        model.prior.fit(loaded(spread(model.prior.max_images)), process)
