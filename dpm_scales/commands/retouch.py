"""Edit photos by osmosis: `python evolve.py task=shadow image=… mask=… out=DIR`, and `task=clone`.

Both write `result.png` and `comparison.png`, the inputs beside the result. Masks are grey images thresholded at half.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from dpm_scales.cli.options import pick_device
from dpm_scales.editing.osmosis import MATCHES, blend, check_shadow_options, remove_shadow
from dpm_scales.errors import UserError, is_whole, require, require_choice, require_number
from dpm_scales.images import LEVELS, load_image, save_png, to_range, to_uint8
from dpm_scales.models.instantiate import plain
from dpm_scales.plots.rows import titled_row
from dpm_scales.progress import progress_bar
from dpm_scales.storage import check_writable

RANGE = (0.0, 1.0)
RESULT, COMPARISON = "result.png", "comparison.png"
AUTO_MATCH = {"region": "pinned", "edge": "lit"}
AUTO_PENUMBRA = {"region": 1, "edge": 0}
"""Values of match=auto and penumbra=auto for each kind of mask."""


def shadow(cfg: DictConfig) -> None:
    """Remove a shadow from an image and write the result. Raises UserError for invalid options, before solving."""
    marks = str(cfg.mask_marks)
    match = AUTO_MATCH.get(marks, "mean") if cfg.match == "auto" else cfg.match
    penumbra = AUTO_PENUMBRA.get(marks, 0) if cfg.penumbra == "auto" else cfg.penumbra
    check_shadow_options(marks, match, penumbra)
    device = _check_common(cfg)
    image = load_image(str(cfg.image))
    mask = _load_mask(str(cfg.mask), image, str(cfg.image))
    _check_dark(image, str(cfg.image), cfg.offset)
    out = _check_out(cfg, "image", "mask")
    inside = mask.to(device)

    def edit(f: Tensor) -> Tensor:
        return remove_shadow(f, inside, marks, match, cfg.offset, cfg.tol, penumbra)

    result = _by_channel(edit, device, image)
    _save(out, {"photo": image, f"mask ({marks})": _shown(mask, image)}, result)


def clone(cfg: DictConfig) -> None:
    """Blend an object into a background and write the result. Raises UserError for invalid options, before solving."""
    require_choice("match", cfg.match, MATCHES)
    device = _check_common(cfg)
    background, foreground = load_image(str(cfg.background)), load_image(str(cfg.foreground))
    if len(background) != len(foreground):
        kinds = {1: "grey", 3: "RGB"}
        raise UserError(
            f"{cfg.background} is {kinds[len(background)]} and {cfg.foreground} is {kinds[len(foreground)]}; "
            "convert one of them"
        )
    mask = _load_mask(str(cfg.mask), foreground, str(cfg.foreground))
    height, width = background.shape[-2:]
    placed, inside = place(foreground, mask, (height, width), _corner(cfg, foreground, background))
    _check_dark(background, str(cfg.background), cfg.offset)
    _check_dark(foreground, str(cfg.foreground), cfg.offset)
    out = _check_out(cfg, "background", "foreground", "mask")

    def edit(f: Tensor, g: Tensor) -> Tensor:
        return blend(f, g, inside.to(device), cfg.match, cfg.offset, cfg.tol, cfg.mixed)

    result = _by_channel(edit, device, background, placed)
    pasted = torch.where(inside, placed, background)
    _save(out, {"background": background, "pasted": pasted, "mask": _shown(inside, background)}, result)


def place(foreground: Tensor, mask: Tensor, size: tuple[int, int], corner: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return a foreground and its mask placed on a canvas of the background's size.

    Args:
        foreground: ``(C, h, w)``; its border pixels are replicated outwards, so that no drift crosses its border.
        mask: bool ``(h, w)``.
        size: H, W of the background.
        corner: row and column in the background of the foreground's upper left pixel; parts outside are cut off.

    Returns: ``(C, H, W)`` and bool ``(H, W)``.
    Raises: UserError if the mask lies outside the background or covers all of it.
    """
    rows, columns = (torch.arange(n) - first for n, first in zip(size, corner, strict=True))
    height, width = mask.shape
    covered = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    near = (rows.clamp(0, height - 1)[:, None], columns.clamp(0, width - 1))
    inside = mask[near] & covered
    where = f"at=[{corner[0]},{corner[1]}] in a background of {size[0]}x{size[1]}"
    require(bool(inside.any()), f"no white pixel of the mask lies {where}; choose another place")
    require(not bool(inside.all()), f"the mask covers the whole background {where}; nothing of it would be left")
    return foreground[:, near[0], near[1]], inside


def _corner(cfg: DictConfig, foreground: Tensor, background: Tensor) -> tuple[int, int]:
    at = plain(cfg.at)
    if at is None:
        (height, width), (h, w) = background.shape[-2:], foreground.shape[-2:]
        return (height - h) // 2, (width - w) // 2
    pair = isinstance(at, list) and len(at) == 2 and all(is_whole(n) for n in at)
    require(pair, f"at must be null or [row,column], two whole numbers, got {at!r}")
    return at[0], at[1]


def _check_common(cfg: DictConfig) -> torch.device:
    """Check the options that both tasks share; return the device."""
    require(cfg.process is None, f"task={cfg.task} has its own process; drop process=")
    require_number("offset", cfg.offset, 0, 1)
    require_number("tol", cfg.tol, 1e-12, 0.1)
    device = pick_device(str(cfg.device))
    require(device.type != "mps", "osmosis wants double precision, which mps lacks; use device=cpu")
    return device


def _load_mask(path: str, image: Tensor, name: str) -> Tensor:
    """Return the mask, bool ``(H, W)``. Raises UserError unless it has the image's size and both values."""
    grey = load_image(path, channels=1)[0]
    (height, width), size = grey.shape, image.shape[-2:]
    require(
        grey.shape == size,
        f"{path} has {height}x{width} pixels, {name} {size[0]}x{size[1]} (height x width); a mask needs the same size",
    )
    mask = grey > LEVELS // 2
    for colour, all_of_it in (("white", bool(mask.all())), ("black", not bool(mask.any()))):
        require(not all_of_it, f"{path} is {colour} everywhere; a mask is white where the edit is, and black elsewhere")
    return mask


def _check_dark(image: Tensor, path: str, offset: float) -> None:
    black = int(image.min()) == 0 and offset == 0
    require(not black, f"{path} has black pixels, and osmosis needs positive values; set offset, e.g. offset=0.004")


def _check_out(cfg: DictConfig, *inputs: str) -> Path:
    """Return the output folder. Raises UserError if a result would overwrite an input, or it is not writable."""
    out = Path(str(cfg.out))
    for key in inputs:
        source = Path(str(cfg[key]))
        written = source.name in (RESULT, COMPARISON) and source.parent.resolve() == out.resolve()
        require(not written, f"{key}={source} would be overwritten; choose another out")
    check_writable(out)
    return out


def _by_channel(edit: Callable[..., Tensor], device: torch.device, *images: Tensor) -> Tensor:
    """Apply an edit of floats ``(1, 1, H, W)`` to each channel of uint8 images ``(C, H, W)``; show a progress bar."""
    results = []
    with progress_bar() as progress:
        bar = progress.add_task("osmosis, channels", total=len(images[0]))
        for channels in zip(*images, strict=True):
            floats = [to_range(channel, RANGE, torch.float64)[None, None].to(device) for channel in channels]
            results.append(edit(*floats)[0].cpu())
            progress.advance(bar)
    return torch.cat(results)


def _shown(mask: Tensor, like: Tensor) -> Tensor:
    return (mask.to(torch.uint8) * LEVELS).expand_as(like)


def _save(out: Path, inputs: dict[str, Tensor], result: Tensor) -> None:
    """Write `result.png`, and `comparison.png` with the titled inputs and the result."""
    image = to_uint8(result, RANGE)
    former = ", in place of the former ones" if (out / RESULT).exists() else ""
    save_png(out / RESULT, image)
    save_png(out / COMPARISON, titled_row({**inputs, "result": image}))
    beyond = float(((result < -0.5 / LEVELS) | (result > 1 + 0.5 / LEVELS)).double().mean())
    note = f"; {beyond:.2%} of its values lay beyond black or white and are clipped" if beyond > 0 else ""
    print(f"{out / RESULT}, and {COMPARISON} beside it{former}{note}")
