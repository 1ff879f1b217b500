"""The table of the commands. Nothing here imports the modules that the table names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Command:
    """A command of `dpm-scales`.

    Attributes:
        module: module with a function `main() -> None`, which reads its arguments from `sys.argv[1:]`.
        about: what the command does, in one line.
        words: for completion, what may follow each action, and without one (""): options, without their ``=``, and
            flags. Commands with a config have none, since their options are those of the config.
    """

    module: str
    about: str
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_SHARDS = ("labels", "image", "tries", "timeout")


COMMANDS = {
    "train": Command("dpm_scales.entry.train", "train a model, resume a run, sweep over options"),
    "sample": Command("dpm_scales.entry.sample", "sample images from a model, or edit images with it"),
    "evaluate": Command("dpm_scales.entry.evaluate", "compare samples of a model, or images, with real images"),
    "evolve": Command("dpm_scales.entry.evolve", "apply forward processes to real images, and compare them"),
    "measure": Command(
        "dpm_scales.entry.measure",
        "measure a model's covariance, for sampling in few steps",
        {"": ("images", "num_images", "seed", "batch_size", "device", "allow")},
    ),
    "ema": Command(
        "dpm_scales.entry.ema",
        "draw a run's quality against the length of its average, post hoc",
        {"": ("lengths", "metric", "out")},
    ),
    "push": Command(
        "dpm_scales.entry.push",
        "upload a model to the Hugging Face Hub, with a page that describes it",
        {"": ("licence", "license", "private", "message", "weights", "allow", "--keep-card")},
    ),
    "runs": Command(
        "dpm_scales.entry.runs",
        "list runs, name the best, copy a model out of its run",
        {
            "": ("state", "--json", "--csv"),
            "best": ("metric", "top", "direction", "--path"),
            "export": ("out", "weights", "ema", "ema_step", "format"),
        },
    ),
    "plot": Command(
        "dpm_scales.entry.plot",
        "draw the curves of a run, and the options of a sweep against a metric",
        {"": ("metric", "direction", "out")},
    ),
    "data": Command(
        "dpm_scales.entry.data",
        "pack images into tar shards, check shards",
        {
            "": (),
            "pack": (
                *("out", "image_size", "shuffle", "per_shard", "seed", "channels"),
                *("labels", "resize_mode", "format", "split", "on_error", "verify"),
            ),
            "check": (*_SHARDS, "index"),
            "index": (*_SHARDS, "out"),
        },
    ),
    "studio": Command(
        "dpm_scales.entry.studio",
        "open a page: processes, schedules, samples and edits in a browser",
        {"": ("port", "host", "configs", "allow", "device")},
    ),
    "init": Command(
        "dpm_scales.entry.init", "write a project with a network and a process of your own", {"": ("name",)}
    ),
}
