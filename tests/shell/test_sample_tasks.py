"""`sample.py task=NAME`: images in, numbered images and a comparison out, one line for a mistake."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpm_scales.commands.sample import TASKS
from dpm_scales.images import to_range
from dpm_scales.models.io import save_model
from dpm_scales.training import build_model
from support.reference import Array
from support.shell import Outcome, call, files, one_after_the_other, small_model

SIDE = 8


def save(path: Path, image: Array) -> Path:
    Image.fromarray(255 * image.astype(np.uint8) if image.dtype == bool else image).save(path)
    return path


def pixels(path: Path) -> Array:
    return np.asarray(Image.open(path))


def grey(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Array:
    """Smooth, and in the middle of the range, so that nothing is clipped."""
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    return (128 + 60 * np.sin(0.6 * rows + seed) * np.cos(0.5 * columns - seed)).round().astype(np.uint8)


def hole(size: tuple[int, int] = (SIDE, SIDE)) -> Array:
    mask = np.zeros(size, dtype=bool)
    mask[2:6, 3:7] = True
    return mask


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models and images."""
    root = tmp_path_factory.mktemp("desk")
    short = ("process.num_scales=6", "sampler.steps=null")
    heat, finer = ("process=heat", *short), ("process=heat", "target=finer", *short)
    others = {name: (f"process={name}", *short) for name in ("blurring", "osmosis_diffusion", "homogeneous")}
    for name, overrides in {"vp": (), "heat": heat, "finer": finer, **others}.items():
        model = small_model(*overrides)
        photos = torch.from_numpy(np.stack([grey(seed)[None] for seed in range(3)]))
        model.prior.fit(to_range(photos, model.denoiser.process.value_range), model.denoiser.process)
        save_model(root / name, model)
    recipe = replace(small_model(*others["blurring"]).recipe, num_classes=10)
    save_model(root / "classes", build_model(recipe))
    (root / "set").mkdir()
    for seed in range(3):
        save(root / "set" / f"{seed}.png", grey(seed))
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for path in sorted((root / "set").iterdir()):
            archive.write(path, path.name)
    save(root / "a.png", grey(0)), save(root / "b.png", grey(1)), save(root / "m.png", hole())
    save(root / "wide.png", grey(0, (12, 20))), save(root / "wm.png", hole((12, 20)))
    save(root / "rgb.png", np.repeat(grey(0)[..., None], 3, 2))
    save(root / "white.png", np.ones((SIDE, SIDE), dtype=bool)), save(root / "black.png", np.zeros((SIDE, SIDE), bool))
    (root / "mixed").mkdir()
    save(root / "mixed" / "a.png", grey(0)), save(root / "mixed" / "b.png", grey(0, (12, 20)))
    (root / "text.png").write_text("hello")
    (root / "old").mkdir()
    save(root / "old" / "000009.png", grey(0))
    (root / "file").write_text("no folder")
    return root


def edit(desk: Path, out: Path, *options: str) -> Outcome:
    outcome = call("sample.py", *options, f"out={out}", cwd=desk)
    assert outcome.status == 0, outcome.err
    return outcome


def numbered(out: Path) -> Array:
    """``(N, H, W)``, and that their numbers have no gaps."""
    names = sorted(path.name for path in out.glob("0*.png"))
    assert names == [f"{i:06d}.png" for i in range(len(names))]
    return np.stack([pixels(out / name) for name in names])


#: of each task, the least that it needs, and how many results two of each make
CALLS = {
    "inpaint": (("image=a.png", "mask=m.png", "num_samples=2"), 2),
    "deblur": (("image=a.png", "blur_sigma=1", "num_samples=2"), 2),
    "superres": (("image=a.png", "num_samples=2"), 2),
    "interpolate": (("start=a.png", "end=b.png", "frames=4"), 4),
    "vary": (("start=a.png", "num_samples=2"), 2),
    "coarse": (("starts=2", "num_samples=2"), 4),
    "draw": (("num_samples=2",), 2),
}
EVERY = sorted(CALLS)
PAIRS = [("vp", task) for task in EVERY]
PAIRS += [("heat", task) for task in ("deblur", "interpolate", "coarse")]
PAIRS += [("blurring", task) for task in ("superres", "interpolate", "vary")]
PAIRS += [("osmosis_diffusion", task) for task in ("inpaint", "interpolate")]
PAIRS += [("homogeneous", task) for task in ("inpaint", "deblur")]


def test_all_tasks_are_called_here() -> None:
    assert CALLS.keys() == TASKS.keys()


@pytest.mark.parametrize(("process", "task"), PAIRS)
def test_tasks_with_every_kind_of_process(task: str, process: str, desk: Path, tmp_path: Path) -> None:
    options, count = CALLS[task]
    steps = "steps=1" if process == "homogeneous" else "steps=4"
    outcome = edit(desk, tmp_path, f"model={process}", f"task={task}", *options, steps)
    results = numbered(tmp_path)
    side = 2 * SIDE if task == "superres" else SIDE
    assert results.shape == (count, side, side)
    extra = {"interpolate": {"comparison.png", "film.gif"}, "draw": {"grid.png"}}.get(task, {"comparison.png"})
    assert {name for name in files(tmp_path) if not name.startswith("0")} == extra | {"sample.json", ".lock"}
    assert f"{count} images in {tmp_path}" in outcome.out


# --- what results are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", ["vp", "heat"])
def test_known_pixels_keep_their_bytes_and_holes_differ(process: str, desk: Path, tmp_path: Path) -> None:
    steps = ("steps=5",) if process == "vp" else ()
    edit(desk, tmp_path, "task=inpaint", f"model={process}", "image=set", "mask=m.png", "num_samples=2", *steps)
    results = numbered(tmp_path)
    for i, result in enumerate(results):
        assert np.array_equal(result[~hole()], grey(i // 2)[~hole()])
    assert all(np.any(results[2 * i][hole()] != results[2 * i + 1][hole()]) for i in range(3))


def test_block_means_of_an_enlargement_are_the_image(desk: Path, tmp_path: Path) -> None:
    """Up to the rounding of the results; white noise in them does not stay."""
    edit(desk, tmp_path, "task=superres", "model=vp", "image=wide.png", "factor=3", "num_samples=2", "steps=5")
    results = numbered(tmp_path).astype(float)
    assert results.shape == (2, 36, 60)
    clipped = (results == 0) | (results == 255)
    free = ~clipped.reshape(2, 12, 3, 20, 3).any((2, 4))
    means = results.reshape(2, 12, 3, 20, 3).mean((2, 4))
    assert free.any() and np.abs(means - grey(0, (12, 20)))[free].max() <= 0.5 + 1e-6


@pytest.mark.parametrize("task", ["inpaint", "interpolate", "coarse", "vary", "superres"])
def test_same_seed_same_bytes_whatever_the_batch_size(task: str, desk: Path, tmp_path: Path) -> None:
    options = {
        "inpaint": ("image=set", "mask=m.png", "num_samples=2", "steps=2", "resample=1"),
        "superres": ("image=set", "num_samples=2", "steps=2", "resample=1"),
        "interpolate": ("start=set", "end=set.zip", "frames=3", "steps=3"),
        "vary": ("start=set", "num_samples=2", "steps=4"),
        "coarse": ("starts=3", "num_samples=2", "steps=6"),
    }[task]
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    edit(desk, whole, "model=vp", f"task={task}", *options)
    edit(desk, parts, "model=vp", f"task={task}", *options, "batch_size=4")
    assert files(whole) == files(parts)
    if task == "vary":
        edit(desk, other, "model=vp", f"task={task}", *options, "seed=1")
        assert np.any(numbered(whole) != numbered(other))


SHARED = {
    "inpaint": ("image=set", "mask=m.png", "num_samples=2", "steps=2", "resample=1"),
    "deblur": ("image=set", "blur_sigma=1", "degrade=true", "num_samples=1", "steps=2"),
    "superres": ("image=set", "num_samples=3", "steps=2", "resample=0"),
    "interpolate": ("start=set", "end=set.zip", "frames=3", "steps=3"),
    "vary": ("start=a.png", "num_samples=1", "steps=4"),
    "coarse": ("starts=3", "num_samples=3", "steps=6"),
}


@pytest.mark.parametrize("task", SHARED)
def test_results_of_two_processes_are_those_of_one(
    task: str, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared between them, each once; also where there is one alone. One comes after the other, and nobody waits."""
    options = ("model=vp", f"task={task}", *SHARED[task], "batch_size=2")
    edit(desk, tmp_path / "one", *options)
    one = files(tmp_path / "one")
    count = sum(name.startswith("0") for name in one)
    one_after_the_other(monkeypatch)
    monkeypatch.setattr("dpm_scales.progress.FIRST_LINE", 0.0)
    written: list[set[str]] = []
    for rank in (1, 0):
        before = set(files(tmp_path / "two"))
        ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        end = call("sample.py", *options, f"out={tmp_path / 'two'}", cwd=desk, environment=ranks)
        assert end.status == 0, end.err
        assert (f"{count} images in" in end.out) == (rank == 0) and (f"{task}: " in end.out) == (rank == 0)
        written.append(set(files(tmp_path / "two")) - before)
    second, first = ({name for name in names if name.startswith("0")} for names in written)
    assert written[0] == second | {"sample.json", ".lock"} and not second & first
    assert len(second) == (3 if task == "interpolate" else count // 2)
    assert files(tmp_path / "two") == one


def test_folder_and_archive_are_the_same(desk: Path, tmp_path: Path) -> None:
    for place in ("set", "set.zip"):
        edit(desk, tmp_path / place, "task=vary", "model=blurring", f"start={place}", "num_samples=1")
    one, other = files(tmp_path / "set"), files(tmp_path / "set.zip")
    assert json.loads(one.pop("sample.json"))["inputs"]["start"]["path"] == "set"
    assert json.loads(other.pop("sample.json"))["inputs"]["start"]["path"] == "set.zip"
    assert one == other


def test_interpolation_ends_at_its_ends(desk: Path, tmp_path: Path) -> None:
    """The encoded ends come back, nearer with the fixed point than by the explicit inversion."""
    distances = []
    for refine in (0, 4):
        out = tmp_path / str(refine)
        options = ("start=a.png", "end=b.png", "frames=3", "steps=20", f"refine={refine}", "from=0.5")
        edit(desk, out, "task=interpolate", "model=vp", *options)
        results = numbered(out).astype(float)
        distances.append(max(np.abs(results[0] - grey(0)).max(), np.abs(results[-1] - grey(1)).max()))
    assert distances[1] <= 2 and distances[1] < distances[0], distances


def test_variations_stay_nearer_from_lower_scales(desk: Path, tmp_path: Path) -> None:
    distances = []
    for start in ("1e-6", "0.3", "1.0"):
        out = tmp_path / start
        edit(desk, out, "task=vary", "model=vp", "start=a.png", f"from={start}", "num_samples=8", "steps=20")
        distances.append(float(np.abs(numbered(out).astype(float) - grey(0)).mean()))
    assert distances[0] < 2 and distances[0] < distances[1] < distances[2], distances


def test_the_lower_the_branch_the_more_is_shared(desk: Path, tmp_path: Path) -> None:
    spreads = []
    for branch in ("1", "0.2"):
        out = tmp_path / branch
        edit(desk, out, "task=coarse", "model=vp", f"branch_at={branch}", "starts=4", "num_samples=6", "steps=20")
        spreads.append(float(numbered(out).reshape(4, 6, SIDE, SIDE).std(1).mean()))
    assert spreads[1] < 0.7 * spreads[0], spreads


def test_the_noise_of_an_edit_may_have_a_color(desk: Path, tmp_path: Path) -> None:
    """Of the sampler that a task takes by itself too, and of repeated steps."""
    options = ("task=inpaint", "model=blurring", "image=a.png", "mask=m.png", "num_samples=1", "resample=1")
    colored = (*options, "sampler/noise_color=power_law")
    for name, command in (("white", options), ("colored", colored)):
        edit(desk, tmp_path / name, *command)
    assert np.any(numbered(tmp_path / "white") != numbered(tmp_path / "colored"))
    settings = json.loads((tmp_path / "colored" / "sample.json").read_text())["sampler_settings"]["sampler"]
    assert settings["name"] == "Ancestral" and settings["noise_color"]["exponent"] == 0.5


def test_degrading_first_tells_how_near_the_results_come(desk: Path, tmp_path: Path) -> None:
    """Three columns of what there was, and a ratio in dB; from the scale of the blur where heat can start there."""
    for process, note in (
        ("vp", "each estimate guided towards the image"),
        ("heat", r"from t=[\d.]+, a blur of [\d.]+ px"),
    ):
        out = tmp_path / process
        options = ("image=set", "blur_sigma=1", "degrade=true", "num_samples=2")
        outcome = edit(desk, out, "task=deblur", f"model={process}", *options)
        assert re.search(note + r", PSNR [\d.]+ -> [\d.]+ dB", outcome.out), outcome.out
        assert pixels(out / "comparison.png").shape == (3 * 66 + 2, 4 * 66 + 2)
    outcome = edit(
        desk, tmp_path / "s", "task=superres", "model=vp", "image=set", "degrade=true", "num_samples=1", "steps=3"
    )
    assert "from 4x4 to 8x8 pixels, PSNR" in outcome.out


def test_the_comparison_shows_what_there_was_beside_the_results(desk: Path, tmp_path: Path) -> None:
    edit(desk, tmp_path, "task=inpaint", "model=vp", "image=set", "mask=m.png", "num_samples=2", "steps=2")
    sheet, results = pixels(tmp_path / "comparison.png"), numbered(tmp_path)
    cells = sheet[2:, 2:].reshape(3, 66, 4, 66)[:, :64, :, :64].transpose(0, 2, 1, 3)[..., ::8, ::8]
    for row in range(3):
        assert np.array_equal(cells[row, 0], grey(row)) and np.array_equal(
            cells[row, 2:], results[2 * row : 2 * row + 2]
        )
        assert np.array_equal(cells[row, 1], np.where(hole(), 127, grey(row)))


def test_conditional_models_say_what_they_draw(desk: Path, tmp_path: Path) -> None:
    edit(desk, tmp_path, "task=vary", "model=classes", "start=a.png", "labels=3", "num_samples=2")
    assert len(numbered(tmp_path)) == 2


# --- mistakes ---------------------------------------------------------------------------------------------------------

INPAINT, DEBLUR = "task=inpaint model=vp image=a.png mask=m.png ", "task=deblur model=vp image=a.png blur_sigma=1 "
SUPERRES, VARY = "task=superres model=vp image=a.png ", "task=vary model=vp start=a.png "
INTERPOLATE, COARSE = "task=interpolate model=vp start=a.png end=b.png ", "task=coarse model=vp "

MISTAKES = {
    # names
    "task=inpait model=vp": "unknown task 'inpait': did you mean 'inpaint'",
    "model=vp image=a.png": "unknown option 'image': it belongs to task=deblur and task=inpaint and task=superres",
    INPAINT + "blur_sigma=2": "unknown option 'blur_sigma': it belongs to task=deblur",
    INPAINT + "maks=m.png": "unknown option 'maks': did you mean 'mask'",
    INPAINT + "size=16": "unknown option 'size': it belongs to task=coarse and task=draw",
    "task=inpaint model=vp image=a.png": "mask has no value yet; give it on the command line",
    INPAINT + "covariance=spectra": "unknown covariance 'spectra': did you mean 'spectrum'",
    DEBLUR + "method=scales": "unknown method 'scales': did you mean 'scale'",
    INTERPOLATE + "through=flows": "unknown through 'flows': did you mean 'flow'",
    # numbers
    INPAINT + "resample=-1": "resample must be a whole number >= 0 and <= 1000, got -1",
    DEBLUR + "blur_sigma=0": "blur_sigma must be > 0 px, got 0",
    DEBLUR + "blur_sigma=1e200": r"blur_sigma must be a number <= 1e\+06, got 1e\+200",
    DEBLUR + "noise_std=2": "noise_std must be a number >= 0 and <= 1, got 2",
    DEBLUR + "degrade=maybe": "degrade must be true or false, got 'maybe'",
    SUPERRES + "factor=1": "factor must be a whole number >= 2, got 1",
    SUPERRES + "factor=3 degrade=true": "factor=3 does not divide images of 8x8 pixels",
    VARY + "from=0": r"from must be a scale in \(0, 1\], got 0",
    VARY + "from=1.5": r"from must be a scale in \(0, 1\], got 1.5",
    INTERPOLATE + "from=high": r"from must be a scale in \(0, 1\], got 'high'",
    INTERPOLATE + "frames=1": "frames must be a whole number >= 2, got 1",
    INTERPOLATE + "num_samples=2": "through=flow leads to one sequence for each pair",
    INTERPOLATE + "sampler=heun": "follows the probability flow by DDIM steps; drop sampler=",
    INTERPOLATE.replace("vp", "blurring") + "sampler/noise_color=kernel": "DDIM steps; drop sampler/noise_color=",
    COARSE + "branch_at=2": r"branch_at must be a scale in \(0, 1\], got 2",
    COARSE + "branch_at=0.01 steps=4": "branch_at=0.01 leaves no steps to differ in",
    COARSE + "sampler=heun": "sampler Heun draws no noise on its way",
    # models
    "task=coarse model=homogeneous": "Homogeneous has no noise, so all that share a start are the same",
    "task=vary model=homogeneous start=a.png": "Homogeneous has no noise, so nothing varies",
    "task=inpaint model=finer image=a.png mask=m.png": "a model trained with target=finer predicts the next scale only",
    "task=vary model=classes start=a.png": "this model was trained with labels; say for task=vary",
    "task=deblur model=osmosis_diffusion image=a.png blur_sigma=1 method=scale": "a scale of OsmosisDiffusion is no",
    DEBLUR + "method=scale": "VP does not blur, so no scale of it is the blurred image",
    # files
    "task=inpaint model=vp image=none.png mask=m.png": "none.png: no such file",
    "task=inpaint model=vp image=rgb.png mask=m.png": "rgb.png is RGB, and this model draws grey images; convert it",
    "task=inpaint model=vp image=mixed mask=m.png": "mixed/b.png has 12x20 pixels, mixed/a.png 8x8",
    "task=inpaint model=vp image=wide.png mask=m.png": "m.png has 8x8 pixels, wide.png 12x20 .*; a mask needs the same",
    "task=inpaint model=vp image=a.png mask=white.png": "white.png is white everywhere; nothing of the image would be",
    "task=inpaint model=vp image=a.png mask=black.png": "black.png is black everywhere",
    "task=interpolate model=vp start=a.png end=set": "start has 1 of 8x8, end 3 of 8x8 pixels",
    "task=interpolate model=vp start=a.png end=wide.png": "start has 1 of 8x8, end 1 of 12x20 pixels",
    VARY + "out=old": "old holds images already .'000009.png'., and no sample.json says that they are of this command",
    VARY + "out=old overwrite=true": "old holds '000009.png', which overwrite=true does not replace",
    VARY + "overwrite=yess": "overwrite must be true or false, got 'yess'",
    VARY + "labels=3": "labels were given, but this model was trained without",
    # more than there is
    SUPERRES + "factor=100000": "factor=100000: images of 800000x800000 pixels, 1 at a time, would take .* of memory",
    INTERPOLATE + "frames=1000000000000": "1000000000000 at a time, would take .* of memory, .*; lower frames",
    COARSE + "size=100000": "images of 100000x100000 pixels, 1 at a time, would take .* memory, .*; ask for smaller",
    COARSE + "size=2000 batch_size=100000 starts=1000": "8000 at a time, would take .* memory, .*; lower batch_size",
    COARSE + "starts=1000000000000": "8000000000000 images need as many files, and the disk of new has room for",
    VARY + "out=file": "can't write to file",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(command: str, desk: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in desk.rglob("*")}
    out = [] if "out=" in command else ["out=new"]
    outcome = call("sample.py", *command.split(), *out, cwd=desk)
    assert outcome.status == (1 if " memory" in MISTAKES[command] else 2), outcome.out + outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(MISTAKES[command], lines[0]), outcome.err
    assert {path: path.stat().st_mtime_ns for path in desk.rglob("*")} == before
