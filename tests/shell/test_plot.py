"""`dpm-scales plot`: what its pictures show, compared with the files of runs, whatever these hold."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.figure
import numpy as np
import pytest
import yaml
from matplotlib.colors import to_hex
from matplotlib.text import Text

from dpm_scales import plots
from dpm_scales.plots.curves import MOST_POINTS, Curve, draw_run, read_curves, short, smoothed
from dpm_scales.plots.sweeps import Axis, Sweep, draw_curves, draw_parallel, draw_parameters
from support.shell import command, files

METRICS = "step,epoch,lr-AdamW,train/loss,val/loss,val/loss_t0.25,val/loss_t0.50,eval/fid\n"


def put(folder: Path, *overrides: str, steps: int = 20, finished: bool = True, **metrics: float) -> Path:
    """Write a run's folder with four logged steps, whose last `val/loss` and `eval/fid` are as given."""
    folder.mkdir(parents=True)
    loss, fid = metrics.get("loss", 1.0), metrics.get("fid", 50.0)
    config = {"trainer": {"max_steps": 20}, "objective": "val/loss"}
    (folder / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [f"{s},0,0.001,{3 - s / 10},{loss + 0.1 * (19 - s)},{loss / 2},{loss * 2},{fid}" for s in (4, 9, 14, 19)]
    (folder / "metrics.csv").write_text(METRICS + "\n".join(rows) + "\n")
    if finished:
        result = {"overrides": list(overrides), "steps": steps, "seconds": 2.5, "val/loss": loss, "eval/fid": fid}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@contextmanager
def watched() -> Iterator[list[matplotlib.figure.Figure]]:
    """Collect the figures that are saved while the body runs."""
    seen: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def savefig(self: matplotlib.figure.Figure, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        seen.append(self)

    with mock.patch.object(matplotlib.figure.Figure, "savefig", savefig):
        yield seen


def panels(figure: matplotlib.figure.Figure) -> dict[str, Any]:
    """Return the visible axes by what their x-axis and y-axis say."""
    return {f"{axes.get_ylabel()} / {axes.get_xlabel()}": axes for axes in figure.axes if axes.get_visible()}


def drawn(*words: object) -> tuple[list[matplotlib.figure.Figure], str, str]:
    """Return the figures of a command that succeeds, and what it printed."""
    with watched() as seen:
        outcome = command("plot", *words)
    assert outcome.status == 0, outcome.err
    return seen, outcome.out, outcome.err


# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_runs_curves_are_those_of_its_table(tmp_path: Path) -> None:
    folder = put(tmp_path / "run")
    (figure,), out, err = drawn(folder)
    assert out == f"{folder}/curves.png: finished, 20 steps\n" and err == ""
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    shown = panels(figure)
    assert list(shown) == [f"{name} / steps" for name in ("loss", "val/loss by scale", "eval/fid", "learning rate")]
    training, validation = shown["loss / steps"].lines
    np.testing.assert_allclose(training.get_xydata(), [(s, 3 - (s - 1) / 10) for s in (5, 10, 15, 20)])
    np.testing.assert_allclose(validation.get_xydata(), [(s, 1 + 0.1 * (20 - s)) for s in (5, 10, 15, 20)])
    texts = [text.get_text() for text in shown["val/loss by scale / steps"].get_legend().get_texts()]
    assert texts == ["0 < t ≤ 0.25", "0.25 < t ≤ 0.5"]
    colours = {line.get_color() for axes in shown.values() for line in axes.lines}
    assert {plots.COLOURS[0], plots.COLOURS[1]} <= {to_hex(colour).upper() for colour in colours}


def test_one_metric_alone_and_another_folder(tmp_path: Path) -> None:
    folder = put(tmp_path / "run")
    before = files(folder)
    (figure,), _, _ = drawn(folder, "metric=eval/fid", f"out={tmp_path / 'out'}")
    assert list(panels(figure)) == ["eval/fid / steps"]
    assert files(folder) == before and list(files(tmp_path / "out")) == ["curves.png"]


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    folder = put(tmp_path / "run")
    drawn(folder, f"out={tmp_path / 'one'}")
    drawn(folder, f"out={tmp_path / 'two'}")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_values_that_are_not_finite_are_left_out() -> None:
    rows = [
        {"step": "0", "epoch": "0", "train/loss": "inf", "val/loss": ""},
        {"step": "4", "epoch": "0", "train/loss": "2.5", "val/loss": "nan"},
        {"step": "9", "epoch": "1", "train/loss": "2", "val/loss": ""},
    ]
    found = read_curves(rows)
    assert list(found) == ["train/loss"]
    assert found["train/loss"].steps.tolist() == [5, 10] and found["train/loss"].values.tolist() == [2.5, 2]


def test_the_running_mean_is_that_of_a_window() -> None:
    rng = np.random.default_rng(0)
    steps, values = np.arange(1.0, 241), rng.normal(size=240)
    expected = [values[max(0, i - 6) : i + 7].mean() for i in range(240)]
    np.testing.assert_allclose(smoothed(Curve(steps, values)).values, expected, atol=1e-12)
    np.testing.assert_allclose(smoothed(Curve(steps[:2], values[:2])).values, values[:2].mean())


def test_long_curves_are_thinned_by_means(tmp_path: Path) -> None:
    number = 7 * MOST_POINTS + 3
    values = np.random.default_rng(1).normal(size=number)
    with watched() as seen:
        draw_run(tmp_path / "curves.png", {"val/loss": Curve(np.arange(1.0, number + 1), values)})
    (line,) = seen[0].axes[0].lines
    assert len(line.get_xdata()) == MOST_POINTS
    groups = np.array_split(values, MOST_POINTS)
    assert {len(group) for group in groups} == {7, 8}
    assert abs(line.get_ydata().mean() - values.mean()) < 2e-3 and line.get_ydata().std() < 0.5 * values.std()


@pytest.mark.parametrize(("steps", "text"), [(0, "0"), (500, "500"), (2500, "2500"), (2e4, "20k"), (1.5e6, "1.5M")])
def test_numbers_of_steps_are_short(steps: float, text: str) -> None:
    assert short(steps) == text


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_seeds_are_points_around_their_mean(tmp_path: Path) -> None:
    losses = {"vp": [0.5, 0.6, 0.7], "heat": [0.9, 1.1, 1.3]}
    for process, own in losses.items():
        for seed, loss in enumerate(own):
            put(tmp_path / f"{process}{seed}", f"process={process}", f"seed={seed}", loss=loss, fid=100 * loss)
    (parameters, curves), out, err = drawn(tmp_path, "metric=eval/fid")
    assert out.splitlines() == [
        f"{tmp_path}/parameters.png: eval/fid of 6 runs against process, seed",
        f"{tmp_path}/curves.png: eval/fid of 6 runs against steps",
    ]
    assert err == ""
    (axes,) = panels(parameters).values()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["heat", "vp"]
    bars = {to_hex(bar.get_color()).upper(): bar.get_segments()[0][:, 1] for bar in axes.collections}
    means = {process: 100 * np.mean(own) for process, own in losses.items()}
    assert bars.keys() == {plots.SHIPPED[process][0] for process in losses}
    for process, mean in means.items():
        np.testing.assert_allclose(bars[plots.SHIPPED[process][0]], mean)
    points = np.concatenate([line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 3])
    assert sorted(points) == pytest.approx([50, 60, 70, 90, 110, 130])
    (best,) = [line for line in axes.lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    assert best.get_xydata().tolist() == [[1, pytest.approx(50)]]
    assert {to_hex(line.get_color()).upper() for line in curves.axes[0].lines} == bars.keys()


def test_two_options_are_axis_and_colour(tmp_path: Path) -> None:
    table = {("vp", 1e-4): 3.0, ("vp", 1e-2): 1.0, ("heat", 1e-4): 2.0, ("heat", 1e-2): 5.0}
    options = {"process": [p for p, _ in table], "optimizer.learning_rate": [f"{rate:g}" for _, rate in table]}
    with watched() as seen:
        assert draw_parameters(tmp_path / "p.png", Sweep(options, list(table.values()), "eval/fid")) == []
    by_process, by_rate = panels(seen[0]).values()
    assert by_rate.get_xscale() == "log" and by_process.get_xlabel() == "process"
    means = [line for line in by_rate.lines if line.get_linestyle() == "-"]
    lines = {to_hex(line.get_color()).upper(): line.get_xydata() for line in means}
    np.testing.assert_allclose(lines[plots.SHIPPED["vp"][0]], [(1e-4, 3), (1e-2, 1)])
    np.testing.assert_allclose(lines[plots.SHIPPED["heat"][0]], [(1e-4, 2), (1e-2, 5)])
    texts = [text.get_text() for text in seen[0].legends[0].get_texts()]
    assert {"process vp", "learning_rate 0.01", "run", "mean", "best"} <= set(texts)


def test_parallel_coordinates_pass_through_every_value(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    rates, noises = 10 ** rng.uniform(-5, -2, 12), ["cosine", "sigmoid"] * 6
    widths = rng.choice([8, 16, 32], 12)
    values = rng.uniform(0.4, 0.9, 12)
    options = {
        "optimizer.learning_rate": [repr(float(rate)) for rate in rates],
        "process/noise": noises,
        "network.width": [str(width) for width in widths],
        "seed": ["0"] * 12,
    }
    with watched() as seen:
        draw_parallel(tmp_path / "p.png", Sweep(options, values.tolist(), "val/loss"))
    (axes,) = seen[0].axes
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        "learning_rate",
        "process/noise",
        "width",
        "val/loss",
    ]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 4]
    assert len(lines) == 13  # the best is drawn twice
    expected = {
        tuple(
            np.round([
                (math.log(rate) - math.log(rates.min())) / math.log(rates.max() / rates.min()),
                noise == "sigmoid",
                (width - widths.min()) / (widths.max() - widths.min()),
                (value - values.min()) / (values.max() - values.min()),
            ], 9).tolist()
        )
        for rate, noise, width, value in zip(rates, noises, widths, values, strict=True)
    }  # fmt: skip
    assert {tuple(np.round(line.get_ydata(), 9).tolist()) for line in lines} == expected
    best = next(line for line in lines if line.get_label() == "best")
    assert best.get_ydata()[-1] == 0


def test_parallel_lines_are_means_of_seeds(tmp_path: Path) -> None:
    options = {"a": ["1", "1", "2"], "b": ["x", "x", "y"], "c": ["3", "3", "4"], "seed": ["0", "1", "0"]}
    with watched() as seen:
        draw_parallel(tmp_path / "p.png", Sweep(options, [1.0, 3.0, 4.0], "m", lowest=False))
    lines = [line.get_ydata().tolist() for line in seen[0].axes[0].lines if len(line.get_xdata()) == 4]
    assert sorted(map(tuple, lines)) == [(0, 0, 0, 0), (1, 1, 1, 1), (1, 1, 1, 1)]
    ticks = [child.get_text() for child in seen[0].axes[0].get_children() if isinstance(child, Text)]
    assert {"2", "4"} <= set(ticks)  # the means, at the ends of the metric's axis


def test_a_search_is_shown_at_once(tmp_path: Path) -> None:
    for index, rate in enumerate((1e-4, 1e-3, 1e-2)):
        put(tmp_path / str(index), f"optimizer.learning_rate={rate}", f"process.min_decay={rate * 2}", loss=1 + index)
    assert "parallel.png" not in drawn(tmp_path)[1]
    (tmp_path / "study.db").touch()
    _, out, _ = drawn(tmp_path, f"out={tmp_path / 'out'}")
    assert "parallel.png: optimizer.learning_rate, process.min_decay, and val/loss" in out
    assert set(files(tmp_path / "out")) == {"parameters.png", "parallel.png", "curves.png"}


def test_more_options_than_panels_are_told(tmp_path: Path) -> None:
    for index in range(2):
        put(tmp_path / str(index), *(f"network.o{k}={index}" for k in range(12)), loss=1 + index)
    out = drawn(tmp_path)[1]
    assert "network.o8 (3 more options are left out)" in out and "network.o7 (4 more options are left out)" in out


def test_runs_that_are_not_finished_have_curves_alone(tmp_path: Path) -> None:
    for index in range(3):
        put(tmp_path / str(index), f"seed={index}", finished=index < 2, loss=1 + index)
    (parameters, curves), out, _ = drawn(tmp_path)
    assert "val/loss of 2 runs against seed" in out and "val/loss of 3 runs against steps" in out
    assert "1 of 3 runs (2 finished, 1 interrupted) have no final val/loss" in out
    assert len(curves.axes[0].lines) == 3 and parameters.axes[0].get_xlabel() == "seed"


def test_many_values_are_a_colour_bar_or_one_colour(tmp_path: Path) -> None:
    curves = [Curve(np.array([1.0, 2]), np.array([1.0, 0.5 + k / 100])) for k in range(20)]
    with watched() as seen:
        draw_curves(tmp_path / "a.png", curves, "val/loss", "optimizer.learning_rate", [str(k + 1) for k in range(20)])
        draw_curves(tmp_path / "b.png", curves, "val/loss", "data.root", [f"folder {k}" for k in range(20)])
    numbers, names = seen
    assert len(numbers.axes) == 2 and len({line.get_color() for line in numbers.axes[0].lines}) == 20
    assert len(names.axes) == 1 and len({line.get_color() for line in names.axes[0].lines}) == 1 and not names.legends


@pytest.mark.parametrize(
    ("texts", "log", "names"),
    [
        (["1", "2", "3"], False, None),
        (["1e-5", "0.01"], True, None),
        (["0", "1"], False, None),
        (["b", "a", "b"], False, ["a", "b"]),
        (["1", ""], False, ["–", "1"]),
        (["[8,8]", "nan"], False, ["[8,8]", "nan"]),
    ],
)
def test_values_are_numbers_or_names(texts: list[str], log: bool, names: list[str] | None) -> None:
    axis = Axis.of(texts)
    assert axis.log == log and axis.names == names
    assert (axis.heights >= 0).all() and (axis.heights <= 1).all()


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """Neither as formulas nor as controls, however long."""
    for index, name in enumerate((r"$\frac{", "\x1b[31mred", "x" * 500, "_hidden")):
        put(tmp_path / f"$run_{index}", f"data.root={name}", "seed=0", loss=1 + index)
    (parameters, _), out, _ = drawn(tmp_path)
    shown = [text.get_text() for text in panels(parameters).popitem()[1].get_xticklabels()]
    assert r"\$\frac{" in shown and max(map(len, shown)) < 30 and "\x1b" not in "".join([*shown, out])


# --- input that can't be drawn ----------------------------------------------------------------------------------------


def refused(*words: object) -> str:
    outcome = command("plot", *words)
    (line,) = outcome.err.splitlines()
    assert outcome.status == 2 and outcome.out == "" and line.startswith("error: ")
    return line


def test_bad_input_ends_with_one_line(tmp_path: Path) -> None:
    run = put(tmp_path / "run")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    put(tmp_path / "begun" / "a", finished=False)
    put(tmp_path / "new" / "b", finished=False)
    (tmp_path / "new" / "b" / "metrics.csv").unlink()
    sweep = put(tmp_path / "sweep" / "a").parent
    before = files(tmp_path)
    cases: dict[tuple[object, ...], tuple[str, ...]] = {
        (): ("name the folder of a run or of a sweep",),
        (run, sweep): ("too many",),
        (tmp_path / "nowhere",): ("nowhere: no such folder",),
        (run / "metrics.csv",): ("metrics.csv is no folder",),
        (tmp_path / "empty",): ("empty is no run, and there are none below it", "runs"),
        (tmp_path / "begun",): ("no run is finished (1 interrupted)",),
        (tmp_path / "new" / "b",): ("nothing has been logged yet",),
        (run, "metric=eval/fidd"): ("unknown metric 'eval/fidd': did you mean 'eval/fid'?", "lr-AdamW, train/loss"),
        (sweep, "metric=fid"): ("unknown metric 'fid'", "allowed: eval/fid, train/loss, val/best_loss, val/loss"),
        (sweep, "direction=up"): ("unknown direction 'up'",),
        (run, "direction=lower"): ("direction is for sweeps",),
        (run, "ot=x"): ("unknown option 'ot': did you mean 'out'?",),
        (run, f"out={run / 'config.yaml'}"): ("config.yaml",),
    }
    for words, parts in cases.items():
        line = refused(*words)
        assert all(part in line for part in parts), line
    (run / "metrics.csv").write_text("nonsense")
    assert "run is damaged" in refused(run)
    (run / "metrics.csv").write_text(METRICS)
    assert {name for name in files(tmp_path) if name not in before} == set()


def test_a_damaged_table_does_not_stop_a_sweep(tmp_path: Path) -> None:
    for index in range(3):
        put(tmp_path / str(index), f"seed={index}", loss=1 + index)
    (tmp_path / "2" / "metrics.csv").write_text("nonsense")
    _, out, err = drawn(tmp_path)
    assert "val/loss of 2 runs" in out and "metrics.csv of 1 runs is damaged" in err


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    folder, victim = put(tmp_path / "run"), tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "curves.png").symlink_to(victim)
    drawn(folder, f"out={tmp_path / 'out'}")
    assert victim.read_text() == "precious" and not (tmp_path / "out" / "curves.png").is_symlink()


def test_runs_of_different_laws_are_told(tmp_path: Path) -> None:
    for index, process in enumerate(("vp", "heat")):
        put(tmp_path / process, f"process={process}", loss=1 + index)
        (tmp_path / process / "config.yaml").write_text(f"process: {{_target_: {process}}}\ntrainer: {{max_steps: 20}}")
    (parameters, _), _, err = drawn(tmp_path)
    assert "val/loss compares runs of one process" in err
    assert "best" not in [text.get_text() for text in parameters.legends[0].get_texts()]
    (parameters, _), _, err = drawn(tmp_path, "metric=eval/fid")
    assert err == "" and "best" in [text.get_text() for text in parameters.legends[0].get_texts()]


def test_help_has_three_examples() -> None:
    outcome = command("plot", "--help")
    assert outcome.status == 0 and outcome.err == ""
    examples = outcome.out.partition("examples:\n")[2].splitlines()
    assert len(examples) == 3 and all(re.match(r"  \S.* plot \w", line) for line in examples)
