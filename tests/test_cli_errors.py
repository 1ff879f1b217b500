"""A user's mistakes at the command line: one clear line, a status other than 0, no traceback, nothing littered."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from shell import SMALL, Outcome, call, photos, run, sample, train

from dpm_scales.images import load_image


def only_line(outcome: Outcome) -> str:
    """The one line of the message."""
    assert outcome.status in (1, 2), (outcome.status, outcome.out, outcome.err)
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    assert "Traceback" not in outcome.out + outcome.err and len(lines[0]) < 600
    return lines[0]


# --- train.py ---------------------------------------------------------------------------------------------------------

TRAINING: dict[str, tuple[list[str], list[str]]] = {
    "process with a typo": (["process=bluring"], ["process", "bluring", "did you mean 'blurring'"]),
    "process of another field": (["process=gan"], ["process", "gan", "vp"]),
    "experiment with a typo": (["experiment=digits_vq"], ["experiment", "digits_vq", "digits_vp"]),
    "unknown data": (["data=imagenet"], ["data", "imagenet", "digits"]),
    "unknown network": (["network=hug"], ["network", "hug", "tiny"]),
    "unknown sampler": (["sampler=huen"], ["sampler", "heun"]),
    "unknown schedule": (["process/noise=cosin"], ["cosin", "cosine"]),
    "top-level option with a typo": (["sed=1"], ["sed", "seed"]),
    "option with a typo": (["trainer.max_step=5"], ["trainer.max_step", "trainer.max_steps"]),
    "option of a process with a typo": (["process.num_scale=5"], ["process.num_scale", "process.num_scales"]),
    "option that another process has": (["process=vp", "process.blur.blur_sigma_max=4"], ["process.blur"]),
    "not an option": (["process"], ["process", "KEY=VALUE"]),
    "brackets left open": (["network.widths=[8,"], ["network.widths=[8,"]),
    "no scales": (["process.num_scales=0"], ["num_scales", "0", ">= 1"]),
    "scales that are no number": (["process.num_scales=many"], ["num_scales", "many"]),
    "negative noise": (["process=heat", "process.noise.noise_std=-0.1"], ["noise_std", "-0.1", "positive"]),
    "noise that falls": (
        ["process=ve", "process/noise=listed", "process.num_scales=3", "process.noise.noise_scales=[1,2,0.5]"],
        ["scale k=3", "eigenvalue", "noise"],
    ),
    "blur sigmas out of order": (
        ["process=heat", "process/blur=listed_sigmas", "process.num_scales=3", "process.blur.blur_sigmas=[1,3,2]"],
        ["blur_sigmas", "k=3", "2 follows 3"],
    ),
    "list of another length": (
        ["process=heat", "process/blur=listed_sigmas", "process.num_scales=4", "process.blur.blur_sigmas=[1,2,3]"],
        ["blur_sigmas", "3 entries", "num_scales=3"],
    ),
    "ends of the blur swapped": (
        ["process=heat", "process.blur.blur_sigma_min=9", "process.blur.blur_sigma_max=3"],
        ["blur_sigma_min", "9", "blur_sigma_max", "3"],
    ),
    "noise target without noise": (["process=homogeneous", "target=noise"], ["noise target", "Homogeneous"]),
    "finer scale with few steps": (["process=heat", "target=finer", "sampler.steps=3"], ["steps", "200"]),
    "more steps than scales": (["process.num_scales=4", "sampler.steps=9"], ["steps=9", "num_scales=4"]),
    "no steps": (["sampler.steps=0"], ["steps", "0"]),
    "karras grid without growing noise": (
        ["process=heat", "sampler=ancestral", "sampler.grid=karras"],
        ["karras", "InverseHeat", "uniform"],
    ),
    "labels that are not there": (["data=photos", "conditional=true"], ["conditional", "labels"]),
    "negative seed": (["seed=-1"], ["seed", "-1"]),
    "seed that is no number": (["seed=abc"], ["seed", "abc"]),
    "batch of nothing": (["data.batch_size=0"], ["batch_size", "0"]),
    "all held out": (["data.val_fraction=1.5"], ["val_fraction", "1.5"]),
    "negative learning rate": (["optimizer.learning_rate=-1"], ["learning_rate", "-1"]),
    "unknown decay": (["optimizer.decay=linear"], ["decay", "linear", "cosine"]),
    "average that never forgets": (["ema.decay=1.5"], ["ema.decay", "1.5"]),
    "half precision": (["trainer.precision=16-mixed"], ["16-mixed", "bf16-mixed"]),
    "heads that do not divide": (["network.num_heads=3"], ["8", "3", "heads"]),
    "resume of nothing": (["resume=nowhere"], ["nowhere", "no run there"]),
    "no root": (["data=folder"], ["data.root", "KEY=VALUE"]),
    "root that is not there": (["data=folder", "data.root=nowhere"], ["nowhere"]),
    "negative guidance noise": (["process=osmosis_diffusion", "process.guidance_noise=-1"], ["guidance_noise", "-1"]),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_with_a_mistake(name: str, tmp_path: Path) -> None:
    arguments, words = TRAINING[name]
    small = [o for o in SMALL if o.partition("=")[0] not in {a.partition("=")[0] for a in arguments}]
    where = [] if any(a.startswith("resume=") for a in arguments) else ["run_dir=run"]
    line = only_line(call("train.py", *small, *arguments, *where, cwd=tmp_path))
    assert all(word in line for word in words), line
    assert not any(tmp_path.iterdir()), sorted(tmp_path.rglob("*"))


def test_run_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = only_line(call("train.py", *SMALL, "run_dir=file/run", cwd=tmp_path))
    assert "file/run" in line and "another" in line


# --- folders of images ------------------------------------------------------------------------------------------------

FOLDER = ("data=folder", "data.root=photos", "data.batch_size=2", "data.val_fraction=0.2", "trainer.max_steps=2")


def damaged(root: Path, how: str) -> None:
    if how == "truncated":
        Image.effect_noise((64, 64), 50).convert("RGB").save(root / "bad.jpg", quality=95)
        data = (root / "bad.jpg").read_bytes()
        (root / "bad.jpg").write_bytes(data[: len(data) // 2])
    elif how == "text":
        (root / "bad.png").write_text("these are not the pixels you are looking for")
    else:
        (root / "bad.png").write_bytes(b"")


@pytest.mark.parametrize("how", ["truncated", "text", "empty"])
def test_damaged_images_are_named_or_skipped(how: str, tmp_path: Path) -> None:
    damaged(photos(tmp_path / "photos", 10, (64, 64)), how)
    checks = ("data.verify=full",)
    line = only_line(call("train.py", *SMALL, *FOLDER, *checks, "data.on_error=raise", "run_dir=a", cwd=tmp_path))
    assert "bad." in line and not (tmp_path / "a").exists()
    with pytest.warns(UserWarning, match=r"1 .*bad\."):  # a shell shows it on standard error
        outcome = call("train.py", *SMALL, *FOLDER, *checks, "data.on_error=skip", "run_dir=b", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert " 8 images of 64x64x3" in outcome.out


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root.mkdir(), ["photos", "no images"]),
        (lambda root: damaged(root.mkdir() or root, "text"), ["photos"]),
        (lambda root: (photos(root, 4, (12, 20)), photos(root, 4, (20, 12), 4)), ["size", "image_size"]),
        (lambda root: root.write_text("a file"), ["photos"]),
    ],
    ids=["empty folder", "nothing readable", "mixed sizes", "a file"],
)
def test_folders_that_can_not_be_learnt_from(make: Callable[[Path], object], words: list[str], tmp_path: Path) -> None:
    make(tmp_path / "photos")
    line = only_line(call("train.py", *SMALL, *FOLDER, "run_dir=run", cwd=tmp_path))
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


# --- sample.py --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("model") / "run", "trainer.max_steps=2")


SAMPLING: dict[str, tuple[list[str], list[str]]] = {
    "no samples": (["num_samples=0"], ["num_samples", "0"]),
    "half a sample": (["num_samples=1.5"], ["num_samples", "1.5"]),
    "batches of nothing": (["batch_size=0"], ["batch_size", "0"]),
    "negative seed": (["seed=-3"], ["seed", "-3"]),
    "more steps than scales": (["steps=5000"], ["5000", "1000"]),
    "no steps": (["steps=0"], ["steps", "0"]),
    "unknown sampler": (["sampler=ddmi"], ["ddmi", "ddim"]),
    "eta above one": (["sampler=ddim", "sampler.eta=2"], ["eta", "2"]),
    "labels of a model without": (["labels=3"], ["labels", "without"]),
    "unknown weights": (["weights=best"], ["weights", "best", "averaged"]),
    "unknown device": (["device=gpu"], ["device", "gpu", "cuda"]),
    "size that is none": (["size=[8]"], ["size", "[height,width]"]),
    "option with a typo": (["num_sample=3"], ["num_sample", "num_samples"]),
    "sampler for noise levels": (["sampler=heun", "sampler.grid=karas"], ["karas", "karras"]),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_with_a_mistake(name: str, model: Path, tmp_path: Path) -> None:
    arguments, words = SAMPLING[name]
    line = only_line(call("sample.py", f"model={model}", *arguments, "out=out", cwd=tmp_path))
    assert all(word in line for word in words), line
    assert not any(tmp_path.iterdir())


def test_missing_arguments_are_named(model: Path, tmp_path: Path) -> None:
    assert "model" in only_line(call("sample.py", "out=out", cwd=tmp_path))
    assert "out" in only_line(call("sample.py", f"model={model}", cwd=tmp_path))
    assert not any(tmp_path.iterdir())


def test_places_that_can_not_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = only_line(call("sample.py", f"model={model}", "num_samples=1", "out=file/out", cwd=tmp_path))
    assert "file/out" in line and "another" in line


class Evil:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["nothing", "empty", "text", "picture", "foreign checkpoint", "pickle"])
def test_models_that_are_not_ours(kind: str, tmp_path: Path) -> None:
    path, harm = tmp_path / "model.ckpt", tmp_path / "harm"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("weights, I promise")
    elif kind == "picture":
        Image.new("L", (8, 8)).save(path, format="PNG")
    elif kind == "foreign checkpoint":
        torch.save({"state_dict": {"weight": torch.zeros(3)}, "epoch": 1}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(harm)))
    line = only_line(call("sample.py", f"model={path}", "out=out", cwd=tmp_path))
    assert "model.ckpt" in line
    assert not harm.exists() and not (tmp_path / "out").exists()


def test_folder_without_a_model_and_model_without_weights(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in only_line(call("sample.py", "model=empty", "out=out", cwd=tmp_path))
    shutil.copytree(model / "model", tmp_path / "torn")
    weights = tmp_path / "torn/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "safetensors" in only_line(call("sample.py", "model=torn", "out=out", cwd=tmp_path))
    assert not (tmp_path / "out").exists()


# --- as a shell sees it -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("train.py", ["process=bluring"], ["did you mean 'blurring'"]),
        ("train.py", ["process.num_scales=0"], ["num_scales"]),
        ("sample.py", ["model=nowhere", "out=out"], ["nowhere"]),
    ],
)
def test_a_shell_sees_status_and_line(script: str, arguments: list[str], words: list[str], tmp_path: Path) -> None:
    line = only_line(run(script, *arguments, cwd=tmp_path))
    assert all(word in line for word in words), line
    assert not any(tmp_path.iterdir())


def test_a_good_command_is_no_mistake(model: Path, tmp_path: Path) -> None:
    """The folder of samples is there when nothing is wrong: the tests above would notice one."""
    assert load_image(sample(model, tmp_path / "out", "num_samples=1") / "000000.png").shape == (1, 8, 8)
