"""Every file in configs/ is composed and built; a config key is a constructor argument of the same name."""

from __future__ import annotations

import gzip
import inspect
import pickle
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hydra.utils import get_class, get_object, instantiate
from omegaconf import OmegaConf
from torch import nn

from dpm_scales.data import ImageDataModule
from dpm_scales.denoisers import Denoiser
from dpm_scales.distributed.fsdp import ShardedStrategy
from dpm_scales.models.instantiate import plain
from dpm_scales.priors import GaussianPrior, Prior
from dpm_scales.processes import VE, VP, Blurring, BlurringChain, Homogeneous, InverseHeat, Process, Spectral, Warm
from dpm_scales.samplers import Sampler
from dpm_scales.schedules import BlurSchedule, NoiseSchedule
from dpm_scales.shards.pack import Packing, pack
from dpm_scales.targets import Clean, Target
from dpm_scales.training.run_folder import Rescue
from dpm_scales.training.trainer import make_trainer
from dpm_scales.weights import LossWeight
from support.configs import choices, raw
from support.shell import CONFIGS, composed, photos

CURVES = ("process/noise", "process/blur", "process/color", "process/clock", "sampler/noise_color")
GROUPS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name not in ("experiment", "hydra"))


#: what a data set needs from outside, as overrides; made by `places`
NEEDS = {
    "folder": ["data.root={folder}"],
    "bsds500": ["data.root={bsds500}"],
    "array": ["data.path={array}"],
    "webdataset": ["data.root={webdataset}"],
    "hf": ["data.root={folder}", "data.image_size=8"],
    "mnist": ["data.root={mnist}", "data.download=false"],
    "fashion_mnist": ["data.root={fashion_mnist}", "data.download=false"],
    "cifar10": ["data.root={cifar10}", "data.download=false"],
    "celeba": ["data.root={celeba}", "data.download=false"],
}


def _idx(path: Path, array: np.ndarray) -> None:
    """MNIST's own format: big-endian shape, then bytes."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())
    path.with_suffix("").write_bytes(header + array.tobytes())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny stand-ins for the data sets that live elsewhere."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    photos(root / "folder", 6)
    pack(root / "folder", root / "webdataset", Packing(3), lambda *_: lambda _: None)
    for part in ("train", "val", "test"):
        photos(root / "bsds500" / "images" / part, 2, (80, 120))
    np.savez(root / "array.npz", images=rng.integers(0, 256, (20, 8, 12), dtype=np.uint8))
    for name in ("MNIST", "FashionMNIST"):
        for part in ("train", "t10k"):
            folder = root / name / name / "raw"
            _idx(folder / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (5, 28, 28), dtype=np.uint8))
            _idx(folder / f"{part}-labels-idx1-ubyte.gz", rng.integers(0, 10, 5, dtype=np.uint8))
    folder = root / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [1, 2]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    with tarfile.open(root / "cifar" / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    return {
        "folder": str(root / "folder"),
        "bsds500": str(root / "bsds500"),
        "array": str(root / "array.npz"),
        "webdataset": str(root / "webdataset"),
        "mnist": str(root / "MNIST"),
        "fashion_mnist": str(root / "FashionMNIST"),
        "cifar10": str(root / "cifar"),
        "celeba": str(root / "celeba"),
    }


@pytest.fixture(autouse=True)
def _unchecked_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision takes the tiny stand-ins for its files."""
    from torchvision import datasets

    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    for module in ("cifar", "utils"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)


def needs(name: str, places: dict[str, str]) -> list[str]:
    return [override.format(**places) for override in NEEDS.get(name, [])]


def parts(config: Any) -> Iterator[dict[str, Any]]:
    """All nodes with a `_target_`, at any depth."""
    if isinstance(config, dict):
        if config.get("_target_") is not None:
            yield config
        for value in config.values():
            yield from parts(value)


def given(config: dict[str, Any]) -> set[str]:
    return config.keys() - {"_target_", "_partial_", "defaults"}


def accepted(config: dict[str, Any]) -> set[str]:
    """Names of the arguments that the `_target_` takes."""
    parameters = inspect.signature(get_object(config["_target_"])).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


# --- files ------------------------------------------------------------------------------------------------------------


def test_all_groups_are_known() -> None:
    """A new group needs a test here that builds its choices."""
    groups = {"data", "process", "target", "weight", "prior", "network", "sampler", "trainer", "logger", "task", "edit"}
    assert set(GROUPS) == groups
    inner = {path.relative_to(CONFIGS).parent.as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert inner == {".", *GROUPS, "experiment", *CURVES, "hydra/launcher", "hydra/sweeper"}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_keys_are_constructor_arguments(path: Path) -> None:
    for config in parts(raw(path)):
        assert given(config) <= accepted(config), config["_target_"]


@pytest.mark.parametrize("group", ["process", *CURVES, "target", "weight", "prior", "sampler"])
def test_files_hold_every_argument(group: str) -> None:
    """So that any can be overridden without `+`, and `config.yaml` tells all that a run depended on."""
    late = {"prior": {"process"}, "sampler": {"denoiser"}}.get(group, set())
    for name in choices(group):
        config: Any = raw(CONFIGS / group / f"{name}.yaml")
        if group == "process":
            config = OmegaConf.to_container(composed(f"process={name}").process)
        for part in parts(config):
            missing = accepted(part) - given(part) - (late if part.get("_partial_") else set())
            assert missing == set(), f"{name}: {part['_target_']}"


# --- groups -----------------------------------------------------------------------------------------------------------

CLASSES: dict[str, type[Process]] = {
    "vp": VP,
    "ve": VE,
    "homogeneous": Homogeneous,
    "heat": InverseHeat,
    "blurring": Blurring,
    "blurring_constant": InverseHeat,
    "blurring_chain": BlurringChain,
    "warm": Warm,
    "rectified": Spectral,
}


@pytest.mark.parametrize("name", choices("process"))
def test_processes(name: str) -> None:
    process = instantiate(composed(f"process={name}").process)
    assert isinstance(process, CLASSES.get(name, Process))
    assert process.num_scales >= 100 and process.value_range[0] < process.value_range[1]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_process_configs_say_what_the_classes_default_to(name: str) -> None:
    """The same law from YAML and from Python; `blurring_constant` differs in its noise alone."""
    process, plain = instantiate(composed(f"process={name}").process), CLASSES[name]()
    mu = torch.linspace(0, 2 * np.pi**2, 17, dtype=torch.float64)
    for t in (1 / process.num_scales, 0.3, 1.0):
        noise = process.noise_scale(t, mu) / (10 if name == "blurring_constant" else 1)
        torch.testing.assert_close(process.signal_scale(t, mu), plain.signal_scale(t, mu), rtol=1e-12, atol=0)
        torch.testing.assert_close(noise, plain.noise_scale(t, mu), rtol=1e-12, atol=0)
    assert process.num_scales == plain.num_scales and tuple(process.value_range) == tuple(plain.value_range)


LISTS = {
    "listed_beta": "process.noise.betas=[0.1,0.2,0.3]",
    "listed": "process.noise.noise_scales=[0.1,0.2,0.3]",
    "listed_sigmas": "process.blur.blur_sigmas=[1,2,3]",
    "listed_times": "process.blur.dissipation_times=[1,5,100]",
}


@pytest.mark.parametrize("name", choices("process/noise"))
def test_noise_schedules(name: str) -> None:
    """Each as a choice on the command line, under a process that it fits."""
    process = {"edm": "ve", "geometric": "ve", "listed": "ve", "constant": "heat"}.get(
        name, "rectified" if "rectified" in name else "vp"
    )
    extra = [LISTS[name]] if name in LISTS else []
    config = composed(f"process={process}", f"process/noise={name}", "process.num_scales=3", *extra).process
    built = instantiate(config)
    assert isinstance(built.noise, NoiseSchedule) and type(built.noise) is get_class(config.noise._target_)


@pytest.mark.parametrize("name", choices("process/blur"))
def test_blur_schedules(name: str) -> None:
    extra = [LISTS[name]] if name in LISTS else []
    config = composed("process=blurring", f"process/blur={name}", "process.num_scales=3", *extra).process
    built = instantiate(config)
    assert isinstance(built.blur, BlurSchedule) and type(built.blur) is get_class(config.blur._target_)


@pytest.mark.parametrize("name", choices("process/color"))
def test_colors(name: str) -> None:
    for process in ("vp", "ve", "blurring", "heat", "rectified", "inverse_osmosis"):
        config = composed(f"process={process}", f"process/color={name}", "process.num_scales=3").process
        assert type(instantiate(config).color) is get_class(config.color._target_)


@pytest.mark.parametrize("name", choices("process/clock"))
def test_clocks(name: str) -> None:
    config = composed("process=vp", f"process/clock={name}", "process.num_scales=3").process
    assert type(instantiate(config).clock) is get_class(config.clock._target_)


@pytest.mark.parametrize("name", choices("target"))
def test_targets(name: str) -> None:
    assert isinstance(instantiate(composed(f"target={name}").target), Target)


@pytest.mark.parametrize("name", choices("weight"))
def test_weights(name: str) -> None:
    config = composed(f"weight={name}").weight
    assert config._target_ is None if name == "target" else isinstance(instantiate(config), LossWeight)


@pytest.mark.parametrize("name", choices("prior"))
def test_priors(name: str) -> None:
    prior = instantiate(composed(f"prior={name}").prior)
    if not isinstance(prior, Prior):
        prior = prior(VP())
        assert isinstance(prior, GaussianPrior)
    assert isinstance(prior, Prior)


@pytest.mark.parametrize("name", sorted(set(choices("sampler")) - {"model"}))
@pytest.mark.parametrize("entry", ["train", "sample", "evaluate"])
def test_samplers(name: str, entry: str) -> None:
    sampler = instantiate(composed(f"sampler={name}", name=entry).sampler)
    if not isinstance(sampler, Sampler):
        sampler = sampler(Denoiser(nn.Identity(), VP(), Clean()))
    assert isinstance(sampler, Sampler)
    assert len(sampler.scales(VP())) >= 2


@pytest.mark.parametrize("name", choices("sampler/noise_color"))
def test_noise_colors_are_those_of_processes(name: str) -> None:
    """For every sampler, by the names and arguments of process/color, of unit energy."""
    of_process = plain(composed(f"process/color={name}").process.color)
    wanted = {key: "unit" if key == "energy" else value for key, value in of_process.items()}
    for sampler in set(choices("sampler")) - {"model"}:
        chosen = composed(f"sampler={sampler}", f"sampler/noise_color={name}").sampler
        assert plain(chosen.noise_color) == wanted
        made = instantiate(chosen)
        made = made if isinstance(made, Sampler) else made(Denoiser(nn.Identity(), VP(), Clean()))
        assert type(made.noise_color) is get_class(wanted["_target_"])
    for entry in ("sample", "evaluate"):
        chosen = composed(f"sampler/noise_color={name}", name=entry).sampler
        assert chosen._target_ is None and plain(chosen.noise_color) == wanted
    assert choices("process/color") == choices("sampler/noise_color")


def test_sample_takes_the_models_own_sampler_by_default() -> None:
    for name in ("sample", "evaluate"):
        assert composed(name=name).sampler._target_ is None


@pytest.mark.parametrize("name", choices("network"))
def test_networks(name: str) -> None:
    with torch.device("meta"):
        network = instantiate(composed(f"network={name}").network, in_channels=3, out_channels=3)
        x, t = torch.randn(1, 3, 32, 48), torch.rand(1)
        assert network(x, t).shape == x.shape


@pytest.mark.parametrize("name", choices("data"))
def test_data(name: str, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "hf":
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    data = instantiate(composed(f"data={name}", *needs(name, places)).data)
    assert isinstance(data, ImageDataModule)
    assert data.channels in (1, 3) and min(data.image_size) >= 8
    if name != "celeba":  # its five lists are torchvision's own business
        data.prepare_data()
        image, label = data.train_set[0]
        assert image.dtype == torch.uint8 and image.shape == (data.channels, *data.image_size)
        assert (label >= 0) == (data.num_classes is not None)


def test_data_that_must_be_named_says_so() -> None:
    assert OmegaConf.missing_keys(composed("data=folder")) == {
        "data.root",
        "network.in_channels",
        "network.out_channels",
    }


@pytest.mark.parametrize("name", choices("trainer"))
def test_trainers(name: str, tmp_path: Path) -> None:
    config = composed(f"trainer={name}", "trainer.accelerator=cpu")
    trainer = make_trainer(config, tmp_path, [], Rescue(tmp_path))
    assert isinstance(trainer, pl.Trainer) and isinstance(trainer.strategy, ShardedStrategy) == (name == "fsdp")
    assert trainer.num_devices == config.trainer.devices
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", choices("logger"))
def test_loggers(name: str, tmp_path: Path) -> None:
    config = composed(f"logger={name}", f"run_dir={tmp_path}").logger
    if name == "csv":
        assert config._target_ is None  # metrics.csv is always written
    else:
        assert type(instantiate(config)).__name__ == {"tensorboard": "TensorBoardLogger", "wandb": "WandbLogger"}[name]
    assert name != "wandb" or config.offline


# --- experiments ------------------------------------------------------------------------------------------------------

EXPERIMENTS = choices("experiment")


SPECTRAL = ("rectified", "hdfm", "warm", "equal_snr", "power_law", "flicker", "low_pass_flow", "clocked", "cut_off")


def test_recipes_of_every_data_set() -> None:
    processes = ("vp", "ve", "heat", "blurring", "homogeneous", "blurring_constant", "blurring_chain")
    wanted = {f"digits_{process}" for process in processes}
    wanted |= {f"{data}_{process}" for data in ("mnist", "photos32") for process in ("vp", "ve", "heat", "blurring")}
    wanted |= {f"{data}_{process}" for data in ("cifar10", "bsds500") for process in ("vp", "heat", "blurring")}
    wanted |= {f"mnist_{process}" for process in SPECTRAL}
    wanted |= {f"mnist_osmosis_{name}" for name in ("diffusion", "flow", "color")}
    assert wanted <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments(name: str, places: dict[str, str]) -> None:
    """Data, process, target, prior, network and sampler are built, and fit together."""
    plain = composed(f"experiment={name}")
    data_name = str(plain.data.get("name", "")).lower() or {"bsds500_data": "bsds500"}.get(
        plain.data._target_.rpartition(".")[2], ""
    )
    config = composed(f"experiment={name}", *needs(data_name, places))
    data = instantiate(config.data)
    process, target = instantiate(config.process), instantiate(config.target)
    channels = data.channels * (1 + process.context_channels)
    with torch.device("meta"):
        network = instantiate(config.network, in_channels=channels, out_channels=data.channels)
        x, t = torch.randn(1, channels, *data.image_size), torch.rand(1)
        assert network(x, t).shape == (1, data.channels, *data.image_size)
    prior, sampler = instantiate(config.prior), instantiate(config.sampler)
    prior = prior if isinstance(prior, Prior) else prior(process)
    denoiser = Denoiser(nn.Identity(), process, target)
    sampler = sampler if isinstance(sampler, Sampler) else sampler(denoiser)
    sampler.check(denoiser)
    instantiate(config.trainer, accelerator="cpu", precision="32-true", logger=False)


def _leaves(config: Any, key: str = "") -> dict[str, Any]:
    if isinstance(config, dict):
        return {k: v for name, value in config.items() for k, v in _leaves(value, f"{key}.{name}".lstrip(".")).items()}
    return {key: config}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_hold_only_differences(name: str) -> None:
    """Each value differs from what the same choices give without the experiment."""
    body = raw(CONFIGS / "experiment" / f"{name}.yaml")
    entries = [entry for entry in body.pop("defaults") if entry != "_self_"]
    chosen = [next(iter(entry.items())) if isinstance(entry, dict) else ("experiment", entry) for entry in entries]
    without = composed(*(f"{key.removeprefix('override /')}={value}" for key, value in chosen))
    for key, value in _leaves(body).items():
        assert OmegaConf.select(without, key) != value, key
