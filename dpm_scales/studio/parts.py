"""Provide what the tabs share: images, a brush, the choice of a photo, and callbacks that report in one line."""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dpm_scales.cli.output import complain, line_of
from dpm_scales.errors import UserError
from dpm_scales.images import png_bytes
from dpm_scales.memory import lacks_memory
from dpm_scales.models.instantiate import root_cause, root_cause_line
from dpm_scales.studio.photos import EXAMPLES, FORMATS, MAX_BYTES, MAX_PIXELS, SIDE, SIDES, Photo, example, read_upload

Result = TypeVar("Result")

BRUSH_HTML = """<div class="brush"><canvas role="img" aria-label="image to paint on"></canvas><div class="brush-tools">
<label>brush width <input type="range" min="1" max="40" value="10" aria-label="brush width in % of the image"></label>
<button type="button" data-do="erase" aria-pressed="false">Erase</button>
<button type="button" data-do="undo">Undo</button><button type="button" data-do="clear">Clear</button></div></div>"""
BRUSH_CSS = """.brush canvas { width: 100%; image-rendering: pixelated; touch-action: none; cursor: crosshair;
  border-radius: 4px; display: block; }
.brush-tools { display: flex; gap: 8px; align-items: center; flex-wrap: wrap; margin-top: 6px; font-size: 13px; }
.brush-tools label { display: flex; gap: 6px; align-items: center; }
.brush-tools input { width: 110px; accent-color: #D55E00; }
.brush-tools button { border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 2px 10px; }
.brush-tools button[aria-pressed=true] { background: #D55E00; color: white; }"""
CURVES = {"concurrency_id": "curves", "concurrency_limit": 1}
"""Limits for events that draw figures, one at a time: matplotlib's settings are global."""

BRUSH_JS = Path(__file__).with_name("brush.js")
CANVAS_SIDE = 512
"""Longer side in pixels to which a small image is about enlarged on its canvas."""


def reporting(function: Callable[..., Result]) -> Callable[..., Result]:
    """Wrap a callback: a user's mistake becomes one line on the page, and so does any other error, without traceback.

    An error that is not a user's mistake is also printed on standard error.
    """

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Result:
        try:
            return function(*arguments, **named)
        except gr.Error:
            raise
        except Exception as error:
            place = lacks_memory(root_cause(error))
            if isinstance(error, UserError):
                text = str(error)
            elif place is not None:
                text = f"this needs more memory than {place} has left; take a smaller image or fewer samples"
            else:
                text = f"this failed ({type(error).__name__}: {root_cause_line(error)})"
                complain(f"studio: {text}")
            raise gr.Error(line_of(text), duration=12, print_exception=False, title="Not done") from None

    return run


def escaped(text: str) -> str:
    """Return text with the special characters of Markdown escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|$~-])", r"\\\1", text)


def shown(image: Tensor | None) -> NDArray[np.uint8] | None:
    """Return a uint8 image ``(C, H, W)`` as `gr.Image` takes it, ``(H, W, 3)``."""
    return None if image is None else image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


def picture(label: str, elem_id: str, pixelated: bool = False, clickable: bool = False, **options: Any) -> gr.Image:
    """Return a component that shows an image.

    Args:
        pixelated: whether pixels stay visible when it is enlarged.
        clickable: whether the places of clicks are needed, which Gradio finds only in images that are not enlarged.
    """
    classes = ["picture", *(["pixelated"] if pixelated else []), *([] if clickable else ["wide"])]
    return gr.Image(
        label=label,
        elem_id=elem_id,
        elem_classes=classes,
        interactive=False,
        format="png",
        buttons=[] if clickable else ["download"],
        **options,
    )


def brush(name: str, image: Tensor | None = None) -> gr.HTML:
    """Return a component for painting a mask on an image; `painting` makes its value."""
    return gr.HTML(
        value=None if image is None else painting(image),
        html_template=BRUSH_HTML,
        css_template=BRUSH_CSS,
        js_on_load=BRUSH_JS.read_text(),
        apply_default_css=False,
        elem_id=f"brush-{name}",
        brush=name,
    )


def painting(image: Tensor) -> dict[str, Any]:
    """Return the value of a brush for a uint8 image ``(C, H, W)``."""
    height, width = image.shape[-2:]
    source = base64.b64encode(png_bytes(image)).decode()
    zoom = max(1, round(CANVAS_SIDE / max(height, width)))
    return {"src": f"data:image/png;base64,{source}", "width": width, "height": height, "zoom": zoom}


def with_mask(name: str, place: int = 0) -> str:
    """Return JavaScript that puts the mask of a brush at the given place of an event's inputs."""
    return f"(...given) => {{ given[{place}] = window.studioMasks['{name}'](); return given; }}"


class PhotoChoice:
    """Components that choose a photo: a shipped example or an upload, its size, and a line that describes it.

    Attributes:
        photo: the state that holds the `Photo`.
        start: the photo at the start.

    Args:
        name: prefix of the components' ids.
        usual: the example that is chosen first.
        side: longer side in pixels that is chosen first; None for no choice of the size.
    """

    def __init__(self, name: str, usual: str = EXAMPLES[0], side: int | None = SIDE, label: str = "Image") -> None:
        self.side = side
        usual_photo = example(usual)
        self.start = usual_photo.reduced(side or SIDES[-1])
        self.original, self.photo = gr.State(usual_photo), gr.State(self.start)
        with gr.Row():
            self.examples = gr.Dropdown(
                list(EXAMPLES), value=usual, label=label, elem_id=f"{name}-example", min_width=150
            )
            if side is not None:
                self.sides = gr.Dropdown(
                    [(f"{n} px", n) for n in SIDES],
                    value=side,
                    label="Longer side",
                    elem_id=f"{name}-side",
                    min_width=150,
                )
        # read here, not by Gradio: nothing but `read_upload` decodes it
        self.upload = gr.UploadButton(
            "Upload an image", file_types=["image"], type="filepath", size="sm", elem_id=f"{name}-upload"
        )
        self.note = gr.Markdown(self._note(usual_photo, side), elem_id=f"{name}-note", elem_classes="note")

    def _note(self, photo: Photo, side: int | None) -> str:
        return escaped(photo.reduced(side or SIDES[-1]).note())

    def connect(
        self, changed: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any], limits: Any = None
    ) -> None:
        """Call `changed(photo, *inputs)` whenever another photo or size is chosen.

        Args:
            limits: limits of concurrent calls, such as `CURVES`.
        """
        kept = [self.original, self.photo, self.note]
        sides = [] if self.side is None else [self.sides]

        @reporting
        def choose(name: str, side: int = SIDES[-1]) -> tuple[Photo, Photo, str]:
            return self._chosen(example(name), side)

        @reporting
        def receive(path: str, side: int = SIDES[-1]) -> tuple[Photo, Photo, str]:
            file = Path(path)
            try:
                content = file.read_bytes()
            finally:
                file.unlink(missing_ok=True)  # nothing that was uploaded stays on the disk
            return self._chosen(read_upload(content, file.name), side)

        @reporting
        def resize(original: Photo, side: int = SIDES[-1]) -> tuple[Photo, Photo, str]:
            return self._chosen(original, side)

        events = [
            self.examples.input(choose, [self.examples, *sides], kept, show_progress="hidden", queue=True),
            self.upload.upload(receive, [self.upload, *sides], kept, show_progress="hidden"),
        ]
        if self.side is not None:
            events.append(self.sides.input(resize, [self.original, self.sides], kept, show_progress="hidden"))
        for event in events:
            event.success(changed, [self.photo, *inputs], list(outputs), show_progress="hidden", **(limits or {}))

    def _chosen(self, photo: Photo, side: int) -> tuple[Photo, Photo, str]:
        if side not in SIDES:
            raise UserError(f"the longer side must be one of {', '.join(map(str, SIDES))} px, got {side!r}")
        return photo, photo.reduced(side), self._note(photo, side)


UPLOADS = (
    f"Uploads: {', '.join(FORMATS)}, up to {MAX_BYTES >> 20} MB and {MAX_PIXELS // 10**6} megapixels; images larger "
    f"than {SIDES[-1]} px are reduced. They stay in memory and on this machine."
)
