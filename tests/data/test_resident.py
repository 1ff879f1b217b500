"""Images kept on the training device give the batches of the loader that copies each of them."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales import data
from dpm_scales.data import datamodule, decoded
from dpm_scales.data.base import TensorImages
from dpm_scales.data.decoded import DecodedImages, DeviceImages, fits
from dpm_scales.data.draws import first_draws
from dpm_scales.errors import UserError
from dpm_scales.shards import ShardSource
from dpm_scales.shards.source import ShardImages
from support.shards import encoded, numbered, packed

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1, 2**32, 2**40 + 5, 2**70 + 3])
def test_draws_are_those_of_numpys_generators(seed: int) -> None:
    rng = np.random.default_rng(seed % 1000)
    epoch = np.concatenate([rng.integers(0, 300, 100), rng.integers(0, 2**32, 20), [0, 2**32 - 1]])
    index = np.concatenate([rng.integers(0, 60000, 100), rng.integers(0, 2**32, 20), [0, 2**32 - 1]])
    expected = [np.random.default_rng((seed, int(e), int(i))).random() for e, i in zip(epoch, index, strict=True)]
    assert first_draws(seed, epoch, index).tolist() == expected


def pictures(number: int = 23) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, (number, 3, 4, 5), dtype=np.uint8), rng.integers(0, 3, number)


class Recorder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[str, Tensor, Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(("train", *batch))
        return self.weight * 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.seen.append(("val", *batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(on_device: bool | None, start: int, **options: Any) -> list[tuple[str, Tensor, Tensor]]:
    """Three epochs, with a validation after each."""
    images, labels = pictures()
    source = data.GivenImages(images, labels, 3, 0.2, random_flip=True)
    module = data.ImageDataModule(source, 4, seed=5, on_device=on_device, **options)
    module.set_start_batch(start)
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, module)
    assert (module._held is not None) == (on_device is not False)
    return recorder.seen


@pytest.mark.parametrize(
    ("start", "options"), [(0, {}), (6, {"drop_last": False}), (2, {"num_workers": 1, "pin_memory": False})]
)
def test_a_run_sees_the_same_batches(start: int, options: dict[str, Any]) -> None:
    expected = fit(False, start, **options)
    assert {stage for stage, _, _ in expected} == {"train", "val"}
    for on_device in (None, True):
        found = fit(on_device, start, **options)
        assert len(found) == len(expected)
        for (stage, images, labels), (stage_, images_, labels_) in zip(found, expected, strict=True):
            assert stage == stage_ and images.dtype == torch.uint8
            assert torch.equal(images, images_) and torch.equal(labels, labels_)


def test_each_rank_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datamodule, "batches_processed", lambda trainer: 0)
    images, _ = pictures()
    batches = {}
    for on_device in (True, False):
        for rank in (0, 1):
            module = data.ImageDataModule(
                data.GivenImages(images, val_fraction=0, random_flip=True), 3, seed=1, on_device=on_device
            )
            strategy = SimpleNamespace(root_device=CPU)
            trainer: Any = SimpleNamespace(global_rank=rank, world_size=2, strategy=strategy, is_global_zero=True)
            module.trainer = trainer
            loaded = module.train_dataloader()
            batches[on_device, rank] = [module.on_after_batch_transfer(batch, 0) for batch in loaded]
    for rank in (0, 1):
        assert len(batches[True, rank]) == 3
        for found, expected in zip(batches[True, rank], batches[False, rank], strict=True):
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not torch.equal(batches[True, 0][0][0], batches[True, 1][0][0])


def test_without_a_trainer_loaders_give_images() -> None:
    module = data.ImageDataModule(data.Digits(), 8, on_device=True)
    for loader in (module.train_dataloader(), module.val_dataloader()):
        images, _ = next(iter(loader))
        assert images.shape == (8, 1, 8, 8)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets the free bytes of a pretended GPU."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    return lambda count: monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (count, 2**40))


def test_images_stay_on_the_host_where_they_do_not_fit(free: Callable[[int], None]) -> None:
    images = TensorImages(torch.zeros(1000, 3, 32, 32, dtype=torch.uint8))
    for count, left in ((100 * 2**20, True), (8 * 2**20, False)):
        free(count)
        assert fits(images, (3, 32, 32), CUDA) == left
        assert fits(images, (3, 32, 32), CPU)
    rows = [(torch.zeros(1, 4, 4, dtype=torch.uint8), 0)] * 8
    given = data.GivenImages(rows).train()  # these are read one by one, and may take any time
    assert not fits(given, (1, 4, 4), CPU) and not fits(given, (1, 4, 4), CUDA)


def test_small_sets_of_files_are_kept_on_a_gpu(
    tmp_path: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, a zip archive and shards, by the bytes of their files; not what is cropped, fetched or large."""
    packed(tmp_path / "shards", 12, 5)
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number in range(10):
            content = encoded(numbered(number))
            (tmp_path / "folder" / f"{number}.png").write_bytes(content)
            archive.writestr(f"{number}.png", content)
    sizes = {path: path.stat().st_size for path in tmp_path.rglob("*.*")}
    free(2**30)
    shape, options = (1, 2, 3), {"channels": 1, "val_fraction": 0}
    folder = data.ImageFolder(tmp_path / "folder", random_flip=True, **options).train()
    shards = ShardSource(tmp_path / "shards", **options).train()
    parts: dict[str, data.ImageDataset] = {
        "folder": folder,
        "zip": data.ImageFolder(tmp_path / "images.zip", **options).train(),
        "shards": shards,
        "decoded": DecodedImages(folder, shape, tmp_path / "cache"),
    }
    bytes_of = {
        "folder": sum(size for path, size in sizes.items() if path.suffix == ".png"),
        "zip": sizes[tmp_path / "images.zip"],
        "shards": sum(size for path, size in sizes.items() if path.suffix == ".tar"),
    }
    bytes_of["decoded"] = bytes_of["folder"]
    for name, part in parts.items():
        assert part.file_bytes() == bytes_of[name] > 0
        assert fits(part, shape, CUDA) and not fits(part, shape, CPU)
        with monkeypatch.context() as patched:
            patched.setattr(decoded, "QUICK_BYTES", bytes_of[name] - 1)
            assert not fits(part, shape, CUDA)
    free(4 * len(folder) * 6 - 1)
    assert not fits(folder, shape, CUDA)
    free(2**30)
    cropped = data.ImageFolder(tmp_path / "folder", image_size=2, random_crop=True, **options).train()
    assert not fits(cropped, shape, CUDA)
    assert isinstance(shards, ShardImages)
    shards.shards.places = ["https://example.org/a.tar", *shards.shards.places[1:]]
    assert shards.file_bytes() == math.inf and not fits(shards, shape, CUDA)


def test_images_that_are_there_already_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a large array on the CPU, which is kept there by default."""
    images = TensorImages(torch.zeros(8, 1, 1, 2**22, dtype=torch.uint8))
    monkeypatch.setattr("dpm_scales.memory.available_memory", lambda device=None: 0.0)
    held = DeviceImages(images, (1, 1, 2**22), CPU, 0, False)
    assert held.images.data_ptr() == images.images.data_ptr()
    with pytest.raises(UserError, match=r"data\.on_device=true with 8 images .*set data\.on_device=false"):
        DeviceImages(images, (1, 1, 2**22), CUDA, 0, False)
