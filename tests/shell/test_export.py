"""Models as files: round trips are exact, and a stranger's file is refused with one line and executes nothing."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import pickletools
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dpm_scales.errors import UserError
from dpm_scales.models.checksums import read_tensors, write_checkpoint, write_tensors
from dpm_scales.models.instantiate import plain
from dpm_scales.models.model import PARTS, with_sampler
from dpm_scales.training import Recipe, build_model, draw, load_model, save_model
from support.shell import assert_equal, call, checkpoint, composed, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose process has a data prior too, so that every kind of buffer is in the files."""
    heat = ("process=heat", "process.num_scales=4", "sampler.steps=null")
    quick = ("optimizer.learning_rate=0.05", "optimizer.warmup_steps=0", "optimizer.decay=constant")
    return train(tmp_path_factory.mktemp("export") / "run", *heat, *quick)


@pytest.fixture
def model_dir(run: Path, tmp_path: Path) -> Path:
    """A copy of the export to be damaged."""
    return Path(shutil.copytree(run / "model", tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.yaml"
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values))


def images(path: Path, **options: Any) -> torch.Tensor:
    return torch.cat(list(draw(load_model(path, **options), 3, seed=5)))


# --- round trips ------------------------------------------------------------------------------------------------------


def test_export_holds_the_average_and_checkpoint_both(run: Path) -> None:
    values = checkpoint(run)
    export = load_file(run / "model" / "model.safetensors")
    average = {k.removeprefix("model."): v for k, v in values["state_dict"].items()}
    raw = {k.removeprefix("model."): v for k, v in values["current_model_state"].items()}
    assert_equal(export, average)
    assert any(not torch.equal(raw[k], average[k]) for k in raw)
    assert_equal(dict(load_model(run, weights="raw").state_dict()), raw)
    assert_equal(dict(load_model(run).state_dict()), average)
    assert_equal(dict(load_model(run / "checkpoints" / "last.ckpt").state_dict()), average)


def test_every_place_gives_the_same_samples(run: Path) -> None:
    places = [run, run / "model", run / "model" / "model.safetensors", run / "checkpoints" / "last.ckpt"]
    first, *others = [images(place) for place in places]
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, images(run, weights="raw"))
    assert not torch.equal(first[0], first[1])


def test_run_without_export_falls_back_on_its_checkpoint(run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copied / "model")
    assert torch.equal(images(copied), images(run))


def test_save_load_save_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "again", load_model(run))
    for name in ("model.safetensors", "config.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (run / "model" / name).read_bytes()


def test_loaded_models_are_in_evaluation_mode_on_the_cpu(run: Path) -> None:
    model = load_model(run)
    parts = (model.denoiser, model.prior)
    assert not any(module.training for part in parts for module in part.modules())
    assert {p.device.type for part in parts for p in part.parameters()} == {"cpu"}


def test_recipe_round_trip_with_labels(tmp_path: Path) -> None:
    config = composed("network.widths=[8,8]", "network.embedding_dim=16", "network.attention_levels=[]")
    parts = {name: plain(config[name]) for name in PARTS}
    for key in ("in_channels", "out_channels", "num_classes"):
        parts["network"].pop(key)
    recipe = Recipe(parts, 3, (8, 12), 2, ("cat", "dog"))
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict())), "here") == recipe
    model = build_model(recipe)
    save_model(tmp_path / "model", model)
    again = load_model(tmp_path / "model")
    assert again.recipe == recipe
    assert_equal(dict(again.state_dict()), dict(model.state_dict()))


def test_another_sampler_is_checked_and_remembered(run: Path) -> None:
    model = load_model(run)
    other = with_sampler(model, composed("sampler=ddim", "sampler.steps=2").sampler)
    assert (
        other.recipe.parts["sampler"]["steps"] == 2 and model.recipe.parts["sampler"] != other.recipe.parts["sampler"]
    )
    with pytest.raises(UserError, match="steps=50 exceeds the process's num_scales=4"):
        with_sampler(model, composed("sampler=ddim").sampler)


# --- checkpoints of strangers -----------------------------------------------------------------------------------------


class Bomb:
    """What it does when it is unpickled shows in the file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_malicious_checkpoint_executes_nothing(run: Path, tmp_path: Path, protocol: str) -> None:
    values = checkpoint(run)
    values["extra"] = Bomb(tmp_path / "boom")
    path = tmp_path / "bad.ckpt"
    if protocol == "torch":
        write_checkpoint(path, values)
    else:
        path.write_bytes(pickle.dumps(values))
    outcome = call("sample.py", f"model={path}", f"out={tmp_path / 'out'}", cwd=tmp_path)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "is not a checkpoint of dpm_scales" in outcome.err and "foreign objects" in outcome.err
    assert not (tmp_path / "boom").exists() and not (tmp_path / "out").exists()
    with contextlib.suppress(RuntimeError):  # torch finds no tensors behind a plain pickle
        torch.load(path, weights_only=False)
    assert (tmp_path / "boom").exists(), "the bomb is no bomb"


@pytest.mark.parametrize(
    "values",
    [
        {"state_dict": {}, "epoch": 3},
        {"recipe": {}},
        [1, 2],
        {"state_dict": [1], "recipe": {}},
        {"state_dict": {1: 2}, "recipe": {}},
        {"state_dict": {}, "recipe": {}, "current_model_state": 3},
    ],
    ids=["no recipe", "no weights", "a list", "weights in a list", "numbered weights", "raw weights no dict"],
)
def test_foreign_checkpoints_are_refused(values: Any, tmp_path: Path) -> None:
    torch.save(values, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match=r"foreign.ckpt is not a (checkpoint of dpm_scales|dpm_scales model)"):
        load_model(tmp_path / "foreign.ckpt")


def test_tensors_missing_from_a_checkpoint_are_named(run: Path, tmp_path: Path) -> None:
    values = checkpoint(run)
    values["state_dict"] = {k: v for k, v in values["state_dict"].items() if not k.endswith("conv_in.weight")}
    write_checkpoint(tmp_path / "cut.ckpt", values)
    with pytest.raises(UserError, match="weights do not fit the config: .*conv_in.weight"):
        load_model(tmp_path / "cut.ckpt")


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04" + bytes(50)])
def test_files_that_are_no_checkpoints(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(UserError, match="x.ckpt is not a checkpoint of dpm_scales"):
        load_model(tmp_path / "x.ckpt")


def test_truncated_checkpoint(run: Path, tmp_path: Path) -> None:
    data = (run / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="x.ckpt is not a checkpoint of dpm_scales"):
        load_model(tmp_path / "x.ckpt")


def test_our_checkpoints_hold_plain_containers_alone(run: Path) -> None:
    """The pickle inside asks for torch's tensor rebuilding and nothing else."""
    with zipfile.ZipFile(run / "checkpoints" / "last.ckpt") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        code = archive.read(name)
    wanted = {
        str(argument).split(" ")[0] for opcode, argument, _ in pickletools.genops(code) if opcode.name == "GLOBAL"
    }
    assert wanted <= {"torch._utils", "torch", "collections"} and "torch._utils" in wanted
    assert not any(opcode.name == "STACK_GLOBAL" for opcode, _, _ in pickletools.genops(code))


# --- configs of strangers ---------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "os.system": (lambda c: c["process"].update(_target_="os.system"), "may only use the classes of dpm_scales"),
    "builtin": (lambda c: c["sampler"].update(_target_="builtins.exec"), "may only use the classes of dpm_scales"),
    "nested": (
        lambda c: c["process"]["noise"].update(_target_="subprocess.run", args=["touch", "x"]),
        "may only use the classes of dpm_scales",
    ),
    "in a list": (
        lambda c: c["network"].update(widths=[{"_target_": "os.getcwd"}]),
        "may only use the classes of dpm_scales",
    ),
    "the shell": (
        lambda c: c["prior"].update(_target_="dpm_scales.training.load_model"),
        "may only use the classes of dpm_scales",
    ),
    "through a room": (
        lambda c: c["target"].update(_target_="dpm_scales.targets.torch.load"),
        "may only use the classes of dpm_scales",
    ),
    "imported by a room": (
        lambda c: c["target"].update(_target_="dpm_scales.targets.dataclass"),
        "asks for 'dpm_scales.targets.dataclass', which this version of dpm_scales does not have",
    ),
    "not there": (
        lambda c: c["process"].update(_target_="dpm_scales.processes.Future"),
        "asks for 'dpm_scales.processes.Future', which this version of dpm_scales does not have",
    ),
    "no name": (lambda c: c["target"].update(_target_=3), "may only use the classes of dpm_scales"),
    "_args_": (lambda c: c["process"].update(_args_=[1]), "holds the key '_args_'"),
    "_recursive_": (lambda c: c["process"].update(_recursive_=False), "holds the key '_recursive_'"),
    "environment": (
        lambda c: c["process"].update(num_scales="${oc.env:HOME}"),
        "holds the interpolation '${oc.env:HOME}'",
    ),
    "version": (lambda c: c.update(version=2), "has model format 2; this version reads 3"),
    "format": (lambda c: c.update(format="diffusers"), "is not a dpm_scales model"),
    "no process": (lambda c: c.pop("process"), "incomplete or damaged .KeyError..process"),
    "no image": (lambda c: c.pop("image"), "incomplete or damaged"),
    "image a word": (lambda c: c["image"].update(height="tall"), "incomplete or damaged"),
    "process a word": (lambda c: c.update(process="vp"), "can't be built"),
    "no target class": (lambda c: c["process"].pop("_target_"), "can't be built"),
    "unknown argument": (lambda c: c["process"].update(num_scale=3), "can't be built: .*num_scale"),
    "bad value": (lambda c: c["process"].update(num_scales=0), "num_scales must be a whole number >= 1, got 0"),
    "other widths": (lambda c: c["network"].update(widths=[8, 16]), "weights do not fit the config: .*size mismatch"),
    "other channels": (lambda c: c["image"].update(channels=3), "weights do not fit the config"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_configs_are_refused(name: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = CHANGES[name]
    monkeypatch.chdir(model_dir)
    edit(model_dir, change)
    before = set(model_dir.iterdir())
    with pytest.raises(UserError, match=message.replace("${", r"\$\{")) as caught:
        load_model(model_dir)
    assert "\n" not in str(caught.value)
    assert set(model_dir.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a dpm_scales model"),
        ("{", "is not YAML"),
        ("- a\n- b\n", "is not a dpm_scales model"),
        ("x: !!python/object/apply:os.mkdir [boom]\n", "is not YAML"),
        ("\x00\x01", "is not YAML"),
    ],
)
def test_texts_that_are_no_config(text: str, message: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_dir)
    (model_dir / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_model(model_dir)
    assert not (model_dir / "boom").exists()


# --- damaged weights --------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = read_tensors(folder / "model.safetensors")
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors)


KEY = "denoiser.network.conv_in.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), f"Missing key.*{KEY}"),
        (lambda t: t.update({KEY: torch.zeros(2, 2)}), f"size mismatch for {KEY}"),
        (lambda t: t.update({"extra": torch.zeros(1)}), 'Unexpected key.*"extra"'),
    ],
    ids=["missing", "shape", "extra"],
)
def test_weights_that_do_not_fit(change: Callable[..., Any], message: str, model_dir: Path) -> None:
    rewrite(model_dir, change)
    with pytest.raises(UserError, match=f"weights do not fit the config: .*{message}") as caught:
        load_model(model_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "folder"])
def test_damaged_safetensors(damage: str, model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "text": b"not a model\n" * 9, "empty": b""}[damage])
    expected = {"folder": "no model in", "cut": "model.safetensors is damaged"}
    with pytest.raises(UserError, match=expected.get(damage, "model.safetensors is not a safetensors file")):
        load_model(model_dir)


def test_missing_pieces_are_named(run: Path, model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at .*nowhere: no such file or folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither model/model.safetensors nor checkpoints/last.ckpt"):
        load_model(tmp_path / "empty")
    with pytest.raises(UserError, match="raw weights are in checkpoints only, and there is no"):
        load_model(model_dir, weights="raw")
    with pytest.raises(UserError, match="raw weights are in checkpoints only, not in"):
        load_model(model_dir / "model.safetensors", weights="raw")
    with pytest.raises(UserError, match="unknown weights 'avergaed': did you mean 'averaged'"):
        load_model(run, weights="avergaed")
    (model_dir / "config.yaml").unlink()
    with pytest.raises(UserError, match="has no config.yaml beside it"):
        load_model(model_dir)


def test_refused_model_leaves_the_recipe_untouched(run: Path) -> None:
    """`from_dict` reads, it does not change what it is given."""
    values = checkpoint(run)["recipe"]
    before = copy.deepcopy(values)
    Recipe.from_dict(values, "here")
    assert values == before
