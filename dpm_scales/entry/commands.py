"""The table of the commands. Nothing here imports the modules that the table names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command of `dpm-scales`.

    Attributes:
        module: module with a function `main() -> None`, which reads its arguments from `sys.argv[1:]`.
        about: what the command does, in one line.
        actions: words that may follow, offered by completion.
    """

    module: str
    about: str
    actions: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("dpm_scales.entry.train", "train a model, resume a run, sweep over options"),
    "sample": Command("dpm_scales.entry.sample", "sample images from a model, or edit images with it"),
    "evaluate": Command("dpm_scales.entry.evaluate", "compare samples of a model, or images, with real images"),
    "evolve": Command("dpm_scales.entry.evolve", "apply forward processes to real images, and compare them"),
    "measure": Command("dpm_scales.entry.measure", "measure a model's covariance, for sampling in few steps"),
    "ema": Command("dpm_scales.entry.ema", "draw a run's quality against the length of its average, post hoc"),
    "push": Command("dpm_scales.entry.push", "upload a model to the Hugging Face Hub, with a page that describes it"),
    "runs": Command(
        "dpm_scales.entry.runs", "list runs, name the best, copy a model out of its run", ("best", "export")
    ),
    "plot": Command("dpm_scales.entry.plot", "draw the curves of a run, and the options of a sweep against a metric"),
    "data": Command("dpm_scales.entry.data", "pack images into tar shards, check shards", ("pack", "check", "index")),
    "studio": Command("dpm_scales.entry.studio", "open a page: processes, schedules, samples and edits in a browser"),
    "init": Command("dpm_scales.entry.init", "write a project with a network and a process of your own"),
}
