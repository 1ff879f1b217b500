"""Chebyshev sweeps in one kernel: run by Triton's interpreter, against dense matrices and against sweeps by steps."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dpm_scales import operators
from dpm_scales.operators import chebyshev as module
from dpm_scales.operators.chebyshev import collect, expand, one_kernel, signed_table
from dpm_scales.operators.stencil import Stencil, white_stencil
from support.oracles import generator

TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    module._one_kernel_right.cache_clear()
    yield
    module._one_kernel_right.cache_clear()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels as Triton's interpreter runs them, here."""
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    name = "dpm_scales.operators.sweeps"
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, name, raising=False)
        assert type(importlib.import_module(name)._sweep).__name__ == "InterpretedFunction"
        yield
    sys.modules.pop(name, None)
    vars(operators).pop("sweeps", None)


def case(size: tuple[int, int], guide: tuple[int, int], dtype: torch.dtype) -> tuple[Stencil, Tensor, list[Tensor]]:
    """A stencil, images ``(functions, B, C, N)`` and coefficients of different lengths."""
    stencil = white_stencil(torch.rand(*guide, *size, dtype=dtype, generator=generator()) + 0.1)
    ys = torch.randn(2, 2, 3, size[0] * size[1], dtype=dtype, generator=generator(1))
    per_sample = torch.randn(2, 1, 1, 6, dtype=dtype, generator=generator(2))
    return stencil, ys, [per_sample, torch.randn(4, dtype=dtype, generator=generator(3))]


def dense_function(stencil: Stencil, coefficients: Tensor, y: Tensor) -> Tensor:
    """sum_k c_k T_k(L / 4 - 1) y, by products with the dense matrix."""
    x = stencil.dense() / 4 - torch.eye(y.shape[-1], dtype=y.dtype)
    before, here = y[..., None], x @ y[..., None]
    c = coefficients if coefficients.ndim == 4 else coefficients.expand(1, 1, 1, -1)
    total = c[..., 0, None] * before
    for k in range(1, c.shape[-1]):
        total = total + c[..., k, None] * here
        before, here = here, 2 * x @ here - before
    return total[..., 0]


@pytest.mark.parametrize(("size", "guide"), [((5, 7), (2, 3)), ((1, 6), (1, 3)), ((6, 1), (2, 1)), ((4, 8), (1, 1))])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, TOLERANCE), (torch.float32, 1e-4)])
@pytest.mark.usefixtures("interpreted")
def test_kernels_are_the_matrix(
    size: tuple[int, int], guide: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    stencil, ys, coefficients = case(size, guide, dtype)
    table = signed_table(coefficients, ys[0])
    assert table is not None and table.shape == (2, 2, 3, 6)
    found = one_kernel(stencil, table, [ys[0]], True)
    for one, c in zip(found, coefficients, strict=True):
        torch.testing.assert_close(one, dense_function(stencil, c, ys[0]), atol=tolerance, rtol=0)
    (together,) = one_kernel(stencil, table, [*ys], False)
    expected = sum(dense_function(stencil, c, y) for c, y in zip(coefficients, ys, strict=True))
    torch.testing.assert_close(together, expected, atol=tolerance, rtol=0)


@pytest.mark.usefixtures("interpreted")
def test_sweeps_and_gradients_are_those_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As chosen on CUDA; constants alone have one term."""
    stencil, ys, coefficients = case((4, 6), (2, 1), torch.float64)
    constant = [coefficients[1][:1], coefficients[1][:1]]
    monkeypatch.setattr(module, "_one_kernel_right", lambda device: True)
    results = []
    for fused in (False, True):
        monkeypatch.setattr(module, "may_fuse", lambda y, fused=fused: fused)
        images = ys.clone().requires_grad_(True)
        first, second = expand(stencil, images[0], coefficients)
        total = collect(stencil, coefficients, [*images])
        plain = collect(stencil, constant, [*images])
        gradient = torch.autograd.grad((first * second * total * plain).sum(), images)[0]
        results.append([first, second, total, plain, gradient])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_the_check_of_a_device_passes_where_they_are_right() -> None:
    assert module._one_kernel_right(torch.device("cpu"))


def test_what_one_kernel_does_not_take() -> None:
    y = torch.zeros(2, 3, 12)
    assert signed_table([(1.0, 2.0)], y) is None, "numbers would have to be copied to the device"
    assert signed_table([torch.zeros(2, 3, 12, 5)], y) is None, "coefficients by pixel"
    assert module._one_kernel_table(white_stencil(torch.ones(1, 1, 3, 4)), y, [torch.zeros(5)]) is None, "on a CPU"


def test_a_device_where_they_are_wrong_is_told_once_and_left_alone() -> None:
    """On this device the kernels can't run."""
    with pytest.warns(UserWarning, match="sweeps in one kernel are unusable here .*two for each degree"):
        assert not module._one_kernel_right(torch.device("cpu"))
    assert not module._one_kernel_right(torch.device("cpu"))  # no second warning: it would be an error here


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gpu_takes_one_kernel(dtype: torch.dtype) -> None:
    """Many times the same: a missing barrier would show now and then."""
    stencil, ys, coefficients = case((64, 64), (2, 3), dtype)
    there = white_stencil(torch.rand(2, 3, 64, 64, dtype=dtype, generator=generator()).cuda() + 0.1)
    coefficients = [c.cuda() for c in coefficients]
    assert module._one_kernel_table(there, ys[0].cuda(), coefficients) is not None
    first = collect(there, coefficients, [*ys.cuda()])
    torch.testing.assert_close(first.cpu(), collect(stencil, [c.cpu() for c in coefficients], [*ys]))
    for _ in range(100):
        assert torch.equal(collect(there, coefficients, [*ys.cuda()]), first)
