"""The site: its navigation, the names in its reference, its options, and formulas as TeX; without MkDocs."""

from __future__ import annotations

import ast
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import dpm_scales as ds
from support.shell import ROOT
from tools.site import formulas
from tools.site.links import dead_links
from tools.site.options import GROUPS, option_pages

DOCS = ROOT / "docs"


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name functions, without calling them."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SETTINGS: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
#: pages that tools/site/hooks.py makes of the repository's files; the module itself needs MkDocs
TOP = {"changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md", "architecture.md": "ARCHITECTURE.md",
       "contributing.md": "CONTRIBUTING.md"}  # fmt: skip


def pages_of(nav: Any) -> list[str]:
    """Return the pages of a navigation in order."""
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [page for part in inner for page in pages_of(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = pages_of(SETTINGS["nav"])
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if path.parent.name != "leaderboard"}
    assert SETTINGS["exclude_docs"].split() == ["leaderboard/*.md"]
    made = set(option_pages()) | TOP.keys()
    missing = sorted(written - set(listed))
    assert missing == [], f"add {missing} to nav in mkdocs.yml"
    assert sorted(set(listed) - written - made) == [] and len(listed) == len(set(listed))
    assert all((ROOT / name).is_file() for name in TOP.values()) and made <= set(listed)


def test_files_that_the_settings_name_exist() -> None:
    handler = SETTINGS["plugins"][1]["mkdocstrings"]["handlers"]["python"]
    named = [*SETTINGS["hooks"], *SETTINGS["watch"], *handler["options"]["extensions"], *handler["paths"]]
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [name for name in SETTINGS["extra_css"] if not (DOCS / name).is_file()] == []
    assert SETTINGS["strict"] is True and SETTINGS["theme"]["font"] is False


def documented() -> list[str]:
    """Return the full names of the objects in the reference."""
    text = "\n".join(path.read_text() for path in sorted((DOCS / "reference").glob("*.md")))
    return re.findall(r"^::: (\S+)", text, re.MULTILINE)


def full_name(thing: Any) -> str:
    """Return where an object is defined; not its identity, since other tests import modules anew."""
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing.__name__)}"


def test_the_reference_has_every_public_name() -> None:
    found = {full_name(pkgutil.resolve_name(name)) for name in documented()}
    missing = [name for name in ds.__all__ if full_name(getattr(ds, name)) not in found]
    assert missing == [], f"add ::: lines for {missing} to a page in docs/reference"
    assert len(documented()) == len(set(documented()))


def test_pages_of_options_have_every_option() -> None:
    pages = option_pages()
    train = pages["reference/options.md"]
    assert "| `scale_sampling` | `uniform` | of the scales in training" in train and "`process=vp`" in train
    assert {f"reference/options_{group}.md" for group in GROUPS} < pages.keys()
    process = pages["reference/options_process.md"]
    assert "## process=blurring\n" in process and "### process/blur=sin_squared\n" in process
    assert "| `process._target_`" not in process and "`dpm_scales.processes.VP` with `process/noise=cosine`." in process


def test_python_of_the_law_page_runs() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "law.md").read_text(), re.MULTILINE | re.DOTALL)
    space: dict[str, Any] = {}
    exec(block, space)
    assert space["path"].shape == (3, 4, 3, 48, 64) and space["filtered"].shape == (3, 1, 3, 48, 64)
    assert space["variance"].shape == (3, 4)


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ("gamma_k^2 = alpha_k^2 gamma_{k-1}^2", r"\gamma_{k}^{2} = \alpha_{k}^{2} \gamma_{k-1}^{2}"),
        ("sqrt(1 - a_t^2)", r"\sqrt{1 - a_{t}^{2}}"),
        ("λ_t(μ) = √(1 − a_t²)", r"\lambda_{t} (\mu ) = \sqrt{1 - a_{t}^{2}}"),
        ("m_s = lambda_s(L) y_0-hat", r"m_{s} = \lambda_{s} (L) \hat{y}_{0}"),
        ("(A C A' + sigma^2)^-1", r"(A C A' + \sigma^{2} )^{-1}"),
        ("| w_t(L)^-1 y_0 - eps_k |^2", r"\vert w_{t}(L)^{-1} y_{0} - \varepsilon_{k} \vert^{2}"),
        ("E[x_0 | x_t]", r"E[x_{0} \mid x_{t}]"),
        ("exp(-tL) <= 1", r"\exp (-tL) \le 1"),
        ("sum_k c_k T_k(X)", r"\sum_{k} c_{k} T_{k}(X)"),
        ("c_skip z, d_min", r"c_{\mathrm{skip}} z, d_{\min}"),
        ("ŷ_0 ∈ the data", r"\hat{y}_{0} \in \text{ the data}"),
    ],
)
def test_formulas(plain: str, expected: str) -> None:
    assert formulas.tex(plain) == expected


def test_blocks_of_formulas_and_of_code() -> None:
    aligned = formulas.block(["marginal     y_t = lambda_t(L) y_0", "             for every t, gamma_t > 0"])
    assert aligned is not None and aligned.startswith(r"\begin{array}{ll}\text{marginal} & y_{t} = ")
    assert aligned.count("&") == 2
    message = "error: the loss was not finite in 24 steps; resume with optimizer.learning_rate=1e-4, or begin again"
    for code in (["import dpm_scales", "x_0 = ds.load('a')"], ["python train.py process=vp"], ["a  b"], [message]):
        assert formulas.block(code) is None


def test_prose_keeps_code_links_and_what_is_tex_already() -> None:
    text = "The `gamma_t` of [it](x_0.md) is gamma_t(mu); $\\lambda_t$, num_scales, a t and eta stay."
    expected = "The `gamma_t` of [it](x_0.md) is $\\gamma_{t}$($\\mu$); $\\lambda_t$, num_scales, a t and eta stay."
    assert formulas.prose(text) == expected


def test_pages_keep_fences_display_formulas_and_objects_of_the_reference() -> None:
    page = (
        "x_0\n\n```python\nx_0 = 1\n```\n\n$$\nx_0\n$$\n\n$$x_0$$\n\n$$x_0 +\ny_0.$$\n\n"
        "::: dpm_scales.x_0\n    options: {x_0: 1}\n\n"
        "    y_t = a_t y_0\n\nname   of x_0\nother  of y_0\n"
    )
    made = formulas.markdown(page)
    assert "```python\nx_0 = 1\n```" in made and "$$\nx_0\n$$\n\n$$x_0$$\n\n$$x_0 +\ny_0.$$\n" in made
    assert "::: dpm_scales.x_0\n    options: {x_0: 1}\n" in made
    assert made.startswith("$x_{0}$\n") and "\n$$\ny_{t} = a_{t} y_{0}\n$$\n" in made
    assert "| name | of $x_{0}$ |" in made


def sources() -> list[Path]:
    return sorted((ROOT / "dpm_scales").rglob("*.py"))


def test_all_docstrings_and_pages_become_balanced_tex() -> None:
    texts = [path.read_text() for path in DOCS.rglob("*.md")]
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                texts.append(str(ast.get_docstring(node)))
    found = 0
    for text in texts:
        made = re.sub(r"```.*?```|`[^`]*`", "", formulas.markdown(text), flags=re.DOTALL)
        for formula in re.findall(r"\$\$\n(.*?)\n\$\$|\$([^$\n]+)\$", made, re.DOTALL):
            inside = "".join(formula)
            found += 1
            bare = re.sub(r"\\[{}]", "", inside)
            assert bare.count("{") == bare.count("}") and not inside.rstrip().endswith(("\\", "_", "^")), inside
    assert found > 500


def test_dead_links_of_a_built_site_are_found(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "a picture.png").touch()
    (tmp_path / "index.html").write_text(
        '<a id="top" href="page/">p</a><a href="page/#deep">d</a><a href="#top">t</a><a href="#__skip">s</a>'
        '<img src="a%20picture.png"><a href="https://example.org/none">x</a><a href="page/#none">n</a>'
    )
    (tmp_path / "page" / "index.html").write_text(
        '<h2 id="deep">h</h2><a href="..">up</a><a href="/page/index.html#deep">r</a><img src="none.png"><a href="#no">'
    )
    dead = ["index.html: page/#none", "page/index.html: none.png", "page/index.html: #no"]
    assert dead_links(tmp_path) == dead
