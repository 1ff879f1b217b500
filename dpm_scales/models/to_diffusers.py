"""Write a model as a folder that diffusers loads: ``DiffusionPipeline.from_pretrained(folder)``.

Only what diffusers also has can be written: a network `DiffusersUNet`, without blur, as DDPMPipeline or DDIMPipeline
(variance preserving) or ScoreSdeVePipeline (variance exploding). With the same noise these give the images of the
ancestral sampler and of DDIM, up to the float32 of diffusers' tables; our grid is their `timestep_spacing="trailing"`.
Where estimates are clipped, DDIMPipeline needs `use_clipped_model_output=True`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpm_scales.errors import require, require_choice
from dpm_scales.models.base import Parts
from dpm_scales.models.weights_fit import not_finite
from dpm_scales.networks import DiffusersUNet
from dpm_scales.processes import Process
from dpm_scales.samplers import Ancestral
from dpm_scales.samplers.grids import tables_of
from dpm_scales.storage import write_bytes
from dpm_scales.targets import Clean, Noise, Velocity

KINDS = ("ddpm", "ddim")
PREDICTIONS: dict[type, str] = {Noise: "epsilon", Clean: "sample", Velocity: "v_prediction"}
"""Targets with diffusers' names; see `from_diffusers.TARGETS`."""
_NO = "can't be exported to diffusers"
_CLOSE = 1e-6


def export_diffusers(model: Parts, folder: str | Path, kind: str | None = None) -> None:
    """Write `model_index.json`, `unet/` and `scheduler/` into `folder`, each file atomically.

    Args:
        kind: pipeline of a variance-preserving model: "ddpm" (stochastic) or "ddim" (deterministic); by default "ddpm"
            if the model's own sampler is `Ancestral`, without `noise_color` and `covariance`, and "ddim" otherwise.

    Raises: UserError, before anything is written, for a model that diffusers can't express, with the reason.
    """
    if kind is not None:
        require_choice("kind", kind, KINDS)
    process, network = model.denoiser.process, model.denoiser.network
    require(
        isinstance(network, DiffusersUNet),
        f"the model {_NO}: its network is {type(network).__name__}, and diffusers has UNet2DModel; train with "
        "network=diffusers_unet",
    )
    assert isinstance(network, DiffusersUNet)
    plain = process.blur is None and not process.has_context and process.operator().is_diagonal
    require(plain, f"the model {_NO}: its process is {type(process).__name__}, and diffusers has vp and ve")
    white = process.color is None and process.clock is None
    require(white, f"the model {_NO}: its noise has a colour or a clock, and that of diffusers is white and has none")
    require(
        model.recipe.num_classes is None,
        f"the model {_NO}: it takes labels, and diffusers' pipelines of UNet2DModel give none",
    )
    require(
        network.num_scales == process.num_scales,
        f"the model {_NO}: network.num_scales={network.num_scales} and process.num_scales={process.num_scales} differ",
    )
    bad = not_finite(network.state_dict())
    require(bad is None, f"the model {_NO}: the weights are not finite ({bad})")
    prediction, clip = _prediction(model)
    if process.variance_preserving:
        pipeline, scheduler, options = _vp(model, kind)
        options |= {"prediction_type": prediction, "clip_sample": clip, "clip_sample_range": 1.0}
    else:
        require(kind is None, f"kind={kind} is of variance-preserving models, and {type(process).__name__} is none")
        require(
            prediction == "epsilon" and not clip,
            f"the model {_NO}: for {type(process).__name__} it needs target=noise target.clip=false",
        )
        pipeline, scheduler, options = _ve(model, network)
    _write(Path(folder), pipeline, scheduler, options, _unet(network, model.recipe.image_size))


def _prediction(model: Parts) -> tuple[str, bool]:
    """Return diffusers' name for the prediction target, and whether the estimate of the clean image is clipped."""
    target: Any = model.denoiser.target
    name = PREDICTIONS.get(type(target))
    require(name is not None, f"the model {_NO}: it has no name for the target {type(target).__name__}")
    plain = getattr(target, "preconditioning", "none") == "none"
    advice = "target.preconditioning=none target.scale_input=false" if not plain else "target.scale_input=false"
    require(
        plain and not target.scale_input,
        f"the model {_NO}: its network sees a scaled image, and diffusers' sees x_t itself; train with {advice}",
    )
    return str(name), bool(target.clip)


def _curves(process: Process) -> tuple[Tensor, Tensor]:
    """Return log a_t and gamma_t at t = k / num_scales, k = 0..num_scales."""
    zero = torch.zeros(1, dtype=torch.float64, device=tables_of(process))
    k = torch.arange(process.num_scales + 1, dtype=torch.float64, device=zero.device)
    t = k / process.num_scales
    return process.signal(t).log(zero).flatten().cpu(), process.noise_scale(t, zero).flatten().cpu()


def _vp(model: Parts, kind: str | None) -> tuple[str, str, dict[str, Any]]:
    """Return pipeline, scheduler and its options for a variance-preserving model."""
    process, sampler = model.denoiser.process, model.sampler
    require(
        process.value_range == (-1.0, 1.0),
        f"the model {_NO}: its images have values in {list(process.value_range)}, and DDPMPipeline's in [-1, 1]",
    )
    betas = -torch.expm1(2 * _curves(process)[0].diff())
    inside = bool(((betas > 0) & (betas < 1)).all())
    require(inside, f"the model {_NO}: a step of its noise schedule adds no noise, or leaves no signal")
    options = {
        "num_train_timesteps": process.num_scales,
        "trained_betas": betas.tolist(),
        "timestep_spacing": "trailing",
    }
    usual = sampler.noise_color is None and sampler.covariance is None
    ancestral = isinstance(sampler, Ancestral) and usual
    if (kind or ("ddpm" if ancestral else "ddim")) == "ddim":
        return "DDIMPipeline", "DDIMScheduler", options
    large = isinstance(sampler, Ancestral) and sampler.variance is not None
    return "DDPMPipeline", "DDPMScheduler", {**options, "variance_type": "fixed_large" if large else "fixed_small"}


def _ve(model: Parts, network: DiffusersUNet) -> tuple[str, str, dict[str, Any]]:
    """Return pipeline, scheduler and its options for a variance-exploding model."""
    process, (height, width) = model.denoiser.process, model.recipe.image_size
    name = type(process).__name__
    require(
        network.noise_levels is not None,
        f"the model {_NO}: for {name} its network must be one of noise levels: network.noise_levels=[lowest,highest] "
        "network.unet.time_embedding_type=fourier",
    )
    assert network.noise_levels is not None
    low, high = network.noise_levels
    ramp = torch.linspace(0, 1, process.num_scales, dtype=torch.float64)
    require(
        torch.allclose(_curves(process)[1][1:], low * (high / low) ** ramp, rtol=_CLOSE, atol=0),
        f"the model {_NO}: the noise of {name} is not log-spaced from {low:g} to {high:g}, network.noise_levels; train "
        "with process/noise=geometric",
    )
    require(
        process.value_range == (0.0, 1.0),
        f"the model {_NO}: its images have values in {list(process.value_range)}, and ScoreSdeVePipeline's in [0, 1]",
    )
    require(
        model.recipe.channels == 3 and height == width,
        f"the model {_NO}: ScoreSdeVePipeline draws square RGB images, and the model's are of "
        f"{model.recipe.channels} channels, {height}x{width} pixels",
    )
    options = {"num_train_timesteps": process.num_scales, "sigma_min": low, "sigma_max": high, "correct_steps": 0}
    return "ScoreSdeVePipeline", "ScoreSdeVeScheduler", options


def _unet(network: DiffusersUNet, size: tuple[int, int]) -> Any:
    """Return diffusers' U-Net with a sample size in its config."""
    height, width = size
    sides = height if height == width else [height, width]
    unet = type(network.unet).from_config({**network.unet.config, "sample_size": sides})
    unet.load_state_dict(network.unet.state_dict())
    return unet.eval()


def _write(folder: Path, pipeline: str, scheduler: str, options: dict[str, Any], unet: Any) -> None:
    """Let diffusers write its files into a temporary folder, and copy each into `folder` atomically."""
    import diffusers

    built = getattr(diffusers, pipeline)(unet, getattr(diffusers, scheduler)(**options))
    with tempfile.TemporaryDirectory() as beside:
        built.save_pretrained(beside)
        for path in sorted(path for path in Path(beside).rglob("*") if path.is_file()):
            write_bytes(folder / path.relative_to(beside), path.read_bytes())
