"""Keep values of curves while a loop asks for them again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Protocol, TypeVar

from torch import Tensor

from dpm_scales.processes.steps import Scale, as_scale

_NUMBER = 32
"""Number of values kept: a step of a multistep sampler needs two curves at up to six scales."""


class KeptValues:
    """Values of functions of tensors, kept while the body of `keeping` runs, for the same tensor objects.

    A step of a sampler reads the curves at its two scales a dozen times, and each evaluation launches some fifteen
    kernels. Values are those of the first call, to the bit; the tensors must not be changed meanwhile.
    """

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[str, int, int], tuple[Tensor, Tensor, Tensor]] | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep values while the body runs; a `keeping` within another one changes nothing."""
        if self._found is not None:
            yield
            return
        self._found = OrderedDict()
        try:
            yield
        finally:
            self._found = None

    def of(self, name: str, t: Tensor, mu: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Return the value kept under `name` for these tensors, or that of `make`; for t ``()``, since values for each
        image are large and do not recur."""
        found = self._found
        if found is None or t.ndim:
            return make()
        key = (name, id(t), id(mu))
        entry = found.get(key)
        # an id may be another tensor's in a copy, or after its own was freed
        if entry is None or entry[0] is not t or entry[1] is not mu:
            entry = found[key] = (t, mu, make())
            if len(found) > _NUMBER:
                found.popitem(last=False)
        return entry[2]


class Keeps(Protocol):
    """An object with kept values."""

    kept: KeptValues


Curved = TypeVar("Curved", bound=Keeps)


def kept_curve(curve: Callable[[Curved, Tensor, Tensor], Tensor]) -> Callable[[Curved, Scale, Tensor], Tensor]:
    """Return a method that takes t as a number too, and keeps the values of `curve` while `keeping` runs."""

    @wraps(curve)
    def kept(self: Curved, t: Scale, mu: Tensor) -> Tensor:
        scale = as_scale(t, mu)
        return self.kept.of(curve.__qualname__, scale, mu, lambda: curve(self, scale, mu))

    return kept
