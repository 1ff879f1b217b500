"""Training on shards: killed in mid-shard, on two ranks, from a server that goes away; the run is always the same."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dpm_scales.cli.stored import may_download, stored_overrides
from dpm_scales.data import ImageDataModule
from dpm_scales.errors import UserError
from dpm_scales.models.instantiate import build
from dpm_scales.models.trust import DATA_ROOMS, check_target
from dpm_scales.shards import ShardSource, fetch
from dpm_scales.shards.pack import Packing, pack
from dpm_scales.training.module import DiffusionModule
from support.cluster_shell import Forked, job_step
from support.shards import served
from support.shell import FAST, SMALL, assert_equal, attempt, call, checkpoint, column, command, files, train

STEPS = 8
OPTIONS = (
    *(*SMALL, *FAST, "data=webdataset", "data.channels=1", "data.window=2", "data.random_flip=true"),
    *("data.batch_size=6", f"trainer.max_steps={STEPS}", "checkpoint.every_n_steps=1", "trainer.val_check_interval=4"),
)


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPM_SCALES_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(fetch, "FIRST_PAUSE", 0.0)
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of seven images of 8 px, of which five are trained on."""
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    np.save(folder / "a.npy", rng.integers(0, 256, (42, 8, 8), dtype=np.uint8))
    pack(folder / "a.npy", folder / "shards", Packing(7), lambda *_: lambda _: None)
    return folder / "shards"


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of one process."""
    return train(tmp_path_factory.mktemp("whole") / "run", *OPTIONS, f"data.root={shards}")


def assert_same(run_dir: Path, whole: Path) -> None:
    ours, theirs = checkpoint(run_dir), checkpoint(whole)
    for name in ours.keys() - {"loops", "epoch", "options"}:
        assert_equal(ours[name], theirs[name], name)
    assert (run_dir / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    for folder in ("model", "samples"):
        assert files(run_dir / folder) == files(whole / folder)


def test_killed_in_mid_shard_and_resumed_with_other_workers(shards: Path, whole: Path, tmp_path: Path) -> None:
    """Batch 3 begins at image 18: in the third shard of the order, and in the second window."""

    def prepare(rank: int) -> None:
        original = DiffusionModule.training_step

        def step(self: DiffusionModule, *rest: Any) -> Any:
            if self.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *rest)

        DiffusionModule.training_step = step  # type: ignore[method-assign]

    options = (*OPTIONS, f"data.root={shards}")
    (end,) = Forked([{}], *options, "run_dir=run", "data.num_workers=1", cwd=tmp_path, prepare=prepare).finish()
    assert end.status == -signal.SIGKILL and checkpoint(tmp_path / "run")["global_step"] == 3
    state = checkpoint(tmp_path / "run")["ImageDataModule"]
    assert state["next_batch"] == 3 and state["window"] == 2 and state["num_images"] == 35
    outcome = call("train.py", "run_dir=run", "data.num_workers=2", "data.decoded=true", cwd=tmp_path)
    assert outcome.status == 0 and "data.num_workers 1 -> 2" in outcome.out, outcome.err
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("kept", ["data.decoded=true", "data.on_device=true"])
def test_images_that_are_kept_train_the_same_model(kept: str, shards: Path, whole: Path, tmp_path: Path) -> None:
    assert_same(train(tmp_path / "run", *OPTIONS, f"data.root={shards}", kept), whole)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("data.num_workers=1",), ("data.on_device=true", "data.decoded=true")])
def test_two_ranks_have_the_losses_of_one(more: tuple[str, ...], shards: Path, whole: Path, tmp_path: Path) -> None:
    options = [option for option in OPTIONS if not option.startswith("data.batch_size")]
    options += ["data.batch_size=3", f"data.root={shards}", "run_dir=run", *more]
    ends = Forked(job_step(2), *options, cwd=tmp_path).finish()
    assert [end.status for end in ends] == [0, 0], ends[0].err + ends[1].err
    for name in ("train/loss", "val/loss"):
        ours, theirs = column(tmp_path / "run", name), column(whole, name)
        assert len(ours) == (STEPS if name == "train/loss" else 2)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=name)


def test_a_server_that_goes_away_ends_a_run_that_goes_on_when_it_is_back(
    shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one line; no step is lost, and nothing is fetched that only the run's folder names."""
    monkeypatch.setenv("DPM_SCALES_CACHE", str(tmp_path / "cache"))
    original = DiffusionModule.training_step
    with served(shards) as (url, faults):

        def step(self: DiffusionModule, *rest: Any) -> Any:
            if self.global_step == 3 and not faults.of:
                faults.of = {path.name: ["500"] for path in shards.glob("*.tar")}
                shutil.rmtree(tmp_path / "cache")
                self.trainer.datamodule.train_set.shards._open.clear()  # type: ignore[attr-defined]
            return original(self, *rest)

        monkeypatch.setattr(DiffusionModule, "training_step", step)
        outcome = attempt(tmp_path / "run", *OPTIONS, f"data.root={url}", "data.tries=2")
        assert outcome.status == 2 and "Traceback" not in outcome.err
        assert "could not be fetched in 2 tries; the last: HTTP 500" in outcome.err
        assert checkpoint(tmp_path / "run")["global_step"] == 3
        asked = len(faults.asked)
        refused = call("train.py", "run_dir=run", cwd=tmp_path)
        assert refused.status == 2 and "give data.download=true" in refused.err and len(faults.asked) == asked
        faults.of = {"back": ["ok"]}
        outcome = call("train.py", "run_dir=run", "data.download=true", cwd=tmp_path)
        assert outcome.status == 0, outcome.err
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("https://me:hush@a.b/c/", "https://a.b/c/: the address holds a login"),
        ("https://a.b/c/?X-Amz-Signature=hush", "https://a.b/c/: its 'x-amz-signature' may be a secret"),
    ],
)
def test_secrets_are_neither_shown_nor_stored(address: str, told: str, tmp_path: Path) -> None:
    end = call("train.py", *OPTIONS, f"data.root='{address}'", "run_dir=run", cwd=tmp_path)
    assert end.status == 2 and end.err.startswith(f"error: {told}") and len(end.err.splitlines()) == 1
    assert "hush" not in end.err + end.out
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hush" in path.read_bytes()]
    for action in ("check", "index"):  # which store no address, so that a signature may be given
        end = command("data", action, address.replace("https://a.b", "https://127.0.0.1:9"), "tries=1")
        assert end.status == 2 and "hush" not in end.err + end.out


@pytest.mark.parametrize("named", ["data.root", "data.val_root", "data.index"])
def test_addresses_of_a_strangers_folder_are_not_fetched_from(named: str, tmp_path: Path) -> None:
    file = tmp_path / "overrides.yaml"
    file.write_text(yaml.safe_dump(["data=webdataset", f"{named}='https://a.b/c'", "data.download=true"]))
    for typed, may in (((), False), (("seed",), False), ((named,), True), (("data.download",), True)):
        stored_overrides(file, typed, ("data.root",))
        assert may_download(tmp_path) is may
    for name in ("dpm_scales.shards.ShardSource", "dpm_scales.data.ShardSource"):
        file.write_text(yaml.safe_dump([f"data={{_target_: {name}, root: 'https://a.b/c'}}"]))
        with pytest.raises(UserError, match=f"{name}', which could fetch from any address"):
            stored_overrides(file, (), ("data.root",))


def test_former_names_of_shards_are_found(shards: Path) -> None:
    former = {"_target_": "dpm_scales.data.shards_data", "root": str(shards), "channels": 1, "batch_size": 2}
    check_target(former["_target_"], "f", DATA_ROOMS)
    assert isinstance(build(former, ImageDataModule, "data").source, ShardSource)
    source = {"_target_": "dpm_scales.data.ShardSource", "root": str(shards), "channels": 1}
    own = {"_target_": "dpm_scales.data.ImageDataModule", "source": source, "batch_size": 2}
    assert isinstance(build(own, ImageDataModule, "data").source, ShardSource)
