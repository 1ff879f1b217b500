"""Store snapshots of power-function averages, and reconstruct the average of any length after training (EDM2).

A run writes `ema/step-N.safetensors`: the averages of the parameters, in float32, with their lengths. Half precision
would be too coarse: short averages are differences of snapshots, with coefficients whose magnitudes add up to 10 or 50.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from dpm_scales.errors import UserError, require, require_number
from dpm_scales.models.checksums import DamagedFileError, read_tensors, write_tensors
from dpm_scales.models.power_profiles import LONGEST, SHORTEST, check_length, fit
from dpm_scales.models.weights_fit import not_finite
from dpm_scales.storage import open_regular

FOLDER = "ema"
"""Folder of the snapshots in that of a run."""
LARGEST_ERROR = 0.1
"""Largest allowed L2 distance of a fitted profile from its target, divided by the target's norm."""
MOST_SNAPSHOTS = 128
"""Largest number of snapshots to read; of more, this many are read, evenly spaced."""
_NAME = re.compile(r"step-(\d{6,18})\.safetensors", re.ASCII)
_TRIED = 60
"""Number of lengths tried to find those that can be reconstructed, evenly spaced in their logarithm."""


def write_snapshot(folder: Path, step: int, lengths: Sequence[float], averages: Sequence[Mapping[str, Tensor]]) -> None:
    """Write the averages of the parameters after a step, one by name for each length, atomically, with a checksum."""
    tensors = {
        f"{number}/{name}": value.detach().cpu().contiguous()
        for number, average in enumerate(averages)
        for name, value in average.items()
    }
    tensors |= {"lengths": torch.tensor(lengths, dtype=torch.float64), "step": torch.tensor(step)}
    write_tensors(folder / f"step-{step:06d}.safetensors", tensors)


def snapshots(folder: Path) -> dict[int, Path]:
    """Return the snapshots in a folder by step, in order; none if there is no such folder."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return {int(match[1]): path for match, path in sorted(found, key=lambda pair: int(pair[0][1]))}


def remove_later(folder: Path, step: int) -> None:
    """Remove the snapshots of steps after `step`."""
    for number, path in snapshots(folder).items():
        if number > step:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Stored:
    """An average in a snapshot.

    Attributes:
        path: file of the snapshot.
        place: index of the average in the snapshot.
    """

    path: Path
    place: int
    step: int
    length: float


@dataclass(frozen=True)
class Reconstruction:
    """An average of the parameters as a combination of stored ones.

    Attributes:
        length: σ_rel in EDM2, the standard deviation of its profile divided by the number of steps.
        step: number of steps that it averages.
        terms: stored averages with their coefficients, which add up to 1; a stored average is a single term.
        error: L2 distance of the combined profile from the exact one, divided by the norm of the latter.
    """

    length: float
    step: int
    terms: tuple[tuple[Stored, float], ...]
    error: float

    @property
    def folder(self) -> Path:
        """Return the folder of the snapshots."""
        return self.terms[0][0].path.parent

    def record(self) -> dict[str, Any]:
        """Return length, step, number of snapshots and error as plain values."""
        number = len({term.path for term, _ in self.terms})
        return {"length": self.length, "step": self.step, "snapshots": number, "profile_error": self.error}

    def parameters(self) -> dict[str, Tensor]:
        """Return the averaged parameters by name, summed in float64 and cast to the snapshots' dtype.

        Raises: UserError for a snapshot that is damaged, or whose averages do not fit those of the others.
        """
        total: dict[str, Tensor] = {}
        kinds: dict[str, torch.dtype] = {}
        for path in dict.fromkeys(term.path for term, _ in self.terms):
            held = _read(path)
            for term, coefficient in self.terms:
                if term.path != path:
                    continue
                prefix = f"{term.place}/"
                own = {name.removeprefix(prefix): value for name, value in held.items() if name.startswith(prefix)}
                _require_alike(own, total, path)
                for name, value in own.items():
                    kinds[name] = value.dtype
                    if len(self.terms) == 1:
                        total[name] = value
                    elif name in total:
                        total[name].add_(value.double(), alpha=coefficient)
                    else:
                        total[name] = value.double() * coefficient
        return {name: value.to(kinds[name]) for name, value in total.items()}

    def replace_in(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a model's state with the averaged parameters; its buffers, which are constants, stay.

        Raises: as `parameters`, and for parameters that are not the model's.
        """
        found, place = self.parameters(), self.folder
        for name, value in found.items():
            shape = tuple(state[name].shape) if name in state else "none"
            fits = f"{place}: {name} is {tuple(value.shape)} in the snapshots, {shape} in the run's model"
            require(shape == tuple(value.shape), f"{fits}; give the run that wrote them")
        return {**state, **found}


def reconstruction(run: Path, length: object, step: object = None, prefix: str = "") -> Reconstruction:
    """Return the combination of a run's snapshots that gives the average of a length; their weights are not read yet.

    Args:
        run: the run's folder.
        length: in [SHORTEST, LONGEST].
        step: step of the snapshot at which the average ends; None for the last.
        prefix: prefix of the options `ema` and `ema_step` in messages.

    Raises: UserError for values out of range, a run without snapshots, a step without one, and a length that they
    reconstruct with an error above `LARGEST_ERROR`.
    """
    wanted = check_length(f"{prefix}ema", length)
    stored, end = _until(run, step, prefix)
    same = [one for one in stored if one.step == end and one.length == wanted]
    if same:
        return Reconstruction(wanted, end, ((same[0], 1.0),), 0.0)
    coefficients, error = _fitted(stored, end, wanted)
    if error > LARGEST_ERROR:
        raise UserError(f"{prefix}ema={wanted:g}: {_too_far(run, stored, end, error)}")
    return Reconstruction(wanted, end, tuple(zip(stored, coefficients, strict=True)), error)


def possible_lengths(run: Path, step: object = None) -> tuple[float, float]:
    """Return the shortest and the longest length that the snapshots of a run reconstruct.

    Args:
        step: as in `reconstruction`.

    Raises: UserError if there are no snapshots, or none of that step.
    """
    return _range(*_until(run, step))


def _until(run: Path, step: object, prefix: str = "") -> tuple[list[Stored], int]:
    """Return the averages in the snapshots up to a step, and the step; see `reconstruction`."""
    require(run.exists(), f"no model at {run}: no such file or folder")
    found = snapshots(run / FOLDER)
    none = f"{run} has no snapshots of averages ({FOLDER}/step-N.safetensors), and {prefix}ema needs them; "
    require(bool(found), f"{none}give the folder of a run that was trained with ema.power_lengths=[0.05,0.10]")
    if step is None:
        end = max(found)
    else:
        require_number(f"{prefix}ema_step", step, 1, whole=True)
        end = int(step)  # type: ignore[call-overload]
        near = ", ".join(map(str, sorted(sorted(found, key=lambda number: abs(number - end))[:3])))
        missing = f"{prefix}ema_step={end}: {run} has no snapshot of that step"
        require(end in found, f"{missing}; the nearest are {near}, and the last is {max(found)}")
    steps = _spread([number for number in found if number <= end])
    return [one for number in steps for one in _stored(found[number], number)], end


def _spread(steps: list[int]) -> list[int]:
    """Return at most `MOST_SNAPSHOTS` of the steps, evenly spaced, the last included."""
    if len(steps) <= MOST_SNAPSHOTS:
        return steps
    return [steps[round((k + 1) * len(steps) / MOST_SNAPSHOTS) - 1] for k in range(MOST_SNAPSHOTS)]


def _fitted(stored: Sequence[Stored], step: int, length: float) -> tuple[list[float], float]:
    return fit([one.step for one in stored], [one.length for one in stored], step, length)


def _range(stored: Sequence[Stored], step: int) -> tuple[float, float]:
    """Return the shortest and the longest length whose profile is fitted well, or which is stored for the step."""
    ratio = LONGEST / SHORTEST
    tried = [min(SHORTEST * ratio ** (k / (_TRIED - 1)), LONGEST) for k in range(_TRIED)]
    good = [length for length in tried if _fitted(stored, step, length)[1] <= LARGEST_ERROR]
    good += [one.length for one in stored if one.step == step]
    return _rounded(min(good), math.ceil), _rounded(max(good), math.floor)


def _rounded(value: float, towards: Callable[[float], int]) -> float:
    """Return a length with two digits, rounded up or down."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{towards(round(value / unit, 6)) * unit:.2g}")


def _too_far(run: Path, stored: Sequence[Stored], step: int, error: float) -> str:
    low, high = _range(stored, step)
    number = len({one.path for one in stored})
    return (
        f"the {number} snapshot{'' if number == 1 else 's'} of {run} up to step {step} reconstruct lengths from "
        f"{low:g} to {high:g}, and would miss this one's profile by {error:.0%}; choose one of these, or train with "
        "more snapshots: ema.snapshot_every"
    )


def _stored(path: Path, step: int) -> list[Stored]:
    """Return the averages that a snapshot holds, without reading their weights. Raises UserError if it is damaged."""
    try:
        with open_regular(path):
            pass
        with safetensors.safe_open(str(path), framework="pt") as file:
            lengths, number = file.get_tensor("lengths"), file.get_tensor("step")
        if lengths.ndim != 1 or lengths.dtype != torch.float64 or number.shape != () or int(number) != step:
            raise ValueError(f"lengths {tuple(lengths.shape)}, step {tuple(number.shape)}")
        values = [check_length("length", value) for value in lengths.tolist()]
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise _damaged(path, f"{path} is damaged: it holds no averages with their lengths") from error
    return [Stored(path, place, step, length) for place, length in enumerate(values)]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except DamagedFileError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, what: str) -> DamagedFileError:
    others = len(snapshots(path.parent)) - 1
    return DamagedFileError(f"{what}; remove it, and the other {others} are used" if others > 0 else what)


def _require_alike(own: Mapping[str, Tensor], total: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError unless a snapshot's parameters are finite and have the names and shapes of the others'."""
    odd = f"{path} does not hold the averages of this run; remove it"
    require(bool(own) and (not total or own.keys() == total.keys()), odd)
    require(all(value.is_floating_point() for value in own.values()), odd)
    require(all(total[name].shape == value.shape for name, value in own.items() if total), odd)
    bad = not_finite(dict(own))
    require(bad is None, f"{path}: {bad} is not finite; remove it")
