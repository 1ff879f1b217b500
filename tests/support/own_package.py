"""The package `mynet` of the pages docs/own_*.md, installed outside of the repository; its import leaves a trace."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.shell import ROOT

PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("own_*.md"))}
BLOCK = re.compile(r"```python\n# mynet\.(\w+)\n(.*?)```", re.DOTALL)


def modules() -> dict[str, str]:
    """Return the modules of all pages by name, as a reader would save them; blocks of one name continue a module."""
    found: dict[str, str] = {}
    for page in PAGES.values():
        for name, text in BLOCK.findall(page):
            found[name] = f"{found[name]}\n\n{text}" if name in found else text
    return found


def command(page: str, of: str) -> list[str]:
    """Return the arguments of the page's first command that begins so, from a block of shell."""
    text = next(line for block in re.findall(r"```sh\n(.*?)```", PAGES[page].replace("\\\n", " "), re.DOTALL)
                for line in block.splitlines() if line.startswith(f"python {of}"))  # fmt: skip
    return [word.strip("'") for word in re.findall(r"'[^']*'|\S+", text)][2:]


@contextmanager
def installed(folder: Path) -> Iterator[Path]:
    """Write the package into `folder`, on the path of this process and of those that it starts; yield the folder."""
    (folder / "mynet").mkdir()
    trace = f"from pathlib import Path\nPath({str(folder / 'imported')!r}).touch()\nimport os\n"
    (folder / "mynet" / "__init__.py").write_text(trace)
    for name, text in modules().items():
        (folder / "mynet" / f"{name}.py").write_text(text)
    forget(folder)  # of another test's package of this name
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder
    forget(folder)


def forget(folder: Path) -> None:
    """Let the next import of the package leave its trace again."""
    (folder / "imported").unlink(missing_ok=True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mynet"]:
        del sys.modules[name]


def imported(folder: Path) -> bool:
    """Return whether anything of the package was imported since `forget`."""
    return (folder / "imported").exists() or any(name.partition(".")[0] == "mynet" for name in sys.modules)
