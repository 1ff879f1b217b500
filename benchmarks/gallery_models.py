"""Make the pictures and figures of docs/gallery_models.md, editing with trained models, with `sample.py`.

    python -m benchmarks.quality --set digits --out DIR           # trains the models, likewise --set photos32
    python -m benchmarks.gallery_models --models DIR --out docs/gallery/models

writes NAME.png for each scene from held-out digits and photos of the bundled data. `--figures` prints instead the PSNR
in the hole, against the image itself, of each method of inpainting, with equally many evaluations of the network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor

from dpm_scales.editing import Consistent, Mask, Resampling, restore
from dpm_scales.images import save_png, to_range, to_uint8
from dpm_scales.models.io import load_model
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import Ancestral

ROOT = Path(__file__).resolve().parents[1]
EVALUATIONS = 96


def held_out(data: str, numbers: list[int]) -> Tensor:
    """Return the validation images of a bundled data set, uint8."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        module = instantiate(compose("train", overrides=[f"data={data}"]).data)
    module.prepare_data()
    module.setup("fit")
    return torch.stack([module.val_set[i % len(module.val_set)][0] for i in numbers])


def box(size: int, rows: slice, columns: slice) -> Tensor:
    mask = torch.zeros(1, size, size, dtype=torch.uint8)
    mask[:, rows, columns] = 255
    return mask


@dataclass(frozen=True)
class Scene:
    """A call of `sample.py`: a model, options, held-out images by number (and the ends of a path), a mask."""

    model: str
    options: str
    images: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    mask: Tensor | None = None
    key: str = "image"


DIGITS = (1, 24, 45, 72, 118)
PHOTOS = (40, 210, 330, 520)
SCENES = {
    "inpaint_digits": Scene(
        "digits_blurring", "task=inpaint resample=5 num_samples=8", DIGITS, (), box(8, slice(8), slice(4, 8))
    ),
    "inpaint_photos": Scene(
        "photos32_blurring",
        "task=inpaint steps=8 resample=5 num_samples=4",
        PHOTOS,
        (),
        box(32, slice(10, 22), slice(10, 22)),
    ),
    "superres_digits": Scene("digits_blurring", "task=superres factor=2 resample=5 degrade=true num_samples=6", DIGITS),
    "superres_photos": Scene(
        "photos32_blurring", "task=superres factor=2 steps=8 resample=5 degrade=true num_samples=3", PHOTOS
    ),
    "deblur_digits": Scene("digits_heat", "task=deblur blur_sigma=1.5 degrade=true num_samples=6", DIGITS),
    "deblur_photos": Scene(
        "photos32_blurring",
        "task=deblur blur_sigma=1.5 noise_std=0.01 steps=8 resample=5 degrade=true num_samples=3",
        PHOTOS,
    ),
    "interpolate_digits": Scene(
        "digits_blurring", "task=interpolate frames=9 from=0.7", (2, 24, 45, 72), (72, 1, 118, 45), None, "start"
    ),
    "vary_digits": Scene("digits_blurring", "task=vary num_samples=8", DIGITS, (), None, "start"),
    "coarse_digits": Scene("digits_heat", "task=coarse starts=5 num_samples=9"),
}


def make(name: str, models: Path, out: Path) -> None:
    """Write the picture of one scene and print its command line."""
    scene = SCENES[name]
    data = "photos" if scene.model.startswith("photos") else "digits"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        options = scene.options.split()
        for key, numbers in ((scene.key, scene.images), ("end", scene.ends)):
            if numbers:
                for i, image in enumerate(held_out(data, list(numbers))):
                    save_png(folder / key / f"{i}.png", image)
                options.append(f"{key}={folder / key}")
        if scene.mask is not None:
            save_png(folder / "mask.png", scene.mask)
            options.append(f"mask={folder / 'mask.png'}")
        command = [sys.executable, str(ROOT / "sample.py"), f"model={models / scene.model}", *options]
        said = subprocess.run([*command, f"out={folder / 'out'}"], check=True, capture_output=True, text=True).stdout
        out.mkdir(parents=True, exist_ok=True)
        Image.open(folder / "out" / "comparison.png").save(out / f"{name}.png", optimize=True)
        film = folder / "out" / "film.gif"
        if film.is_file():
            (out / f"{name}.gif").write_bytes(film.read_bytes())
    print(f"{name}: {scene.model} {scene.options}\n    {said.strip().splitlines()[-1].partition('; ')[2]}", flush=True)


def inpainting(model_name: str, models: Path, number: int) -> None:
    """Print a table row for each method: PSNR in the hole, and that of the mean of two samples."""
    model = load_model(models / model_name)
    process, data = model.denoiser.process, "photos" if model_name.startswith("photos") else "digits"
    images = held_out(data, [i * 7 for i in range(number)])
    x, side = to_range(images, process.value_range), images.shape[-1]
    hole = box(side, slice(side // 4, 3 * side // 4), slice(side // 4, 3 * side // 4))[0] > 0
    size = (images.shape[1], side, side)
    for covariance in ("white", "spectrum"):
        for repeats in (0, 2, 5):
            sampler = Resampling(Ancestral(min(process.num_scales, EVALUATIONS // (1 + repeats))), repeats)
            denoiser = Consistent(model.denoiser, Mask(~hole), torch.where(hole, 0, x), 0.0, covariance)
            found = [
                restore(denoiser, sampler, sampler.scales(process), CounterRNG(seed, number), size) for seed in (0, 1)
            ]
            results = [to_uint8(f, process.value_range) for f in found]
            assert all(torch.equal(r[..., ~hole], images[..., ~hole]) for r in results)
            one, mean = (
                -10 * np.log10(float(((r - images.float())[..., hole] ** 2).mean()) / 255**2)
                for r in (results[0].float(), (results[0].float() + results[1].float()) / 2)
            )
            print(f"| {model_name} | {covariance} | {repeats} | {one:.2f} | {mean:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of the models, named as their recipes")
    parser.add_argument("--out", type=Path, default=Path("docs/gallery/models"))
    parser.add_argument("--only", nargs="*", default=list(SCENES), choices=list(SCENES))
    parser.add_argument("--figures", nargs="*", metavar="MODEL", help="the table for these models instead of pictures")
    parser.add_argument("--images", type=int, default=100, help="number of images for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.figures or ():
        inpainting(name, arguments.models, arguments.images)
    if arguments.figures is None:
        for name in arguments.only:
            make(name, arguments.models, arguments.out)


if __name__ == "__main__":
    main()
