"""The studio without a browser: photos, processes, curves, exports, samples and edits, against the package itself."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import dpm_scales as ds
from dpm_scales.cli import configs
from dpm_scales.editing.osmosis import blend, remove_shadow
from dpm_scales.images import load_image, png_bytes, save_png, to_range, to_uint8
from dpm_scales.metrics import image_variance
from dpm_scales.operators import HeatOperator
from dpm_scales.processes import Process
from dpm_scales.studio import drawn, photos, retouch
from dpm_scales.studio.curves import View, ring_power, schedule
from dpm_scales.studio.figures import edited_schedule, scale_space
from dpm_scales.studio.laws import Laws, build_process, export
from support.oracles import refused
from support.shell import command, composed, files, sample

LAWS = Laws()
PHOTO = photos.example("chelsea").reduced(128)
SMALL = photos.Photo("small", PHOTO.image[:, 20:52, 40:88], (32, 48))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of grey images of 8x8 pixels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("studio") / "one"
    ds.Model(ds.UNet(width=8), ds.Blurring(num_scales=8), image_size=8, channels=1).save(folder)
    return folder


def content(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# --- photos -----------------------------------------------------------------------------------------------------------


def test_uploads_are_reduced_and_described() -> None:
    photo = photos.read_upload(content(Image.new("RGB", (1200, 800), "red"), "JPEG"), "red.jpg")
    assert photo.size == (341, 512) and photo.note() == "red.jpg: reduced from 1200 × 800 to 512 × 341 px, RGB"
    small = photos.read_upload(content(Image.new("L", (30, 20)), "PNG"), "grey.png")
    assert small.size == (20, 30) and small.note() == "grey.png: 30 × 20 px, grey"
    assert small.reduced(128) is small and photo.reduced(128).size == (85, 128)
    turned = photos.read_upload(
        content(
            Image.new("RGB", (40, 10)),
            "JPEG",
            exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
        )
    )
    assert turned.size == (40, 10)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"", ("is empty",)),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ("is no image", "PNG")),
        (bytes(photos.MAX_BYTES + 1), ("has 20.0 MB", "allowed are 20 MB")),
        (content(Image.new("1", (6000, 5000)), "PNG"), ("6000 × 5000 pixels", "25 megapixels")),
        (content(Image.new("RGB", (64, 64)), "PNG")[:100], ("not a readable image",)),
        (content(Image.new("RGB", (64, 64)), "PDF"), ("is no image",)),
        (content(Image.new("RGB", (64, 64)), "EPS"), ("is no image",)),
    ],
)
def test_uploads_that_can_not_be_used_are_refused_in_a_line(bad: bytes, words: tuple[str, ...]) -> None:
    refused(lambda: photos.read_upload(bad, "given.png"), "given.png", *words)


def test_photos_fit_models_of_any_shape() -> None:
    ramp = torch.arange(40).expand(3, 20, -1).to(torch.uint8)
    photo = photos.Photo("ramp", ramp, (20, 40))
    square = photos.fitted(photo, 1, (20, 20))
    assert square.shape == (1, 20, 20) and (square[0, 0] == torch.arange(10, 30)).all()
    assert photos.fitted(photos.Photo("grey", ramp[:1], (20, 40)), 3, (10, 4)).shape == (3, 10, 4)


def test_the_shadow_of_the_example_is_removed_by_its_own_mask() -> None:
    shaded, photo = (photos.example(name).reduced(256) for name in (photos.SHADED, "chelsea"))
    mask = photos.capsule(photos.SHADOW, shaded.size) <= 0
    found = retouch.shadow(shaded.image, mask, penumbra=2).double()
    inside = photos.capsule(photos.SHADOW, shaded.size) < -3
    before, after = ((one.double() - photo.image)[:, inside].abs().mean() for one in (shaded.image, found))
    assert after < 0.5 * before


# --- processes --------------------------------------------------------------------------------------------------------


def test_every_process_is_offered_and_its_settings_are_those_of_train() -> None:
    assert LAWS.names() == configs.choices("process")
    for name in ("vp", "heat", "blurring", "osmosis_diffusion"):
        assert LAWS.settings(name) == composed(f"process={name}").process
    assert LAWS.settings("blurring", {"noise": "sigmoid", "blur": "log", "color": "none"}) == (
        composed("process=blurring", "process/noise=sigmoid", "process/blur=log").process
    )


@pytest.mark.parametrize("name", configs.choices("process"))
def test_every_process_can_be_edited_and_exported_for_train(name: str, tmp_path: Path) -> None:
    found = LAWS.parameters(name)
    assert {one.key for one in found} >= {"num_scales"} and len({one.key for one in found}) == len(found) <= 20
    same = LAWS.edited(name, {}, {one.key: one.value for one in found})
    assert same == LAWS.settings(name)
    edited = LAWS.edited(name, {}, {"num_scales": "12"})
    text = export(edited, "mine")
    (tmp_path / "process").mkdir()
    (tmp_path / "process/mine.yaml").write_text(text)
    cfg = composed(f"hydra.searchpath=['file://{tmp_path}']", "process=mine")
    assert cfg.process == edited and cfg.process.num_scales == 12
    assert "--config-dir my_configs process=mine" in text.splitlines()[1]
    own = Laws(tmp_path)
    assert own.names()[0] == "mine" and own.settings("mine") == edited
    assert isinstance(own.process("mine", (8, 8)), Process) and own.process("mine", (8, 8)).num_scales == 12


def test_values_that_do_not_fit_are_refused_in_a_line() -> None:
    def edited(key: str, text: str) -> None:
        build_process(LAWS.edited("blurring", {}, {key: text}), (8, 8))

    refused(lambda: edited("blur.blur_sigma_max", "-1"), "blur_sigma_max")
    refused(lambda: edited("noise.logsnr_min", "{a: 1}"), "noise.logsnr_min must be a number", "{a: 1}")
    refused(lambda: edited("noise.logsnr_min", "${oc.env:HOME}"), "interpolation")
    refused(lambda: edited("noise._target_", "os.system"), "no parameter 'noise._target_'")
    refused(lambda: edited("num_scales", "5000000"), "at most 2000")
    refused(lambda: LAWS.settings("blurrin"), "blurring")
    refused(lambda: LAWS.settings("vp", {"noise": "cosin"}), "cosine")
    for name in ("../x", "A b", "", "vp"):
        refused(lambda name=name: export(LAWS.settings("vp"), name), "vp" if name == "vp" else "allowed are a-z")


def test_own_configs_name_other_classes_only_if_allowed(tmp_path: Path) -> None:
    (tmp_path / "process").mkdir()
    refused(lambda: Laws(tmp_path), "holds no process/NAME.yaml")
    refused(lambda: Laws(tmp_path / "none"), "no such folder")
    (tmp_path / "process/mine.yaml").write_text("_target_: collections.abc.Sized\nnum_scales: 4\n")
    refused(lambda: Laws(tmp_path), "collections.abc.Sized")
    (tmp_path / "process/mine.yaml").write_text("_target_: support.own_package.Mine\nnum_scales: 4\n")
    refused(lambda: Laws(tmp_path), "allow=[support]")
    (tmp_path / "process/mine.yaml").write_text("defaults:\n  - noise: edm\n_target_: dpm_scales.processes.VE\n")
    assert Laws(tmp_path).parts("mine")["noise"][1] == "edm"


# --- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vp", "heat", "blurring", "power_law", "homogeneous", "rectified"])
def test_the_variance_is_the_mean_of_that_of_drawn_images(name: str) -> None:
    process = LAWS.process(name, SMALL.size)
    view = View(name, process, SMALL.image)
    ts, variance = view.variance
    low, high = process.value_range
    x_0 = to_range(SMALL.image[None], process.value_range, torch.float64).expand(600, -1, -1, -1)
    for k in (0, 10, 30):
        x = x_0[:1] if k == 0 else process.sample(x_0, float(ts[k]), torch.Generator().manual_seed(1))
        drawn_variance = image_variance((x - low) / (high - low)).mean()
        assert variance[k] == pytest.approx(float(drawn_variance), rel=0.01), (name, ts[k])


def test_the_entropy_is_that_of_the_process_and_the_image_is_its_sample() -> None:
    for name in ("blurring", "inverse_osmosis"):
        process = LAWS.process(name, SMALL.size)
        view = View(name, process, SMALL.image)
        ts, nats = view.entropy or (None, None)
        assert ts is not None and nats is not None and (np.diff(nats) >= -1e-9).all()
        exact = process.conditional_entropy(float(ts[20]), SMALL.size, view.context).mean() / (32 * 48)
        assert nats[20] == pytest.approx(float(exact), abs=1e-9 if name == "inverse_osmosis" else 0.02)
        law = process.marginal(view.x_0, 0.5, view.context)
        moved = view.operator.to_pixels(view.operator.apply(law.std, view.white))
        assert torch.allclose(view.at(0.5), law.mean + moved, atol=1e-4)
        assert view.is_closed == (name == "blurring")
    assert View("heat", LAWS.process("heat", SMALL.size), SMALL.image).snr(0.0) is None
    assert View("homogeneous", LAWS.process("homogeneous", SMALL.size), SMALL.image).entropy is None


def test_noise_of_the_datas_colour_has_that_of_the_photo() -> None:
    view = View("equal_snr", build_process(LAWS.settings("equal_snr"), SMALL.size), SMALL.image)
    white = View("vp", LAWS.process("vp", SMALL.size), SMALL.image)
    r, power = view.power(view.process.noise_at(0.9, view.white, view.operator))
    _, flat = white.power(white.process.noise_at(0.9, white.white, white.operator))
    assert power[0] / power[-1] > 20 > 3 > flat[0] / flat[-1]


def test_rings_hold_all_of_the_energy() -> None:
    x = torch.randn(2, 3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    r, power = ring_power(x)
    assert (np.diff(r) > 0).all() and r[0] == pytest.approx(0.5 / 40) and 0.6 < r[-1] < 0.7072
    assert power.mean() == pytest.approx(1, abs=0.2)
    y, x_mean = torch.zeros(1, 1, 24, 40, dtype=torch.float64), HeatOperator()
    y[0, 0, 0, 1] = 7.0
    r, power = ring_power(x_mean.synthesis(y))
    assert power[0] == pytest.approx(49) and power[1:].max() < 1e-9


def test_schedules_are_the_curves_of_the_process() -> None:
    process = LAWS.process("blurring", (32, 32))
    found, t = schedule(process, 11), torch.tensor(0.4, dtype=torch.float64)
    for r in found.signal:
        mu = torch.tensor([(2 * np.pi * r) ** 2], dtype=torch.float64)
        assert found.signal[r][4] == pytest.approx(float(process.signal_scale(t, mu)), rel=1e-9)
        assert found.noise[r][4] == pytest.approx(float(process.noise_scale(t, mu)), rel=1e-9)
        assert found.log_snr[r][4] == pytest.approx(float(process.log_snr(t, mu)), rel=1e-9)
    assert found.blur_sigma is not None and found.blur_sigma[-1] == pytest.approx(20)


@pytest.mark.parametrize(
    "name",
    ["ve", "homogeneous", "heat", "blurring_chain", "osmosis", "inverse_osmosis", "equal_snr", "cut_off", "clocked"],
)
def test_processes_of_all_kinds_are_drawn(name: str) -> None:
    tiny = SMALL.image[:, :16, :16]
    views = [View(one, LAWS.process(one, (16, 16)), tiny) for one in (name, "vp")]
    images = [view.at(0.5) for view in views]
    figure = scale_space(views, images, 0.5)
    assert figure.ndim == 3 and figure.dtype == np.uint8 and figure.std() > 5
    assert views[0].shown(images[0]).shape == (3, 16, 16)
    curves = schedule(views[0].process, 11)
    assert edited_schedule(curves, curves, name).std() > 5


# --- models -----------------------------------------------------------------------------------------------------------


def test_models_come_from_the_words_of_the_command_line_alone(saved: Path, tmp_path: Path) -> None:
    found = drawn.find_models([str(saved), str(saved.parent)])
    assert found == {str(saved): str(saved)}
    models = drawn.Models(found)
    assert models.load(str(saved)) is models.load(str(saved))
    refused(lambda: models.load("/etc"), "unknown model")
    refused(lambda: drawn.Models({}).load(None), "start with dpm-scales studio")
    refused(lambda: drawn.find_models([str(tmp_path / "none")]), "no such file or folder")
    refused(lambda: drawn.find_models([str(tmp_path)]), "neither a run nor an export")


def test_samples_are_those_of_the_model_and_the_last_frame_is_them(saved: Path) -> None:
    model, shares = ds.load(saved), []
    found = drawn.sample(model, 3, 5, "ddim", 4, on_share=shares.append)
    assert (found.images == model.sample(3, seed=5, sampler="ddim", steps=4)).all()
    assert shares == [0.25, 0.5, 0.75, 1.0] and found.scales[-1] == 0 and len(found.frames) == 4
    assert (found.frames[-1] == found.images).all() and (found.frame(0) != found.frame(3)).any()
    assert found.grid().ndim == found.strip().ndim == 3
    refused(lambda: drawn.sample(model, 65), "number")
    refused(lambda: drawn.sample(model, 1, sampler="ddmi"), "ddim")
    refused(lambda: drawn.sample(model, 1, seconds=-1.0), "stopped after", "take fewer steps")


def test_inpainting_is_that_of_the_command_and_keeps_the_rest(saved: Path, tmp_path: Path) -> None:
    image = ds.Digits().train().images[3]
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[2:5, 3:7] = True
    save_png(tmp_path / "image.png", image)
    save_png(tmp_path / "mask.png", hole[None].to(torch.uint8) * 255)
    options = ("task=inpaint", f"image={tmp_path}/image.png", f"mask={tmp_path}/mask.png", "num_samples=2", "seed=4")
    made = sample(saved, tmp_path / "out", *options, "device=cpu")
    model = ds.load(saved)
    results = drawn.inpaint(model, image, hole, 2, 4)
    assert (results == torch.stack([load_image(made / name) for name in sorted(files(made)) if name[0] == "0"])).all()
    assert (results[:, :, ~hole] == image[:, ~hole]).all() and (results[:, :, hole] != image[:, hole]).any()
    assert drawn.describe_sampler(model, None).startswith("Ancestral, 8 steps, each repeated 2 times")
    refused(lambda: drawn.inpaint(model, image, torch.zeros_like(hole)), "nothing is painted")
    refused(lambda: drawn.inpaint(model, image, torch.ones_like(hole)), "all of the image is painted")


# --- osmosis ----------------------------------------------------------------------------------------------------------


def painted(mask: torch.Tensor) -> str:
    return retouch.PREFIX + base64.b64encode(png_bytes(mask[None].to(torch.uint8) * 255)).decode()


def test_masks_are_read_and_checked() -> None:
    mask = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) > 0.5
    assert (retouch.read_mask(painted(mask), (20, 30)) == mask).all()
    wide = retouch.PREFIX + base64.b64encode(content(Image.new("1", (20000, 4)), "PNG")).decode()
    for text, words in (
        ("", "nothing is painted"),
        (None, "nothing is painted"),
        ("/etc/passwd", "no PNG image"),
        (retouch.PREFIX + "%%%", "no PNG image"),
        (retouch.PREFIX + base64.b64encode(content(Image.new("L", (30, 20)), "GIF")).decode(), "no PNG image"),
        (wide, "no PNG image of the studio"),
        (painted(torch.zeros(20, 30, dtype=torch.bool)), "nothing is painted"),
        (painted(torch.ones(20, 30, dtype=torch.bool)), "all of the image is painted"),
        (painted(mask.mT), "20 × 30 pixels, the image 30 × 20"),
    ):
        refused(lambda text=text: retouch.read_mask(text, (20, 30)), words)


def test_osmosis_is_that_of_the_library() -> None:
    x = SMALL.image
    mask = torch.zeros(SMALL.size, dtype=torch.bool)
    mask[8:20, 10:30] = True
    shares: list[float] = []
    found = retouch.shadow(x, mask, penumbra=2, on_channel=shares.append)
    floats = to_range(x[:, None], (0, 1), torch.float64)
    exact = remove_shadow(floats, mask, "region", "pinned", 1 / 255, 1e-4, 2)
    assert (found.int() - to_uint8(exact[:, 0], (0, 1)).int()).abs().max() <= 1 and shares == [1 / 3, 2 / 3, 1.0]
    pasted, result = retouch.clone(x.flip(-1), x, mask, (13.5 / 32, 19.5 / 48))
    assert (pasted == torch.where(mask, x, x.flip(-1))).all()
    exact = blend(floats.flip(-1), floats, mask, "pinned", 1 / 255, 1e-4)
    assert (result.int() - to_uint8(exact[:, 0], (0, 1)).int()).abs().max() <= 1
    refused(lambda: retouch.shadow(x, mask, "edge", "outside"), "would keep the shadow")
    grey = retouch.clone(x[:1], x, mask)[1]
    assert grey.shape == x.shape


# --- the command ------------------------------------------------------------------------------------------------------


def test_help_has_three_examples_and_mistakes_are_one_line(saved: Path, tmp_path: Path) -> None:
    lines = command("studio", "--help").out.splitlines()
    first = lines.index("examples:") + 1
    examples = lines[first : lines.index("", first)]
    assert len(examples) == 3 and all(line.split()[:2] == ["dpm-scales", "studio"] for line in examples)
    for words, parts in (
        (("port=70000",), ("port=70000",)),
        (("prot=1",), ("unknown option 'prot'", "port")),
        (("--share",), ("unknown flag",)),
    ):
        outcome = command("studio", *words)
        assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
        assert all(part in outcome.err for part in parts), outcome.err


def test_without_gradio_one_line_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpm_scales.studio.run.find_spec", lambda name: None)
    outcome = command("studio", "port=0")
    assert outcome.status == 2 and outcome.err == "error: the studio needs Gradio: pip install 'dpm-scales[studio]'\n"


def test_models_of_another_format_are_one_line_before_the_page_opens(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the studio's page needs the extra studio")
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"format": "another"}))
    outcome = command("studio", tmp_path, "port=0")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and str(tmp_path) in outcome.err
