"""`hydra/launcher=shared_gpu`: Hydra loads plugins only from this package; see dpm_scales/sweeps/shared_gpu.py."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SharedGPULauncher(Launcher):
    """Launcher that runs several jobs of a sweep at a time on each GPU of this machine, or on its CPU.

    Args:
        runs_per_gpu: number of runs at a time on each GPU, >= 1; without a GPU on the CPU.
        gpus: their numbers or names, as in CUDA_VISIBLE_DEVICES; None for all that are visible.
    """

    def __init__(self, runs_per_gpu: int = 2, gpus: Sequence[int | str] | None = None) -> None:
        self.runs_per_gpu, self.gpus = runs_per_gpu, gpus

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from dpm_scales.sweeps.shared_gpu import launch

        return launch(
            self.hydra_context,
            self.task_function,
            self.config,
            self.runs_per_gpu,
            self.gpus,
            job_overrides,
            initial_job_idx,
        )
