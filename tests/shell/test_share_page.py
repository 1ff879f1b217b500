"""The code and the commands of docs/share.md run, with a Hub in memory."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dpm_scales.entry.start import console
from dpm_scales.models.from_diffusers import SCHEDULERS
from support.diffusers_folders import edit
from support.fake_hub import FakeHub, push, serving
from support.shell import FAST, ROOT, call, files, sample, train

PAGE = (ROOT / "docs" / "share.md").read_text()
SMALL_UNET = (
    "network.unet.block_out_channels=[8,16]",
    "network.unet.down_block_types=[DownBlock2D,AttnDownBlock2D]",
    "network.unet.up_block_types=[AttnUpBlock2D,UpBlock2D]",
    "network.unet.norm_num_groups=4",
    "network.unet.attention_head_dim=8",
    "network.unet.layers_per_block=1",
)


def block(title: str) -> str:
    """Return the block of Python whose first line is a comment with this title."""
    found = re.search(rf"```python\n# {title}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None, title
    return found[1]


def command(start: str) -> list[str]:
    """Return the words of the first command that begins so."""
    lines = re.findall(r"^(?:python|dpm-scales) .*$", PAGE.replace("\\\n", " "), re.MULTILINE)
    return shlex.split(next(line for line in lines if line.startswith(start)))


def test_the_hub_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    train(tmp_path / "runs" / "default", "process.num_scales=9", *FAST, "trainer.max_steps=2")
    names: dict[str, Any] = {}
    with serving(FakeHub(), tmp_path / "cache") as hub:
        words = [word.replace("owner/", "me/") for word in command("dpm-scales push")[2:]]
        assert words[1:] == ["me/name", "licence=mit"] and push(*words).status == 0
        by_command = hub.files("me/name")
        hub.commits.clear()
        exec(block("upload to the Hub").replace('"owner/', '"me/'), names)
        assert names["address"].startswith("https://huggingface.co/me/name/commit/")
        assert hub.files("me/name") == by_command
        hub.commits["owner/name"], hub.branches["owner/name"] = hub.commits["me/name"], hub.branches["me/name"]
        exec(block("load from the Hub"), names)
        assert names["images"].shape == (4, 1, 8, 8)
        for name in ("sample", "evaluate"):
            given = [word for word in command(f"dpm-scales {name}")[2:] if not word.startswith(("reference", "num"))]
            more = ("num_samples=8", *(("reference=digits", "num_reference=8") if name == "evaluate" else ()))
            outcome = call(f"{name}.py", *given, *more, cwd=tmp_path)
            assert outcome.status == 0, outcome.err


def test_diffusers_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for word in command("python train.py")[2:] if word != "data=mnist"]
    short = ("trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.limit_val_batches=1", "data.batch_size=8")
    few = ("process.num_scales=20", "samples.num_images=4")
    outcome = call("train.py", *words, *SMALL_UNET, *short, *few, cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    names: dict[str, Any] = {}
    exec(block("export to diffusers"), names)
    exec(block("load it there"), names)
    images = names["pipeline"](batch_size=1, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 1)
    written = files(tmp_path / "exported")
    with mock.patch.object(
        sys,
        "argv",
        [
            "dpm-scales",
            *re.findall(r"`dpm-scales (runs export .*?)`", PAGE)[0].replace("out=exported", "out=again").split(),
        ],
    ):
        console()
    assert files(tmp_path / "again") == written
    edit(tmp_path / "exported" / "unet" / "config.json", _diffusers_version="0.1.1")  # as old files have it
    options = [word for word in command("dpm-scales sample model=hf://google")[2:] if "=hf" not in word]
    sample(tmp_path / "exported", tmp_path / "drawn", *(word for word in options if not word.startswith("out=")))
    assert len([name for name in os.listdir(tmp_path / "drawn") if re.fullmatch(r"\d{6}\.png", name)]) == 16


def test_the_table_names_every_scheduler() -> None:
    assert {*re.findall(r"`(\w+Scheduler)`", PAGE)} == set(SCHEDULERS)
