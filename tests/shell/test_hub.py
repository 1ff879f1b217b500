"""Models on the Hub: downloaded, checked, uploaded with their page; failures in one line. Only transport is fake."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import httpx2
import huggingface_hub.errors
import pytest
import torch
import yaml
from PIL import Image

import dpm_scales as ds
from dpm_scales import plots
from dpm_scales.models import card, draw, load_model, save_model
from dpm_scales.models.card import plot_schedule, write_card
from dpm_scales.models.push import push_model
from dpm_scales.processes import VE, VP, Blurring, BlurringChain, InverseHeat, OsmosisDiffusion, Process, Spectral
from dpm_scales.schedules import PowerLaw, Rectified, SpectralClock
from support.diffusers_folders import write
from support.fake_hub import FakeHub, push, serving
from support.oracles import refused
from support.reference import TWINS
from support.shell import FAST, call, files, sample, small_model, train

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("hub") / "run", "process.num_scales=9", *FAST, "trainer.max_steps=2")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hub") / "pipeline", diffusers.DDPMScheduler(10))


@pytest.fixture
def hub(tmp_path: Path, run: Path) -> Any:
    with serving(FakeHub(), tmp_path / "cache") as served:
        served.upload("you/digits", run / "model")
        yield served


def first(model: Any) -> torch.Tensor:
    return next(draw(model, num_samples=2, seed=3))


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_model_is_the_one_that_was_uploaded(hub: FakeHub, run: Path) -> None:
    hub.add("you/digits", {**hub.files("you/digits"), "README.md": b"# text", "huge.bin": b"0" * 999})
    expected = first(load_model(run))
    assert torch.equal(first(load_model("hf://you/digits")), expected)
    assert hub.downloads() == {"config.yaml", "model.safetensors"}  # and nothing else of what is there
    chosen = load_model("hf://you/digits@main", sampler={"_target_": "dpm_scales.samplers.DDIM"}, steps=2)
    assert type(chosen.sampler).__name__ == "DDIM" and chosen.sampler.steps == 2


def test_also_in_a_folder_named_model_as_a_run_has_it(hub: FakeHub, run: Path) -> None:
    hub.upload("you/run", run)
    assert torch.equal(first(load_model("hf://you/run")), first(load_model(run)))
    assert hub.downloads() == {"config.yaml", "model/config.yaml", "model/model.safetensors"}


def test_a_revision_is_a_branch_or_a_commit(hub: FakeHub, tmp_path: Path) -> None:
    save_model(tmp_path / "other", small_model("process.num_scales=5"))
    commit = hub.branches["you/digits"]["main"]
    later = hub.upload("you/digits", tmp_path / "other")
    hub.branches["you/digits"]["refs/pr/1"] = commit
    scales = {
        at: load_model(f"hf://you/digits{at}").denoiser.process.num_scales for at in ("", f"@{commit}", f"@{later}")
    }
    assert scales == {"": 5, f"@{commit}": 9, f"@{later}": 5}
    assert load_model("hf://you/digits@refs/pr/1").denoiser.process.num_scales == 9


BROKEN = [
    httpx2.ConnectError("no route"),
    httpx2.ReadTimeout("slow"),
    huggingface_hub.errors.OfflineModeIsEnabled("off"),
]


@pytest.mark.parametrize("broken", [*BROKEN, 503], ids=lambda error: type(error).__name__)
def test_the_cache_serves_without_a_network(broken: Any, hub: FakeHub) -> None:
    expected = first(load_model("hf://you/digits"))
    hub.broken = broken
    assert torch.equal(first(load_model("hf://you/digits")), expected)
    with refused("the Hub can't be reached", "you/none is not whole in the cache"):
        load_model("hf://you/none")


def test_a_pipeline_of_diffusers(hub: FakeHub, pipeline: Path) -> None:
    expected = first(load_model(pipeline))
    hub.upload("them/ddpm", pipeline)
    assert torch.equal(first(load_model("hf://them/ddpm")), expected)
    # as older repositories have it: everything in one folder, and a pickle beside
    flat = {name.rpartition("/")[2]: data for name, data in files(pipeline).items()}
    hub.add("them/flat", {**flat, "diffusion_pytorch_model.bin": b"pickle"})
    hub.requests.clear()
    assert torch.equal(first(load_model("hf://them/flat")), expected)
    assert hub.downloads() == flat.keys()


def test_commands_take_it(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    ours = sample(run, tmp_path / "ours", "num_samples=3")
    place: Any = "hf://you/digits@main"
    theirs = sample(place, tmp_path / "theirs", "num_samples=3")
    assert (ours / "000002.png").read_bytes() == (theirs / "000002.png").read_bytes()
    measured = (f"model={place}", "reference=digits", "num_samples=8", "num_reference=8", "features=efflite0")
    outcome = call("evaluate.py", *measured, f"out={tmp_path / 'judged'}", cwd=tmp_path)
    told = call("evaluate.py", f"model={place}", "reference=data", cwd=tmp_path)
    assert told.status == 2 and "hf://you/digits@main" in told.err and "reference=NAME_OR_DIR" in told.err
    assert outcome.status == 0 and "hf://you/digits" in (tmp_path / "judged" / "evaluation.json").read_text(), (
        outcome.err
    )


REFUSED = {
    "hf://you": ("names no model on the Hub", "hf://owner/name"),
    "hf://you/a/b": ("names no model on the Hub",),
    "hf://you/../etc": ("names no model on the Hub",),
    "hf://you/..": ("'you/..' is no name",),
    "hf://you--me/digits": ("'you--me/digits' is no name",),
    "hf://you/digits@": ("names no model on the Hub",),
    "hf://you/nothing": ("model you/nothing", "private", "hf auth login"),
    "hf://you/private": ("model you/private", "HF_TOKEN"),
    "hf://you/gated": ("you/gated is gated", "https://huggingface.co/you/gated"),
    "hf://you/digits@v9": ("you/digits has no revision 'v9'",),
    f"hf://you/digits@{COMMIT}": ("you/digits has no revision",),
    "hf://you/other": ("you/other is no dpm_scales model; it has README.md, pytorch_model.bin",),
    "hf://you/empty": ("you/empty is no dpm_scales model; it has no files",),
    "hf://you/many": ("is no dpm_scales model; it has a0, a1, a2, a3, a4, a5 and 4 more",),
    "hf://you/half": ("you/half has no model.safetensors",),
    "hf://them/pickle": ("them/pickle has", "diffusion_pytorch_model.bin", "a pickle can run code"),
    "hf://them/sd": ("is a StableDiffusionPipeline of", "a unet (UNet2DModel) and a scheduler alone"),
}


def test_what_can_not_be_loaded_is_refused_in_one_line(hub: FakeHub, pipeline: Path, tmp_path: Path) -> None:
    hub.add("you/other", {"README.md": b"", "pytorch_model.bin": b"1"})
    hub.add("you/empty", {})
    hub.add("you/many", {f"a{i}": b"" for i in range(10)})
    hub.add("you/half", {"config.yaml": hub.files("you/digits")["config.yaml"]})
    hub.add("you/gated", hub.files("you/digits"))
    hub.add("you/private", hub.files("you/digits"))
    hub.gated.add("you/gated")
    hub.private.add("you/private")
    diffusion = files(pipeline)
    weights = diffusion.pop("unet/diffusion_pytorch_model.safetensors")
    hub.add("them/pickle", {**diffusion, "unet/diffusion_pytorch_model.bin": weights})
    index = (
        b'{"_class_name": "StableDiffusionPipeline", "unet": ["d", "U"], "vae": ["d", "A"], "scheduler": ["d", "S"]}'
    )
    hub.add("them/sd", {**diffusion, "model_index.json": index, "unet/diffusion_pytorch_model.safetensors": weights})
    with serving(hub, tmp_path / "cache", token=None):
        for place, words in REFUSED.items():
            with refused(*words):
                load_model(place)
        outcome = call("sample.py", "model=hf://you/other", f"out={tmp_path / 'out'}", cwd=tmp_path)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and "is no dpm_scales model" in outcome.err
    assert not hub.downloads() & {"unet/diffusion_pytorch_model.safetensors", "pytorch_model.bin"}


def test_it_is_checked_like_a_local_folder(hub: FakeHub) -> None:
    good = hub.files("you/digits")
    config = yaml.safe_load(good["config.yaml"])
    crafted = {**config, "network": {"_target_": "os.system", "command": "touch x"}}
    larger = {**config, "network": {**config["network"], "widths": [16, 16]}}
    flipped = bytearray(good["model.safetensors"])
    flipped[-9] ^= 1
    cases = {
        "evil": ({"config.yaml": yaml.safe_dump(crafted).encode()}, "may only use the classes of dpm_scales"),
        "misfit": ({"config.yaml": yaml.safe_dump(larger).encode()}, "do not fit the config"),
        "damaged": ({"model.safetensors": bytes(flipped)}, "is damaged"),
    }
    for name, (change, words) in cases.items():
        hub.add(f"you/{name}", {**good, **change})
        with refused(words):
            load_model(f"hf://you/{name}")
    with refused("raw weights are in checkpoints only"):
        load_model("hf://you/digits", weights="raw")


def test_without_huggingface_hub_it_says_what_to_install() -> None:
    with mock.patch.dict(sys.modules, {"huggingface_hub": None}), refused("huggingface_hub", "pip install"):
        load_model("hf://you/digits")


# --- uploading --------------------------------------------------------------------------------------------------------


def test_a_run_is_uploaded_with_its_page(hub: FakeHub, run: Path) -> None:
    outcome = push(run, "me/digits", "licence=mit")
    assert outcome.status == 0 and "https://huggingface.co/me/digits/commit/" in outcome.out, outcome.err
    held = hub.files("me/digits")
    assert {*held} - {".gitattributes"} == {
        *("README.md", "config.yaml", "model.safetensors", "samples.png", "schedule.png")
    }
    assert held["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    page = held["README.md"].decode()
    front = yaml.safe_load(page.split("---")[1])
    assert front["license"] == "mit" and front["library_name"] == "dpm_scales" and "VP" in front["tags"]
    for text in ('ds.load("hf://me/digits")', r"\lambda_t = a_t", "| val/loss |", "8x8 pixels", "CosineLogSNR"):
        assert text in page
    parameters = sum(p.numel() for p in load_model(run).denoiser.network.parameters())
    assert f"{parameters:,} parameters" in page
    assert torch.equal(first(load_model("hf://me/digits")), first(load_model(run)))


def test_the_code_of_the_page_runs(hub: FakeHub, run: Path) -> None:
    load_model(run).push("me/digits")
    page = hub.files("me/digits")["README.md"].decode()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["images"].shape == (16, 1, 8, 8)
    assert "license" not in page.split("---")[1] and "Training" not in page and "samples.png" not in page


def test_a_second_upload_keeps_what_it_does_not_write(hub: FakeHub, run: Path) -> None:
    push_model(load_model(run), "me/digits", private=True)
    assert "me/digits" in hub.private
    hub.add("me/digits", {**hub.files("me/digits"), "README.md": b"my own words", "notes.txt": b"x"})
    assert push(run, "hf://me/digits", "--keep-card", "message=again").status == 0
    assert hub.files("me/digits")["README.md"] == b"my own words" and "notes.txt" in hub.files("me/digits")
    push_model(load_model(run), "me/digits")
    assert hub.files("me/digits")["README.md"] != b"my own words"


NOT_PUSHED: dict[str, tuple[tuple[str, ...], str]] = {
    "no place": (("{run}",), "name a model and its place on the Hub"),
    "a bad place": (("{run}", "digits"), "is named owner/name, got 'digits'"),
    "no model": (("{run}/none", "me/x"), "no model at"),
    "option": (("{run}", "me/x", "licnce=mit"), "licence"),
    "licence": (("{run}", "me/x", "licence=my own"), "licence='my own'"),
    "private": (("{run}", "me/x", "private=yes"), "unknown private 'yes'"),
    "another's": (("{run}", "you/x"), "refuses access to you/x (status 403)"),
    "weights": (("{run}", "me/x", "weights=best"), "unknown weights 'best'"),
}


@pytest.mark.parametrize("name", NOT_PUSHED)
def test_what_can_not_be_uploaded_is_refused_in_one_line(name: str, hub: FakeHub, run: Path) -> None:
    arguments, words = NOT_PUSHED[name]
    outcome = push(*(argument.format(run=run) for argument in arguments))
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and words in outcome.err, outcome.err
    assert "me/x" not in hub.commits


def test_without_a_token_or_a_network_nothing_is_uploaded(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    model = load_model(run)
    with serving(hub, tmp_path / "cache", token=None), refused("nobody is logged in", "hf auth login"):
        push_model(model, "me/digits")
    hub.broken = httpx2.ConnectError("no route")
    with refused("the Hub can't be reached", "no route"):
        push_model(model, "me/digits")
    hub.broken = None
    with refused("no such folder"):
        push_model(model, "me/digits", run=tmp_path / "none")
    (damaged := Path(shutil.copytree(run, tmp_path / "run")) / "result.json").write_text("{")
    with refused("result.json is damaged"):
        push_model(model, "me/digits", run=damaged.parent)
    next(model.denoiser.network.parameters()).data.flatten()[0] = float("inf")
    with refused("not finite"):
        push_model(model, "me/digits")
    assert "me/digits" not in hub.commits


FORMULAS: dict[str, tuple[Process, tuple[str, ...]]] = {
    "vp": (VP(20), (r"\lambda_t = a_t, \qquad a_t^2 + \gamma_t^2 = 1", "noise, a and γ: `CosineLogSNR`")),
    "ve": (VE(20), (r"\lambda_t = 1 $$", "noise: `EDMNoise`", "L = 0, a = 1.")),
    "heat": (InverseHeat(20), (r"\lambda_t(\mu) = e^{-\mu T(t)} $$", "blur, T in px²: `LogBlur`")),
    "blurring": (Blurring(20), (r"a_t \left((1 - d) e^{-\mu T(t)} + d\right), \qquad d = 0.001",)),
    "chain": (BlurringChain(20), (r"\gamma_t(L)\, \varepsilon", r"\lambda_t(\mu) = e^{-\mu T(t)}")),
    "osmosis": (
        OsmosisDiffusion(20),
        ("each sample has its own, by its context", r"d = 0.001, \qquad a_t^2 + \gamma_t^2 = 1 $$", "k = 0, …, 20"),
    ),
    "osmosis-flow": (OsmosisDiffusion(20, Rectified()), ("d = 0.001 $$", "noise, a and γ: `Rectified`")),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_page_has_the_formulas_of_the_process(name: str, tmp_path: Path) -> None:
    process, words = FORMULAS[name]
    model = ds.Model(ds.UNet(width=8), process, image_size=8, channels=1)
    write_card(tmp_path, model, "me/x")
    page = (tmp_path / "README.md").read_text()
    for text in words:
        assert text in page, page
    assert "default:" not in page and ("NoNoise" not in page.split("## Parts")[0])


@pytest.mark.parametrize("process", [VE(20), *(twin.build() for twin in TWINS)], ids=lambda p: type(p).__name__)
def test_every_process_has_a_plot(process: Process, tmp_path: Path) -> None:
    plot_schedule(tmp_path / "a.png", process)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > picture.size[1] > 300
        assert len(set(picture.convert("L").resize((80, 40)).tobytes())) > 10


@pytest.mark.parametrize(
    ("process", "curves"),
    [(VP(20), (1, 1)), (VP(20, color=PowerLaw(0.5)), (1, 6)), (InverseHeat(20), (6, 1)), (Blurring(20), (6, 1)),
     (Spectral(20, clock=SpectralClock(1.0)), (6, 6))],
)  # fmt: skip
def test_the_plot_has_a_curve_for_each_frequency_where_they_differ(
    process: Process, curves: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    @contextmanager
    def figure(*arguments: Any, **options: Any) -> Iterator[Any]:
        with plots.figure(*arguments, **options) as (drawing, axes):
            yield drawing, axes
            drawn.extend(len(axis.lines) for axis in axes)

    monkeypatch.setattr(card, "figure", figure)
    plot_schedule(tmp_path / "a.png", process)
    assert tuple(drawn) == curves
