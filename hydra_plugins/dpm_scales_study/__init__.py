"""`hydra/sweeper=optuna`: Hydra loads plugins only from this package; see dpm_scales/sweeps/search.py."""

from __future__ import annotations

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class StudySweeper(Sweeper):
    """Sweeper that searches for the best values of options and resumes an interrupted study.

    Args:
        n_trials: number of runs of the study, including earlier ones, >= 1.
        n_jobs: number of runs at a time, >= 1; more than one needs a launcher that runs jobs in parallel.
        direction: "minimize" or "maximize".
        seed: seed of the proposals, >= 0.
    """

    def __init__(self, n_trials: int, n_jobs: int, direction: str, seed: int) -> None:
        self.n_trials, self.n_jobs, self.direction, self.seed = n_trials, n_jobs, direction, seed
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        from dpm_scales.sweeps.search import search
        from dpm_scales.sweeps.table import sweep_root

        assert self.launcher is not None
        hydra, loader = self.config.hydra, self.hydra_context.config_loader
        search(
            arguments,
            sweep_root(self.config, hydra.sweep.dir),
            str(self.config.objective),
            self.launcher.launch,
            lambda name: bool(loader.get_group_options(name, overrides=list(hydra.overrides.hydra))),
            [*hydra.searchpath, *(s.path for s in hydra.runtime.config_sources if s.provider == "command-line")],
            self.n_trials,
            self.n_jobs,
            self.direction,
            self.seed,
        )
