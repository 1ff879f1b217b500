"""Make the pictures of docs/gallery.md, osmosis as an editor on photos of scikit-image, with `evolve.py`.

    python -m benchmarks.gallery --out docs/gallery

writes `inputs/` (photos with an added shadow, masks) and NAME.png (inputs and result), and prints the figures of the
page: for a shadow the PSNR against the photo without it, before and after; for cloning the mean difference of
neighbours across the mask's outline, in grey levels of 255, when pasted and when cloned.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from skimage import data

from dpm_scales.images import psnr
from dpm_scales.plots.rows import ROW_PADDING

ROOT = Path(__file__).resolve().parents[1]

SHADE = np.array([0.38, 0.43, 0.52])
"""Share of red, green and blue that a shadow leaves: more of the sky's light than of the sun's."""

SHARP = 4
"""Factor by which shapes are drawn larger and then reduced, for smooth edges."""

Box = tuple[int, int, int, int]
Shape = Sequence[tuple[float, float]]


def photo(name: str, box: Box, size: tuple[int, int]) -> Image.Image:
    """Return a part of a photo, box = (left, top, right, bottom), in RGB at size = (width, height)."""
    return Image.fromarray(getattr(data, name)()).convert("RGB").crop(box).resize(size, Image.Resampling.LANCZOS)


def polygons(size: tuple[int, int], *shapes: Shape) -> Image.Image:
    """Return a grey picture, white in the polygons, with smooth edges."""
    large = Image.new("L", (size[0] * SHARP, size[1] * SHARP))
    for shape in shapes:
        ImageDraw.Draw(large).polygon([(SHARP * x, SHARP * y) for x, y in shape], fill=255)
    return large.resize(size, Image.Resampling.LANCZOS)


def ellipse(size: tuple[int, int], box: Box) -> Image.Image:
    """Return a grey picture, white in the ellipse that fills `box`, with smooth edges."""
    large = Image.new("L", (size[0] * SHARP, size[1] * SHARP))
    ImageDraw.Draw(large).ellipse(tuple(SHARP * edge for edge in box), fill=255)
    return large.resize(size, Image.Resampling.LANCZOS)


def shaded(clean: Image.Image, shade: Image.Image) -> Image.Image:
    """Multiply the photo by `SHADE` where the shade is white."""
    depth = np.asarray(shade, dtype=np.float64)[..., None] / 255
    return Image.fromarray((np.asarray(clean) * (1 - depth * (1 - SHADE))).round().astype(np.uint8))


def black_and_white(mask: np.ndarray) -> Image.Image:
    return Image.fromarray((255 * mask).astype(np.uint8))


# --- scenes: inputs by key, options of the command, and the photo without the shadow ----------------------------------

Scene = tuple[dict[str, Image.Image], str, Image.Image | None]


def bars() -> Scene:
    """Return two bars of shade over a cat, sharp except for partly covered pixels."""
    clean = photo("chelsea", (0, 0, 451, 300), (240, 160))
    first = ((20, -5), (75, -5), (190, 165), (135, 165))
    shade = polygons(clean.size, first, [(x + 80, y) for x, y in first])
    inputs = {"image": shaded(clean, shade), "mask": black_and_white(np.asarray(shade) > 127)}
    return inputs, "task=shadow", clean


def soft() -> Scene:
    """Return a shadow with a wide penumbra on a wall; only the penumbra is marked."""
    clean = photo("astronaut", (150, 0, 450, 200), (240, 160))
    shade = ellipse(clean.size, (160, -48, 320, 240)).filter(ImageFilter.GaussianBlur(2.5))
    between = (np.asarray(shade) > 2) & (np.asarray(shade) < 253)
    inputs = {"image": shaded(clean, shade), "mask": black_and_white(between)}
    return inputs, "task=shadow mask_marks=edge", clean


def moon() -> Scene:
    """Return a soft shadow on a grey plain, marked by its region and half the width of its penumbra."""
    clean = photo("moon", (0, 0, 512, 342), (240, 160)).convert("L")
    shade = ellipse(clean.size, (50, 80, 330, 330)).filter(ImageFilter.GaussianBlur(2))
    depth = np.asarray(shade, dtype=np.float64) / 255
    dark = Image.fromarray((np.asarray(clean) * (1 - 0.57 * depth)).round().astype(np.uint8))
    return {"image": dark, "mask": black_and_white(depth > 0.5)}, "task=shadow penumbra=6", clean


def latte() -> Scene:
    """Return a cat in a cup of coffee."""
    cat = photo("chelsea", (55, 20, 395, 288), (94, 74))
    inputs = {
        "background": photo("coffee", (130, 10, 430, 210), (240, 160)),
        "foreground": cat,
        "mask": black_and_white(np.asarray(ellipse(cat.size, (5, 5, 89, 71))) > 127),
    }
    return inputs, "task=clone at=[75,82]", None


def writing() -> Scene:
    """Return formulas on a table: the paper's drift is weak, so the wood shows through."""
    paper = photo("text", (0, 0, 448, 172), (224, 86))
    mask = np.zeros((86, 224), dtype=bool)
    mask[2:-2, 2:-2] = True
    inputs = {
        "background": photo("coffee", (390, 200, 600, 340), (240, 160)),
        "foreground": paper,
        "mask": black_and_white(mask),
    }
    return inputs, "task=clone at=[36,8] mixed=true", None


SCENES: dict[str, Callable[[], Scene]] = {"bars": bars, "soft": soft, "moon": moon, "latte": latte, "writing": writing}


# --- figures ----------------------------------------------------------------------------------------------------------


def seam(image: np.ndarray, inside: np.ndarray) -> float:
    """Return the mean absolute difference of neighbours across the mask's outline, for (H, W, 3) in grey levels."""
    steps = [np.abs(np.diff(image.astype(np.float64), axis=axis))[np.diff(inside, axis=axis)] for axis in (0, 1)]
    return float(np.concatenate(steps).mean())


def cloning_figures(comparison: np.ndarray, height: int, width: int) -> str:
    """Return the figures of the cells of comparison.png: background, paste, mask, result."""
    step = width + ROW_PADDING
    rows = slice(len(comparison) - ROW_PADDING - height, len(comparison) - ROW_PADDING)
    cells = [comparison[rows, ROW_PADDING + k * step : ROW_PADDING + k * step + width] for k in range(4)]
    inside = cells[2][..., 0] > 127
    background, paste, result = (seam(cells[k], inside) for k in (0, 1, 3))
    return f"across the outline: {paste:.1f} pasted, {result:.1f} cloned, {background:.1f} in the background alone"


def make(name: str, out: Path) -> None:
    """Write the inputs and the picture of one scene; print its command line and figures."""
    inputs, options, clean = SCENES[name]()
    folder = out / "inputs"
    folder.mkdir(parents=True, exist_ok=True)
    for key, picture in inputs.items():
        picture.save(folder / f"{name}_{key}.png", optimize=True)
    files = " ".join(f"{key}={folder / f'{name}_{key}.png'}" for key in inputs)
    with tempfile.TemporaryDirectory() as scratch:
        command = [*options.split(), *files.split(), f"out={scratch}"]
        subprocess.run([sys.executable, str(ROOT / "evolve.py"), *command], check=True, stdout=subprocess.DEVNULL)
        result, comparison = (Image.open(Path(scratch) / f"{part}.png").copy() for part in ("result", "comparison"))
    comparison.save(out / f"{name}.png", optimize=True)
    if clean is not None:
        given, found, truth = (torch.from_numpy(np.array(picture)) for picture in (inputs["image"], result, clean))
        figures = f"PSNR {psnr(given, truth):.1f} -> {psnr(found, truth):.1f} dB"
    else:
        figures = cloning_figures(np.asarray(comparison), result.height, result.width)
    print(f"{name}: python evolve.py {options} {files} out=DIR\n    {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/gallery"))
    parser.add_argument("--only", nargs="*", default=list(SCENES), choices=list(SCENES))
    arguments = parser.parse_args()
    for name in arguments.only:
        make(name, arguments.out)


if __name__ == "__main__":
    main()
