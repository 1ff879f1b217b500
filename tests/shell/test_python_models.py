"""`ds.Model` from Python: the same files, samples and configs as the command line's."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpm_scales as ds
from dpm_scales.describe import Configured, describe
from dpm_scales.images import load_image
from dpm_scales.models.instantiate import build, plain
from dpm_scales.models.io import load_model
from dpm_scales.models.model import build_model
from support.shell import CONFIGS, ROOT, assert_equal, composed, drawn, files, sample, small_model

SMALL = {"widths": [8, 8], "embedding_dim": 16, "attention_levels": []}


def small(process: ds.Process | None = None, **options: Any) -> ds.Model:
    """Return a small model whose last layer is not zero, so that samples depend on all of it."""
    torch.manual_seed(0)
    model = ds.Model(ds.UNet(**SMALL), process, **{"image_size": (6, 9), "channels": 1, **options})
    nn.init.normal_(model.denoiser.network.conv_out.weight, std=0.1)  # type: ignore[arg-type, union-attr]
    return model


class Own(nn.Module):
    """A network that keeps no attributes."""

    def __init__(self, in_channels: int, out_channels: int, num_classes: int | None, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(in_channels, width, 1), nn.SiLU(), nn.Conv2d(width, out_channels, 1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Unlabelled(Own):
    """A network that takes no labels."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return self.layers(x)  # type: ignore[no-any-return]


class Halving(nn.Module):
    """A network for sizes that two halves, and for three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 3, 2, 2)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return x + self.up(self.down(x))  # type: ignore[no-any-return]


# --- configs ----------------------------------------------------------------------------------------------------------


def chosen(group: str) -> list[str]:
    return [f"{group}={file.stem}" for file in sorted((CONFIGS / group).glob("*.yaml"))]


LISTS = {
    "process/noise=listed": ["process=ve", "process.num_scales=2", "process.noise.noise_scales=[1,2.0]"],
    "process/noise=listed_beta": ["process.num_scales=2", "process.noise.betas=[0.1,0.2]"],
    "process/blur=listed_sigmas": ["process=heat", "process.num_scales=2", "process.blur.blur_sigmas=[1.0,2.0]"],
    "process/blur=listed_times": ["process=heat", "process.num_scales=2", "process.blur.dissipation_times=[1.0,2.0]"],
    "process/noise=constant": ["process=heat"],
    "process/noise=edm": ["process=ve"],
    "process/noise=geometric": ["process=ve"],
    "process/noise=rectified": ["process=rectified"],
    "process/noise=rectified_open": ["process=rectified"],
    "process/blur=cut_off": ["process=blurring"],
}
NAMES = [
    *chosen("process"),
    *chosen("process/noise"),
    *chosen("process/blur"),
    *chosen("process/color"),
    *chosen("process/clock"),
    *("sampler=ancestral " + name for name in chosen("sampler/noise_color")),
    *chosen("target"),
    *chosen("network"),
    *(name for group in ("prior", "sampler", "weight") for name in chosen(group)),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_an_object_that_describes_itself_as_the_config_does(name: str) -> None:
    group, words = name.partition("/")[0].partition("=")[0], name.split()
    more = LISTS.get(name, ["process=heat"] if name.startswith("process/blur") else [])
    settings = plain(composed(*more, *words)[group])
    if settings["_target_"] is None or settings.get("_partial_"):  # the target's own weight, and "auto"
        assert name in ("weight=target", "prior=auto", "sampler=auto", "sampler=model")
        return
    if group == "network":
        settings |= {"in_channels": 1, "out_channels": 1}
    with torch.device("meta") if group == "network" else nullcontext():  # adm has 300 M parameters
        found = describe(build(settings, object, group))
        assert describe(build(found, object, group)) == found
    # arguments that a config leaves to the class's default come last, here as there
    assert {key: found[key] for key in settings} == settings


def test_a_model_of_objects_is_that_of_the_command_line() -> None:
    torch.manual_seed(0)
    line = small_model("network.num_heads=2", "process=blurring")
    torch.manual_seed(0)
    network = ds.UNet(**SMALL, num_heads=2, extra_decoder_block=False)
    model = ds.Model(network, ds.Blurring(), image_size=8, channels=1).with_sampler(steps=3)
    for part in ("process", "target", "prior", "sampler"):
        assert model.recipe.parts[part] == line.recipe.parts[part]
    assert line.recipe.parts["network"].items() <= model.recipe.parts["network"].items()
    assert_equal(dict(model.state_dict()), dict(line.state_dict()))


# --- files and samples ------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[ds.Model, dict[str, Any], list[str]]] = {
    "auto": (small(), {}, []),
    "own sampler": (small(ds.Blurring(num_scales=40), sampler=ds.DPMSolver(steps=4)), {}, []),
    "named": (small(), {"sampler": "ddim", "steps": 3}, ["sampler=ddim", "steps=3"]),
    "object": (
        small(ds.VE(num_scales=50)),
        {"sampler": ds.Ancestral(steps=4, grid="quadratic"), "size": (4, 7)},
        ["sampler=ancestral", "sampler.grid=quadratic", "steps=4", "size=[4,7]"],
    ),
    "coloured": (
        small(ds.Blurring(num_scales=40)),
        {"sampler": ds.Ancestral(noise_color=ds.PowerLaw(0.1)), "steps": 3},
        ["sampler=ancestral", "sampler/noise_color=power_law", "sampler.noise_color.exponent=0.1", "steps=3"],
    ),
    "own sampler, coloured": (
        small(ds.Blurring(num_scales=40)),
        {"sampler": ds.DPMSolver(1.0, 4, "uniform", noise_color=ds.PowerLaw(-0.2))},
        ["sampler/noise_color=power_law", "sampler.noise_color.exponent=-0.2", "steps=4"],
    ),
    "steps": (small(), {"steps": 8}, ["steps=8"]),
    "classes": (
        small(num_classes=3, class_names=["a", "b", "c"]),
        {"steps": 8, "labels": ["c", 0], "guidance": 3.0, "guidance_interval": (0.1, 0.8)},
        ["steps=8", "labels=[c,0]", "guidance=3", "guidance_interval=[0.1,0.8]"],
    ),
    "osmosis": (
        small(ds.OsmosisDiffusion(num_scales=20), prior=ds.OsmosisPrior(max_images=5)),
        {"steps": 2},
        ["steps=2"],
    ),
    "configured": (
        ds.Model(ds.configured(Own, width=6), image_size=5, channels=3, sampler=ds.configured(ds.DDIM, steps=3)),
        {},
        [f"allow=[{__name__}]"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_samples_are_those_of_the_command_line(name: str, tmp_path: Path) -> None:
    model, options, line = CASES[name]
    if name == "osmosis":
        model.prior.fit(torch.rand(4, 1, 6, 9), model.denoiser.process)
    model.train()
    model.save(tmp_path / "model")
    images = model.sample(5, seed=7, **options)
    assert model.training and images.dtype == torch.uint8 and images.unique().numel() > 5
    assert torch.equal(model.sample(5, seed=7, batch_size=2, **options), images)
    out = sample(tmp_path / "model", tmp_path / "out", "num_samples=5", "seed=7", "device=cpu", *line)
    shown = torch.stack([load_image(out / file) for file in sorted(drawn(out))])
    assert torch.equal(shown.expand_as(images), images)
    again = ds.load(tmp_path / "model", allow=[__name__])
    assert again.recipe == model.recipe and torch.equal(again.sample(5, seed=7, **options), images)
    again.save(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "model")


def test_an_assigned_sampler_is_checked_and_saved(tmp_path: Path) -> None:
    model = small()
    model.sampler = ds.DDIM(steps=4)
    model.save(tmp_path / "model")
    loaded = ds.load(tmp_path / "model")
    assert isinstance(loaded.sampler, ds.DDIM) and loaded.sampler.steps == 4
    assert torch.equal(loaded.sample(2), model.sample(2))
    for wrong, message in (
        (ds.DDIM(steps=2000), "steps=2000 exceeds"),
        ("ddim", "sampler must be a Sampler, got 'ddim'"),
    ):
        with pytest.raises(ds.UserError, match=message):
            model.sampler = wrong  # type: ignore[assignment]
    assert model.sampler.steps == 4


def test_load_is_load_model_and_there_is_one_model_class(tmp_path: Path) -> None:
    assert ds.load is load_model
    assert type(build_model(small().recipe)) is ds.Model
    small().save(tmp_path / "m")
    small(ds.VE()).save(str(tmp_path / "m"))
    assert isinstance(ds.load(tmp_path / "m").denoiser.process, ds.VE)


def test_saving_replaces_nothing_else(tmp_path: Path) -> None:
    model = small()
    (tmp_path / "file").write_text("text")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("image")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("learning_rate: 1\n")
    before = files(tmp_path)
    for name, message in {
        "file": "file is a file; give a folder",
        "photos": r"photos holds other files \(a.png\)",
        "other": "config.yaml is not of a dpm_scales model",
    }.items():
        with pytest.raises(ds.UserError, match=message):
            model.save(tmp_path / name)
    with pytest.raises(ds.UserError, match="no model in .*photos: neither model/"):
        ds.load(tmp_path / "photos")
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(ds.UserError, match="is not finite"):
        model.save(tmp_path / "new")
    assert files(tmp_path) == before and not (tmp_path / "new").exists()


def test_a_model_that_can_not_be_described_is_built_and_says_so_when_saved(tmp_path: Path) -> None:
    class Local(Own):
        pass

    model = ds.Model(Local(1, 1, None, 4), image_size=5, channels=1)
    assert model.sample(2, steps=2).shape == (2, 1, 5, 5)
    with pytest.raises(
        ds.UserError, match="can't be saved: the class Local is defined in a function; move it"
    ) as caught:
        model.save(tmp_path / "model")
    assert "\n" not in str(caught.value) and not (tmp_path / "model").exists()
    kept = ds.Model(Own(1, 1, None, 4), image_size=5, channels=1)
    with pytest.raises(ds.UserError, match=r"Own keeps no attribute .*'in_channels'.*ds.configured\(Own, in_channels"):
        kept.save(tmp_path / "model")
    local = ds.Model(ds.configured(Local, width=3), image_size=5, channels=1)
    assert local.sample(1, steps=2).shape == (1, 1, 5, 5)


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "process", [ds.VP(num_scales=100), ds.Blurring(), ds.InverseHeat()], ids=["vp", "blur", "heat"]
)
def test_the_loss_is_the_denoisers(process: ds.Process) -> None:
    model = small(process)
    images = torch.randint(0, 256, (5, 1, 6, 9), dtype=torch.uint8)
    low, high = process.value_range
    x_0 = images / 255 * (high - low) + low
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 1.0])
    expected = model.denoiser.loss(x_0, t, generator=torch.Generator().manual_seed(3)).mean()
    loss = model.loss(images, t, generator=torch.Generator().manual_seed(3))
    assert torch.equal(loss, expected) and loss.shape == () and loss.requires_grad
    assert torch.allclose(model(x_0, t, generator=torch.Generator().manual_seed(3)), expected)
    assert torch.equal(model.loss(images, generator=4), model.loss(images, generator=4))
    assert not torch.equal(model.loss(images, generator=4), model.loss(images, generator=5))
    weighted = model.loss(images, t, generator=0, loss_weight=ds.P2()) if process.has_noise() else loss
    assert weighted.isfinite()


def test_scales_of_the_loss_are_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small(ds.VP(num_scales=50)), []

    def loss(x_0: Tensor, t: Tensor, *_: object, **__: object) -> Tensor:
        seen.append(t)
        return t

    monkeypatch.setattr(model.denoiser, "loss", loss)
    for seed in (None, 3, torch.Generator().manual_seed(1)):
        model.loss(torch.zeros(10, 1, 6, 9, dtype=torch.uint8), generator=seed)
        t = seen[-1]
        assert torch.allclose(t * 50, (t * 50).round()) and 0 < t.min() and t.max() <= 1
        assert ((t - (torch.arange(10) + 0.5) / 10).abs() <= 0.05 + 1 / 50).all()


def test_labels_are_dropped_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small(num_classes=3, label_dropout=0.5), []

    def loss(x_0: Tensor, t: Tensor, labels: Tensor, *_: object, **__: object) -> Tensor:
        seen.append(labels)
        return t

    monkeypatch.setattr(model.denoiser, "loss", loss)
    images, labels = torch.zeros(400, 1, 6, 9, dtype=torch.uint8), torch.arange(400, dtype=torch.int32) % 3
    model.eval().loss(images, labels=labels, generator=0)
    assert torch.equal(seen[-1], labels.long())
    model.train().loss(images, labels=labels, generator=0)
    dropped = seen[-1] == 3
    assert 120 < dropped.sum() < 280 and torch.equal(seen[-1][~dropped], labels.long()[~dropped])


# --- networks and mistakes --------------------------------------------------------------------------------------------


def test_the_model_completes_a_network() -> None:
    network = ds.UNet(width=8)
    assert not list(network.parameters())
    with pytest.raises(ds.UserError, match="no layers yet"):
        network(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    process = ds.OsmosisDiffusion(4)
    model = ds.Model(network, process, image_size=8, channels=3, num_classes=4)
    assert model.denoiser.network is network
    assert (network.in_channels, network.out_channels, network.num_classes) == (6, 3, 4)
    whole = ds.UNet(6, 3, width=8, num_classes=4)
    assert [p.shape for p in whole.parameters()] == [p.shape for p in network.parameters()]
    assert ds.Model(network, process, image_size=8, num_classes=4).denoiser.network is network
    assert isinstance(ds.Model(image_size=8).denoiser.network, ds.UNet)


UINT8 = torch.zeros(2, 1, 6, 9, dtype=torch.uint8)
MISTAKES: dict[str, tuple[Any, str]] = {
    "size": (lambda: ds.Model(image_size=0), "image_size=0: allowed is a number of pixels"),
    "sizes": (lambda: ds.Model(image_size=(8, 8, 8)), r"image_size=\(8, 8, 8\): allowed"),
    "channels": (lambda: ds.Model(image_size=8, channels=0), "channels must be a whole number >= 1"),
    "classes": (lambda: small(num_classes=0), "num_classes must be a whole number >= 1"),
    "names": (lambda: small(num_classes=2, class_names=["a"]), "class_names must be 2 names"),
    "dropout": (lambda: small(num_classes=2, label_dropout=1), "label_dropout=1 leaves no label"),
    "network": (lambda: ds.Model("unet", image_size=8), "network must be a torch.nn.Module or ds.configured"),
    "process": (lambda: ds.Model(None, "vp", image_size=8), "process must be a Process; got 'vp'"),
    "target": (lambda: small(target="noize"), "unknown target 'noize': did you mean 'noise'"),
    "prior": (lambda: small(prior="data"), "needs a process that blurs, not VP"),
    "fit": (lambda: small(ds.Homogeneous(), target="noise"), "target needs noise"),
    "sampler": (lambda: small().sample(1, sampler="dim"), "unknown sampler 'dim': did you mean 'ddim'"),
    "sampler object": (lambda: small(sampler=ds.VP()), "sampler must be a Sampler or one of ancestral, auto, cold"),
    "steps": (lambda: small().sample(1, steps=2000), "steps=2000 exceeds"),
    "labels": (lambda: small().sample(1, labels=3), "trained without"),
    "number": (lambda: small().sample(0), "num_samples must be a whole number >= 1"),
    "device": (lambda: small().sample(1, device="cuda:99"), "device='cuda:99' is not available here"),
    "no device": (lambda: small().sample(1, device="gpu"), "device='gpu' is not available here"),
    "seed": (lambda: small().sample(1, seed=-1), "seed must be a whole number from 0"),
    "batch": (lambda: small().sample(1, batch_size=0), "batch_size must be a whole number >= 1"),
    "other channels": (lambda: ds.Model(ds.UNet(3, 3), image_size=8, channels=1), "in_channels=3, and 1 is needed"),
    "halves": (
        lambda: ds.Model(Halving(), image_size=7),
        "Halving can't be called with",
    ),
    "one channel": (lambda: ds.Model(Halving(), image_size=8, channels=1), "Halving can't be called with"),
    "no weights": (lambda: ds.Model(nn.Identity(), image_size=8), "Identity has no weights to train"),
    "forward": (lambda: ds.Model(Unlabelled(3, 3, None, 4), image_size=8), r"it must take \(x, t, labels=None\)"),
    "taken": (lambda: ds.Model(ds.configured(Halving), image_size=8), "Halving takes no argument in_channels"),
    "needed": (lambda: ds.Model(ds.configured(Own), image_size=8), "Own can't be made: .*missing .*'width'"),
    "floats": (lambda: small().loss(UINT8 + 0.5 + 200), "values from 200.5 to 200.5; give uint8, 0 to 255, or floats"),
    "integers": (lambda: small().loss(UINT8.long()), "images are torch.int64; give uint8"),
    "shape": (lambda: small().loss(UINT8[0]), r"shape \(1, 6, 9\); this model needs \(B, 1, H, W\)"),
    "three": (lambda: small().loss(UINT8.expand(2, 3, 6, 9)), r"needs \(B, 1, H, W\)"),
    "array": (lambda: small().loss(UINT8.numpy()), "images must be a tensor"),
    "t": (lambda: small().loss(UINT8, torch.rand(3)), r"t has shape \(3,\)"),
    "no labels": (lambda: small(num_classes=2).loss(UINT8), r"needs labels, \(2,\) integers from 0 to 1"),
    "high labels": (lambda: small(num_classes=2).loss(UINT8, labels=torch.tensor([0, 2])), "labels go beyond 0..1"),
    "unasked labels": (lambda: small().loss(UINT8, labels=torch.tensor([0, 1])), "this model has none"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str) -> None:
    make, message = MISTAKES[name]
    with pytest.raises(ds.UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_configured_part_is_no_object_yet() -> None:
    part = ds.configured(ds.DDIM, steps=3)
    assert isinstance(part, Configured) and describe(part) == {"_target_": "dpm_scales.samplers.DDIM", "steps": 3}


def test_models_need_neither_hydra_nor_lightning(tmp_path: Path) -> None:
    code = f"""
import sys, torch, dpm_scales as ds
model = ds.Model(ds.UNet(width=8), ds.Blurring(), image_size=8, channels=1)
model.loss(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).backward()
model.save({str(tmp_path / "m")!r})
ds.load({str(tmp_path / "m")!r}).sample(2, sampler="ddim", steps=2)
print(*[name for name in ("hydra", "lightning", "torchvision", "matplotlib", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
