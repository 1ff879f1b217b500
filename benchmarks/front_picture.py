"""Draw the first picture of README.md: a photo along four processes, and back with models that never saw it.

    python -m benchmarks.front_picture --photos BSDS500/images --models runs/front --out docs/front.jpg

Models that are missing are trained first, each on 48 px patches of the photos (500 of the Berkeley segmentation data
set, brought to 192 px): they are convolutional, so that they apply to the whole photo, which ships with scikit-image.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.gallery import photo
from dpm_scales.editing.latents import context_of, scales_from
from dpm_scales.images import PADDING_LEVEL, caption, save_png, to_range
from dpm_scales.models.io import load_model
from dpm_scales.models.model import Model, with_sampler
from dpm_scales.plots.rows import ROW_PADDING, TITLE_SIZE, titled_columns
from dpm_scales.rng import CounterRNG
from dpm_scales.training.pictures import visible

ROOT = Path(__file__).resolve().parents[1]
LONGEST, PATCH, SIDE = 192, 48, 96
"""Longer side of the photos, of the patches, and of the picture's photo, in pixels."""
START = 0.5
FORWARD = (0.0, 0.125, 0.25, 0.375, START)
BACK = (0.375, 0.25, 0.125, 0.0)
SAMPLER = {"_target_": "dpm_scales.samplers.DDIM", "steps": 16}
GAP = 12
PROCESSES = {
    "vp": ("process=vp",),
    "heat": ("process=heat", "process.blur.blur_sigma_max=24"),
    "blurring": ("process=blurring", "process.blur.blur_sigma_max=8"),
    "osmosis": ("process=inverse_osmosis", "process.blur.blur_sigma_max=24"),
}
STEPS = {"vp": 300, "heat": 600, "blurring": 300, "osmosis": 600}
"""Training steps of each model, which take seconds to a minute on one core."""
TRAINING = (
    *("data=folder", f"data.image_size={PATCH}", "data.resize_mode=crop", "data.random_crop=true"),
    *("data.random_flip=true", "data.batch_size=4", "data.val_fraction=0.05"),
    *("network=small", "network.widths=[16,32,64]", "network.embedding_dim=96", "network.head_dim=32"),
    *("network.attention_levels=[]", "optimizer.learning_rate=0.002", "ema.decay=0.99", "samples.num_images=0"),
)


def prepare(photos: Path, folder: Path) -> Path:
    """Write the photos below a folder, brought to `LONGEST` pixels, into another folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(photos.rglob("*.jpg")):
        image = Image.open(path).convert("RGB")
        factor = LONGEST / max(image.size)
        size = (round(image.width * factor), round(image.height * factor))
        image.resize(size, Image.Resampling.LANCZOS).save(folder / f"{path.stem}.png")
    return folder


def train(name: str, photos: Path, models: Path, steps: int | None = None) -> None:
    """Train the model of a process, unless it exists."""
    if (models / name / "model" / "model.safetensors").is_file():
        return
    steps = STEPS[name] if steps is None else steps
    small = models / "photos"
    if not small.is_dir():
        prepare(photos, small)
    more = (f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", f"run_dir={models / name}")
    command = [sys.executable, "train.py", *TRAINING, *PROCESSES[name], f"data.root={small.resolve()}", *more]
    subprocess.run(command, check=True, cwd=ROOT)


def the_photo() -> Tensor:
    """Return the photo, uint8 ``(1, 3, SIDE, SIDE)``."""
    cat = np.array(photo("chelsea", (90, 0, 390, 300), (SIDE, SIDE)))
    return torch.from_numpy(cat).permute(2, 0, 1)[None]


@torch.no_grad()
def there_and_back(model: Model, x: Tensor, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Return the photo ``(1, 3, H, W)`` uint8 at the scales `FORWARD`, with one noise, and sampled at `BACK`."""
    process, noise = model.denoiser.process, CounterRNG(seed, 1)
    x_0 = to_range(x, process.value_range)
    context = context_of(process, x_0, noise)
    operator, white = process.operator(context), noise.normal(tuple(x.shape[1:]), x_0.dtype)
    y_0 = operator.to_white(x_0)
    states = {t: process.perturb(y_0, torch.tensor(t, dtype=torch.float64), white, operator) for t in FORWARD[1:]}
    there = [x, *(visible(operator.to_pixels(y), process.value_range) for y in states.values())]
    scales, back = scales_from(model.sampler, process, START), {}

    def keep(index: int, y: Tensor) -> None:
        back[float(scales[index + 1])] = visible(y, process.value_range)

    model.sampler.reverse(model.denoiser, states[START], noise, context, None, scales, keep)
    return there, [back[min(back, key=lambda t: abs(t - wanted))] for wanted in BACK]


def draw(models: Path, out: Path) -> None:
    """Write the picture, a row for each process."""
    rows = [there_and_back(with_sampler(load_model(models / name), SAMPLER), the_photo()) for name in PROCESSES]
    titles = ["photo", *(f"t = {t:g}" for t in (*FORWARD[1:], *BACK))]
    columns = [torch.cat(column) for column in zip(*(there + back for there, back in rows), strict=True)]
    table = titled_columns(titles, columns)
    side = (table.shape[2] - ROW_PADDING) // len(columns)  # of a cell
    blank = table.new_full((3, table.shape[1], GAP), PADDING_LEVEL)
    captions = [caption(name, TITLE_SIZE) for name in PROCESSES]
    names = table.new_full((3, table.shape[1], max(text.shape[1] for text in captions)), PADDING_LEVEL)
    for row, text in enumerate(captions):
        height, width = text.shape
        top = table.shape[1] - (len(captions) - row) * side + (side - height) // 2
        names[:, top : top + height, names.shape[2] - width :] = text
    cut = ROW_PADDING + len(FORWARD) * side
    picture = torch.cat([names, table[:, :, :cut], blank, table[:, :, cut:]], 2)
    if out.suffix == ".png":
        save_png(out, picture)
    else:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out, quality=92, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--photos", type=Path, help="folder with photos as .jpg, at any depth; for training")
    parser.add_argument("--models", type=Path, required=True, help="folder of the runs, by process")
    parser.add_argument("--steps", type=int, help="steps of training of each, in place of the picture's own")
    parser.add_argument("--out", type=Path, default=Path("docs/front.jpg"))
    arguments = parser.parse_args()
    if arguments.photos is not None:
        for name in PROCESSES:
            train(name, arguments.photos, arguments.models, arguments.steps)
    draw(arguments.models, arguments.out)


if __name__ == "__main__":
    main()
