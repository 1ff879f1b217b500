"""Stop all ranks of a run after the same step, and requeue its job.

Schedulers send a signal before they take a machine away: SIGUSR1 or SIGUSR2 (`sbatch --signal`) before the time is up,
SIGTERM on preemption; Ctrl-C is SIGINT. It may reach one process or all of them, at different steps; they end after the
same step, with a checkpoint. After SIGUSR1 and SIGUSR2 the job is requeued: by submitit if it started the job, else by
`scontrol requeue`. After SIGTERM the scheduler decides. Lightning's own requeueing, which saves in the middle of a
step, is not used.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import distributed

from dpm_scales.distributed.lightning_private import leave_signals_to_us, stop_after_step, validation_follows
from dpm_scales.storage import any_gone

REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)
#: if ranks receive different signals, the largest number wins: SIGINT, the least urgent, is the smallest
SIGNALS = (signal.SIGINT, *REQUEUE, signal.SIGTERM)
STOPPING = "stopping after this step, with a checkpoint; Ctrl-C once more stops at once"


class StopTogether(Callback):
    """A callback that ends all ranks after the same step once any of them receives a signal.

    `Checkpoints` then saves that step. The same happens once a grid or a metric finds that the run's folder is gone;
    the checkpoint is then saved elsewhere.

    A validation that follows the step, or has begun, is finished after a first Ctrl-C; other signals interrupt it.
    A second Ctrl-C ends its process at once. Ranks agree once per step, on the CPU, without waiting for the device.
    """

    def __init__(self) -> None:
        self.received = 0
        self._step = 0
        self._speaks = True
        self._group: Any = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.received = 0
        if trainer.world_size > 1:
            leave_signals_to_us(trainer)
            self._group = distributed.new_group(backend="gloo")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step, self._speaks = trainer.global_step, trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # after Lightning's handlers, which restore the previous ones at the end
                signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # no checkpoint holds gradients that are being accumulated, and after the last step the run ends anyway
        self._note_gone()
        if trainer.global_step != self._step and not 0 < trainer.max_steps <= trainer.global_step:
            self._step = trainer.global_step
            self._agree(trainer, patient=validation_follows(trainer))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not 0 < trainer.max_steps <= trainer.global_step:
            self._agree(trainer, patient=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note_gone()
        if not 0 < trainer.max_steps <= trainer.global_step:
            self._agree(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._speaks:
                print(STOPPING, file=sys.stderr, flush=True)

    def _note_gone(self) -> None:
        """Stop as after Ctrl-C if a folder is gone: a validation is finished, as none can be checkpointed midway."""
        if any_gone():
            self.received = self.received or signal.SIGINT

    def _agree(self, trainer: pl.Trainer, patient: bool = False) -> None:
        """Stop if any rank has received a signal; with `patient`, not yet after Ctrl-C."""
        if self._group is not None:
            flag = torch.tensor(self.received)
            distributed.all_reduce(flag, distributed.ReduceOp.MAX, self._group)
            self.received = int(flag)
        if self.received and not (patient and self.received == signal.SIGINT):
            stop_after_step(trainer)


def requeue(number: int) -> None:
    """Requeue the job after signal `number`, if it is one of `REQUEUE`; does not return under submitit.

    Called by the first rank. Does nothing outside a job.
    """
    if number not in REQUEUE:
        return
    if "SUBMITIT_EXECUTOR" in os.environ:
        for handler in map(signal.getsignal, REQUEUE):
            if callable(handler):
                handler(number, None)  # submitit's handler, which `StopTogether` had replaced
                return
    if "SLURM_JOB_ID" in os.environ and shutil.which("scontrol"):
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
        if subprocess.run(["scontrol", "requeue", job], check=False).returncode:
            print(f"scontrol can't queue job {job} again; submit it again, and it resumes", file=sys.stderr)
