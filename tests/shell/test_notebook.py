"""The notebook runs from top to bottom on tiny settings, with and without the slider, and holds no output."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import matplotlib
import pytest

from support.shell import ROOT

NOTEBOOK: dict[str, Any] = json.loads((ROOT / "notebooks" / "tour.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_cells_run_in_order_without_the_slider(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    space: dict[str, Any] = {}
    with mock.patch.object(plt, "show") as shown:
        for source in CODE:
            exec(compile(source.replace("QUICK = False", "QUICK = True"), "tour.ipynb", "exec"), space)
    plt.close("all")
    assert shown.call_count == 8  # three scales in place of the slider, and five figures
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "no slider without ipywidgets: pip install 'dpm-scales[notebook]'; here are three scales"
    assert said[-1].endswith(f"{min(space['losses'].val.values()):.3f}") and "2 steps" in said[-1]
    removed = (space["result"] - space["x"]).abs().mean()
    assert removed < 0.3 * (space["shaded"] - space["x"]).abs().mean()


def test_the_slider_shows_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    widgets = ModuleType("ipywidgets")
    widgets.FloatSlider = mock.Mock()  # type: ignore[attr-defined]
    widgets.interact = mock.Mock()  # type: ignore[attr-defined]
    cell = next(source for source in CODE if "FloatSlider" in source)
    tail = cell[cell.index("try:") :]
    show = mock.Mock()
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    exec(tail, {"show": show})
    assert widgets.interact.call_args.args == (show,) and not show.called  # type: ignore[attr-defined]


def test_it_holds_no_output() -> None:
    assert NOTEBOOK["nbformat"] == 4 and len(CODE) >= 8
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    assert "QUICK = False" in CODE[0]
