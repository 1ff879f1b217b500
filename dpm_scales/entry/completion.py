"""Complete commands in a shell: `dpm-scales -sc install=SHELL` prints what the shell has to evaluate.

The shell then calls `dpm-scales -sc query=SHELL` with the line up to the cursor in COMP_LINE, and reads one candidate
per line; without any, it offers file names. Hydra's own completion, of `python train.py`, does the same.
"""

from __future__ import annotations

import os

from dpm_scales.cli.completion import candidates
from dpm_scales.commands.ema_words import APART
from dpm_scales.entry.commands import COMMANDS, Command
from dpm_scales.errors import UserError, suggest
from dpm_scales.models.instantiate import CONFIGS

# bash breaks words at = by default: candidates then lack the part before it
BASH = r"""_dpm_scales() {
    local IFS=$'\n' line="${COMP_LINE:0:COMP_POINT}" before=""
    local word="${line##*[[:space:]]}"
    if [[ "$COMP_WORDBREAKS" == *=* && "$word" == *=* ]]; then before="${word%=*}="; fi
    COMPREPLY=($(COMP_LINE="$line" dpm-scales -sc query=bash 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
}
complete -o nospace -o default -F _dpm_scales dpm-scales"""
ZSH = r"""(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_dpm_scales() {
    local line="${(j: :)words[1,CURRENT-1]} $PREFIX"
    local -a found whole parts
    found=("${(@f)$(COMP_LINE="$line" dpm-scales -sc query=zsh 2>/dev/null)}")
    whole=(${(M)found:#* })
    parts=(${${found:#* }:#})
    if (( $#whole + $#parts )); then
        compadd -- ${whole% }
        compadd -S '' -- $parts
    else
        compset -P '*='
        _files
    fi
}
compdef _dpm_scales dpm-scales"""
FISH = r"""function __dpm_scales
    set -l found (COMP_LINE=(commandline -cp | string collect) dpm-scales -sc query=fish 2>/dev/null)
    if test (count $found) -gt 0
        string trim --right -- $found
    else
        set -l parts (string split -m 1 = -- (commandline -ct))
        if test (count $parts) -eq 2
            string replace -r '^' "$parts[1]=" -- (__fish_complete_path $parts[2])
        else
            __fish_complete_path $parts[1]
        end
    end
end
complete -c dpm-scales -e
complete -c dpm-scales -f -a '(__dpm_scales)'"""
INSTALL = {"bash": BASH, "zsh": ZSH, "fish": FISH}
UNINSTALL = {
    "bash": "complete -r dpm-scales; unset -f _dpm_scales",
    "zsh": "compdef -d dpm-scales; unset -f _dpm_scales",
    "fish": "complete -c dpm-scales -e; functions -e __dpm_scales",
}


def complete(action: str) -> str:
    """Return what `-sc ACTION` prints.

    Args:
        action: `install=SHELL` or `uninstall=SHELL` for a script, `query=SHELL` for candidates.

    Raises: UserError for other actions and shells.
    """
    verb, _, shell = action.partition("=")
    allowed = [f"{verb}={name}" for verb in ("install", "query", "uninstall") for name in INSTALL]
    if action not in allowed:
        raise UserError(f"unknown -sc {action!r}: {suggest(action, allowed)}")
    if verb == "query":
        return "\n".join(query(os.environ.get("COMP_LINE", "")))
    return (INSTALL if verb == "install" else UNINSTALL)[shell]


def query(line: str) -> list[str]:
    """Return the candidates for the last word of a command line, which is empty after a space."""
    words = line.split()
    word = "" if not words or line[-1].isspace() else words.pop()
    if words and words[0].rpartition("/")[2].startswith("python"):
        words = [words[1].removesuffix(".py"), *words[2:]] if len(words) > 1 else []
    else:
        words = words[1:]
    if not words:
        return [f"{name} " for name in (*COMMANDS, "--help", "--version") if name.startswith(word)]
    name, *words = words
    if (CONFIGS / f"{name}.yaml").is_file():
        return candidates(name, words, word)
    found = _words(COMMANDS[name], words, word) if name in COMMANDS else []
    if name == "ema" and word:  # it passes these on
        passed = candidates("evaluate", [one for one in words if "=" in one], word)
        found += [one for one in passed if one not in found and one.partition("=")[0] not in APART]
    return found


def _words(command: Command, typed: list[str], word: str) -> list[str]:
    """Return the candidates for `word`, typed after the words `typed` of a command without a config of its own."""
    action = typed[0] if typed and typed[0] in command.words else ""
    rest = typed[1:] if action else typed
    actions = [f"{name} " for name in command.words if name and not typed]
    free = any("=" not in one and not one.startswith("-") for one in rest)
    # a folder comes first, and its name is the shell's to offer
    own = command.words.get(action, ()) if word or free else ()
    given = {one.partition("=")[0] for one in rest}
    options = [f"{name} " if name.startswith("-") else f"{name}=" for name in own if name not in given]
    return [one for one in (*actions, *options) if one.startswith(word)]
