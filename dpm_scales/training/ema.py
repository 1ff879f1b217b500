"""Average the weights of a run while it trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import numpy as np
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

    Updates do not wait for the device. Those of torch's own class, which Lightning's would call, read the number of
    earlier ones from it twice.

    Args:
        decay: in [0, 1].
        length: length of a power-function average in its place, see `models.power_profiles`; None for the EMA.

    Raises: UserError for values out of range.
    """

    def __init__(self, decay: float = 0.999, length: float | None = None) -> None:
        require_number("ema.decay", decay, 0, 1)
        self.decay = decay
        self.exponent = None if length is None else exponent_of(check_length("ema.length", length))
        self._updates = 0  # on the host; checkpoints have it as torch's `n_averaged`
        # buffers are constants of the model; averaging would round integers
        super().__init__(use_buffers=False)

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
        step = trainer.global_step
        if step > self._latest_update_step:  # otherwise gradients are being accumulated
            self._update(pl_module, step)
            self._latest_update_step = step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the module's own weights, which Lightning's class would overwrite: `last.ckpt` holds both."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert self._average_model is not None
        self._average_model.n_averaged.fill_(self._updates)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["state_dict"] = whole(checkpoint["state_dict"], trainer.is_global_zero)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        assert self._average_model is not None
        self._updates = int(self._average_model.n_averaged)

    @torch.no_grad()
    def _update(self, source: pl.LightningModule, step: int) -> None:
        """Average the parameters after a step, the first time copy them; copy the buffers."""
        averages, currents = _locals(self.module.parameters()), _locals(source.parameters())
        if self._updates == 0:
            _copy(averages, currents)
        else:
            self._average(averages, currents, self._updates, step)
        _copy(_locals(self.module.buffers()), _locals(source.buffers()))
        self._updates += 1

    def _average(self, averages: list[Tensor], currents: list[Tensor], updates: int, step: int) -> None:
        """Update averages in place after `updates` earlier ones, at an optimiser step."""
        if self.exponent is not None:
            torch._foreach_lerp_(averages, currents, newest_weight(step, self.exponent))
            return
        # in float32 and in this order of operands, in which averages have always been computed
        n, one, ten = (np.float32(number) for number in (updates, 1, 10))
        decay = min((one + n) / (ten + n), np.float32(self.decay))
        _copy(averages, list(torch._foreach_lerp(currents, averages, float(decay))))

    @torch.no_grad()
    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        _swap(_locals(self.module.parameters()), _locals(pl_module.parameters()))
        _swap(_locals(self.module.buffers()), _locals(pl_module.buffers()))


def _locals(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [local(tensor.detach()) for tensor in tensors]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:  # torch refuses empty lists
        torch._foreach_copy_(targets, sources)


def _swap(ones: list[Tensor], others: list[Tensor]) -> None:
    kept = [one.clone() for one in ones]
    _copy(ones, others)
    _copy(others, kept)
