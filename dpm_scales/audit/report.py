"""`python evolve.py task=audit out=DIR`: write the audit as `audit.md` for people and `audit.json` for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from dpm_scales import audit as library
from dpm_scales.audit.corrections import Correction, corrections
from dpm_scales.audit.findings import Finding, Verdict
from dpm_scales.processes import Process
from dpm_scales.progress import progress_bar
from dpm_scales.storage import write_text

MEANINGS = {
    Verdict.EXACTLY: "holds as printed, for every path",
    Verdict.IN_LAW: "holds as printed, for distributions",
    Verdict.IN_EXPECTATION: "holds for the mean of the paths, not for each",
    Verdict.CORRECTED: "not as printed; the corrected statement, given in the notes, holds",
    Verdict.VIOLATED: "does not hold for this process",
    Verdict.NOT_APPLICABLE: "the paper does not claim it for such a process, or there is nothing to measure",
}


def write_audit(processes: Mapping[str, Process], images: Tensor, out: Path, seed: int = 0) -> None:
    """Audit every process and write `audit.md` and `audit.json` to the folder `out`.

    Args:
        images: uint8 ``(B, 3, H, W)``.
        seed: seed of guidance images and random paths.
    """
    found: dict[str, list[Finding]] = {}
    with progress_bar() as progress:
        bar = progress.add_task("audit", total=len(processes) + 1)
        for name, process in processes.items():
            found[name] = library.audit(process, images, seed)
            progress.advance(bar)
        examples = corrections(seed)
        progress.advance(bar)
    data = {
        "seed": seed,
        "processes": {name: [_plain(asdict(finding)) for finding in rows] for name, rows in found.items()},
        "corrections": [_plain(asdict(example)) for example in examples],
    }
    write_text(out / "audit.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    write_text(out / "audit.md", report(found, examples))
    for name, rows in found.items():
        print(f"{name}: {_summary(rows)}")
    print(f"audit of {len(found)} process{'es' if len(found) > 1 else ''} in {out}/audit.md")


def _plain(values: dict[str, object]) -> dict[str, object]:
    """Return the values with NaN as None and infinities as strings, since JSON has neither."""
    return {key: _finite(value) if isinstance(value, float) else value for key, value in values.items()}


def _finite(value: float) -> float | str | None:
    return None if math.isnan(value) else value if math.isfinite(value) else str(value)


def _summary(rows: Sequence[Finding]) -> str:
    counts = {verdict: sum(row.verdict is verdict for row in rows) for verdict in Verdict}
    return ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number)


# --- the page ---------------------------------------------------------------------------------------------------------


def report(found: Mapping[str, Sequence[Finding]], examples: Sequence[Correction]) -> str:
    """Return the text of `audit.md`."""
    lines = ["# Audit of the scale-space properties", ""]
    lines += [
        "Every proposition and property of P. Peter, *Generalised Diffusion Probabilistic Scale-Spaces* (JMIV, 2024).",
        "Closed forms are compared with laws composed as matrices from the transitions, and with random paths, on a",
        "small image: those figures are called drawn, with their standard error after ±. A dash: not applicable.",
        "",
    ]
    lines += [f"- **{verdict}**: {meaning}" for verdict, meaning in MEANINGS.items()] + [""]
    for direction in ("forward", "reverse"):
        lines += [f"## {direction.capitalize()}", "", *_overview(found, direction), ""]
    lines += ["## Corrections", "", *_examples(examples), ""]
    for name, rows in found.items():
        for direction in ("forward", "reverse"):
            lines += [f"## {name}, {direction}", "", *_table([r for r in rows if r.direction == direction]), ""]
        notes = [row for row in rows if row.note or row.corrected]
        lines += [f"### Notes on {name}", "", *(_note(row) for row in notes), ""]
    return "\n".join(lines)


def _overview(found: Mapping[str, Sequence[Finding]], direction: str) -> list[str]:
    """Return the lines of a table of verdicts, properties by processes."""
    rows: dict[str, dict[str, str]] = {}
    for process, findings in found.items():
        for finding in findings:
            if finding.direction == direction:
                rows.setdefault(finding.name, {})[process] = _cell(finding.verdict)
    lines = _head(["property", *found])
    return lines + [_row([name, *(cells.get(process, "–") for process in found)]) for name, cells in rows.items()]


def _cell(verdict: Verdict) -> str:
    return "–" if verdict is Verdict.NOT_APPLICABLE else f"**{verdict}**" if verdict is Verdict.VIOLATED else verdict


def _table(rows: Sequence[Finding]) -> list[str]:
    lines = _head(["property", "source", "verdict", "figure", "measured", "expected", "within", "drawn", "worst at"])
    for row in rows:
        nothing = math.isnan(row.measured)
        where = [f"t = {row.scale:.4g}"] if row.scale is not None and not nothing else []
        where += [f"µ = {row.eigenvalue:.4g}"] if row.eigenvalue is not None else []
        value = "" if nothing else f"{row.measured:.4g}"
        drawn = "" if row.drawn is None else f"{row.drawn:.4g}"
        drawn += f" ± {row.std_error:.1g}" if row.std_error is not None else ""
        compared = row.tolerance > 0
        cells = [row.name, row.source, row.verdict, row.figure, value]
        cells += [f"{row.expected:.4g}" if compared else "", f"{row.tolerance:.1g}" if compared else "", drawn]
        lines.append(_row([*cells, ", ".join(where)]))
    return lines


def _note(row: Finding) -> str:
    parts = [f"printed: {row.printed} | holds: {row.corrected}" if row.corrected else "", row.note]
    return f"- {row.direction}, {row.name}, {row.source} | " + " | ".join(part for part in parts if part)


def _examples(examples: Sequence[Correction]) -> list[str]:
    lines = _head(["source", "printed", "holds", "example", "printed gives", "true", "drawn at random"])
    for e in examples:
        printed = "–" if e.printed is None else f"{e.printed:.4g}"
        cells = [e.source, e.statement, e.corrected, e.example, printed, f"{e.true:.4g}"]
        lines.append(_row([*cells, f"{e.measured:.4g} ± {e.std_error:.1g}"]))
    return lines


def _head(names: Sequence[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
