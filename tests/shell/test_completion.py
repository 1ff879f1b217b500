"""Completion in a shell: what each word can become, and a bash that asks for it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.bash_completion import BashCompletion
from hydra._internal.utils import create_config_search_path

from dpm_scales.cli import configs
from dpm_scales.cli.arguments import ALIASES, tidy
from dpm_scales.cli.completion import candidates
from dpm_scales.cli.help import help_text
from dpm_scales.entry.commands import COMMANDS
from dpm_scales.entry.completion import INSTALL, UNINSTALL, complete, query
from dpm_scales.errors import UserError
from support.shell import CONFIGS, ROOT, call, command, composed

HYDRA_COMMANDS = ("train", "sample", "evaluate", "evolve")


def leaves(name: str, words: tuple[str, ...] = (), start: str = "") -> set[str]:
    """Return all names that are reached by completing again and again, without their `=`."""
    found = set()
    for one in candidates(name, words, start):
        assert one.startswith(start) and one != start
        found |= {one[:-1]} if one.endswith("=") else leaves(name, words, one)
    return found


@pytest.mark.parametrize("name", HYDRA_COMMANDS)
def test_the_options_are_those_of_the_help(name: str) -> None:
    options = help_text(name, []).partition("options, KEY=VALUE:")[2]
    listed = set(re.findall(r"^  ([\w./]+)=", options, re.MULTILINE))
    groups = {"task" if group == "edit" else group for group in configs.groups(name)}
    assert len(listed) > 5 and leaves(name) >= listed | groups
    assert not {key for key in leaves(name) if "_target_" in key or key in configs.GIVEN}


@pytest.mark.parametrize("name", HYDRA_COMMANDS)
def test_every_choice_that_is_offered_composes(name: str) -> None:
    for group in sorted(configs.groups(name)):
        typed = {new: old for old, new in ALIASES.get(name, {}).items()}.get(group, group)
        offered = candidates(name, (), f"{typed}=")
        assert [one.strip() for one in offered] == [f"{typed}={choice}" for choice in configs.choices(group)]
        if name != "train":
            for one in offered:
                composed(*tidy([one.strip()], ALIASES.get(name, {})), name=name)


@pytest.mark.parametrize("word", ["process=", "sampler=d", "process/noise=", "experiment=digits_", "hydra/sweeper=opt"])
def test_choices_are_those_of_hydra(word: str) -> None:
    """Hydra's completion reads the same folders in its own way; it also offers the configs of its plugins."""
    loader = ConfigLoaderImpl(create_config_search_path(str(CONFIGS)))
    theirs = {one for one in BashCompletion(loader)._query("train", word) if "=" in one}
    ours = {one.strip() for one in candidates("train", (), word)}
    assert ours and (ours == theirs or word.startswith("hydra/") and ours <= theirs)


CASES = {
    "": ["train ", "sample ", "evaluate ", "evolve ", "--help ", "--version "],
    "tr": ["train "],
    "train proc": ["process.", "process/", "process="],
    "train process/": ["process/blur=", "process/clock=", "process/color=", "process/noise="],
    "train process=heat process.blur.blur_sigma_mi": ["process.blur.blur_sigma_min="],
    "train experiment=digits_heat process.blur.blur_sigma_mi": ["process.blur.blur_sigma_min="],
    "train process.blur": [],
    "train process=hea": ["process=heat "],
    "train +process=hea": ["+process=heat "],
    "train process=vp,hea": [],
    "train -m process=vp,hea": ["process=vp,heat "],
    "train optimizer.le": ["optimizer.learning_rate="],
    "train optimizer.learning_rate=": ["optimizer.learning_rate=1.0e-3 "],
    "train optimizer.betas=": [],
    "train run_dir=": [],
    "train compile=": ["compile=false ", "compile=true "],
    "train --config-": ["--config-dir ", "--config-name ", "--config-path "],
    "train --cfg ": ["job ", "hydra ", "all "],
    "train --config-dir ": [],
    "train --config-dir": ["--config-dir "],
    "train --nonsense proce": ["process.", "process/", "process="],
    "train 'network.widths=[8]' sampler=dd": ["sampler=ddim "],
    "sample tas": ["task="],
    "sample task=inp": ["task=inpaint "],
    "sample task=inpaint mas": ["mask="],
    "sample mas": [],
    "evolve data": ["data="],
    "evolve task=sha": ["task=shadow "],
    "nonsense ": [],
    "runs ": ["best ", "export "],
    "runs best ": [],
    "runs best m": ["metric="],
    "runs best --": ["--path "],
    "runs --": ["--json ", "--csv "],
    "runs export runs/a ": ["out=", "weights=", "ema=", "ema_step=", "format="],
    "runs export runs/a out=x e": ["ema=", "ema_step="],
    "studio po": ["port="],
    "studio runs port=80 ": ["host=", "configs=", "allow=", "device="],
    "data ": ["pack ", "check ", "index "],
    "data pack photos o": ["out=", "on_error="],
    "ema runs/a le": ["lengths="],
    "ema runs/a num_sam": ["num_samples="],
    "ema runs/a mod": [],
    "init ": [],
    "init n": ["name="],
}


@pytest.mark.parametrize("line", CASES)
def test_lines(line: str) -> None:
    found = query(f"dpm-scales {line}")
    assert set(found) >= set(CASES[line]) if line == "" else found == CASES[line]
    if line and not line.startswith("tr ") and line.split()[0] in HYDRA_COMMANDS:
        script, _, rest = line.partition(" ")
        assert query(f"python {script}.py {rest}") == found


def test_every_command_is_offered() -> None:
    assert query("dpm-scales ")[: len(COMMANDS)] == [f"{name} " for name in COMMANDS]


WORDS = [(name, action) for name, found in COMMANDS.items() for action in found.words]


# `ema` passes other options on to evaluate, and `data` takes none without an action
@pytest.mark.parametrize(("name", "action"), [one for one in WORDS if one not in (("ema", ""), ("data", ""))])
def test_words_are_those_that_the_command_takes(name: str, action: str, tmp_path: Path) -> None:
    """It names them when it refuses another."""
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for word in COMMANDS[name].words[action]:
        kinds[word.startswith("-")].append(word)
    for word, own in (("zzz=1", kinds[False]), ("--zzz", kinds[True])):
        told = command(name, *([action] if action else []), tmp_path, word).err
        assert sorted(own) == re.findall(r"[\w-]+", told.partition("allowed: ")[2].replace("none", ""))


def test_configs_of_the_users_own_are_offered(tmp_path: Path) -> None:
    (tmp_path / "process").mkdir()
    (tmp_path / "process" / "mine.yaml").write_text("_target_: mine.Process\nspeed: 3\n")
    words = ("--config-dir", str(tmp_path))
    assert candidates("train", words, "process=mi") == ["process=mine "]
    assert candidates("train", (*words, "process=mine"), "process.s") == ["process.speed="]
    assert candidates("train", (), "process=mi") == []


@pytest.mark.parametrize("action", ["install=bsh", "install", "", "query=tcsh"])
def test_unknown_actions(action: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^unknown -sc .*allowed: install=bash, install=fish, install=zsh, query="):
        complete(action)


# --- shells -----------------------------------------------------------------------------------------------------------


def in_bash(script: str, line: str, folder: Path, function: str, cwd: Path) -> list[str]:
    """Evaluate a completion script in bash, and return what the Tab key offers after `line`."""
    program = folder / "dpm-scales"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m dpm_scales "$@"\n')
    program.chmod(0o755)
    words = line.split() if not line.endswith(" ") else [*line.split(), ""]
    commands = f"""
{script}
COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}
COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
{function}
printf '<%s>\\n' "${{COMPREPLY[@]}}"
"""
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "--norc", "-c", commands],
        cwd=cwd,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done
    return [one for one in done.stdout.splitlines() if one != "<>"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("dpm-scales tr", ["<train >"]),
        ("dpm-scales train pro", ["<process.>", "<process/>", "<process=>"]),
        ("dpm-scales train process=he", ["<heat >"]),  # readline replaces what is after =
        ("dpm-scales train run_dir=", []),
    ],
)
def test_bash_completes_dpm_scales(line: str, offered: list[str], tmp_path: Path) -> None:
    script = complete("install=bash")
    assert script.endswith("-F _dpm_scales dpm-scales")
    assert in_bash(script, line, tmp_path, "_dpm_scales", tmp_path) == offered


def test_bash_completes_scripts_by_hydras_function(tmp_path: Path) -> None:
    """It recognises a script by the text @hydra.main."""
    script = call("train.py", "-sc", "install=bash", cwd=ROOT).out
    line = "python train.py process=he"
    assert in_bash(script, line, tmp_path, "hydra_bash_completion", ROOT) == ["<process=heat>"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_be_told_to_forget(shell: str) -> None:
    assert "-sc query=" + shell in INSTALL[shell]
    assert complete(f"uninstall={shell}") == UNINSTALL[shell] and "dpm_scales" in UNINSTALL[shell]
