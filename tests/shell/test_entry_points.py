"""From real images to pictures through the entry points, on tiny settings."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dpm_scales.images import load_image
from dpm_scales.models.generate import draw
from dpm_scales.models.io import load_model
from support.shell import FAST, SMALL, call, column, composed, files, photos, sample, settings, train

#: every process, the scales few enough for a small run
PROCESSES = [
    "vp",
    "ve",
    "homogeneous",
    "heat",
    "blurring",
    "blurring_constant",
    "blurring_chain",
    "osmosis_diffusion",
    "inverse_osmosis",
    "osmosis",
    "rectified",
    "hdfm",
    "warm",
    "equal_snr",
    "power_law",
    "flicker",
    "low_pass_flow",
    "clocked",
    "cut_off",
]


def short(process: str) -> tuple[str, ...]:
    two_steps = ("trainer.max_steps=2", "trainer.val_check_interval=2")
    return (f"process={process}", "process.num_scales=4", "sampler.steps=null", *two_steps)


def numbers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("0*.png"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default process."""
    return train(tmp_path_factory.mktemp("digits") / "run", *FAST)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a process, trained once."""
    root = tmp_path_factory.mktemp("runs")
    return functools.cache(lambda process: train(root / process, *short(process)))


def test_all_processes_are_walked_here() -> None:
    assert sorted(PROCESSES) == sorted(p.stem for p in (Path(__file__).parents[2] / "configs/process").glob("*.yaml"))


def test_run_folder_is_as_promised(digits: Path) -> None:
    names = {name.split("/")[0] for name in files(digits)}
    assert names >= {"config.yaml", "checkpoints", "metrics.csv", "samples", "model", "result.json"}
    assert set(files(digits / "model")) == {"model.safetensors", "config.yaml"}
    assert set(files(digits / "checkpoints")) >= {"last.ckpt", "best.ckpt"}
    assert "${" not in (digits / "config.yaml").read_text()
    assert settings(digits)["process"] == yaml.safe_load((digits / "model/config.yaml").read_text())["process"]
    assert settings(digits)["trainer"]["max_steps"] == 6
    drawn = [f"{kind}-{step:06d}.png" for kind in ("step", "trajectory") for step in (3, 6)]
    assert sorted(files(digits / "samples")) == drawn
    assert len(column(digits, "train/loss")) == 6 and len(column(digits, "val/loss")) == 2
    assert not [name for name in files(digits) if ".tmp" in name]


@pytest.mark.parametrize("process", PROCESSES)
def test_every_process_goes_from_images_to_pictures(
    process: str, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    out = sample(run_of(process), tmp_path / "out", "num_samples=3")
    assert numbers(out) == ["000000.png", "000001.png", "000002.png"]
    images = torch.stack([load_image(out / name) for name in numbers(out)])
    assert images.shape == (3, 1, 8, 8)
    if process not in ("homogeneous", "osmosis"):  # two steps of training undo no blur, and there is no noise to see
        assert images.float().std() > 0


@pytest.mark.parametrize(
    ("process", "sampler"),
    [*itertools.product(["vp", "blurring", "osmosis_diffusion"], ["ancestral", "ddim", "heun"]), ("osmosis", "cold")],
)
def test_samplers_may_be_chosen_afterwards(
    process: str, sampler: str, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    out = sample(run_of(process), tmp_path / "out", "num_samples=2", f"sampler={sampler}", "steps=3")
    assert numbers(out) == ["000000.png", "000001.png"]


def test_same_seed_same_bytes_whatever_the_batch_size(digits: Path, tmp_path: Path) -> None:
    whole = sample(digits, tmp_path / "whole", "num_samples=7", "batch_size=7", "seed=5")
    parts = sample(digits, tmp_path / "parts", "num_samples=7", "batch_size=2", "seed=5")
    again = sample(digits, tmp_path / "again", "num_samples=3", "batch_size=3", "seed=5")
    other = sample(digits, tmp_path / "other", "num_samples=7", "seed=6")
    assert files(whole) == files(parts)
    assert all(files(again)[name] == files(whole)[name] for name in numbers(again))
    assert all(files(other)[name] != files(whole)[name] for name in numbers(other))


def test_python_draws_what_the_command_line_writes(digits: Path, tmp_path: Path) -> None:
    out = sample(digits, tmp_path / "out", "num_samples=5", "seed=3")
    images = torch.cat(list(draw(load_model(digits), 5, seed=3)))
    assert torch.equal(images, torch.stack([load_image(out / name) for name in numbers(out)]))


def test_trajectory_is_drawn_as_picture_and_film(digits: Path, tmp_path: Path) -> None:
    out = sample(digits, tmp_path / "out", "num_samples=4", "trajectory=true", "steps=5")
    with Image.open(out / "trajectory.gif") as film, Image.open(out / "trajectory.png") as picture:
        assert getattr(film, "n_frames", 1) > 1
        assert (picture.width, picture.height) == (5 * 65 + 1, 4 * 65 + 1)  # five steps of four samples
        assert film.size == (2 * 65 + 1, 2 * 65 + 1)
    plain = sample(digits, tmp_path / "plain", "num_samples=4", "steps=5")
    assert numbers(out) == numbers(plain) and not (plain / "trajectory.png").exists()


def test_labels_choose_what_is_drawn(tmp_path: Path) -> None:
    run_dir = train(tmp_path / "run", "conditional=true", *FAST)
    every = sample(run_dir, tmp_path / "every", "num_samples=10")
    two = sample(run_dir, tmp_path / "two", "num_samples=10", "labels=[2,7]")
    seven = sample(run_dir, tmp_path / "seven", "num_samples=10", "labels=7")
    a, b, c = files(every), files(two), files(seven)
    assert a["000007.png"] == c["000007.png"] == b["000007.png"]  # digits have the labels 0, 1, ... in turn
    assert a["000002.png"] == b["000002.png"] != c["000002.png"]
    assert a["000003.png"] != b["000003.png"] == c["000003.png"]


@pytest.mark.parametrize("process", ["vp", "heat", "osmosis_diffusion"])
def test_rectangular_photos_go_the_whole_way(process: str, tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 20, (12, 20))
    run_dir = train(tmp_path / "run", "data=folder", f"data.root={root}", "data.batch_size=4", *short(process))
    out = sample(run_dir, tmp_path / "out", "num_samples=2")
    assert load_image(out / "000000.png").shape == (3, 12, 20)


def test_other_sizes_than_those_of_training(digits: Path, tmp_path: Path) -> None:
    out = sample(digits, tmp_path / "out", "num_samples=2", "size=[12,16]")
    assert load_image(out / "000000.png").shape == (1, 12, 16)


def test_default_folder_is_named_by_the_overrides(tmp_path: Path) -> None:
    outcome = call("train.py", *SMALL, "process=ve", "trainer.max_steps=2", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    folders = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(folders) == 1 and folders[0].startswith("data.batch_size=16")


def test_experiments_are_the_defaults_with_differences() -> None:
    assert composed("experiment=digits_vp").process == composed().process
