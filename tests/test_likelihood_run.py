"""Bits per dimension of eight-bit images: sums over batches, what fits and what does not, the figure."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluate_helpers import Means, small_features
from oracles import refused
from shell import Outcome, call, small_model, train
from torch import Tensor

from dpm_scales.images import load_image, to_range
from dpm_scales.likelihood import FlowLikelihood, VariationalBound
from dpm_scales.noise import NoiseSource
from dpm_scales.training import Model, build_model, load_model
from dpm_scales.training.image_sets import open_pictures
from dpm_scales.training.likelihood_run import bits_per_dim, save_plot

PROCESSES = {
    "vp": ["process=vp", "process.num_scales=6"],
    "osmosis": ["process=inverse_osmosis", "process.num_scales=6", "process.blur.blur_sigma_max=2"],
}


def model_of(name: str) -> Model:
    torch.manual_seed(0)
    model = small_model(*PROCESSES[name])
    model.prior.fit(to_range(pictures(9, seed=1), model.denoiser.process.value_range), model.denoiser.process)
    return model


def pictures(number: int, channels: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, channels, 8, 8), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("method", ["vlb", "dissipation", "flow"])
@pytest.mark.parametrize("name", PROCESSES)
def test_bits_are_nats_of_all_images_and_batches_do_not_matter(name: str, method: str) -> None:
    model, images = model_of(name), pictures(5)
    result = bits_per_dim(model, images.split(2), method, 3, seed=7)
    process = model.denoiser.process
    x_0, noise = to_range(images, process.value_range), NoiseSource(7, 5)
    if method == "flow":
        nats = FlowLikelihood(model.denoiser, model.prior, 3)(x_0, noise)
    else:
        reverse = "ancestral" if method == "vlb" else method
        nats = VariationalBound(model.denoiser, model.prior, 3, reverse=reverse)(x_0, noise)
    unit = 64 * math.log(2)
    assert result.bits == pytest.approx(float(nats.total.mean()) / unit, rel=1e-4)
    assert result.standard_error == pytest.approx(float(nats.total.std()) / math.sqrt(5) / unit, rel=1e-3)
    for part, value in (("context", nats.context), ("prior", nats.prior), ("decoder", nats.decoder)):
        assert getattr(result, part) == pytest.approx(float(value.mean()) / unit, rel=1e-4, abs=1e-6)
    assert result.bits == pytest.approx(result.context + result.prior + result.steps + result.decoder)
    assert sum(result.per_scale) == pytest.approx(result.steps) and len(result.scales) == len(result.per_scale) + 1
    assert (result.per_band is not None) == (name == "vp" and method != "flow")
    if result.per_band is not None:
        assert [sum(row) for row in result.per_band] == pytest.approx(result.per_scale)
    assert (result.number, result.shape) == (5, (1, 8, 8))
    assert json.loads(json.dumps(result.to_dict()))["bits"] == result.bits
    assert f"{result.bits:.3f}" in result.line() and method in result.line()


def test_another_seed_gives_other_noise_and_grey_images_may_come_as_rgb() -> None:
    model, images = model_of("vp"), pictures(4)
    first = bits_per_dim(model, [images], seed=1)
    assert bits_per_dim(model, [images.expand(-1, 3, -1, -1)], seed=1).bits == first.bits
    assert bits_per_dim(model, [images], seed=2).bits != first.bits


@pytest.mark.parametrize("name", PROCESSES)
def test_figure_shows_the_parts(name: str, tmp_path: Path) -> None:
    result = bits_per_dim(model_of(name), [pictures(3)], draws=2)
    save_plot(tmp_path / "likelihood.png", result)
    whole = load_image(tmp_path / "likelihood.png")
    save_plot(tmp_path / "other.png", replace(result, decoder=3 * result.decoder))
    assert min(whole.shape[1:]) > 300 and not torch.equal(whole, load_image(tmp_path / "other.png"))


def test_what_does_not_fit_is_refused() -> None:
    model = model_of("vp")
    with refused("unknown method", "'vlb'"):
        bits_per_dim(model, [pictures(2)], "vlp")
    with refused("3 channels", "model of 1"):
        bits_per_dim(model, [pictures(2, 3)])
    with refused("one size"):
        bits_per_dim(model, [pictures(2), pictures(2)[..., :6]])
    with refused("uint8"):
        bits_per_dim(model, [pictures(2).float()])
    with refused("no images"):
        bits_per_dim(model, [])
    with refused("steps", "7"):
        bits_per_dim(model, [pictures(2)], scales=7)
    with refused("no noise"):
        bits_per_dim(small_model("process=homogeneous"), [pictures(2)])


def test_models_with_labels_need_them() -> None:
    model = model_of("vp")
    model = build_model(replace(model.recipe, num_classes=3))
    labels = torch.tensor([0, 2])
    with refused("labels", "none"):
        bits_per_dim(model, [pictures(2)])
    with refused("labels", "0..2"):
        bits_per_dim(model, [(pictures(2), labels + 1)])
    assert bits_per_dim(model, [(pictures(2), labels)]).number == 2


@pytest.mark.slow
def test_command_prints_and_saves_what_a_trained_model_makes_of_images_held_out(tmp_path: Path) -> None:
    train(
        tmp_path / "run", "process=vp", "process.num_scales=20", "trainer.max_steps=3", "trainer.val_check_interval=3"
    )

    def evaluate(*options: str) -> Outcome:
        common = (
            "reference=data",
            "num_samples=4",
            "num_reference=6",
            "measures=[kernel]",
            "features=means",
            "cache=false",
        )
        with small_features(Means()):
            return call("evaluate.py", *common, *options, cwd=tmp_path)

    done = evaluate("model=run", "likelihood=vlb", "likelihood_scales=10", "likelihood_draws=4", "seed=5", "out=out")
    assert done.status == 0, done.err
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())["likelihood"]
    held = open_pictures("data", "reference", "val", 6, tmp_path / "run")
    expected = bits_per_dim(load_model(tmp_path / "run"), held.batches(4), "vlb", 10, 4, seed=5)
    assert saved["bits"] == pytest.approx(expected.bits, rel=1e-4) and saved["images"]["number"] == 6
    assert f"{saved['bits']:.3f}" in done.out and (tmp_path / "out" / "likelihood.png").is_file()
    for options, words in {
        ("model=run", "likelihood=vpl"): "likelihood='vpl'",
        ("samples=run/samples", "likelihood=vlb"): "likelihood=vlb",
        ("model=run", "likelihood=vlb", "likelihood_scales=21"): "20",
        ("model=run", "likelihood=flow", "likelihood_scales=0"): "steps",
    }.items():
        failed = evaluate(*options)
        assert failed.status == 2 and words in failed.err and "Traceback" not in failed.err
