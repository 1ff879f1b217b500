"""What a run can be asked for: labels, precision, compilation, loggers; and the names of runs."""

from __future__ import annotations

import csv
import functools
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from dpm_scales.images import load_image
from dpm_scales.networks import UNet
from dpm_scales.sweeps.naming import run_name
from dpm_scales.tables import short_numbers
from dpm_scales.training import compiling as compiling_module
from dpm_scales.training import load_model
from dpm_scales.training.module import DiffusionModule
from dpm_scales.training.reporting import MetricsFile
from dpm_scales.training.trainer import log_interval
from support.shell import (
    FAST,
    SMALL,
    attempt,
    broken_off,
    call,
    checkpoint,
    column,
    composed,
    network_weights,
    settings,
    small_model,
    table,
    train,
)

# --- labels, precision, compilation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [("data=digits", "scalar"), ("data=photos", "wiener")],
)
def test_model_holds_what_was_chosen_by_the_datas_spectrum(data: str, expected: str, tmp_path: Path) -> None:
    """Also in a run that goes on, whose options still say auto."""
    options = (data, "process=blurring", "process.blur.blur_sigma_max=4", "trainer.limit_val_batches=1")
    run_dir = train(tmp_path / "run", *options, "trainer.max_steps=2", "samples.num_images=1")
    assert load_model(run_dir).recipe.parts["target"]["preconditioning"] == expected
    train(run_dir, *options, "trainer.max_steps=3", "samples.num_images=1")
    assert load_model(run_dir).recipe.parts["target"]["preconditioning"] == expected


def test_labels_reach_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor | None] = []
    embed = UNet._embed
    monkeypatch.setattr(
        UNet,
        "_embed",
        lambda self, t, labels: (seen.append(None if labels is None else labels), embed(self, t, labels))[1],
    )
    run_dir = train(tmp_path / "labels", "conditional=true", "samples.num_images=12")
    trained = [labels for labels in seen if labels is not None and len(labels) == 16]
    assert all(labels is not None for labels in seen) and trained
    assert len({tuple(labels.tolist()) for labels in trained}) > 2
    assert any(labels is not None and labels.tolist() == [*range(10), 0, 1] for labels in seen)  # of the grid
    # ten rows of at most two, names on the left
    _, height, width = load_image(run_dir / "samples" / "step-000006.png").shape
    assert height == 10 * 33 + 1 and 2 * 33 + 1 < width < 4 * 33
    recipe = load_model(run_dir).recipe
    assert recipe.num_classes == 10 and recipe.class_names == tuple("0123456789")
    seen.clear()
    train(tmp_path / "plain")
    assert seen and all(labels is None for labels in seen)


@pytest.mark.parametrize(
    "process",
    [
        "vp",
        "heat",
        "blurring",
    ],
)
def test_bf16_mixed_on_the_cpu(process: str, tmp_path: Path) -> None:
    """Finite, other than in full precision, and with master weights and losses of 32 bits."""
    overrides = (f"process={process}", "process.num_scales=4", "sampler.steps=null", *FAST)
    half = train(tmp_path / "half", "trainer.precision=bf16-mixed", *overrides)
    full = train(tmp_path / "full", *overrides)
    a, b = column(half, "train/loss"), column(full, "train/loss")
    assert np.isfinite(a).all() and a != b
    np.testing.assert_allclose(a, b, rtol=0.1)
    assert {v.dtype for v in network_weights(checkpoint(half)["state_dict"]).values()} == {torch.float32}


@pytest.mark.parametrize("process", ["heat", "blurring", "inverse_osmosis", "osmosis_diffusion"])
def test_mixed_precision_is_the_networks_alone(process: str) -> None:
    """A fresh network returns zeros in any precision: all that is left of the loss is the law, in 32 bits and more."""
    model = small_model(f"process={process}", "sampler.steps=null")
    x_0 = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.4, 0.7, 1.0])
    losses = []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            losses.append(model.denoiser.loss(x_0, t, None, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)


def test_compiled_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole network is one graph, here run by torch's own interpreter: what a backend makes of it is its matter."""
    graphs = compiling(monkeypatch)
    plain_run = train(tmp_path / "plain", *FAST)
    assert not graphs, "on a CPU compile=null compiles nothing"
    compiled = train(tmp_path / "compiled", "compile=true", *FAST)
    assert len(graphs) == 1, "validations and grids are not compiled"
    np.testing.assert_allclose(column(compiled, "train/loss"), column(plain_run, "train/loss"), rtol=1e-5)
    assert (
        network_weights(checkpoint(compiled)["state_dict"]).keys()
        == network_weights(checkpoint(plain_run)["state_dict"]).keys()
    )


def compiling(monkeypatch: pytest.MonkeyPatch, works: bool = True) -> list[Any]:
    """Have torch's interpreter run what is compiled, or fail; return the graphs that were made."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        if not works:
            raise RuntimeError("no such device\nat all")
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


def test_where_compiling_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself, as on CUDA, a run says so in one line and trains as if uncompiled; one that was asked to ends."""
    plain_run = train(tmp_path / "plain", "compile=false", *FAST)
    graphs = compiling(monkeypatch, works=False)
    monkeypatch.setattr(compiling_module, "uses_cuda", lambda cfg: True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = attempt(tmp_path / "auto", *FAST)
    assert outcome.status == 0 and len(graphs) == 1 and ", compiled\n" in outcome.out, outcome.err
    assert [str(w.message) for w in caught if "compil" in str(w.message)] == [
        "compiling the network failed (RuntimeError: no such device); training uncompiled; compile=false silences this"
    ]
    ours, other = (checkpoint(run)["state_dict"] for run in (tmp_path / "auto", plain_run))
    assert ours.keys() == other.keys() and all(torch.equal(ours[name], other[name]) for name in ours)
    outcome = attempt(tmp_path / "asked", "compile=true", *FAST)
    assert outcome.status == 2 and outcome.err == (
        "error: compile=true: compiling the network failed (RuntimeError: no such device); "
        "leave it out to train uncompiled\n"
    )


def test_compiled_runs_resume_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen on CUDA, here with torch's interpreter; FSDP computes block by block."""
    graphs = compiling(monkeypatch)
    monkeypatch.setattr(compiling_module, "uses_cuda", lambda cfg: True)
    whole = train(tmp_path / "whole", "checkpoint.every_n_steps=2", *FAST)
    with broken_off(after=3):
        attempt(tmp_path / "parts", "checkpoint.every_n_steps=2", *FAST)
    parts = train(tmp_path / "parts", "checkpoint.every_n_steps=2", *FAST)
    assert graphs
    for kind in ("state_dict", "current_model_state"):
        one, other = (checkpoint(run)[kind] for run in (whole, parts))
        assert not [name for name in one if "_orig_mod" in name]
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert compiling_module.compiles(composed("trainer=ddp"))
    assert not compiling_module.compiles(composed("trainer=fsdp"))
    assert not compiling_module.compiles(composed("compile=false"))


def test_cudnn_times_its_algorithms_if_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(DiffusionModule, "on_train_start", lambda module: seen.append(torch.backends.cudnn.benchmark))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    short = ("trainer.max_steps=1", "samples.num_images=0")
    for name, options in {"plain": (), "told": ("+trainer.benchmark=true",)}.items():
        train(tmp_path / name, *short, *options)
    assert seen == [False, True]


@pytest.mark.parametrize("layout", ["true", "false"])
def test_channels_last_changes_the_layout_alone(layout: str, tmp_path: Path) -> None:
    run_dir = train(tmp_path / "run", f"channels_last={layout}", *FAST)
    kernel = checkpoint(run_dir)["current_model_state"]["model.denoiser.network.middle1.residual.conv1.weight"]
    assert kernel.is_contiguous(memory_format=torch.channels_last) == (layout == "true")
    assert np.isfinite(column(run_dir, "train/loss")).all()


# --- loggers ----------------------------------------------------------------------------------------------------------


def test_metrics_file_goes_on_after_a_resumption(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path / "metrics.csv")
    for step in range(5):
        first.log_metrics({"loss": step / 2}, step)
    first.log_metrics({"val/loss": 1.5}, 4)
    first.save()
    again = MetricsFile(tmp_path / "metrics.csv")
    again.forget_from(3)
    again.log_metrics({"new": 1.0}, 3)
    again.save()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "epoch", "loss", "val/loss", "new"]
    assert rows[1:] == [
        ["0", "", "0", "", ""],
        ["1", "", "0.5", "", ""],
        ["2", "", "1", "", ""],
        ["3", "", "", "", "1"],
    ]


def test_metrics_file_holds_what_the_progress_bar_shows(tmp_path: Path) -> None:
    outcome = attempt(tmp_path / "run")
    rows = table(tmp_path / "run")
    assert [row["step"] for row in rows] == [str(step) for step in range(6)]
    assert {"step", "epoch", "train/loss", "train/grad_norm", "lr-AdamW", "val/loss"} <= rows[0].keys()
    line = next(line for line in outcome.out.splitlines() if line.startswith("step 6/6"))
    assert f"val/loss {float(rows[-1]['val/loss']):.4f}" in line
    assert f"train/loss {float(rows[-1]['train/loss']):.4f}" in line


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run_dir = train(tmp_path / "run", "logger=tensorboard", "samples.curves=true")
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    np.testing.assert_allclose(losses, column(run_dir, "train/loss"), rtol=1e-6)
    for name, place in {"samples": "samples/step", "trajectories": "samples/trajectory"}.items():
        for event in events.Images(name):
            kept = load_image(run_dir / f"{place}-{event.step:06d}.png", 3)
            assert torch.equal(load_image(event.encoded_image_string, 3), kept)
    assert [event.step for event in events.Images("curves")] == [3, 6]
    last = events.Images("curves")[-1].encoded_image_string
    assert torch.equal(load_image(last, 3), load_image(run_dir / "curves.png", 3))
    found = [events.SummaryMetadata(tag).plugin_data for tag in events.summary_metadata]
    pages = [HParamsPluginData.FromString(data.content) for data in found if data.plugin_name == "hparams"]
    (values,) = (page.session_start_info.hparams for page in pages if page.HasField("session_start_info"))
    (about,) = (page.experiment for page in pages if page.HasField("experiment"))
    assert values["process._target_"].string_value == "dpm_scales.processes.VP"
    assert values["optimizer.learning_rate"].number_value == 0.001 and values["network.widths"].string_value == "[8, 8]"
    assert values["conditional"].string_value == "false" and values["data.pin_memory"].string_value == "null"
    assert [metric.name.tag for metric in about.metric_infos] == ["val/loss"]
    assert len(events.Scalars("val/loss")) == 2 and "hp_metric" not in events.Tags()["scalars"]
    assert yaml.safe_load((run_dir / "tensorboard" / "hparams.yaml").read_text()) == settings(run_dir)


def test_short_runs_log_too(tmp_path: Path) -> None:
    """With the default interval of 50: 20 times, or at every step of fewer; always at the last."""
    short = [option for option in SMALL if "log_every" not in option and "max_steps" not in option]
    for steps, logged in ((3, [0, 1, 2]), (43, [*range(1, 43, 2), 42])):
        run_dir = tmp_path / str(steps)
        options = (*short, f"trainer.max_steps={steps}", "trainer.val_check_interval=100", f"run_dir={run_dir}")
        assert call("train.py", *options, cwd=tmp_path).status == 0
        assert [int(row["step"]) for row in table(run_dir) if row["train/loss"]] == logged
    assert {log_interval(composed(f"trainer.max_steps={n}").trainer) for n in (1000, 2200, -1)} == {50}


def test_short_run_that_resumes_logs_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    often = ("trainer.log_every_n_steps=50", "checkpoint.every_n_steps=7", "trainer.val_check_interval=20")
    options = ("trainer.max_steps=45", *often)
    train(tmp_path / "whole", *options)
    with broken_off(after=17):
        attempt(tmp_path / "parts", *options)
    train(tmp_path / "parts", *options)
    assert (tmp_path / "parts" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network or an account; a resumed run keeps its id, and the next run gets another."""
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "")
    monkeypatch.delenv("WANDB_SILENT")  # the run sets it, and monkeypatch restores it
    shown, finish = [], wandb.Run.finish

    def shows(self: wandb.Run) -> None:
        assert os.environ["WANDB_SILENT"] == "true"
        shown.append(dict(self.config))
        finish(self)

    monkeypatch.setattr(wandb.Run, "finish", shows)
    run_dir = train(tmp_path / "run", "logger=wandb", "samples.curves=true")
    images = list((run_dir / "wandb").glob("offline-run-*/files/media/images/*.png"))
    assert {path.name.split("_")[0] for path in images} == {"samples", "trajectories", "curves"}
    curves = [load_image(path, 3) for path in images if path.name.startswith("curves")]
    assert any(torch.equal(image, load_image(run_dir / "curves.png", 3)) for image in curves)
    kept = (run_dir / "wandb_id").read_text()
    assert list((run_dir / "wandb").glob(f"offline-run-*-{kept}/run-{kept}.wandb"))
    assert shown == [settings(run_dir)]
    assert wandb.run is None
    train(tmp_path / "run", "logger=wandb", "trainer.max_steps=8")
    assert (run_dir / "wandb_id").read_text() == kept
    other = train(tmp_path / "other", "logger=wandb")
    assert (other / "wandb_id").read_text() != kept


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_more_samples_than_memory_holds_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the run begins, or by the name of the option where it turns out later; never as the batch's fault."""
    outcome = attempt(tmp_path / "run", f"samples.num_images={10**12}")
    assert outcome.status == 1 and outcome.err.count("\n") == 1, outcome.err
    assert "samples.num_images=1000000000000 images of 8x8 would take" in outcome.err
    assert "lower samples.num_images" in outcome.err and list(tmp_path.iterdir()) == []

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("dpm_scales.samplers.loop.Sampler.sample", fail)
    outcome = attempt(tmp_path / "run", "samples.num_images=5")
    assert outcome.status == 1 and outcome.err.count("\n") == 1, outcome.err
    assert "no memory to draw samples.num_images=5 images of 8x8; lower samples.num_images" in outcome.err


# --- names, values ----------------------------------------------------------------------------------------------------


def test_run_names() -> None:
    assert run_name([]) == run_name(["run_dir=x", "trainer.devices=2", "hydra/launcher=joblib"]) == "default"
    assert run_name(["process=heat", "seed=1"]) == run_name(["seed=1", "process=heat"]) == "process=heat,seed=1"
    lists = {run_name([f"network.widths={value}"]) for value in ("[8,8]", "(8,8)", "8,8", "[8, 8]", "{8,8}")}
    assert len(lists) == 5
    paths = {run_name([f"data.root={value}"]) for value in ("/a/b", "/a-b", "a/b", "/a b")}
    assert len(paths) == 4
    long = {run_name([f"network.embedding_dim={i:0200d}"]) for i in range(20)}
    assert len(long) == 20 and all(len(name) <= 100 for name in long)
    assert not any(set(name) & set("/ []{}()'\"") for name in lists | paths | long)


def test_run_names_show_what_varies_in_short() -> None:
    """Options that are the same in all runs of a sweep are in the hash alone, and so are the digits left out."""
    run = ["process=vp", "trainer.max_steps=20", "seed=1"]
    short = run_name(run, constant=["trainer.max_steps", "seed"])
    assert re.fullmatch("process=vp-[0-9a-f]{12}", short) and run_name(run) == ",".join(sorted(run))
    assert short != run_name([*run[:2], "seed=2"], constant=["trainer.max_steps", "seed"])
    assert run_name(["seed=1", "seed=2"]) == run_name(["seed=2"]) != run_name(["seed=2", "seed=1"])  # the last counts
    assert run_name(["+a.b=1", "~c", "process=vp"], constant=["a.b", "c"]).startswith("process=vp-")
    assert re.fullmatch("[0-9a-f]{12}", run_name(["seed=1"], constant=["seed"]))
    assert re.fullmatch("rate=0.002346-[0-9a-f]{12}", run_name(["rate=0.0023456789012345"]))
    assert run_name(["rate=0.0023456789012345"]) != run_name(["rate=0.0023456789012346"])
    texts = {"a=1.5": "a=1.5", "b=0.000125,2": "b=0.000125,2", "c=1.23456789e-05": "c=1.235e-05", "d=v1.23456789": 0}
    texts |= {"e=-12.3456789": "e=-12.35", "f=12345678": "f=12345678", "g=[0.3333333333,1]": "g=[0.3333,1]"}
    assert {text: short_numbers(text) for text in texts} == {text: value or text for text, value in texts.items()}
