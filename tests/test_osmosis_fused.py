"""The fused product of a stencil: run by Triton's interpreter, against dense matrices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from oracles import generator

from dpm_scales.operators import stencil as module
from dpm_scales.operators.stencil import FiveProducts, FusedProduct, white_stencil

INTERPRETED = """
import itertools, torch
from dpm_scales.operators.stencil import FusedProduct, Stencil, osmosis_stencil, white_stencil

torch.manual_seed(0)
cases = [((5, 7), (2, 3)), ((1, 6), (1, 3)), ((6, 1), (2, 1)), ((40, 31), (1, 1))]
formats = [(torch.float64, 1e-13), (torch.float32, 1e-5)]
for ((height, width), guide), (dtype, tolerance) in itertools.product(cases, formats):
    for make in (white_stencil, osmosis_stencil):
        s = make(torch.rand(*guide, height, width, dtype=dtype) + 0.1)
        u, start = torch.randn(2, 2, 3, height * width, dtype=dtype).unbind()
        weights = (s.diagonal, s.from_right, s.from_left, s.from_below, s.from_above)
        expected = (s.dense() @ u[..., None])[..., 0]
        out = torch.full_like(u, torch.nan)
        product = FusedProduct(weights, u, out, width)
        product.set()
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)
        for scale in (-0.5, 0.1):
            out.copy_(start)
            product.add(scale)
            torch.testing.assert_close(out, start + scale * expected, atol=tolerance, rtol=0)
print("equal")
"""


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    module._fuses_right.cache_clear()
    yield
    module._fuses_right.cache_clear()


@pytest.mark.slow
def test_kernel_is_the_matrix() -> None:
    """Sets and adds, weights that serve all samples or channels, one row or column, more than one block of 1024."""
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr


def test_cpu_takes_five_products() -> None:
    u = torch.rand(1, 1, 12)
    assert isinstance(white_stencil(torch.rand(1, 1, 3, 4) + 0.1).bind(u, u.clone()), FiveProducts)


def test_a_broken_triton_is_told_once_and_left_alone() -> None:
    """On this device the kernel can't run."""
    with pytest.warns(UserWarning, match="Triton is of no use here .*five passes"):
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
