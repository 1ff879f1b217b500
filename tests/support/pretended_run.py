"""Train on a pretended GPU: Lightning's whole loop runs on fake tensors, and what would wait for the GPU is found.

Fake tensors compute nothing, and raise where the host reads a value. What else makes the host wait is a copy between it
and the device, unless it is asked not to; these are listed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import dataloader

from dpm_scales.training.module import DiffusionModule
from dpm_scales.training.run import train
from support.oracles import pretended_gpu
from support.shell import SMALL, composed

STRATEGY = "ddp_pretended"  # begins as the names do that options may have
INTO = ("copy_", "_foreach_copy_")


class Waits(TorchDispatchMode):
    """Lists operations between devices that would wait for one of them, while `listens`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.listens = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        name = func.overloadpacket.__name__
        if self.listens and ("copy" in name or "index" in name):
            ends = (args, given) if name in INTO or "index" in name else (args, given, result)
            kinds = {one.device.type for one in tree_leaves(ends) if isinstance(one, Tensor)}
            kept_going = given.get("non_blocking", False) or (name in INTO and True in args[2:])
            if len(kinds) > 1 and not kept_going:
                self.found.append(
                    f"{name} of {[tuple(one.shape) for one in tree_leaves(args) if hasattr(one, 'shape')]}"
                )
        return result


class _Pretended(SingleDeviceStrategy):
    def teardown(self) -> None:
        """Leave the fake tensors where they are: a module that optimisers refer to can't be moved."""


def waits(run_dir: Path, *overrides: str, device: str = "cuda:0", steps: int = 3) -> list[str]:
    """Train for some steps with these options; return what would wait for the device after the first of them.

    Gradients exist on a pretended CPU alone: for those of a GPU torch asks its driver.

    Raises: DataDependentOutputException and its like where the host reads a value.
    """
    found = Waits()
    usual = ("trainer.max_steps=1000", "trainer.val_check_interval=1000", "trainer.log_every_n_steps=1000")
    options = (*SMALL, *usual, "trainer.limit_val_batches=0", "data.on_device=true", f"trainer.strategy={STRATEGY}")
    with pretended_fit(device, found), _listening(found, steps):
        train(composed(*options, *overrides), run_dir, [])
    return found.found


class _EnoughError(Exception):
    pass


@contextmanager
def _listening(found: Waits, steps: int) -> Iterator[None]:
    """Listen from the second batch on, and end training before batch number `steps`."""
    step, calls = DiffusionModule.training_step, iter(range(10**6))

    def training_step(self: DiffusionModule, *args: Any) -> Tensor:
        number = next(calls)
        found.listens = 0 < number < steps
        if number == steps:
            raise _EnoughError
        return step(self, *args)

    with mock.patch.object(DiffusionModule, "training_step", training_step):
        try:
            yield
        except _EnoughError:
            return
    raise AssertionError("training ended by itself")


@contextmanager
def pretended_fit(device: str, found: Waits) -> Iterator[None]:
    """Let `Trainer.fit` with the strategy `STRATEGY` run on a pretended device."""
    fit = pl.Trainer.fit

    def on_fake_tensors(*args: Any, **kwargs: Any) -> None:
        with pretended_gpu(), found:
            fit(*args, **kwargs)

    def backward(self: DiffusionModule, loss: Tensor) -> None:
        if loss.device.type == "cpu":
            loss.backward()
            return
        for p in self.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad + 1

    StrategyRegistry.register(STRATEGY, _Pretended, override=True, device=torch.device(device))
    fetching = dataloader._SingleProcessDataLoaderIter
    with ExitStack() as patches:
        for owner, name, replacement in (
            (pl.Trainer, "fit", on_fake_tensors),
            (DiffusionModule, "backward", backward),
            (CPUAccelerator, "setup_device", lambda *_: None),
            # what the host does by itself, with tensors of its own
            (pl.loops.fit_loop, "has_len_all_ranks", lambda *_: True),
            (dataloader.DataLoader, "__iter__", _for_real(dataloader.DataLoader.__iter__)),
            (fetching, "_next_data", _for_real(fetching._next_data)),
            (Tensor, "__deepcopy__", _copied(Tensor.__deepcopy__)),
            (nn.Parameter, "__deepcopy__", _copied(nn.Parameter.__deepcopy__)),
        ):
            patches.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _for_real(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with no_dispatch():
            return function(*args, **kwargs)

    return call


def _copied(deepcopy: Callable[[Tensor, dict[int, Any]], Tensor]) -> Callable[[Tensor, dict[int, Any]], Tensor]:
    """Return a function that copies real tensors as before; torch can't copy fake ones."""

    def copy(self: Tensor, memo: dict[int, Any]) -> Tensor:
        if isinstance(self, FakeTensor):
            return memo.setdefault(id(self), self.detach().clone())  # type: ignore[no-any-return]
        with no_dispatch():
            return deepcopy(self, memo)

    return copy
