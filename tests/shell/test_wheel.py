"""The wheel, built from the source distribution and installed alone: its configs, plugin and commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.shell import CONFIGS, ROOT, SMALL, Outcome, files, photos, settings

pytestmark = pytest.mark.slow

#: what a checkout contains beside files of its own, which must not get into a distribution
SOURCES = (
    *("dpm_scales", "configs", "hydra_plugins", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"),
    *("train.py", "sample.py", "evaluate.py", "evolve.py", "constraints.txt", "CHANGELOG.md", "CITATION.cff"),
)
DIRT = ("runs/mine/model.safetensors", "samples/a.png", "data_cache/mnist.gz", "configs/__pycache__/a.pyc", "mine.png")


def environment() -> dict[str, str]:
    """Return the variables of a user's shell, in which nothing leads to the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DPM_SCALES", "HYDRA"))}
    return {**kept, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "WANDB_MODE": "offline", "NO_COLOR": "1"}


def execute(*command: str | Path, cwd: Path, more: Mapping[str, str] | None = None) -> Outcome:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**environment(), **(more or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def succeed(*command: str | Path, cwd: Path) -> str:
    """Run a command, and return its standard output."""
    outcome = execute(*command, cwd=cwd)
    assert outcome.status == 0, (command, outcome)
    return outcome.out


def pip(*arguments: str | Path, cwd: Path) -> None:
    succeed(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, "--no-deps", "--no-index", cwd=cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, with files that its user made."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for name in DIRT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"dirt")
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    succeed(sys.executable, "-c", code, "dist", cwd=checkout)
    return next((checkout / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    pip("wheel", "--no-build-isolation", "--wheel-dir", sdist.parent, sdist, cwd=sdist.parent)
    return next(sdist.parent.glob("*.whl"))


def empty_environment(folder: Path) -> Path:
    """Make an environment in which Python finds the dependencies, but no dpm_scales; return the folder of its programs.

    A .pth file names the folders in which this interpreter finds them; .pth files in there are not read, so that an
    editable installation of the checkout has no effect.
    """
    succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    site = next(folder.glob("lib/python*/site-packages"))
    found = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(found))
    return folder / "bin"


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel."""
    bin_folder = empty_environment(tmp_path_factory.mktemp("installed") / "venv")
    pip("--python", bin_folder / "python", "install", wheel, cwd=wheel.parent)
    return bin_folder


def test_the_source_distribution_has_what_the_wheel_is_built_of(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert names >= expected | {"LICENSE", "README.md", "hydra_plugins/dpm_scales_study/__init__.py", "setup.py"}
    assert names >= {path.relative_to(ROOT).as_posix() for path in (ROOT / "dpm_scales").rglob("*.py")}
    assert names.isdisjoint(DIRT)


def test_the_wheel_contains_the_package_its_configs_and_the_plugin(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(archive.read(name) for name in archive.namelist() if name.endswith("entry_points.txt"))
    expected = {
        **{f"dpm_scales/configs/{name}": data for name, data in files(CONFIGS).items() if name.endswith(".yaml")},
        **{
            f"{package}/{name}": data
            for package in ("dpm_scales", "hydra_plugins")
            for name, data in files(ROOT / package).items()
            if "__pycache__" not in name
        },
    }
    assert contents == expected
    assert b"dpm-scales = dpm_scales.entry.start:console" in entry_points


#: runs commands as `dpm-scales` does, then an example, in one interpreter: to import is most of the work of each
ONE_INTERPRETER = """
import json, sys
from dpm_scales.entry.start import console
from hydra.core.global_hydra import GlobalHydra
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    GlobalHydra.instance().clear()
    try:
        console()
    except SystemExit as end:
        assert not end.code, (words, end.code)
import six_lines
six_lines.main(steps=2)
"""


def test_the_commands_of_the_wheel(wheel: Path, programs: Path, tmp_path: Path) -> None:
    """A run of the user's own config, resumed and sampled; a study; an example; in a folder without the checkout."""
    command = programs / "dpm-scales"
    assert succeed(command, "--help", cwd=tmp_path).startswith("usage: dpm-scales COMMAND")
    assert succeed(command, "--version", cwd=tmp_path) == f"dpm-scales {wheel.name.split('-')[1]}\n"
    assert succeed(command, "train", "--help", cwd=tmp_path).startswith("usage: dpm-scales train [GROUP=NAME")

    (tmp_path / "own" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /process: heat\nprocess: {num_scales: 5}\n"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(text)
    options = ("experiment=mine", "sampler.steps=null", "trainer.max_steps=1", "run_dir=run")
    trained = execute(command, "train", "--config-dir", "own", *SMALL, *options, cwd=tmp_path)
    assert trained.status == 0 and "Warning" not in trained.err, trained.err
    assert settings(tmp_path / "run")["process"]["num_scales"] == 5

    refused = execute(command, "train", "run_dir=run", "trainer.max_steps=2", cwd=tmp_path)
    assert refused.status == 2 and refused.err.endswith(f"give --config-dir {tmp_path / 'own'} as it was\n")
    assert "run " in succeed(command, "runs", ".", cwd=tmp_path)
    succeed(command, "init", "project", cwd=tmp_path)
    assert (tmp_path / "project" / "pyproject.toml").is_file()

    photos(tmp_path / "photos", 2)
    shutil.copy(ROOT / "examples" / "six_lines.py", tmp_path)
    commands = (
        ("train", "--config-dir=own", "run_dir=run", "trainer.max_steps=2"),
        ("sample", "model=run", "num_samples=2", "out=drawn"),
        ("evolve", "data=photos", "out=study", "times=[1,10]", "features=null"),
    )
    done = execute(programs / "python", "-c", ONE_INTERPRETER, json.dumps(commands), cwd=tmp_path)
    assert done.status == 0 and "Warning" not in done.err, done.err
    assert (
        "resuming run/checkpoints/last.ckpt" in done.out and "step 2/2" in done.out and "2 images in drawn" in done.out
    )
    assert (tmp_path / "drawn" / "000001.png").is_file()
    with Image.open(tmp_path / "study" / "trajectories.png") as picture:
        assert np.asarray(picture).std() > 0
    assert (tmp_path / "study" / "entropy.csv").is_file()
    assert files(tmp_path / "digits").keys() == {"model.safetensors", "config.yaml"}
    assert Image.open(tmp_path / "digits.png").size == (265, 265)


def test_hydra_finds_the_sweeper_of_the_wheel(programs: Path, tmp_path: Path) -> None:
    code = (
        "import inspect, dpm_scales\n"
        "from dpm_scales.models.instantiate import CONFIGS\n"
        "from hydra import compose, initialize_config_dir\n"
        "from hydra.core.plugins import Plugins\n"
        "from hydra.plugins.sweeper import Sweeper\n"
        "found = [c for c in Plugins.instance().discover(Sweeper) if c.__name__ == 'StudySweeper']\n"
        "with initialize_config_dir(str(CONFIGS), version_base='1.3'):\n"
        "    config = compose('train', overrides=['hydra/sweeper=optuna'], return_hydra_config=True)\n"
        "print(config.hydra.sweeper._target_, dpm_scales.__file__, CONFIGS, *map(inspect.getfile, found), sep='\\n')\n"
    )
    target, *places = succeed(programs / "python", "-c", code, cwd=tmp_path).splitlines()
    assert target == "hydra_plugins.dpm_scales_study.StudySweeper"
    assert len(places) == 3 and all(Path(place).is_relative_to(programs.parent) for place in places)


def test_an_editable_installation_uses_the_checkout(checkout: Path, tmp_path: Path) -> None:
    bin_folder = empty_environment(tmp_path / "venv")
    pip("--python", bin_folder / "python", "install", "--no-build-isolation", "-e", checkout, cwd=tmp_path)
    assert not (checkout / "dpm_scales" / "configs").exists()
    (checkout / "configs" / "process" / "new.yaml").write_text("# a new process\n_target_: dpm_scales.processes.VP\n")
    assert "process=new: a new process" in succeed(
        bin_folder / "dpm-scales", "train", "process=new", "--help", cwd=tmp_path
    )
    code = (
        "from hydra.core.plugins import Plugins\nfrom hydra.plugins.sweeper import Sweeper\n"
        "print([c.__name__ for c in Plugins.instance().discover(Sweeper)])"
    )
    assert "StudySweeper" in succeed(bin_folder / "python", "-c", code, cwd=tmp_path)
