"""Average the weights of a run while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from dpm_scales.distributed.fsdp import ShardedStrategy, local, shard, whole
from dpm_scales.errors import require_number
from dpm_scales.models.model import Model
from dpm_scales.models.power_profiles import check_length, exponent_of, newest_weight
from dpm_scales.training.module import DiffusionModule


class EMA(WeightAveraging):
    """Exponential moving average, decay min(`decay`, (1 + n) / (10 + n)) at update n; sharded if the weights are.

    Args:
        decay: in [0, 1].
        length: length of a power-function average in its place, see `models.power_profiles`; None for the EMA.

    Raises: UserError for values out of range.
    """

    def __init__(self, decay: float = 0.999, length: float | None = None) -> None:
        require_number("ema.decay", decay, 0, 1)
        self.decay = decay
        self.exponent = None if length is None else exponent_of(check_length("ema.length", length))
        self._step = 0
        # buffers are constants of the model; averaging would round integers
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    @property
    def state_key(self) -> str:
        """Name of this callback's state in checkpoints, kept from the first release."""
        return "WeightAverage"

    @property
    def module(self) -> DiffusionModule:
        """The module with the EMA weights; it exists from the beginning of `Trainer.fit`."""
        assert self._average_model is not None
        module = self._average_model.module
        assert isinstance(module, DiffusionModule)
        return module

    def model(self) -> Model:
        """Return the model with EMA weights, in evaluation mode; if sharded, all ranks must evaluate it together."""
        self.module.eval()
        return self.module.parts

    def averaged(self, keep: bool = True) -> dict[str, Tensor]:
        """Return the state of denoiser and prior with EMA weights, empty unless `keep`; all ranks must call it."""
        state: dict[str, Tensor] = whole(self.module.model.state_dict(), keep)
        return state

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, ShardedStrategy):
            self._device = torch.device("cpu")  # until it is sharded, so that no device holds all of it
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, ShardedStrategy):
            shard(self.module, self.module.parts.denoiser.network, pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step  # on the host, and exact, where `count` is a tensor on the device
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the module's own weights, which Lightning's class would overwrite: `last.ckpt` holds both."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["state_dict"] = whole(checkpoint["state_dict"], trainer.is_global_zero)

    def _average(self, averages: Sequence[Tensor], currents: Sequence[Tensor], count: Tensor | int) -> None:
        if self.exponent is not None:
            weight = newest_weight(self._step, self.exponent)
            torch._foreach_lerp_([*map(local, averages)], [*map(local, currents)], weight)
            return
        n = torch.as_tensor(count, dtype=torch.float32, device=averages[0].device)
        decay = torch.clamp((1 + n) / (10 + n), max=self.decay)
        for average, current in zip(map(local, averages), map(local, currents), strict=True):
            average.copy_(torch.lerp(current, average, decay.to(average.dtype)))

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        pairs = (
            *zip(self.module.parameters(), pl_module.parameters(), strict=True),
            *zip(self.module.buffers(), pl_module.buffers(), strict=True),
        )
        for average, current in ((local(a.detach()), local(b.detach())) for a, b in pairs):
            kept = average.clone()
            average.copy_(current)
            current.copy_(kept)
