"""The public names and their arguments, the code in docs/python.md, and the example."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import dpm_scales as ds
from support.shell import ROOT

SNAPSHOT = Path(__file__).with_name("python_interface.txt")


def arguments(found: Any) -> str:
    """Return the arguments of a function or class with their defaults, without types."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:  # exceptions
        return ""
    shown = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(shown))


def interface() -> str:
    lines = [f"dpm_scales {ds.__version__}"]
    for name in sorted(ds.__all__):
        found = getattr(ds, name)
        lines.append(f"{name}{arguments(found)}")
        if found is ds.Model:
            public = [key for key in vars(found) if not key.startswith("_") and callable(getattr(found, key))]
            lines += [f"    {key}{arguments(getattr(found, key))}" for key in sorted(public)]
    return "\n".join(lines) + "\n"


def test_the_interface_is_that_of_the_snapshot() -> None:
    """A change of names, arguments or defaults needs a line in CHANGELOG.md, and the new text in the file."""
    found = interface()
    assert found == SNAPSHOT.read_text(), f"{SNAPSHOT.name} should be:\n{found}"


def test_all_names_are_found_and_known_to_type_checkers() -> None:
    tree = ast.parse((ROOT / "dpm_scales" / "__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed.keys() == set(ds.__all__) and len(set(ds.__all__)) == len(ds.__all__)
    for name, (module, real) in typed.items():
        assert getattr(ds, name) is getattr(importlib.import_module(str(module)), real)
    assert set(ds.__all__) <= set(dir(ds))
    with pytest.raises(AttributeError, match="module 'dpm_scales' has no attribute 'modle'"):
        ds.modle  # noqa: B018


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Train for two steps only, in an empty folder; return the steps that were asked for."""
    asked: list[int] = []
    train = ds.train

    def brief(model: ds.Model, images: Any, steps: int = 2000, run_dir: Any = None, **options: Any) -> ds.Losses:
        asked.append(steps)
        options["trainer"] = {"limit_val_batches": 1, "accelerator": "cpu"}
        return train(model, images, 2, run_dir, progress=False, samples={"num_images": 1}, **options)

    monkeypatch.setattr(ds, "train", brief)
    monkeypatch.chdir(tmp_path)
    return asked


def test_the_code_in_the_documentation_runs(short: list[int], tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL)
    space: dict[str, Any] = {"__name__": "documented"}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), space)
    assert len(blocks) == 8 and short == [1000, 1000]
    assert space["samples"].shape == (4, 1, 8, 8) and space["loss"].isfinite() and space["last"] > 0
    assert (tmp_path / "digits" / "model.safetensors").is_file() and (tmp_path / "runs/python/metrics.csv").is_file()


def test_the_example_writes_a_model_and_a_picture(short: list[int], tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("six_lines", ROOT / "examples" / "six_lines.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()
    assert short == [1000] and (tmp_path / "digits.png").is_file()
    assert torch.equal(ds.load("digits").sample(2), ds.load("digits").sample(2, batch_size=1))
