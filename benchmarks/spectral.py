"""Compare processes: one network, one budget, one measure; any process can take part by its name.

    python -m benchmarks.spectral --set mnist --seconds 600 --out runs/spectral                # all processes
    python -m benchmarks.spectral --set mnist --images 30000 --rows blur color --seeds 0 1 2 --out runs/curves
    python -m benchmarks.spectral --set mnist --seconds 600 --out runs/spectral --row "mine=process=mine allow=[mine]"
    python -m benchmarks.spectral --set mnist --seconds 600 --out runs/spectral --tables       # redraw, run nothing

A row is a list of options of `train.py`, which win over those that all rows share. `--rows` takes names of processes
and of groups: `members`, all processes; `blur`, Warm Diffusion by its ratio b of blur to noise; `color`,
variance-preserving diffusion by the exponent of its noise's spectrum; `blend`, HDFM by the loss of its exact velocity
and by the released one; `pairing`, white and coloured noise paired with near images. Each row is trained for each seed,
then sampled with every number of evaluations and by the model's own sampler, and compared with real images.

The budget is the same for all rows: `--images`, seen in training, or `--seconds` of optimisation. The seconds of a step
of each process are measured beforehand, all processes in turn, and give its number of steps, at which the learning-rate
schedule ends. On a CPU with one thread they are CPU seconds, which load on the machine does not change much.

Whatever is finished is kept. The same command resumes, also after a kill in mid-training. Start it several times, on
other devices or machines or as a job array, with the same `--out`, and each takes rows that no other one holds. Each
finished row is a file ROW/seedN/row.json; tables and plots are drawn from those, see `benchmarks.spectral_tables`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.image_sets import IMAGE_SETS, ImageSet
from benchmarks.rows import claimed, require_same, run_process
from benchmarks.spectral_tables import write_tables
from dpm_scales.errors import UserError, require
from dpm_scales.locks import lock
from dpm_scales.models.generate import draw
from dpm_scales.models.io import load_model
from dpm_scales.models.model import Model
from dpm_scales.samplers import DPMSolver, Sampler
from dpm_scales.storage import write_text
from dpm_scales.training.module import DiffusionModule

ROOT = Path(__file__).resolve().parents[1]
EVALUATIONS = (5, 10, 20, 50)
BLUR_RATIOS = (0.0, 0.25, 0.5, 1.0, 2.0, 10.0)
EXPONENTS = (-0.5, -0.25, -0.05, 0.0, 0.25, 0.5)
MEMBERS = (
    *("vp", "ve", "heat", "blurring", "osmosis_diffusion", "inverse_osmosis", "rectified", "hdfm", "warm"),
    *("equal_snr", "power_law", "flicker", "low_pass_flow", "clocked", "cut_off"),
)
HALF_BLUR = "weight._target_=benchmarks.half_blur.HalfBlurFlowLoss"
LENGTH = dict.fromkeys(("trainer.max_steps", "trainer.max_time", "trainer.val_check_interval"), "--seconds or --images")
BUDGET = {"data.batch_size": "--batch-size", "seed": "--seeds", "run_dir": "--out", **LENGTH}
"""Options of train.py that neither a row nor --override can have, with what sets them for all rows."""
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "members": {name: (f"process={name}",) for name in MEMBERS},
    "blur": {f"warm b={b:g}": ("process=warm", f"process.blur_ratio={b:g}") for b in BLUR_RATIOS},
    "color": {f"power_law a={a:g}": ("process=power_law", f"process.color.exponent={a:g}") for a in EXPONENTS},
    "blend": {
        "hdfm flow loss": ("process=hdfm", "weight=flow"),
        "hdfm half blur loss": ("process=hdfm", "weight=flow", HALF_BLUR, "allow=[benchmarks]"),
    },
    "pairing": {
        "vp paired": ("process=vp", "training.pairing=nearest"),
        "power_law a=0.5 paired": ("process=power_law", "process.color.exponent=0.5", "training.pairing=nearest"),
    },
}


@dataclass(frozen=True)
class Contest:
    """Settings that all rows share.

    Attributes:
        out: folder of the rows.
        images: the image set.
        budget: ("images", number) or ("seconds", seconds).
        batch_size: images of a training step.
        number: samples of each kind.
        evaluations: numbers of network evaluations of the solvers.
        overrides: options of train.py for all rows.
        device: device on which models are sampled; training takes its own from `overrides`.
    """

    out: Path
    images: ImageSet
    budget: tuple[str, float]
    batch_size: int
    number: int
    evaluations: tuple[int, ...]
    overrides: tuple[str, ...]
    device: torch.device

    def folder(self, row: str, seed: int) -> Path:
        """Return the folder of one row and seed."""
        return self.out / row.replace(" ", "_").replace("=", "") / f"seed{seed}"

    def training(self, options: Sequence[str], seed: int, steps: int, run_dir: Path) -> list[str]:
        """Return the options of train.py for a row: those that all rows share, its own, and the budget's."""
        shared = ["samples.num_images=16", *self.images.overrides(), *self.overrides]
        ends = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", f"seed={seed}"]
        return [*shared, *options, *ends, f"run_dir={run_dir}"]


def samplers(model: Model, evaluations: Sequence[int]) -> Iterator[tuple[str, int, Sampler]]:
    """Yield name, evaluations and sampler of every kind of samples: DPM-Solver++(2M), its SDE, and the model's own.

    A deterministic solver is omitted where the process's noise is constant; so is a number above that of the scales.
    """
    process = model.denoiser.process
    grid = "logsnr" if process.is_scalar else "uniform"
    for name, eta in (("2m", 0.0), ("sde", 1.0)):
        for number in evaluations:
            if number <= process.num_scales and not (eta == 0 and process.has_constant_noise()):
                yield name, number, DPMSolver(eta, number, grid)
    yield "auto", 0, model.sampler


def sampled(model: Model, sampler: Sampler, number: int, device: torch.device) -> tuple[torch.Tensor, int, float]:
    """Return uint8 samples, the network's evaluations for each, and the seconds taken."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    chosen = model.replaced(sampler=sampler)
    hook = chosen.denoiser.network.register_forward_hook(count)
    try:
        with measured(device) as spent:
            images = torch.cat(list(draw(chosen, number, 0, batch_size=number, device=device)))
    finally:
        hook.remove()
    return images, calls, spent()


@contextmanager
def measured(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds since the start of the body.

    They are CPU seconds for one thread on a CPU, else wall-clock seconds.
    """
    on_gpu = device.type == "cuda"
    clock = time.process_time if not on_gpu and torch.get_num_threads() == 1 else time.perf_counter

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        return clock()

    start = now()
    yield lambda: now() - start


def step_seconds(
    models: dict[str, DiffusionModule], batch_size: int, device: torch.device, turns: int = 9
) -> dict[str, float]:
    """Return the median seconds of one optimisation step of each model; all models take turns."""
    steps = {name: _step(module.to(device).train(), batch_size, device) for name, module in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(turns + 1):
        for name, step in steps.items():
            with measured(device) as spent:
                step()
            if turn:  # the first one allocates
                times[name].append(spent())
    return {name: statistics.median(values) for name, values in times.items()}


def _step(module: DiffusionModule, batch_size: int, device: torch.device) -> Callable[[], None]:
    model = module.model
    parameters = list(model.denoiser.network.to(memory_format=torch.channels_last).parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = module.make_optimizer()
    shape = (batch_size, model.recipe.channels, *model.recipe.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    def step() -> None:
        optimizer.zero_grad()
        model.loss(images).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def steps_of(contest: Contest, rows: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Return the number of training steps of each row; seconds of a step are measured once and kept in costs.json."""
    kind, amount = contest.budget
    batch = contest.batch_size
    if kind == "images":
        return {row: max(1, round(amount / batch)) for row in rows}
    path = contest.out / "costs.json"
    with lock(contest.out / "costs.lock", "is measured by", "wait for it", wait=True):
        costs: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        if set(rows) - set(costs):
            models = {}
            for row, options in rows.items():
                run = contest.folder(row, 0).parent / "cost"
                if not (run / "model/model.safetensors").is_file():
                    _train([*contest.training(options, 0, 1, run), "samples.num_images=1"])
                method = yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["method"]
                models[row] = DiffusionModule(load_model(run), learning_rate=1e-5, method=method)
            costs |= {row: round(seconds, 5) for row, seconds in step_seconds(models, batch, contest.device).items()}
            write_text(path, json.dumps(costs, indent=2) + "\n")
    return {row: max(1, round(amount / costs[row])) for row in rows}


def _train(overrides: Sequence[str]) -> tuple[float, float]:
    """Run train.py; return its wall-clock and CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    status = run_process([sys.executable, str(ROOT / "train.py"), *overrides], cwd=ROOT)
    if status:
        raise UserError(f"train.py {' '.join(overrides)} ended with status {status}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, used


def run_row(contest: Contest, row: str, options: Sequence[str], seed: int, steps: int) -> None:
    """Train, sample and measure one row, and write its row.json after each kind of samples."""
    folder = contest.folder(row, seed)
    run, path = folder / "run", folder / "row.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    settings = {"set": contest.images.name, "budget": f"{contest.budget[1]:g} {contest.budget[0]}"}
    settings |= {"options": " ".join(options), "shared": " ".join(contest.overrides)}
    require_same(path, found, settings, contest.number)
    if not found:
        resumed = run.exists()
        _, cpu = _train(contest.training(options, seed, steps, run))
        result = json.loads((run / "result.json").read_text())
        found = {
            "row": row,
            "seed": seed,
            **settings,
            "figure": contest.images.quality,
            "steps": steps,
            "images": steps * contest.batch_size,
            "training_seconds": result["seconds"],
            "training_cpu_seconds": None if resumed else round(cpu, 1),  # unknown for a second part of a run
            "preconditioning": load_model(run).recipe.parts["target"].get("preconditioning", "none"),
            **provenance(contest.device),
            "samples": [],
        }
    made = {(entry["sampler"], entry["asked"]) for entry in found["samples"]}
    model = load_model(run)
    for name, number, sampler in samplers(model, contest.evaluations):
        if (name, number) in made:
            continue
        images, evaluations, seconds = sampled(model, sampler, contest.number, contest.device)
        report = {key: round(value, 4) for key, value in contest.images.report(images.numpy()).items()}
        head = {"sampler": name, "asked": number, "evaluations": evaluations, "number": contest.number}
        found["samples"].append({**head, "seconds": round(seconds, 2), **report})
        write_text(path, json.dumps(found, indent=2) + "\n")
        print(f"{row}, seed {seed}, {name}, {evaluations} evaluations: {report}, {seconds:.1f} s", flush=True)


def provenance(device: torch.device) -> dict[str, str]:
    """Return machine, commit and date."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"machine": machine, "commit": commit, "date": time.strftime("%Y-%m-%d")}


def _processor() -> str:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {vectors}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def chosen_rows(names: Sequence[str], own: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the options of each row.

    Args:
        names: groups, their rows and processes.
        own: further rows, "NAME=OPTION OPTION ...".

    Raises: UserError for a row without a name or options, or with options of the budget.
    """
    known = {name: {name: options} for group in GROUPS.values() for name, options in group.items()} | GROUPS
    rows: dict[str, tuple[str, ...]] = {}
    for name in names:
        rows |= known.get(name, {name: (f"process={name}",)})
    for text in own:
        name, _, options = text.partition("=")
        require(bool(name.strip() and "=" in options), f'--row {text}: expected "NAME=OPTION=VALUE OPTION=VALUE ..."')
        rows[name.strip()] = tuple(options.split())
        _leave_the_budget(f"--row {name}", rows[name.strip()])
    return rows


def _leave_the_budget(where: str, options: Sequence[str]) -> None:
    """Raise UserError if an option is one of `BUDGET`."""
    for key in (option.partition("=")[0].lstrip("+~") for option in options):
        require(key not in BUDGET, f"{where}: {key} is the same for all rows; set it by {BUDGET.get(key)}")


def run(contest: Contest, rows: dict[str, tuple[str, ...]], seeds: Sequence[int]) -> list[str]:
    """Run all rows that are neither finished nor held by another process, the first seed of all of them first.

    Returns:
        A line for each row that failed; the others are run all the same.
    """
    contest.out.mkdir(parents=True, exist_ok=True)
    steps, failures = steps_of(contest, rows), []
    for seed in seeds:
        for row, options in rows.items():
            with claimed(contest.folder(row, seed) / "row.lock") as is_held:
                try:
                    if is_held:
                        run_row(contest, row, options, seed, steps[row])
                except UserError as error:
                    failures.append(f"{row}, seed {seed}: {error}")
                    print(failures[-1], file=sys.stderr, flush=True)
    return failures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare processes at one budget.")
    parser.add_argument("--set", choices=sorted(IMAGE_SETS), default="mnist")
    parser.add_argument("--source", type=Path, metavar="DIR", help="images of cifar10, in train/CLASS and test/CLASS")
    parser.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help="Inception's weights: adds FID to the samples of cifar10 drawn from now on",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="prepared images and features; OUT unless given")
    parser.add_argument(
        "--rows", nargs="*", default=["members"], metavar="NAME", help="processes, groups or rows of groups"
    )
    parser.add_argument("--row", action="append", default=[], metavar='"NAME=OPTIONS"', help="a row of your own")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--images", type=float, help="images seen in training")
    budget.add_argument("--seconds", type=float, help="seconds of optimisation")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--number", type=int, default=500, help="samples of each kind")
    parser.add_argument("--evaluations", nargs="*", type=int, default=EVALUATIONS)
    parser.add_argument("--network", help="small for 32 px unless given")
    parser.add_argument("--batch-size", type=int, help="64 for 32 px unless given")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="for all rows")
    parser.add_argument("--device", default="cpu", help="of the samples and of the times of steps")
    parser.add_argument("--tables", action="store_true", help="only redraw the tables and plots")
    options = parser.parse_args(arguments)
    try:
        failures: list[str] = []
        rows = chosen_rows(options.rows, options.row)
        _leave_the_budget("--override", options.override)
        kind = IMAGE_SETS[options.set]
        amount = options.images if options.seconds is None else options.seconds
        require(amount > 0, f"a budget of {amount:g} trains nothing; give --images or --seconds above 0")
        out = options.out.resolve()
        if not options.tables:
            batch_size = options.batch_size or kind.batch_size
            shared = (
                f"network={options.network or kind.network}",
                f"data.batch_size={batch_size}",
                f"optimizer.learning_rate={options.learning_rate:g}",
                *options.override,
            )
            images = kind(
                (options.cache or out).resolve(), options.source and options.source.resolve(), options.inception
            )
            amounts = ("images" if options.seconds is None else "seconds", amount)
            device, evaluations = torch.device(options.device), tuple(options.evaluations)
            contest = Contest(out, images, amounts, batch_size, options.number, evaluations, shared, device)
            failures = run(contest, rows, options.seeds)
            real = {"set": kind.name, "figure": kind.quality, "number": options.number}
            write_text(out / "real.json", json.dumps(real | images.real(options.number)) + "\n")
        write_tables(out)
        require(not failures, f"{len(failures)} rows failed: {'; '.join(failures)}")
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
