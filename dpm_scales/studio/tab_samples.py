"""The samples tab: a grid drawn from a model, its trajectory step by step, and a strip from noise to image."""

from __future__ import annotations

from typing import Any

import gradio as gr

from dpm_scales.cli.program import command_line
from dpm_scales.models.model import Model
from dpm_scales.studio.drawn import MAX_SAMPLES, MAX_STEPS, OWN, Drawn, Models, class_choices, sample, sampler_names
from dpm_scales.studio.parts import picture, reporting, shown

NUMBER = 16
NO_MODEL = (
    "No model was given. Start the studio with a run, an export, or a folder that holds some: "
    f"`{command_line('studio', 'runs/demo')}`."
)
WORK = {"concurrency_id": "model", "concurrency_limit": 1}
"""Limits for events that run a model, one at a time."""


class SamplesTab:
    """Callbacks of the tab.

    Args:
        models: the models to choose from.
    """

    def __init__(self, models: Models) -> None:
        self.models = models

    def choose(self, name: str) -> tuple[str, Any]:
        """Return Markdown that describes a model, and the choices of its labels."""
        model = self.models.load(name)
        return describe(model), labels_of(model)

    def draw(
        self,
        name: str,
        number: float,
        seed: float | None,
        sampler: str,
        steps: float | None,
        label: str | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  # how Gradio passes it
    ) -> tuple[Any, ...]:
        """Return the state, grid, frame slider, first frame and strip of new samples; see `drawn.sample`."""
        progress(0, desc="loading the model")
        model = self.models.load(name)
        wanted = None if not steps else steps
        drawn = sample(
            model,
            whole(number),
            whole(seed or 0),
            sampler,
            None if wanted is None else whole(wanted),
            label,
            lambda share: progress(share, desc="sampling"),
        )
        last = len(drawn.frames) - 1
        slider = gr.Slider(minimum=0, maximum=max(last, 1), value=last, step=1, interactive=True)
        return drawn, shown(drawn.grid()), slider, self.frame(drawn, last), shown(drawn.strip())

    def frame(self, drawn: Drawn | None, number: float) -> Any:
        """Return the samples after a step as an image titled with its scale."""
        if drawn is None:
            return None
        index = min(max(int(number), 0), len(drawn.frames) - 1)
        return gr.Image(value=shown(drawn.frame(index)), label=f"Trajectory at t = {drawn.scales[index]:.3g}")


def whole(number: float) -> Any:
    """Return a number as an int where it is whole."""
    return int(number) if float(number).is_integer() else number


def describe(model: Model) -> str:
    """Return Markdown on a model: its process, its images and its sampler."""
    recipe, process = model.recipe, model.denoiser.process
    height, width = recipe.image_size
    number = sum(parameter.numel() for parameter in model.denoiser.network.parameters())
    classes = f", {recipe.num_classes} classes" if recipe.num_classes else ""
    steps = len(model.sampler.scales(process)) - 1
    kind = "grey" if recipe.channels == 1 else "RGB" if recipe.channels == 3 else f"{recipe.channels} channels"
    return (
        f"{type(process).__name__}, {process.num_scales} scales; {width} × {height} px, {kind}{classes}; "
        f"{number / 1e6:.2f} M parameters; {type(model.sampler).__name__}, {steps} steps"
    )


def labels_of(model: Model) -> Any:
    """Return the component update with the labels of a model; hidden without any."""
    choices = class_choices(model)
    return gr.Dropdown(choices=choices, value=choices[0] if choices else None, visible=bool(choices))


def build(models: Models) -> None:
    """Add the tab's content to the page."""
    if not models.places:
        gr.Markdown(NO_MODEL, elem_id="samples-none")
        return
    tab, names = SamplesTab(models), list(models.places)
    with gr.Row():
        with gr.Column(scale=1, min_width=230):
            name = gr.Dropdown(names, value=names[0], label="Model", elem_id="samples-model")
            about = gr.Markdown("", elem_id="samples-about", elem_classes="note")
            number = gr.Slider(1, MAX_SAMPLES, NUMBER, step=1, label="Number of samples", elem_id="samples-number")
            sampler = gr.Dropdown(sampler_names(), value=OWN, label="Sampler", elem_id="samples-sampler")
            steps = gr.Number(
                0,
                precision=0,
                minimum=0,
                maximum=MAX_STEPS,
                label="Steps (0: the sampler's own)",
                elem_id="samples-steps",
            )
            seed = gr.Number(0, precision=0, minimum=0, maximum=2**31, label="Seed", elem_id="samples-seed")
            label = gr.Dropdown([], label="Class", visible=False, elem_id="samples-label")
            go = gr.Button("Sample", variant="primary", elem_id="samples-go")
        with gr.Column(scale=2, min_width=340):
            grid = picture("Samples", "samples-grid", pixelated=True)
        with gr.Column(scale=2, min_width=340):
            frame = picture("Trajectory", "samples-frame", pixelated=True)
            place = gr.Slider(
                0,
                1,
                0,
                step=1,
                label="Step of the trajectory",
                info="left: noise, right: the samples",
                elem_id="samples-place",
                interactive=False,
            )
    strip = picture("From noise to image", "samples-strip", pixelated=True)
    drawn = gr.State(None)
    name.change(reporting(tab.choose), name, [about, label], show_progress="hidden", **WORK)
    go.click(
        reporting(tab.draw),
        [name, number, seed, sampler, steps, label],
        [drawn, grid, place, frame, strip],
        show_progress_on=grid,
        **WORK,
    )
    place.input(reporting(tab.frame), [drawn, place], frame, show_progress="hidden", trigger_mode="always_last")
    gr.context.Context.root_block.load(reporting(tab.choose), name, [about, label], show_progress="hidden", **WORK)
