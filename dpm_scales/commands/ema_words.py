"""Parse the arguments of `dpm-scales ema`: its own, and those of evaluate.py, which it passes on. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpm_scales.cli.program import program
from dpm_scales.errors import UserError, require

HELP = """\
usage: {0} RUN [lengths=0.03,0.05,0.1] [ema_step=N] [metric=NAME] [out=DIR] [KEY=VALUE ...]

Draw the quality of a run's samples against the length of the average of its weights, made from the run's snapshots,
and say which length is best. A length is the standard deviation of the average's profile, as a share of the steps.

examples:
  {0} runs/mine
  {0} runs/mine lengths=0.05,0.07,0.1 num_samples=5000 features=inception
  {0} runs/mine sampler=ddim steps=50 ema_step=20000 out=curves/ddim

  RUN           a folder of a run that was trained with ema.power_lengths=[0.05,0.10]
  lengths=LIST  by default those of {1} that the snapshots reconstruct
  ema_step=N    step of the snapshot that ends the averages; by default the last
  metric=NAME   the figure that says which is best, such as kid; by default the first
  out=DIR       folder for quality.csv, quality.png and one evaluation per length; by default RUN/ema

Further options are those of evaluate.py, here with the defaults reference=data, measures=[frechet,kernel] and
num_samples={2}. A length that was measured already, with the same options, is not measured again."""
HELP_FLAGS = ("-h", "--help")
LENGTHS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.14, 0.2, 0.25)
NUM_SAMPLES = 1000
USUAL = {"reference": "data", "measures": "[frechet,kernel]", "num_samples": str(NUM_SAMPLES)}
"""Defaults that differ from those of evaluate.py."""
APART = {
    "model": "it is the first argument",
    "ema": "it is what is varied: lengths=0.03,0.05,0.1",
    "samples": "they are drawn from the run",
    "weights": "averages are compared",
    "yardstick": "give it to evaluate.py",
    "likelihood": "give it to evaluate.py",
}
"""Options of evaluate.py that this command does not have, with the reason."""
HELP = HELP.replace("{1}", ", ".join(f"{length:g}" for length in LENGTHS)).replace("{2}", str(NUM_SAMPLES))
_KEY = re.compile(r"[+~]*([a-z][\w./]*)", re.ASCII)


@dataclass(frozen=True)
class Asked:
    """The command's arguments.

    Attributes:
        run: the run's folder.
        lengths: lengths to measure; empty for the usual ones.
        metric: name of the figure that ranks them; None for the first.
        out: folder of the results.
        options: options of evaluate.py, KEY=VALUE, and flags.
    """

    run: Path
    lengths: tuple[float, ...]
    metric: str | None
    out: Path
    options: list[str]


def asked_of(argv: Sequence[str]) -> Asked:
    """Parse the arguments after `dpm-scales ema`. Raises UserError for arguments that can't be used."""
    usage = f"{program('ema')} RUN [lengths=0.03,0.05,0.1]"
    words: list[str] = []
    own: dict[str, str] = {}
    options: list[str] = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        found = _KEY.fullmatch(key)
        if argument.startswith("-"):
            options.append(argument)
        elif key in ("lengths", "metric", "out") and equals:
            require(bool(value.strip()), f"{key} is empty; give it a value, or leave it out")
            require(key not in own, f"{key} is given twice; give it once")
            own[key] = value
        elif equals and found and not Path(argument).exists():
            reason = APART.get(found[1])
            require(reason is None, f"{found[1]} is no option of {program('ema')}: {reason}")
            options.append(argument)
        else:
            words.append(argument)
    require(len(words) == 1, f"name one run: {usage}")
    given = {option.partition("=")[0] for option in options}
    usual = [f"{key}={value}" for key, value in USUAL.items() if key not in given]
    run = Path(words[0])
    out = Path(own["out"]) if "out" in own else run / "ema"
    lengths = _numbers(own["lengths"]) if "lengths" in own else ()
    return Asked(run, lengths, own.get("metric"), out, [f"model={run}", *usual, *options])


def _numbers(text: str) -> tuple[float, ...]:
    """Return the numbers of a list, in order, with or without brackets. Raises UserError for anything else."""
    try:
        found = {float(part) for part in text.strip("[]").split(",")}
    except ValueError:
        raise UserError(f"lengths must be numbers, 0.03,0.05,0.1, got {text!r:.100}") from None
    return tuple(sorted(found))
