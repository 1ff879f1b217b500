"""Read a folder that diffusers wrote, a pipeline of `UNet2DModel` and a scheduler, as a model's recipe and weights.

diffusers numbers the steps of a chain from 0: its step i is scale k = i + 1 here, and "the step before 0" is the image.
Only JSON and safetensors are read. The recipe then goes through the same checks as any other, see `models.io`.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from dpm_scales.errors import UserError, is_number, is_whole, require, suggest
from dpm_scales.models.recipe import Recipe
from dpm_scales.networks.diffusers_unet import unet_arguments
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.storage import open_regular

INDEX, CONFIG, WEIGHTS = "model_index.json", "config.json", "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler_config.json"
CONFIG_FILES = (INDEX, CONFIG, SCHEDULER, f"unet/{CONFIG}", f"scheduler/{SCHEDULER}")
"""The files that describe a pipeline; a bare `UNet2DModel` has them in one folder, a pipeline in subfolders."""
WEIGHT_FILES = (WEIGHTS, f"unet/{WEIGHTS}")

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
MAX_JSON_BYTES = 2**24
#: names of attention layers in files written by diffusers before 0.15, with their present names
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)")
TARGETS = {"epsilon": "Noise", "sample": "Clean", "v_prediction": "Velocity"}
_MAX_BETA = 0.999


@dataclass(frozen=True)
class _Files:
    """The folders of the U-Net and of the scheduler, with their configs."""

    unet: Path
    unet_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    scheduler: str


def is_diffusers(folder: Path) -> bool:
    """Return whether a folder holds a pipeline or a model of diffusers."""
    return any((folder / name).is_file() for name in (INDEX, CONFIG, f"unet/{CONFIG}"))


def check_pipeline(folder: Path) -> None:
    """Raise UserError unless the configs in a folder describe a pipeline that `read_pipeline` reads."""
    _recipe(_open(folder), str(folder))


def read_pipeline(folder: Path) -> tuple[Recipe, dict[str, Tensor]]:
    """Return the recipe and the weights, named as in `Model.modules`, of a pipeline in a folder.

    Raises: UserError for a pipeline with other parts than a `UNet2DModel` and one of the `SCHEDULERS`, for options
    without an equivalent here, and for weights that are not in a safetensors file.
    """
    files = _open(folder)
    recipe = _recipe(files, str(folder))
    spectrum = DataSpectrum().state_dict()
    state = {f"denoiser.network.unet.{_present(name)}": value for name, value in _weights(files.unet).items()}
    return recipe, {**state, **{f"denoiser.spectrum.{name}": value for name, value in spectrum.items()}}


# --- files ------------------------------------------------------------------------------------------------------------


def _open(folder: Path) -> _Files:
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX)
        parts = {
            name: value[1]
            for name, value in index.items()
            if isinstance(value, list) and len(value) == 2 and value[1] is not None
        }
        pipeline = index.get("_class_name", "pipeline")
        others = sorted(parts.keys() - {"unet", "scheduler"})
        require(
            not others and {"unet", "scheduler"} <= parts.keys(),
            f"{folder} is a {pipeline} of {', '.join(sorted(parts)) or 'no parts'}; what can be loaded is a unet "
            "(UNet2DModel) and a scheduler alone",
        )
    unet = folder / "unet" if (folder / "unet" / CONFIG).is_file() else folder
    place = next((d for d in (folder / "scheduler", folder) if (d / SCHEDULER).is_file()), None)
    require((unet / CONFIG).is_file(), f"{folder} has no {CONFIG} of a UNet2DModel, neither there nor in unet/")
    config = _read_json(unet / CONFIG)
    name = config.get("_class_name")
    require(name == "UNet2DModel", f"{unet / CONFIG} is of a {name or 'model without _class_name'}; only UNet2DModel")
    if place is None:
        raise UserError(
            f"{folder} has no {SCHEDULER}, neither there nor in scheduler/: a U-Net alone does not say what noise it "
            "was trained with; put the scheduler's config beside it"
        )
    values = _read_json(place / SCHEDULER)
    return _Files(unet, config, values, str(place / SCHEDULER))


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises UserError for any other file."""
    try:
        with open_regular(path) as file:
            text = file.read(MAX_JSON_BYTES + 1)
        require(len(text) <= MAX_JSON_BYTES, f"{path} is larger than {MAX_JSON_BYTES} bytes: no config of diffusers")
        values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON: {error or type(error).__name__}") from error
    require(isinstance(values, dict), f"{path} holds no object")
    found: dict[str, Any] = values
    return found


def _weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors in a U-Net's folder; those of 16 bits as float32."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(no_weights(str(folder), WEIGHTS, [file.name for file in folder.iterdir()]))
    try:
        open_regular(path).close()
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a safetensors file: {error}") from error
    halves = (torch.float16, torch.bfloat16)
    return {name: value.float() if value.dtype in halves else value for name, value in tensors.items()}


def no_weights(place: str, wanted: str, names: Iterable[str]) -> str:
    """Return the error message for a folder or repository whose files, `names`, do not include `wanted`."""
    found = sorted(name for name in names if Path(name).suffix in (*PICKLES, ".safetensors", ".json"))
    pickles = [name for name in found if Path(name).suffix in PICKLES]
    if pickles:
        return (
            f"{place} has {pickles[0]} and no {wanted}: a pickle can run code, so it is not read; convert it with "
            "diffusers: UNet2DModel.from_pretrained(...).save_pretrained(...)"
        )
    return f"{place} has no {wanted}; it has {', '.join(found[:8]) or 'no weights'}"


def _present(name: str) -> str:
    """Return the present name of a weight."""
    found = _OLD_ATTENTION.fullmatch(name)
    return name if found is None else f"{found[1]}{_RENAMED[found[2]]}.{found[3]}"


# --- configs ----------------------------------------------------------------------------------------------------------


def _recipe(files: _Files, source: str) -> Recipe:
    name = files.scheduler_config.get("_class_name")
    read = SCHEDULERS.get(str(name))
    if read is None:
        raise UserError(f"{files.scheduler}: unknown scheduler {name!r}: {suggest(str(name), SCHEDULERS)}")
    settings = _Settings(files.scheduler_config, files.scheduler)
    parts, size = read(settings), _image_size(files)
    network = _network(files, settings)
    parts["network"] = {"_target_": "dpm_scales.networks.DiffusersUNet", **network, **parts["network"]}
    classes = files.unet_config.get("num_class_embeds")
    recipe = Recipe(parts, files.unet_config.get("in_channels", 3), size, classes)
    return Recipe.from_dict(recipe.to_dict(), source)  # checked like a config of our own


def _network(files: _Files, settings: _Settings) -> dict[str, Any]:
    """Return the arguments of `DiffusersUNet`, except those that belong to the scheduler."""
    config, place = files.unet_config, files.unet / CONFIG
    channels = [config.get(key, 3) for key in ("in_channels", "out_channels")]
    require(
        is_whole(channels[0], 1) and channels[0] == channels[1],
        f"{place}: in_channels={channels[0]!r}, out_channels={channels[1]!r}; they must be equal: a network that "
        "also predicts variances, or sees more than the image, has no equivalent here",
    )
    require(channels[0] in (1, 3), f"{place}: images of {channels[0]} channels; images have 1 or 3 here, grey or RGB")
    require(
        config.get("class_embed_type") is None,
        f"{place}: class_embed_type={config.get('class_embed_type')!r}: only labels in a table, num_class_embeds",
    )
    known = unet_arguments()
    own = {"sample_size", "in_channels", "out_channels", "num_class_embeds", "num_train_timesteps"}
    unknown = sorted(key for key in config if key not in {*known, *own} and not key.startswith("_"))
    if unknown:
        warnings.warn(f"{place}: UNet2DModel ignores {', '.join(unknown)}", stacklevel=2)
    unet = {key: value for key, value in config.items() if key in known and key != "class_embed_type"}
    labels = {} if config.get("num_class_embeds") is None else {"no_label": False}
    return {"unet": unet, "num_scales": settings.steps, **labels}


def _image_size(files: _Files) -> tuple[int, int]:
    size = files.unet_config.get("sample_size")
    sides: list[Any] = size if isinstance(size, list) else [size, size]
    require(
        len(sides) == 2 and all(is_whole(side, 1) for side in sides),
        f"{files.unet / CONFIG}: sample_size={size!r}, and the size of the images is not known; set it there",
    )
    return sides[0], sides[1]


@dataclass(frozen=True)
class _Settings:
    """A scheduler's config."""

    values: Mapping[str, Any]
    source: str

    def number(self, key: str, default: float) -> float:
        """Return a finite number. Raises UserError for anything else."""
        value = self.values.get(key, default)
        require(is_number(value), f"{self.source}: {key} must be a number, got {value!r:.100}")
        return float(value)

    def need(self, key: str, default: Any, allowed: tuple[Any, ...], why: str) -> Any:
        """Return a value. Raises UserError unless it is one of `allowed`."""
        value = self.values.get(key, default)
        ok = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)
        options = ", ".join(json.dumps(one) for one in allowed)
        require(ok, f"{self.source}: {key}={value!r:.100} {why}; allowed: {options}")
        return value

    @property
    def steps(self) -> int:
        value = self.values.get("num_train_timesteps", 1000)
        ok = is_whole(value, 1) and value <= 10**5
        require(ok, f"{self.source}: num_train_timesteps must be a whole number from 1 to 100000, got {value!r:.100}")
        return int(value)


def cosine_betas(steps: int) -> list[float]:
    """Return the variances of diffusers' `squaredcos_cap_v2` (Nichol & Dhariwal 2021, Eq. (17)), at most 0.999."""

    def left(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - left((i + 1) / steps) / left(i / steps), _MAX_BETA) for i in range(steps)]


def _ramp(first: float, last: float, steps: int) -> list[float]:
    values: list[float] = torch.linspace(first, last, steps, dtype=torch.float64).tolist()
    return values


def _noise(settings: _Settings) -> dict[str, Any]:
    """Return the config of the noise schedule of a scheduler with betas."""
    steps, listed = settings.steps, settings.values.get("trained_betas")
    settings.need(
        "rescale_betas_zero_snr", False, (False,), "leaves no signal at the last scale, which no process here may"
    )
    first, last = settings.number("beta_start", 1e-4), settings.number("beta_end", 0.02)
    name = settings.values.get("beta_schedule", "linear")
    if listed is not None:
        ok = isinstance(listed, list) and len(listed) == steps and all(is_number(value) for value in listed)
        require(ok, f"{settings.source}: trained_betas must be a list of num_train_timesteps={steps} numbers")
        variances = [float(value) for value in listed]
    elif name == "linear":
        require(0 < first <= last < 1, f"{settings.source}: beta_start={first:g}, beta_end={last:g} are no variances")
        return {"_target_": "dpm_scales.schedules.LinearBeta", "ddpm_beta_min": first, "ddpm_beta_max": last}
    else:
        variances = {
            "scaled_linear": lambda: [b * b for b in _ramp(max(first, 0) ** 0.5, max(last, 0) ** 0.5, steps)],
            "squaredcos_cap_v2": lambda: cosine_betas(steps),
            "sigmoid": lambda: [first + (last - first) / (1 + math.exp(-x)) for x in _ramp(-6, 6, steps)],
        }.get(str(name), list)()
        known = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
        require(len(variances) > 0, f"{settings.source}: unknown beta_schedule {name!r}: {suggest(str(name), known)}")
    ok = all(0 < value < 1 for value in variances)
    require(ok, f"{settings.source}: a beta lies outside of (0, 1), the variances of a step")
    return {"_target_": "dpm_scales.schedules.ListedBeta", "betas": [math.sqrt(value) for value in variances]}


def _vp(settings: _Settings, sampler: dict[str, Any], clips: bool) -> dict[str, Any]:
    """Return the parts of a variance-preserving model.

    Args:
        clips: whether this class of scheduler has the option `clip_sample`.
    """
    prediction = settings.need("prediction_type", "epsilon", tuple(TARGETS), "has no target here")
    clip = clips and bool(settings.need("clip_sample", True, (True, False), "is no switch"))
    if settings.values.get("thresholding"):
        settings.need("sample_max_value", 1.0, (1.0, 1), "with thresholding=true is a dynamic threshold")
        clip = True  # a dynamic threshold clamped to [1, 1]
    elif clip:
        settings.need("clip_sample_range", 1.0, (1.0, 1), "clips beyond the value range")
    target: dict[str, Any] = {"_target_": f"dpm_scales.targets.{TARGETS[prediction]}"}
    target |= {"preconditioning": "none"} if prediction == "sample" else {}
    target |= {"clip": clip, "scale_input": False}
    process = {"_target_": "dpm_scales.processes.VP", "num_scales": settings.steps, "noise": _noise(settings)}
    return _parts({**process, "value_range": [-1.0, 1.0]}, target, sampler)


def _parts(process: dict[str, Any], target: dict[str, Any], sampler: dict[str, Any]) -> dict[str, Any]:
    prior = {"_target_": "dpm_scales.priors.GaussianPrior"}
    chosen = {**sampler, "_target_": f"dpm_scales.samplers.{sampler['_target_']}"}
    return {"process": process, "target": target, "network": {}, "prior": prior, "sampler": chosen}


def _ddpm(settings: _Settings) -> dict[str, Any]:
    small, large = ("fixed_small", "fixed_small_log"), ("fixed_large",)
    kind = settings.need("variance_type", "fixed_small", (*small, *large), "has no sampler here")
    return _vp(settings, {"_target_": "Ancestral", "variance": "transition" if kind in large else None}, True)


def _ddim(settings: _Settings) -> dict[str, Any]:
    return _vp(settings, {"_target_": "DDIM", "steps": min(50, settings.steps)}, True)


def _pndm(settings: _Settings) -> dict[str, Any]:
    return _vp(settings, {"_target_": "DPMSolver", "steps": min(20, settings.steps)}, False)


def _dpm_solver(settings: _Settings) -> dict[str, Any]:
    kinds = {"dpmsolver++": 0.0, "sde-dpmsolver++": 1.0, "dpmsolver": 0.0, "sde-dpmsolver": 1.0}
    kind = settings.need("algorithm_type", "dpmsolver++", tuple(kinds), "has no sampler here")
    settings.need("use_flow_sigmas", False, (False, None), "is a flow")
    order = min(int(settings.need("solver_order", 2, (1, 2, 3), "has no sampler here")), 2)
    steps = min(20, settings.steps)
    return _vp(settings, {"_target_": "DPMSolver", "eta": kinds[kind], "order": order, "steps": steps}, False)


def _unipc(settings: _Settings) -> dict[str, Any]:
    settings.need("use_flow_sigmas", False, (False, None), "is a flow")
    order = int(settings.need("solver_order", 2, (1, 2, 3), "has no sampler here"))
    return _vp(settings, {"_target_": "UniPC", "order": order, "steps": min(20, settings.steps)}, False)


def _ve(settings: _Settings) -> dict[str, Any]:
    low, high = settings.number("sigma_min", 0.01), settings.number("sigma_max", 1348.0)
    require(0 < low <= high, f"{settings.source}: sigma_min={low:g}, sigma_max={high:g} are no noise levels")
    corrections = settings.values.get("correct_steps", 1)
    if corrections != 0:
        warnings.warn(
            f"{settings.source}: correct_steps={corrections!r:.100} is left out: samplers here take the predictor's "
            "steps, without Langevin corrections",
            stacklevel=2,
        )
    noise = {"_target_": "dpm_scales.schedules.GeometricNoise", "noise_min": low, "noise_max": high}
    process = {"_target_": "dpm_scales.processes.VE", "num_scales": settings.steps, "noise": noise}
    target = {"_target_": "dpm_scales.targets.Noise", "clip": False, "scale_input": False}
    sampler = {"_target_": "Ancestral", "variance": "transition"}
    parts = _parts({**process, "value_range": [0.0, 1.0]}, target, sampler)
    return {**parts, "network": {"noise_levels": [low, high]}}


SCHEDULERS: dict[str, Callable[[_Settings], dict[str, Any]]] = {
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "DDIMParallelScheduler": _ddim,
    "PNDMScheduler": _pndm,
    "DPMSolverMultistepScheduler": _dpm_solver,
    "UniPCMultistepScheduler": _unipc,
    "ScoreSdeVeScheduler": _ve,
}
"""Readers of schedulers by class name. The model's default sampler is of the scheduler's kind; others can be chosen."""
