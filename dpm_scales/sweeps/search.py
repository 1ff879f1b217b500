"""Search for the best values of options: an Optuna study in the folder of a sweep, which can be interrupted anytime.

    trial k = proposal of a tree-structured Parzen estimator from (seed, k, the trials before)

so that a resumed study makes the same proposals as an uninterrupted one. It is stored in `study.db` (SQLite). Trials
left unfinished by a killed sweep come first; their folders are named by their values, so their runs resume. A trial
with invalid values (a schedule for which no chain exists) counts as failed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from dpm_scales.cli.program import command_line
from dpm_scales.cli.stored import key_of
from dpm_scales.distributed.ranks import current_world
from dpm_scales.errors import UserError, require, require_number, suggest
from dpm_scales.storage import guarded, write_text
from dpm_scales.sweeps.naming import plain_name, run_folder
from dpm_scales.tables import short_numbers

DIRECTIONS = ("minimize", "maximize")
SPACE, FIXED = "search space", "options"  # names of the study's attributes
Launch = Callable[..., Sequence[JobReturn]]


def search(
    arguments: Sequence[str],
    root: Path,
    objective: str,
    launch: Launch,
    is_group: Callable[[str], bool],
    searched: Sequence[str],
    n_trials: int,
    n_jobs: int = 1,
    direction: str = "minimize",
    seed: int = 0,
) -> None:
    """Run trials until the study has `n_trials`; write the result and options of the best, and a config that trains it.

    `best.yaml` holds the objective, all options and the run's folder, `experiment/best.yaml` the options as a config:
    ``python train.py --config-dir ROOT experiment=best``.

    Args:
        arguments: overrides; the search varies those with choices, ``interval(a,b)``, ``range(a,b,step)`` or
            ``tag(log,…)``.
        root: folder of the sweep.
        objective: name of the value that runs return, for messages.
        launch: Hydra's launcher.
        is_group: whether an option chooses one of several configs.
        searched: further folders of configs that the options may choose from.
        n_trials, n_jobs: number of trials in total, and at a time, >= 1.
        direction: "minimize" or "maximize".
        seed: seed of the proposals, >= 0.

    Raises: UserError for a value out of range, nothing to search, another study in the folder, and if no trial gave a
    value.
    """
    require_number("hydra.sweeper.n_trials", n_trials, 1, whole=True)
    require_number("hydra.sweeper.n_jobs", n_jobs, 1, whole=True)
    require_number("hydra.sweeper.seed", seed, 0, whole=True)
    require(
        direction in DIRECTIONS, f"unknown hydra.sweeper.direction {direction!r}: {suggest(str(direction), DIRECTIONS)}"
    )
    require(
        current_world().world_size == 1,
        "a search is led by one process: start it without torchrun or srun, with trainer=ddp or hydra/launcher=slurm",
    )
    try:
        import optuna
    except ImportError as error:
        raise UserError("this sweeper needs optuna: pip install '.[sweep]'") from error

    optuna.logging.set_verbosity(logging.WARNING)
    overrides = OverridesParser.create().parse_overrides(list(arguments))
    fixed = [o.input_line or "" for o in overrides if not o.is_sweep_override()]
    space = {o.get_key_element(): _distribution(o) for o in overrides if o.is_sweep_override()}
    require(len(space) > 0, "nothing to search: give an option choices or an interval, KEY=interval(0.1,10)")

    root.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{root.resolve()}/study.db",
        study_name="study",
        direction="minimize" if direction == "minimize" else "maximize",
        load_if_exists=True,
    )
    _check_study(study, root, space, plain_name(fixed))
    left = [trial for trial in study.trials if not trial.state.is_finished()]
    jobs = [(trial.number, trial.params) for trial in left]
    finished = len(study.trials) - len(left)
    if finished:
        print(f"{root}: the study has {finished} of {n_trials} trials", flush=True)
    failure: UserError | None = None
    while finished < n_trials:
        batch, jobs = jobs[:n_jobs], jobs[n_jobs:]
        while len(batch) < min(n_jobs, n_trials - finished):
            # seeded by the trial's number, independent of earlier draws of this process
            study.sampler = optuna.samplers.TPESampler(seed=(seed * 1_000_003 + len(study.trials)) % 2**32)
            trial = study.ask(space)
            batch.append((trial.number, trial.params))
        lines = [[*fixed, *_assigned(params)] for _, params in batch]
        for (number, _), result in zip(batch, launch(lines, initial_job_idx=finished), strict=True):
            try:
                study.tell(number, _value(result, objective))
            except UserError as error:
                failure = error
                study.tell(number, state=optuna.trial.TrialState.FAIL)
        finished += len(batch)
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if not complete:
        raise failure or UserError(f"no trial of {root} gave a value; choose another run_dir")
    best = study.best_trial
    found = _assigned(best.params)
    options = [option for option in [*fixed, *found] if key_of(option) != "run_dir"]
    folder = run_folder(root, options, [key_of(option) for option in fixed])
    config, rest = as_experiment(options, is_group)
    path = ["hydra.searchpath=[" + ",".join(f'"{folder}"' for folder in searched) + "]"] if searched else []
    command = ["--config-dir", str(root), *path, "experiment=best", *rest, f"run_dir=runs/{root.name}-best"]
    line = command_line("train", *command)
    what = f"best of {len(complete)} trials: {objective} {best.value:.5g}"
    comment = f"# @package _global_\n# {what}\n# {line}\n"
    with guarded(root):
        write_text(
            root / "best.yaml", yaml.safe_dump({objective: best.value, "overrides": options, "run": str(folder)})
        )
        write_text(root / "experiment" / "best.yaml", comment + yaml.safe_dump(config, sort_keys=False))
    print(f"{what} with {short_numbers(' '.join(found))} ({folder}); train with it: {line}", flush=True)


def as_experiment(options: Sequence[str], is_group: Callable[[str], bool]) -> tuple[dict[str, Any], list[str]]:
    """Return options as the config of an experiment, and those that remove a key, which no config can express.

    Args:
        options: ``KEY=VALUE``, each with one value.
        is_group: whether a key chooses one of several configs.
    """
    parsed = OverridesParser.create().parse_overrides(list(options))
    removed = {o.key_or_group for o in parsed if o.is_delete()}
    rest = [o.input_line or "" for o in parsed if o.key_or_group in removed]
    base: list[Any] = []
    choices: list[Any] = []
    values = OmegaConf.create()
    for o in parsed:
        if o.key_or_group in removed:
            continue
        if o.key_or_group == "experiment":
            base.append(o.value())
        elif is_group(o.key_or_group):
            package = f"@{o.package}" if o.package else ""
            choices.append({f"{'' if o.is_add() else 'override '}/{o.key_or_group}{package}": o.value()})
        else:
            OmegaConf.update(values, o.key_or_group, o.value(), force_add=True)
    defaults = {"defaults": [*base, *choices]} if base or choices else {}
    return {**defaults, **cast(dict[str, Any], OmegaConf.to_container(values, resolve=False))}, rest


def _distribution(override: Override) -> Any:
    """Return the distribution of the values of an override. Raise UserError for an empty or impossible interval."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    listed: list[Any] = []
    try:
        if isinstance(value, IntervalSweep):
            low, high, log = value.start, value.end, "log" in value.tags
            if isinstance(low, int) and isinstance(high, int):
                return IntDistribution(low, high, log=log)
            return FloatDistribution(float(low or 0), float(high or 0), log=log)
        if isinstance(value, RangeSweep) and not value.shuffle:
            listed = list(override.sweep_iterator(transformer=Transformer.identity))
            whole = all(isinstance(number, int) for number in (value.start, value.step))
            kind: Any = IntDistribution if whole else FloatDistribution
            number = int if whole else float
            return kind(number(listed[0]), number(listed[-1]), step=number(value.step or 1))
        listed = list(override.sweep_iterator(transformer=Transformer.encode))
        return CategoricalDistribution(listed)
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"{override.input_line}: nothing can be drawn from it ({error})") from error


def _assigned(params: dict[str, Any]) -> list[str]:
    """Return parameters as overrides."""
    return [f"{key}={'null' if value is None else value}" for key, value in params.items()]


def _check_study(study: Any, root: Path, space: dict[str, Any], fixed: str) -> None:
    """Raise UserError if the study in the folder has another search space or options; store them in a new study."""
    described = {SPACE: {key: repr(space[key]) for key in sorted(space)}, FIXED: fixed}
    for name, now in described.items():
        before = study.user_attrs.get(name)
        if before is None:
            study.set_user_attr(name, now)
        elif before != now:
            raise UserError(f"{root} holds a study with another {name}: {before}, not {now}; choose another run_dir")


def _value(result: JobReturn, objective: str) -> float:
    """Return the objective of a run. Raise UserError if it is missing or not finite, and what a failed run raised."""
    if result.status == JobStatus.COMPLETED and result.return_value is None:
        raise UserError(f"the runs have no {objective} to compare them by; set objective to one of their result.json")
    value = float(result.return_value)  # re-raises the exception of a failed run
    require(math.isfinite(value), f"{objective} is {value}")
    return value
