"""The studio in a headless browser: each tab is used, pictures change, mistakes are one line, nothing is fetched."""

from __future__ import annotations

import base64
import io
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import dpm_scales as ds
from dpm_scales.images import save_png
from support.shell import composed

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for found in map(shutil.which, BROWSERS) if found), None)
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
MISSING += [] if BROWSER else ["Chromium, which playwright drives: apt-get install chromium"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"without {', '.join(MISSING)}")]

#: milliseconds; a busy machine has a quarter of a core for each of server, browser and test
PATIENCE = 120_000


@dataclass
class Visit:
    """A page of the studio in a browser, with what it printed and whom it asked."""

    page: Any
    model: Path
    console: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def tab(self, *names: str) -> None:
        for name in names:
            self.page.get_by_role("tab", name=name, exact=True).click()

    def source(self, place: str) -> str:
        """Return the address of a picture, empty without one."""
        found = self.page.locator(f"#{place} img")
        return found.get_attribute("src") or "" if found.count() else ""

    def pixels(self, place: str) -> np.ndarray:
        """Return a picture as the browser received it, ``(H, W, 3)``."""
        script = """async (image) => {
            const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
            let text = ""; for (const byte of bytes) text += String.fromCharCode(byte);
            return btoa(text); }"""
        content = self.page.locator(f"#{place} img").evaluate(script)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")).astype(int)

    def changed(self, place: str, before: str) -> np.ndarray:
        """Wait for another picture and return it."""
        script = """([place, before]) => {
            const image = document.querySelector(`#${place} img`);
            return image && image.complete && image.getAttribute("src") !== before; }"""
        self.page.wait_for_function(script, arg=[place, before], timeout=PATIENCE)
        return self.pixels(place)

    def fill(self, place: str, text: str) -> None:
        """Type a value into a field and leave it."""
        box = self.page.locator(f"#{place} input:not([type=range]), #{place} textarea").first
        box.fill(text)
        box.press("Tab")

    def choose(self, place: str, text: str) -> None:
        """Choose a value of a list."""
        box = self.page.locator(f"#{place}")
        box.locator("input").click()
        box.get_by_role("option", name=text, exact=True).click()  # another list may still be open

    def paint(self, name: str, *points: tuple[float, float]) -> None:
        """Drag the brush through points, as shares of the width and height."""
        canvas = self.page.locator(f"#brush-{name} canvas")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        for number, (x, y) in enumerate(points):
            self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
            if number == 0:
                self.page.mouse.down()
        self.page.mouse.up()

    def strokes(self, name: str) -> str:
        return self.page.locator(f"#brush-{name} canvas").get_attribute("data-strokes") or "0"

    def mistake(self) -> str:
        """Wait for the message of a mistake, close it and return it."""
        toast = self.page.locator(".toast-body").last
        toast.wait_for(timeout=PATIENCE)
        text = " ".join(toast.inner_text().split())
        toast.locator(".toast-close").click()
        toast.wait_for(state="hidden", timeout=PATIENCE)
        return text


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    """The page of a studio with one small model, in one browser for the whole file."""
    from playwright.sync_api import sync_playwright

    from dpm_scales.studio import server
    from dpm_scales.studio.run import address, prepare, serving

    folder = tmp_path_factory.mktemp("studio")
    torch.manual_seed(0)
    ds.Model(ds.UNet(width=8), ds.Blurring(num_scales=8), image_size=8, channels=1).save(folder / "model")
    studio = prepare([str(folder / "model")], {})
    with server.listen("127.0.0.1", 0) as listening, serving(studio, listening, "127.0.0.1") as serves:
        thread = threading.Thread(target=serves.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        with sync_playwright() as playwright:
            options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            made = Visit(page, folder / "model")
            page.on("request", lambda request: made.hosts.add(request.url.partition("://")[2].partition("/")[0]))
            page.on(
                "console", lambda line: made.console.append(line.text) if line.type in ("error", "warning") else None
            )
            page.on("pageerror", lambda error: made.console.append(str(error)))
            page.goto(address(listening))
            page.wait_for_selector("#process-figure img", timeout=PATIENCE)
            yield made
            browser.close()
        serves.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def test_a_slider_changes_the_pictures_of_both_processes_and_their_curves(visit: Visit) -> None:
    before = {key: visit.source(f"process-{key}") for key in ("picture-a", "picture-b", "figure")}
    first = visit.pixels("process-picture-a")
    visit.fill("process-t", "0.9")
    after = visit.changed("process-picture-a", before["picture-a"])
    assert after.shape == first.shape == (170, 256, 3) and np.abs(after - first).mean() > 5
    visit.changed("process-picture-b", before["picture-b"])
    figure = visit.changed("process-figure", before["figure"])
    assert figure.std() > 5
    assert "blurring, t = 0.9" in visit.page.locator("#process-picture-b").inner_text()


def test_another_process_and_an_upload_are_shown(visit: Visit, tmp_path: Path) -> None:
    before = visit.source("process-picture-b")
    visit.choose("process-b", "inverse_osmosis")
    visit.changed("process-picture-b", before)
    assert "inverse_osmosis" in visit.page.locator("#process-picture-b").inner_text()
    before, photo = visit.source("process-picture-i"), tmp_path / "ramp.png"
    ramp = torch.arange(600).mul(255).div(599).to(torch.uint8).expand(3, 300, -1)
    save_png(photo, ramp)
    visit.page.locator("#process-upload").locator("xpath=..").locator("input[type=file]").first.set_input_files(photo)
    shown = visit.changed("process-picture-i", before)
    assert shown.shape == (128, 256, 3) and shown[:, 0].mean() < 10 < 245 < shown[:, -1].mean()
    assert "ramp.png: reduced from 600 × 300 to 256 × 128 px, RGB" in visit.page.locator("#process-note").inner_text()


def test_uploads_that_are_no_images_or_too_large_are_one_line(visit: Visit, tmp_path: Path) -> None:
    before = visit.source("process-picture-i")
    upload = visit.page.locator("#process-upload").locator("xpath=..").locator("input[type=file]").first
    (tmp_path / "text.png").write_text("no image at all")
    upload.set_input_files(tmp_path / "text.png")
    assert "text.png is no image that can be read; allowed are BMP" in visit.mistake()
    (tmp_path / "huge.png").write_bytes(bytes(21 * 2**20))
    upload.set_input_files(tmp_path / "huge.png")
    assert "20" in visit.mistake()
    save_png(tmp_path / "wide.png", torch.zeros(1, 1, 25_000_001, dtype=torch.uint8))
    upload.set_input_files(tmp_path / "wide.png")
    assert "has 25000001 × 1 pixels; allowed are 20 MB and 25 megapixels" in visit.mistake()
    assert visit.source("process-picture-i") == before


def test_an_edited_schedule_is_drawn_and_its_export_is_what_train_composes(visit: Visit, tmp_path: Path) -> None:
    visit.tab("Schedule")
    before = visit.source("schedule-figure")
    label = visit.page.locator("#schedule-fields").get_by_text("blur.blur_sigma_max", exact=True)
    box = label.locator("xpath=ancestor::label").locator("input, textarea").first
    box.click()
    box.press("Control+a")
    box.press_sequentially("7.5")
    figure = visit.changed("schedule-figure", before)
    assert figure.std() > 5
    visit.page.locator("#schedule-yaml").get_by_text("7.5").wait_for(timeout=PATIENCE)
    lines = visit.page.locator("#schedule-yaml .cm-line").all_inner_texts()
    text = "\n".join(lines).replace("\xa0", " ")
    assert yaml.safe_load(text)["blur"]["blur_sigma_max"] == 7.5
    (tmp_path / "process").mkdir()
    (tmp_path / "process/my_process.yaml").write_text(text + "\n")
    cfg = composed(f"hydra.searchpath=['file://{tmp_path}']", "process=my_process")
    assert cfg.process == yaml.safe_load(text)
    box.press("Control+a")
    box.press_sequentially("-1")
    visit.page.locator("#schedule-usage").get_by_text("blur_sigma_max must be").wait_for(timeout=PATIENCE)
    assert "the last one that fits" in visit.page.locator("#schedule-usage").inner_text()


def test_samples_and_their_trajectory_are_drawn(visit: Visit) -> None:
    visit.tab("Samples")
    visit.fill("samples-number", "4")
    visit.page.locator("#samples-go button, button#samples-go").click()
    grid = visit.changed("samples-grid", "")
    expected = ds.make_grid(ds.load(visit.model).sample(4, seed=0), padding=2, upscale=8)
    assert (grid == expected.expand(3, -1, -1).permute(1, 2, 0).numpy()).all()
    before = visit.source("samples-frame")
    last = visit.pixels("samples-frame")
    visit.fill("samples-place", "1")
    noisy = visit.changed("samples-frame", before)
    assert noisy.shape == last.shape and (noisy != last).any()
    assert visit.pixels("samples-strip").shape[1] > visit.pixels("samples-strip").shape[0]


def test_a_painted_part_is_invented(visit: Visit) -> None:
    visit.tab("Inpainting")
    go = visit.page.locator("#inpaint-go button, button#inpaint-go")
    visit.page.wait_for_function(
        "document.querySelector('#brush-inpaint canvas').dataset.strokes === '0'", timeout=PATIENCE
    )
    go.click()
    assert "nothing is painted" in visit.mistake()
    visit.paint("inpaint", (0.1, 0.1), (0.4, 0.1))
    assert visit.strokes("inpaint") == "1"
    go.click()
    sheet = visit.changed("inpaint-result", "")
    assert sheet.shape[1] > sheet.shape[0] and sheet.std() > 5
    assert "Ancestral" in visit.page.locator("#inpaint-cost").inner_text()


def test_a_shadow_is_removed_within_the_painted_part(visit: Visit) -> None:
    visit.tab("Osmosis", "Shadow removal")
    visit.choose("shadow-side", "128 px")
    visit.page.get_by_text("to 128 × 85 px").first.wait_for(timeout=PATIENCE)
    visit.paint("shadow", (0.3, 0.4), (0.5, 0.4))
    visit.page.locator("#brush-shadow button[data-do=undo]").click()
    assert visit.strokes("shadow") == "0"
    visit.paint("shadow", (0.3, 0.5), (0.5, 0.5), (0.5, 0.7))
    visit.page.locator("#shadow-go button, button#shadow-go").click()
    result = visit.changed("shadow-result", "")
    from dpm_scales.studio.photos import example

    photo = example("chelsea, shaded").reduced(128).image.permute(1, 2, 0).numpy().astype(int)
    assert result.shape == photo.shape
    moved = (result != photo).any(-1)
    assert moved[30:70, 30:75].any() and not moved[:20].any() and not moved[:, 90:].any()


def test_an_object_is_cloned_where_the_background_is_clicked(visit: Visit) -> None:
    visit.tab("Osmosis", "Cloning")
    visit.choose("source-side", "128 px")
    visit.choose("background-side", "128 px")
    visit.page.locator("#clone-note").get_by_text("row 42, column 64").wait_for(timeout=PATIENCE)
    visit.paint("clone", (0.45, 0.3), (0.5, 0.35))
    image = visit.page.locator("#clone-background img")
    box = image.bounding_box()
    image.click(position={"x": 0.25 * box["width"], "y": 0.75 * box["height"]})
    visit.page.locator("#clone-note").get_by_text("column 32").wait_for(timeout=PATIENCE)
    visit.page.locator("#clone-go button, button#clone-go").click()
    result, pasted = visit.changed("clone-result", ""), visit.changed("clone-pasted", "")
    background = visit.pixels("clone-background")
    assert result.shape == pasted.shape == background.shape
    moved = (pasted != background).any(-1)
    rows, columns = moved.nonzero()
    assert abs(rows.mean() - 64) < 4 and abs(columns.mean() - 32) < 4
    assert (result != pasted)[moved].any() and (result[~moved] == background[~moved]).all()


def test_the_console_stayed_empty_and_no_request_left_this_machine(visit: Visit) -> None:
    assert {host.partition(":")[0] for host in visit.hosts} <= {"127.0.0.1", ""}
    assert visit.console == []
