"""The comparison of processes: which rows run, how they resume, and what the tables say of them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import image_sets, spectral, spectral_tables
from benchmarks.half_blur import HalfBlurFlowLoss
from benchmarks.image_sets import IMAGE_SETS, ImageSet
from dpm_scales.errors import UserError
from dpm_scales.locks import lock
from dpm_scales.metrics import FeatureNetwork
from dpm_scales.models.io import load_model
from dpm_scales.training.module import DiffusionModule
from support.shell import CONFIGS, call, composed


class Means(ImageSet):
    """Digits; the distance is the mean intensity."""

    name, network, batch_size, quality = "means", "tiny", 4, "mean"

    def overrides(self) -> list[str]:
        return ["data=digits", "network.widths=[4]", "network.attention_levels=[]", "trainer.enable_progress_bar=false"]

    def training_images(self) -> np.ndarray[Any, Any]:
        raise NotImplementedError("train.py reads them")

    def report(self, images: np.ndarray[Any, Any]) -> dict[str, float]:
        return {"fd": float(images.mean())}

    def real(self, number: int) -> dict[str, float]:
        return {"fd": 70.0}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Train in this process; return the list of runs that were."""
    runs: list[str] = []

    def train(overrides: list[str]) -> tuple[float, float]:
        outcome = call("train.py", *overrides, cwd=Path.cwd())
        if outcome.status:
            raise UserError(outcome.err)
        runs.append(next(option for option in overrides if option.startswith("run_dir=")))
        return 1.0, 2.0

    monkeypatch.setattr(spectral, "_train", train)
    monkeypatch.setitem(IMAGE_SETS, "means", Means)
    return runs


COMMON = ("--set", "means", "--images", "8", "--number", "3", "--evaluations", "2", "3")


def test_rows_run_once_and_are_shared(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*COMMON, "--out", str(tmp_path), "--rows", "vp", "--row", "own=process=heat process.num_scales=20"]
    spectral.main([*arguments, "--seeds", "0"])
    assert len(trained) == 2
    vp = json.loads((tmp_path / "vp/seed0/row.json").read_text())
    kinds = [("2m", 2), ("2m", 3), ("sde", 2), ("sde", 3), ("auto", 0)]
    assert [(entry["sampler"], entry["asked"]) for entry in vp["samples"]] == kinds
    assert [entry["evaluations"] for entry in vp["samples"]] == [2, 3, 2, 3, 35]
    assert vp["steps"] == 2 and vp["images"] == 8 and vp["training_cpu_seconds"] == 2.0
    own = json.loads((tmp_path / "own/seed0/row.json").read_text())
    assert own["preconditioning"] == "wiener"
    assert {entry["sampler"] for entry in own["samples"]} == {"sde", "auto"}  # the noise is constant

    before = {path: path.read_bytes() for path in tmp_path.rglob("row.json")}
    spectral.main([*arguments, "--seeds", "0"])
    assert len(trained) == 2 and before == {path: path.read_bytes() for path in before}

    # samples that are missing are drawn from the same weights, and equal those that were lost
    vp_file = tmp_path / "vp/seed0/row.json"
    vp_file.write_text(json.dumps(vp | {"samples": vp["samples"][:3]}))
    free = lock

    def one_is_held(path: Path, *words: Any, **options: Any) -> Any:
        if path == tmp_path / "own/seed0/row.lock":
            raise UserError("it takes this row")
        return free(path, *words, **options)

    monkeypatch.setattr("benchmarks.rows.lock", one_is_held)
    spectral.main([*arguments, "--seeds", "0"])
    again = json.loads(vp_file.read_text())
    assert [entry["fd"] for entry in again["samples"]] == [entry["fd"] for entry in vp["samples"]]
    assert len(trained) == 2 and "it takes this row" in capsys.readouterr().out

    table = (tmp_path / "means_8_images.md").read_text()
    assert "| vp | 1 | scalar |" in table and "real images, n = 3" in table
    lines = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert len(lines) == 5 + 3 + 1 and {line["set"] for line in lines} == {"means"}
    with Image.open(tmp_path / "means_8_images_evaluations.png") as picture:
        assert picture.width > 500


def test_a_row_that_fails_leaves_the_others(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*COMMON, "--out", str(tmp_path), "--rows", "missing", "vp", "--evaluations"]
    with pytest.raises(SystemExit, match="2"):
        spectral.main(arguments)
    assert "1 rows failed: missing, seed 0" in capsys.readouterr().err
    assert len(trained) == 1 and (tmp_path / "means_8_images.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--images", "0"], "a budget of 0 trains nothing"),
        (["--images", "8", "--row", "vp"], 'expected "NAME=OPTION=VALUE OPTION=VALUE ..."'),
        (
            ["--images", "8", "--row", "own=process=vp +data.batch_size=9"],
            "--row own: data.batch_size is the same for all rows; set it by --batch-size",
        ),
        (
            ["--images", "8", "--row", "own=trainer.max_steps=9"],
            "--row own: trainer.max_steps is the same for all rows; set it by --seconds or --images",
        ),
        (
            ["--images", "8", "--override", "seed=3"],
            "--override: seed is the same for all rows; set it by --seeds",
        ),
        (["--images", "8", "--seconds", "1"], "not allowed with"),
        ([], "one of the arguments"),
        (["--images", "8", "--inception", "x.pt"], "--inception is for --set cifar10; leave it out with mnist"),
    ],
)
def test_bad_arguments(arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        spectral.main([*arguments, "--out", str(tmp_path / "out")])
    assert line in capsys.readouterr().err and not (tmp_path / "out").exists()


class Corners(FeatureNetwork):
    """Colours of the first pixel."""

    name, dim, input_side, factor = "corners", 3, 32, 1.0

    def __init__(self, path: Path | None = None) -> None:
        super().__init__("0" * 64 if path is None else "1" * 64)
        if path is not None:
            self.name, self.factor = "other", 2.0

    def embed(self, pixels: Tensor) -> Tensor:
        return self.factor * pixels[:, :, 0, 0]


def test_cifar_is_read_from_a_folder_and_measured_by_each_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_sets, "EffLite0Features", Corners)
    monkeypatch.setattr(image_sets, "InceptionFeatures", Corners)
    monkeypatch.setattr(image_sets, "CIFAR_REFERENCE", 8)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        folder = tmp_path / "source" / ("train" if i < 10 else "test") / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    plain = image_sets.CifarSet(tmp_path / "cache", tmp_path / "source")
    both = image_sets.CifarSet(tmp_path / "cache", tmp_path / "source", tmp_path / "inception.pt")
    assert "data.random_flip=true" in both.overrides()
    with np.load(tmp_path / "cache/cifar10_train.npz") as file:
        np.testing.assert_array_equal(file["labels"], [0] * 5 + [1] * 5)
        np.testing.assert_array_equal(file["images"], pixels[[0, 2, 4, 6, 8, 1, 3, 5, 7, 9]])
    train = both.training_images()
    found, without = both.report(train[:4]), plain.report(train[:4])
    # against the 8 training images spread over all, by the formula of Gaussians
    means, covariances = [], []
    for chosen in (train[:4], train[np.linspace(0, 9, 8).astype(int)]):
        corners = chosen[:, :, 0, 0].astype(float)
        means.append(corners.mean(0))
        covariances.append(np.cov(corners, rowvar=False))
    roots = np.linalg.eigvals(covariances[0] @ covariances[1])
    trace = np.trace(sum(covariances)) - 2 * np.sqrt(roots.astype(complex)).real.sum()
    expected = np.square(means[0] - means[1]).sum() + trace
    np.testing.assert_allclose(found["fd"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["fid"], 4 * expected, rtol=1e-6)
    assert without == {key: found[key] for key in ("fd", "kd")}
    assert set(both.real(3)) == {"fd", "kd", "fid"}
    # features of the training images are read again
    for path in (tmp_path / "cache").glob("cifar10_train_8_*.npz"):
        np.savez(path, features=np.load(path)["features"] + 1)
    again = image_sets.CifarSet(tmp_path / "cache", tmp_path / "source", tmp_path / "inception.pt")
    assert again.report(train[:4])["fd"] != found["fd"]


def test_seconds_become_steps(trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        spectral, "step_seconds", lambda models, *_: {name: 0.25 * (1 + i) for i, name in enumerate(models)}
    )
    monkeypatch.setattr(spectral, "run_row", lambda contest, row, options, seed, steps: found.update({row: steps}))
    found: dict[str, int] = {}
    arguments = ["--set", "means", "--seconds", "10", "--out", str(tmp_path), "--rows", "vp", "heat"]
    spectral.main(arguments)
    assert found == {"vp": 40, "heat": 20} and len(trained) == 2
    spectral.main(arguments)
    assert len(trained) == 2


def test_a_row_has_its_own_options_and_its_steps_are_timed_with_its_optimiser(
    trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = DiffusionModule.make_optimizer

    def noted(module: DiffusionModule) -> torch.optim.AdamW:
        made.append(type(make(module)).__name__)
        return make(module)

    monkeypatch.setattr(DiffusionModule, "make_optimizer", noted)
    arguments = ["--set", "means", "--seconds", "1e-9", "--number", "2", "--evaluations", "--out", str(tmp_path)]
    shared = ["--override", "optimizer.method=muon", "--override", "target=velocity"]
    own = ["--row", "own=network.widths=[8] optimizer.method=adamw target=noise samples.num_images=0"]
    spectral.main([*arguments, *shared, "--rows", "vp", *own])
    # both are trained a step before they are timed
    assert made == ["Muon", "AdamW", "Muon", "AdamW", "Muon", "AdamW"]
    models = [load_model(tmp_path / row / "seed0/run") for row in ("vp", "own")]
    assert [type(model.denoiser.target).__name__ for model in models] == ["Velocity", "Noise"]
    assert [model.denoiser.network.conv_in.out_channels for model in models] == [4, 8]
    assert [len(list((tmp_path / row / "seed0/run").glob("samples/step*.png"))) for row in ("vp", "own")] == [1, 0]
    assert set(json.loads((tmp_path / "costs.json").read_text())) == {"vp", "own"}


def test_rows_of_other_settings_are_not_taken_for_finished_ones(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--set", "means", "--images", "8", "--evaluations", "--out", str(tmp_path), "--rows", "vp"]
    spectral.main([*arguments, "--number", "4"])
    before, number = (tmp_path / "vp/seed0/row.json").read_text(), len(trained)
    for more, words in {
        ("--number", "6"): r"vp/seed0/row.json has \[4\] samples, and this command draws 6; choose another --out",
        ("--number", "4", "--learning-rate", "0.5"): "vp/seed0/row.json has shared='.*', and this command '.*0.5.*'",
        (
            "--number",
            "4",
            "--images",
            "16",
        ): "has budget='8 images', and this command '16 images'; choose another --out",
    }.items():
        with pytest.raises(SystemExit):
            spectral.main([*arguments, *more])
        assert re.search(words, capsys.readouterr().err)
    assert (tmp_path / "vp/seed0/row.json").read_text() == before and len(trained) == number


def test_a_table_has_rows_of_one_kind() -> None:
    lines = [_line("vp", 0, "2m", 5, 9.0), _line("vp", 1, "2m", 5, 8.0, shared="network=wide")]
    with pytest.raises(UserError, match="rows of vp differ in more than the seed: .*network=wide.*; name them apart"):
        spectral_tables.table(lines, "FD")


def _line(row: str, seed: int, sampler: str, asked: int, fd: float, **more: Any) -> dict[str, Any]:
    head = {"row": row, "set": "mnist", "budget": "9 images", "options": "", "shared": "", "seed": seed}
    rest = {"preconditioning": "wiener", "training_cpu_seconds": 9.0, "seconds": 1.0, "number": 10, "commit": "abc"}
    rest |= {"date": "2026-01-01", "machine": "M"}
    return head | rest | {"sampler": sampler, "asked": asked, "fd": fd} | more


def test_tables() -> None:
    lines = [_line("vp", seed, *kind, 100 + 10 * seed) for seed in (0, 1) for kind in (("2m", 5), ("auto", 0))]
    lines += [_line("heat", 0, "2m", 5, 30.0), _line("heat", 0, "sde", 5, 20.04), _line("heat", 0, "auto", 0, 50.0)]
    rows = spectral_tables.table(lines, "FD").splitlines()[4:]
    assert rows[0].startswith("| heat | 1 | wiener | 20 ˢ | 50 | 9 | 100 | abc, 2026-01-01, M |")
    assert rows[1].startswith("| vp | 2 | wiener | 105 ± 5 | 105 ± 5 |")
    # a seed of another machine counts for quality, not for times; a second distance has its column
    other = {"commit": "def", "machine": "N", "seconds": 7.0, "training_cpu_seconds": 70.0, "kd": 0.5, "fid": 7.25}
    more = spectral_tables.table([*lines, _line("heat", 1, "auto", 0, 54.0, **other)], "FD").splitlines()[2:]
    assert "| `auto` | KD of `auto` | FID of `auto` | training s |" in more[0]
    assert more[2] == (
        "| heat | 2 | wiener | 20 ˢ | 52.0 ± 2.0 | 0.5 | 7.25 | 9 | 100 | abc, 2026-01-01, M; def, 2026-01-01, N |"
    )
    # one table for each set and budget, with the pictures that were drawn
    page = "Intro\n<!-- tables -->\nformer\n<!-- end of tables -->\nOutro\n"
    assert set(spectral_tables.contests([*lines, lines[0] | {"budget": "5 seconds"}])) == {
        "mnist_9_images",
        "mnist_5_seconds",
    }
    text = spectral_tables.page_with(page, {"mnist_9_images": "| a |\n"}, "folder")
    assert text.startswith("Intro\n<!-- tables -->\n\n## mnist 9 images\n\n| a |\n") and "former" not in text
    assert "![blur](folder/mnist_9_images_blur.png)" in text and text.endswith("<!-- end of tables -->\nOutro\n")
    with pytest.raises(UserError, match="the page needs a line <!-- tables -->"):
        spectral_tables.page_with("Intro", {}, "folder")
    # a line of the same key replaces the old one, one of another seed is added
    new = [_line("heat", 0, "2m", 5, 31.0), _line("heat", 1, "2m", 5, 32.0)]
    assert [
        line["fd"] for line in spectral_tables.merged(lines, new, spectral_tables.KEY) if line["row"] == "heat"
    ] == [31, 20.04, 50, 32]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.6274, 1.352, 1.3744], "1.45 ± 0.14"),
        ([1.7517, 1.7729, 1.5837], "1.70 ± 0.09"),
        ([15.16, 15.51, 18.36], "16.3 ± 1.6"),
        ([100.0, 110.0], "105 ± 5"),
        ([20.0], "20"),
    ],
)
def test_spreads_are_as_precise_as_their_means(values: list[float], text: str) -> None:
    assert spectral_tables.spread(values) == text


@pytest.mark.parametrize("group", sorted(spectral_tables.GROUPS))
def test_groups_are_plotted_by_their_number(group: str, tmp_path: Path) -> None:
    rows = [*spectral.GROUPS[group], *spectral.GROUPS["pairing"]]
    lines = [_line(row, seed, "auto", 0, 10.0 + seed) for row in rows for seed in (0, 1)]
    spectral_tables.plot_group(lines, group, "FD", tmp_path / "group.png")
    with Image.open(tmp_path / "group.png") as picture:
        assert picture.width > 500
    spectral_tables.plot_group(lines[:2], group, "FD", tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists()


@pytest.mark.parametrize(("values", "at_least"), [((212.0, 271.0), 3), ((1.4, 52.0), 6), ((9.1, 9.3), 3)])
def test_axes_have_marks_in_any_range(values: tuple[float, float], at_least: int) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.plot([5, 50], values)
    spectral_tables._finish(axes, "FD", [])
    low, high = axes.get_ylim()
    assert len([mark for mark in axes.get_yticks() if low <= mark <= high]) >= at_least


def test_rows_are_configs() -> None:
    assert set(spectral.MEMBERS) <= {path.stem for path in (CONFIGS / "process").glob("*.yaml")}
    assert composed(*spectral.GROUPS["blur"]["warm b=0.5"]).process.blur_ratio == 0.5
    assert composed(*spectral.GROUPS["color"]["power_law a=-0.05"]).process.color.exponent == -0.05
    half = composed(*spectral.GROUPS["blend"]["hdfm half blur loss"])
    assert isinstance(hydra.utils.instantiate(half.weight), HalfBlurFlowLoss)
    chosen = spectral.chosen_rows(["warm b=2", "heat"], ["mine=process=vp data=digits"])
    assert chosen == {
        "warm b=2": ("process=warm", "process.blur_ratio=2"),
        "heat": ("process=heat",),
        "mine": ("process=vp", "data=digits"),
    }
    paired = composed(*spectral.GROUPS["pairing"]["power_law a=0.5 paired"])
    assert (paired.training.pairing, paired.process.color.exponent) == ("nearest", 0.5)
