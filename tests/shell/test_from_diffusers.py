"""Pipelines of diffusers as models: equal step by step in float64, saved, loaded and sampled like any model."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dpm_scales.errors import UserError
from dpm_scales.models import draw, load_model, save_model
from dpm_scales.models.from_diffusers import SCHEDULERS
from dpm_scales.samplers import DDIM, Ancestral, DPMSolver, UniPC
from support.diffusers_folders import SIZE, betas, draws, edit, in_float64, recorded, steps_of, unet, write
from support.shell import call

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
SHAPE = (2, 3, *SIZE)
CONFIG, WEIGHTS = "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("diffusers") / "pipeline", diffusers.DDPMScheduler(10))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "pipeline"))


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor], steps: int) -> None:
    assert len(ours) == len(theirs) == steps
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.float64
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


# --- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddpm_pipeline_step_by_step(prediction: str, variance: str, clip: bool, tmp_path: Path) -> None:
    _ddpm(tmp_path, 12, 12, prediction_type=prediction, variance_type=variance, clip_sample=clip)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_pipeline_with_every_schedule(schedule: str, tmp_path: Path) -> None:
    _ddpm(tmp_path, 25, 25, beta_schedule=schedule, beta_start=0.002, beta_end=0.1)
    _ddpm(tmp_path, 1000, 10, beta_schedule=schedule, timestep_spacing="trailing")


def _ddpm(tmp_path: Path, scales: int, steps: int, **options: Any) -> None:
    shutil.rmtree(tmp_path / "p", ignore_errors=True)
    scheduler = diffusers.DDPMScheduler(scales, **options)
    write(tmp_path / "p", scheduler)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "p")
    pipeline.unet.double()
    ends = {key: value for key, value in (("first", "beta_start"), ("last", "beta_end")) if value in options}
    variances = betas(
        options.get("beta_schedule", "linear"), scales, **{key: options[value] for key, value in ends.items()}
    )
    # the table of diffusers' own, up to its float32
    torch.testing.assert_close(scheduler.betas.double(), torch.from_numpy(variances), atol=1e-7, rtol=2e-5)
    in_float64(pipeline.scheduler, variances)
    theirs = recorded(pipeline, num_inference_steps=steps, generator=torch.Generator().manual_seed(3))
    model = load_model(tmp_path / "p")
    assert isinstance(model.sampler, Ancestral) and model.denoiser.process.num_scales == scales
    same(steps_of(model, draws(3, steps, SHAPE), steps), theirs, steps)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_pipeline_step_by_step(eta: float, prediction: str, clip: bool, tmp_path: Path) -> None:
    """Where the estimate is clipped, the noise is recomputed from it (`use_clipped_model_output`)."""
    options = {"prediction_type": prediction, "clip_sample": clip, "timestep_spacing": "trailing"}
    write(tmp_path / "p", diffusers.DDIMScheduler(num_train_timesteps=100, **options), pipeline="DDIMPipeline")
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "p")
    pipeline.unet.double()
    in_float64(pipeline.scheduler, betas("linear", 100))
    seeded = torch.Generator().manual_seed(3)
    theirs = recorded(pipeline, num_inference_steps=20, eta=eta, use_clipped_model_output=True, generator=seeded)
    model = load_model(tmp_path / "p")
    assert isinstance(model.sampler, DDIM) and model.sampler.eta == 0 and model.sampler.steps == 50
    model.sampler = DDIM(eta)
    # diffusers draws noise at its last step too, where it adds none of it
    same(steps_of(model, draws(3, 20 if eta else 1, SHAPE), 20), theirs, 20)


def test_score_sde_ve_pipeline_step_by_step(tmp_path: Path) -> None:
    """Its predictor; the corrector is not part of it. Its grid ends at sampling_eps, ours at the first scale."""
    scheduler = diffusers.ScoreSdeVeScheduler(12, sigma_min=0.01, sigma_max=50.0, sampling_eps=1e-12, correct_steps=0)
    network = unet(
        time_embedding_type="fourier", center_input_sample=True, sample_size=8, in_channels=3, out_channels=3
    )
    write(tmp_path / "p", scheduler, network, "ScoreSdeVePipeline")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load_model(tmp_path / "p")
    write(tmp_path / "corrected", diffusers.ScoreSdeVeScheduler(12, correct_steps=2), network, "ScoreSdeVePipeline")
    with pytest.warns(UserWarning, match="correct_steps=2 is left out: samplers here take the predictor's steps"):
        load_model(tmp_path / "corrected")
    process = model.denoiser.process
    assert process.value_range == (0.0, 1.0)
    levels = torch.from_numpy(0.01 * (50.0 / 0.01) ** (torch.arange(12).numpy() / 11))
    k = torch.arange(1, 13, dtype=torch.float64) / 12
    torch.testing.assert_close(process.noise_scale(k, torch.zeros(1).double()).flatten(), levels, rtol=1e-12, atol=0)
    torch.testing.assert_close(scheduler.discrete_sigmas.double(), levels, rtol=1e-5, atol=0)
    scheduler.discrete_sigmas = levels
    noise = draws(5, 13, (2, 3, 8, 8))
    x, theirs = 50.0 * noise[0], []
    network.double()
    for i in range(12):
        with torch.no_grad():
            output = network(x, levels[11 - i].expand(2)).sample
        seeded = torch.Generator().manual_seed(i)
        noise[i + 1] = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        # it takes the floor of the time step, which must not fall below 11 - i by rounding
        result = scheduler.step_pred(output, torch.tensor((11 - i + 1e-3) / 11).double(), x, generator=seeded)
        x = result.prev_sample
        theirs.append(result.prev_sample_mean if i == 11 else x)
    ours = steps_of(model, [50.0 * noise[0], *noise[1:12]], 12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("embedding", ["positional", "learned"])
def test_labels_and_time_steps_reach_the_network(embedding: str, tmp_path: Path) -> None:
    network = unet(num_class_embeds=3, time_embedding_type=embedding, num_train_timesteps=10)
    write(tmp_path / "p", diffusers.DDPMScheduler(10), network)
    model = load_model(tmp_path / "p")
    assert model.recipe.num_classes == 3 and model.recipe.image_size == SIZE
    x, labels = torch.randn(SHAPE), torch.tensor([2, 0])
    with torch.no_grad():
        for i in range(10):
            theirs = network(x, torch.tensor([i, 9 - i]), labels).sample
            t = torch.tensor([i + 1, 10 - i]) / 10
            torch.testing.assert_close(model.denoiser.network(x, t, labels), theirs, atol=0, rtol=0)
        with pytest.raises(UserError, match="trained with labels only"):
            model.denoiser.network(x, t)
    assert next(draw(model, num_samples=3, seed=0, labels=torch.arange(3))).shape == (3, 3, *SIZE)


def test_a_scale_between_two_steps_is_a_fraction(folder: Path) -> None:
    model, network = load_model(folder), unet()
    x = torch.randn(SHAPE)
    with torch.no_grad():
        theirs = network(x, torch.tensor([3.5, 3.5])).sample
        torch.testing.assert_close(model.denoiser.network(x, torch.full((2,), 0.45)), theirs, atol=1e-5, rtol=1e-5)


# --- what is made of a folder -----------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[[], Any]] = {
    "PNDMScheduler": lambda: diffusers.PNDMScheduler(30),
    "DDPMParallelScheduler": lambda: diffusers.DDPMParallelScheduler(30),
    "DDIMParallelScheduler": lambda: diffusers.DDIMParallelScheduler(30, beta_schedule="squaredcos_cap_v2"),
    "DPMSolverMultistepScheduler": lambda: diffusers.DPMSolverMultistepScheduler(
        30, algorithm_type="sde-dpmsolver++", solver_order=1, trained_betas=[0.01] * 30
    ),
    "UniPCMultistepScheduler": lambda: diffusers.UniPCMultistepScheduler(30, solver_order=3, thresholding=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_schedulers_give_the_same_law_and_a_sampler_of_their_kind(name: str, tmp_path: Path) -> None:
    scheduler = OTHERS[name]()
    network = unet()
    network.save_pretrained(tmp_path / "m")
    scheduler.save_pretrained(tmp_path / "m")  # a bare model with its scheduler in one folder
    model = load_model(tmp_path / "m")
    k = torch.arange(1, 31, dtype=torch.float64) / 30
    signal = model.denoiser.process.signal_scale(k, torch.zeros(1).double()).flatten()
    torch.testing.assert_close(signal**2, scheduler.alphas_cumprod.double(), rtol=1e-5, atol=1e-8)
    kinds = {"PNDM": DPMSolver, "DDPM": Ancestral, "DDIM": DDIM, "DPMS": DPMSolver, "UniP": UniPC}
    sampler: Any = model.sampler
    assert type(sampler) is kinds[name[:4]]
    if name.startswith("DPMS"):
        assert (sampler.eta, sampler.order) == (1.0, 1)
    if name.startswith("UniP"):
        assert sampler.order == 3 and model.denoiser.target.clip  # type: ignore[attr-defined]
    assert next(draw(model, num_samples=1, seed=0)).shape == (1, 3, *SIZE)


def test_every_scheduler_is_tested() -> None:
    assert {*OTHERS, "DDPMScheduler", "DDIMScheduler", "ScoreSdeVeScheduler"} == set(SCHEDULERS)


def test_it_is_saved_loaded_and_sampled_like_any_model(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    save_model(tmp_path / "model", model)
    again = load_model(tmp_path / "model")
    assert torch.equal(next(draw(model, num_samples=2, seed=1)), next(draw(again, num_samples=2, seed=1)))
    names = {node for node in str(yaml.safe_load((tmp_path / "model/config.yaml").read_text())).split("'")}
    assert "dpm_scales.networks.DiffusersUNet" in names and not any(name.startswith("diffusers") for name in names)
    for sampler in ("heun", "dpmpp", "unipc", "ddim"):
        chosen = (f"sampler={sampler}", "steps=3", "num_samples=2", f"out={tmp_path / sampler}")
        outcome = call("sample.py", f"model={folder}", *chosen, cwd=tmp_path)
        assert outcome.status == 0 and (tmp_path / sampler / "grid.png").is_file(), outcome.err


def test_old_names_and_half_precision_are_read(copied: Path) -> None:
    """diffusers before 0.15 named the attention's layers differently."""
    path, expected = copied / WEIGHTS, load_model(copied)
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, value in load_file(path).items():
        for now, before in names.items():
            name = name.replace(now, before)
        old[name] = value
    assert sum(".query." in name for name in old) > 2
    save_file(old, path)
    for name, value in load_model(copied).state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
    save_file({name: value.half() for name, value in old.items()}, path)
    for name, value in load_model(copied).state_dict().items():
        wanted = expected.state_dict()[name]
        assert value.dtype == wanted.dtype
        torch.testing.assert_close(value, wanted, atol=2e-3, rtol=2e-3)


def test_an_unknown_option_of_the_network_is_mentioned(copied: Path) -> None:
    edit(copied / "unet/config.json", num_head_channels=4)
    with pytest.warns(UserWarning, match="UNet2DModel ignores num_head_channels"):
        load_model(copied)
