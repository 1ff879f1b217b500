"""The osmosis tab: a shadow removed, or an object cloned into another photo, both with a brush."""

from __future__ import annotations

from typing import Any

import gradio as gr

from dpm_scales.editing.osmosis import MATCHES, SHADOW_MASKS, SHADOW_MATCHES
from dpm_scales.studio.parts import PhotoChoice, brush, painting, picture, reporting, shown, with_mask
from dpm_scales.studio.photos import SHADED, Photo
from dpm_scales.studio.retouch import clone, read_mask, shadow
from dpm_scales.studio.tab_samples import whole

SHADOW_HELP = """**Remove a shadow.** Paint over the shadow, or only along its edge. The drift of the photo is set to 0
on the shadow's edge, and osmosis reconstructs the photo from the rest of its drift."""
CLONE_HELP = """**Clone an object.** Paint over an object in the source; click on the background where it should go.
Only the drift of the object is kept: its light and its colour adapt to the place."""
MATCH_HELP = "pinned: pixels outside the mask stay; lit: the lit part keeps its mean; outside, mean: a mean is kept"
PLACE = (0.5, 0.5)
WORK = {"concurrency_id": "osmosis", "concurrency_limit": 1}


class OsmosisTab:
    """Callbacks of the tab."""

    def remove(
        self,
        mask: str,
        photo: Photo,
        marks: str,
        match: str,
        penumbra: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Any:
        """Return the photo without the painted shadow, as an array ``(H, W, 3)``."""
        inside = read_mask(mask, photo.size)
        result = shadow(
            photo.image, inside, marks, match, whole(penumbra), lambda share: progress(share, desc="osmosis")
        )
        return shown(result)

    def clone(
        self,
        mask: str,
        source: Photo,
        background: Photo,
        centre: tuple[float, float],
        match: str,
        mixed: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, Any]:
        """Return the object pasted and the object cloned, as arrays ``(H, W, 3)``."""
        inside = read_mask(mask, source.size)
        pasted, result = clone(
            background.image, source.image, inside, centre, match, mixed, lambda share: progress(share, desc="osmosis")
        )
        return shown(pasted), shown(result)

    def aim(self, photo: Photo, event: gr.SelectData) -> tuple[tuple[float, float], str]:
        """Return the clicked place as shares of the height and width, and a line on it."""
        column, row = event.index
        height, width = photo.size
        return (row / height, column / width), place_note(row, column)


def place_note(row: float, column: float) -> str:
    """Return a line on the place of the object's centre."""
    return f"The object's centre goes to row {row:.0f}, column {column:.0f}."


def middle(photo: Photo) -> tuple[Any, tuple[float, float], str]:
    """Return a background, its centre as the place of the object, and a line on it."""
    return shown(photo.image), PLACE, place_note(photo.size[0] / 2, photo.size[1] / 2)


def build() -> None:
    """Add the tab's content to the page."""
    tab = OsmosisTab()
    with gr.Tab("Shadow removal", id="shadow"):
        with gr.Row():
            with gr.Column(scale=1, min_width=230):
                choice = PhotoChoice("shadow", SHADED)
                marks = gr.Radio(
                    list(SHADOW_MASKS), value=SHADOW_MASKS[0], label="The mask covers", elem_id="shadow-marks"
                )
                match = gr.Dropdown(
                    ["auto", *SHADOW_MATCHES],
                    value="auto",
                    label="Mean intensity",
                    info=MATCH_HELP,
                    elem_id="shadow-match",
                )
                penumbra = gr.Slider(
                    0,
                    12,
                    3,
                    step=1,
                    label="Penumbra (px)",
                    info="half the width of the soft edge",
                    elem_id="shadow-penumbra",
                )
            with gr.Column(scale=2, min_width=340):
                gr.Markdown(SHADOW_HELP, elem_classes="note")
                canvas = brush("shadow", choice.start.image)
            with gr.Column(scale=2, min_width=340):
                go = gr.Button("Remove the shadow", variant="primary", elem_id="shadow-go")
                result = picture("Without the shadow", "shadow-result")
        mask = gr.Textbox(visible=False)
        choice.connect(lambda photo: painting(photo.image), [], [canvas])
        go.click(
            reporting(tab.remove),
            [mask, choice.photo, marks, match, penumbra],
            result,
            js=with_mask("shadow"),
            show_progress_on=result,
            **WORK,
        )
    with gr.Tab("Cloning", id="clone"):
        place = gr.State(PLACE)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                source = PhotoChoice("source", "chelsea", label="Source")
                gr.Markdown(CLONE_HELP, elem_classes="note")
                paint = brush("clone", source.start.image)
            with gr.Column(scale=2, min_width=300):
                background = PhotoChoice("background", "coffee", label="Background")
                image, _, text = middle(background.start)
                under = picture(
                    "Background: click where the object goes", "clone-background", clickable=True, value=image
                )
                note = gr.Markdown(text, elem_id="clone-note", elem_classes="note")
                with gr.Row():
                    kind = gr.Dropdown(
                        list(MATCHES), value="pinned", label="Mean intensity", elem_id="clone-match", min_width=120
                    )
                    mixed = gr.Checkbox(
                        False, label="Mixed drifts", info="texture shows through", elem_id="clone-mixed"
                    )
            with gr.Column(scale=2, min_width=300):
                start = gr.Button("Clone", variant="primary", elem_id="clone-go")
                made = picture("Cloned by osmosis", "clone-result")
                pasted = picture("Pasted, for comparison", "clone-pasted")
        outline = gr.Textbox(visible=False)
        source.connect(lambda photo: painting(photo.image), [], [paint])
        background.connect(middle, [], [under, place, note])
        under.select(reporting(tab.aim), background.photo, [place, note], show_progress="hidden")
        start.click(
            reporting(tab.clone),
            [outline, source.photo, background.photo, place, kind, mixed],
            [pasted, made],
            js=with_mask("clone"),
            show_progress_on=made,
            **WORK,
        )
