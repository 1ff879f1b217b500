"""Compile the network of a run: `compile=null` compiles on CUDA, and trains uncompiled if that fails."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

from omegaconf import DictConfig
from torch import nn

from dpm_scales.distributed.fsdp import FSDP
from dpm_scales.errors import UserError
from dpm_scales.networks import compiled_training
from dpm_scales.training.settings import uses_cuda


def compiles(cfg: DictConfig) -> bool:
    """Return whether a run compiles its network: as `compile` says; if null, on CUDA unless sharded by FSDP."""
    return bool(cfg.compile) if cfg.compile is not None else uses_cuda(cfg) and str(cfg.trainer.strategy) != FSDP


def compiled(cfg: DictConfig, network: nn.Module, main: bool) -> AbstractContextManager[None]:
    """Return a context for training, in which the network is compiled if the options say so.

    If compiling fails, `compile=null` prints a line and trains the plain network; `compile=true` raises UserError.

    Args:
        main: whether this rank prints.
    """
    if not compiles(cfg):
        return nullcontext()

    def failed(reason: str) -> None:
        line = f"compiling the network failed ({reason})"
        if cfg.compile:
            raise UserError(f"compile=true: {line}; leave it out to train uncompiled")
        if main:
            warnings.warn(f"{line}; training uncompiled; compile=false silences this", stacklevel=2)

    return compiled_training(network, failed)
