"""Readers of models, checkpoints and runs from elsewhere, fed with damaged and crafted ones; see test_fuzz."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import save

from dpm_scales.cli.arguments import with_stored_overrides
from dpm_scales.commands.runs import run as list_runs
from dpm_scales.models.checksums import read_checkpoint, read_tensors, write_checkpoint
from dpm_scales.run_folders.files import stored_result
from dpm_scales.training import load_model, save_model
from support.fuzzing import VALUES, damaged, fuzz, put, returns_or_tells
from support.shell import small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    save_model(place, small_model("process.num_scales=9"))
    return place


@pytest.mark.slow
def test_configs_of_models(folder: Path) -> None:
    config = folder / "config.yaml"
    whole = config.read_bytes()
    tree = yaml.safe_load(whole)

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        if draw(st.booleans()):
            return draw(damaged([whole]))
        return yaml.safe_dump(put(draw, tree)).encode()

    def check(content: bytes) -> None:
        config.write_bytes(content)
        returns_or_tells(lambda: load_model(folder))

    try:
        fuzz(changed(), check)
    finally:
        config.write_bytes(whole)


@pytest.mark.slow
def test_checkpoints(tmp_path: Path) -> None:
    """As they are found, and with a checksum that fits, which everybody can write."""
    model = small_model("process.num_scales=9")
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    tree = {"recipe": model.recipe.to_dict(), "global_step": 3, "epoch": 0}
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {"state_dict": {"w": torch.zeros(3)}, **tree})
    small = path.read_bytes()

    @st.composite
    def changed(draw: st.DrawFn) -> Any:
        kind = draw(st.integers(0, 2))
        if kind == 0:
            return draw(damaged([small]))
        if kind == 1:
            return reseal(draw(damaged([small])))
        values = put(draw, tree)
        return {"state_dict": draw(st.sampled_from([state, {"model.x": 3}, {}, {"model.a": None}])), **values}

    def check(content: Any) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content["global_step"] = 1
            write_checkpoint(path, content)
        returns_or_tells(lambda: read_checkpoint(path))
        returns_or_tells(lambda: load_model(path))

    fuzz(changed(), check)


def reseal(content: bytes) -> bytes:
    body = content[:-65] if len(content) > 65 else content
    return body + hashlib.sha256(body).hexdigest().encode() + b"\n"


@pytest.mark.slow
def test_tensors(tmp_path: Path, folder: Path) -> None:
    """The same for exports: damage in the header or the numbers, with a checksum that fits in half of the cases."""
    meta = {"format": "dpm_scales model 3 sha256 " + "0" * 64}
    whole = save({"a": torch.zeros(3), "b": torch.ones(2, 2)}, meta)
    path = tmp_path / "a.safetensors"

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        content = draw(damaged([whole]))
        if draw(st.booleans()):
            content = content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)
        return content

    def check(content: bytes) -> None:
        path.write_bytes(content)
        returns_or_tells(lambda: read_tensors(path))

    fuzz(changed(), check)


@pytest.mark.slow
def test_results_of_runs(tmp_path: Path) -> None:
    """The figures of a run, of which a sweep reads many."""
    path = tmp_path / "result.json"
    tree = {"overrides": ["process=vp", "seed=1"], "steps": 6, "seconds": 1.5, "val/loss": 0.25}

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        if draw(st.booleans()):
            return draw(damaged([json.dumps(tree).encode()]))
        return json.dumps(put(draw, tree)).encode(errors="surrogatepass")

    def check(content: bytes) -> None:
        path.write_bytes(content)
        result = returns_or_tells(lambda: stored_result(path))
        assert result is None or (
            isinstance(result["steps"], int) and all(isinstance(o, str) for o in result["overrides"])
        )

    fuzz(changed(), check)


@pytest.mark.slow
def test_options_of_runs(tmp_path: Path) -> None:
    """What is let through holds no class but ours, no flag, no interpolation but of a place."""
    stored = tmp_path / "overrides.yaml"
    keys = "seed data process data._target_ hydra.searchpath data.root x.y _args_ run_dir --x".split()
    texts = "1 vp os.mkdir ${oc.env:HOME} {_target_:os.mkdir} [{a:{_target_:os.mkdir}}] a/../b /a '".split()
    overrides = st.builds(
        lambda sign, key, value: f"{sign}{key}={value}",
        st.sampled_from(["", "+", "++", "~", "-"]),
        st.sampled_from(keys),
        st.sampled_from(texts) | st.text(max_size=6),
    )

    def check(content: Any) -> None:
        stored.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
        argv = [f"run_dir={tmp_path}"]
        result = returns_or_tells(lambda: with_stored_overrides(argv))
        for override in (result or argv)[:-1]:
            assert not override.startswith("-") and "hydra" not in override.split("=")[0]
            assert "os.mkdir" not in override or "_target_" not in override
            assert "${" not in override or override.lstrip("+~").startswith("data.root=${oc.env:")
            assert "run_dir" not in override.split("=")[0]

    sample = yaml.safe_dump(["data=folder", "process.blur={_target_:dpm_scales.schedules.LogBlur}"]).encode()
    fuzz(st.lists(overrides | VALUES, max_size=4) | VALUES | damaged([sample]), check)


@pytest.mark.slow
def test_lists_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with one file damaged, in a table, as CSV and as JSON."""
    texts = {
        "result.json": '{"overrides": ["seed=1"], "steps": 6, "seconds": 1.5, "val/loss": 0.25}',
        "metrics.csv": "step,epoch,train/loss,val/loss,eval/fid\n0,0,1.5,,\n5,0,1.25,0.25,30\n",
        "config.yaml": "trainer: {max_steps: 6}\nprocess: {_target_: dpm_scales.processes.VP}\nseed: 1\n",
        "overrides.yaml": "- seed=1\n- process=vp\n",
        "failure.txt": "an error\n",
        "evaluation.json": '{"format": "dpm_scales evaluation", "figures": {"FID": {"value": 3}}, "fake": {}}',
    }
    (tmp_path / "a").mkdir()
    for name, text in texts.items():
        (tmp_path / "a" / name).write_text(text)
    names = st.sampled_from(sorted(texts))

    def check(case: tuple[str, bytes]) -> None:
        name, content = case
        (tmp_path / "a" / name).write_bytes(content)
        try:
            for arguments in ([], ["--csv"], ["--json"]):
                list_runs([str(tmp_path), *arguments])
            returns_or_tells(lambda: list_runs(["best", str(tmp_path)]))
        finally:
            (tmp_path / "a" / name).write_text(texts[name])
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "\u202e" not in out + err

    fuzz(names.flatmap(lambda name: st.tuples(st.just(name), damaged([texts[name].encode()]))), check)
