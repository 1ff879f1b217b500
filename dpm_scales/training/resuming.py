"""Define what may change when a run is resumed: a table of rules, and the lines that report the changes.

A checkpoint contains the options of its run, which a resumed run compares with its own. Options that would change the
model are refused (by the checkpoint's recipe); the others take effect from the resumed step.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from dpm_scales.cli.arguments import config_flags, trust_options, trust_words
from dpm_scales.cli.plugins import active_plugins
from dpm_scales.cli.program import command_line
from dpm_scales.data import listed
from dpm_scales.models.instantiate import plain
from dpm_scales.models.trust import current_names

TAKES, WARNED, REFUSED, APART = "takes effect", "takes effect, with a warning", "refused", "not a training option"
KEY = "options"
"""Key of a checkpoint: the options as JSON text, so that an untrusted file holds plain values only."""


@dataclass(frozen=True)
class Rule:
    """Effect of a changed option on a resumed run.

    Attributes:
        kind: one of `TAKES`, `WARNED`, `REFUSED`, `APART`.
        note: consequences of the change, for the documentation.
        warning: printed by the run; empty if the data module warns, with the number of images.
    """

    kind: str
    note: str = ""
    warning: str = ""


_OTHER_IMAGES = "the images may differ from here on, and validation images may have been trained on"
_ORDER = "the order of the images is different"

#: by option or section; the longest matching name counts
RULES = {
    "run_dir": Rule(APART, "selects the run"),
    "resume": Rule(APART, "selects the run, which must exist"),
    "allow": Rule(APART, "names the packages whose classes the run's files may use; never stored"),
    "plugins": Rule(APART, "names installed packages whose announced classes and configs are used; never stored"),
    "check_resume": Rule(APART, "trains three separate runs"),
    "data": Rule(
        WARNED,
        "the images may differ; a different number of channels, size or classes is refused",
        _OTHER_IMAGES,
    ),
    "data.batch_size": Rule(WARNED, _ORDER),
    "data.seed": Rule(WARNED, _ORDER),
    "data.drop_last": Rule(WARNED, _ORDER),
    "data.num_workers": Rule(TAKES),
    "data.pin_memory": Rule(TAKES),
    "data.decoded": Rule(TAKES, "the images are the same"),
    "data.on_device": Rule(TAKES, "the images are the same"),
    "data.on_error": Rule(TAKES),
    "data.window": Rule(WARNED, _ORDER),
    "data.cache_gb": Rule(TAKES),
    "data.decoder": Rule(TAKES, "the pixels are the same"),
    "data.tries": Rule(TAKES),
    "data.timeout": Rule(TAKES),
    "data.download": Rule(TAKES),
    "data.verify": Rule(TAKES),
    "process": Rule(REFUSED, "a different model"),
    "target": Rule(REFUSED, "a different model"),
    "prior": Rule(REFUSED, "a different model"),
    "network": Rule(REFUSED, "a different model"),
    "conditional": Rule(REFUSED, "a different model"),
    "label_dropout": Rule(REFUSED, "with `conditional=true`; unused without labels"),
    "sampler": Rule(TAKES, "for sample grids, metrics of samples, and the export"),
    "weight": Rule(
        TAKES,
        "`train/loss` is not comparable before and after; `val/loss` is; from and to `learned` it is refused",
    ),
    "scale_sampling": Rule(TAKES, "`importance` starts from a uniform density"),
    "scale_mean": Rule(TAKES),
    "scale_std": Rule(TAKES),
    "training.pairing": Rule(TAKES, "`train/loss` is not comparable before and after; `val/loss` is"),
    "training.candidates": Rule(TAKES, "as for `training.pairing`"),
    "seed": Rule(
        WARNED,
        "scales, noise (also of validation) and sample grids are drawn from the new seed; the weights and the order of "
        "the images (`data.seed`) stay the same",
        "scales, noise and sample grids are drawn from the new seed from here on, and val/loss is measured with other "
        "noise than before; the weights and the order of the images (data.seed) stay",
    ),
    "objective": Rule(TAKES),
    "optimizer.method": Rule(TAKES, "the moments are kept"),
    "optimizer.learning_rate": Rule(TAKES, "multiplied by warm-up and decay at the current step"),
    "optimizer.warmup_steps": Rule(TAKES, "counted from step 0 of the run"),
    "optimizer.decay": Rule(TAKES),
    "optimizer.betas": Rule(TAKES, "the moments are kept"),
    "optimizer.weight_decay": Rule(TAKES),
    "optimizer.max_bad_steps": Rule(TAKES),
    "ema.decay": Rule(TAKES, "the EMA weights are kept"),
    "ema.length": Rule(
        WARNED,
        "the EMA weights are kept, so the average has another profile",
        "the EMA weights are kept, and their profile matches neither length until the earlier steps no longer count",
    ),
    "ema.power_lengths": Rule(REFUSED, "the averages begin with a run's first step"),
    "ema.snapshot_every": Rule(TAKES, "the snapshots are kept; any intervals fit together"),
    "checkpoint": Rule(TAKES, "from the next checkpoint on"),
    "samples": Rule(TAKES),
    "evaluation": Rule(TAKES),
    "compile": Rule(TAKES, "another rounding"),
    "channels_last": Rule(TAKES),
    "trainer.max_steps": Rule(
        TAKES,
        "cosine decay is stretched to it, so the learning rate jumps; the run prints both values. Fewer than the run "
        "has taken are refused",
    ),
    "trainer.max_time": Rule(TAKES, "includes the time before; cosine decay ends with it if `trainer.max_steps=-1`"),
    "trainer.gradient_clip_val": Rule(TAKES),
    "trainer.accumulate_grad_batches": Rule(TAKES),
    "trainer": Rule(TAKES, "devices, strategy, precision, intervals"),
    "logger": Rule(TAKES),
}

Change = tuple[str, Any, Any]
"""Option, before, now."""


def resume_command(run_dir: Path, *options: str) -> str:
    """Return the command that resumes a run, quoted for a shell."""
    return command_line("train", *config_flags(), f"run_dir={run_dir}", *trust_options(), *options)


def trust_needed(loading: Sequence[str], resuming: Sequence[str]) -> str:
    """Return a line that says which other packages loading and resuming a run will need; empty if none.

    Args:
        loading: packages whose classes its model and data use.
        resuming: packages whose classes its options name.
    """
    packages = sorted({*loading, *resuming})
    if not packages:
        return ""
    everything, model = (shlex.join(trust_words(names)) for names in (packages, loading))
    if not loading:
        who = f"whoever resumes it gives {everything}"
    elif not resuming and not active_plugins():  # resuming needs plugins for the choices that they announce
        who = f"whoever loads it gives {model}"
    elif len(packages) == len(loading):
        who = f"whoever loads or resumes it gives {everything}"
    else:
        who = f"whoever loads it gives {model}, and whoever resumes it {everything}"
    return f"this run uses classes of {listed(packages)}: files are not trusted, so {who}"


def rule_of(key: str) -> Rule | None:
    """Return the rule of an option, None if there is none."""
    while key:
        if key in RULES:
            return RULES[key]
        key = key.rpartition(".")[0]
    return None


def rules_table() -> str:
    """Return the rules in Markdown, for docs/resume.md."""
    lines = [f"| `{key}` | {rule.kind} | {rule.note} |" for key, rule in RULES.items()]
    return "\n".join(["| option | when changed | |", "|---|---|---|", *lines])


def options_of(cfg: DictConfig) -> dict[str, Any]:
    """Return a run's resolved options, without those that name its folder, so that checkpoints do not depend on it."""
    options: dict[str, Any] = plain(cfg)
    kept = {key: value for key, value in options.items() if key not in RULES or RULES[key].kind != APART}
    return {**kept, "logger": {"_target_": kept["logger"]["_target_"]}}


class KeepOptions(Callback):
    """Puts the run's options into its checkpoints."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEY] = json.dumps(options_of(self.cfg))


def stored_options(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a checkpoint's run; empty if none are stored, as in earlier versions."""
    try:
        values = json.loads(checkpoint[KEY])
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return current_names(values) if isinstance(values, dict) else {}


def stored_rate(checkpoint: dict[str, Any]) -> float | None:
    """Return the learning rate of the next step of a checkpoint's run; None if it is not stored."""
    try:
        return float(checkpoint["optimizer_states"][0]["param_groups"][0]["lr"])
    except (LookupError, TypeError, ValueError):
        return None


def changes(before: dict[str, Any], now: dict[str, Any], section: str = "") -> Iterator[Change]:
    """Yield the options that differ; only the class of a section where that differs. Unmatched options are ignored."""
    old_class, new_class = (str(side.get("_target_")).rpartition(".")[2] for side in (before, now))
    if old_class != new_class:
        yield section, old_class, new_class
        return
    for key in now:
        if key not in before:
            continue
        full, old, new = f"{section}.{key}".lstrip("."), before[key], now[key]
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changes(old, new, full)
        elif old != new:
            yield full, old, new


def what_changed(checkpoint: dict[str, Any], now: dict[str, Any], rate: float) -> tuple[str, list[str]]:
    """Compare the options of a checkpoint's run with those of the run that resumes it.

    Args:
        checkpoint: the checkpoint to resume.
        now: options of the run, from `options_of`.
        rate: the learning rate of the next step with them.

    Returns: a line that names each change, that of the learning rate included, empty if nothing changes; and a warning
        for each change that needs one.
    """
    changed = list(changes(stored_options(checkpoint), now))
    names = {f"{key} {_text(old)} -> {_text(new)}": rule_of(key) for key, old, new in changed}
    parts, before = list(names), stored_rate(checkpoint)
    trainer = now["trainer"]
    timed = trainer["max_steps"] == -1  # the rate falls between the step and its checkpoint too
    if before is not None and before != rate and (changed or not timed):
        verb = "rises" if rate > before else "falls"
        end, key = ("after", "trainer.max_time") if timed else ("at step", "trainer.max_steps")
        stretched = now["optimizer"]["decay"] == "cosine" and key in [name for name, *_ in changed]
        why = f", since cosine decay now ends {end} {trainer[key.rpartition('.')[2]]}" if stretched else ""
        parts.append(f"the learning rate {verb} from {before:.4g} to {rate:.4g}{why}")
    line = f"from step {int(checkpoint['global_step'])} on: {'; '.join(parts)}" if parts else ""
    return line, [f"{name}: {rule.warning}" for name, rule in names.items() if rule is not None and rule.warning]


def _text(value: Any) -> str:
    """Return a value as JSON, without quotes where it is plain text; escapes of a terminal stay escaped."""
    text = json.dumps(value)[:200]
    return text[1:-1] if isinstance(value, str) and text[1:-1] and "\\" not in text else text
