"""Models exported to diffusers: its pipelines load them and draw the same images from the same noise; or a refusal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.models import Model, Recipe, build_model, export_diffusers, load_model
from dpm_scales.samplers import DDIM, Ancestral
from dpm_scales.schedules import PowerLaw
from support.diffusers_folders import UNET, draws, in_float64, recorded, steps_of
from support.oracles import refused
from support.shell import call, files

FOURIER = {**UNET, "time_embedding_type": "fourier"}
NOISE = {"_target_": "Noise", "scale_input": False}
LINEAR = {"_target_": "LinearBeta", "ddpm_beta_min": 0.002, "ddpm_beta_max": 0.1}
GEOMETRIC = {"_target_": "GeometricNoise", "noise_min": 0.02, "noise_max": 30.0}
VP = {"_target_": "VP", "num_scales": 25, "noise": LINEAR}
VE = {"_target_": "VE", "num_scales": 25, "noise": GEOMETRIC, "value_range": [0.0, 1.0]}
NETWORK = {"_target_": "DiffusersUNet", "unet": UNET, "num_scales": 25}
LEVELS = {**NETWORK, "unet": FOURIER, "noise_levels": [0.02, 30.0]}


def full(settings: dict[str, Any], room: str) -> dict[str, Any]:
    """Return a config with full names of its classes."""
    inner = {key: full(value, "schedules") if key in ("noise", "blur") else value for key, value in settings.items()}
    return {**inner, "_target_": f"dpm_scales.{room}.{settings['_target_']}"}


def model(
    process: dict[str, Any] = VP,
    target: dict[str, Any] = NOISE,
    network: dict[str, Any] = NETWORK,
    sampler: dict[str, Any] | None = None,
    channels: int = 3,
    size: tuple[int, int] = (8, 16),
    num_classes: int | None = None,
) -> Model:
    """Build a model with random weights everywhere."""
    parts = {
        "process": full(process, "processes"),
        "target": full(target, "targets"),
        "network": full(network, "networks"),
        "prior": {"_target_": "dpm_scales.priors.GaussianPrior"},
        "sampler": full(sampler or {"_target_": "Ancestral"}, "samplers"),
    }
    torch.manual_seed(0)
    built = build_model(Recipe(parts, channels, size, num_classes))
    with torch.no_grad():
        for parameter in built.denoiser.network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    built.denoiser.eval()
    return built


def pipeline_of(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def worst(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    assert len(ours) == len(theirs) > 0
    return max(float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(ours, theirs, strict=True))


# --- equality ---------------------------------------------------------------------------------------------------------

TARGETS: dict[str, dict[str, Any]] = {
    "epsilon": NOISE,
    "clipped": {**NOISE, "clip": True},
    "sample": {"_target_": "Clean", "preconditioning": "none", "scale_input": False},
    "v_prediction": {"_target_": "Velocity", "scale_input": False},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "cosine": {"_target_": "CosineLogSNR", "logsnr_min": -6.0, "logsnr_max": 6.0},
    "sigmoid": {"_target_": "SigmoidSignal", "minimum": 1e-3},
    "constant": {"_target_": "ConstantBeta", "beta": 0.3},
}


def variances(name: str) -> np.ndarray:
    """Return 1 - (a_k / a_(k-1))^2 of the schedules above, written from their formulas."""
    t = np.arange(26) / 25
    if name == "linear":
        return np.linspace(0.002, 0.1, 25)
    if name == "constant":
        return np.full(25, 0.09)
    if name == "cosine":
        start, end = (np.arctan(np.exp(-0.5 * level)) for level in (6.0, -6.0))
        squares = np.cos(start + t * (end - start)) ** 2
    else:
        s = [1 / (1 + np.exp(-x)) for x in (-3, 3, -3 + 6 * t)]
        squares = ((s[1] - s[2]) / (s[1] - s[0])).clip(1e-3, 1 - 1e-3)
    squares[0] = 1
    return 1 - squares[1:] / squares[:-1]


@pytest.mark.parametrize(
    "sampler", [Ancestral(), Ancestral(variance="transition"), DDIM(steps=25)], ids=["a", "large", "ddim"]
)
@pytest.mark.parametrize("target", TARGETS)
def test_the_pipeline_draws_the_same_steps(target: str, sampler: Any, tmp_path: Path) -> None:
    _same(tmp_path, sampler, "linear", TARGETS[target], 25)
    if getattr(sampler, "variance", None) is None:  # diffusers adds the larger noise to the last image too
        _same(tmp_path, sampler, "linear", TARGETS[target], 5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_of_every_schedule(schedule: str, tmp_path: Path) -> None:
    _same(tmp_path, Ancestral(), schedule, NOISE, 25)


def _same(folder: Path, sampler: Any, schedule: str, target: dict[str, Any], steps: int) -> None:
    chosen = model({**VP, "noise": SCHEDULES[schedule]}, target)
    chosen.sampler = sampler
    export_diffusers(chosen, folder)
    pipeline = pipeline_of(folder)
    deterministic = isinstance(sampler, DDIM) and not isinstance(sampler, Ancestral)
    assert type(pipeline).__name__ == ("DDIMPipeline" if deterministic else "DDPMPipeline")
    pipeline.unet.double()
    # diffusers' tables are the listed betas in float32: once as they are, once in float64
    single, options = pipeline.scheduler.betas.double().numpy(), {"num_inference_steps": steps}
    np.testing.assert_allclose(single, variances(schedule), rtol=1e-6)
    in_float64(pipeline.scheduler, variances(schedule))
    if deterministic:
        options |= {"use_clipped_model_output": True}
    theirs = recorded(pipeline, generator=torch.Generator().manual_seed(4), **options)
    noise = draws(4, 1 if deterministic else steps, (2, 3, 8, 16))
    assert worst(steps_of(chosen, noise, steps), theirs) < 1e-9


def test_images_of_the_unchanged_pipeline_are_ours(tmp_path: Path) -> None:
    """With its tables of single precision."""
    chosen = model()
    export_diffusers(chosen, tmp_path)
    pipeline = pipeline_of(tmp_path)
    pipeline.unet.double()
    images = pipeline(
        batch_size=2, output_type="np", num_inference_steps=25, generator=torch.Generator().manual_seed(4)
    )
    ours = steps_of(chosen, draws(4, 25, (2, 3, 8, 16)), 25)[-1]
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert float((ours - torch.from_numpy(images.images)).abs().max()) < 1e-4


def test_score_sde_ve(tmp_path: Path) -> None:
    """Its noise levels end at sampling_eps = 1e-5 in place of 0, and are of single precision."""
    chosen = model(VE, NOISE, LEVELS, {"_target_": "Ancestral", "variance": "transition"}, size=(8, 8))
    export_diffusers(chosen, tmp_path)
    pipeline = pipeline_of(tmp_path)
    assert type(pipeline).__name__ == "ScoreSdeVePipeline"
    scheduler = pipeline.scheduler
    scheduler.set_sigmas(25)
    shape, noise = (2, 3, 8, 8), draws(4, 25, (2, 3, 8, 8))
    x, theirs = 30.0 * noise[0].float(), []
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            output = pipeline.unet(x, scheduler.sigmas[i].expand(2)).sample
        place = torch.Generator().manual_seed(i)
        if i:
            noise[i] = torch.randn(shape, generator=torch.Generator().manual_seed(i - 1)).double()
        result = scheduler.step_pred(output, t, x, generator=place)
        x = result.prev_sample
        theirs.append((result.prev_sample_mean if i == 24 else x).double())
    ours = steps_of(chosen, [30.0 * noise[0], *noise[1:]], 25)
    assert worst(ours, theirs) < 1e-3


def test_there_and_back(tmp_path: Path) -> None:
    chosen = model(target=TARGETS["v_prediction"])
    export_diffusers(chosen, tmp_path)
    again = load_model(tmp_path)
    noise = draws(1, 25, (2, 3, 8, 16))
    # betas are written with all digits
    assert worst(steps_of(again, noise, 25), steps_of(chosen, noise, 25)) < 1e-12
    assert again.recipe.image_size == (8, 16)
    ve = model(VE, NOISE, LEVELS, size=(8, 8))
    export_diffusers(ve, tmp_path)
    again = load_model(tmp_path)
    noise = [30 * draw for draw in draws(1, 25, (2, 3, 8, 8))]
    again.sampler = ve.sampler
    assert worst(steps_of(again, noise, 25), steps_of(ve, noise, 25)) < 1e-12


def test_a_sampler_with_a_color_has_no_equal_there(tmp_path: Path) -> None:
    chosen = model(target=TARGETS["v_prediction"])
    for color, pipeline in ((None, "DDPMPipeline"), (PowerLaw(0.3), "DDIMPipeline")):
        chosen.sampler = Ancestral(noise_color=color)
        export_diffusers(chosen, tmp_path)
        assert type(pipeline_of(tmp_path)).__name__ == pipeline


def test_a_trained_run_is_exported(tmp_path: Path) -> None:
    network = [f"network.unet.{key}={json.dumps(value).replace(chr(34), '')}" for key, value in UNET.items()]
    model_options = ("process.num_scales=20", "target=noise", "target.scale_input=false", "sampler=ddim")
    network.append("network.unet.attention_head_dim=8")
    short = ("trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.limit_val_batches=1", "data.batch_size=8")
    options = ("network=diffusers_unet", *network, *model_options, *short, "sampler.steps=3", "samples.num_images=4")
    outcome = call("train.py", *options, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    export_diffusers(load_model(tmp_path / "run"), tmp_path / "out")
    drawn = pipeline_of(tmp_path / "out")(batch_size=1, num_inference_steps=3, output_type="np").images
    assert drawn.shape == (1, 8, 8, 1) and drawn.std() > 0
    assert sorted(files(tmp_path / "out")) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]


# --- refused ----------------------------------------------------------------------------------------------------------

HEAT = {"_target_": "Blurring", "num_scales": 25}
COLORED = {"_target_": "VP", "num_scales": 25, "color": {"_target_": "dpm_scales.schedules.PowerLaw"}}
OWN = {"_target_": "UNet", "widths": [8], "blocks_per_level": 1, "attention_levels": [], "embedding_dim": 8}
NEXT = {"_target_": "NextScale"}
REFUSED: dict[str, tuple[dict[str, Any], str | None, tuple[str, ...]]] = {
    "network": ({"network": OWN}, None, ("its network is UNet", "network=diffusers_unet")),
    "blur": ({"process": HEAT, "target": NOISE}, None, ("its process is Blurring", "vp and ve")),
    "colour": ({"process": COLORED}, None, ("its noise has a colour",)),
    "labels": ({"num_classes": 3}, None, ("it takes labels",)),
    "scales": ({"network": {**NETWORK, "num_scales": 9}}, None, ("network.num_scales=9", "process.num_scales=25")),
    "target": ({"target": NEXT}, None, ("no name for the target NextScale",)),
    "scaled": ({"target": {"_target_": "Noise"}}, None, ("sees a scaled image", "target.scale_input=false")),
    "edm": ({"target": {"_target_": "Clean"}}, None, ("target.preconditioning=none target.scale_input=false",)),
    "range": ({"process": {**VP, "value_range": [0.0, 1.0]}}, None, ("[0.0, 1.0]", "[-1, 1]")),
    "kind": ({}, "heun", ("unknown kind 'heun'", "ddim, ddpm")),
    "kind of ve": ({"process": VE, "network": LEVELS}, "ddim", ("kind=ddim", "VE is none")),
    "clip of ve": ({"process": VE, "network": LEVELS, "target": {**NOISE, "clip": True}}, None, ("target.clip=false",)),
    "time steps of ve": ({"process": VE}, None, ("network.noise_levels", "time_embedding_type=fourier")),
    "levels of ve": (
        {"process": {**VE, "noise": {"_target_": "EDMNoise"}}, "network": LEVELS},
        None,
        ("not log-spaced from 0.02 to 30", "process/noise=geometric"),
    ),
    "range of ve": (
        {"process": {**VE, "value_range": [-1.0, 1.0]}, "network": LEVELS},
        None,
        ("[-1.0, 1.0]", "[0, 1]"),
    ),
    "shape of ve": ({"process": VE, "network": LEVELS}, None, ("square RGB", "8x16")),
    "no noise in a step": (
        {"process": {**VP, "noise": {"_target_": "ListedBeta", "betas": [0.1] * 24 + [0.0]}}},
        None,
        ("adds no noise",),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_before_anything_is_written(name: str, tmp_path: Path) -> None:
    arguments, kind, words = REFUSED[name]
    chosen = model(**arguments)
    with refused(*words):
        export_diffusers(chosen, tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    chosen = model()
    next(chosen.denoiser.network.parameters()).data.flatten()[3] = float("nan")
    with refused("not finite"):
        export_diffusers(chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()
