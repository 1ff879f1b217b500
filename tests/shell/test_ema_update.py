"""Averages of the weights have the bits of those that torch's class computes, also after a resume."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dpm_scales.models.power_profiles import exponent_of, newest_weight
from dpm_scales.training.ema import EMA
from dpm_scales.training.module import DiffusionModule
from support.shell import assert_equal, small_model

STEPS = 30  # up to decay 31/40


class Module(DiffusionModule):
    """A module with weights in both memory formats and both precisions, and with buffers that training changes."""

    def __init__(self) -> None:
        super().__init__(small_model())
        self.further = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 33).double())
        self.to(memory_format=torch.channels_last)
        self.further.append(nn.Conv2d(3, 5, 3))

    def step(self, seed: int) -> None:
        """Replace all floating-point values, and count in the others."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
                else:
                    tensor.add_(1)


def started(average: EMA, module: Module) -> EMA:
    trainer: Any = SimpleNamespace(strategy=None)
    average.setup(trainer, module, "fit")
    return average


def update(average: EMA, module: Module, step: int) -> None:
    trainer: Any = SimpleNamespace(global_step=step)
    average.on_train_batch_end(trainer, module, None, None, 0)


def saved(average: WeightAveraging, module: Module) -> dict[str, Any]:
    """A checkpoint, as far as averages are concerned."""
    values: dict[str, Any] = {"state_dict": module.state_dict()}
    trainer: Any = SimpleNamespace(is_global_zero=True)
    average.on_save_checkpoint(trainer, module, values)
    return copy.deepcopy(values | {"callback": average.state_dict()})


class Reference:
    """torch's averages, with a function of one tensor at a time."""

    def __init__(self, module: Module, decay: float, length: float | None) -> None:
        self.decay, self.length, self.step = decay, length, 0
        self.model = AveragedModel(module, multi_avg_fn=self.average)  # type: ignore[arg-type]

    def update(self, module: Module, step: int) -> None:
        self.step = step
        self.model.update_parameters(module)

    def average(self, averages: list[Tensor], currents: list[Tensor], count: Tensor) -> None:
        n = count.to(torch.float32)
        decay = torch.clamp((1 + n) / (10 + n), max=self.decay)
        for average, current in zip(averages, currents, strict=True):
            if self.length is not None:
                average.lerp_(current, newest_weight(self.step, exponent_of(self.length)))
            else:
                average.copy_(torch.lerp(current, average, decay.to(average.dtype)))


@pytest.mark.parametrize(
    ("decay", "length"), [(0.999, None), (0.7, None), (0.4, None), (0.0, None), (1.0, None), (0.999, 0.1)]
)
def test_the_bits_are_those_of_torchs_averages(decay: float, length: float | None) -> None:
    """At each of the first updates, where the decay rises, and with every second batch accumulated."""
    module = Module()
    average, reference = started(EMA(decay, length), module), Reference(module, decay, length)
    for step in range(1, STEPS):
        module.step(step)
        update(average, module, step)
        reference.update(module, step)
        assert_equal(average.module.state_dict(), reference.model.module.state_dict())
        module.step(-step)
        update(average, module, step)  # no step of the optimiser
    assert_equal(average.module.state_dict(), reference.model.module.state_dict())
    assert_equal(saved(average, module)["averaging_state"], {"n_averaged": torch.tensor(STEPS - 1)})


@pytest.mark.parametrize("length", [None, 0.1])
def test_checkpoints_of_torchs_averages_are_resumed_and_written(length: float | None) -> None:
    """A checkpoint as Lightning's class wrote it goes on with the same bits, and the next one holds what it would."""
    module = Module()
    reference = Reference(module, 0.7, length)
    for step in range(1, 6):
        module.step(step)
        reference.update(module, step)
    before = WeightAveraging(use_buffers=False)
    before._average_model, before._latest_update_step = reference.model, 5
    values = saved(before, module)

    other = Module()
    average = started(EMA(0.7, length), other)
    other.load_state_dict(values["state_dict"])
    average.load_state_dict(values["callback"])
    trainer: Any = None
    average.on_load_checkpoint(trainer, other, copy.deepcopy(values))
    assert_equal(saved(average, other), values)
    for step in range(6, STEPS):
        for one in (module, other):
            one.step(step)
        update(average, other, step)
        reference.update(module, step)
        before._latest_update_step = step
    assert_equal(saved(average, other), saved(before, module))


def test_a_swap_exchanges_weights_and_buffers() -> None:
    module = Module()
    average = started(EMA(0.7), module)
    for step in (1, 2, 3):
        module.step(step)
        update(average, module, step)
    module.step(4)
    own, averaged = (copy.deepcopy(one.state_dict()) for one in (module, average.module))
    trainer: Any = None
    average.on_validation_epoch_start(trainer, module)
    assert_equal([dict(module.state_dict()), dict(average.module.state_dict())], [dict(averaged), dict(own)])
    average.on_validation_epoch_end(trainer, module)
    assert_equal([dict(module.state_dict()), dict(average.module.state_dict())], [dict(own), dict(averaged)])
