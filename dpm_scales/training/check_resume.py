"""Check for some options that a killed and resumed run ends like an undisturbed one: `train.py check_resume=true`.

Three short runs in a temporary folder, each in its own process: one undisturbed; one that gets SIGKILL in the middle
of a step, some steps after its checkpoint; and the same one resumed. Then every tensor and figure is compared, to the
last bit. `python -m dpm_scales.training.check_resume N train OPTIONS` trains and dies after step N.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from dpm_scales.cli.arguments import config_flags, tidy
from dpm_scales.cli.main import is_sweep
from dpm_scales.cli.program import child_environment, module_arguments
from dpm_scales.cli.stored import key_of
from dpm_scales.errors import UserError, require
from dpm_scales.models.checksums import read_checkpoint, read_tensors

#: defaults that make the runs short; a validation lies between checkpoint and kill
BRIEF = {
    "trainer.max_steps": 12,
    "checkpoint.every_n_steps": 5,
    "trainer.val_check_interval": 6,
    "trainer.limit_val_batches": 2,
    "trainer.log_every_n_steps": 1,
    "samples.num_images": 4,
}
#: options to leave out: without meaning here, or with effects outside the temporary folder
LEFT_OUT = ("check_resume", "run_dir", "resume", "logger")
PARTS = {
    "weights": ("current_model_state",),
    "average of the weights": ("state_dict", "averaging_state"),
    "power averages": ("power_averages",),  # only with ema.power_lengths
    "optimiser": ("optimizer_states",),
    "learning rate": ("lr_schedulers",),
    "place in the data": ("ImageDataModule", "global_step"),
    "skipped steps": ("bad_steps",),
    "density of the scales": ("importance",),  # only with scale_sampling=importance
}


def check_resume(cfg: DictConfig, overrides: list[str]) -> int:
    """Print what was compared and the verdict; return 0 if all is the same, 1 if not.

    Raises: UserError if a run fails on its own, or has no step between its first checkpoint and its last.
    """
    require(not is_sweep(), "check_resume=true checks one run; leave -m out")
    given = [o for o in overrides if key_of(o) not in LEFT_OUT]
    keys = {key_of(o) for o in given}
    brief = [f"{key}={value}" for key, value in BRIEF.items() if key not in keys]
    steps, every = (
        cfg[key.split(".")[0]][key.split(".")[1]] if key in keys else BRIEF[key]
        for key in ("trainer.max_steps", "checkpoint.every_n_steps")
    )
    require(
        0 < every < steps,
        f"check_resume=true kills between a checkpoint and the end: checkpoint.every_n_steps={every} must lie below "
        f"trainer.max_steps={steps}",
    )
    kill = min(every + 1 + (every - 1) // 2, steps)
    folder = Path(tempfile.mkdtemp(prefix="dpm-scales-check-"))
    options = tidy([*config_flags(), *given, *brief])
    whole, killed = folder / "undisturbed", folder / "killed"
    with Console(stderr=True).status("") as status:
        start = time.perf_counter()
        for number, (words, run_dir, kill_at) in enumerate(
            [("undisturbed", whole, None), (f"to be killed in step {kill}", killed, kill), ("resumed", killed, None)]
        ):
            left = f", {(time.perf_counter() - start) / number * (3 - number):.0f} s left" if number else ""
            status.update(f"run {number + 1} of 3, {words}{left}")
            _train([*options, *tidy([f"run_dir={run_dir}"])], kill_at, folder)
    print(f"{steps} steps; killed with SIGKILL in step {kill}, resumed from the checkpoint after step {every}")
    different = False
    for name, count, worst in _compare(whole, killed):
        verdict = "the same" if worst is None else f"DIFFERENT ({worst})"
        print(f"  {name:24} {count:>14}  {verdict}")
        different |= worst is not None
    if different:
        print(f"The resumed run DIFFERS from the undisturbed one; both are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    print("The resumed run is the undisturbed one, to the last bit.")
    return 0


def _train(options: list[str], kill_at: int | None, cwd: Path) -> None:
    """Train to the end, or until killed after optimiser step `kill_at`."""
    arguments = module_arguments("train", *options)
    if kill_at is not None:
        arguments = ["-m", __name__, str(kill_at), "train", *options]
    # its own session, so that the processes of other devices are killed with it
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=child_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate()
    finally:
        if process.poll() is None or kill_at is not None:
            _end(process)
    expected = 0 if kill_at is None else -signal.SIGKILL
    if process.returncode != expected:
        last = errors.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"a run of the check ended with status {process.returncode} ({last[0]}); see {cwd}")


def _end(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _compare(whole: Path, killed: Path) -> Iterator[tuple[str, str, str | None]]:
    """Yield the name, how much was compared, and the worst difference or None."""
    ours, theirs = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (whole, killed))
    for name, keys in PARTS.items():
        if not any(key in values for key in keys for values in (ours, theirs)):
            continue
        pairs = list(_leaves([ours.get(key) for key in keys], [theirs.get(key) for key in keys]))
        numbers = sum(a.numel() if isinstance(a, Tensor) else 1 for a, _ in pairs)
        yield name, f"{numbers} numbers", _worst(pairs)
    a, b = (read_tensors(folder / "model" / "model.safetensors") for folder in (whole, killed))
    yield "exported model", f"{sum(v.numel() for v in a.values())} numbers", _worst(list(_leaves(a, b)))
    patterns = {"metrics": "metrics.csv", "sample grids": "samples/*.png", "snapshots": "ema/step-*.safetensors"}
    for name, pattern in patterns.items():
        first, second = ({path.name: path.read_bytes() for path in folder.glob(pattern)} for folder in (whole, killed))
        differing = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
        if first or differing or name != "snapshots":
            yield name, f"{sum(map(len, first.values()))} bytes", ", ".join(differing) or None
    result, other = (json.loads((folder / "result.json").read_text()) for folder in (whole, killed))
    figures = [key for key in result if key not in ("seconds", "overrides")]
    yield (
        "result",
        f"{len(figures)} figures",
        ", ".join(key for key in figures if result[key] != other.get(key)) or None,
    )


def _leaves(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of values at the same place in two nested containers; a missing one is None."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys(), key=str):
            yield from _leaves(a.get(key), b.get(key))
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for x, y in zip(a, b, strict=True):
            yield from _leaves(x, y)
    else:
        yield a, b


def _worst(pairs: list[tuple[Any, Any]]) -> str | None:
    """Return None if all pairs are equal; else how many differ, and the largest difference of tensors."""
    count, largest = 0, 0.0
    for a, b in pairs:
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
            if not torch.equal(a, b):
                count += 1
                largest = max(largest, float((a.double() - b.double()).abs().max()))
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
            count += 1
    return f"{count} of {len(pairs)} values, by up to {largest:.3g}" if count else None


def _die_at(step: int) -> None:
    """Send SIGKILL to this process right after optimiser step `step`, before anything records the step."""
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)


if __name__ == "__main__":
    _die_at(int(sys.argv.pop(1)))
    runpy.run_module("dpm_scales", run_name="__main__", alter_sys=True)
