"""Guidance by frequency and by a worse model, from the command line and from Python, on tiny untrained models."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

import dpm_scales as ds
from dpm_scales.cli.arguments import CURVES, tidy
from dpm_scales.cli.completion import candidates
from dpm_scales.cli.options import guidance_settings
from dpm_scales.commands import evaluate
from dpm_scales.evaluation.likelihood import conditions
from dpm_scales.guidance import Autoguidance, GuidanceCurve
from dpm_scales.images import load_image, save_png
from dpm_scales.models.generate import draw, evaluations, weights_digest
from dpm_scales.models.guided import CURVES as KINDS
from dpm_scales.models.guided import guidance_weight, weight_settings, with_guidance
from support.oracles import refused
from support.shell import call, composed, drawn, small_model

SMALL = {"widths": (8, 8), "embedding_dim": 16, "attention_levels": ()}
FEW = ("num_samples=3", "steps=3", "sampler=ddim")


class Edge(GuidanceCurve):
    """A curve of one's own: guides the frequencies beyond r alone."""

    def __init__(self, weight: float = 3.0, beyond: float = 0.2) -> None:
        super().__init__()
        self.weight, self.beyond = weight, beyond

    def forward(self, r: Tensor) -> Tensor:
        return torch.where(r > self.beyond, self.weight, 1.0).to(torch.float64)


class OwnNetwork(ds.UNet):
    """A network of another package."""


def made(seed: int, process: Any = None, network: Any = None, **options: Any) -> ds.Model:
    """A model of 8 px images with weights by a seed."""
    torch.manual_seed(seed)
    law = ds.VP(num_scales=50) if process is None else process
    model = ds.Model(network or ds.UNet(**SMALL), law, **{"image_size": 8, "channels": 1} | options)
    for weights in model.parameters():  # labels matter, and no layer is zero
        nn.init.normal_(weights, std=0.2)
    return model.eval()


CLASSES = {"num_classes": 3, "class_names": ["a", "b", "c"]}


@pytest.fixture(scope="module")
def models() -> dict[str, ds.Model]:
    return {
        "good": made(0),
        "bad": made(1),
        "worse": made(2),
        "classes": made(3, **CLASSES),
        "bad_classes": made(4, **CLASSES),
        "sure_classes": made(5, **CLASSES, label_dropout=0.0),
    }


@pytest.fixture(scope="module")
def desk(models: dict[str, ds.Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("desk")
    for name, model in models.items():
        model.save(root / name)
    return root


def record(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "sample.json").read_text())
    return values


def pictures(out: Path) -> Tensor:
    return torch.stack([load_image(out / name)[:1] for name in sorted(drawn(out))])


def fails(desk: Path, *options: str, script: str = "sample.py") -> str:
    outcome = call(script, *options, cwd=desk)
    assert outcome.status == 2 and outcome.err.startswith("error: "), outcome.err
    assert outcome.err.count("\n") == 1 and len(outcome.err) < 400, outcome.err
    return outcome.err


# --- a guide ----------------------------------------------------------------------------------------------------------


def test_samples_with_a_guide(desk: Path, models: dict[str, ds.Model], tmp_path: Path) -> None:
    """The record, the PNGs, the evaluations; the same command elsewhere, and another; the same images from Python."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(desk / "bad", moved)
    line = ("model=good", f"out={out}", "guidance=2", "guidance_interval=[0.1,0.9]", *FEW)
    outcome = call("sample.py", *line, "guide=bad", cwd=desk)
    assert outcome.status == 0, outcome.err
    assert outcome.out.endswith(", seed 0, evaluations an image: 3 of the model and 3 of the guide\n")
    values, digest = record(out), weights_digest(models["bad"])
    assert values["guide"] == {"model": "bad", "weights": "averaged", "weights_sha256": digest}
    assert values["guidance"] == {"scale": 2, "interval": [0.1, 0.9], "variable": "t"}
    assert values["weights_sha256"] == weights_digest(models["good"])
    assert values["options"].keys().isdisjoint(("guide", "guide_weights"))
    with Image.open(out / "000001.png") as picture:
        assert picture.info["guide_sha256"] == digest and picture.info["weights_sha256"] == values["weights_sha256"]
    whole = drawn(out)
    assert call("sample.py", *line, f"guide={moved}", "batch_size=2", cwd=desk).status == 0 and drawn(out) == whole
    assert "guide.weights_sha256 is" in fails(desk, *line, "guide=worse")
    model, guide = models["good"], models["bad"]
    guide.train()
    settings: dict[str, Any] = {"sampler": "ddim", "steps": 3, "guidance_interval": (0.1, 0.9)}
    found = model.sample(3, guidance=2, guide=guide, **settings)
    assert guide.training and not model.training
    guide.eval()
    alone = model.sample(3, **settings)
    assert torch.equal(pictures(out), found) and not torch.equal(found, alone)
    assert torch.equal(model.sample(3, guidance=3, guide=model, **settings), alone)


def test_networks_are_counted_by_image(models: dict[str, ds.Model]) -> None:
    """Heun takes 2 steps - 1; guidance by labels evaluates one network twice."""
    for guided, counts in (
        (models["good"], {"model": 15}),
        (with_guidance(models["good"], 2.0, guide=models["bad"]), {"model": 15, "guide": 15}),
        (with_guidance(models["classes"], {"high": 2}), {"model": 30}),
    ):
        labels = None if guided.recipe.num_classes is None else torch.tensor([0, 1, 2])
        with evaluations(guided) as found:
            list(draw(guided.with_sampler("heun", 3), 3, batch_size=2, labels=labels))
        assert found == counts
        list(draw(guided, 1, labels=labels))
        assert found == counts, "counted while the body runs alone"


def test_labels_go_to_a_guide_that_has_them(models: dict[str, ds.Model]) -> None:
    """And one without answers without; the explicit formula in both cases."""
    model, y = models["classes"], torch.randn(2, 1, 8, 8)
    t, labels = torch.tensor(0.5).double(), torch.tensor([2, 0])
    for name, seen in (("bad_classes", labels), ("bad", None)):
        guide = models[name]
        found = with_guidance(model, 3.0, guide=guide).denoiser.predict_mean(y, t, t / 2, None, labels)
        good = model.denoiser.predict(model.denoiser.process.operator(), y, t.expand(2), None, labels)
        bad = guide.denoiser.predict(model.denoiser.process.operator(), y, t.expand(2), None, seen)
        signal = model.denoiser.process.signal_scale(t / 2, torch.zeros(1, 1).double()).float()
        torch.testing.assert_close(found, signal * (bad + 3 * (good - bad)).clamp(-1, 1))


def test_answers_without_labels_need_a_guide_that_learnt_them(models: dict[str, ds.Model]) -> None:
    """For the likelihood without labels."""
    model = models["classes"]
    for name, dropout in (("bad_classes", 0.1), ("sure_classes", 0.0), ("bad", 0.1)):
        guided = with_guidance(model, 2.0, guide=models[name])
        assert guided.recipe.label_dropout == dropout and isinstance(guided.denoiser, Autoguidance)
    with refused("use_labels=True"):
        conditions(with_guidance(model, 2.0, guide=models["sure_classes"]), use_labels=False)
    assert model.recipe.label_dropout == 0.1


def test_tasks_are_guided_too(desk: Path, tmp_path: Path) -> None:
    """An editing task with a guide and a curve."""
    save_png(tmp_path / "start.png", torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8) * 4)
    line = ("task=vary", "model=good", f"start={tmp_path / 'start.png'}", "from=0.5", *FEW)
    results = []
    for name, more in {"plain": (), "guided": ("guide=bad", "guidance.high=4", "guidance.cutoff=0.2")}.items():
        outcome = call("sample.py", *line, *more, f"out={tmp_path / name}", cwd=desk)
        assert outcome.status == 0, outcome.err
        results.append(pictures(tmp_path / name))
    assert "of the guide" in outcome.out and not torch.equal(*results)


def test_evaluation_draws_the_same_guided_samples(desk: Path, models: dict[str, ds.Model]) -> None:
    line = ["model=good", "guide=bad", "guidance.low=2", "sampler=ddim", "steps=3"]
    config = composed(*tidy(line, curves=CURVES["evaluate"]), name="evaluate")
    config.model, config.guide = str(desk / "good"), str(desk / "bad")
    fake = evaluate.drawn(config, 3, torch.device("cpu"))
    expected = models["good"].sample(3, guidance={"low": 2}, guide=models["bad"], sampler="ddim", steps=3)
    assert torch.equal(torch.cat([*fake.batches(2)]), expected)
    origin, digest = fake.origin(), weights_digest(models["bad"])
    assert origin["guide"] == {"model": str(desk / "bad"), "weights": "averaged", "weights_sha256": digest}
    assert origin["guidance"]["scale"] == weight_settings(ds.LowHigh(2.0))
    assert origin["weights_sha256"] == weights_digest(models["good"])
    assert origin["network_evaluations"] == {"model": 3.0, "guide": 3.0}


def test_a_guide_is_trusted_as_a_model_is(desk: Path, tmp_path: Path) -> None:
    """Its classes of other packages are imported only if they are allowed."""
    own = made(7, network=OwnNetwork(**SMALL))
    own.save(tmp_path / "own")
    line = ("model=good", f"guide={tmp_path / 'own'}", "guidance=2", f"out={tmp_path / 'out'}", *FEW)
    assert f"asks for '{__name__}.OwnNetwork'; a model may only use the classes of dpm_scales" in fails(desk, *line)
    assert not (tmp_path / "out").exists()
    assert call("sample.py", *line, f"allow=[{__name__}]", cwd=desk).status == 0
    settings = yaml.safe_load((tmp_path / "own" / "config.yaml").read_text())
    settings["network"] = {"_target_": "os.system", "command": f"touch {tmp_path / 'pwned'}"}
    (tmp_path / "own" / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "asks for 'os.system'" in fails(desk, *line) and not (tmp_path / "pwned").exists()


GUIDES: dict[str, tuple[Any, str]] = {
    "size": ({"image_size": 12}, "guide: its images are 1x12x12 and the model's 1x8x8"),
    "colours": ({"channels": 3}, "guide: its images are 3x8x8 and the model's 1x8x8"),
    "scales": (
        {"process": ds.VP(num_scales=20)},
        r"guide: its process is not the model's \(num_scales is 20 there and 50 here\)",
    ),
    "value range": (
        {"process": ds.VP(50, value_range=(0, 1))},
        r"\(value_range is \[0, 1\] there and \[-1.0, 1.0\] here",
    ),
    "schedule": ({"process": ds.VP(50, ds.LinearBeta())}, "noise._target_ is 'dpm_scales.schedules.LinearBeta' there"),
    "kind": ({"process": ds.VE(num_scales=50)}, r"\(VE there and VP here\)"),
    "target": ({"target": "velocity"}, "guide: its target is Velocity and the model's Clean"),
    "labels": (CLASSES | {"label_dropout": 0.0}, "guide: it was trained with labels only, and the model has none"),
}


@pytest.mark.parametrize("name", GUIDES)
def test_guides_that_do_not_fit_are_refused(name: str, models: dict[str, ds.Model]) -> None:
    options, words = GUIDES[name]
    with pytest.raises(ds.UserError, match=words) as caught:
        models["good"].sample(1, guidance=2, guide=made(8, **options))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_classes_must_be_those_of_the_model(models: dict[str, ds.Model]) -> None:
    for options, words in (
        ({"num_classes": 4}, "guide: it has 4 classes and the model 3"),
        ({"num_classes": 3, "class_names": ["a", "x", "c"]}, "guide: its class 'x' is 'b' in the model"),
    ):
        with refused(words):
            with_guidance(models["classes"], 2.0, guide=made(9, **options))
    with_guidance(models["good"], 2.0, guide=models["classes"])  # answers without labels


def test_what_a_colour_has_learnt_is_compared() -> None:
    """The constructor's arguments are equal, the spectrum of the training images is not."""

    def colourful(seed: int) -> ds.Model:
        model = made(seed, ds.Spectral(50, ds.CosineLogSNR(), color=ds.DataPower()))
        model.denoiser.process.fit_color(lambda mu: (1 + mu) ** -float(seed))
        return model

    with_guidance(colourful(1), 2.0, guide=colourful(1))
    with refused("color.log_power, measured from the training images, differs"):
        with_guidance(colourful(1), 2.0, guide=colourful(2))


REFUSED = {
    "model=good guide=bad": "guide=bad has no effect with guidance=1; set more, guidance=2, or leave it out",
    "model=good guide=bad guidance=2 guide_weights=raw": "raw weights are in checkpoints only",
    "model=good guide_weights=raw": "guide_weights=raw is of a guide; give guide=MODEL",
    "model=good guide=nowhere guidance=2": "no model at nowhere: no such file or folder",
    "model=good guide=classes guidance=2 guide=": "guide is empty",
    "model=good guidance.high=2": "needs labels, and this model was trained without; drop guidance=, or give a worse",
    "model=classes guidance.hi=2": "unknown option 'guidance.hi': did you mean 'guidance.high'",
    "model=classes guidance.low=nan": "guidance.low must be a number >= 0 and <= 1e.30, got nan",
}


@pytest.mark.parametrize("command", REFUSED)
def test_mistakes_end_with_one_line(command: str, desk: Path) -> None:
    line = fails(desk, *command.split(), "out=out")
    assert re.search(REFUSED[command], line), line
    assert not (desk / "out").exists()


WEIGHTS: list[tuple[Any, str]] = [
    ({"high": -1}, "guidance.high must be a number >= 0 and <= 1e+30, got -1"),
    ({"weights": [1, 2], "low": 1}, "guidance.weights and guidance.low belong to different curves"),
    ({"weights": [1, 2], "frequencies": [0]}, "2 weights and 1 frequencies; give one frequency for each weight"),
    ([1, 2], "guidance must be a number >= 0 and <= 1e+30, or one by frequency, {low: 1, high: 3}"),
    ("much", "got 'much'"),
    (None, "got None"),
    (True, "guidance must be a number >= 0 and <= 1e+30, got True"),
    (float("inf"), "guidance must be a number >= 0 and <= 1e+30, got inf"),
    (-1, "guidance must be a number >= 0 and <= 1e+30, got -1"),
    ({}, "guidance is empty; give a number or some of guidance.low"),
    ({1: 2}, "unknown option 'guidance.1'"),
    ({"_target_": "dpm_scales.samplers.DDIM"}, "makes no GuidanceCurve; name a class derived from"),
    ({"_target_": "dpm_scales.guidance.LowHigh", "hi": 1}, "unknown option 'guidance.hi': did you mean"),
    ({"_target_": f"{__name__}.Edge", "weight": -3.0}, "Edge has the weight -3 at 0.21 cycles per pixel"),
]


def test_weights_that_cannot_be_meant(models: dict[str, ds.Model]) -> None:
    for value, words in WEIGHTS:
        with refused(words):
            guidance_weight(value)
    with refused("needs a model trained with and without labels"):
        with_guidance(models["sure_classes"], {"high": 2})
    with refused("guide has no effect with guidance=1"):
        with_guidance(models["good"], {"high": 1}, guide=models["bad"])


def test_a_guide_is_no_option_of_images(desk: Path) -> None:
    line = fails(desk, "samples=good", "reference=good", "guide=bad", script="evaluate.py")
    assert "guide is for sampling a model, and samples=good are there already" in line
    assert "unknown option 'guidance'" in fails(desk, "guidance.low=2", script="train.py")
    with refused("guide must be a model, ds.load(PATH), got 'bad'"):
        ds.load(desk / "good").sample(1, guidance=2, guide="bad")  # type: ignore[arg-type]


# --- curves -----------------------------------------------------------------------------------------------------------


def test_a_curve_from_the_command_line_is_that_of_python(
    desk: Path, models: dict[str, ds.Model], tmp_path: Path
) -> None:
    """The record has the class with its defaults, so that one form resumes another."""
    line = ("model=classes", f"out={tmp_path / 'out'}", "labels=0,1,2", *FEW)
    curve = ("guidance.high=4", "guidance.cutoff=0.2")
    outcome = call("sample.py", *line, *curve, cwd=desk)
    assert outcome.status == 0 and outcome.out.endswith(", evaluations an image: 6 of the model\n")
    settings: dict[str, Any] = {"sampler": "ddim", "steps": 3, "labels": [0, 1, 2]}
    found, number = (models["classes"].sample(3, guidance=w, **settings) for w in (ds.LowHigh(1, 4, 0.2), 4))
    assert torch.equal(pictures(tmp_path / "out"), found) and not torch.equal(found, number)
    assert record(tmp_path / "out")["guidance"]["scale"] == weight_settings(ds.LowHigh(1.0, 4.0, 0.2))
    assert "guidance.scale.cutoff is 0.2 there and 0.1 here" in fails(desk, *line, "guidance.high=4")


def test_every_form_of_a_curve_is_recorded_alike() -> None:
    here = f"{__name__}.Edge"
    step: dict[str, Any] = {"_target_": "dpm_scales.guidance.LowHigh", "low": 1, "high": 4, "cutoff": 0.2}
    listed = {"_target_": "dpm_scales.guidance.ListedGuidance", "weights": [1, 4], "frequencies": None}
    for options, expected in (
        (["guidance.high=4", "guidance.cutoff=0.2"], step | {"sharpness": 4}),
        (["guidance={low:1.0,high:4,cutoff:0.2}"], step | {"sharpness": 4}),
        (["guidance={high:4}", "guidance.cutoff=0.2"], step | {"sharpness": 4}),
        (["guidance.weights=[1,4]"], listed),
        ([f"guidance={{_target_:{here},weight:5.0}}"], {"_target_": here, "weight": 5.0, "beyond": 0.2}),
        ([f"guidance={{_target_:{here}}}", "guidance.beyond=0.3"], {"_target_": here, "weight": 3.0, "beyond": 0.3}),
        (["guidance.low=3", "guidance.high=3"], 3.0),
        (["guidance=3"], 3),
    ):
        config = composed(*tidy(options, curves=CURVES["sample"]), name="sample")
        settings = guidance_settings(config)
        assert settings is not None and settings["scale"] == expected, options
    for options in ("guidance=1", "++guidance.high=1", "++guidance.weights=[1,1]"):
        assert guidance_settings(composed(options, name="sample")) is None
    model = small_model()
    assert with_guidance(model, {"cutoff": 0.2}) is model


def test_options_of_curves_are_those_of_their_classes() -> None:
    """In the table that completion and the command line read; a later number replaces a curve."""
    defaults = {
        name: parameter.default for kind in KINDS for name, parameter in inspect.signature(kind).parameters.items()
    }
    for command in ("sample", "evaluate"):
        listed = CURVES[command]["guidance"]
        assert listed.keys() == defaults.keys()
        assert all(float(text) == defaults[name] for name, text in listed.items() if text)
        found = candidates(command, (), "guidance.")
        assert sorted(found) == sorted(f"guidance.{name}=" for name in defaults)
        assert candidates(command, (), "guidance.cut") == ["guidance.cutoff="]
        assert candidates(command, (), "guidance.cutoff=") == ["guidance.cutoff=0.1 "]
        assert candidates(command, (), "guid") == ["guidance.", *(f"guid{end}" for end in ENDS)]
    assert tidy(["guidance.low=2"], curves=("guidance",)) == ["++guidance.low=2"]
    assert tidy(["guidance.low=2"]) == ["guidance.low=2"]
    options = tidy(["guidance={low:2}", "guidance.high=3"], curves=("guidance",))
    assert dict(composed(*options, name="sample").guidance) == {"low": 2, "high": 3}
    assert composed("++guidance.low=2", "guidance=3", name="sample").guidance == 3


ENDS = ("ance=", "ance_interval=", "ance_variable=", "e=", "e_ema=", "e_ema_step=", "e_weights=")


def test_the_recipe_of_a_guided_model_is_that_of_the_model(models: dict[str, ds.Model]) -> None:
    model = models["good"]
    guided = with_guidance(model, 2.0, guide=models["bad"])
    assert guided.recipe == replace(model.recipe) and weights_digest(guided) == weights_digest(model)
