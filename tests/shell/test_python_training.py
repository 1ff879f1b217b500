"""`ds.train`: the runs of `train.py` from Python, to the byte, with images of every kind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import dpm_scales as ds
from dpm_scales import api
from dpm_scales.data import GivenImages
from dpm_scales.shards import ShardSource
from support.shards import packed
from support.shell import (
    ROOT,
    assert_equal,
    broken_off,
    call,
    checkpoint,
    files,
    photos,
    sample,
    settings,
    table,
    train,
)
from support.warm import warm_python

NETWORK: dict[str, Any] = {
    **{"widths": [8, 8], "embedding_dim": 16, "attention_levels": [], "num_heads": 2},
    **{"blocks_per_level": 1, "patch_size": 1, "dropout": 0.0, "extra_decoder_block": False},
}
SMALL: dict[str, Any] = {
    "data": {"batch_size": 16},
    "samples": {"num_images": 4, "curves": False},
    "trainer": {"val_check_interval": 3, "limit_val_batches": 2, "log_every_n_steps": 1, "accelerator": "cpu"},
    "progress": False,
}
LINE = ("network.num_heads=2", "trainer.enable_progress_bar=false")


def small(process: ds.Process | None = None, seed: int = 0, **options: Any) -> ds.Model:
    torch.manual_seed(seed)
    model = ds.Model(ds.UNet(**NETWORK), process, **{"image_size": 8, "channels": 1, **options})
    return model.with_sampler(steps=3)


def images_of(count: int = 60, channels: int = 1) -> Tensor:
    return torch.randint(0, 256, (count, channels, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ds.Model, ds.Losses]:
    """A run of digits from Python."""
    folder = tmp_path_factory.mktemp("python") / "run"
    model = small(ds.Blurring())
    losses = ds.train(model, ds.Digits(), steps=6, run_dir=folder, **SMALL)
    return folder, model, losses


def test_the_run_is_that_of_the_command_line(digits: tuple[Path, ds.Model, ds.Losses], tmp_path: Path) -> None:
    folder, model, losses = digits
    line = train(tmp_path / "line", "process=blurring", *LINE)
    ours, theirs = files(folder), files(line)
    assert ours.keys() == theirs.keys()
    same = ("metrics.csv", "model/model.safetensors", *(name for name in theirs if name.startswith("samples/")))
    for name in same:
        assert ours[name] == theirs[name], name
    assert_equal(checkpoint(folder)["state_dict"], checkpoint(line)["state_dict"])
    assert_equal(checkpoint(folder)["optimizer_states"], checkpoint(line)["optimizer_states"])
    ours_config, theirs_config = settings(folder), settings(line)
    for section in ("process", "target", "prior", "sampler", "optimizer", "ema", "trainer"):
        assert ours_config[section] == theirs_config[section]
    assert losses.train == {int(row["step"]): float(row["train/loss"]) for row in table(line) if row["train/loss"]}
    assert list(losses.train) == list(range(6)) and list(losses.val) == [2, 5]


def test_the_model_has_the_ema_weights_and_samples_as_the_command_line(
    digits: tuple[Path, ds.Model, ds.Losses], tmp_path: Path
) -> None:
    folder, model, _ = digits
    loaded = ds.load(folder)
    assert not model.training and model.recipe == loaded.recipe
    assert model.recipe.parts["target"]["preconditioning"] in ("wiener", "scalar")
    assert_equal(dict(model.state_dict()), dict(loaded.state_dict()))
    assert all(p.is_contiguous() for p in model.parameters())
    shown = model.sample(3, seed=5)
    out = sample(folder, tmp_path / "out", "num_samples=3", "seed=5", "device=cpu")
    assert torch.equal(
        torch.stack([torch.tensor(np.array(Image.open(out / f"{i:06d}.png")))[None] for i in range(3)]), shown
    )
    model.save(tmp_path / "saved")
    assert files(tmp_path / "saved")["model.safetensors"] == files(folder)["model/model.safetensors"]
    assert files(tmp_path / "saved")["config.yaml"] == files(folder)["model/config.yaml"]


def test_a_run_is_resumed_by_either(digits: tuple[Path, ds.Model, ds.Losses], tmp_path: Path) -> None:
    whole, _, losses = digits
    folder = tmp_path / "run"
    with broken_off(4):
        ds.train(small(ds.Blurring()), ds.Digits(), 6, folder, **SMALL, checkpoint={"every_n_steps": 2})
    assert not (folder / "model").exists()
    outcome = call("train.py", f"run_dir={folder}", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert files(folder)["model/model.safetensors"] == files(whole)["model/model.safetensors"]
    assert files(folder)["metrics.csv"] == files(whole)["metrics.csv"]
    model = small(ds.Blurring(), seed=9)
    # a finished run gives its weights and losses
    assert ds.train(model, ds.Digits(), 6, folder, **SMALL) == losses
    assert_equal(dict(model.state_dict()), dict(ds.load(whole).state_dict()))
    longer = ds.train(model, ds.Digits(), 8, folder, **SMALL)
    assert list(longer.train) == list(range(8)) and longer.train.items() >= losses.train.items()
    with pytest.raises(ds.UserError, match="was trained with process=Blurring, and now process is VP"):
        ds.train(small(), ds.Digits(), 8, folder, **SMALL)


def test_tensors_are_resumed_from_python_alone(tmp_path: Path) -> None:
    images = images_of()
    whole, folder = small(), tmp_path / "run"
    options = {**SMALL, "optimizer": {"learning_rate": 0.01, "warmup_steps": 0}}
    expected = ds.train(whole, images, 5, tmp_path / "whole", **options)
    before = torch.random.get_rng_state()
    with broken_off(3):
        ds.train(small(), images, 5, folder, **options, checkpoint={"every_n_steps": 2})
    assert torch.equal(torch.random.get_rng_state(), before)
    outcome = call("train.py", f"run_dir={folder}", cwd=tmp_path)
    assert outcome.status == 2 and len(outcome.err.splitlines()) == 1
    assert "the images of this run were given in Python; resume it there, by ds.train(" in outcome.err
    model = small(seed=3)
    assert ds.train(model, images.numpy(), 5, folder, **options, checkpoint={"every_n_steps": 2}) == expected
    assert_equal(dict(model.state_dict()), dict(whole.state_dict()))
    assert not GlobalHydra.instance().is_initialized()


def test_classes_are_learnt_and_drawn() -> None:
    labels = np.arange(60, dtype=np.uint8) % 3
    model = small(num_classes=3, label_dropout=0.2)
    losses = ds.train(model, images_of(), 3, labels=labels, **SMALL)
    assert len(losses.train) == 3 and model.recipe.label_dropout == 0.2
    assert model.sample(3, labels=[2], guidance=2.0).shape == (3, 1, 8, 8)
    named = small(num_classes=10)
    ds.train(named, ds.Digits(), 1, **SMALL)
    assert named.recipe.class_names == tuple("0123456789")


class Pictures(Dataset[Any]):
    """Items of torch: PIL images or tensors, alone or with labels."""

    classes = ("dark", "light")

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        image = images_of(40, 3)[index]
        if self.kind == "odd" and index == 7:
            return image[:, :5]
        if self.kind == "floats":
            return image / 255
        if self.kind == "pil":
            return Image.fromarray(image.permute(1, 2, 0).numpy()), np.int64(index % 2)
        return (image, torch.tensor(index % (3 if self.kind == "labels" else 2))) if self.kind != "plain" else image


def weights(model: ds.Model, images: Any, **options: Any) -> dict[str, Tensor]:
    """Train for two steps, without a validation."""
    quick = {"samples": {"num_images": 0}, "trainer": {**SMALL["trainer"], "limit_val_batches": 0}}
    ds.train(model, images, 2, **{**SMALL, **quick, **options})
    return dict(model.state_dict())


def test_images_of_every_kind_train_the_same(tmp_path: Path) -> None:
    tensor, three = images_of(40, 3), {"channels": 3}
    expected = weights(small(**three), tensor)
    assert_equal(weights(small(**three), Pictures("plain")), expected)
    assert_equal(weights(small(**three), Pictures("pil")), expected)
    assert_equal(weights(small(**three), tensor.numpy()), expected)
    assert_equal(weights(small(**three), GivenImages(tensor)), expected)
    module = ds.ImageDataModule(GivenImages(tensor), 16)
    assert_equal(weights(small(**three), module, data={}), expected)
    np.savez(tmp_path / "a.npz", images=tensor.permute(0, 2, 3, 1).numpy())
    assert_equal(weights(small(**three), tmp_path / "a.npz"), expected)
    names = small(**three, num_classes=2)
    ds.train(names, Pictures("pil"), 1, **SMALL)
    assert names.recipe.class_names == ("dark", "light")


def test_a_folder_is_the_data_of_the_command_line(tmp_path: Path) -> None:
    place, folder = photos(tmp_path / "photos", 40, size=(12, 20)), tmp_path / "run"
    model = small(image_size=(6, 10), channels=3)
    ds.train(model, str(place), 2, folder, **SMALL)
    outcome = call("train.py", f"run_dir={folder}", "trainer.max_steps=4", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    config = settings(folder)["data"]
    assert config["root"] == str(place) and config["channels"] == 3 and config["image_size"] == [6, 10]


def test_shards_are_the_data_of_the_command_line(tmp_path: Path) -> None:
    packed(tmp_path / "s", 12, 4)
    model = small(image_size=(2, 3), num_classes=3)
    name, options = api._data_settings(model, tmp_path / "s", None, {"window": 2})[0]
    assert name == "webdataset" and options["labels"] == "cls" and options["window"] == 2
    source = ShardSource(**{key: value for key, value in options.items() if key != "window"})
    assert source.image_size == (2, 3) and source.num_classes == 3


class Local(nn.Module):
    """A network that keeps none of its arguments."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def test_a_network_that_can_not_be_described_is_trained_and_resumed_from_python(tmp_path: Path) -> None:
    def make() -> ds.Model:
        torch.manual_seed(0)
        return ds.Model(Local(4), image_size=8, channels=1, sampler=ds.Heun(3))

    expected = make()
    ds.train(expected, images_of(), 4, **SMALL)
    model, folder = make(), tmp_path / "run"
    with broken_off(3):
        ds.train(make(), images_of(), 4, folder, **SMALL, checkpoint={"every_n_steps": 2})
    ds.train(model, images_of(), 4, folder, **SMALL)
    assert_equal(dict(model.state_dict()), dict(expected.state_dict()))
    again = make()
    ds.train(again, images_of(), 4, folder, **SMALL)
    assert_equal(dict(again.state_dict()), dict(expected.state_dict()))
    with pytest.raises(ds.UserError, match="can't be saved: Local keeps no attribute of the name"):
        model.save(tmp_path / "model")
    with pytest.raises(ds.UserError, match="has no config.yaml beside it"):
        ds.load(folder)


def test_options_are_those_of_the_command_line(tmp_path: Path) -> None:
    ds.train(
        small(),
        images_of(),
        2,
        tmp_path / "run",
        **{**SMALL, "data": {"batch_size": 8, "random_flip": True}},
        weight=ds.MinSNR(3.0),
        logger="tensorboard",
        scale_sampling="importance",
        optimizer={"betas": (0.8, 0.9), "decay": "constant"},
        seed=4,
    )
    config = settings(tmp_path / "run")
    assert config["weight"] == {"_target_": "dpm_scales.weights.MinSNR", "gamma": 3.0}
    assert config["optimizer"]["betas"] == [0.8, 0.9] and config["optimizer"]["decay"] == "constant"
    assert config["data"]["batch_size"] == 8 and config["data"]["random_flip"] is True and config["seed"] == 4
    assert (tmp_path / "run" / "tensorboard").is_dir() and config["scale_sampling"] == "importance"


def mistaken(images: Any = None, model: Any = None, **options: Any) -> Any:
    images = images_of() if images is None else images
    return lambda: ds.train(small() if model is None else model, images, **{"steps": 1, **SMALL, **options})


MISTAKES: dict[str, tuple[Any, str]] = {
    "model": (mistaken(model=nn.Identity()), "model must be a Model, got Identity"),
    "steps": (mistaken(steps=0), "steps must be a whole number >= 1"),
    "floats": (mistaken(images_of() / 255), r"images are float32; give uint8 .*\(images \* 255\).round"),
    "channels last": (mistaken(np.zeros((9, 8, 8, 3), np.uint8)), "of channels last: images.transpose"),
    "grey": (mistaken(torch.zeros(9, 8, 8, dtype=torch.uint8)), r"of grey images: images\[:, None\]"),
    "channels": (mistaken(images_of(40, 3)), r"images have .* = \(3, 8, 8\), and the model \(1, 8, 8\)"),
    "empty": (mistaken(images_of()[:0]), "images have shape"),
    "few": (mistaken(images_of(10)), "batch_size"),
    "kind": (mistaken(3), "images must be a tensor, a folder"),
    "none there": (mistaken("nowhere"), "nowhere: no such file or folder of images"),
    "no images": (mistaken(Path(__file__).parents[1] / "support"), "support"),
    "labels": (mistaken(labels=[0.5] * 60, model=small(num_classes=2)), r"labels are torch.float32 .*integers"),
    "number of labels": (mistaken(labels=[0, 1], model=small(num_classes=2)), r"of shape \(2,\)"),
    "high labels": (
        mistaken(labels=[3] * 60, model=small(num_classes=2)),
        "labels go from 3 to 3; this model",
    ),
    "no labels": (mistaken(model=small(num_classes=2)), "num_classes=2, and the images have no labels; give labels="),
    "other labels": (
        mistaken(ds.Digits(), model=small(num_classes=2)),
        "the images have labels of 10",
    ),
    "labels of a folder": (mistaken("x", labels=[1]), "labels= are for tensors"),
    "items": (
        mistaken(Pictures("floats"), model=small(channels=3)),
        "item 0 is torch.float32 .*PILToTensor, not",
    ),
    "odd item": (
        mistaken(Pictures("odd"), model=small(channels=3), steps=3),
        r"item 7 has shape \(3, 5, 8\) and",
    ),
    "odd label": (
        mistaken(Pictures("labels"), model=small(channels=3, num_classes=2), steps=3),
        "has the label 2; ",
    ),
    "option": (mistaken(optimiser={"learning_rate": 1}), "unknown option 'optimiser': did you mean 'optimizer'"),
    "key": (mistaken(optimizer={"lr": 1}), "unknown option 'optimizer.lr': did you mean 'optimizer.learning_rate'"),
    "data key": (mistaken(data={"batchsize": 1}), "unknown option 'data.batchsize': did you mean 'batch_size'"),
    "module": (mistaken(ds.ImageDataModule(GivenImages(images_of()), 8)), "give these to the ImageDataModule itself"),
    "value": (mistaken(optimizer={"learning_rate": -1}), "optimizer.learning_rate must be"),
    "fixed": (
        mistaken(process={"num_scales": 3}),
        "process.num_scales is no option of ds.train: it fol",
    ),
    "max_steps": (mistaken(trainer={"max_steps": 3}), "trainer.max_steps is no option of ds.train: give steps="),
    "choice": (mistaken(logger="wandbb"), "wandbb"),
    "weight": (mistaken(weight=ds.Heun()), "makes no LossWeight"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_leave_no_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attempt, message = MISTAKES[name]
    with pytest.raises(ds.UserError, match=message) as caught:
        attempt()
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_stopping_is_a_keyboard_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpm_scales.training.module.DiffusionModule.training_step", stop)
    with pytest.raises(KeyboardInterrupt, match=r"resume with ds.train\(model, images, run_dir="):
        ds.train(small(), images_of(), 2, tmp_path / "run", **SMALL)


RANKS = """
import hashlib, os, sys, torch, dpm_scales as ds
torch.manual_seed(int(os.environ["RANK"]))
model = ds.Model(ds.UNet(width=8), image_size=8, channels=1)
images = torch.arange(64 * 64).reshape(64, 1, 8, 8).remainder(251).to(torch.uint8)
ds.train(model, images, 3, "run", data={"batch_size": 8}, progress=False, trainer={"accelerator": "cpu"})
print("digest", hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest())
"""


@pytest.mark.slow
def test_all_ranks_get_the_same_weights(tmp_path: Path) -> None:
    """With torchrun, whose ranks are forks of this process as it is itself."""
    (tmp_path / "program.py").write_text(RANKS)
    launcher = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": warm_python()}
    done = subprocess.run(launcher, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    digests = [line for line in done.stdout.splitlines() if line.startswith("digest")]
    assert len(digests) == 2 and digests[0] == digests[1]
