"""Compare tricks for short runs by their quality after some seconds of optimisation, with several seeds.

    python -m benchmarks.budgets --out runs/budgets --seconds 24 60 --seeds 0 1 2          # all tricks, one thread
    python -m benchmarks.budgets --out runs/budgets --seconds 180 --tricks "adamw 64" "muon 32"
    python -m benchmarks.budgets --out runs/budgets --tables --csv docs/results/budgets.csv --page docs/budgets.md

Every row trains `network=small` with `process=vp` in a separate loop, so that a trick can be tried before the trainer
has it: the loss, the EMA, the optimisers and the densities of scales are those of `train.py`, and the learning rate is
that of runs that `trainer.max_time` ends. A budget is CPU time of the loop (`time.process_time`) with one thread; on a
GPU it is wall-clock time. Samples are drawn by DPM-Solver++(2M) in 10 evaluations; their Fréchet distance to the
training images is computed in the features of a digit classifier.

Finished rows are kept, OUT/SECONDS/TRICK/seedN.json. The same command resumes, and several at once share the rows.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dpm_scales as ds
from benchmarks.budget_tables import write_page
from benchmarks.image_sets import IMAGE_SETS, ImageSet
from benchmarks.rows import claimed
from benchmarks.spectral import measured, provenance
from dpm_scales.data import GivenImages
from dpm_scales.denoisers import spread_evenly, uniform_scales
from dpm_scales.errors import UserError, require
from dpm_scales.models.instantiate import CONFIGS
from dpm_scales.storage import read_yaml, write_text
from dpm_scales.training.fit import fit_to_data
from dpm_scales.training.module import DiffusionModule
from dpm_scales.training.scale_sampling import DensityScales

SHIFTS = tuple(itertools.product((0, -2, 2), repeat=2))
"""Shifts in pixels of `augment`, given to the network as its label; samples are drawn for the first."""
DECAY = 0.999
SETS = ["digits", "mnist"]
SAMPLER = ds.DPMSolver(0.0, 10, "logsnr")


@dataclass(frozen=True)
class Trick:
    """The settings of a row.

    Attributes:
        method: "adamw" or "muon".
        rate: the largest learning rate.
        batches: images of a step; several sizes share the budget equally, in this order.
        density: `scale_sampling`.
        network: arguments of the network that differ from those of `small`.
        augment: whether images are shifted, the shift being the network's label.
        averages: EMAs that are sampled, by k in the decay (1 + n) / (k + n) after n steps; 0 for the last weights.
    """

    method: str = "adamw"
    rate: float = 2e-3
    batches: tuple[int, ...] = (64,)
    density: str = "uniform"
    network: dict[str, Any] = field(default_factory=dict)
    augment: bool = False
    averages: tuple[int, ...] = (10,)


DEEP: dict[str, Any] = {"widths": [20, 40, 80], "head_dim": 40, "blocks_per_level": 2}
ALL_AVERAGES = (10, 0, 5, 20)
TRICKS = {
    "adamw 64": Trick(averages=ALL_AVERAGES),
    "adamw 32": Trick(rate=3e-3, batches=(32,)),
    "muon 32": Trick("muon", 3e-3, (32,), averages=ALL_AVERAGES),
    "muon 64": Trick("muon", 3e-3, (64,)),
    "muon 32, higher rate": Trick("muon", 6e-3, (32,)),
    "muon 32, logit_normal": Trick("muon", 3e-3, (32,), "logit_normal"),
    "muon 32, log_normal": Trick("muon", 3e-3, (32,), "log_normal"),
    "adamw 64, logit_normal": Trick(density="logit_normal"),
    "adamw 16 to 128": Trick(rate=3e-3, batches=(16, 32, 64, 128)),
    "muon 16 to 128": Trick("muon", 3e-3, (16, 32, 64, 128)),
    "muon 32, wide": Trick("muon", 3e-3, (32,), network={"widths": [32, 64, 128], "head_dim": 64}),
    "muon 32, narrow": Trick("muon", 3e-3, (32,), network={"widths": [16, 32, 64], "head_dim": 32}),
    "muon 32, deep": Trick("muon", 3e-3, (32,), network=DEEP),
    "muon 32, shifts": Trick("muon", 3e-3, (32,), augment=True),
}
"""The rows by name."""


def built(trick: Trick, images: Tensor, network: str, seed: int) -> ds.Model:
    """Return a new model for the images, with the network of a config, its data-dependent parts fitted to them."""
    arguments: dict[str, Any] = read_yaml(CONFIGS / "network" / f"{network}.yaml")
    left = ("_target_", "in_channels", "out_channels", "num_classes")  # the model completes them
    torch.manual_seed(seed)
    model = ds.Model(
        ds.UNet(**{key: value for key, value in arguments.items() if key not in left} | trick.network),
        ds.VP(),
        image_size=(images.shape[-2], images.shape[-1]),
        channels=images.shape[1],
        num_classes=len(SHIFTS) if trick.augment else None,
        label_dropout=0.0,
    )
    return fit_to_data(model, ds.ImageDataModule(GivenImages(images, val_fraction=0.0), batch_size=16))


class Batches:
    """Images in a new random order for each pass, in batches of any size."""

    def __init__(self, images: Tensor, seed: int) -> None:
        self.images, self.generator = images, torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)

    def take(self, size: int) -> Tensor:
        """Return the next `size` images."""
        while len(self.order) < size:
            self.order = torch.cat([self.order, torch.randperm(len(self.images), generator=self.generator)])
        chosen, self.order = self.order[:size], self.order[size:]
        return self.images[chosen.to(self.images.device)]


def shifted(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images, each shifted by a random one of `SHIFTS` and padded with black, and the numbers of the shifts."""
    kinds = torch.randint(len(SHIFTS), (len(images),), device=images.device)
    border = 2
    padded = torch.nn.functional.pad(images, (border,) * 4)
    height, width = images.shape[-2:]
    moved = torch.stack([padded[..., border + dy :, border + dx :][..., :height, :width] for dy, dx in SHIFTS])
    return moved[kinds, torch.arange(len(images), device=images.device)], kinds


def train(
    model: ds.Model, trick: Trick, images: Tensor, seconds: float, seed: int, device: torch.device
) -> tuple[dict[int, ds.Model], dict[str, Any]]:
    """Train for some seconds, at least one step.

    Returns:
        The model with each average of the trick; steps, images, and the mean loss of the last tenth.
    """
    network = model.to(device).denoiser.network.to(memory_format=torch.channels_last)
    parameters = list(network.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    module = DiffusionModule(model, trick.rate, warmup_steps="auto", method=trick.method)
    optimizer = module.make_optimizer()
    process = model.denoiser.process
    density = None if trick.density == "uniform" else DensityScales(trick.density, process)
    averages = {k: [p.detach().clone() for p in parameters] for k in trick.averages}
    source, step, seen, losses = Batches(images, seed), 0, 0, list[tuple[float, Tensor]]()
    model.train()
    with measured(device) as spent:
        passed = 0.0
        while passed < 1:
            size = trick.batches[min(int(passed * len(trick.batches)), len(trick.batches) - 1)]
            x, labels = source.take(size), None
            if trick.augment:
                x, labels = shifted(x)
            even = spread_evenly(torch.arange(size, device=device), size, torch.rand((), device=device))
            t = uniform_scales(even, process.num_scales) if density is None else density.draw(even)
            for group in optimizer.param_groups:
                group["lr"] = trick.rate * module.rate(step, max_steps=-1, passed=passed)
            optimizer.zero_grad()
            loss = model.loss(x, t, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            for k, average in averages.items():
                decay = min((1 + step) / (k + step), DECAY) if k else 0.0
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            step, seen = step + 1, seen + size
            losses.append((passed, loss.detach()))
            passed = spent() / seconds
    last = torch.stack([loss for share, loss in losses if share >= 0.9] or [losses[-1][1]])
    models = {}
    for k, average in averages.items():
        models[k] = copy.deepcopy(model).eval()
        with torch.no_grad():
            for parameter, value in zip(models[k].denoiser.network.parameters(), average, strict=True):
                parameter.copy_(value)
    return models, {"steps": step, "images": seen, "loss": round(float(last.mean()), 4)}


def run_row(images: ImageSet, name: str, seconds: float, seed: int, path: Path, options: argparse.Namespace) -> None:
    """Train, sample and measure one row, and write its file."""
    trick, device = TRICKS[name], torch.device(options.device)
    data = torch.from_numpy(images.training_images()).to(device)
    model = built(trick, data, images.network, seed)
    models, found = train(model, trick, data, seconds, seed, device)
    row: dict[str, Any] = {"set": images.name, "figure": images.quality, "trick": name, "budget": seconds, "seed": seed}
    row |= {"number": options.number, **found, **provenance(device), "samples": []}
    for k, own in models.items():
        labels = 0 if trick.augment else None
        drawn = own.sample(options.number, seed=0, sampler=SAMPLER, labels=labels, device=device)
        figures = {key: round(value, 4) for key, value in images.report(drawn.numpy()).items()}
        row["samples"].append({"average": k, **figures})
        print(f"{name}, {seconds:g} s, seed {seed}, {found['steps']} steps, average {k}: {figures}", flush=True)
    write_text(path, json.dumps(row, indent=2) + "\n")


def run(images: ImageSet, options: argparse.Namespace) -> None:
    """Run all rows that are neither finished nor locked by another process, one seed after the other."""
    for seed, seconds, name in itertools.product(options.seeds, options.seconds, options.tricks):
        path = options.out / f"{seconds:g}" / name.replace(",", "").replace(" ", "_") / f"seed{seed}.json"
        with claimed(path.with_suffix(".lock")) as is_held:
            if is_held and not path.is_file():
                run_row(images, name, seconds, seed, path, options)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Try what could help short runs.")
    parser.add_argument("--set", choices=SETS, default="mnist")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="prepared images; OUT unless given")
    parser.add_argument("--seconds", nargs="+", type=float, default=[60.0], help="budgets, of optimisation")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tricks", nargs="+", default=list(TRICKS), metavar="NAME")
    parser.add_argument("--number", type=int, default=500, help="samples of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tables", action="store_true", help="only write the table")
    parser.add_argument(
        "--csv", type=Path, help="file that keeps all rows, which grows; needed for --tables and --page"
    )
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="page whose table is rewritten")
    options = parser.parse_args(arguments)
    try:
        for name in options.tricks:
            require(name in TRICKS, f"unknown trick {name!r}; allowed are {', '.join(TRICKS)}")
        low = min(options.seconds)
        require(low > 0, f"a budget of {low:g} seconds trains nothing; give --seconds above 0")
        options.out = options.out.resolve()
        for name, is_given in (("--tables", options.tables), ("--page", options.page is not None)):
            require(not is_given or options.csv is not None, f"{name} needs --csv FILE, which keeps all rows")
        if not options.tables:
            kind = IMAGE_SETS[options.set]
            images = kind((options.cache or options.out).resolve(), None)
            run(images, options)
            real = {"set": kind.name, "number": options.number} | images.real(options.number)
            write_text(options.out / "real.json", json.dumps(real) + "\n")
        if options.csv is not None:
            print(write_page(options.out, options.csv, options.page))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
