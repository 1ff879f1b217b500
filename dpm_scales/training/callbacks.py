"""Check the order of a run's callbacks: Lightning calls each hook in the order of the list."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.callbacks import Callback, LearningRateMonitor

from dpm_scales.distributed.signals import StopTogether
from dpm_scales.training.checkpoints import Checkpoints
from dpm_scales.training.ema import EMA
from dpm_scales.training.health import StopDiverged
from dpm_scales.training.monitoring import PeriodicEvaluation
from dpm_scales.training.pictures import SampleGrid
from dpm_scales.training.power_averages import PowerAverages
from dpm_scales.training.reporting import LastValidation, LoggedSteps

#: (earlier, later, why)
ORDER: tuple[tuple[type[Callback], type[Callback], str], ...] = (
    (LoggedSteps, LearningRateMonitor, "the learning rate is logged when the count of steps says so"),
    (StopTogether, Checkpoints, "the step with which a run stops is saved"),
    (StopDiverged, PowerAverages, "no weights of a run that has diverged are averaged"),
    (StopDiverged, Checkpoints, "no weights of a run that has diverged are saved"),
    (SampleGrid, EMA, "grids show the EMA weights, which EMA swaps out at the end of a validation"),
    (EMA, PeriodicEvaluation, "the EMA holds this step's weights when it is measured"),
    (EMA, Checkpoints, "the EMA holds this step's weights when it is saved"),
    (PowerAverages, Checkpoints, "the power averages hold this step's weights when they are saved"),
    (PeriodicEvaluation, Checkpoints, "a saved step's figures are in metrics.csv"),
    (LastValidation, Checkpoints, "the last step's checkpoint waits for its validation"),
)


def check_order(callbacks: Sequence[Callback]) -> None:
    """Raise AssertionError, with the reason, if two callbacks are in the wrong order."""
    kinds = [type(callback) for callback in callbacks]
    for earlier, later, why in ORDER:
        if earlier in kinds and later in kinds and kinds.index(earlier) > kinds.index(later):
            raise AssertionError(f"{earlier.__name__} must come before {later.__name__}, so that {why}")
