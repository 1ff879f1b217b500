"""Installed packages that announce classes and configs: switched on by name, imported only when chosen."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from hydra.core.config_store import ConfigStore

from dpm_scales.cli.plugins import activate, find_plugins
from dpm_scales.errors import UserError
from dpm_scales.models import load_model
from support.own_package import command, forget, imported, installed
from support.shell import SMALL, Outcome, call, drawn, files, sample

pytestmark = pytest.mark.filterwarnings("ignore:.*(covariance is singular|px are enlarged)")

ANNOUNCED = {
    "networks": {"dit": "mynet.networks:DiT"},
    "targets": {"degradation": "mynet.targets:Degradation"},
    "weights": {"flat": "mynet.weights:Flat"},
    "processes": {"slight": "mynet.processes:SlightBlur"},
    "noise_schedules": {"sine": "mynet.schedules:Sine"},
    "blur_schedules": {"steady": "mynet.schedules:SteadyBlur"},
    "priors": {"wide": "mynet.priors:WideNoise"},
    "samplers": {"straight": "mynet.samplers:Straight"},
    "data": {"stripes": "mynet.data:Stripes"},
    "metrics": {"sharpness": "mynet.metrics:Sharpness"},
    "features": {"colours": "mynet.features:Colours"},
    "configs": {"mynet": "mynet.configs"},
}
PLUGINS = "plugins=[my-net]"
SHORT = [o for o in SMALL if not o.startswith(("network", "data", "sampler", "trainer.max_steps"))]
DIT = ("network=dit", "network.width=16", "network.depth=1", "network.patch=2")


def announce(folder: Path, name: str, groups: Mapping[str, Mapping[str, str]]) -> None:
    """Install the metadata of a distribution, as pip writes it."""
    metadata = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [
        f"[dpm_scales.{group}]\n" + "".join(f"{k} = {v}\n" for k, v in one.items()) for group, one in groups.items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with installed(tmp_path_factory.mktemp("elsewhere")) as folder:
        configs = {
            "network/plain.yaml": "_target_: mynet.networks.Plain\nwidth: 12\n",
            "experiment/mine.yaml": "# @package _global_\ndefaults:\n  - override /network: dit\n"
            "  - override /process: slight\nprocess:\n  num_scales: 12\n",
        }
        for name, text in configs.items():
            (folder / "mynet" / "configs" / name).parent.mkdir(parents=True)
            (folder / "mynet" / "configs" / name).write_text(text)
        announce(folder, "my-net", ANNOUNCED)
        announce(folder, "silent", {})
        yield folder
        activate(())


def train(cwd: Path, *options: str) -> Outcome:
    return call("train.py", *SHORT, "trainer.max_steps=2", *options, cwd=cwd)


@pytest.fixture(scope="module")
def run(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a class of almost every group, chosen by name."""
    folder = tmp_path_factory.mktemp("trained")
    chosen = (
        "process=blurring",
        "process.num_scales=20",
        "process/blur=steady",
        "process/noise=sine",
        "target=degradation",
    )
    others = ("prior=wide", "sampler=straight", "sampler.steps=3", "weight=flat", "data=stripes", "data.batch_size=16")
    outcome = train(folder, PLUGINS, *DIT, *chosen, *others, "run_dir=run")
    assert outcome.status == 0, outcome.err
    assert "whoever loads or resumes it gives plugins=my-net" in outcome.out
    return folder / "run"


def test_names_are_classes(run: Path, package: Path) -> None:
    assert "plugins" not in (run / "overrides.yaml").read_text()
    model = load_model(run, allow=["mynet"])
    parts = (model.denoiser.network, model.denoiser.process.blur, model.denoiser.process.noise, model.denoiser.target)
    names = [type(part).__name__ for part in (*parts, model.prior, model.sampler)]
    assert names == ["DiT", "SteadyBlur", "Sine", "Degradation", "WideNoise", "Straight"]
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert data["source"] == {"_target_": "mynet.data.Stripes"} and data["batch_size"] == 16


def test_without_them_nothing_is_imported(run: Path, package: Path, tmp_path: Path) -> None:
    """Neither by the metadata's being there, nor by a run that was trained with them, nor by switching them on."""
    before = files(run)
    for name, arguments, end in (
        ("train.py", [f"run_dir={run}", "trainer.max_steps=3"], "of a plugin; give plugins=my-net"),
        ("train.py", [*DIT[:1], "run_dir=other"], "; an installed package announces it: plugins=my-net"),
        (
            "evaluate.py",
            [f"model={run}", "reference=digits", "features=colours"],
            "announces colours: plugins=my-net",
        ),
        ("evaluate.py", [f"model={run}", "reference=digits", "measures=[sharpness]"], "sharpness: plugins=my-net"),
        ("sample.py", [f"model={run}", "out=out"], "; if you trust it: allow=mynet"),
        ("evaluate.py", [f"model={run}", "reference=data"], "; if you trust it: allow=mynet"),
    ):
        forget(package)
        outcome = call(name, *arguments, cwd=tmp_path)
        assert outcome.status == 2 and outcome.err.endswith(f"{end}\n") and outcome.err.count("\n") == 1, outcome.err
        assert not imported(package) and files(run) == before and not any(tmp_path.iterdir())
    outcome = call("train.py", *SMALL[1:-1], "trainer.max_steps=1", "run_dir=usual", PLUGINS, cwd=tmp_path)
    assert outcome.status == 0 and not imported(package), outcome.err


def test_a_run_is_used_again(run: Path, tmp_path: Path) -> None:
    assert len(drawn(sample(run, tmp_path / "out", "num_samples=2", PLUGINS))) == 2
    given = (f"model={run}", "reference=data", "num_samples=2", "num_reference=4", "cache=false", "out=judged")
    outcome = call("evaluate.py", *given, PLUGINS, "measures=[sharpness,frechet]", "features=colours", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    values = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert list(values["figures"]) == ["FD-colours", "sharpness"]
    outcome = call("train.py", f"run_dir={run}", "trainer.max_steps=3", "plugins=my_net", cwd=tmp_path)
    assert outcome.status == 0 and "resuming" in outcome.out, outcome.err  # a name as pip takes it
    outcome = call("evolve.py", "task=audit", "process=slight", "process.num_scales=8", "out=e", PLUGINS, cwd=tmp_path)
    assert outcome.status == 0, outcome.err


def test_configs_of_the_package(package: Path, tmp_path: Path) -> None:
    options = ("network.patch=2", "network.width=16", "network.depth=1")
    outcome = train(tmp_path, PLUGINS, "experiment=mine", *options, "run_dir=a")
    assert outcome.status == 0, outcome.err
    model = load_model(tmp_path / "a", allow=["mynet"])
    assert type(model.denoiser.process).__name__ == "SlightBlur" and model.denoiser.process.num_scales == 12
    outcome = train(tmp_path, PLUGINS, "-m", "network=dit,plain", "network.width=8", "run_dir=b")
    assert outcome.status == 0, outcome.err
    rows = list(csv.DictReader((tmp_path / "b" / "sweep.csv").open()))
    assert {row["network"] for row in rows} == {"dit", "plain"}
    outcome = call("train.py", "run_dir=a", "trainer.max_steps=3", cwd=tmp_path)
    assert outcome.status == 2 and "experiment=mine, of a plugin; give plugins=my-net" in outcome.err
    outcome = call("train.py", "--help", "network=dit", PLUGINS, cwd=tmp_path)
    assert "network=dit: mynet.networks.DiT of a plugin; its options are the constructor's arguments" in outcome.out


def test_the_page(tmp_path: Path) -> None:
    commands = command("own_classes", "train.py 'plugins"), command("own_classes", "evaluate.py model=runs/plugin")
    outcome = train(tmp_path, *commands[0], "network.depth=1", "data.batch_size=16")
    assert outcome.status == 0, outcome.err
    outcome = call("evaluate.py", *commands[1], "num_samples=2", "num_reference=4", "cache=false", cwd=tmp_path)
    assert outcome.status == 0 and "sharpness" in outcome.out, outcome.err


def test_plugins_are_switched_off_again(package: Path, tmp_path: Path) -> None:
    activate(["my-net"])
    assert "dit.yaml" in ConfigStore.instance().repo["network"]
    activate([])
    assert "dit.yaml" not in ConfigStore.instance().repo["network"]


def test_a_file_can_not_switch_them_on(run: Path, package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "overrides.yaml").write_text(yaml.safe_dump([PLUGINS, "network=dit"]))
    forget(package)
    outcome = call("train.py", f"run_dir={copy}", cwd=tmp_path)
    assert outcome.status == 2 and "what is trusted is said on the command line alone" in outcome.err
    assert not imported(package)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "wrong-group": ({"network": {"a": "mynet.networks:DiT"}}, "in dpm_scales.network, an unknown group: did you mean"),
    "no-class": ({"networks": {"a": "mynet.networks"}}, "which does not have the form package.module:Class"),
    "odd-name": ({"networks": {"a-b": "mynet.networks:DiT"}}, "a name has letters, digits and _ alone"),
    "system": ({"networks": {"a": "os:system"}}, "system announces a = os:system in dpm_scales.networks, which is not"),
    "ours": ({"samplers": {"a": "dpm_scales.samplers:DDIM"}}, "which is not its own"),
    "shadow": ({"networks": {"tiny": "mynet.networks:DiT"}}, "shadow announces network=tiny, a name of dpm_scales; it"),
    "metric": ({"metrics": {"kernel": "mynet.metrics:Sharpness"}}, "metric announces measures=kernel, a name of"),
    "second": ({"networks": {"dit": "mynet.networks:DiT"}}, "my-net and second both announce network=dit; leave one"),
    "twice": ({"networks": {"plain": "mynet.networks:DiT"}, "configs": {"c": "mynet.configs"}},
              "twice announces network=plain twice"),
    "no-folder": ({"configs": {"c": "mynet.nowhere"}}, "and there is no such folder"),
    "no-package": ({"configs": {"c": "notthere.configs"}}, "and there is no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_an_entry_point_that_is_none(name: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, message = BAD[name]
    announce(tmp_path, name, groups)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget(package)
    with pytest.raises(UserError) as caught:
        find_plugins([*(["my-net"] if name == "second" else []), name])
    assert message in str(caught.value), caught.value
    assert not imported(package)


LINES = {
    "plugins=[nope]": "plugins=nope: no package of this name is installed; installed plugins: broken, my-net",
    "plugins=[silent]": "plugins=silent: this package announces nothing for dpm_scales; name its classes by _target_",
    "plugins=3": "plugins must name installed packages, such as plugins=mynet, got 3",
    "plugins=[[a]]": "plugins must name installed packages",
    "plugins=../a": "plugins must name installed packages",
    "-m plugins=my-net,silent": "plugins=my-net,silent: plugins are those of all runs, plugins=[my-net,silent]",
    f"{PLUGINS} network=dit network.widht=3": "unknown option 'network.widht': did you mean 'network.width'?",
    f"{PLUGINS} network=dut": "unknown network 'dut': did you mean 'dit'?",
    "plugins=[broken] network=fails": "network._target_=mynet.fails.Net can't be imported: No module named 'nowhere'",
    "plugins=[broken] network=missing": "network._target_=mynet.networks.Missing: there is no such class",
    "plugins=[broken] network=closed": "network._target_=mynet.closed.Closed takes no argument in_channels",
    "plugins=[broken] network=needy": "missing 1 required positional argument: 'depth'",
    "plugins=[broken] network=process": "network._target_=mynet.processes.SlightBlur makes no Module",
}


@pytest.mark.parametrize("typed", LINES)
def test_a_mistake_ends_in_one_line(typed: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"fails": "mynet.fails:Net", "missing": "mynet.networks:Missing", "process": "mynet.samplers:Straight"}
    classes |= {"closed": "mynet.closed:Closed", "needy": "mynet.closed:Needy"}
    announce(tmp_path, "broken", {"networks": classes})
    monkeypatch.syspath_prepend(str(tmp_path))
    (package / "mynet" / "fails.py").write_text("import nowhere\n")
    (package / "mynet" / "closed.py").write_text(
        "from torch import nn\n\n\nclass Closed(nn.Module):\n    def __init__(self):\n        super().__init__()\n\n\n"
        "class Needy(nn.Module):\n    def __init__(self, in_channels, out_channels, num_classes, depth): ...\n"
    )
    outcome = call("train.py", *typed.split(), "run_dir=run", cwd=tmp_path)
    message = LINES[typed].replace("mynet.processes.SlightBlur", "mynet.samplers.Straight")
    assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1, outcome.err
    assert not (tmp_path / "run").exists()
