"""Share an image and findings by name between the tests of the audit."""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from dpm_scales.audit import audit
from dpm_scales.audit.findings import Finding, Verdict
from dpm_scales.audit.lab import Lab
from dpm_scales.audit.statements import Check
from dpm_scales.describe import describe
from dpm_scales.processes import Process

Verdicts = dict[tuple[str, str], Verdict]


def photo(height: int = 24, width: int = 36, seed: int = 0) -> Tensor:
    """Return a smooth colour image with a little noise: ``(1, 3, H, W)`` uint8."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    image = 110 + 2.5 * (rows - height / 2) - 1.5 * (columns - width / 2) + rng.normal(0, 12, (3, height, width))
    return torch.from_numpy(image.clip(1, 255).astype(np.uint8))[None]


def verdicts(rows: list[Finding]) -> Verdicts:
    found = {(row.direction, row.name): row.verdict for row in rows}
    assert len(found) == len(rows)
    return found


#: verdicts of healthy processes, by their description
_healthy: dict[str, Verdicts] = {}


def changed(healthy: Process, broken: Process) -> set[tuple[str, str]]:
    """Return the findings violated by the broken process but not by the healthy one, which is audited once."""
    key = json.dumps(describe(healthy))
    if key not in _healthy:
        _healthy[key] = verdicts(audit(healthy, photo(), samples=400))
    before, after = _healthy[key], verdicts(audit(broken, photo(), samples=400))
    return {name for name, verdict in after.items() if verdict is Verdict.VIOLATED and before[name] is not verdict}


@torch.no_grad()
def finding(check: Check, process: Process, images: Tensor | None = None, seed: int = 0, samples: int = 100) -> Finding:
    """Return one finding of a process, on the photo if no image is given, without the time of the others."""
    return check(Lab(process, photo() if images is None else images, seed, samples))


def by_name(rows: list[Finding], name: str, direction: str = "forward") -> Finding:
    (found,) = (row for row in rows if (row.name, row.direction) == (name, direction))
    return found
