"""Ablate the guidance image: osmosis diffusion on 8 px digits, one change at a time.

    python -m benchmarks.guidance --out runs/guidance
    python -m benchmarks.guidance --out runs/guidance --variants "noise 0" smooth --max-steps 1000

Every variant is the recipe `digits_osmosis_diffusion` with the overrides below, evaluated as by `benchmarks.quality`;
blurring diffusion, its counterpart without guidance, is trained too. The table is `guidance.md`.

If images guide, held-out digits guide two samples each: `NAME/steered.png` shows a dozen of them (from top to bottom:
digit, guidance, two samples), and `steered.md` says how often the classifier sees the digit's own class in the samples
and in their guidance.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.judged_images import read_samples
from benchmarks.judges import JUDGES, Judge
from benchmarks.quality import run_recipe
from dpm_scales.images import make_grid, save_png, to_range, to_uint8
from dpm_scales.models.generate import draw
from dpm_scales.models.io import load_model
from dpm_scales.operators import heat_blur
from dpm_scales.processes import Osmosis

#: the steady state shows the guidance image only where grey values are positive
POSITIVE = ("process.value_range=[0,1]", "process.guidance_blur_sigma=1.0", "process.guidance_min=0.1")
VARIANTS: dict[str, tuple[str, ...]] = {
    "as published here": (),
    "noise 0": ("process.guidance_noise=0.0",),
    "noise 0.05": ("process.guidance_noise=0.05",),
    "noise 0.2": ("process.guidance_noise=0.2",),
    "noise 0.3": ("process.guidance_noise=0.3",),
    "smooth": ("process.guidance_pattern=smooth", "process.guidance_blur_sigma=1.0"),
    "edges": ("process.guidance_pattern=edges", "process.guidance_blur_sigma=1.0"),
    "another image": ("process.guidance_image=other", "process.guidance_noise=0.0", *POSITIVE),
    "its own image, 1 px": ("process.guidance_image=own", "process.guidance_noise=0.0", *POSITIVE),
    "its own image, 2 px": (
        *("process.guidance_image=own", "process.guidance_noise=0.0", *POSITIVE, "process.guidance_blur_sigma=2.0"),
    ),
    "values in [0, 1]": POSITIVE[:1],
    "not seen by the network": ("process.guidance_input=false",),
    "d_min 0.0001": ("process.min_decay=0.0001",),
    "d_min 0.01": ("process.min_decay=0.01",),
    "d_min 0.1": ("process.min_decay=0.1",),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ablation of osmosis diffusion's guidance image.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), metavar="NAME", help="all unless given")
    parser.add_argument("--number", type=int, default=500, help="samples of each")
    parser.add_argument("--max-steps", type=int, help="training steps, in place of the recipe's")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="for train.py")
    options = parser.parse_args(arguments)
    steps = [] if options.max_steps is None else [f"trainer.max_steps={options.max_steps}"]
    steps += options.override
    judge = JUDGES["digits"]()
    reports = {}
    for name in options.variants or VARIANTS:
        folder = options.out / name.replace(" ", "_")
        extra = [*VARIANTS[name], *steps]
        samples, _ = run_recipe("digits", "osmosis_diffusion", folder, options.number, extra)
        reports[name] = judge.report(read_samples(samples))
    samples, _ = run_recipe("digits", "blurring", options.out / "blurring", options.number, steps)
    reports["blurring diffusion"] = judge.report(read_samples(samples))
    table = judge.table(reports)
    (options.out / "guidance.md").write_text(table + "\n")
    print(table)
    guided = [name for name in reports if any("guidance_image=" in o for o in VARIANTS.get(name, ()))]
    rows = [f"| {name} | {' | '.join(steered(options.out / name.replace(' ', '_'), judge))} |" for name in guided]
    if rows:
        head = "| guided by | own class in samples | in what guides | samples of one guide differ by, grey values |"
        table = "\n".join([head, "|---|---|---|---|", *rows])
        (options.out / "steered.md").write_text(table + "\n")
        print(table)


def steered(folder: Path, judge: Judge) -> list[str]:
    """Return the metrics of one model for the held-out digits of `judge`; write the picture."""
    model = load_model(folder / "digits_osmosis_diffusion")
    process, digits = model.denoiser.process, torch.from_numpy(judge.val_images)[:, None]
    assert isinstance(process, Osmosis)
    x = to_range(digits, process.value_range)
    model.prior.steer(x, process)
    first, second = torch.cat(list(draw(model, 2 * len(x), seed=0))).chunk(2)
    time = process.guidance.blur_sigma**2 / 2
    guides = to_uint8(heat_blur(x, time), process.value_range)
    rows = torch.stack([images[:12] for images in (digits, guides, first, second)])
    save_png(folder / "steered.png", make_grid(rows.flatten(0, 1), columns=12, upscale=6))

    def right(images: Tensor) -> str:
        seen = judge.classifier.predict(images.numpy().reshape(len(images), -1) / 255.0)
        return f"{float((seen == judge.val_labels).mean()):.3f}"

    apart = (first.float() - second.float()).square().mean().sqrt()
    return [right(first), right(guides), f"{float(apart):.1f}"]


if __name__ == "__main__":
    main()
