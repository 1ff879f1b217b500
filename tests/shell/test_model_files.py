"""Models whose files are well-formed and hold what no training writes: refused in one line, before memory is taken."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dpm_scales.errors import OutOfMemoryError, UserError
from dpm_scales.models.checksums import read_checkpoint, read_tensors, write_checkpoint, write_tensors
from dpm_scales.training import load_model, save_model
from support.shell import FAST, call, checkpoint, files, small_model, train

KEY = "denoiser.network.conv_in.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    heat = ("process=heat", "process.num_scales=4", "sampler.steps=null")
    return train(tmp_path_factory.mktemp("files") / "run", *heat, *FAST, "trainer.max_steps=2")


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@contextmanager
def little_memory(num_bytes: int = 3 * 2**29) -> Iterator[None]:
    """Let this process take no more than so much beyond what it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


# --- weights that are not finite, or of another type ------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nan": (lambda w: w.index_fill(0, torch.tensor([1]), float("nan")), f"the weights are not finite .*{KEY}"),
    "inf": (lambda w: w.index_fill(0, torch.tensor([1]), float("inf")), f"the weights are not finite .*{KEY}"),
    "integers": (lambda w: w.to(torch.int32), f"do not fit the config: .*{KEY} is torch.int32 in the file"),
    "halves": (lambda w: w.half(), f"do not fit the config: .*{KEY} is torch.float16 in the file, torch.float32"),
    "complex": (lambda w: w.to(torch.complex64), f"do not fit the config: .*{KEY} is torch.complex64"),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), f"do not fit the config: .*{KEY} is torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("place", ["export", "averaged", "raw"])
@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_refused_wherever_they_are(name: str, place: str, copied: Path) -> None:
    """With a checksum that fits."""
    change, message = BAD[name]
    last = copied / "checkpoints" / "last.ckpt"
    if place == "export":
        tensors = read_tensors(copied / "model" / "model.safetensors")
        write_tensors(copied / "model" / "model.safetensors", {**tensors, KEY: change(tensors[KEY])})
    else:
        values = checkpoint(copied)
        state = values["state_dict" if place == "averaged" else "current_model_state"]
        state[f"model.{KEY}"] = change(state[f"model.{KEY}"])
        write_checkpoint(last, values)
    model = copied if place == "export" else last
    with pytest.raises(UserError, match=message) as caught:
        load_model(model, weights="raw" if place == "raw" else "averaged")
    assert "\n" not in str(caught.value)
    if place == "raw":
        load_model(model)  # the average is as it was


def test_a_model_that_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    """Nor is what was there replaced by half of it."""
    model = small_model("process.num_scales=9")
    save_model(tmp_path / "model", model)
    before = files(tmp_path)
    weight = model.denoiser.network.get_parameter("conv_in.weight")
    with torch.no_grad():
        weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=f"is not exported to .*model: {KEY} is not finite") as caught:
        save_model(tmp_path / "model", model)
    assert "\n" not in str(caught.value) and files(tmp_path) == before
    with pytest.raises(UserError, match="not finite"):
        save_model(tmp_path / "other", model)
    assert not (tmp_path / "other").exists()


def test_commands_refuse_them_before_they_write(copied: Path, tmp_path: Path) -> None:
    path = copied / "model" / "model.safetensors"
    tensors = read_tensors(path)
    tensors = {name: value * float("nan") if value.is_floating_point() else value for name, value in tensors.items()}
    write_tensors(path, tensors)
    for command in (
        ("sample.py", f"model={copied}", f"out={tmp_path / 'out'}"),
        ("evaluate.py", f"model={copied}", "reference=digits", "num_samples=20", f"out={tmp_path / 'out'}"),
    ):
        outcome = call(*command, cwd=tmp_path)
        assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.out + outcome.err
        assert "the weights are not finite" in outcome.err and not (tmp_path / "out").exists()


# --- configs that ask for more than the file holds --------------------------------------------------------------------

HUGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "blocks": (lambda c: c["network"].update(blocks_per_level=10**9), "asks for more than .* tensors"),
    "channels": (lambda c: c["image"].update(channels=10**6), f"size mismatch for {KEY}"),
    "widths": (lambda c: c["network"].update(widths=[10**6, 10**6]), "size mismatch for denoiser.network"),
    "widths beyond 64 bits": (lambda c: c["network"].update(widths=[2**40, 2**40]), "weights|needs more memory"),
    "levels": (lambda c: c["network"].update(widths=[8] * 5000), "asks for more than .* tensors"),
    "embedding": (lambda c: c["network"].update(embedding_dim=2**40), "size mismatch|needs more memory"),
    "classes": (lambda c: c["labels"].update(num_classes=10**12), 'Missing key ".*embed_label.weight"'),
    "patches": (lambda c: c["network"].update(patch_size=10**6), f"size mismatch for {KEY}"),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_configs_end_soon_and_take_nothing(name: str, copied: Path) -> None:
    change, message = HUGE[name]
    config = copied / "model" / "config.yaml"
    values = yaml.safe_load(config.read_text())
    change(values)
    config.write_text(yaml.safe_dump(values))
    start = time.process_time()
    with little_memory(), pytest.raises(UserError, match=message) as caught:
        load_model(copied)
    assert time.process_time() - start < 5 and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1, 2**70, "x", None, [8]])
@pytest.mark.parametrize("key", ["height", "channels"])
def test_sizes_that_are_none(key: str, value: Any, copied: Path) -> None:
    config = copied / "model" / "config.yaml"
    values = yaml.safe_load(config.read_text())
    values["image"][key] = value
    config.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="incomplete or damaged|images can't be") as caught:
        load_model(copied)
    assert "\n" not in str(caught.value)


def views(values: dict[str, Any]) -> None:
    """A view of four bytes that claims to be 4 TB."""
    values["state_dict"]["model.prior.coefficients"] = torch.zeros(1).expand(10**6, 1, 10**3, 10**3)


def shared(values: dict[str, Any]) -> None:
    """The file's numbers many times over."""
    numbers = torch.zeros(1000, 1000)
    values["state_dict"].update({f"model.x{i}": numbers for i in range(50)})


@pytest.mark.parametrize("change", [views, shared])
def test_weights_of_more_bytes_than_their_file(change: Callable[[dict[str, Any]], None], copied: Path) -> None:
    path = copied / "checkpoints" / "last.ckpt"
    values = checkpoint(copied)
    change(values)
    write_checkpoint(path, values)
    with little_memory(), pytest.raises(UserError, match="last.ckpt is not a checkpoint of dpm_scales"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "odd",
    [torch.zeros(3, 3).to_sparse(), torch.zeros(3, device="meta"), 3, None],
    ids=["sparse", "meta", "number", "none"],
)
def test_weights_that_are_no_plain_tensors(odd: Any, copied: Path) -> None:
    values = checkpoint(copied)
    values["state_dict"][f"model.{KEY}"] = odd
    write_checkpoint(copied / "a.ckpt", values)
    with pytest.raises(UserError, match="a.ckpt is not a checkpoint of dpm_scales"):
        load_model(copied / "a.ckpt")


def test_packed_checkpoints_are_not_unpacked(tmp_path: Path) -> None:
    """Torch would: 400 MB of zeros from 400 kB."""
    torch.save({"state_dict": {"w": torch.zeros(10**5)}, "recipe": {"version": 3}}, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record))
    assert torch.load(tmp_path / "packed.ckpt", weights_only=True)["state_dict"]["w"].shape == (10**5,)
    with pytest.raises(UserError, match="packed.ckpt is not a checkpoint of dpm_scales"):
        read_checkpoint(tmp_path / "packed.ckpt")
    with pytest.raises(UserError, match="plain.ckpt is damaged: its end"):
        read_checkpoint(tmp_path / "plain.ckpt")


# --- priors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 1, 20, 2), "20x2 coefficients"), ((3, 1, 2), "size mismatch for prior.coefficients")],
    ids=["too many", "dimensions"],
)
def test_priors_that_do_not_fit(shape: tuple[int, ...], message: str, copied: Path, tmp_path: Path) -> None:
    path = copied / "model" / "model.safetensors"
    write_tensors(path, {**read_tensors(path), "prior.coefficients": torch.zeros(shape)})
    outcome = call("sample.py", f"model={copied}", f"out={tmp_path / 'out'}", "num_samples=2", cwd=tmp_path)
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.out + outcome.err
    assert message in outcome.err and not (tmp_path / "out").exists()


# --- files that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.ckpt", "run/model/model.safetensors", "run/model/config.yaml"])
def test_pipes_are_not_waited_for(name: str, copied: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    if path.name == "x.ckpt":
        with pytest.raises(UserError, match="x.ckpt is a pipe"):
            load_model(path)
    else:  # not taken for a file at all
        with pytest.raises(UserError, match="has no config.yaml|the raw|is a pipe|no model in"):
            load_model(path.parent)


def test_pickles_are_refused_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"state_dict": {}}, protocol=4))
    with pytest.raises(UserError, match="x.ckpt is not a checkpoint of dpm_scales"):
        load_model(tmp_path / "x.ckpt")
    assert not [w for w in recwarn.list if w.category is not ResourceWarning]  # those are of files of other tests


def test_lack_of_memory_is_status_1(copied: Path) -> None:
    """The file is not at fault: another machine may read it."""
    config = copied / "model" / "config.yaml"
    values = yaml.safe_load(config.read_text())
    values["process"]["num_scales"] = 10**12
    config.write_text(yaml.safe_dump(values))
    with pytest.raises(OutOfMemoryError, match="num_scales"):
        load_model(copied)
