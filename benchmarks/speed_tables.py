"""Write the tables of `benchmarks.speed_gpu`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
OURS = "dpm_scales"
SHARES = {"vp": 0.03, "blurring": 0.03, "osmosis_diffusion": 0.10}
"""Target for each process: the largest share of a training step that the forward process may take."""
BLUR, RATIO, OSMOSIS = 0.70, 2.0, 10.0
"""Targets: share of the card's rate, ratio of images/s to the best peer, seconds for 500 images."""


def page(results: Mapping[str, Row], missing: Mapping[str, str], absent: Sequence[str]) -> str:
    """Return the results as Markdown.

    Args:
        results: results by part.
        missing: parts of this call without a result, and why.
        absent: libraries that are not installed.
    """
    sections = [
        _ceilings(results.get("ceilings")),
        _rates([row for name, row in results.items() if name.startswith("rate ")]),
        _shares(results.get("share")),
        _samplers(results.get("sampling")),
        _blurs(results.get("blur")),
        _osmosis(results.get("osmosis")),
        _quality([row for name, row in results.items() if name.startswith("quality ")]),
    ]
    head = next((f"{row['machine']}, {row['commit']}, {row['date']}." for row in results.values()), "Nothing measured.")
    notes = [f"{name}: {why}" for name, why in missing.items()]
    notes += [f"not installed: {', '.join(absent)}"] if absent else []
    return "\n\n".join([head, *filter(None, sections), *(f"- {note}" for note in notes)]) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _met(good: bool) -> str:
    return "met" if good else "missed"


def _ceilings(row: Row | None) -> str:
    if row is None:
        return ""
    rows = [
        [way, f"{rates['matrix'] / 1e3:.3g}", f"{rates['convolution'] / 1e3:.3g}", f"{rates['copy']:.3g}"]
        for way, rates in ((way, row[way]) for way in ("float32", "bf16"))
    ]
    return "The card by itself:\n\n" + _table(["", "product TFLOP/s", "convolutions TFLOP/s", "copy GB/s"], rows)


def _rates(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    others = [row["images_per_second"] for row in rows if row["peer"] != OURS]
    best = max(others) if others else None

    def cells(row: Row) -> list[str]:
        ratio = "" if best is None else f"{row['images_per_second'] / best:.2f}"
        numbers = [f"{row['parameters'] / 1e6:.1f}", f"{row['images_per_second']:.0f}", ratio, str(row["memory"])]
        return [f"{row['peer']} {row['version']}", row["way"], *numbers]

    ordered = sorted(rows, key=lambda row: -row["images_per_second"])
    head = ["library", "", "M parameters", "images/s", "over the best peer", "MiB"]
    own = max((row["images_per_second"] for row in rows if row["peer"] == OURS), default=0.0)
    aim = "" if best is None else f"\n\nAim: {RATIO:g} x the best peer, {_met(own >= RATIO * best)}."
    return f"Training, batches of {rows[0]['batch']}:\n\n" + _table(head, map(cells, ordered)) + aim


def _shares(part: Row | None) -> str:
    if part is None:
        return ""
    rows = []
    for row in part["rows"]:
        aim = SHARES[row["process"]]
        times = [f"{row['step_ms']:.2f}", f"{row['sample_ms']:.2f}", f"{row['share']:.1%}"]
        rows.append([row["process"], str(row["batch"]), *times, f"{aim:.0%}, {_met(row['share'] <= aim)}"])
    head = ["process", "batch", "step ms", "forward ms", "share", "aim"]
    return "The forward process in a training step of `network=small`:\n\n" + _table(head, rows)


def _samplers(part: Row | None) -> str:
    if part is None:
        return ""
    rows = []
    for row in part["rows"]:
        times = [f"{row['step_ms']:.2f}", f"{row['beside_ms']:.2f}", f"{row['share']:.1%}", f"{row['kernels']:.0f}"]
        rows.append([row["network"], row["process"], row["sampler"], row["way"], str(row["batch"]), *times])
    head = ["network", "process", "sampler", "", "batch", "step ms", "without the network ms", "share", "kernels"]
    return "A step of a sampler:\n\n" + _table(head, rows)


def _blurs(part: Row | None) -> str:
    if part is None:
        return ""
    names = [name for name in part["rows"][0]["milliseconds"] if name != "heat_blur"]
    rows = []
    for row in part["rows"]:
        ratios = [f"{row['ratios'][name]:.1f} x" for name in names]
        share = max(row["of_copy"], row["of_matrix"])
        own = [f"{row['milliseconds']['heat_blur']:.3f}", *ratios, f"{row['of_copy']:.0%}", f"{row['of_matrix']:.0%}"]
        rows.append([str(tuple(row["shape"])), *own, f"{BLUR:.0%}, {_met(share >= BLUR)}"])
    head = ["(B, C, H, W)", "heat_blur ms", *names, "of the copy rate", "of the product rate", "aim"]
    return "Heat blur:\n\n" + _table(head, rows)


def _osmosis(row: Row | None) -> str:
    if row is None:
        return ""
    aim = f"aim for 500: {OSMOSIS:g} s, {_met(row['seconds'] <= OSMOSIS)}" if row["images"] == 500 else "not all 500"
    return (
        f"The osmosis filter of {row['images']} images, three channels, {len(row['times'])} times each: "
        f"{row['seconds']:.1f} s, {row['evolve_seconds']:.1f} s without reading files ({aim})."
    )


def _quality(found: Sequence[Row]) -> str:
    if not found:
        return ""
    rows = []
    for row in sorted(found, key=lambda row: (row["budget"], row["peer"])):
        for drawn in row["samples"]:
            counts = [f"{row['budget']:g}", f"{row['parameters'] / 1e6:.1f}", str(row["images"])]
            rows.append([row["peer"], *counts, drawn["sampler"], f"{drawn['seconds']:.1f}", f"{drawn['fd']:.4g}"])
    head = ["library", "budget s", "M parameters", "images seen", "sampler", "seconds for all samples", "FD"]
    return f"{found[0]['set']}, {found[0]['number']} samples:\n\n" + _table(head, rows)
