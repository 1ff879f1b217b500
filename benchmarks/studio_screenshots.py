"""Take the pictures of docs/studio.md: the studio in a headless Chromium, 1280 px wide.

    python -m benchmarks.studio_screenshots runs/digits docs/studio

The first argument is a run of digits. Needs the extras studio and test, and the system's Chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
import threading
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from dpm_scales.storage import make_folder, write_bytes
from dpm_scales.studio import server
from dpm_scales.studio.photos import SHADOW
from dpm_scales.studio.run import address, prepare, serving

WIDTH, HEIGHT, COLOURS, PATIENCE = 1280, 860, 128, 180_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """A page of the studio, and the folder for its pictures."""

    def __init__(self, page: Any, out: Path) -> None:
        self.page, self.out = page, out

    def tab(self, *names: str) -> None:
        for name in names:
            self.page.get_by_role("tab", name=name, exact=True).click()

    def wait(self, place: str, before: str | None = None) -> None:
        """Wait for a picture other than the one before."""
        script = """([place, before]) => { const image = document.querySelector(`#${place} img`);
            return image && image.complete && image.getAttribute("src") !== before; }"""
        self.page.wait_for_function(script, arg=[place, before], timeout=PATIENCE)

    def source(self, place: str) -> str:
        return str(self.page.locator(f"#{place} img").get_attribute("src"))

    def fill(self, place: str, text: str) -> None:
        box = self.page.locator(f"#{place} input:not([type=range]), #{place} textarea").first
        box.click()
        box.press("Control+a")
        box.press_sequentially(text)
        box.press("Tab")

    def choose(self, place: str, text: str) -> None:
        self.page.locator(f"#{place} input").click()
        self.page.get_by_role("option", name=text, exact=True).click()

    def paint(self, name: str, width: int, *points: tuple[float, float]) -> None:
        """Drag a brush of `width` per cent through points, as shares of the canvas."""
        self.page.locator(f"#brush-{name} input[type=range]").fill(str(width))
        box = self.page.locator(f"#brush-{name} canvas").bounding_box()
        for number, (x, y) in enumerate(points):
            self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
            if number == 0:
                self.page.mouse.down()
        self.page.mouse.up()

    def shoot(self, name: str) -> None:
        """Save the page, with few colours."""
        self.page.mouse.move(5, 5)
        self.page.wait_for_timeout(1500)
        picture = Image.open(io.BytesIO(self.page.screenshot(full_page=True))).convert("RGB")
        few, file = picture.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE), io.BytesIO()
        few.save(file, "PNG", optimize=True)
        write_bytes(self.out / f"{name}.png", file.getvalue())
        print(f"{self.out / name}.png: {picture.width} x {picture.height} px, {len(file.getvalue()) / 1e3:.0f} kB")


def show(browser: Browser) -> None:
    """Use each tab and take its picture."""
    page = browser.page
    before = browser.source("process-figure")
    browser.choose("process-b", "inverse_osmosis")
    browser.wait("process-figure", before)
    before = browser.source("process-figure")
    browser.choose("process-a", "blurring")
    browser.wait("process-figure", before)
    browser.shoot("process")

    browser.tab("Schedule")
    before = browser.source("schedule-figure")
    label = page.locator("#schedule-fields").get_by_text("blur.blur_sigma_max", exact=True)
    box = label.locator("xpath=ancestor::label").locator("input, textarea").first
    box.click()
    box.press("Control+a")
    box.press_sequentially("8")
    browser.wait("schedule-figure", before)
    browser.shoot("schedule")

    browser.tab("Samples")
    browser.fill("samples-number", "25")
    page.locator("#samples-go").click()
    browser.wait("samples-strip")
    before = browser.source("samples-frame")
    browser.fill("samples-place", "35")
    browser.wait("samples-frame", before)
    browser.shoot("samples")

    browser.tab("Inpainting")
    page.wait_for_function("document.querySelector('#brush-inpaint canvas').dataset.strokes === '0'", timeout=PATIENCE)
    browser.paint("inpaint", 26, (0.2, 0.3), (0.8, 0.3))
    page.locator("#inpaint-go").click()
    browser.wait("inpaint-result")
    browser.shoot("inpainting")

    browser.tab("Osmosis", "Shadow removal")
    start, end, width = SHADOW
    browser.paint("shadow", round(100 * width), start, end)
    page.locator("#shadow-go").click()
    browser.wait("shadow-result")
    browser.shoot("shadow")

    browser.tab("Cloning")
    browser.paint("clone", 30, (0.35, 0.35), (0.46, 0.33))
    image = page.locator("#clone-background img")
    box = image.bounding_box()
    image.click(position={"x": 0.83 * box["width"], "y": 0.25 * box["height"]})
    page.locator("#clone-note").get_by_text("column 21").wait_for(timeout=PATIENCE)
    page.locator("#clone-go").click()
    browser.wait("clone-result")
    browser.shoot("cloning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run of digits")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    given = parser.parse_args()
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        parser.error("no Chromium: apt-get install chromium")
    make_folder(given.out)
    studio = prepare([given.run], {})
    with server.listen("127.0.0.1", 0) as listening, serving(studio, listening, "127.0.0.1") as serves:
        thread = threading.Thread(target=serves.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
            page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.goto(address(listening))
            page.wait_for_selector("#process-figure img", timeout=PATIENCE)
            show(Browser(page, given.out))
            chromium.close()
        serves.should_exit = True
        thread.join(10)


if __name__ == "__main__":
    main()
