"""The process tab: a photo under two processes, with a slider for the scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from dpm_scales.errors import require_number
from dpm_scales.studio.curves import View
from dpm_scales.studio.figures import scale_space
from dpm_scales.studio.laws import Laws, build_process
from dpm_scales.studio.parts import CURVES, UPLOADS, PhotoChoice, picture, reporting, shown
from dpm_scales.studio.photos import Photo

FIRST, SECOND, SCALE = "vp", "blurring", 0.3
MAX_SEED = 2**31


@dataclass(frozen=True)
class Drawn:
    """Titled images and a figure, as arrays ``(H, W, 3)``."""

    pictures: list[tuple[str, Any]]
    figure: Any


class ProcessTab:
    """Callbacks of the tab.

    Args:
        laws: the processes to choose from.
    """

    def __init__(self, laws: Laws) -> None:
        self.laws = laws
        self._views: list[tuple[tuple[Any, ...], View]] = []

    def view(self, name: str, photo: Photo, seed: int) -> View:
        """Return a photo under a process; the last ones are kept, with their curves."""
        key = (name, id(photo.image), photo.size, seed)
        for known, view in self._views:
            # ids are unique only among live objects
            if known == key and view.image is photo.image:
                return view
        process = self.laws.process(name, photo.size)
        if process.color is not None:  # which may be fitted to the photo
            process = build_process(self.laws.settings(name), photo.size)
        view = View(name, process, photo.image, seed)
        self._views = [(key, view), *self._views[:5]]
        return view

    def draw(self, photo: Photo, first: str, second: str, t: float, seed: float | None) -> Drawn:
        """Return the photo under both processes, and the figure of their curves.

        Raises: UserError for unknown processes and values out of range.
        """
        require_number("scale t", t, 0, 1)
        number = 0 if seed is None else seed
        require_number("seed", number, 0, MAX_SEED)
        views = [self.view(name, photo, int(number)) for name in (first, second)]
        images = [view.at(t) if t > 0 else view.x_0 for view in views]
        titled = [(label(view, t), shown(view.shown(x))) for view, x in zip(views, images, strict=True)]
        return Drawn([("Original", shown(photo.image)), *titled], scale_space(views, images, t))

    def compare(self, photo: Photo, first: str, second: str, t: float, seed: float | None) -> list[Any]:
        """Return what `draw` returns as updates of the page."""
        drawn = self.draw(photo, first, second, t, seed)
        return [*(gr.Image(value=image, label=title) for title, image in drawn.pictures), drawn.figure]


def label(view: View, t: float) -> str:
    """Return the title of an image: the process and the scale, and whether its contrast is stretched."""
    return f"{view.name}, t = {t:.3g}" + (" (contrast stretched)" if view.is_stretched and t > 0 else "")


def build(laws: Laws) -> None:
    """Add the tab's content to the page."""
    tab = ProcessTab(laws)
    compare = reporting(tab.compare)
    names = laws.names()
    with gr.Row():
        with gr.Column(scale=1, min_width=230):
            choice = PhotoChoice("process")
            first = gr.Dropdown(names, value=FIRST, label="Process A", elem_id="process-a")
            second = gr.Dropdown(names, value=SECOND, label="Process B", elem_id="process-b")
            t = gr.Slider(
                0, 1, SCALE, step=0.005, label="Scale t", info="0: the image, 1: the end", elem_id="process-t"
            )
            seed = gr.Number(
                0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed of the noise", elem_id="process-seed"
            )
            gr.Markdown(UPLOADS, elem_classes="note")
        with gr.Column(scale=4, min_width=480):
            start = tab.draw(choice.start, FIRST, SECOND, SCALE, 0)
            with gr.Row(elem_classes="pictures"):
                pictures = [
                    picture(title, f"process-picture-{key}", value=image)
                    for key, (title, image) in zip("iab", start.pictures, strict=True)
                ]
            figure = picture("Scale-space", "process-figure", value=start.figure, show_label=False)
    inputs, outputs = [first, second, t, seed], [*pictures, figure]
    choice.connect(compare, inputs, outputs, CURVES)
    live = {"show_progress": "hidden", "trigger_mode": "always_last", **CURVES}
    for component in (first, second, t, seed):
        component.input(compare, [choice.photo, *inputs], outputs, **live)
