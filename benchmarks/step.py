"""Measure the share of the forward process in a training step, for every process in configs/process.

A step consists of the loss of a batch, backward, clipping and AdamW, without the trainer's loop. `sample` is one call
of `process.sample` on the same batch. Both alternate, so that load on the machine affects both; times are medians, the
share is the median of the shares within a turn.

    python -m benchmarks.step --out step.json
    python -m benchmarks.step --network adm --size 64 --batch 32 --device cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from benchmarks.timing import seconds
from dpm_scales.denoisers import Denoiser
from dpm_scales.processes import Process
from dpm_scales.targets import Clean

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TARGET = 0.03
"""Target: largest share of a step that `sample` may take, with the `small` network at 32 px."""


def names() -> list[str]:
    """Return all choices of `process`."""
    return sorted(path.stem for path in (CONFIGS / "process").glob("*.yaml"))


def build(name: str, network: str, channels: int) -> Denoiser:
    """Return an untrained denoiser for the process `name` with the clean target."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=[f"process={name}", f"network={network}"])
    process: Process = instantiate(cfg.process, _convert_="all")
    inputs = channels * (1 + process.context_channels)
    net = instantiate(cfg.network, in_channels=inputs, out_channels=channels, _convert_="all")
    return Denoiser(net, process, Clean())


def measure(
    name: str, network: str, shape: tuple[int, int, int, int], turns: int, device: torch.device
) -> dict[str, Any]:
    """Return the medians in ms and the share of `sample` for one process."""
    denoiser = build(name, network, shape[1]).to(device).to(memory_format=torch.channels_last)
    process = denoiser.process
    optimizer = torch.optim.AdamW(denoiser.network.parameters(), lr=1e-4, fused=True)
    low, high = process.value_range
    x_0 = torch.rand(shape, device=device) * (high - low) + low

    def scales() -> torch.Tensor:
        return (torch.randint(process.num_scales, (shape[0],), device=device).double() + 1) / process.num_scales

    def step() -> None:
        optimizer.zero_grad()
        denoiser.loss(x_0, scales()).mean().backward()
        torch.nn.utils.clip_grad_norm_(denoiser.network.parameters(), 1.0)
        optimizer.step()

    def sample() -> None:
        with torch.no_grad():
            process.sample(x_0, scales(), context=process.context(x_0))

    for _ in range(3):
        step(), sample()
    pairs = [(seconds(step, device), seconds(sample, device)) for _ in range(turns)]
    return {
        "process": name,
        "step_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "sample_ms": 1e3 * statistics.median(b for _, b in pairs),
        "share": statistics.median(b / a for a, b in pairs),
        "images_per_second": shape[0] / statistics.median(a for a, _ in pairs),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and optionally save the results."""
    parser = argparse.ArgumentParser(description="Share of a training step that the forward process takes.")
    parser.add_argument("--network", default="small")
    parser.add_argument("--size", type=int, default=32, help="side of the images in px")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the results there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    shape = (options.batch, options.channels, options.size, options.size)
    results = [measure(name, options.network, shape, options.turns, device) for name in names()]
    print(f"torch {torch.__version__}, {device}, network {options.network}, {shape}; target share {TARGET:.0%}\n")
    print("| process | step ms | sample ms | share | images/s |\n|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r['process']} | {r['step_ms']:.1f} | {r['sample_ms']:.2f} | {r['share']:.2%} "
            f"| {r['images_per_second']:.0f} |"
        )
    if options.out is not None:
        options.out.write_text(json.dumps({"shape": shape, "network": options.network, "results": results}, indent=2))


if __name__ == "__main__":
    main()
