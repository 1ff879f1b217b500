"""The optimal covariance through the commands: measured once, stored with the model, used by samplers, never stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import dpm_scales as ds
from dpm_scales.commands.shared import choose_model
from dpm_scales.evaluation.generated import ModelSamples
from dpm_scales.models import draw, load_model, save_model
from support.fake_hub import FakeHub, serving
from support.oracles import refused
from support.shell import FAST, Outcome, call, command, composed, files, photos, sample, small_model, train

FILE = "covariance.safetensors"
DIGITS = ds.Digits().train().images
ASKED = ("sampler=ancestral", "sampler.steps=4", "num_samples=3")
OPTIMAL = (*ASKED, "sampler.covariance=optimal")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of blurring diffusion, measured on some of its training images."""
    blurring = ("process=blurring", "process.num_scales=5", *FAST, "trainer.max_steps=2")
    folder = train(tmp_path_factory.mktemp("covariance") / "run", *blurring)
    outcome = command("measure", folder, "num_images=20", "seed=3")
    assert outcome.status == 0, outcome.err
    assert f"{folder}/model/{FILE}" in outcome.out and "20 images" in outcome.out and "seed 3" in outcome.out
    assert "5 scales" in outcome.out and "EMA weights" in outcome.out
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def refusal(outcome: Outcome, *words: str) -> None:
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.out + outcome.err
    assert all(word in outcome.err for word in words), outcome.err


def sampled(model: Path, out: Path, *options: str) -> Outcome:
    return call("sample.py", f"model={model}", f"out={out}", *options, cwd=out.parent)


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_samples_use_it_and_are_reproducible_in_batches_of_any_size(run: Path, tmp_path: Path) -> None:
    published, optimal = (sample(run, tmp_path / name, *options) for name, options in (("a", ASKED), ("b", OPTIMAL)))
    again = sample(run, tmp_path / "c", *OPTIMAL, "batch_size=2")
    assert files(optimal)["000002.png"] == files(again)["000002.png"] != files(published)["000002.png"]
    record, plain = (json.loads((folder / "sample.json").read_text()) for folder in (optimal, published))
    assert record["covariance"]["num_images"] == 20 and record["covariance"]["seed"] == 3
    assert record["sampler_settings"]["covariance"] == "optimal" and "covariance" not in plain
    assert record["weights_sha256"] == plain["weights_sha256"]
    refusal(sampled(run, published, *OPTIMAL), "images of another command", "covariance")


def test_the_models_own_sampler_takes_it_by_one_option(run: Path, tmp_path: Path) -> None:
    """That of `sampler=auto`, and in evaluations too."""
    folder = sample(run, tmp_path / "a", "sampler.covariance=optimal", "steps=3", "num_samples=2")
    record = json.loads((folder / "sample.json").read_text())
    assert record["sampler"] == "DPMSolver" and record["steps"] == 3 and "covariance" in record
    chosen = choose_model(composed(f"model={run}", "reference=digits", "sampler.covariance=optimal", name="evaluate"))
    samples = ModelSamples(chosen.model, str(run), "averaged", None, 2, 0, None, torch.device("cpu"))
    assert samples.origin()["covariance"] == record["covariance"]


def test_measuring_again_gives_the_same_bytes(copied: Path) -> None:
    before = (copied / "model" / FILE).read_bytes()
    assert command("measure", copied, "num_images=20", "seed=3").status == 0
    assert (copied / "model" / FILE).read_bytes() == before
    assert command("measure", copied / "model", "images=digits", "num_images=20", "seed=4").status == 0
    assert (copied / "model" / FILE).read_bytes() != before


def test_every_copy_of_the_model_has_it(run: Path, tmp_path: Path) -> None:
    """An export, a saved model, one on the Hub; and the sampler that is stored with the model may need it."""
    model = load_model(run)
    expected = (run / "model" / FILE).read_bytes()
    assert command("runs", "export", run, f"out={tmp_path / 'export'}").status == 0
    model.sampler = ds.Ancestral(3, covariance="optimal")
    model.save(tmp_path / "saved")
    model.save(tmp_path / "saved")  # in place of itself
    for name in ("export", "saved"):
        assert (tmp_path / name / FILE).read_bytes() == expected
    images = next(draw(load_model(tmp_path / "saved"), 2, seed=1))
    with serving(FakeHub(), tmp_path / "cache") as hub:
        model.push("me/digits")
        assert hub.files("me/digits")[FILE] == expected
        assert torch.equal(next(draw(load_model("hf://me/digits"), 2, seed=1)), images)
        refusal(command("measure", "hf://me/digits"), "is on the Hub", "dpm-scales runs export MODEL out=DIR")
    (tmp_path / "saved" / FILE).unlink()
    refusal(sampled(tmp_path / "saved", tmp_path / "out"), "does not hold", "dpm-scales measure MODEL")
    assert command("measure", tmp_path / "saved", "images=digits", "num_images=20", "seed=3").status == 0
    assert torch.equal(next(draw(load_model(tmp_path / "saved"), 2, seed=1)), images)


def test_python_measures_too(tmp_path: Path) -> None:
    model = small_model("process.num_scales=5")
    images = DIGITS[:12]
    with refused("does not hold"):
        model.sample(2, sampler=ds.Ancestral(3, covariance="optimal"))
    model.train()
    model.measure_covariance(images, seed=2, batch_size=5)
    assert model.training
    drawn = model.sample(2, sampler=ds.Ancestral(3, covariance="optimal"))
    model.save(tmp_path / "model")
    again = ds.load(tmp_path / "model")
    assert torch.equal(again.sample(2, sampler=ds.Ancestral(3, covariance="optimal")), drawn)
    with refused("images have shape"):
        model.measure_covariance(images[:, 0])
    with refused("seed"):
        model.measure_covariance(images, seed=-1)


def test_a_conditional_model_is_measured_with_the_labels_of_its_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ds.UNet(widths=[8, 8], embedding_dim=16, attention_levels=[])
    model = ds.Model(network, ds.VP(5), image_size=8, channels=1, num_classes=10, sampler=ds.Ancestral())
    model.save(tmp_path / "model")
    assert command("measure", tmp_path / "model", "images=digits", "num_images=12").status == 0
    made = load_model(tmp_path / "model")
    made.sample(2, sampler=ds.Ancestral(3, covariance="optimal"), labels=[3, 4], guidance=2.0)
    with refused("this model needs labels"):
        made.measure_covariance(DIGITS[:12])
    made.measure_covariance(DIGITS[:12], torch.arange(12) % 10)
    picture = photos(tmp_path / "grey", 3, (8, 8))
    told = command("measure", tmp_path / "model", f"images={picture}")
    refusal(told, "trained with labels", "have none", "images=data")


# --- other weights ----------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_leaves_no_table_of_its_earlier_weights(copied: Path) -> None:
    outcome = call("train.py", f"run_dir={copied}", "trainer.max_steps=3", cwd=copied.parent)
    assert outcome.status == 0, outcome.err
    assert not (copied / "model" / FILE).exists()


def test_a_table_of_other_weights_is_not_used(copied: Path, tmp_path: Path) -> None:
    """It may lie there: other samplers do not look at it, and copies leave it behind."""
    model = load_model(copied)
    with torch.no_grad():
        next(model.denoiser.network.parameters()).mul_(1.1)
    with refused("measured with other weights"):
        model.with_sampler(ds.Ancestral(3, covariance="optimal"))
    other = load_model(copied).with_sampler(ds.Ancestral(3, covariance="optimal"))
    with torch.no_grad():
        next(other.denoiser.network.parameters()).mul_(1.1)
    with refused("measured with other weights"):
        next(draw(other, 2))
    table = (copied / "model" / FILE).read_bytes()
    save_model(copied / "model", model)
    assert not (copied / "model" / FILE).exists()
    (copied / "model" / FILE).write_bytes(table)
    sample(copied, tmp_path / "a", *ASKED)
    refusal(sampled(copied, tmp_path / "b", *OPTIMAL), "measured with other weights", "dpm-scales measure MODEL")
    assert not (tmp_path / "b").exists()
    assert command("runs", "export", copied, f"out={tmp_path / 'export'}").status == 0
    assert not (tmp_path / "export" / FILE).exists()


def test_a_damaged_table_is_refused_with_its_name(copied: Path, tmp_path: Path) -> None:
    path = copied / "model" / FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refusal(sampled(copied, tmp_path / "out", *ASKED), f"model/{FILE} is damaged")
    shutil.copy(copied / "model" / "model.safetensors", path)
    refusal(sampled(copied, tmp_path / "out", *ASKED), FILE, "no table of errors")
    assert command("measure", copied, "num_images=20", "seed=3").status == 0
    sample(copied, tmp_path / "out", *OPTIMAL)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_can_not_be_measured_is_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    before = files(run / "model")
    wide = photos(tmp_path / "wide", 3, (8, 9))
    colour = photos(tmp_path / "colour", 3, (8, 8))
    save_model(tmp_path / "export", load_model(run))
    for arguments, words in (
        ((), ("name one model",)),
        ((run, run), ("too many arguments",)),
        ((run, "num_images=1"), ("num_images", "2")),
        ((run, "images=none"), ("images=none", "no such folder or file")),
        ((run, "number=3"), ("unknown option 'number'", "num_images")),
        ((run, f"images={wide}"), ("8x9", "8x8", "training images")),
        ((run, f"images={colour}"), ("measure: images of 3 channels for a model of 1",)),
        ((run, "device=tpu"), ("unknown device",)),
        ((run / "checkpoints" / "last.ckpt",), ("is a checkpoint", "runs export")),
        ((tmp_path / "export",), ("lies in no run folder", "images=DIR")),
        ((tmp_path / "nothing",), ("no such file or folder",)),
    ):
        refusal(command("measure", *arguments), *words)
    assert files(run / "model") == before


def test_processes_and_tasks_without_it_are_refused(run: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "osmosis", small_model("process=osmosis_diffusion", "process.num_scales=4"))
    refusal(command("measure", tmp_path / "osmosis", "images=digits"), "DCT", "OsmosisDiffusion")
    digit = tmp_path / "digit.png"
    ds.save_png(digit, DIGITS[0])
    for options, words in (
        (("task=superres", "factor=2", f"image={digit}"), "guided towards the given image"),
        (("task=interpolate", f"start={digit}", f"end={digit}"), "drop sampler.covariance="),
    ):
        refusal(sampled(run, tmp_path / "out", *options, "sampler.covariance=optimal"), words)
    refusal(sampled(run, tmp_path / "out", "sampler=heun", "+sampler.covariance=optimal"), "sampler.covariance")
    assert not (tmp_path / "out").exists()


def test_help_says_how(tmp_path: Path) -> None:
    outcome = command("measure", "--help")
    assert outcome.status == 0 and "usage: dpm-scales measure MODEL" in outcome.out
