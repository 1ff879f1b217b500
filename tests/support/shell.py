"""Call the entry points as a shell does, in this process (fast) or in a separate one, on tiny real data."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import os
import pickle
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from PIL import Image

from dpm_scales.entry.start import console
from dpm_scales.models.instantiate import plain
from dpm_scales.models.model import PARTS
from dpm_scales.training import Model, Recipe, build_model
from dpm_scales.training.module import DiffusionModule
from support.compositions import CONFIGS, remembered

ROOT = Path(__file__).resolve().parents[2]

#: a constant learning rate, large enough that six steps change the samples
FAST = ("optimizer.learning_rate=0.01", "optimizer.warmup_steps=0", "optimizer.decay=constant")

#: a network of 11 k parameters and few samples; six steps on 8 px digits take about a second
SMALL = (
    "data.batch_size=16",
    "network.widths=[8,8]",
    "network.embedding_dim=16",
    "network.attention_levels=[]",
    "samples.num_images=4",
    "samples.curves=false",
    "sampler.steps=3",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.limit_val_batches=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
)


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    status: int
    out: str
    err: str


def call(script: str, *arguments: str, cwd: Path, environment: dict[str, str] | None = None) -> Outcome:
    """Run ``python script arguments`` in this process, capturing standard output and error.

    Hydra composes every config twice, first only for `hydra.mode`, which is never set here: once is enough.
    """
    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    status = 0
    GlobalHydra.instance().clear()
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(Hydra, "get_mode", lambda *_, **__: None),
        remembered(),
        mock.patch.object(sys, "argv", [script, *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        mock.patch.object(warnings, "formatwarning", warnings.formatwarning),
    ):
        for name in ("HYDRA_FULL_ERROR", "DPM_SCALES_TRACEBACK"):
            os.environ.pop(name, None)
        os.environ.update(environment or {})
        os.chdir(cwd)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            os.chdir(before)
            GlobalHydra.instance().clear()
    return Outcome(status, out.getvalue(), err.getvalue())


def command(*words: object) -> Outcome:
    """Run `dpm-scales` with these arguments in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", ["dpm-scales", *map(str, words)])
    # console() stores the form of the command in the environment
    with mock.patch.dict(os.environ), argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            console()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Outcome(status, out.getvalue(), err.getvalue())


def spawn(
    script: str, *arguments: str, cwd: Path, python: str = sys.executable, **options: Any
) -> subprocess.Popen[str]:
    """Start ``python script arguments`` in a separate process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "WANDB_MODE": "offline"}
    return subprocess.Popen(
        [python, str(ROOT / script), *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(script: str, *arguments: str, cwd: Path, python: str = sys.executable) -> Outcome:
    """Run ``python script arguments`` in a separate process to its end."""
    with spawn(script, *arguments, cwd=cwd, python=python) as process:
        out, err = process.communicate(timeout=300)
        return Outcome(process.returncode, out, err)


def train(run_dir: Path, *overrides: str) -> Path:
    """Train a small run to its end."""
    outcome = attempt(run_dir, *overrides)
    assert outcome.status == 0, outcome.err
    return run_dir


def sample(model: Path, out: Path, *overrides: str) -> Path:
    """Sample a folder of images."""
    outcome = call("sample.py", f"model={model}", f"out={out}", *overrides, cwd=out.parent)
    assert outcome.status == 0, outcome.err
    return out


@contextlib.contextmanager
def broken_off(after: int) -> Iterator[None]:
    """Let training fail in step number `after`, from 0, with a ZeroDivisionError."""
    step, calls = DiffusionModule.training_step, iter(range(10**6))

    def cut(self: DiffusionModule, *args: Any) -> Any:
        if next(calls) == after:
            raise ZeroDivisionError
        return step(self, *args)

    with mock.patch.object(DiffusionModule, "training_step", cut), pytest.raises(ZeroDivisionError):
        yield


@functools.cache
def _composed(name: str, overrides: tuple[str, ...]) -> bytes:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"), remembered():
        return pickle.dumps(compose(name, overrides=list(overrides)))


def composed(*overrides: str, name: str = "train") -> DictConfig:
    """Compose the config of the entry point `name`."""
    config: DictConfig = pickle.loads(_composed(name, overrides))
    return config


def files(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return inode, size and modification time of all files below a folder, by name, to see which were written.

    Locks are left out: taking one writes its holder's name.
    """
    found = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    found = {name: stat for name, stat in found.items() if not name.endswith(".lock")}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes that share the work of `sample.py` run in turn, in this one: none waits, and each decides."""
    monkeypatch.setattr("dpm_scales.distributed.ranks.barrier", lambda: None)
    monkeypatch.setattr("dpm_scales.distributed.ranks.first_decides", lambda decide: decide())


def drawn(folder: Path) -> dict[str, bytes]:
    """Return the contents of the numbered images in a folder."""
    return {name: data for name, data in files(folder).items() if re.fullmatch(r"\d{6}\.png", name)}


def checkpoint(run_dir: Path, name: str = "last") -> dict[str, Any]:
    values: dict[str, Any] = torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return values


def plain_checkpoint(step: int = 3, **more: Any) -> dict[str, Any]:
    """Return a minimal checkpoint of a step."""
    generator = torch.Generator().manual_seed(step)
    state = {"model.w": torch.randn(3, 5, generator=generator), "model.b": torch.arange(4)}
    return {"state_dict": state, "recipe": {"version": 3}, "global_step": step, **more}


def settings(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((run_dir / "config.yaml").read_text())
    return values


def table(run_dir: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(run_dir: Path, name: str) -> list[float]:
    """Return one column of metrics.csv, in the order of the steps."""
    return [float(row[name]) for row in table(run_dir) if row.get(name)]


def network_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if ".network." in name}


def attempt(run_dir: Path, *overrides: str) -> Outcome:
    """Attempt a small run, which may fail."""
    return call("train.py", *SMALL, *overrides, f"run_dir={run_dir}", cwd=run_dir.parent)


def small_model(*overrides: str) -> Model:
    """Build an untrained model for 8 px digits."""
    config = composed(*(o for o in SMALL if o.startswith(("network", "sampler"))), *overrides)
    parts = {name: plain(config[name]) for name in PARTS}
    for key in ("in_channels", "out_channels", "num_classes"):
        parts["network"].pop(key)
    return build_model(Recipe(parts, 1, (8, 8)))


def photos(folder: Path, number: int = 12, size: tuple[int, int] = (12, 20), first: int = 0) -> Path:
    """Write RGB files of smooth colours, size = (H, W)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for index in range(first, first + number):
        slope = rng.uniform(-4, 4, (2, 3))
        image = 128 + slope[0] * (rows[..., None] - size[0] / 2) + slope[1] * (columns[..., None] - size[1] / 2)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{index:03d}.png")
    return folder


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Assert that nested containers of tensors and plain values are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{index}]")
    else:
        assert a == b, where
