"""Spectral members through the commands: training, sampling, likelihood, editing, and one line for what can't be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpm_scales.images import load_image
from support.evaluate_helpers import Means, noise_images, small_features
from support.shell import FAST, attempt, call, files, sample, train

SHORT = ("process.num_scales=4", "sampler.steps=null", *FAST)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("process=rectified", "target=flow", "scale_sampling=logit_normal"),
        ("process=rectified", "target=clean", "weight=flow", "process/color=listed", "process.color.weights=[1,2,3]"),
        ("process=vp", "process/color=spectrum", "target.preconditioning=spectral"),
        ("process=osmosis_diffusion", "process/color=low_pass", "target=velocity"),
        ("process=osmosis_diffusion", "process/noise=rectified", "process/blur=flow", "target=flow"),
        ("process=clocked", "process.clock.spread=3"),
    ],
    ids=lambda options: "-".join(option.partition("=")[2] for option in options[:2]),
)
def test_members_go_the_whole_way(options: tuple[str, ...], tmp_path: Path) -> None:
    run_dir = train(tmp_path / "run", *options, *SHORT, "trainer.max_steps=2")
    once, again = (
        sample(run_dir, tmp_path / name, "num_samples=2", "sampler=dpmpp", "sampler.steps=3") for name in "ab"
    )
    assert files(once)["000000.png"] == files(again)["000000.png"]
    assert load_image(once / "000000.png").shape == (1, 8, 8)
    ancestral = sample(run_dir, tmp_path / "c", "num_samples=2", "sampler=ancestral")
    assert files(ancestral)["000000.png"] != files(once)["000000.png"]
    ends = (f"start={once}/000000.png", f"end={once}/000001.png")
    task = (f"model={run_dir}", "task=interpolate", *ends, "frames=3", f"out={tmp_path / 'd'}")
    if "process=clocked" in options:
        outcome = call("sample.py", *task, "steps=3", cwd=tmp_path)
        assert outcome.status == 2 and "clock" in outcome.err and "through=noise" in outcome.err
        task = (*task, "through=noise")
    else:
        task = (*task, "steps=3")
    assert call("sample.py", *task, cwd=tmp_path).status == 0
    edited = tmp_path / "d"
    assert len(list(edited.glob("0*.png"))) == 3


@pytest.mark.slow
def test_a_colored_member_is_evaluated_and_inpaints(tmp_path: Path) -> None:
    """Its samples and its bits per dimension, and an image that keeps the pixels given, to the byte."""
    options = ("process=rectified", "process/color=power_law", "target=flow")
    run_dir = train(tmp_path / "run", *options, *SHORT, "trainer.max_steps=2")
    reference = noise_images(tmp_path / "reference", 6, 0)
    judged = (f"model={run_dir}", f"reference={reference}", "likelihood=flow", "likelihood_scales=3")
    with small_features(Means()):
        outcome = call("evaluate.py", *judged, "cache=false", f"out={tmp_path / 'judged'}", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert math.isfinite(found["likelihood"]["bits"]) and math.isfinite(found["figures"]["FD-means"]["value"]), found
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:6, 3:7] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    image = reference / "000000.png"
    task = (f"model={run_dir}", "task=inpaint", f"image={image}", "mask=mask.png", "num_samples=2", "steps=3")
    outcome = call("sample.py", *task, f"out={tmp_path / 'e'}", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    given, drawn = (load_image(path)[0].numpy() for path in (image, tmp_path / "e" / "000000.png"))
    assert (given == drawn)[mask == 0].all() and (given != drawn)[mask > 0].any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("process=vp", "process/color=spectrum", "process.color.exponent=80"), ("DataPower", "lower its exponent")),
        (("process=vp", "process/color=power_law", "process.color.exponent=80"), ("PowerLaw", "exponent")),
        (("process=vp", "process/color=listed", "process.color.weights=[1]"), ("weights", "two or more")),
        (("process=vp", "process/color=listed", "process.color.frequencies=[0.1]"), ("2 weights", "1 frequencies")),
        (("process=vp", "process/color=pink"), ("process/color", "pink")),
        (("process=clocked", "process.clock.spread=-1"), ("spread", ">= 0")),
        (("process=clocked", "target=flow"), ("flow", "do not change")),
        (
            ("process=osmosis_diffusion", "process/clock=spectral"),
            ("takes no process/clock", "process/color", "leave it out"),
        ),
        (
            ("process=inverse_osmosis", "process/clock=spectral"),
            ("takes no process/clock", "process/color", "leave it out"),
        ),
        (
            ("process=blurring", "process/noise=rectified"),
            ("for Rectified", "rectified, ve, heat or osmosis_diffusion"),
        ),
        (
            ("process=inverse_osmosis", "process/noise=rectified", "process/blur=flow", "target=flow"),
            ("flow target divides", "use target=clean"),
        ),
        (("process=heat", "target=flow"), ("flow", "do not change")),
        (("process=heat", "scale_sampling=logsnr"), ("logsnr", "noise that grows")),
        (("scale_sampling=logit_normal", "scale_std=0"), ("scale_std", "> 0")),
        (("scale_mean=1",), ("scale_mean", "uniform")),
        (("process=cut_off", "process.min_decay=0"), ("CutOff", "min_decay")),
        (("process=warm", "process.blur_ratio=-1"), ("ratio", ">= 0")),
    ],
)
def test_what_can_not_be_is_one_line(options: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    outcome = attempt(tmp_path / "run", *options)
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
    assert all(word in outcome.err for word in words), outcome.err
    assert not (tmp_path / "run").exists()
