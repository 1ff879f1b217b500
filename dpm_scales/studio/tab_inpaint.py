"""The inpainting tab: a model invents the painted part of an image."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from dpm_scales.errors import require
from dpm_scales.images import make_grid
from dpm_scales.studio.drawn import (
    MAX_RESULTS,
    MAX_STEPS,
    Models,
    class_choices,
    describe_sampler,
    enlargement,
    inpaint,
    sample,
)
from dpm_scales.studio.parts import PhotoChoice, brush, painting, picture, reporting, shown, with_mask
from dpm_scales.studio.photos import Photo, fitted
from dpm_scales.studio.retouch import read_mask
from dpm_scales.studio.tab_samples import NO_MODEL, WORK, whole

RESULTS = 4
HELP = """Paint over the part to invent. The model keeps the rest, and draws the part that fits it. An upload is
cropped to the shape of the model's images; a sample of the model shows best what it has learnt."""


class InpaintTab:
    """Callbacks of the tab.

    Args:
        models: the models to choose from.
    """

    def __init__(self, models: Models) -> None:
        self.models = models

    def take(self, photo: Photo, name: str) -> tuple[Tensor, Any]:
        """Return a photo with the shape of the model's images, and the value of the brush."""
        model = self.models.load(name)
        channels = model.recipe.channels
        require(channels in (1, 3), f"this model has images of {channels} channels; they can't be shown")
        image = fitted(photo, channels, model.recipe.image_size)
        return image, painting(image)

    def draw_one(self, name: str, seed: float | None, label: str | None) -> tuple[Tensor, Any, Any, Any, str]:
        """Return a sample, the values of the brush and the labels, no example, and a line on the sample.

        Args:
            label: class of the sample; None after a change of the model, for its first class.
        """
        model = self.models.load(name)
        image = sample(model, 1, whole(seed or 0), label=label).images[0]
        classes = class_choices(model)[1:]
        labels = gr.Dropdown(choices=classes, value=classes[0] if classes else None, visible=bool(classes))
        note = f"a sample of the model, seed {whole(seed or 0)}"
        return image, painting(image), labels if label is None else gr.skip(), gr.Dropdown(value=None), note

    def invent(
        self,
        mask: str,
        image: Tensor | None,
        name: str,
        number: float,
        seed: float | None,
        steps: float | None,
        label: str | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, str]:
        """Return the image, the hole and the results as one picture, and a line on the sampler."""
        if image is None:
            raise gr.Error("choose an image first", print_exception=False)
        hole = read_mask(mask, (image.shape[-2], image.shape[-1]))
        model, wanted = self.models.load(name), None if not steps else whole(steps)
        drawn = inpaint(
            model,
            image,
            hole,
            whole(number),
            whole(seed or 0),
            wanted,
            label,
            lambda share: progress(share, desc="inpainting"),
        )
        grey = torch.where(hole, torch.full_like(image, 128), image)
        row = torch.cat([image[None], grey[None], drawn])
        sheet = make_grid(row, columns=3, padding=2, upscale=2 * enlargement(row))
        percent = 100 * float(hole.float().mean())
        return shown(sheet), f"The image, the part kept, then {len(drawn)} results; {percent:.0f} % invented by " + (
            f"{describe_sampler(model, wanted)}, seed {whole(seed or 0)}."
        )


def build(models: Models) -> None:
    """Add the tab's content to the page."""
    if not models.places:
        gr.Markdown(NO_MODEL, elem_id="inpaint-none")
        return
    tab, names = InpaintTab(models), list(models.places)
    image = gr.State(None)
    with gr.Row():
        with gr.Column(scale=1, min_width=230):
            name = gr.Dropdown(names, value=names[0], label="Model", elem_id="inpaint-model")
            choice = PhotoChoice("inpaint", side=None)
            label = gr.Dropdown([], label="Class that the image shows", visible=False, elem_id="inpaint-label")
            seed = gr.Number(0, precision=0, minimum=0, maximum=2**31, label="Seed", elem_id="inpaint-seed")
            own = gr.Button("Take a sample of the model", size="sm", elem_id="inpaint-sample")
            number = gr.Slider(1, MAX_RESULTS, RESULTS, step=1, label="Number of results", elem_id="inpaint-number")
            steps = gr.Number(
                0, precision=0, minimum=0, maximum=MAX_STEPS, label="Steps (0: automatic)", elem_id="inpaint-steps"
            )
        with gr.Column(scale=2, min_width=340):
            gr.Markdown(HELP, elem_classes="note")
            canvas = brush("inpaint")
        with gr.Column(scale=2, min_width=340):
            go = gr.Button("Inpaint", variant="primary", elem_id="inpaint-go")
            result = picture("Results", "inpaint-result", pixelated=True)
            note = gr.Markdown("", elem_id="inpaint-cost", elem_classes="note")
    mask = gr.Textbox(visible=False)
    kept = [image, canvas]
    drawn = [*kept, label, choice.examples, choice.note]
    take = reporting(tab.take)
    choice.connect(take, [name], kept, WORK)
    name.change(reporting(partial(tab.draw_one, label=None)), [name, seed], drawn, show_progress="hidden", **WORK)
    own.click(reporting(tab.draw_one), [name, seed, label], drawn, show_progress="hidden", **WORK)
    go.click(
        reporting(tab.invent),
        [mask, image, name, number, seed, steps, label],
        [result, note],
        js=with_mask("inpaint"),
        show_progress_on=result,
        **WORK,
    )
    gr.context.Context.root_block.load(
        reporting(partial(tab.draw_one, label=None)),
        [name, seed],
        drawn,
        show_progress="hidden",
        **WORK,
    )
