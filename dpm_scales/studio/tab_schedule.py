"""The schedule tab: the parameters of a process edited, drawn at once, and written as a config for `train`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from dpm_scales.cli.output import line_of
from dpm_scales.cli.program import command_line
from dpm_scales.errors import UserError, require
from dpm_scales.studio.curves import schedule
from dpm_scales.studio.figures import edited_schedule
from dpm_scales.studio.laws import NONE, PARTS, Laws, Parameter, build_process, export
from dpm_scales.studio.parts import CURVES, escaped, picture, reporting
from dpm_scales.studio.photos import SIDE

FIRST, NAME = "blurring", "my_process"
FIELDS = 20
"""Largest number of parameters of a process."""

PART_LABELS = {"noise": "Noise schedule", "blur": "Blur schedule", "color": "Noise colour", "clock": "Clock"}


class ScheduleTab:
    """Callbacks of the tab.

    Args:
        laws: the processes to start from.
    """

    def __init__(self, laws: Laws) -> None:
        self.laws = laws

    def parts(self, name: str) -> list[Any]:
        """Return the choices of each part for a process; hidden where it has none."""
        known = self.laws.parts(name)
        return [
            gr.Dropdown(choices=known[part][0], value=known[part][1], visible=True)
            if part in known
            else gr.Dropdown(choices=[NONE], value=NONE, visible=False)
            for part in PARTS
        ]

    def fields(self, name: str, *chosen: str) -> list[Any]:
        """Return the fields of the parameters of a process with the chosen parts, and the keys of the fields."""
        parameters = self.laws.parameters(name, self._parts(name, chosen))
        require(len(parameters) <= FIELDS, f"{name} has {len(parameters)} parameters; the page shows {FIELDS}")
        hidden = [gr.Textbox(value="", visible=False)] * (FIELDS - len(parameters))
        return [[one.key for one in parameters], *map(field, parameters), *hidden]

    def draw(self, name: str, keys: Sequence[str], new_name: str, *values: str) -> tuple[Any, str, str]:
        """Return the figure of the edited schedule, its YAML, and the commands that train with it.

        Args:
            values: choices of `PARTS`, then the text of the fields.

        Raises: UserError for values that don't fit.
        """
        parts = self._parts(name, values[: len(PARTS)])
        texts = dict(zip(keys, values[len(PARTS) :], strict=False))
        known = {one.key: one.value for one in self.laws.parameters(name, parts)}
        changed = {key: text for key, text in texts.items() if known.get(key) != text}
        settings = self.laws.edited(name, parts, changed)
        text = export(settings, new_name)
        process = build_process(settings, (SIDE, SIDE))
        usual = self.laws.process(name, (SIDE, SIDE))
        return edited_schedule(schedule(process), schedule(usual), name), text, usage(new_name)

    def live(self, name: str, keys: Sequence[str], new_name: str, *values: str) -> tuple[Any, Any, str]:
        """Return the same as `draw`; for values that don't fit, which may be half typed, only a line that says so."""
        try:
            return self.draw(name, keys, new_name, *values)
        except UserError as error:
            return (
                gr.skip(),
                gr.skip(),
                f"**Not drawn:** {escaped(line_of(str(error)))}. Above is the last one that fits.",
            )

    def _parts(self, name: str, chosen: Sequence[str]) -> dict[str, str]:
        known = self.laws.parts(name)
        return {part: choice for part, choice in zip(PARTS, chosen, strict=True) if part in known}


def field(parameter: Parameter) -> Any:
    """Return the field of a parameter."""
    info = parameter.comment or None
    return gr.Textbox(value=parameter.value, label=parameter.key, info=info, visible=True)


def usage(name: str) -> str:
    """Return Markdown on how to train with the exported config."""
    command = command_line("train", "--config-dir", "my_configs", f"process={name}")
    return f"Save it as `my_configs/process/{name}.yaml`, then train: `{command}`"


def build(laws: Laws) -> None:
    """Add the tab's content to the page."""
    tab = ScheduleTab(laws)
    known = laws.parts(FIRST)
    chosen = [known[part][1] if part in known else NONE for part in PARTS]
    parameters = laws.parameters(FIRST)
    figure_now, text_now, usage_now = tab.draw(FIRST, [], NAME, *chosen)
    with gr.Row():
        with gr.Column(scale=2, min_width=330):
            with gr.Row():
                name = gr.Dropdown(
                    laws.names(), value=FIRST, label="Process", elem_id="schedule-process", min_width=140
                )
                new_name = gr.Textbox(NAME, label="Name of the export", elem_id="schedule-name", min_width=140)
            with gr.Row():
                parts = [
                    gr.Dropdown(
                        known[part][0] if part in known else [NONE],
                        value=chosen[k],
                        label=PART_LABELS[part],
                        visible=part in known,
                        elem_id=f"schedule-{part}",
                        min_width=140,
                    )
                    for k, part in enumerate(PARTS)
                ]
            keys = gr.State([one.key for one in parameters])
            with gr.Row(elem_id="schedule-fields"):
                fields = [
                    gr.Textbox(
                        value=parameters[k].value if k < len(parameters) else "",
                        label=parameters[k].key if k < len(parameters) else "",
                        info=(parameters[k].comment or None) if k < len(parameters) else None,
                        visible=k < len(parameters),
                        elem_id=f"schedule-field-{k}",
                        min_width=140,
                    )
                    for k in range(FIELDS)
                ]
        with gr.Column(scale=3, min_width=480):
            figure = picture("Schedule", "schedule-figure", value=figure_now, show_label=False)
            text = gr.Code(
                text_now, language="yaml", label="Config for train", elem_id="schedule-yaml", interactive=False
            )
            note = gr.Markdown(usage_now, elem_id="schedule-usage")
    outputs, inputs = [figure, text, note], [name, keys, new_name, *parts, *fields]
    live = {"show_progress": "hidden", "trigger_mode": "always_last", **CURVES}
    step = {"show_progress": "hidden", **CURVES}
    draw, fill, offer = reporting(tab.live), reporting(tab.fields), reporting(tab.parts)
    filled = [keys, *fields]
    changed = name.input(offer, name, parts, **live).success(fill, [name, *parts], filled, **step)
    changed.success(draw, inputs, outputs, **step)
    for part in parts:
        changed = part.input(fill, [name, *parts], filled, **live)
        changed.success(draw, inputs, outputs, **step)
    for one in (*fields, new_name):
        one.input(draw, inputs, outputs, **live)
