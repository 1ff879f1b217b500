"""Bits per dimension of eight-bit images: sums over batches, what fits and what does not, the figure."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.data import Digits
from dpm_scales.data.image_sets import DataImageSet
from dpm_scales.evaluation.likelihood import bits_per_dim, check_classes, conditions, save_plot
from dpm_scales.evaluation.references import data_images, open_images
from dpm_scales.images import load_image, to_range
from dpm_scales.likelihood import FlowLikelihood, VariationalBound
from dpm_scales.rng import CounterRNG
from dpm_scales.training import Model, build_model, load_model
from support.evaluate_helpers import Means, noise_images, small_features
from support.oracles import refused
from support.shell import Outcome, call, small_model, train

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
    x_0, noise = to_range(images, process.value_range), CounterRNG(7, 5)
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
    assert (result.per_band is not None) == (method != "flow")
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
    result = bits_per_dim(model, [(pictures(2), labels)])
    assert result.number == 2 and result.given == ("label",) and "at most, given the label (vlb" in result.line()
    assert json.loads(json.dumps(result.to_dict()))["given"] == ["label"]
    with refused("trained with labels only"):
        bits_per_dim(model, [pictures(2)], use_labels=False)


def test_labels_are_heard_and_left_out() -> None:
    """Given the labels: each image with its own; without: what the network makes of "no label"."""
    model = model_of("vp")
    model = build_model(replace(model.recipe, num_classes=3, label_dropout=0.1))
    with torch.no_grad():
        for parameter in model.denoiser.network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    images, labels = pictures(4), torch.tensor([0, 2, 1, 2])
    x_0 = to_range(images, model.denoiser.process.value_range)
    for use_labels, heard in ((True, labels), (False, torch.full((4,), 3))):
        nats = VariationalBound(model.denoiser, model.prior, 3)(x_0, CounterRNG(7, 4), heard).total
        batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
        result = bits_per_dim(model, batches, "vlb", 3, seed=7, use_labels=use_labels)
        assert result.bits == pytest.approx(float(nats.mean()) / (64 * math.log(2)), rel=1e-4)
        assert result.given == (("label",) if use_labels else ())
    others = [bits_per_dim(model, [(images, labels * 0 + k)], "vlb", 3, seed=7).bits for k in range(3)]
    assert len({*others, result.bits}) == 4
    assert bits_per_dim(model, [images], "vlb", 3, seed=7, use_labels=False).bits == pytest.approx(result.bits)


@pytest.mark.parametrize("method", ["vlb", "dissipation", "flow"])
def test_models_that_are_given_a_guidance_image_say_so(method: str) -> None:
    torch.manual_seed(0)
    short = ("process.num_scales=6", "process.blur.blur_sigma_max=2")
    for image, given in (("own", ("guidance image",)), ("other", ())):
        model = small_model("process=inverse_osmosis", *short, f"process.guidance_image={image}")
        process = model.denoiser.process
        model.prior.fit(to_range(pictures(9, seed=1), process.value_range), process)
        result = bits_per_dim(model, [pictures(3)], method, 3)
        assert result.given == given and math.isfinite(result.bits)
        assert ("given the guidance image" in result.line()) == bool(given)
        assert (result.context == 0) == (image == "own")
    model = build_model(replace(small_model("process=osmosis_diffusion", *short[:1]).recipe, num_classes=2))
    assert conditions(model) == ("label",)


def held_out(classes: int | None, names: tuple[str, ...] | None) -> DataImageSet:
    source = Digits()
    source.num_classes, source.class_names = classes, names  # type: ignore[assignment]
    return data_images(source, "val", "digits", 4)


def test_images_need_the_labels_of_the_model() -> None:
    model = build_model(replace(model_of("vp").recipe, num_classes=10, class_names=tuple("0123456789")))
    names = tuple("0123456789")
    check_classes(model, held_out(10, names))
    check_classes(model, held_out(8, None))
    check_classes(model_of("vp"), held_out(None, None))
    with refused("labels of 10 classes (0, 1, ", "digits, split val have none", "reference=data"):
        check_classes(model, held_out(None, None))
    with refused("10 classes", "have 11"):
        check_classes(model, held_out(11, None))
    with refused("10 classes", "(a, b, "):
        check_classes(model, held_out(10, tuple("abcdefghij")))


def test_sets_of_pictures_give_their_labels(tmp_path: Path) -> None:
    """In order, for data sets and arrays; files have none."""
    pictures_, source = data_images(Digits(), "val", "digits", 5), Digits().val()
    chosen = [i * len(source) // 5 for i in range(5)]
    labels = torch.cat([batch for _, batch in pictures_.labelled(2)])
    assert labels.tolist() == [source[i][1] for i in chosen]
    for (images, _), alone in zip(pictures_.labelled(2), pictures_.batches(2), strict=True):
        assert torch.equal(images, alone)
    arrays = {"images": pictures(3)[:, 0].numpy(), "labels": torch.tensor([2, 0, 1]).numpy()}
    np.savez(tmp_path / "some.npz", **arrays)
    assert next(open_images(str(tmp_path / "some.npz"), "reference").labelled(3))[1].tolist() == [2, 0, 1]
    noise_images(tmp_path / "files", 2, 0)
    np.save(tmp_path / "none.npy", arrays["images"])
    for place in ("files", "none.npy"):
        with refused(place, "no labels"):
            next(open_images(str(tmp_path / place), "reference").labelled(2))


def evaluate(folder: Path, *options: str) -> Outcome:
    common = ("num_samples=4", "num_reference=6", "measures=[kernel]", "features=means", "cache=false")
    reference = () if any(option.startswith("reference=") for option in options) else ("reference=data",)
    with small_features(Means()):
        return call("evaluate.py", *common, *reference, *options, cwd=folder)


@pytest.mark.slow
def test_command_prints_and_saves_what_a_trained_model_makes_of_images_held_out(tmp_path: Path) -> None:
    train(
        tmp_path / "run", "process=vp", "process.num_scales=20", "trainer.max_steps=3", "trainer.val_check_interval=3"
    )

    done = evaluate(
        tmp_path, "model=run", "likelihood=vlb", "likelihood_scales=10", "likelihood_draws=4", "seed=5", "out=out"
    )
    assert done.status == 0, done.err
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())["likelihood"]
    held = open_images("data", "reference", "val", 6, tmp_path / "run")
    expected = bits_per_dim(load_model(tmp_path / "run"), held.batches(4), "vlb", 10, 4, seed=5)
    assert saved["bits"] == pytest.approx(expected.bits, rel=1e-4) and saved["images"]["number"] == 6
    assert f"{saved['bits']:.3f}" in done.out and (tmp_path / "out" / "likelihood.png").is_file()
    for options, words in {
        ("model=run", "likelihood=vpl"): "likelihood='vpl'",
        ("samples=run/samples", "likelihood=vlb"): "likelihood=vlb",
        ("model=run", "likelihood=vlb", "likelihood_scales=21"): "20",
        ("model=run", "likelihood=flow", "likelihood_scales=0"): "steps",
        (
            "model=run",
            "likelihood=flow",
            f"likelihood_scales={10**30}",
        ): "steps must be a whole number >= 1 and <= 1e+06",
    }.items():
        failed = evaluate(tmp_path, *options)
        assert failed.status == 2 and words in failed.err and "Traceback" not in failed.err


SHORT = ("process.num_scales=6", "trainer.max_steps=3", "trainer.val_check_interval=3")
LIKELY = ("likelihood=vlb", "likelihood_draws=4", "seed=5")


@pytest.mark.slow
def test_command_tells_what_the_likelihood_is_given(tmp_path: Path) -> None:
    """Labels with and without dropout, guidance by the image itself; images without labels."""
    runs: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "dropped": (("process=vp", "conditional=true"), ("label",)),
        "sure": (("process=vp", "conditional=true", "label_dropout=0"), ("label",)),
        "own": (("process=osmosis_diffusion", "process.guidance_image=own"), ("guidance image",)),
    }
    for name, (options, given) in runs.items():
        train(tmp_path / name, *options, *SHORT)
        done = evaluate(tmp_path, f"model={name}", *LIKELY, f"out=out_{name}")
        assert done.status == 0, done.err
        saved = json.loads((tmp_path / f"out_{name}" / "evaluation.json").read_text())["likelihood"]
        assert saved["given"] == list(given)
        assert f"likelihood: {saved['bits']:.3f}" in done.out and f"at most, given the {given[0]} (vlb" in done.out
        model, held = load_model(tmp_path / name), open_images("data", "reference", "val", 6, tmp_path / name)
        batches = held.batches(4) if name == "own" else held.labelled(4)
        assert saved["bits"] == pytest.approx(bits_per_dim(model, batches, "vlb", None, 4, 5).bits, rel=1e-4)
        assert ("without_labels" in saved) == ("without labels: " in done.out) == (name == "dropped")
        if name == "dropped":
            plain = bits_per_dim(model, held.batches(4), "vlb", None, 4, 5, use_labels=False)
            assert saved["without_labels"]["bits"] == pytest.approx(plain.bits, rel=1e-4)
            assert saved["without_labels"]["given"] == []
    noise_images(tmp_path / "files", 6, 0)
    failed = evaluate(tmp_path, "model=sure", "reference=files", *LIKELY)
    assert failed.status == 2 and failed.err.count("\n") == 1, failed.err
    assert "the images of files have none; give reference=data" in failed.err
