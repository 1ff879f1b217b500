"""The comparison of processes on real images: each path against its law, files, going on where it stopped, mistakes."""

from __future__ import annotations

import csv
import hashlib
import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from PIL import Image

from dpm_scales.commands import processes as choices
from dpm_scales.commands.processes import comparison_entries
from dpm_scales.data.image_sets import numbered_images
from dpm_scales.errors import UserError
from dpm_scales.images import load_image
from dpm_scales.operators import evolve
from dpm_scales.study.comparison import Entry, Parts, measure, noise_seed
from support.evaluate_helpers import Fake
from support.oracles import close, coefficients, pixels
from support.shell import Outcome, call, composed, photos

TIMES = [1, 5, 10, 100, 1000, 10000]


def entries(*overrides: str) -> dict[str, Entry]:
    HydraConfig.instance().cfg = None  # of a command that another test called in this process
    return {e.name: e for e in comparison_entries(composed("out=x", "folder=x", *overrides, name="evolve"))}


def photo(height: int = 24, width: int = 36, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def compare(out: Path, *overrides: str) -> Outcome:
    return call("evolve.py", f"out={out}", *overrides, cwd=out.parent)


# --- the paper's processes --------------------------------------------------------------------------------------------


def test_the_papers_processes_have_the_papers_parameters() -> None:
    mu = torch.tensor([[0.0, 1e-3, 0.1, 2.0]], dtype=torch.float64)
    blur = {"heat": 0.01, "homogeneous": 0.0, "blurring": 0.1, "osmosis": 0.0}
    found = entries()
    assert list(found) == ["vp", "heat", "homogeneous", "blurring", "osmosis"]
    for name, entry in found.items():
        for t, scale in zip(TIMES, entry.scales, strict=True):
            signal, noise = entry.process.signal_scale(scale, mu), entry.process.noise_scale(scale, mu)
            if name == "vp":  # t steps of sqrt(1 - 0.1^2), and what variance is then missing to 1
                close(signal.expand(mu.shape).numpy(), 0.99 ** (t / 2), 1e-12)
                close(noise.expand(mu.shape).numpy(), math.sqrt(1 - 0.99**t), 1e-12)
            else:
                close(signal.numpy(), np.exp(-mu.numpy() * t), 1e-12)
                close(noise.expand(mu.shape).numpy(), blur[name], 1e-12)
    assert [e.name for e in found.values() if not e.keeps_grey] == ["vp"]


def test_paths_without_noise_are_the_blurred_images_and_the_filter() -> None:
    """By a DCT in numpy, and by `evolve` with the guidance image that the seed draws."""
    x = photo()
    found = entries()
    path, steady = found["homogeneous"].path(x, seed=3)
    assert steady is None and path.shape == (6, 1, 3, 24, 36)
    u = coefficients((x / 255).double().numpy())
    k, j = np.arange(24)[:, None], np.arange(36)
    mu = np.pi**2 * (k**2 / 24**2 + j**2 / 36**2)
    for t, image in zip(TIMES, path, strict=True):
        close(image.numpy(), pixels(np.exp(-mu * t) * u), 1e-5)
    path, steady = found["osmosis"].path(x, seed=3)
    context = found["osmosis"].process.context(x / 255, torch.Generator().manual_seed(3))
    assert context is not None and steady is not None
    close(path.numpy(), evolve(x / 255, context, TIMES).numpy(), 2e-5)
    close(path[-1].numpy(), steady.numpy(), 1e-3)


@pytest.mark.parametrize(("name", "noise"), [("heat", 0.01), ("blurring", 0.1)])
def test_noise_on_a_path_is_of_the_stated_size_at_every_time(name: str, noise: float) -> None:
    """The mean of an image moves by noise / sqrt(pixels); what is left beside the blur has the standard deviation."""
    x, found = photo(40, 60), entries()
    path, plain = found[name].path(x, 1)[0], found["homogeneous"].path(x, 1)[0]
    for image, blurred in zip(path, plain, strict=True):
        left = (image - blurred).double()
        assert float(left.std()) == pytest.approx(noise, rel=5 / math.sqrt(2 * left.numel()))
        assert abs(float(left.mean())) < 5 * noise / math.sqrt(left.numel())


def test_shown_images_are_clipped_or_stretched() -> None:
    found = entries()
    x = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5]).reshape(1, 1, 1, 5)
    assert found["heat"].shown(x).flatten().tolist() == [0, 0, 128, 255, 255]
    assert found["vp"].shown(x).flatten().tolist() == [0, 64, 128, 191, 255]
    both = torch.cat([x, 10 * x])  # each image by itself
    assert torch.equal(found["vp"].shown(both)[1], found["vp"].shown(both)[0])
    assert found["vp"].shown(torch.ones(1, 3, 2, 2)).unique().numel() == 1


def test_a_chosen_process_comes_last_with_its_own_scales() -> None:
    found = entries("process=blurring_chain", "scales=[0.1,0.2,0.3,0.4,0.5,1]")
    assert list(found)[-1] == "BlurringChain" and found["BlurringChain"].scales == (0.1, 0.2, 0.3, 0.4, 0.5, 1.0)
    assert list(entries("process=vp", "processes.vp=null"))[-1] == "VP"
    node = "{_target_:dpm_scales.processes.VP,num_scales:6}"
    for kept, name in (("vp", "vp, chosen"), ("heat", "vp")):
        listed = [f"processes.{e}=null" for e in found if e not in (kept, "BlurringChain")]
        with mock.patch.object(choices, "chosen_name", lambda: "vp"):
            assert list(entries(f"process={node}", *listed)) == [kept, name]
    fewer = entries("times=[2,20]")
    assert all(e.process.num_scales == 2 and e.scales == (0.5, 1.0) for e in fewer.values())


# --- measuring --------------------------------------------------------------------------------------------------------


def small(*overrides: str) -> list[Entry]:
    found = entries("times=[1,50]", *overrides)
    return [found["vp"], found["heat"], found["osmosis"]]


def test_figures_are_those_of_the_paths(tmp_path: Path) -> None:
    """Recomputed in numpy from each image's path; portrait images beside landscape ones."""
    folder = photos(photos(tmp_path / "set", 3), 2, (20, 12), first=3)
    images = numbered_images(str(folder))
    assert [list(b) for b in images.batches(2)] == [[0, 1], [2], [3, 4]]
    parts = measure(small(), images, tmp_path / "out", seed=5, features=Fake(), batch_size=2)  # type: ignore[arg-type]
    for entry in small():
        variance, grey = parts.series(entry.name, "variance"), parts.series(entry.name, "grey")
        assert variance is not None and grey is not None and variance.shape == grey.shape == (2, 5)
        place = 0
        for batch in images.batches(2):
            x = torch.stack([images.load(i) for i in batch])
            path = entry.path(x, noise_seed(5, entry.name, batch[0]))[0].double().numpy()
            shown = [Fake()(entry.shown(torch.from_numpy(p))) for p in path]
            for k in range(2):
                for b in range(len(batch)):
                    channels = [float(np.var(path[k, b, c])) for c in range(3)]
                    assert variance[k, place + b] == pytest.approx(sum(channels) / 3, rel=1e-6)
                    assert grey[k, place + b] == pytest.approx(float(path[k, b].mean()), abs=1e-9)
                features = parts.features(entry.name, k)[place : place + len(batch)]
                close(features, shown[k].numpy(), 0.6)  # a level of rounding between float32 and float64
            place += len(batch)
    entropy = parts.series("osmosis", "relative_entropy")
    assert entropy is not None and (np.diff(entropy, axis=0) >= -1e-4 * np.abs(entropy[:1])).all()
    assert parts.series("heat", "relative_entropy") is None


def test_a_comparison_goes_on_where_it_stopped(tmp_path: Path) -> None:
    images = numbered_images(str(photos(tmp_path / "set", 5)))
    whole = measure(small(), images, tmp_path / "whole", features=Fake())  # type: ignore[arg-type]

    class StopError(Exception):
        pass

    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if len(seen) == 3:
            raise StopError

    with pytest.raises(StopError):
        measure(small(), images, tmp_path / "out", features=Fake(), on_batch=stop)  # type: ignore[arg-type]
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out/parts").glob("*.npz")}
    assert len(first) == 3
    resumed = measure(small(), images, tmp_path / "out", features=Fake())  # type: ignore[arg-type]
    assert first.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out/parts").glob("*.npz")}.items()
    for entry in small():
        for key in ("variance", "grey"):
            assert np.array_equal(whole.series(entry.name, key), resumed.series(entry.name, key))  # type: ignore[arg-type]
        assert np.array_equal(whole.features(entry.name, 1), resumed.features(entry.name, 1))


@pytest.mark.parametrize(
    "change",
    [
        *("seed", "times", "images", "content", "features", "resizing", "names", "batch_size"),
        *("processes.osmosis.guidance_noise=0.2", "+processes.osmosis.guidance_pattern=edges"),
        *("+processes.heat.spectrum=discrete", "+processes.osmosis.tolerance=1e-4"),
    ],
)
def test_parts_of_another_comparison_are_refused(tmp_path: Path, change: str) -> None:
    images = numbered_images(str(photos(tmp_path / "set", 2)))
    given: dict[str, Any] = {"entries": small(), "images": images, "out": tmp_path / "out", "seed": 0}
    if change == "resizing":
        given["features"] = Fake()
    measure(**given)
    measure(**given)
    measure(**{**given, "entries": small()})
    if change == "seed":
        given["seed"] = 1
    elif change == "times":
        given["entries"] = [*small()[:2], entries("times=[1,51]")["osmosis"]]
    elif change == "images":
        given["images"] = numbered_images(str(photos(tmp_path / "set", 1, first=2)))
    elif change == "features":
        given["features"] = Fake()
    elif change == "resizing":
        given["features"].resizing = "another"
    elif change == "content":
        (tmp_path / "set/001.png").write_bytes((photos(tmp_path / "new", 1, first=7) / "007.png").read_bytes())
    elif change == "batch_size":
        given["batch_size"] = 2
    elif change == "names":
        given["entries"] = small()[:2]
    elif "=" in change:
        given["entries"] = small(change)
    with pytest.raises(UserError, match="other processes, images or settings"):
        measure(**given)


def test_a_damaged_part_is_never_left(tmp_path: Path) -> None:
    """Parts appear whole: no other file lies there while they are written."""
    images = numbered_images(str(photos(tmp_path / "set", 2)))
    names: set[str] = set()
    measure(small(), images, tmp_path, on_batch=lambda _: names.update(p.name for p in (tmp_path / "parts").iterdir()))
    assert names == {"comparison.txt", "000000.npz", "000001.npz"}
    assert isinstance(Parts(tmp_path / "parts", ["a"], 1).series("a", "variance"), type(None))


def test_nothing_waits_for_or_leaves_a_device_in_a_path() -> None:
    from support.oracles import pretended_gpu

    for entry in small():
        with pretended_gpu(entry.process):
            x = torch.zeros(1, 3, 8, 10, dtype=torch.uint8, device="cuda")
            value_range = entry.process.value_range
            x_0 = x.float() / 255 * (value_range[1] - value_range[0])
            path = entry.process.trajectory(x_0, entry.scales, None, entry.process.context(x_0))
            assert path.device.type == "cuda" and entry.shown(path[0]).device.type == "cuda"


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    outcome = compare(
        folder / "out", f"data={photos(folder / 'set', 3)}", "times=[1,20]", "show=[0,2]", "features=null"
    )
    assert outcome.status == 0, outcome.err
    assert "3 images, 5 processes, 2 times" in outcome.out
    return folder / "out"


def test_command_writes_tables_and_pictures(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "parts", "variance.csv", "variance.png", "entropy.csv", "entropy.png", "trajectories.png",
        "trajectories_000002.png", "comparison.json",
    }  # fmt: skip
    for path in finished.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 150 and len(picture.convert("L").getcolors(1 << 24) or []) > 10


def test_variance_table_is_that_of_the_blurred_images(finished: Path) -> None:
    found = {(r["process"], float(r["t"])): r for r in rows(finished / "variance.csv")}
    assert len(found) == 10
    k, j = np.arange(12)[:, None], np.arange(20)
    mu = np.pi**2 * (k**2 / 12**2 + j**2 / 20**2)
    for t in (1.0, 20.0):
        each = []
        for path in sorted((finished.parent / "set").iterdir()):
            u = coefficients(load_image(path).double().numpy() / 255)
            each.append(np.var(pixels(np.exp(-mu * t) * u), axis=(1, 2)).mean())
        row = found["homogeneous", t]
        assert float(row["mean"]) == pytest.approx(np.mean(each), rel=1e-5)
        assert float(row["std"]) == pytest.approx(np.std(each, ddof=1), rel=1e-4) and row["n"] == "3"
        blurred = float(found["homogeneous", t]["mean"])
        assert float(found["blurring", t]["mean"]) == pytest.approx(blurred + 0.01, rel=0.1)


def test_entropy_table_is_the_closed_form(finished: Path) -> None:
    found = {(r["process"], float(r["t"])): r for r in rows(finished / "entropy.csv")}
    for name, std in (("heat", 0.01), ("blurring", 0.1)):
        for t in (1.0, 20.0):
            expected = 0.5 * math.log(2 * math.pi * math.e * std**2)
            assert float(found[name, t]["conditional_entropy"]) == pytest.approx(expected, abs=1e-6)
        assert float(found[name, 20.0]["increment"]) == pytest.approx(0, abs=1e-9)
    vp = [0.5 * math.log(2 * math.pi * math.e * (1 - 0.99**t)) for t in (1, 20)]
    assert float(found["vp", 20.0]["increment"]) == pytest.approx(vp[1] - vp[0], rel=1e-6)
    assert float(found["osmosis", 20.0]["relative_entropy"]) > float(found["osmosis", 1.0]["relative_entropy"])


@pytest.mark.slow
def test_distances_name_their_network_and_grow_with_difference(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    folder = photos(tmp_path / "set", 6, (40, 60))
    outcome = compare(
        tmp_path / "out", f"data={folder}", "times=[1,100]", "features=efflite0", "processes.homogeneous=null"
    )
    assert outcome.status == 0, outcome.err
    found = rows(tmp_path / "out/distance.csv")
    assert {r["process"] for r in found} == {"vp", "heat", "blurring", "osmosis, second draw"}
    assert all(r["frechet_name"] == "FD-efflite0" and r["n"] == "6" and r["reference"] == "osmosis" for r in found)
    late = {r["process"]: float(r["frechet"]) for r in found if float(r["t"]) == 100}
    assert late["osmosis, second draw"] < late["blurring"] < late["heat"]


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    ((), "data=DIR"),
    (("data=nowhere",), "nowhere: no such folder"),
    (("data=set", "out=set/figures"), "out=set/figures lies in data=set: the figures would become its images"),
    (("data=set", "times=[]"), "times must be ascending"),
    (("data=set", "times=[5,1]"), "times must be ascending"),
    (("data=set", "times=[0,1]"), "times must be ascending"),
    (("data=set", "times=[a]"), "times must be ascending"),
    (("data=set", "show=[7]"), "show must list numbers of images from 0 to 1"),
    (("data=set", "show=[]"), "show must list"),
    (("data=set", "show=[true]"), "show must list"),
    (("data=set", "times=[true]"), "times must be ascending"),
    (("data=set", "process=vp", "times=[1]", "scales=[true]"), "scales must be 1 ascending numbers"),
    (("data=set", "limit=0"), "limit must be a whole number >= 1"),
    (("data=set", "batch_size=0"), "batch_size must be"),
    (("data=set", "seed=-1"), "seed must be"),
    (("data=set", "reference=osmossis"), "did you mean 'osmosis'"),
    (("data=set", "features=clip"), "unknown feature network 'clip'"),
    (("data=set", "process=vp", "scales=[0.5]"), "scales must be 6 ascending numbers"),
    (("data=set", "process=vpp"), "unknown process 'vpp'"),
    (("data=set", "task=comparre"), "unknown task 'comparre'"),
    (("data=set", "tims=[1]"), "unknown option 'tims'"),
    (("data=set", "audit=maybe"), "audit must be true or false"),
    (("data=broken",), "images can't be read"),
    (("data=set", "processes.heat.noise.noise_std=-1"), "noise_std"),
    (("data=set", "processes=3"), "processes must be configs by name, got 3"),
    (("data=set", "processes.heat=3"), "processes.heat must be a config with a _target_, got 3"),
    (("data=set", "processes.heat._target_=dpm_scales.samplers.DDIM"), "error: processes.heat._target_=dpm_scales"),
    (("data=set", "process={_target_:dpm_scales.samplers.DDIM}"), "DDIM makes no Process; name a class derived from"),
    (("data=set", "process=vp", "process._target_=os.getcwd"), "getcwd"),
    (("data=set", "device=tpu"), "device"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[" ".join(m[0]) or "none" for m in MISTAKES])
def test_mistakes_end_with_one_line(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    photos(tmp_path / "set", 2)
    (photos(tmp_path / "broken", 2) / "002.png").write_bytes(b"not an image")
    outcome = compare(
        tmp_path / "out", "features=null" if "features" not in str(overrides) else "audit=false", *overrides
    )
    assert outcome.status == 2 and "Traceback" not in outcome.err
    assert message in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_more_memory_than_there_is_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 times of 3 photos of 60x80: a path of 69 MB."""
    monkeypatch.setattr("dpm_scales.memory.available_memory", lambda device=None: 60e6)
    data = f"data={photos(tmp_path / 'set', 3, (60, 80))}"
    kept = [f"processes.{name}=null" for name in ("heat", "homogeneous", "blurring", "osmosis")]
    times = f"times={list(range(1, 401))}".replace(" ", "")
    outcome = compare(tmp_path / "out", data, *kept, times, "batch_size=3", "features=null", "reference=null")
    assert outcome.status == 1 and outcome.err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "batch_size=3 images at 400 times would take 65.9 MiB" in outcome.err and "lower batch_size" in outcome.err


def test_the_former_name_of_a_process_is_still_an_option(tmp_path: Path) -> None:
    data = f"data={photos(tmp_path / 'set', 2)}"
    kept = [f"processes.{name}=null" for name in ("heat", "homogeneous", "blurring")]
    options = (data, *kept, "times=[1,5]", "features=null")
    for out, more in (
        ("old", ("processes.dpm.noise.beta=0.2", "reference=dpm")),
        ("new", ("processes.vp.noise.beta=0.2", "reference=vp")),
    ):
        assert compare(tmp_path / out, *options, *more).status == 0
    assert rows(tmp_path / "old/variance.csv") == rows(tmp_path / "new/variance.csv")
    assert [row["process"] for row in rows(tmp_path / "old/variance.csv")] == ["vp", "vp", "osmosis", "osmosis"]
    outcome = compare(tmp_path / "without", *options, "processes.dpm=null")
    assert outcome.status == 0 and "2 images, 1 process, 2 times" in outcome.out


def test_noise_of_a_process_follows_its_first_name() -> None:
    assert noise_seed(3, "vp", 7) == int.from_bytes(hashlib.sha256(b"3/dpm/7").digest()[:8], "little") >> 1
    draw = "osmosis, second draw"
    assert noise_seed(3, draw, 7) == int.from_bytes(hashlib.sha256(f"3/{draw}/7".encode()).digest()[:8], "little") >> 1
