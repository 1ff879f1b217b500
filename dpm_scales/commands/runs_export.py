"""`dpm-scales runs export`: copy a run's model out of its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpm_scales.cli.program import program
from dpm_scales.cli.words import split_words
from dpm_scales.errors import printable, require, require_choice
from dpm_scales.models.io import WEIGHTS, export_model, load_model
from dpm_scales.storage import new_folder


def export(argv: Sequence[str]) -> None:
    """Copy a model into a new folder, and print what loading it needs.

    Args:
        argv: arguments after `dpm-scales runs export`: a run folder, an export or a checkpoint; `out`; `weights`;
            `ema` and `ema_step`, see `load_model`; and `format=diffusers` for a pipeline of diffusers.

    Raises: UserError if there is no model, if the folder exists and is not empty, and for a model that diffusers can't
    express.
    """
    usage = f"{program('runs')} export RUN out=DIR [weights=averaged|raw] [ema=LENGTH] [format=diffusers]"
    asked = split_words(argv, 1, ("out", "weights", "ema", "ema_step", "format"), (), usage)
    require(len(asked.words) == 1 and "out" in asked.options, f"name a run and a new folder: {usage}")
    out, weights = Path(asked.options["out"]), asked.options.get("weights", WEIGHTS[0])
    ema = asked.decimal("ema")
    step = asked.number("ema_step", 0) or None
    if "format" in asked.options:
        require_choice("format", asked.options["format"], ("diffusers",))
        with new_folder(out) as made:
            load_model(asked.words[0], weights, ema=ema, ema_step=step).to_diffusers(made)
        print(printable(f"{out}: a pipeline of diffusers, DiffusionPipeline.from_pretrained({str(out)!r})"))
        return
    source, packages = export_model(asked.words[0], out, weights, ema, step)
    kind = "weights of the last step" if weights == "raw" else "EMA weights"
    kind = kind if ema is None else f"EMA weights of length {ema:g}"
    print(printable(f"{out}: the {kind} in {source}, with their config; load_model({str(out)!r}), or model={out}"))
    if packages:
        names = ",".join(packages)
        print(printable(f"it uses classes of {names}: install them where it is loaded, and give 'allow=[{names}]'"))
