"""`dpm-scales push`: upload a model to the Hugging Face Hub, with a page that describes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpm_scales.cli.program import program
from dpm_scales.cli.words import split_words
from dpm_scales.errors import printable, require, require_choice

HELP = """\
usage: {0} MODEL OWNER/NAME [licence=ID] [private=true|false] [message=TEXT]
                    [weights=averaged|raw] [allow=PACKAGE,...] [--keep-card]

Upload a model to the Hugging Face Hub: its weights, its config, and a page with its process, settings and, of a run,
samples and figures. Whoever loads it types hf://OWNER/NAME.

  MODEL         a run folder, an export or a checkpoint
  licence=ID    of the model, by the Hub's identifier: mit, cc-by-4.0, other
  private=true  a new repository that only its owner sees; by default, what the owner has set
  weights=raw   of the last step, in place of the EMA weights
  allow=NAMES   packages whose classes the model may name
  --keep-card   leave the page on the Hub as it is

Log in before with `hf auth login`, or set HF_TOKEN."""
HELP_FLAGS = ("-h", "--help")
OPTIONS = ("licence", "license", "private", "message", "weights", "allow")
SWITCH = {"true": True, "false": False}


def run(argv: Sequence[str]) -> None:
    """Upload the model that `argv`, the arguments after `dpm-scales push`, names, and print its address.

    Raises: UserError for arguments that can't be used, and for everything that prevents the upload.
    """
    usage = f"{program('push')} MODEL OWNER/NAME"
    if not set(HELP_FLAGS).isdisjoint(argv):
        print(HELP.format(program("push")))
        return
    asked = split_words(argv, 2, OPTIONS, ("--keep-card",), usage)
    require(len(asked.words) == 2, f"name a model and its place on the Hub: {usage}")
    private = asked.options.get("private")
    if private is not None:
        require_choice("private", private, SWITCH)
    allow = [name for name in asked.options.get("allow", "").strip("[]").split(",") if name]

    from dpm_scales.models.hub import check_repository  # these load torch
    from dpm_scales.models.io import load_model
    from dpm_scales.models.push import push_model

    place, repo = asked.words
    check_repository(repo)
    model = load_model(place, asked.options.get("weights", "averaged"), allow=allow)
    address = push_model(
        model,
        repo,
        private=None if private is None else SWITCH[private],
        licence=asked.options.get("licence", asked.options.get("license")),
        run=_run_of(Path(place)),
        message=asked.options.get("message"),
        card="--keep-card" not in asked.flags,
    )
    print(printable(f"{address}; load it with ds.load('hf://{repo.removeprefix('hf://')}')"))


def _run_of(place: Path) -> Path | None:
    """Return the run folder that a model lies in, None if it lies in none."""
    folders = (place, *place.parents[:2])
    return next((folder for folder in folders if (folder / "result.json").is_file()), None)
