"""Folders of diffusers that have no equal here, or are damaged or crafted: one line each, and nothing is executed."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import diffusers
import pytest

from dpm_scales.models import load_model
from support.diffusers_folders import edit, unet, write
from support.oracles import refused
from support.shell import call

SCHEDULER, CONFIG = "scheduler/scheduler_config.json", "unet/config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("diffusers") / "pipeline", diffusers.DDPMScheduler(10))


def scheduler(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / SCHEDULER, **changes)


def network(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / CONFIG, **changes)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(print))


BAD: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "scheduler": (scheduler(_class_name="FlowMatchScheduler"), ("FlowMatchScheduler", "allowed", "DDPMScheduler")),
    "near scheduler": (scheduler(_class_name="DDPMSheduler"), ("did you mean 'DDPMScheduler'",)),
    "no scheduler class": (scheduler(_class_name=None), ("unknown scheduler None", "DDIMScheduler")),
    "schedule": (scheduler(beta_schedule="laplacian"), ("unknown beta_schedule 'laplacian'", "squaredcos_cap_v2")),
    "betas": (scheduler(trained_betas=[0.1, 0.2]), ("trained_betas", "num_train_timesteps=10")),
    "beta of one": (scheduler(trained_betas=[1.0] * 10), ("outside of (0, 1)",)),
    "start": (scheduler(beta_start="a"), ("beta_start must be a number, got 'a'",)),
    "beyond floats": (scheduler(beta_end=10**400), ("beta_end must be a number",)),
    "infinite": (scheduler(beta_end=float("inf")), ("beta_end must be a number, got inf",)),
    "huge listed": (scheduler(trained_betas=[10**400] * 10), ("trained_betas must be a list",)),
    "order of betas": (scheduler(beta_start=0.5, beta_end=0.1), ("beta_start=0.5, beta_end=0.1",)),
    "steps": (scheduler(num_train_timesteps=0), ("num_train_timesteps", "got 0")),
    "many steps": (scheduler(num_train_timesteps=10**9), ("num_train_timesteps", "100000")),
    "prediction": (scheduler(prediction_type="flow"), ("prediction_type='flow'", '"v_prediction"')),
    "variance": (scheduler(variance_type="learned_range"), ("variance_type='learned_range'", '"fixed_large"')),
    "range": (scheduler(clip_sample_range=2.0), ("clip_sample_range=2.0",)),
    "threshold": (scheduler(thresholding=True, sample_max_value=3.0), ("sample_max_value=3.0", "dynamic")),
    "zero snr": (scheduler(rescale_betas_zero_snr=True), ("rescale_betas_zero_snr=True", "no signal")),
    "ve": (scheduler(_class_name="ScoreSdeVeScheduler", sigma_min=0), ("sigma_min=0",)),
    "ve without fourier": (scheduler(_class_name="ScoreSdeVeScheduler"), ("time_embedding_type=positional",)),
    "fourier without ve": (network(time_embedding_type="fourier"), ("time_embedding_type=fourier",)),
    "flow": (scheduler(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True), ("use_flow_sigmas", "flow")),
    "model": (network(_class_name="UNet2DConditionModel"), ("UNet2DConditionModel", "only UNet2DModel")),
    "channels": (network(out_channels=4), ("in_channels=3, out_channels=4", "variances")),
    "latents": (network(in_channels=4, out_channels=4), ("4 channels", "1 or 3")),
    "class embedding": (network(class_embed_type="timestep"), ("class_embed_type='timestep'",)),
    "size": (network(sample_size=None), ("sample_size=None", "set it there")),
    "block": (network(down_block_types=["DownBlock2D", "NoBlock"]), ("can't be built", "NoBlock")),
    "activation": (network(act_fn="os.system"), ("can't be built", "os.system")),
    "width": (network(block_out_channels=[8, 10**7]), ("do not fit the config",)),
    "layers": (network(layers_per_block=10**9), ("do not fit the config", "asks for more than")),
    "target": (network(act_fn={"_target_": "os.system", "command": "x"}), ("'os.system'", "may only use the classes")),
    "interpolation": (network(act_fn="${oc.env:HOME}"), ("interpolation",)),
    "pickle": (pickled, ("diffusion_pytorch_model.bin", "a pickle can run code", "save_pretrained")),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), ("has no diffusion_pytorch_model.safetensors",)),
    "damaged": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 100), ("is not a safetensors file",)),
    "cut": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), ("safetensors",)),
    "not json": (lambda folder: (folder / CONFIG).write_text("{"), ("config.json is not JSON",)),
    "a list": (lambda folder: (folder / SCHEDULER).write_text("[]"), ("holds no object",)),
    "deep": (lambda folder: (folder / SCHEDULER).write_text("[" * 10**5), ("is not JSON",)),
    "no scheduler": (lambda folder: (folder / SCHEDULER).unlink(), ("no scheduler_config.json", "what noise")),
    "no network": (lambda folder: (folder / CONFIG).unlink(), ("no config.json",)),
    "latent": (
        lambda folder: edit(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"], _class_name="LDMPipeline"),
        ("LDMPipeline of scheduler, unet, vae",),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line(name: str, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "p"
    shutil.copytree(folder, place)
    change, words = BAD[name]
    change(place)
    with refused(*words):
        load_model(place)


def test_not_finite_weights_are_refused(tmp_path: Path) -> None:
    network = unet()
    network.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    with refused("not finite", "conv_in.weight"):
        load_model(write(tmp_path / "p", diffusers.DDPMScheduler(10), network))


def test_commands_say_it_in_one_line(folder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "p"))
    edit(place / SCHEDULER, _class_name="EulerScheduler")
    outcome = call("sample.py", f"model={place}", f"out={tmp_path / 'out'}", cwd=tmp_path)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and "EulerScheduler" in outcome.err
    assert not (tmp_path / "out").exists()


def test_without_diffusers_it_says_what_to_install(folder: Path) -> None:
    with mock.patch.dict(sys.modules, {"diffusers": None}), refused("DiffusersUNet needs diffusers", "pip install"):
        load_model(folder)


def test_raw_weights_are_in_checkpoints_only(folder: Path) -> None:
    with refused("raw weights are in checkpoints only"):
        load_model(folder, weights="raw")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
