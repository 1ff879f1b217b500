"""A stranger's checkpoints, models, run folders, archives: nothing in them is executed, and the refusal is one line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dpm_scales.errors import UserError
from dpm_scales.evaluation.references import run_data
from dpm_scales.models.checksums import read_checkpoint, read_tensors, write_checkpoint, write_tensors
from dpm_scales.models.model import Recipe
from dpm_scales.training import load_model
from support.shell import ROOT, Outcome, attempt, call, checkpoint, files, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("security") / "run", "trainer.max_steps=2")


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A stranger's run."""
    return Path(shutil.copytree(run, tmp_path / "run"))


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def assert_refused(outcome: Outcome, words: str) -> None:
    lines = outcome.err.splitlines()
    assert outcome.status == 2 and len(lines) == 1 and words in lines[0], outcome.out + outcome.err
    assert "Traceback" not in outcome.err


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_sealed_bombs_do_not_go_off(copied: Path, tmp_path: Path) -> None:
    """A stranger can write a checksum too. Neither sampling nor going on unpickles; a plain pickle.load would."""
    values = {"extra": Bomb(tmp_path / "boom"), **checkpoint(copied)}
    last = copied / "checkpoints" / "last.ckpt"
    for path in (copied / "checkpoints").iterdir():
        write_checkpoint(path, values)
    shutil.rmtree(copied / "model")
    for command in (
        ("sample.py", f"model={copied}", f"out={tmp_path / 'out'}"),
        ("sample.py", f"model={last}", f"out={tmp_path / 'out'}"),
        ("train.py", f"run_dir={copied}", "trainer.max_steps=3"),
    ):
        assert_refused(call(*command, cwd=tmp_path), "is not a checkpoint of dpm_scales (it is damaged or")
        assert not (tmp_path / "boom").exists() and not (tmp_path / "out").exists()
    with zipfile.ZipFile(last) as archive, archive.open("archive/data.pkl") as file:

        class Lenient(pickle.Unpickler):
            def persistent_load(self, _: Any) -> Any:
                return torch.UntypedStorage(10**6)

        with contextlib.suppress(Exception):  # the tensors have no storages here
            Lenient(file).load()
    assert (tmp_path / "boom").exists(), "the bomb is no bomb"


def test_tensors_that_reach_beyond_their_storage(tmp_path: Path) -> None:
    class Beyond:
        def __reduce__(self) -> tuple[Any, ...]:
            storage = torch.zeros(4).untyped_storage()
            typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (typed, 0, (10**6,), (1,), False, {})

    write_checkpoint(tmp_path / "a.ckpt", {"state_dict": {"w": Beyond()}, "recipe": {"version": 3}})
    with pytest.raises(UserError, match="a.ckpt is not a checkpoint of dpm_scales"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_trees_that_hold_themselves(copied: Path, tmp_path: Path) -> None:
    """Or that are small in the file and endless to walk."""
    values = checkpoint(copied)
    circle: dict[str, Any] = {}
    circle["again"] = circle
    many: Any = "x"
    for _ in range(60):
        many = [many] * 10
    for name, value in {"circle": circle, "many": many}.items():
        values["recipe"]["process"] = {"_target_": "dpm_scales.processes.VP", name: value}
        write_checkpoint(tmp_path / "a.ckpt", values)
        with pytest.raises(UserError, match="a.ckpt: the model's config is too large or too deep"):
            load_model(tmp_path / "a.ckpt")


# --- models -----------------------------------------------------------------------------------------------------------


def laughs(levels: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


CONFIGS = {
    "laughs": (lambda text: text + laughs(), "too large or too deep"),
    "circle": (lambda text: text + "loop: &loop [*loop]\n", "too large or too deep"),
    "deep": (lambda text: text + "deep: " + "[" * 3000 + "]" * 3000 + "\n", "is not YAML"),
    "large": (lambda text: text + "#" * 2**21, "is larger than 1048576 bytes"),
    "tag": (lambda text: text + "boom: !!python/object/apply:os.mkdir [boom]\n", "is not YAML"),
    "new": (lambda text: text + "boom: !!python/object/new:os.mkdir [boom]\n", "is not YAML"),
    "extra target": (lambda text: text + "extra: {_target_: os.mkdir, path: boom}\n", "may only use the classes of"),
    "target": (lambda text: text.replace("dpm_scales.processes.VP", "os.mkdir"), "may only use the classes of"),
    "date": (lambda text: text + "when: 2020-01-01\n", "holds a date, which a model's config may not"),
    "huge image": (lambda text: text.replace("height: 8", "height: 99999999999"), "images can't be"),
    "no image": (lambda text: text.replace("height: 8", "height: -8"), "images can't be"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_models(name: str, copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    change, message = CONFIGS[name]
    config = copied / "model" / "config.yaml"
    text = config.read_text()
    assert change(text) != text
    config.write_text(change(text))
    outcome = call("sample.py", f"model={copied}", f"out={tmp_path / 'out'}", cwd=tmp_path)
    assert_refused(outcome, message)
    assert not (tmp_path / "boom").exists() and not (tmp_path / "out").exists()


def test_our_own_configs_pass(run: Path) -> None:
    values = yaml.safe_load((run / "model" / "config.yaml").read_text())
    assert Recipe.from_dict(values, "here").to_dict() == values


def raw_tensors(header: dict[str, Any] | bytes, body: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def sealed(content: bytes) -> bytes:
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


META = {"__metadata__": {"format": "dpm_scales model 3 sha256 " + "0" * 64}}
F32 = {"dtype": "F32", "shape": [8]}
TENSORS: dict[str, Callable[[], bytes]] = {
    "huge header": lambda: raw_tensors(META, length=2**62),
    "large header": lambda: raw_tensors(b" " * 17 * 2**20),
    "header beyond the file": lambda: raw_tensors(META, length=10**6),
    "no json": lambda: raw_tensors(b"{" * 100),
    "deep json": lambda: raw_tensors(b"[" * 10**6),
    "a list": lambda: raw_tensors(b"[]"),
    "metadata a list": lambda: raw_tensors({"__metadata__": []}),  # type: ignore[dict-item]
    "format a number": lambda: raw_tensors({"__metadata__": {"format": 3}}),
    "overlap": lambda: raw_tensors(
        META | {"a": F32 | {"data_offsets": [0, 32]}, "b": F32 | {"data_offsets": [16, 48]}}
    ),
    "beyond the end": lambda: raw_tensors(META | {"a": F32 | {"data_offsets": [0, 32000]}}),
    "backwards": lambda: raw_tensors(META | {"a": F32 | {"data_offsets": [32, 0]}}),
    "a hole": lambda: raw_tensors(META | {"a": F32 | {"data_offsets": [32, 64]}}),
    "shape beyond the data": lambda: raw_tensors(
        META | {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}}
    ),
    "unknown dtype": lambda: raw_tensors(META | {"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 64]}}),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_strangers(name: str, copied: Path) -> None:
    """With a valid checksum, so that the rest is looked at."""
    path = copied / "model" / "model.safetensors"
    path.write_bytes(sealed(TENSORS[name]()))
    with pytest.raises(UserError, match=r"model\.safetensors (is not a safetensors file|was not written by)") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)


def test_the_checksum_written_here_is_ours(tmp_path: Path) -> None:
    """Or the table above would prove nothing."""
    content = raw_tensors(META | {"a": F32 | {"data_offsets": [0, 32]}, "b": F32 | {"data_offsets": [32, 64]}})
    (tmp_path / "a.safetensors").write_bytes(sealed(content))
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["b"], torch.zeros(8))
    write_tensors(tmp_path / "b.safetensors", {"w": torch.ones(2)})
    assert torch.equal(read_tensors(tmp_path / "b.safetensors")["w"], torch.ones(2))


# --- run folders ------------------------------------------------------------------------------------------------------

OVERRIDES = {
    "data._target_=os.mkdir": "asks for 'os.mkdir'",
    "++data._target_=os.mkdir": "asks for 'os.mkdir'",
    "+data.x={_target_:os.mkdir,path:boom}": "asks for 'os.mkdir'",
    "+data.x={'_target_':os.mkdir,path:boom}": "which is not a valid option",
    "+data.x=[{_target_:os.mkdir,path:boom}]": "asks for 'os.mkdir'",
    "+data.x={a:{b:[{_target_:os.mkdir,path:boom}]}}": "asks for 'os.mkdir'",
    "process._target_=dpm_scales.training.load_model": "asks for 'dpm_scales.training.load_model'",
    "trainer._target_=subprocess.Popen": "asks for 'subprocess.Popen'",
    "logger._target_=lightning.pytorch.loggers.CSVLogger": "if you trust it: allow=lightning",
    "+hydra.callbacks.x._target_=os.mkdir": "settings of Hydra are not a run's",
    "hydra.searchpath=[file://{place}]": "settings of Hydra are not a run's",
    "hydra/launcher=evil": "settings of Hydra are not a run's",
    "hydra.run.dir=/tmp": "settings of Hydra are not a run's",
    "--config-dir={place}": "which is not a valid option",
    "--config-path={place}": "which is not a valid option",
    "-m": "which is not a valid option",
    "--help": "which is not a valid option",
    "process={place}/evil": "leads out of the configs",
    "process=../../../../../../../../../../../..{place}/evil": "leads out of the configs",
    "process/noise=../../../../../../../../../../../..{place}/evil": "leads out of the configs",
    "experiment=[a,../../evil]": "leads out of the configs",
    "seed=${oc.env:HOME}": "with an interpolation",
    "+x={a:['${oc.env:HOME}']}": "with an interpolation",
    "data.root=${oc.create:x}": "with an interpolation",
    "data._args_=[boom]": "which a stored run may not",
    "+data.x={_args_:[boom]}": "a key that a stored run may not have",
    "seed=1,2": "a sweep, where a run has one value",
    "seed=range(1,3)": "a sweep, where a run has one value",
    "network.widths=[8,8": "which is not a valid option",
}


@pytest.mark.parametrize("override", OVERRIDES)
@pytest.mark.parametrize("key", ["run_dir", "resume"])
def test_options_of_a_run(override: str, key: str, copied: Path, tmp_path: Path) -> None:
    evil = tmp_path / "place"
    evil.mkdir()
    (evil / "evil.yaml").write_text("_target_: os.mkdir\npath: boom\n")
    stored = copied / "overrides.yaml"
    stored.write_text(yaml.safe_dump([*yaml.safe_load(stored.read_text()), override.replace("{place}", str(evil))]))
    before = files(tmp_path)
    assert_refused(call("train.py", f"{key}={copied}", "trainer.max_steps=3", cwd=tmp_path), OVERRIDES[override])
    assert files(tmp_path) == before and not (tmp_path / "boom").exists()


def test_the_holes_are_holes(run: Path, tmp_path: Path) -> None:
    """What a stored option may not do, one on the command line does: the user's own word is trusted."""
    (tmp_path / "evil.yaml").write_text(f"_target_: os.mkdir\npath: {tmp_path / 'boom'}\n")
    away = os.path.relpath(tmp_path, ROOT / "configs" / "process")
    for number, override in enumerate(
        (
            f"++network.dropout={{_target_:os.mkdir,path:{tmp_path}/boom}}",
            f"process={away}/evil",
            f"process/noise=../{away}/evil",
        )
    ):
        attempt(tmp_path / f"run{number}", override)
        (tmp_path / "boom").rmdir()


def test_another_folder_can_not_be_chosen(copied: Path, tmp_path: Path) -> None:
    """Not by any spelling of run_dir."""
    stored = copied / "overrides.yaml"
    for spelling in ("run_dir", "++run_dir", "+run_dir", "resume", "~run_dir"):
        stored.write_text(yaml.safe_dump([f"{spelling}={tmp_path / 'elsewhere'}"]))
        outcome = call("train.py", f"run_dir={copied}", "trainer.max_steps=2", cwd=tmp_path)
        assert not (tmp_path / "elsewhere").exists(), outcome.err


def test_given_options_replace_stored_ones_unseen(copied: Path, tmp_path: Path) -> None:
    stored = copied / "overrides.yaml"
    stored.write_text(yaml.safe_dump([*yaml.safe_load(stored.read_text()), "++seed=${oc.env:HOME}"]))
    outcome = call("train.py", f"run_dir={copied}", "seed=0", cwd=tmp_path)
    assert outcome.status == 0 and "is finished (2 steps)" in outcome.out, outcome.err


@pytest.mark.parametrize(
    "text", ["", "{", "3", "a: b\n", "- [a]\n", "- 3\n", "\x00", laughs(), "&a [*a]\n", "[" * 5000, "#" * 2**21]
)
def test_damaged_options(text: str, copied: Path, tmp_path: Path) -> None:
    (copied / "overrides.yaml").write_text(text)
    outcome = call("train.py", f"run_dir={copied}", cwd=tmp_path)
    assert_refused(outcome, "overrides.yaml is damaged; remove it and give the run's options again")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("result.json", "{", "result.json is damaged"),
        ("result.json", "[]", "result.json is damaged"),
        ("result.json", '{"steps": "x"}', "result.json is damaged"),
        ("metrics.csv", "step,epoch\nx,1\n", "metrics.csv is damaged"),
        ("metrics.csv", "a,b\n1,2\n", "metrics.csv is damaged"),
        ("metrics.csv", '"', "metrics.csv is damaged"),
    ],
)
def test_other_files_of_a_run(name: str, content: str, words: str, copied: Path, tmp_path: Path) -> None:
    (copied / name).write_text(content)
    outcome = call("train.py", f"run_dir={copied}", "trainer.max_steps=3", cwd=tmp_path)
    assert_refused(outcome, words)


@pytest.mark.parametrize(
    "change",
    [
        {"pin_memory": [{"_target_": "os.mkdir", "path": "MARK"}]},
        {"pin_memory": {"_target_": "os.mkdir", "path": "MARK"}},
        {"pin_memory": [[{"_target_": "os.mkdir", "path": "MARK"}]]},
        {"_args_": [{"_target_": "os.mkdir", "path": "MARK"}]},
        {"pin_memory": "${oc.env:HOME}"},
        {"_target_": "os.mkdir", "path": "MARK"},
    ],
)
def test_data_of_a_strangers_run(change: dict[str, object], tmp_path: Path) -> None:
    """`evaluate.py reference=data` builds a data set of ours from a run's config.yaml, and nothing else."""
    mark = tmp_path / "executed"
    data = yaml.safe_load((ROOT / "configs/data/digits.yaml").read_text())
    text = yaml.safe_dump({"data": data | change}).replace("MARK", str(mark))
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="dpm_scales.data|holds objects"):
        run_data(tmp_path)
    assert not mark.exists()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    assert len(run_data(tmp_path).train_set) > 1000
