"""The first picture of README.md: a photo along processes and back, drawn from any models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import front_picture
from dpm_scales.images import load_image, to_range
from dpm_scales.plots.rows import ROW_PADDING
from dpm_scales.processes import Process
from dpm_scales.rng import CounterRNG
from support.shell import small_model

SIDE = 16


def test_forward_is_the_law_and_back_ends_with_the_samplers_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_picture, "SIDE", SIDE)
    photo = front_picture.the_photo()
    assert photo.shape == (1, 3, SIDE, SIDE) and photo.dtype == torch.uint8
    for options in front_picture.PROCESSES.values():
        model = small_model(*options, "sampler.steps=8")
        process: Process = model.denoiser.process
        there, back = front_picture.there_and_back(model, photo[:, :1])
        assert len(there) == len(front_picture.FORWARD) and len(back) == len(front_picture.BACK)
        assert torch.equal(there[0], photo[:, :1])
        noise = CounterRNG(0, 1)
        x_0 = to_range(photo[:, :1], process.value_range)
        context = process.context_from(x_0, noise)
        operator, white = process.operator(context), noise.normal((1, SIDE, SIDE), torch.float32)
        for t, shown in zip(front_picture.FORWARD[1:], there[1:], strict=True):
            y = process.perturb(operator.to_white(x_0), torch.tensor(t, dtype=torch.float64), white, operator)
            assert torch.equal(shown, front_picture.visible(operator.to_pixels(y), process.value_range))


def test_a_row_for_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_picture, "SIDE", SIDE)
    shown = torch.arange(9, dtype=torch.uint8)[:, None, None, None, None].expand(9, 1, 3, SIDE, SIDE)
    monkeypatch.setattr(front_picture, "load_model", lambda path: path.name)
    monkeypatch.setattr(front_picture, "with_sampler", lambda name, settings: name)
    monkeypatch.setattr(front_picture, "there_and_back", lambda name, x: (list(shown[:5]), list(shown[5:])))
    front_picture.draw(tmp_path, tmp_path / "front.png")
    picture = load_image(tmp_path / "front.png")
    seen = [int(value) for value in picture[0, -ROW_PADDING - 1].unique_consecutive() if value < 9]
    assert seen == list(range(9))
    column = picture[0, :, -ROW_PADDING - 1].tolist()
    assert sum(a != 8 and b == 8 for a, b in zip(column, column[1:], strict=False)) == len(front_picture.PROCESSES)


def test_photos_are_brought_to_one_size(tmp_path: Path) -> None:
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    Image.new("RGB", (480, 320)).save(tmp_path / "in" / "deeper" / "wide.jpg")
    Image.new("L", (320, 480)).save(tmp_path / "in" / "tall.jpg")
    made = front_picture.prepare(tmp_path / "in", tmp_path / "out")
    sizes = {path.name: Image.open(path).size for path in made.iterdir()}
    assert sizes == {"wide.png": (192, 128), "tall.png": (128, 192)}
