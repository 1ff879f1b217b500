"""Build the page of the studio from its tabs."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from dpm_scales.studio import tab_inpaint, tab_osmosis, tab_process, tab_samples, tab_schedule
from dpm_scales.studio.drawn import Models
from dpm_scales.studio.laws import Laws

TITLE = "dpm_scales studio"
INTRODUCTION = """# dpm_scales studio
Every process is one law, *y_t = λ_t(L) y_0 + γ_t(L) ε*: an operator *L*, a signal scale *λ* and a noise scale *γ*."""
CACHE_SECONDS = 1800
"""Age at which pictures that were shown are removed."""

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONOSPACED = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
CSS = """.gradio-container { max-width: 1500px !important; }
.note, .note p { font-size: 12.5px !important; color: var(--body-text-color-subdued); }
.pictures { align-items: flex-start; }
.picture [data-testid="block-label"] { position: static; border: 0; padding-bottom: 2px; background: none; }
.picture [data-testid="block-label"] > span { display: none; }
.wide .image-container, .wide .image-container button, .wide .image-frame { width: 100% !important; }
.wide img { width: 100% !important; height: auto !important; max-height: 75vh; object-fit: contain !important; }
.pixelated img { image-rendering: pixelated; }
footer { display: none !important; }"""


@dataclass(frozen=True)
class Studio:
    """The processes and models of a page.

    Attributes:
        laws: the processes to choose from.
        models: the models to choose from.
    """

    laws: Laws
    models: Models


def theme() -> gr.themes.Base:
    """Return the theme, whose fonts are the browser's own."""
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="gray", spacing_size="sm", radius_size="sm", font=FONTS, font_mono=MONOSPACED
    )


def build(studio: Studio) -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as page:
        gr.Markdown(INTRODUCTION, elem_id="introduction")
        with gr.Tabs():
            with gr.Tab("Process", id="process"):
                tab_process.build(studio.laws)
            with gr.Tab("Schedule", id="schedule"):
                tab_schedule.build(studio.laws)
            with gr.Tab("Samples", id="samples"):
                tab_samples.build(studio.models)
            with gr.Tab("Inpainting", id="inpainting"):
                tab_inpaint.build(studio.models)
            with gr.Tab("Osmosis", id="osmosis"):
                tab_osmosis.build()
    return page
