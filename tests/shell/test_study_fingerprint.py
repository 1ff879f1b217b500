"""Kept figures serve again only for the same processes and images: every option of every process counts."""

from __future__ import annotations

import importlib
import inspect
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class

from dpm_scales.data.image_sets import numbered_images
from dpm_scales.errors import UserError
from dpm_scales.models.instantiate import build, plain
from dpm_scales.processes import VP, Process
from dpm_scales.schedules import NoiseSchedule
from dpm_scales.study.fingerprint import describe, describe_images, fingerprint
from support.shell import CONFIGS, composed, photos

SCALES = 6
PROCESSES = sorted(path.stem for path in (CONFIGS / "process").glob("*.yaml"))
#: schedules that another process takes than the one whose default they replace
NOISE_OF = {"edm": "ve", "geometric": "ve", "listed": "ve", "constant": "heat"}
NOISE_OF |= {"rectified": "rectified", "rectified_open": "rectified"}
BLURRED = "heat"
LISTS = {"noise_scales": [0.1 * k for k in range(1, 7)], "betas": [0.1] * 6}
LISTS |= {"blur_sigmas": [0.5 * k for k in range(1, 7)], "dissipation_times": [1.0 * k for k in range(1, 7)]}
WORDS = {
    "spectrum": "discrete",
    "guidance_pattern": "edges",
    "guidance_image": "own",
    "steps": [1, 2, 3, 5, 8, 13],
    "value_range": [-0.5, 1.5],
    "num_scales": SCALES + 1,
    "extent": 16,
    "blur": {"_target_": "dpm_scales.schedules.FlowBlur"},
    "color": {"_target_": "dpm_scales.schedules.PowerLaw"},
    "clock": {"_target_": "dpm_scales.schedules.SpectralClock"},
}


def chosen_parts() -> dict[str, list[str]]:
    """Every shipped process, and every shipped schedule in a process that takes it, as overrides."""
    chosen = {name: [f"process={name}"] for name in PROCESSES}
    for kind in ("noise", "blur"):
        for path in sorted((CONFIGS / "process" / kind).glob("*.yaml")):
            owner = NOISE_OF.get(path.stem, "vp") if kind == "noise" else BLURRED
            owner = "blurring" if path.stem == "cut_off" else owner
            chosen[f"{owner} {path.stem}"] = [f"process={owner}", f"process/{kind}={path.stem}"]
    return chosen


CHOSEN = chosen_parts()


def config(name: str) -> dict[str, Any]:
    """The same as a config, with few scales."""
    node = composed(*CHOSEN[name]).process
    for schedule in (node.get("noise"), node.get("blur")):
        for key in LISTS.keys() & (schedule or {}).keys():
            schedule[key] = LISTS[key]
    node.num_scales = SCALES
    found: dict[str, Any] = plain(node)
    return found


def other(key: str, value: Any) -> Any:
    """Another value that the option `key` may have."""
    if key == "min_decay":
        return 0.9 * value or 0.05
    if key == "energy":
        return "published" if value == "unit" else "unit"
    if key in WORDS:
        return WORDS[key]
    if isinstance(value, bool):
        return not value
    return [1.5 * v for v in value] if isinstance(value, list) else 0.9 * value


def changes(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The config with one option changed, for each option at any depth."""
    for key, value in node.items():
        if isinstance(value, dict):
            for where, changed in changes(value, f"{path}{key}."):
                yield where, {**node, key: changed}
        elif key != "_target_":
            changed = {**node, key: other(key, value)}
            if key == "energy" and node["_target_"].endswith("LowPass"):  # its unit energy would let the noise fall
                changed["time"] = 1e-3
            yield f"{path}{key}", changed


def arguments(node: dict[str, Any], path: str = "") -> Iterator[str]:
    """What the constructors of a config take, whether or not the config says it."""
    for key in inspect.signature(get_class(node["_target_"])).parameters:
        if isinstance(node.get(key), dict):
            yield from arguments(node[key], f"{path}{key}.")
        else:
            yield f"{path}{key}"


@pytest.mark.parametrize("name", CHOSEN)
def test_every_option_of_every_process_changes_the_fingerprint(name: str) -> None:
    node = config(name)
    before = fingerprint(describe(build(node, Process, "process")))
    assert fingerprint(describe(build(node, Process, "process"))) == before
    seen = {}
    for option, changed in changes(node):
        if option == "num_scales":  # lists have one entry a scale
            changed = {k: grown(v) if isinstance(v, dict) else v for k, v in changed.items()}
        seen[option] = fingerprint(describe(build(changed, Process, "process")))
    assert [option for option, value in seen.items() if value == before] == []
    assert len(set(seen.values())) == len(seen)
    assert set(arguments(node)) == seen.keys()  # no argument that the config, and so this test, leaves out


def grown(schedule: dict[str, Any]) -> dict[str, Any]:
    return {key: [*v, 2 * v[-1]] if isinstance(v, list) else v for key, v in schedule.items()}


def test_an_option_left_out_is_its_default_value() -> None:
    given = {"_target_": "dpm_scales.processes.InverseHeat", "num_scales": SCALES}
    written = build({**given, "spectrum": "continuous"}, Process, "process")
    assert describe(build(given, Process, "process")) == describe(written)


class Own(NoiseSchedule):
    """A schedule of somebody else, which holds what it likes."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return -t, 0.5 * torch.log(-torch.expm1(-2 * t))


@dataclass
class Pair:
    a: float

    def __post_init__(self) -> None:
        self.b = {"c": (1, 2.0, None)}


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (1, 1.0),
        (0.1, 0.1 + 2**-55),
        (True, 1),
        ("a", None),
        ([1], (1, 1)),
        ({"a": 1}, {"a": 2}),
        ({1, 2}, {1, 3}),
        (torch.ones(3), torch.ones(3, 1)),
        (torch.ones(3), torch.ones(3, dtype=torch.float64)),
        (Pair(1.0), Pair(2.0)),
        (float("inf"), float("nan")),
        (Pair, Own),
    ],
    ids=str,
)
def test_processes_of_ones_own_differ_by_what_they_hold(one: Any, two: Any) -> None:
    first, again, second = (fingerprint(describe(VP(4, Own(held)))) for held in (one, one, two))
    assert first == again != second


@pytest.mark.parametrize("held", [lambda t: t, print, [open], torch.Generator()], ids=["lambda", "print", "open", "C"])
def test_what_cannot_be_compared_is_refused(held: Any) -> None:
    with pytest.raises(UserError, match=r"vp\.noise\.held: .* can't be compared"):
        describe({"noise": {"held": held}}, "vp")
    with pytest.raises(UserError, match="can't be compared"):
        describe(VP(4, Own(held)))


def test_an_object_that_holds_itself_is_refused() -> None:
    pair = Pair(1.0)
    pair.b["c"] = pair  # type: ignore[assignment]
    with pytest.raises(UserError, match="can't be compared"):
        describe(pair)


def test_the_code_of_a_class_of_ones_own_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.syspath_prepend(tmp_path)
    for factor in (2, 3):
        code = f"class Curve:\n    def __call__(self, t):\n        return {factor} * t\n"
        (tmp_path / "own_curve.py").write_text(code)
        importlib.invalidate_caches()
        linecache.clearcache()
        monkeypatch.delitem(sys.modules, "own_curve", raising=False)
        found.append(describe(importlib.import_module("own_curve").Curve()))
    assert found[0] != found[1]


def test_images_count_by_content(tmp_path: Path) -> None:
    folder = photos(tmp_path / "set", 2)
    before = describe_images(numbered_images(str(folder)))
    assert describe_images(numbered_images(str(folder))) == before
    content = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes((photos(tmp_path / "other", 2, first=5) / "006.png").read_bytes())
    after = describe_images(numbered_images(str(folder)))
    assert after[0] == before[0] and after[1][:2] == before[1][:2] and after[1] != before[1]
    (folder / "001.png").write_bytes(content)
    assert describe_images(numbered_images(str(folder.rename(tmp_path / "moved")))) == before
