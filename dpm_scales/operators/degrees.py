r"""Choose the degree to which a function of L is expanded, from the function's own Chebyshev coefficients.

On the host, as many coefficients are kept as the tolerance requires, separately for each sample, so that a sample's
result does not depend on the batch it is in. Functions need no registration.

On another device the host has to wait for the coefficients, once for each function that is expanded, unless functions
of that kind occurred in a *rehearsal*: the same work, done on the host beforehand. Then the degree found there is used
without waiting, and wherever it turns out too low the result is NaN.

A function whose coefficients decay too slowly, such as a square root at mu = 0 (the standard deviation of a posterior
under constant noise), is expanded to `ROUGH_ERROR` instead; if even that fails, it is refused.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpm_scales.errors import require
from dpm_scales.operators.base import SpectralFunction, Term, Weights, images_of, values_of
from dpm_scales.operators.chebyshev import chebyshev_coefficients, chebyshev_nodes
from dpm_scales.operators.heat import HeatOperator

ROUGH_ERROR = 1e-2
"""Error bound for functions that no expansion approximates to the tolerance, relative to the largest value."""

ROUGH_DEGREE = 256
"""Lowest degree of their expansions."""

_FIRST = 128  # number of nodes tried first
_LAST = 8192
_MARGIN = 10.0  # rehearsals require an error smaller by this factor, since other scales may follow


@dataclass(frozen=True)
class Series:
    """An expanded function, float64.

    Attributes:
        at_zero: its value at mu = 0, ``(..., 1)``.
        coefficients: ``(..., K + 1)``, or None for a function that does not depend on mu.
        error: bound on the truncation error, relative to the largest value, where it was checked.
    """

    at_zero: Tensor
    coefficients: Tensor | None
    error: float = 0.0


def fixed_series(f: SpectralFunction | Weights, degree: int, device: torch.device | str | None = None) -> list[Series]:
    """Return the expansion of each weight of f to the given degree, whatever its error."""
    return [
        Series(values, None)
        if values.shape[-1] == 1
        else Series(values[..., -1:], chebyshev_coefficients(values[..., :-1], degree))
        for values in values_of(f, _nodes(2 * (degree + 1), device))
    ]


def adapted_series(
    f: SpectralFunction | Weights, tolerances: Sequence[float], device: torch.device | str | None = None
) -> list[Series]:
    """Return expansions of each weight of f within ``tolerance * max|f|`` on [0, 8], separately for each sample.

    The host reads the coefficients, so on another device it waits for them.

    Args:
        tolerances: ascending; the first that an expansion of degree 4096 meets is used, else `ROUGH_ERROR`.

    Raises: UserError for a function that is not finite, or whose expansion of degree 4096 exceeds `ROUGH_ERROR`.
    """
    number, found = _FIRST, None
    while True:
        values = values_of(f, _nodes(number, device))
        found = [_Partial() for _ in values] if found is None else found
        open_ = [part for part, v in zip(found, values, strict=True) if not part.add(v, tolerances, number == _LAST)]
        if not open_:
            return [part.series() for part in found]
        number *= 2


class _Partial:
    """The expansion of one function, completed sample by sample as the number of nodes grows."""

    def __init__(self) -> None:
        self.at_zero: Tensor | None = None
        self.coefficients: Tensor | None = None
        self.done: Tensor | None = None
        self.error = 0.0

    def add(self, values: Tensor, tolerances: Sequence[float], last: bool) -> bool:
        """Expand the samples that these nodes resolve; return whether all samples are complete."""
        if values.shape[-1] == 1:
            self.at_zero = values
            return True
        if self.done is not None and bool(self.done.all()):
            return True
        self.at_zero, at_nodes = values[..., -1:], values[..., :-1]
        require(bool(torch.isfinite(values).all()), "a function of the operator is not finite on its spectrum [0, 8]")
        coefficients, half = chebyshev_coefficients(at_nodes, at_nodes.shape[-1] - 1), at_nodes.shape[-1] // 2
        degree = _needed(coefficients, at_nodes, tolerances[0])
        for tolerance in tolerances[1:] if last else ():
            degree = torch.where(degree > half, _needed(coefficients, at_nodes, tolerance), degree)
        self.error = max(self.error, tolerances[-1])
        if last and bool((degree > half).any()):
            rough = _needed(coefficients, at_nodes, ROUGH_ERROR).clamp(min=ROUGH_DEGREE)
            degree, self.error = torch.where(degree > half, rough, degree), ROUGH_ERROR
            require(
                bool((degree <= half).all()),
                f"a function of the operator changes too fast on its spectrum [0, 8]: no expansion of degree {half} is "
                f"within {ROUGH_ERROR:g} of its largest value; take a smoother function of mu, or less blur",
            )
        resolved = degree <= half
        order = torch.arange(half + 1, device=values.device)
        new = torch.where(order <= degree, coefficients[..., : half + 1], 0.0)
        if self.coefficients is None or self.done is None:
            self.coefficients, self.done = new, resolved
        else:
            old = torch.nn.functional.pad(self.coefficients, (0, half + 1 - self.coefficients.shape[-1]))
            self.coefficients, self.done = torch.where(self.done, old, new), self.done | resolved
        return bool(self.done.all())

    def series(self) -> Series:
        """Return the expansion, without trailing coefficients that are 0 for all samples."""
        assert self.at_zero is not None
        if self.coefficients is None:
            return Series(self.at_zero, None)
        used = (self.coefficients.detach() != 0).flatten(0, -2).any(0).nonzero()
        return Series(self.at_zero, self.coefficients[..., : 1 + (int(used[-1]) if len(used) else 0)], self.error)


def _needed(coefficients: Tensor, values: Tensor, tolerance: float) -> Tensor:
    """Return the least degree ``(..., 1)`` beyond which the |c_k| sum to no more than ``tolerance * max|f|``."""
    sizes = coefficients.detach().abs()
    tails = sizes.flip(-1).cumsum(-1).flip(-1)  # tails[k] = |c_k| + |c_{k+1}| + ...
    limit = tolerance * values.detach().abs().amax(-1, keepdim=True)
    return ((tails > limit).sum(-1, keepdim=True) - 1).clamp(min=0)


def _nodes(number: int, device: torch.device | str | None) -> Tensor:
    """Return Chebyshev nodes, then 0: ``(1, number + 1)``."""
    return torch.nn.functional.pad(chebyshev_nodes(number, device), (0, 1))[None]


@dataclass(frozen=True)
class _Known:
    """Result of rehearsals for one weight: the largest degree, and the error allowed to its expansions."""

    degree: int
    error: float


class Degrees:
    """Expansions of a process's functions, with the degrees that rehearsals found.

    Args:
        tolerance: bound on the error of f(L), relative to the largest f.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._stricter = [tolerance / _MARGIN, tolerance]
        self._known: dict[Hashable, list[_Known]] = {}
        #: keys of the rehearsals already done
        self.rehearsed: set[Hashable] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Degrees:
        return self  # the known degrees hold for a copy of the process too

    def __reduce__(self) -> tuple[Any, ...]:
        return Degrees, (self.tolerance,)

    def series(self, f: SpectralFunction | Weights, number: int, device: torch.device) -> list[Series]:
        """Return the expansions of the `number` weights of f."""
        known = None if device.type == "cpu" else self._known.get((kind_of(f), number))
        if known is None:
            return adapted_series(f, [self.tolerance], device)
        return _guarded_series(f, known, device)

    def learn(self, *functions: SpectralFunction | Weights, device: torch.device | str | None = None) -> None:
        """Find and store the degrees of functions, each at the scales bound in it, for all functions of its kind."""
        for f in functions:
            found = adapted_series(f, self._stricter, device)
            new = [_Known(0 if s.coefficients is None else s.coefficients.shape[-1] - 1, s.error) for s in found]
            old = self._known.setdefault((kind_of(f), len(new)), new)
            both = [_Known(max(a.degree, b.degree), max(a.error, b.error)) for a, b in zip(new, old, strict=True)]
            self._known[kind_of(f), len(new)] = both

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Discard the degrees learnt in the body if it raises: a degree must hold for all later scales."""
        before = dict(self._known)
        try:
            yield
        except BaseException:
            self._known = before
            raise


class RehearsedOperator(HeatOperator):
    """An operator that learns the degree of every function applied, and returns images unchanged.

    Args:
        degrees: where the degrees are stored.
        calls: expected number of functions of each kind; beyond 64, some in the middle are skipped.
    """

    def __init__(self, degrees: Degrees, calls: int) -> None:
        super().__init__("discrete")
        self._degrees, self._calls = degrees, calls
        self._count: Counter[Hashable] = Counter()

    def apply(self, f: SpectralFunction, y: Tensor) -> Tensor:
        return self.combine((f, y))

    def combine(self, *terms: Term) -> Tensor:
        for term in terms:
            kind = kind_of(term[0])
            number, stride = self._count[kind], -(-self._calls // 64)
            self._count[kind] += 1
            if number < 16 or number >= self._calls - 16 or number % stride == 0:
                self._degrees.learn(term[0], device=images_of(term)[0].device)
        return images_of(terms[0])[0]


def _guarded_series(f: SpectralFunction | Weights, known: Sequence[_Known], device: torch.device) -> list[Series]:
    """Return expansions to the known degrees, NaN where their truncation error exceeds the known one."""
    largest = max(one.degree for one in known)
    found = []
    for values, one in zip(values_of(f, _nodes(2 * (largest + 1), device)), known, strict=True):
        if values.shape[-1] == 1:
            found.append(Series(values, None))
            continue
        all_ = chebyshev_coefficients(values[..., :-1], values.shape[-1] - 2)
        left_out = all_[..., one.degree + 1 :].abs().sum(-1, keepdim=True)
        fits = left_out <= one.error * values.abs().amax(-1, keepdim=True)
        found.append(Series(values[..., -1:], torch.where(fits, all_[..., : one.degree + 1], torch.nan)))
    return found


def kind_of(f: Callable[..., Any], depth: int = 8) -> Hashable:
    """Return a key that identifies a function apart from the numbers bound in it: its code, and that of its closure."""
    if isinstance(f, functools.partial):
        return ("partial", kind_of(f.func, depth), *(kind_of(a, depth) for a in f.args if callable(a)))
    if isinstance(f, types.MethodType):
        return kind_of(f.__func__, depth)
    if isinstance(f, types.FunctionType):
        called = [cell.cell_contents for cell in f.__closure__ or () if _filled(cell)] if depth else []
        functions = (types.FunctionType, types.MethodType, functools.partial)
        return (f.__code__, *(kind_of(c, depth - 1) for c in called if isinstance(c, functions)))
    return type(f).__qualname__, type(f).__module__


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is assigned later
        return False
