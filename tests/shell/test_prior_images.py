"""`sample.py prior_images=`: samples start from images of the user's own, in turn, by any number of processes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image
from torch import Tensor

from dpm_scales.commands.sample import start_from
from dpm_scales.images import to_range
from dpm_scales.models.io import save_model
from dpm_scales.priors import DataPrior, OsmosisPrior
from dpm_scales.processes import InverseHeat, InverseOsmosis, OsmosisDiffusion
from dpm_scales.rng import CounterRNG
from dpm_scales.training import Model, load_model
from support.shell import Outcome, call, files, one_after_the_other, small_model

SIDE = 8
SHORT = ("process.num_scales=6", "sampler.steps=null")
OWN = ("process.value_range=[0,1]", "process.guidance_noise=0", "process.guidance_blur_sigma=1")
MODELS = {
    "own": ("process=inverse_osmosis", "process.guidance_image=own", *OWN, *SHORT),
    "other": ("process=osmosis_diffusion", "process.guidance_image=other", *OWN, *SHORT),
    "heat": ("process=heat", "process.blur.blur_sigma_max=3", *SHORT),
    "vp": ("process=vp",),
    "white": ("process=osmosis_diffusion", *SHORT),
}


def grey(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    return (128 + 90 * np.sin(0.5 * rows + 2 * seed) * np.cos(0.4 * columns - seed)).round().astype(np.uint8)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("desk")
    training = torch.from_numpy(np.stack([grey(seed)[None] for seed in range(10, 15)]))
    for name, overrides in MODELS.items():
        torch.manual_seed(0)
        model = small_model(*overrides)
        model.prior.fit(to_range(training, model.denoiser.process.value_range), model.denoiser.process)
        save_model(root / name, model)
    for folder in ("set", "mixed", "empty"):
        (root / folder).mkdir()
    for seed in range(3):
        Image.fromarray(grey(seed)).save(root / "set" / f"{seed}.png")
        Image.fromarray(grey(seed, (8, 8 + seed))).save(root / "mixed" / f"{seed}.png")
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for path in sorted((root / "set").iterdir()):
            archive.write(path, path.name)
    Image.fromarray(grey(0, (12, 20))).save(root / "wide.png")
    Image.fromarray(np.repeat(grey(0)[..., None], 3, 2)).save(root / "rgb.png")
    (root / "text.png").write_text("hello")
    return root


def draw(desk: Path, out: Path, *options: str, **environment: str) -> Outcome:
    return call("sample.py", *options, f"out={out}", cwd=desk, environment=environment)


def record(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "prior_images.json").read_text())
    return values


def blurred(x: Tensor, time: float) -> np.ndarray:
    """Gaussian blur with reflecting boundaries, by SciPy's DCT."""
    k, m = np.arange(x.shape[-2])[:, None] / x.shape[-2], np.arange(x.shape[-1]) / x.shape[-1]
    decay = np.exp(-(np.pi**2) * (k**2 + m**2) * time)
    u = scipy.fft.dctn(x.double().numpy(), axes=(-2, -1), norm="ortho")
    return np.asarray(scipy.fft.idctn(decay * u, axes=(-2, -1), norm="ortho"))


def start(model: Model, first: int, count: int) -> tuple[Tensor, Tensor | None]:
    return model.prior.sample(model.denoiser.process, CounterRNG(3, count, first), (1, SIDE, SIDE), torch.float64)


@pytest.mark.parametrize("name", ["own", "other"])
def test_guidance_of_sample_i_is_image_i_mod_n(name: str, desk: Path) -> None:
    """And the start is its steady state: lambda_1(0) v and the process's own noise, in pixels."""
    model = load_model(desk / name)
    assert start_from(model, str(desk / "set"))[0] == [str(desk / "set" / f"{i}.png") for i in range(3)]
    process = model.denoiser.process
    assert isinstance(process, InverseOsmosis | OsmosisDiffusion) and isinstance(model.prior, OsmosisPrior)
    model.prior.noise_ratio = 0.0
    y, v = start(model, 4, 5)
    chosen = np.stack([grey(i % 3)[None] for i in range(4, 9)]) / 255
    shown = blurred(torch.from_numpy(chosen), 0.5).clip(process.guidance.minimum, 1)
    assert v is not None
    np.testing.assert_allclose(v.numpy(), shown, atol=1e-5)
    signal = float(process.signal_scale(1.0, torch.zeros(1)))
    steady = signal * shown * chosen.mean((-2, -1), keepdims=True) / shown.mean((-2, -1), keepdims=True)
    np.testing.assert_allclose(process.operator(v).to_pixels(y).numpy(), steady, atol=1e-5)


def test_heat_starts_from_the_blurred_images(desk: Path) -> None:
    model = load_model(desk / "heat")
    start_from(model, str(desk / "set.zip"))
    process = model.denoiser.process
    assert isinstance(process, InverseHeat) and isinstance(model.prior, DataPrior)
    model.prior.noise_ratio = 0.0
    y, _ = start(model, 4, 5)
    chosen = to_range(torch.from_numpy(np.stack([grey(i % 3)[None] for i in range(4, 9)])), process.value_range)
    np.testing.assert_allclose(y.numpy(), blurred(chosen, 3**2 / 2), atol=1e-4)


@pytest.mark.parametrize("name", ["own", "heat"])
def test_samples_follow_their_image_and_say_so(name: str, desk: Path, tmp_path: Path) -> None:
    """Five samples of three images: number i is that of image i mod 3 alone; batches and processes do not matter."""
    options = (f"model={name}", "num_samples=5", "seed=4")
    done = draw(desk, tmp_path / "all", *options, "prior_images=set")
    assert done.status == 0 and "sample i starts from image i mod 3 of set" in done.out, done.err
    kept = record(tmp_path / "all")
    assert kept["images"] == [f"set/{i}.png" for i in range(3)] and kept["image_of_sample"] == [0, 1, 2, 0, 1]
    assert kept["prior_images"] == "set" and "mod" in kept["order"]
    assert draw(desk, tmp_path / "two", *options, "prior_images=set.zip", "batch_size=2").status == 0
    every = files(tmp_path / "all")
    for number in (0, 4):
        alone = draw(desk, tmp_path / str(number), *options, f"prior_images=set/{number % 3}.png")
        assert alone.status == 0, alone.err
        name = f"{number:06d}.png"
        assert every[name] == files(tmp_path / "two")[name] == files(tmp_path / str(number))[name]
    assert files(tmp_path / "0")["000001.png"] != every["000001.png"], "another image, another sample"
    assert "inputs.prior_images.number is 3 there and null here" in draw(desk, tmp_path / "all", *options).err
    again = draw(desk, tmp_path / "all", *options, "overwrite=true")
    assert again.status == 0 and not (tmp_path / "all" / "prior_images.json").exists(), "the record would not be true"


def test_two_processes_draw_what_one_does(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("model=own", "num_samples=5", "prior_images=set")
    assert draw(desk, tmp_path / "one", *options).status == 0
    one_after_the_other(monkeypatch)
    for rank in ("1", "0"):
        ranks = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        end = draw(desk, tmp_path / "two", *options, **ranks)
        assert end.status == 0, end.err
        assert (tmp_path / "two" / "prior_images.json").exists() == (rank == "0")
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("model=own", "prior_images=wide.png"), ["prior_images=wide.png", "8x8", "12x20"]),
        (("model=heat", "prior_images=wide.png"), ["prior_images=wide.png", "8x8", "12x20"]),
        (("model=own", "prior_images=rgb.png"), ["rgb.png is RGB", "grey"]),
        (("model=own", "prior_images=mixed"), ["mixed/1.png", "8x9", "one size"]),
        (("model=own", "prior_images=empty"), ["empty: no images"]),
        (("model=own", "prior_images=nowhere"), ["nowhere"]),
        (("model=own", "prior_images=text.png"), ["text.png"]),
        (("model=own", "prior_images=set", "size=[8,12]"), ["8x8", "8x12"]),
        (("model=vp", "prior_images=set"), ["prior_images=set", "VP", "noise alone", "guidance_image=own"]),
        (("model=white", "prior_images=set"), ["prior_images=set", "grey values alone", "guidance_image=own"]),
        (("model=own", "task=vary", "start=set", "prior_images=set"), ["prior_images"]),
    ],
)
def test_what_does_not_fit_ends_with_one_line(
    options: tuple[str, ...], words: list[str], desk: Path, tmp_path: Path
) -> None:
    end = draw(desk, tmp_path / "out", *options)
    assert end.status in (1, 2) and "Traceback" not in end.err
    assert end.err.strip().count("\n") == 0, end.err
    assert all(word in end.err for word in words), end.err
    assert not (tmp_path / "out").exists() or not files(tmp_path / "out")


def test_all_images_start_however_many_training_images_are_kept() -> None:
    images = torch.rand(7, 1, SIDE, SIDE)
    own = OsmosisDiffusion(6, guidance_image="own", value_range=(0, 1))
    for prior, process in ((OsmosisPrior(max_images=3), own), (DataPrior(max_images=3), InverseHeat(6))):
        prior.fit(images, process)
        assert len(getattr(prior, prior.stored[0])) == 3
        prior.steer(images, process)
        assert len(getattr(prior, prior.stored[0])) == 7
