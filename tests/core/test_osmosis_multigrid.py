"""Multigrid for implicit steps of osmosis, and the steady states that it reaches, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpm_scales.operators import OsmosisOperator, drift_stencil, steady_state
from dpm_scales.operators.implicit import bicgstab, without_rows
from dpm_scales.operators.multigrid import multigrid
from dpm_scales.operators.stencil import Stencil
from support.osmosis_twins import images


def random_drift(height: int, width: int, batch: tuple[int, int] = (1, 1)) -> Stencil:
    """Drift in [-1, 1] that no image has."""
    return drift_stencil(2 * images(*batch, height, width - 1) - 1, 2 * images(*batch, height - 1, width, seed=1) - 1)


def cycle(p: Stencil, step: float, like: Tensor, r: Tensor, fixed: Tensor | None = None) -> Tensor:
    out = torch.full_like(r, torch.nan)
    multigrid(p, step, like, fixed)(r, out)
    return out


@pytest.mark.parametrize(("height", "width"), [(5, 8), (8, 8), (1, 6), (6, 1), (1, 1)])
def test_small_systems_are_solved(height: int, width: int) -> None:
    """Up to 64 pixels there is no coarser grid, and the approximation is the inverse."""
    p, r = random_drift(height, width, (2, 3)), images(2, 3, height, width).flatten(-2) - 0.5
    dense = torch.eye(height * width, dtype=torch.float64) - 30 * p.dense()
    like = images(2, 3, height, width, seed=5).flatten(-2)
    torch.testing.assert_close(dense @ cycle(p, 30.0, like, r)[..., None], r[..., None], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(24, 33), (97, 130), (150, 20)])
@pytest.mark.parametrize("step", [10.0, 1e4, 1e8])
def test_each_cycle_takes_its_share_of_the_error_whatever_size_and_step(height: int, width: int, step: float) -> None:
    """Repeated cycles alone solve the system, with a guidance image of white noise."""
    v = 0.05 + images(1, 1, height, width)
    p, r = OsmosisOperator(v).stencil(torch.float64), images(1, 1, height, width, seed=1).flatten(-2)
    matrix, x, solve = p.affine(-step, 1.0), torch.zeros_like(r), multigrid(p, step, v.flatten(-2))
    norms, out = [], torch.empty_like(r)
    for _ in range(31):
        rest = r - matrix.flat_product(x)
        norms.append(float(rest.norm()))
        solve(rest, out)
        x = x + out
    assert norms[30] < 0.75**30 * norms[0], norms
    assert int(bicgstab(matrix, r, r, 1e-10, precondition=solve).iterations) <= 22


@pytest.mark.parametrize(("height", "width"), [(1, 500), (300, 2), (40, 55)])
def test_drift_of_no_image_and_thin_images_are_solved_in_fewer_iterations(height: int, width: int) -> None:
    p, r = random_drift(height, width), images(1, 1, height, width, seed=2).flatten(-2)
    matrix = p.affine(-1e4, 1.0)
    solution = bicgstab(matrix, r, r, 1e-10, precondition=multigrid(p, 1e4, r))
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix.dense(), r), rtol=1e-5, atol=1e-7)
    assert 3 * int(solution.iterations) < int(bicgstab(matrix, r, r, 1e-10, 9999).iterations)


def test_samples_and_channels_do_not_mix_and_dark_ones_do_no_harm() -> None:
    p, r = random_drift(20, 31), images(2, 3, 20, 31).flatten(-2)
    like = images(2, 3, 20, 31, seed=3).flatten(-2)
    like[0, 1], like[1, 2, ::3] = 0.0, 0.0
    together = cycle(p, 100.0, like, r)
    assert torch.isfinite(together).all()
    for b, c in ((0, 1), (1, 0), (1, 2)):
        part = (slice(b, b + 1), slice(c, c + 1))
        torch.testing.assert_close(cycle(p, 100.0, like[part], r[part]), together[part], atol=1e-13, rtol=0)
    torch.testing.assert_close(cycle(p, 100.0, -like, r), together, atol=0, rtol=0)


# --- pixels that stay -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(5, 8), (16, 21), (1, 9)])
def test_fixed_pixels_stay_and_the_others_settle_between_them(height: int, width: int) -> None:
    """Against a dense solve with the rows of the fixed pixels replaced by those of I."""
    p, u = random_drift(height, width, (2, 1)), images(2, 3, height, width, seed=2)
    fixed = images(2, 1, height, width, seed=3) > 0.7
    rows = torch.where(fixed.flatten(-2)[..., None], torch.eye(height * width, dtype=torch.float64), p.dense())
    exact = torch.linalg.solve(rows.expand(2, 3, -1, -1), (fixed * u).flatten(-2)).view(u.shape)
    result = steady_state(p, u, fixed=fixed)
    torch.testing.assert_close(result, exact, atol=1e-6, rtol=0)
    assert torch.equal(result * fixed, u * fixed)


def test_fixed_pixels_do_not_slow_the_solver() -> None:
    """Half of a photo-like image fixed, long steps."""
    u = 0.2 + images(1, 1, 90, 130)
    fixed = torch.ones(90, 130, dtype=torch.bool)
    fixed[20:71, 30:99] = False
    start, held = u.flatten(-2), fixed.flatten()[None, None]
    p, step = OsmosisOperator(0.2 + images(1, 1, 90, 130, seed=1)).stencil(torch.float64), 1e6
    matrix = without_rows(p, held).affine(-step, 1.0)
    solution = bicgstab(matrix, start, start, 1e-9, precondition=multigrid(p, step, start, held))
    assert int(solution.iterations) <= 25


def test_with_all_or_none_fixed() -> None:
    p, u = random_drift(20, 31), images(1, 2, 20, 31)
    none = torch.zeros(1, 1, 20, 31, dtype=torch.bool)
    assert torch.equal(steady_state(p, u, fixed=~none), u)
    torch.testing.assert_close(steady_state(p, u, fixed=none), steady_state(p, u), atol=1e-9, rtol=0)
