"""Classes from a package outside of this repository: trained, and used again by whoever trusts them."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hydra.core.hydra_config import HydraConfig

from dpm_scales.errors import UserError
from dpm_scales.models import load_model
from dpm_scales.models.trust import check_target, foreign_packages, trusted_names
from dpm_scales.training.resuming import resume_command
from support.own_package import PAGES, command, forget, imported, installed, modules
from support.shell import SMALL, call, drawn, files, sample

SETTINGS = [o for o in SMALL if not o.startswith(("network", "sampler", "data", "trainer.max_steps"))]


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with installed(tmp_path_factory.mktemp("elsewhere")) as folder:
        yield folder


@pytest.fixture(scope="module")
def run(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's first command, made short."""
    folder = tmp_path_factory.mktemp("trained")
    outcome = call("train.py", *command("own_classes", "train.py"), *SETTINGS, "trainer.max_steps=3", cwd=folder)
    assert outcome.status == 0, outcome.err
    assert "gives allow=mynet" in outcome.out
    run_dir = folder / "runs" / "mine"
    assert "allow" not in (run_dir / "overrides.yaml").read_text()
    return run_dir


def test_the_pages_have_a_module_for_each_contract() -> None:
    parts = {"networks", "targets", "weights", "processes", "schedules", "priors", "samplers", "data"}
    assert set(modules()) >= parts | {"metrics", "features"}


def lines_of(names: list[str]) -> int:
    """Return the lines of the pages' classes and functions of these names, without empty ones."""
    count = 0
    for text in modules().values():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in names:
                count += sum(bool(line.strip()) for line in text.splitlines()[node.lineno - 1 : node.end_lineno])
    return count


def test_the_table_counts_the_lines_of_the_pages() -> None:
    rows = re.findall(r"\| 1 file, (\d+) lines \(([^)]*)\) \|", PAGES["own_classes"])
    assert len(rows) >= 6
    for number, names in rows:
        assert lines_of(re.findall(r"`(\w+)`", names)) == int(number), names


def test_training_without_own_classes_says_nothing(tmp_path: Path) -> None:
    outcome = call("train.py", *SMALL, "trainer.max_steps=1", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert outcome.status == 0 and "allow" not in outcome.out


@pytest.mark.parametrize("more", [[], ["allow=[]"], ["allow=[other]"], ["allow=[myne]"], ["allow=[mynet.nothing]"]])
@pytest.mark.parametrize("name", ["sample.py", "evaluate.py", "train.py", "load_model"])
def test_without_trust_nothing_is_imported(
    name: str, more: list[str], run: Path, package: Path, tmp_path: Path
) -> None:
    forget(package)
    before = files(run)
    if name == "load_model":
        allow = [name.removeprefix("allow=[").removesuffix("]") for name in more if name != "allow=[]"]
        with pytest.raises(UserError) as caught:
            load_model(run, allow=allow)
        line = str(caught.value)
    else:
        arguments = {
            "sample.py": [f"model={run}", f"out={tmp_path / 'out'}"],
            "evaluate.py": [f"model={run}", "reference=data"],
            "train.py": [f"run_dir={run}", "trainer.max_steps=5"],
        }[name]
        outcome = call(name, *arguments, *more, cwd=tmp_path)
        assert outcome.status == 2
        line = outcome.err.strip()
        assert "\n" not in line
    assert line.endswith("; if you trust it: allow=mynet"), line
    assert not imported(package)
    assert files(run) == before and not (tmp_path / "out").exists()


def test_with_trust_it_is_loaded_sampled_and_evaluated(run: Path, package: Path, tmp_path: Path) -> None:
    forget(package)
    model = load_model(run, allow=["mynet"])
    assert imported(package)
    assert type(model.denoiser.network).__module__ == "mynet.networks"
    assert type(model.denoiser.process).__module__ == "mynet.processes"
    assert type(model.sampler).__module__ == "mynet.samplers"
    out = sample(run, tmp_path / "out", "allow=[mynet]", "num_samples=4")
    assert len(drawn(out)) == 4
    again = sample(run, tmp_path / "again", "allow=mynet", "num_samples=4")  # brackets may be left out
    assert drawn(again) == drawn(out)
    judged = call(
        *("evaluate.py", f"model={run}", "reference=data", "allow=[mynet]", "num_samples=4", "num_reference=4"),
        *("measures=[frechet]", "any_size=true", "features=efflite0", f"out={tmp_path / 'judged'}"),
        cwd=tmp_path,
    )
    assert judged.status == 0, judged.err
    assert (tmp_path / "judged" / "evaluation.json").is_file()


@pytest.mark.parametrize(
    "again", [["allow=[mynet]"], ["allow=mynet.networks,mynet.processes,mynet.samplers,mynet.data"]]
)
def test_with_trust_it_is_resumed(again: list[str], run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    outcome = call("train.py", f"run_dir={copy}", "trainer.max_steps=5", *again, cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert "resuming" in outcome.out
    assert "allow" not in (copy / "overrides.yaml").read_text()
    repeated = call(
        "train.py", f"run_dir={copy}", *command("own_classes", "train.py")[:-1], "trainer.max_steps=6", cwd=tmp_path
    )
    assert repeated.status == 0, repeated.err  # whose classes the command line names itself


def test_a_file_can_not_trust_itself(run: Path, package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    options = copy / "overrides.yaml"
    options.write_text(yaml.safe_dump([*yaml.safe_load(options.read_text()), "allow=[mynet]"]))
    forget(package)
    outcome = call("train.py", f"run_dir={copy}", "trainer.max_steps=5", cwd=tmp_path)
    assert outcome.status == 2 and not imported(package)
    options.write_text(yaml.safe_dump(["allow=[mynet]"]))
    outcome = call("train.py", f"run_dir={copy}", "trainer.max_steps=5", cwd=tmp_path)
    assert outcome.status == 2 and "what is trusted is said on the command line alone" in outcome.err


def test_weights_need_no_trust_in_a_sampler_that_is_replaced(package: Path, run: Path, tmp_path: Path) -> None:
    options = ["sampler={_target_: mynet.samplers.Straight, steps: 3}", f"run_dir={tmp_path / 'run'}"]
    small = [o for o in SMALL if not o.startswith("sampler")]
    outcome = call("train.py", *small, "trainer.max_steps=1", *options, cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    forget(package)
    refused = call("sample.py", f"model={tmp_path / 'run'}", f"out={tmp_path / 'no'}", "steps=2", cwd=tmp_path)
    assert refused.status == 2 and refused.err.strip().endswith("if you trust it: allow=mynet")
    out = sample(tmp_path / "run", tmp_path / "out", "sampler=ddim", "steps=2", "num_samples=2")
    assert len(drawn(out)) == 2 and not imported(package)
    model = load_model(tmp_path / "run", sampler={"_target_": "dpm_scales.samplers.DDIM"}, steps=2)
    assert model.recipe.parts["sampler"] == {"_target_": "dpm_scales.samplers.DDIM", "steps": 2}
    own = load_model(tmp_path / "run", allow=["mynet"], steps=2)
    assert len(own.sampler.scales(own.denoiser.process)) == 3


def test_a_trusted_package_is_no_way_to_what_it_imports(package: Path) -> None:
    check_target("mynet.networks.Plain", "here", allow=["mynet"])
    check_target("mynet.networks.Plain", "here", allow=["mynet.networks.Plain"])
    for name in ("mynet.os.system", "mynet.networks.nn.Identity", "mynet.networks.Plain.__init__.__globals__"):
        with pytest.raises(UserError, match="is not a class of mynet"):
            check_target(name, "here", allow=["mynet"])
    with pytest.raises(UserError, match=r"no such class; is its package installed, or on PYTHONPATH\?"):
        check_target("mynet.networks.Missing", "here", allow=["mynet"])
    (package / "mynet" / "broken.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(UserError, match="can't be imported: No module named"):
        check_target("mynet.broken.Net", "here", allow=["mynet"])


@pytest.mark.parametrize("allow", [3, None, {"a": 1}, [""], ["my-net"], ["a b"], ["/tmp"], [1], "a;b", [["a"]]])
def test_names_that_are_none(allow: object) -> None:
    with pytest.raises(
        UserError, match=r"^allow must name packages whose classes files may use, such as allow=mynet, got"
    ):
        trusted_names(allow)


def test_packages_of_a_config() -> None:
    config = {"network": {"_target_": "b.Net", "inner": [{"_target_": "a.c.Block"}]}, "process": {"_target_": 3}}
    assert foreign_packages(config, {"_target_": "dpm_scales.processes.VP"}) == ["a", "b"]


def test_the_page_in_python(run: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last block, as it stands there."""
    block = re.findall(r"```python\n(from dpm_scales.*?)```", PAGES["own_classes"], re.DOTALL)
    assert len(block) == 1
    monkeypatch.chdir(run.parents[1])
    found: dict[str, object] = {}
    exec(block[0], found)
    images = found["images"]
    assert isinstance(images, torch.Tensor) and images.shape == (4, 1, 8, 8) and images.dtype == torch.uint8


def test_the_command_that_resumes_trusts_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["~network", "+network={_target_: mynet.networks.Plain}", "seed=0", "weight._target_=other.Weight"]
    job = SimpleNamespace(
        overrides=SimpleNamespace(task=typed, hydra=[]),
        runtime=SimpleNamespace(config_sources=[]),
        job=SimpleNamespace(config_name="train"),
    )
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: job)
    assert resume_command(Path("runs/a")) == "python train.py run_dir=runs/a 'allow=[mynet,other]'"
    del typed[1], typed[-1]
    assert resume_command(Path("runs/a")) == "python train.py run_dir=runs/a"
