"""Write the page of a model on the Hugging Face Hub: README.md, and figures of its schedule and of its samples."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml

from dpm_scales.errors import UserError, printable, require
from dpm_scales.models.base import Parts
from dpm_scales.models.trust import foreign_packages
from dpm_scales.plots import figure, graded, legend, logarithmic
from dpm_scales.processes import Process, title_of
from dpm_scales.samplers.grids import tables_of
from dpm_scales.storage import open_regular, write_bytes, write_text

README, SCHEDULE, SAMPLES = "README.md", "schedule.png", "samples.png"
POINTS, SHARES = 200, (0.0, 1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0)
"""Scales of the plot, and eigenvalues as shares of the largest."""

_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_DEFAULT = re.compile(r"(?: \(|(;) )default: [^()]*\)")
_MAX_RESULT_BYTES = 2**20
_TASK = "unconditional-image-generation"
_LONGEST = 12  # values of a list in a table


def write_card(
    folder: Path, model: Parts, repo: str, licence: str | None = None, run: Path | None = None, size: int | None = None
) -> None:
    """Write `README.md`, `schedule.png` and, for a run with sample grids, `samples.png` into a folder.

    Args:
        repo: name on the Hub, owner/name.
        licence: the Hub's identifier of a licence, such as "mit"; None for no statement.
        run: folder of the run that trained the model; its last sample grid and the numbers in its result.json are
            shown.
        size: size of the model's file in bytes.

    Raises: UserError for a licence that is not an identifier, and for a damaged result.json.
    """
    ok = licence is None or _LICENCE.fullmatch(licence) is not None
    require(ok, f"licence={licence!r}: give the Hub's identifier of a licence, for example mit, apache-2.0 or other")
    results = {} if run is None else _results(run)
    grids = [] if run is None else sorted((run / "samples").glob("step-*.png"))
    plot_schedule(folder / SCHEDULE, model.denoiser.process)
    if grids:
        with open_regular(grids[-1]) as file:
            write_bytes(folder / SAMPLES, file.read())
    blocks = [
        _front_matter(model, licence),
        f"# {repo.partition('/')[2]}",
        *([f"![samples of the model]({SAMPLES})"] if grids else []),
        _summary(model, size),
        _loading(model, repo),
        _process(model.denoiser.process),
        _parts(model),
        *([_training(results)] if results else []),
    ]
    write_text(folder / README, "\n\n".join(blocks) + "\n")


def plot_schedule(path: Path, process: Process) -> None:
    """Draw the scale of the signal, lambda_t, and of the noise, gamma_t, against t, for frequencies from 0 up.

    A scale that is the same for all frequencies is drawn as one curve.
    """
    device = tables_of(process)
    t = torch.linspace(0, 1, POINTS + 1, dtype=torch.float64, device=device)[1:]
    mu = process.operator().eigenvalues(64, 64, device).max() * torch.tensor(SHARES, dtype=torch.float64, device=device)
    shape = (len(t), len(mu))
    signal = process.signal_scale(t, mu)[:, 0].expand(shape).cpu()
    noise = process.noise_scale(t, mu)[:, 0].expand(shape).cpu()
    one_signal, one_noise = (bool(torch.allclose(curve, curve[:, :1].expand(shape))) for curve in (signal, noise))
    one = one_signal and one_noise
    t = t.cpu()
    colours = graded(len(mu))
    with figure(path, 7.2, 2.8, ncols=2) as (drawing, axes):
        for j, value in enumerate(mu.tolist()):
            label = None if one else f"$\\mu$ = {value:.3g}"
            if j == 0 or not one_signal:
                axes[0].plot(t, signal[:, j], color=colours[j], label=label)
            if j == 0 or not one_noise:
                axes[1].plot(t, noise[:, j], color=colours[j], label=label)
        axes[0].set(xlabel="scale t", title="signal $\\lambda_t$", ylim=(0, 1.05), xlim=(0, 1))
        axes[1].set(xlabel="scale t", title="noise $\\gamma_t$", xlim=(0, 1))
        if float(noise.max()) > 2:
            logarithmic(axes[1])
        else:
            axes[1].set_ylim(0, 1.05 * max(float(noise.max()), 0.01))
        if not one:
            legend(drawing, axes[1:] if one_signal else axes[:1])


# --- blocks of the page -----------------------------------------------------------------------------------------------


def _front_matter(model: Parts, licence: str | None) -> str:
    values: dict[str, Any] = {"library_name": "dpm_scales", "pipeline_tag": _TASK}
    values |= {} if licence is None else {"license": licence}
    values["tags"] = ["dpm_scales", "diffusion", type(model.denoiser.process).__name__]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _summary(model: Parts, size: int | None) -> str:
    recipe, network = model.recipe, model.denoiser.network
    (height, width), number = recipe.image_size, sum(p.numel() for p in network.parameters())
    colour = {1: "grey", 3: "RGB"}.get(recipe.channels, f"{recipe.channels}-channel")
    names = [_cell(name) for name in recipe.class_names or ()]
    classes = ""
    if recipe.num_classes is not None:
        shown = f": {', '.join(names[:_LONGEST])}{', …' if len(names) > _LONGEST else ''}" if names else ""
        classes = f" It takes labels of {recipe.num_classes} classes{shown}."
    weight = "" if size is None else f", {size / 2**20:.1f} MiB"
    return (
        f"A generative model of {colour} images of {height}x{width} pixels (height x width), with the process "
        f"`{title_of(model.denoiser.process)}` and the network `{type(network).__name__}` of {number:,} "
        f"parameters{weight}.{classes}"
    )


def _loading(model: Parts, repo: str) -> str:
    trusted = foreign_packages(*model.recipe.parts.values())
    allow = f", allow={json.dumps(trusted)}" if trusted else ""
    option = f" 'allow=[{','.join(trusted)}]'" if trusted else ""
    warning = (
        f"\n\nIts config names classes of {', '.join(trusted)}. They are imported only with `allow`; install the "
        "packages, and look at them first."
    )
    return (
        "## Use\n\n"
        "```python\n"
        "import dpm_scales as ds\n\n"
        f'model = ds.load("hf://{repo}"{allow})\n'
        "images = model.sample(16, seed=0)  # uint8 (16, C, H, W)\n"
        "```\n\n"
        "```sh\n"
        f"dpm-scales sample model=hf://{repo}{option} num_samples=64 out=samples/hub\n"
        "```" + (warning if trusted else "")
    )


def _process(process: Process) -> str:
    """Return the process's law as formulas, with the description of its schedules."""
    own_noise = type(process).log_noise_scale is not Process.log_noise_scale
    noise = r"\gamma_t(L)" if own_noise else r"\gamma_t"
    law = rf"y_t = \lambda_t(L)\, y_0 + {noise}\, \varepsilon, \qquad \varepsilon \sim \mathcal{{N}}(0, I)"
    log_signal, log_noise = process.noise(torch.linspace(0, 1, 9, device=tables_of(process)).double())
    keeps = bool((log_signal == 0).all())
    preserves = not keeps and bool((((2 * log_signal).exp() + (2 * log_noise).exp() - 1).abs() < 1e-6).all())
    low, high = process.value_range
    operator = f"`{type(process.operator()).__name__}`, {_first_line(process.operator())}"
    if process.has_context:
        operator = "each sample has its own, by its context"
    items = [f"- operator L with eigenvalues μ: {operator}"]
    if not own_noise:
        items.append(
            f"- noise{'' if keeps else ', a and γ'}: `{type(process.noise).__name__}`, {_first_line(process.noise)}"
        )
    if process.blur is not None:
        items.append(f"- blur, T in px²: `{type(process.blur).__name__}`, {_first_line(process.blur)}")
    blocks = [
        "## Process",
        _first_line(process),
        f"$$ {law} $$",
        f"$$ {_signal(process, keeps, preserves)} $$",
        f"with t = k / {process.num_scales}, k = 0, …, {process.num_scales}, and pixels in [{low:g}, {high:g}].",
        "\n".join(items),
        f"![signal and noise against the scale t]({SCHEDULE})",
    ]
    return "\n\n".join(blocks)


def _signal(process: Process, keeps: bool, preserves: bool) -> str:
    """Return lambda_t as a formula.

    Args:
        keeps: whether a_t = 1 at all scales.
        preserves: whether a_t^2 + gamma_t^2 = 1 at all scales.
    """
    if process.blur is None:
        scale = r"\lambda_t = 1" if keeps else r"\lambda_t = a_t"
    else:
        decay = r"e^{-\mu T(t)}"
        if process.min_decay > 0:
            decay = rf"\left((1 - d) {decay} + d\right)"
        scale = rf"\lambda_t(\mu) = {'' if keeps else 'a_t '}{decay}"
        scale += rf", \qquad d = {process.min_decay:g}" if process.min_decay > 0 else ""
    return scale + (r", \qquad a_t^2 + \gamma_t^2 = 1" if preserves else "")


def _parts(model: Parts) -> str:
    rows = ["| part | class | settings |", "|---|---|---|"]
    parts = {name: getattr(model.denoiser, name) for name in ("process", "target", "network")}
    for name, part in {**parts, "prior": model.prior, "sampler": model.sampler}.items():
        values = {key: value for key, value in model.recipe.parts[name].items() if not key.startswith("_")}
        rows.append(f"| {name} | `{_cell(type(part).__name__)}` | {_settings(values)} |")
    return "\n".join(["## Parts", "", *rows])


def _settings(values: dict[str, Any]) -> str:
    """Return the arguments of a part on one line: those of nested parts in braces, long lists shortened."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            inner = {**({"": value["_target_"].rpartition(".")[2]} if "_target_" in value else {}), **value}
            text = "{" + _settings({name: v for name, v in inner.items() if name != "_target_"}) + "}"
        elif isinstance(value, list) and len(value) > _LONGEST:
            text = f"[{len(value)} values]"
        else:
            text = json.dumps(value, ensure_ascii=False)
        found.append(_cell(f"{key}={text}" if key else text.strip('"')))
    return ", ".join(found) or "–"


def _training(results: dict[str, Any]) -> str:
    rows = ["| figure | value |", "|---|---:|"]
    for name, value in results.items():
        rows.append(f"| {_cell(name)} | {value:,} |" if isinstance(value, int) else f"| {_cell(name)} | {value:.4g} |")
    return "\n".join(["## Training", "", *rows])


# --- sources ----------------------------------------------------------------------------------------------------------


def _first_line(thing: object) -> str:
    """Return the first paragraph of the docstring of an object's class on one line; "" without one."""
    text = " ".join((inspect.getdoc(type(thing)) or "").split("\n\n")[0].split())
    return printable(_DEFAULT.sub(lambda found: found[1] and ")", text))  # the model's own schedules are listed


def _cell(text: object) -> str:
    """Return text escaped for a table cell: no character ends the cell, the line or a block of code."""
    return printable(" ".join(str(text).split())).replace("|", r"\|").replace("`", "'").replace("<", "&lt;")


def _results(run: Path) -> dict[str, Any]:
    """Return the numbers in a run's result.json; empty without that file."""
    path = run / "result.json"
    if not path.is_file():
        return {}
    try:
        with open_regular(path) as file:
            values = json.loads(file.read(_MAX_RESULT_BYTES + 1))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is damaged ({error or type(error).__name__}); remove it, or push the model alone"
        ) from error
    require(isinstance(values, dict), f"{path} is damaged (it holds no object); remove it, or push the model alone")
    return {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
