"""The order of training images after a resume, with Lightning's own trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor

from dpm_scales import data

IMAGES, BATCH, STEPS = 13, 3, 11  # four batches an epoch, one image left out of each
Record = list[tuple[int, int]]


class Numbered(data.ImageDataset):
    """Images that show their own index and the draw of their augmentation."""

    def __len__(self) -> int:
        return IMAGES

    def get(self, index: int, rng: np.random.Generator | None) -> tuple[Tensor, int]:
        draw = 0 if rng is None else int(rng.integers(256))
        return torch.tensor([index, draw], dtype=torch.uint8).reshape(1, 1, 2), index


class NumberedSource(data.ImageSource):
    channels = 1
    image_size = (1, 2)

    def train(self) -> Numbered:
        return Numbered()

    def val(self) -> Numbered:
        return Numbered()


class Recorder(pl.LightningModule):
    """Records what each training step sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Record] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append([tuple(image.flatten().tolist()) for image in batch[0]])
        return self.weight * batch[0].float().mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        assert batch[0].dtype == torch.uint8

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path,
    max_steps: int,
    ckpt_path: Path | None = None,
    workers: int = 0,
    module: Recorder | None = None,
    extra: pl.Callback | None = None,
    **options: Any,
) -> list[Record]:
    module = module or Recorder()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=[saver] if extra is None else [saver, extra],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dataloader is not resumable.*")
        trainer.fit(module, data.ImageDataModule(NumberedSource(), BATCH, workers), ckpt_path=ckpt_path)
    return module.seen


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, fit(folder, STEPS)


def test_an_undisturbed_run_shuffles_every_epoch(undisturbed: tuple[Path, list[Record]]) -> None:
    _, seen = undisturbed
    assert len(seen) == STEPS
    epochs = [[index for batch in seen[first : first + 4] for index, _ in batch] for first in (0, 4)]
    assert len(set(epochs[0])) == len(set(epochs[1])) == 12
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resuming_at_any_step_continues_the_order(
    undisturbed: tuple[Path, list[Record]], tmp_path: Path, step: int
) -> None:
    folder, seen = undisturbed
    assert fit(tmp_path, STEPS, folder / f"step={step}.ckpt") == seen[step:]


def test_resuming_twice(undisturbed: tuple[Path, list[Record]], tmp_path: Path) -> None:
    folder, seen = undisturbed
    assert fit(tmp_path / "a", 6, folder / "step=3.ckpt") == seen[3:6]
    assert fit(tmp_path / "b", STEPS, tmp_path / "a" / "step=6.ckpt") == seen[6:]


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 2},
        {"limit_train_batches": 3},
        {"val_check_interval": 2},
        {"accumulate_grad_batches": 2, "max_steps": 5},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)
def test_resuming_under_other_trainers(tmp_path: Path, options: dict[str, Any]) -> None:
    steps = options.pop("max_steps", STEPS)
    seen = fit(tmp_path / "a", steps, **options)
    per_step = options.get("accumulate_grad_batches", 1)
    resumed = fit(tmp_path / "b", steps, tmp_path / "a" / "step=3.ckpt", **options)
    assert resumed == seen[3 * per_step :]


def test_a_checkpoint_is_plain(undisturbed: tuple[Path, list[Record]]) -> None:
    checkpoint = torch.load(undisturbed[0] / "step=5.ckpt", weights_only=True)
    assert checkpoint["ImageDataModule"]["next_batch"] == 5


class Interrupted(Recorder):
    """Fails inside its sixth training step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if len(self.seen) == 5:
            raise RuntimeError("interrupted")
        return super().training_step(batch, batch_idx)


def test_an_interrupted_step_is_done_again(undisturbed: tuple[Path, list[Record]], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(tmp_path, STEPS, module=Interrupted(), extra=OnExceptionCheckpoint(tmp_path, "crash"))
    assert fit(tmp_path, STEPS, tmp_path / "crash.ckpt") == undisturbed[1][5:]
