"""Fuzz readers with damaged bytes: they must return or raise UserError, for DPM_SCALES_FUZZ_MINUTES in all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dpm_scales.errors import UserError

MINUTES = float(os.environ.get("DPM_SCALES_FUZZ_MINUTES", "0"))
TARGETS = 12
EXAMPLES = 40
"""Examples of one round; only one round runs unless minutes are given."""


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    until = time.monotonic() + 60 * MINUTES / TARGETS
    number = 0
    while True:
        run = settings(
            max_examples=EXAMPLES if MINUTES == 0 else 2000,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if MINUTES else [Phase.generate],
        )(given(strategy)(check))
        seed(number)(run)()
        number += 1
        if time.monotonic() >= until:
            return


@st.composite
def damaged(draw: st.DrawFn, whole: list[bytes]) -> bytes:
    """Draw one of some files with bytes replaced, removed, inserted or repeated; or arbitrary bytes."""
    content = bytearray(draw(st.sampled_from([*whole, b""])))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, len(content)))
        kind = draw(st.integers(0, 4))
        size = draw(st.sampled_from([1, 1, 2, 4, 8, 40]))
        if kind == 0:
            content[place : place + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == 1:
            del content[place : place + size * draw(st.sampled_from([1, 100]))]
        elif kind == 2:
            content[place:place] = draw(st.binary(max_size=40))
        elif kind == 3:
            content[place : place + 4] = draw(
                st.sampled_from([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\0\0\0\x80", b"\1\0\0\0"])
            )
        else:
            content[place:place] = content[place : place + size]
    return bytes(content)


def returns_or_tells(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except UserError as error:
        assert "\n" not in str(error) and str(error)
        return None


WORDS = st.sampled_from(
    [*"_target_ dpm_scales.processes.VP os.getcwd process num_scales ${x} ${oc.env:HOME} image ???".split()]
)
NUMBERS = st.integers(-2, 5) | st.sampled_from([-(2**63), 10**9, 10**12, 2**70]) | st.floats(allow_nan=True)
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=3)
)


def put(draw: st.DrawFn, tree: Any) -> Any:
    """Return the tree with one to three values replaced or removed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and draw(st.booleans()):
                node = node[key]
                continue
            if isinstance(node, dict) and draw(st.integers(0, 3)) == 0:
                del node[key]
            else:
                node[key] = draw(VALUES)
            break
    return tree
