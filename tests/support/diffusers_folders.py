"""Small random pipelines of diffusers in folders, and their runs in float64 with known noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from dpm_scales.models import Model
from support.oracles import ScriptedNoise
from support.reference import Array

SIZE = (8, 16)

#: arguments of a small UNet2DModel, as a config has them
UNET: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def unet(**changes: Any) -> Any:
    """Build a U-Net of two levels with attention for rectangular images, with random weights everywhere."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "sample_size": SIZE,
        "in_channels": 3,
        "out_channels": 3,
        **UNET,
        "attention_head_dim": 8,
    }
    network = diffusers.UNet2DModel(**{**arguments, **changes})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def write(folder: Path, scheduler: Any, network: Any = None, pipeline: str = "DDPMPipeline") -> Path:
    """Write a pipeline's folder as diffusers does."""
    getattr(diffusers, pipeline)(unet() if network is None else network, scheduler).save_pretrained(folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Set values in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def betas(schedule: str, steps: int, first: float = 1e-4, last: float = 0.02) -> Array:
    """Return the variances of diffusers' schedules in float64, written from their papers."""
    if schedule == "linear":
        return np.linspace(first, last, steps)
    if schedule == "scaled_linear":
        return np.linspace(np.sqrt(first), np.sqrt(last), steps) ** 2
    if schedule == "sigmoid":
        return first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, steps)))
    assert schedule == "squaredcos_cap_v2"
    left = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - left[1:] / left[:-1], 0.999)


def in_float64(scheduler: Any, variances: Array) -> Any:
    """Return the scheduler with its tables in float64."""
    scheduler.betas = torch.from_numpy(variances)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


def recorded(pipeline: Any, **arguments: Any) -> list[Tensor]:
    """Run a pipeline and return the result of each of its steps."""
    found: list[Tensor] = []
    step: Callable[..., Any] = pipeline.scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        found.append(result.prev_sample.clone())
        return result

    pipeline.scheduler.step = watched
    pipeline.set_progress_bar_config(disable=True)
    pipeline(batch_size=2, output_type="pt", **arguments)
    return found


def draws(seed: int, number: int, shape: tuple[int, ...]) -> list[Tensor]:
    """Return the first draws of the generator that a pipeline is given: the start and the noise of each step."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(number)]


def steps_of(model: Model, noise: list[Tensor], steps: int) -> list[Tensor]:
    """Run a model's sampler in float64 from the first draw, with the others as its noise; return every step."""
    found: list[Tensor] = []
    model.denoiser.double()
    scales = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    model.sampler.reverse(
        model.denoiser,
        noise[0],
        ScriptedNoise(noise[1:]),
        scales=scales,
        on_step=lambda _, x: found.append(x.clone()),
    )
    return found
