"""Write a command as the user types it, and start a command in another process.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from dpm_scales.models.instantiate import CONFIGS

#: folder of a checkout, which contains scripts and configs beside the package; None if the package was installed alone
CHECKOUT = CONFIGS.parent if (CONFIGS.parent / "train.py").is_file() else None
#: commands that are scripts in a checkout
SCRIPTS = ("train", "sample", "evaluate", "evolve")
#: how commands are typed, by the way in which the first process was started
SCRIPT, CONSOLE, MODULE = "script", "console", "module"
FORMS = {SCRIPT: "python {}.py", CONSOLE: "dpm-scales {}", MODULE: "python -m dpm_scales {}"}
#: environment variable that passes the form to child processes, which are all started as a module
FORM = "DPM_SCALES_FORM"


def remember_form(form: str) -> None:
    """Record how this command was typed, a key of `FORMS`; a form inherited from a parent process is kept."""
    os.environ.setdefault(FORM, form)


def form() -> str:
    """Return how the running command was typed; for code called from Python, the form that this installation has."""
    known = os.environ.get(FORM, "")
    return known if known in FORMS else CONSOLE if CHECKOUT is None else SCRIPT


def program(name: str) -> str:
    """Return the words with which the user starts the command `name`, in the form of the running command."""
    return FORMS[MODULE if form() == SCRIPT and name not in SCRIPTS else form()].format(name)


def command_line(name: str, *words: str) -> str:
    """Return the command `name` with its arguments, quoted for a shell, for messages that advise it."""
    return " ".join([program(name), *map(shlex.quote, words)])


def module_arguments(name: str, *words: str) -> list[str]:
    """Return the arguments after `python`, or after torchrun's options, that run the command `name` in a new process.

    The process needs `child_environment()`.
    """
    return ["-m", "dpm_scales", name, *words]


def child_environment() -> dict[str, str]:
    """Return the environment in which a new interpreter finds the packages that this one finds, for `module_arguments`.

    The folder of a checkout, which a script finds without being installed, is put into PYTHONPATH. `python -m` would
    import from the current folder first; PYTHONSAFEPATH prevents this unless this process does so too.
    """
    environment = {**os.environ, FORM: form()}
    if CHECKOUT is not None:
        folders = environment.get("PYTHONPATH", "").split(os.pathsep)
        others = [folder for folder in folders if folder and folder != str(CHECKOUT)]
        environment["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *others])
    if Path.cwd() not in {Path(folder).absolute() for folder in sys.path}:
        environment["PYTHONSAFEPATH"] = "1"
    return environment
