"""Pictures that training draws: the way of samples through the scales, and the curves of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dpm_scales.images import load_image, make_grid, to_uint8
from dpm_scales.networks import UNet
from dpm_scales.plots.rows import ROW_PADDING, titled_columns, titled_row
from dpm_scales.rng import CounterRNG
from dpm_scales.training import load_model
from dpm_scales.training.pictures import TRAJECTORY_COLUMNS, shown_steps, visible
from support.shell import FAST, assert_equal, attempt, broken_off, checkpoint, command, files, train

CURVES = "samples.curves=true"
BAD = ("samples.num_trajectories=-1", "samples.num_trajectories=1.5", "samples.curves=maybe")


def test_the_strip_is_the_grids_way_through_the_scales(tmp_path: Path) -> None:
    """A row for each sample, a column for each step, the last one the grid's images."""
    run_dir = train(tmp_path / "run", *FAST, "seed=3", "samples.num_trajectories=2")
    model = load_model(run_dir)
    steps: list[torch.Tensor] = []
    keep = lambda _, x: steps.append(visible(x[:2], (-1, 1)))  # noqa: E731
    x = model.sampler.sample(model.denoiser, model.prior, CounterRNG(3, 4), (1, 8, 8), on_step=keep)
    strip = load_image(run_dir / "samples" / "trajectory-000006.png")
    names = [f"t = {float(t):.3g}" for t in model.sampler.scales(model.denoiser.process)[1:]]
    assert len(steps) == 3 and torch.equal(strip, titled_columns(names, steps))
    assert torch.equal(steps[-1], to_uint8(x[:2], (-1, 1)))
    assert torch.equal(load_image(run_dir / "samples" / "step-000006.png"), make_grid(to_uint8(x, (-1, 1))))


def test_the_strip_costs_no_evaluations_and_has_eight_columns_at_most(tmp_path: Path) -> None:
    counts, forward = [], UNet.forward
    widths: list[int] = []
    with mock.patch("dpm_scales.training.pictures.titled_columns", lambda names, columns: (
        widths.append(len(names)), titled_columns(names, columns))[1]):  # fmt: skip
        for rows in (0, 4):
            calls: list[int] = []

            def counted(self: UNet, x: torch.Tensor, *rest: Any, calls: list[int] = calls) -> torch.Tensor:
                calls.append(len(x))
                return forward(self, x, *rest)

            with mock.patch.object(UNet, "forward", counted):
                options = ("sampler.steps=20", "trainer.max_steps=1", f"samples.num_trajectories={rows}")
                train(tmp_path / str(rows), *options)
            counts.append(calls)
    assert counts[0] == counts[1] and 1 < widths[0] <= TRAJECTORY_COLUMNS and len(widths) == 1
    assert not list((tmp_path / "0" / "samples").glob("trajectory*"))


def test_steps_are_shown_at_evenly_spaced_scales() -> None:
    assert shown_steps([1, 0.9, 0.5, 0]) == {0, 1, 2}
    assert shown_steps([1 - k / 80 for k in range(81)]) == {79 - 10 * k for k in range(8)}
    dense = [1, *(0.999 - k / 1000 for k in range(30)), 0.5, 0.02, 0.01, 0]
    assert shown_steps(dense) == {29, 30, 31, 33}


def test_noise_beyond_the_range_loses_contrast_alone() -> None:
    x = torch.randn(3, 2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[1] *= 40
    x[2] *= 0.1
    shown = visible(x, (0.0, 2.0)).double() / 127.5
    for i in range(3):
        deviation = x[i] - 1
        spread = max(1.0, float(deviation.square().mean().sqrt()))
        expected = (1 + deviation / spread).clamp(0, 2)
        assert (shown[i] - expected).abs().max() <= 0.5 / 127.5 + 1e-6


def test_columns_are_below_their_titles() -> None:
    images = [torch.full((2, 1, 6, 9), value, dtype=torch.uint8) for value in (0, 255)]
    table = titled_columns(["a", "longer title"], images)
    factor = (table.shape[-1] - ROW_PADDING) // 2 // 9
    side = 9 * factor + ROW_PADDING
    below = table[0, -2 * (6 * factor + ROW_PADDING) :]
    for row in range(2):
        for column, value in enumerate((0, 255)):
            top, left = row * (6 * factor + ROW_PADDING), ROW_PADDING + column * side
            assert (below[top : top + 6 * factor, left : left + 9 * factor] == value).all()
    assert torch.equal(
        titled_row({"a": images[0][0], "b": images[1][0]}), titled_columns(["a", "b"], [i[:1] for i in images])
    )


def test_curves_are_those_of_the_command_and_of_a_resumed_run(tmp_path: Path) -> None:
    """To the last byte; and a run that draws takes the same steps as one that does not."""
    options = (*FAST, "checkpoint.every_n_steps=2")
    whole, plain = train(tmp_path / "whole", *options, CURVES), train(tmp_path / "plain", *options)
    assert command("plot", whole, f"out={tmp_path / 'out'}").status == 0
    pictures = {name: content for name, content in files(whole).items() if name.endswith(".png")}
    assert (tmp_path / "out" / "curves.png").read_bytes() == pictures["curves.png"]
    with broken_off(after=4):
        attempt(tmp_path / "parts", *options, CURVES)
    parts = train(tmp_path / "parts", *options, CURVES)
    assert {name: content for name, content in files(parts).items() if name.endswith(".png")} == pictures
    assert not (plain / "curves.png").exists()
    assert (plain / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    for part in ("state_dict", "optimizer_states"):
        assert_equal(checkpoint(whole)[part], checkpoint(plain)[part])


@pytest.mark.parametrize("option", BAD)
def test_bad_options_end_before_training(tmp_path: Path, option: str) -> None:
    outcome = attempt(tmp_path / "run", option)
    (line,) = outcome.err.splitlines()
    assert outcome.status == 2 and option.partition("=")[0] in line and not (tmp_path / "run").exists()


def test_without_metrics_there_are_no_curves(tmp_path: Path) -> None:
    run_dir = train(tmp_path / "run", "data.val_fraction=0.0", CURVES)
    assert not (run_dir / "curves.png").exists()
    assert command("plot", run_dir).status == 0 and (run_dir / "curves.png").is_file()
