"""Who may import whom: the table of rooms in ARCHITECTURE.md is what the code does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dpm_scales"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
#: rooms that every room may import
GROUND = ("errors", "memory", "storage", "locks", "describe")
ENTRIES = ("train.py", "sample.py", "evaluate.py", "evolve.py")


def names(text: str) -> list[str]:
    """Return the words of a table's cell; none for a dash."""
    return [word.strip("` ") for word in text.split(",") if word.strip("` –")]


def read_table() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Return what each room may import: rooms, and libraries ("*" for any, "-name" for none of that name)."""
    section = (ROOT / "ARCHITECTURE.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| `")
    ]
    core = set(re.findall(r"`(\w+)`", section.split('"core" is')[1]))
    every = {names(row[0])[0] for row in rows}
    rooms, libraries = {}, {}
    for name, _, others, foreign in rows:
        room, _, left_out = others.partition("all but ")
        allowed = every - set(names(left_out)) if left_out else set(names(room))
        if "core" in allowed:
            allowed = allowed - {"core"} | core
        rooms[names(name)[0]] = allowed
        anything, _, but = foreign.partition("all but ")
        left_out_libraries = {f"-{library}" for library in names(but)}
        libraries[names(name)[0]] = {"*"} | left_out_libraries if foreign.startswith("all") else set(names(anything))
    return rooms, libraries


ROOMS, LIBRARIES = read_table()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    """Return the full names of all modules that a source imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            module = node.module or ""
            # `from dpm_scales import images` imports a room
            rooms = {f"{module}.{alias.name}" for alias in node.names if alias.name != "__version__"}
            found |= rooms if module == "dpm_scales" else {module}
    return found


def violations(room: str, source: str) -> list[str]:
    """Return the imports that `room` may not have."""
    wrong = []
    for name in sorted(imports(source)):
        top, *rest = name.split(".")
        if top == "dpm_scales":
            ok = bool(rest) and rest[0] in ROOMS[room] | {room} | (set() if room == "errors" else set(GROUND))
        else:
            ok = top in sys.stdlib_module_names or (
                bool(LIBRARIES[room] & {"*", top}) and f"-{top}" not in LIBRARIES[room]
            )
        if not ok:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    assert violations(room_of(path), path.read_text()) == []


def test_the_table_names_every_room_and_no_other() -> None:
    assert set(ROOMS) == {room_of(path) for path in MODULES}


def test_no_room_imports_one_that_imports_it() -> None:
    used = {room: set() for room in ROOMS}
    for path in MODULES:
        found = {name.split(".")[1] for name in imports(path.read_text()) if name.startswith("dpm_scales.")}
        used[room_of(path)] |= found - {room_of(path)}

    def reached(room: str, seen: set[str]) -> set[str]:
        for other in used[room] - seen:
            seen = reached(other, seen | {other})
        return seen

    assert [room for room in used if room in reached(room, set())] == []


def private_touches(source: str) -> list[str]:
    """Return accesses to a Lightning trainer's inner loops and private attributes."""
    chains = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return [chain for chain in chains if re.search(r"\btrainer\.(.*\.)?(_(?!_)\w+|epoch_loop)$", chain)]


def test_one_file_touches_lightnings_private_parts() -> None:
    touching = {path.relative_to(PACKAGE).as_posix() for path in MODULES if private_touches(path.read_text())}
    assert touching == {"distributed/lightning_private.py"}
    assert private_touches("def f(self): return self.trainer.fit_loop.epoch_loop.batch_progress.total")
    assert private_touches("trainer._signal_connector.received_sigterm = True")
    assert not private_touches("trainer.fit_loop.state_dict(), self._trainer, trainer.__class__")


def circle(sources: dict[str, str]) -> list[str] | None:
    """Return modules that import each other in a circle, also inside functions, among sources by their full names."""
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
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts).removesuffix(".__init__")] = path.read_text()
    assert circle(sources) is None
    inside = "def f():\n    from dpm_scales.study.compare import measure"
    assert circle({"dpm_scales.study.compare": "from dpm_scales.study import audit", "dpm_scales.study.audit": inside})


def test_the_rules_can_be_broken() -> None:
    assert violations("processes", "import lightning.pytorch as pl") == ["lightning.pytorch"]
    assert violations("networks", "def f():\n    from omegaconf import DictConfig") == ["omegaconf"]
    assert violations("operators", "from dpm_scales import images") == ["dpm_scales.images"]
    assert violations("targets", "from dpm_scales.models.io import load_model") == ["dpm_scales.models.io"]
    assert violations("data", "from dpm_scales.processes import VP") == ["dpm_scales.processes"]
    assert violations("commands", "from dpm_scales.training.run import train") == ["dpm_scales.training.run"]
    assert violations("commands", "import lightning") == ["lightning"]
    assert violations("study", "import hydra") == ["hydra"]
    assert violations("processes", "import math\nfrom dpm_scales.operators.heat import HeatOperator") == []


def test_the_package_itself_imports_nothing() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    run = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    assert imports("\n".join(map(ast.unparse, run))) == {"__future__", "importlib", "typing"}
    assert not loaded("import dpm_scales")[0] & {"torch", "numpy", "yaml", "hydra", "lightning"}


@pytest.mark.parametrize("script", ENTRIES)
def test_scripts_start_a_command_and_import_nothing_else(script: str) -> None:
    assert imports((ROOT / script).read_text()) == {"dpm_scales.entry.start"}


@pytest.mark.parametrize("script", ENTRIES)
def test_entry_points_import_the_shell_alone(script: str) -> None:
    found = {name for name in imports((PACKAGE / "entry" / script).read_text()) if name.startswith("dpm_scales")}
    rooms = {"cli", "training", "sweeps"} if script == "train.py" else {"cli", "commands"}
    assert found and {name.split(".")[1] for name in found} <= rooms | {"distributed"}


def loaded(*pieces: str) -> list[set[str]]:
    """Return the modules that a fresh interpreter has loaded after each piece of code, the package's by full name."""
    report = "print(*(name if name.startswith('dpm_scales.') else name.split('.')[0] for name in sys.modules))"
    code = "\n".join(["import importlib, sys", *(f"{piece}\n{report}" for piece in pieces)])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return [set(line.split()) for line in result.stdout.splitlines()]


def test_libraries_load_no_shell_and_commands_neither_lightning_nor_the_trainer() -> None:
    shell = {"lightning", "pytorch_lightning", "hydra", "omegaconf", "wandb", "torchvision"}
    free = [room for room, libraries in LIBRARIES.items() if "*" not in libraries and not libraries & shell]
    assert {"processes", "samplers", "study", "audit", "evaluation"} <= set(free)
    commands = [f"commands.{path.stem}" for path in (PACKAGE / "commands").glob("[a-z]*.py")]
    one_by_one = "for name in {}: importlib.import_module('dpm_scales.' + name)"
    libraries, all_commands = loaded(one_by_one.format(free), one_by_one.format(commands))
    assert "torch" in libraries and not libraries & shell
    assert "hydra" in all_commands
    assert not all_commands & {"lightning", "pytorch_lightning", "wandb", "dpm_scales.training"}
