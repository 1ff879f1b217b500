"""The figures of a comparison: a look for each process, all there is to see inside them, titles and warnings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.figure
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from skimage.color import deltaE_ciede2000, rgb2lab

from dpm_scales import plots
from dpm_scales.images import load_image
from dpm_scales.plots.rows import titled_row
from support.evaluate_helpers import Fake
from support.shell import CONFIGS, call, photos

FEW = "5 images for 6 features: their covariance is singular and FD-fake too high"
PROCESSES = ("vp", "heat", "homogeneous", "blurring", "osmosis", "ve")


@dataclass
class ModelSamples:
    """What a figure shows, taken when it is saved."""

    colours: dict[str, str] = field(default_factory=dict)
    curves: list[dict[str, np.ndarray]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    legend_apart: bool = True
    markers_inside: bool = True


def look_at(figure: matplotlib.figure.Figure) -> ModelSamples:
    figure.canvas.draw()
    found = ModelSamples()
    boxes = [legend.get_window_extent() for legend in figure.legends]
    for axis in figure.axes:
        found.legend_apart &= axis.get_legend() is None
        found.legend_apart &= not any(axis.get_window_extent().overlaps(box) for box in boxes)
        found.labels += [axis.get_xlabel(), axis.get_ylabel()]
        found.titles.append(axis.get_title())
        found.markers_inside &= all(inside(axis, line) for line in axis.get_lines() if line.get_marker() != "None")
        named = [line for line in axis.get_lines() if not str(line.get_label()).startswith("_")]
        found.curves.append({str(line.get_label()): np.asarray(line.get_ydata()) for line in named})
        for line in named:
            assert found.colours.setdefault(str(line.get_label()), line.get_color()) == line.get_color()
    return found


def inside(axis: Axes, line: Any) -> bool:
    """Whether all markers are seen whole."""
    points = axis.transData.transform(line.get_xydata())
    radius = line.get_markersize() / 2 * axis.figure.dpi / 72
    frame = axis.figure.bbox if not line.get_clip_on() else axis.bbox
    low, high = (points - radius).min(0), (points + radius).max(0)
    within = axis.bbox.padded(1).contains
    return bool(all(within(*p) for p in points) and frame.contains(*low) and frame.contains(*high))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, ModelSamples]]]:
    """A comparison of small photos, and its figures by their names."""
    folder = tmp_path_factory.mktemp("figures")
    seen: list[ModelSamples] = []
    save = matplotlib.figure.Figure.savefig

    def savefig(self: matplotlib.figure.Figure, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        seen.append(look_at(self))

    names: list[str] = []
    write = plots.write_bytes

    def write_bytes(path: Path, content: bytes) -> None:
        names.append(Path(path).name)
        write(path, content)

    with (
        mock.patch.object(matplotlib.figure.Figure, "savefig", savefig),
        mock.patch.object(plots, "write_bytes", write_bytes),
        mock.patch("dpm_scales.evaluation.choices.pick_features", lambda *_, **__: Fake()),
    ):
        options = ("times=[1,20,400]", "process=ve", "features=fake", f"data={photos(folder / 'set', 5, (24, 36))}")
        with pytest.warns(UserWarning, match=FEW):
            outcome = call("evolve.py", f"out={folder / 'out'}", *options, cwd=folder)
    assert outcome.status == 0, outcome.err
    yield folder / "out", dict(zip(names, seen, strict=True))


def test_a_process_has_one_name_and_one_colour_in_all_figures(study: tuple[Path, dict[str, ModelSamples]]) -> None:
    _, figures = study
    assert figures.keys() == {"variance.png", "entropy.png", "distance.png", "trajectories.png"}
    assert figures["variance.png"].colours.keys() == set(PROCESSES)
    for name in ("variance.png", "entropy.png", "distance.png"):
        for process, colour in figures[name].colours.items():
            assert colour == plots.SHIPPED[process.removesuffix(", second draw")][0]


def test_nothing_is_hidden_or_cut_off(study: tuple[Path, dict[str, ModelSamples]]) -> None:
    _, figures = study
    assert all(figure.legend_apart for figure in figures.values())
    assert all(figure.markers_inside for figure in figures.values())


def test_axes_say_what_they_show_in_which_unit(study: tuple[Path, dict[str, ModelSamples]]) -> None:
    _, figures = study
    for name in ("variance.png", "entropy.png", "distance.png"):
        assert all(figures[name].labels)
        assert all(label.startswith("t in px²") for label in figures[name].labels[::2])
    assert figures["variance.png"].labels[0] == "t in px² (vp: steps)"
    assert figures["variance.png"].titles == ["mean ± standard deviation over 5 images"]
    assert figures["trajectories.png"].titles[:4] == ["t = 0, the image", "t = 1", "t = 20", "t = 400"]


def test_trajectories_begin_with_the_image(tmp_path: Path) -> None:
    rows: dict[str, Any] = {}
    options = ("times=[1,20]", "features=null", f"data={photos(tmp_path / 'set', 1)}")
    with mock.patch.object(plots, "sheet", lambda path, pictures, columns, **_: rows.update(pictures)):
        assert call("evolve.py", f"out={tmp_path / 'out'}", *options, cwd=tmp_path).status == 0
    image = load_image(tmp_path / "set/000.png").permute(1, 2, 0).numpy()
    assert list(rows) == list(PROCESSES[:5])
    for pictures in rows.values():
        assert len(pictures) == 3 and np.array_equal(pictures[0], image)
        assert not np.array_equal(pictures[1], image)


def test_fewer_images_than_features_are_told(study: tuple[Path, dict[str, ModelSamples]]) -> None:
    out, figures = study
    assert json.loads((out / "comparison.json").read_text())["warnings"][0].startswith(FEW)
    told = json.loads((out / "comparison.json").read_text())["warnings"][0]
    assert told.endswith("which is too low, as both sets come from the same 5 photos")
    assert figures["distance.png"].titles[0] == "too high: fewer images than 6 features"


# --- looks ------------------------------------------------------------------------------------------------------------


def test_every_shipped_process_has_a_look() -> None:
    fixed = {**plots.SHIPPED, **plots.SPECTRAL}
    assert {path.stem for path in (CONFIGS / "process").glob("*.yaml")} == fixed.keys()
    assert len(set(fixed.values())) == len({marker for _, marker in fixed.values()}) == len(fixed)
    assert {colour for colour, _ in plots.SPECTRAL.values()} <= set(plots.FURTHER)
    own, member = plots.looks(["mine", "rectified"]).values()
    assert own.colour != member.colour
    marks = {(colour, marker) for colour, marker in plots.SHIPPED.values()}
    assert len(marks) == len({c for c, _ in marks}) == len({m for _, m in marks}) == len(plots.SHIPPED)


def test_a_look_does_not_depend_on_what_else_is_drawn() -> None:
    every = plots.looks([*plots.SHIPPED, "mine", "vp, chosen", "osmosis, second draw"])
    for name, look in every.items():
        assert plots.looks([name])[name] == look or name in ("mine", "vp, chosen")
    assert plots.looks(["vp, chosen", "mine"]) == plots.looks(["mine", "vp, chosen"])
    assert every["osmosis, second draw"].colour == every["osmosis"].colour
    assert every["osmosis, second draw"] != every["osmosis"]
    own = [f"own {k}" for k in range(len(plots.FURTHER))]
    colours = {look.colour for look in plots.looks(own).values()}
    assert len(colours) == len(own) and colours.isdisjoint(colour for colour, _ in plots.SHIPPED.values())
    assert len(plots.looks([f"own {k}" for k in range(40)])) == 40


#: Machado et al. 2009, severity 1, of linear RGB
SIGHTS = {
    "normal": np.eye(3),
    "deuteranopia": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "protanopia": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
}


@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_are_told_apart_by_every_eye(sight: str) -> None:
    """CIEDE2000 of each pair: 2.3 is just noticeable; and nothing is too pale for paper."""
    rgb = np.array([to_rgb(colour) for colour in [*(c for c, _ in plots.SHIPPED.values()), *plots.FURTHER]])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ SIGHTS[sight].T
    linear = linear.clip(0, 1)
    lab = rgb2lab(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)[None])[0]
    apart = np.array([[deltaE_ciede2000(a, b) for a in lab] for b in lab]) + 100 * np.eye(len(lab))
    assert apart.min() > 12
    assert lab[:, 0].max() < 85


def test_titles_stand_above_their_pictures() -> None:
    pictures = {"one": torch.full((1, 40, 90), 10, dtype=torch.uint8)}
    pictures["a longer title"] = torch.full((1, 40, 90), 200, dtype=torch.uint8)
    row = titled_row(pictures)[0].numpy()
    factor = (row.shape[1] - 4) // 2 // 90
    assert factor == 2 and (row[-84:-4, 4:184] == 10).all() and (row[-84:-4, 188:368] == 200).all()
    assert (row[:20, :4] == 128).all() and (row[:20] > 128).any(0)[:184].any() and (row[:20] > 128).any(0)[188:].any()
