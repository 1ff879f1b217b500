"""Write the pages of options: every command and every config, with the comments of the YAML files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from dpm_scales.cli import configs
from dpm_scales.cli.configs import Option
from dpm_scales.models.instantiate import CONFIGS

COMMANDS = {
    "train": "Train a model, resume a run, sweep over options.",
    "sample": "Sample images from a model, or edit images with it.",
    "evaluate": "Compare samples of a model, or images, with real images.",
    "evolve": "Apply forward processes to real images, and compare them.",
}
GROUPS = ("data", "process", "target", "weight", "prior", "network", "sampler", "trainer", "logger", "edit", "task")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _rows(options: Iterable[Option]) -> Iterator[str]:
    for option in options:
        if option.key.rpartition(".")[2].startswith("_"):
            continue
        about = " ".join([*option.above, option.comment]).strip()
        value = f"`{_escaped(option.text)}`" if option.text else ""
        yield f"| `{option.key}` | {value} | {_escaped(about)} |"


def _table(options: Iterable[Option]) -> list[str]:
    rows = list(_rows(options))
    return ["| option | default | |", "|---|---|---|", *rows, ""] if rows else []


def _about(head: Iterable[str]) -> str:
    return _escaped(" ".join(line for line in head if not line.startswith("python ")))


def _command(name: str, about: str) -> list[str]:
    head, options = configs.read_options(CONFIGS / f"{name}.yaml")
    groups = configs.groups(name)
    examples = [line for line in head if line.startswith("python ")]
    chosen = ", ".join(f"`{group}={choice}`" for group, choice in groups.items() if choice)
    return [
        f"## {name}",
        "",
        about,
        "",
        *(["```sh", *examples, "```", ""] if examples else []),
        *([f"Chosen unless you say otherwise: {chosen}.", ""] if chosen else []),
        *_table(option for option in options if option.key not in groups),
    ]


def _choice(level: str, group: str, path: Path) -> list[str]:
    head, _ = configs.read_options(path)
    about = _about(head)
    inner = [f"`{group}/{name}={choice}`" for name, choice in configs.defaults(path) if name and choice]
    options = configs.chosen_options(group, path)
    target = options.get(f"{configs.package(group)}._target_")
    parts = [] if target is None else [f"`{target.text}`"]
    parts += ["with " + ", ".join(inner)] if inner else []
    shown = [f"{' '.join(parts)}.", ""] if parts else []
    about = f"{about[:1].upper()}{about[1:]}." if about else ""
    return [f"{level} {group}={path.stem}", "", *([about, ""] if about else []), *shown, *_table(options.values())]


def option_pages() -> dict[str, str]:
    """Return the text of the pages reference/options*.md by their place."""
    pages = {}
    commands = [line for name, about in COMMANDS.items() for line in _command(name, about)]
    intro = (
        "Options are `KEY=VALUE`, groups `GROUP=NAME`; `--help` prints these pages in the terminal. The tables are made "
        "from the YAML files in `configs/`."
    )
    pages["reference/options.md"] = "\n".join(["# Commands and their options", "", intro, "", *commands])
    for group in GROUPS:
        lines = [f"# `{group}=`", ""]
        for inner in [group, *configs.inner_groups(group)]:
            lines += [] if inner == group else [f"## `{inner}=`", ""]
            for name in configs.choices(inner):
                lines += _choice("##" if inner == group else "###", inner, CONFIGS / inner / f"{name}.yaml")
        pages[f"reference/options_{group}.md"] = "\n".join(lines)
    return pages
