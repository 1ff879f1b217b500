"""The fused product of a stencil: run by Triton's interpreter, against dense matrices."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from dpm_scales import operators
from dpm_scales.operators import stencil as module
from dpm_scales.operators.stencil import FiveProducts, FusedProduct, Stencil, osmosis_stencil, white_stencil
from support.oracles import generator


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    module._fuses_right.cache_clear()
    yield
    module._fuses_right.cache_clear()


CASES = [((5, 7), (2, 3)), ((1, 6), (1, 3)), ((6, 1), (2, 1)), ((40, 31), (1, 1))]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel as Triton's interpreter runs it, here: which of the two it is, is settled when its module is read."""
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    name = "dpm_scales.operators.fused"
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, name, raising=False)
        assert type(importlib.import_module(name)._product).__name__ == "InterpretedFunction"
        yield
    sys.modules.pop(name, None)
    vars(operators).pop("fused", None)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "guide"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("make", [white_stencil, osmosis_stencil])
def test_kernel_is_the_matrix(
    make: Callable[[torch.Tensor], Stencil],
    dtype: torch.dtype,
    tolerance: float,
    size: tuple[int, int],
    guide: tuple[int, int],
    interpreted: None,
) -> None:
    """Sets and adds, weights that serve all samples or channels, one row or column, more than one block of 1024."""
    s = make(torch.rand(*guide, *size, dtype=dtype, generator=generator()) + 0.1)
    u, start = torch.randn(2, 2, 3, size[0] * size[1], dtype=dtype, generator=generator(1)).unbind()
    weights = (s.diagonal, s.from_right, s.from_left, s.from_below, s.from_above)
    expected = (s.dense() @ u[..., None])[..., 0]
    out = torch.full_like(u, torch.nan)
    product = FusedProduct(weights, u, out, size[1])
    product.set()
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)
    for scale in (-0.5, 0.1):
        out.copy_(start)
        product.add(scale)
        torch.testing.assert_close(out, start + scale * expected, atol=tolerance, rtol=0)


def test_cpu_takes_five_products() -> None:
    u = torch.rand(1, 1, 12)
    assert isinstance(white_stencil(torch.rand(1, 1, 3, 4) + 0.1).bind(u, u.clone()), FiveProducts)


def test_a_broken_triton_is_told_once_and_left_alone() -> None:
    """On this device the kernel can't run."""
    with pytest.warns(UserWarning, match="Triton is unusable here .*five passes"):
        assert not module._fuses_right(torch.device("cpu"))
    assert not module._fuses_right(torch.device("cpu"))  # no second warning: it would be an error here


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gpu_takes_one_product(dtype: torch.dtype) -> None:
    v = torch.rand(2, 3, 40, 31, dtype=dtype, generator=generator()) + 0.1
    u = torch.randn(2, 3, 40 * 31, dtype=dtype, generator=generator())
    stencil = white_stencil(v.cuda())
    assert isinstance(stencil.bind(u.cuda(), torch.empty_like(u).cuda()), FusedProduct)
    torch.testing.assert_close(stencil.flat_product(u.cuda()).cpu(), white_stencil(v).flat_product(u))
