"""Implicit Euler and its solvers against dense solves."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.errors import UserError
from dpm_scales.operators import OsmosisOperator, drift_stencil, evolve, implicit, implicit_euler, steady_state
from dpm_scales.operators.implicit import (
    Preconditioner,
    bicgstab,
    conjugate_gradients,
    jacobi,
)
from dpm_scales.operators.multigrid import multigrid
from dpm_scales.operators.stencil import Stencil
from support.osmosis_twins import SIZES, drift_matrix, guidance_images, images, means, osmosis_matrix, per_image
from support.reference import Array


def implicit_matrix(matrix: Array, steps: list[float]) -> Array:
    """Dense (I - tau_n P)^{-1} ... (I - tau_1 P)^{-1}."""
    result = np.eye(len(matrix))
    for step in steps:
        result = np.linalg.solve(np.eye(len(matrix)) - step * matrix, result)
    return result


def identity(r: Tensor, out: Tensor) -> None:
    out.copy_(r)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("dark", [0.0, 0.1])
@pytest.mark.parametrize("method", ["bicgstab", "cg"])
def test_both_solvers_are_the_dense_solve(height: int, width: int, dark: float, method: str) -> None:
    v, u = guidance_images(2, 3, height, width, dark=dark), images(2, 3, height, width)
    result = evolve(u, v, [2.0, 50.0], method, tol=1e-11, num_steps=[4, 2])
    for k, steps in enumerate(([0.5] * 4, [0.5] * 4 + [24.0] * 2)):
        expected = per_image(lambda grey, steps=steps: implicit_matrix(osmosis_matrix(grey), steps), v, u)
        torch.testing.assert_close(result[k], expected, atol=1e-7 if dark else 1e-9, rtol=0)


@pytest.mark.parametrize("method", ["bicgstab", "cg"])
def test_single_precision_is_close_to_double(method: str) -> None:
    v, u = guidance_images(2, 3, 12, 17, dark=0), images(2, 3, 12, 17)
    exact = evolve(u, v, [1.0, 100.0], method, tol=1e-10)
    single = evolve(u.float(), v.float(), [1.0, 100.0], method)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_general_drift_is_solved_by_bicgstab(height: int, width: int) -> None:
    right, down = 4 * images(2, 3, height, width - 1) - 2, 4 * images(2, 3, height - 1, width, seed=1) - 2
    u = images(2, 3, height, width, seed=2)
    result = implicit_euler(drift_stencil(right, down), u, [1.0, 21.0], [2, 1], tol=1e-12).images
    for b, c in itertools.product(range(2), range(3)):
        matrix, flat = drift_matrix(right[b, c].numpy(), down[b, c].numpy()), u[b, c].numpy().ravel()
        for k, steps in enumerate(([0.5, 0.5], [0.5, 0.5, 20.0])):
            np.testing.assert_allclose(
                result[k, b, c].numpy().ravel(), implicit_matrix(matrix, steps) @ flat, atol=1e-9
            )
    assert result.min() > -1e-9  # an M-matrix
    torch.testing.assert_close(means(result[1]), means(u), atol=1e-9, rtol=0)


def test_the_error_in_time_is_of_first_order() -> None:
    v, u = guidance_images(1, 1, 8, 9, dark=0), images(1, 1, 8, 9)
    exact = evolve(u, v, [8.0], tol=1e-12)
    errors = [
        float((evolve(u, v, [8.0], "bicgstab", tol=1e-12, num_steps=n) - exact).norm()) for n in (16, 32, 64, 128)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert 1.8 < coarse / fine < 2.2


@pytest.mark.parametrize("method", ["bicgstab", "cg"])
def test_batches_are_cut_to_the_cache_without_a_difference(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    u, white = images(3, 2, 5, 6), method == "cg"
    for v in (guidance_images(3, 2, 5, 6), guidance_images(1, 2, 5, 6), guidance_images(3, 1, 5, 6)):
        stencil = OsmosisOperator(v).stencil(torch.float64, white).affine(-1.0 if white else 1.0, 0.0)
        whole = implicit_euler(stencil, u, [2.0], 3, method=method)
        for size in (1, 2 * 30 * 8 + 9):
            monkeypatch.setattr(implicit, "CACHE_BYTES", 2 * size)
            cut = implicit_euler(stencil, u, [2.0], 3, method=method)
            assert torch.equal(cut.images, whole.images) and torch.equal(cut.iterations, whole.iterations)
            assert torch.equal(cut.residuals, whole.residuals)
        monkeypatch.undo()


def test_steps_may_be_given_by_their_size() -> None:
    v, u = guidance_images(1, 1, 5, 6), images(1, 1, 5, 6)
    by_size = evolve(u, v, [1.0, 1.0, 3.5], "cg", tol=1e-11, step_size=1.0)
    by_number = evolve(u, v, [1.0, 1.0, 3.5], "cg", tol=1e-11, num_steps=[1, 5, 3])
    assert torch.equal(by_size, by_number) and torch.equal(by_size[0], by_size[1])


def test_iterations_and_residuals_are_reported_and_true() -> None:
    v, u = guidance_images(2, 3, 9, 8), images(2, 3, 9, 8)
    stencil = OsmosisOperator(v).stencil(torch.float64)
    report = implicit_euler(stencil, u, [5.0], num_steps=1, tol=1e-5)
    assert report.iterations.shape == report.residuals.shape == (1, 2, 3)
    assert (report.iterations >= 2).all() and (report.iterations < 40).all()
    rest = u - (report.images[0] - 5.0 * stencil.product(report.images[0]))
    seen = rest.flatten(-2).norm(dim=-1) / u.flatten(-2).norm(dim=-1)
    torch.testing.assert_close(report.residuals[0], seen, atol=1e-12, rtol=1e-6)
    assert (seen <= 1.001e-5).all() and (seen > 1e-9).any()
    none = implicit_euler(stencil, u, [0.0])
    assert torch.equal(none.images[0], u) and none.iterations.shape == none.residuals.shape == (0, 2, 3)


@pytest.mark.parametrize("solver", [bicgstab, conjugate_gradients])
def test_a_system_stops_by_itself_and_is_then_left_alone(solver: Any) -> None:
    """Easy and hard systems in one batch: each takes the iterations and gives the numbers that it does alone."""
    v, u = guidance_images(6, 1, 9, 8), images(6, 1, 9, 8)
    v[0], v[1], v[2] = 1.0, 1.0, guidance_images(9, 8, dark=0)
    u[0], u[1], u[5] = 1.0, torch.cos(torch.pi * (torch.arange(8) + 0.5) / 8), 0.0
    white = OsmosisOperator(v).stencil(torch.float64, white=True).affine(7.0, 1.0)
    b = u.flatten(-2)
    together = solver(white, b, b, 1e-8)
    assert len(set(together.iterations.flatten().tolist())) >= 3
    assert together.iterations[5] == 0 and (together.x[5] == 0).all()
    for i in range(6):
        alone = solver(white.part(slice(i, i + 1), slice(0, 1)), b[i : i + 1], b[i : i + 1], 1e-8)
        assert torch.equal(alone.iterations[0], together.iterations[i])
        assert torch.equal(alone.x[0], together.x[i])


def test_preconditioners_change_the_effort_but_not_the_solution() -> None:
    v, u = guidance_images(1, 1, 24, 33, dark=0), images(1, 1, 24, 33)
    op, b, effort = OsmosisOperator(v), u.flatten(-2), {}
    for white in (True, False):
        p = op.stencil(torch.float64, white=white)
        matrix = p.affine(300.0 if white else -300.0, 1.0)
        exact = torch.linalg.solve(matrix.dense(), b)
        chosen: dict[str, tuple[Any, Preconditioner]] = {
            "none": (bicgstab, identity),
            "jacobi": (bicgstab, jacobi(matrix)),
            "multigrid": (bicgstab, multigrid(p, 300.0, b)),
            "cg none": (conjugate_gradients, identity),
            "cg jacobi": (conjugate_gradients, jacobi(matrix)),
        }
        for name, (solver, precondition) in chosen.items():
            if (name == "multigrid" and white) or (name.startswith("cg") and not white):
                continue  # one is for P, the other for symmetric matrices
            solution = solver(matrix, b, b, 1e-10, precondition=precondition)
            torch.testing.assert_close(solution.x, exact, atol=1e-7, rtol=0)
            effort[name] = int(solution.iterations)
    assert effort["multigrid"] * 5 < effort["none"] and effort["multigrid"] * 5 < effort["jacobi"]


def chain(diagonal: list[int], upper: list[int], lower: list[int]) -> Stencil:
    """A tridiagonal matrix as the stencil of an image of one row."""

    def flat(values: list[int]) -> Tensor:
        return torch.tensor([[values]], dtype=torch.float64)

    none = flat([0] * len(diagonal))
    return Stencil(flat(diagonal), flat([*upper, 0]), flat([*lower, 0]), none, none, 1, len(diagonal))


def test_bicgstab_restarts_where_it_breaks_down() -> None:
    """Small matrices of whole numbers, for which the textbook recursion divides by an exact zero; and scaled, so that
    rounding hides the zero. Without restarts they take 36 to 74 iterations."""
    broken = 0
    rows = ((1.0, 0.0, 1.0), (1.0, 0.0, 0.0), (1.0, -1.0, 0.0), (2.0, 1.0, 1.0))
    for a, b, c, d, e, f, rhs in itertools.product((1, 2), (-1, 1), (1, 2), (0, 1), (-1, 2), (-2, 1), rows):
        dense = chain([a, c, 2], [b, d], [e, f]).dense()[0, 0]
        regular = abs(torch.linalg.det(dense)) > 0.1 and torch.linalg.eigvalsh(dense + dense.T)[0] > 0
        if not regular or not textbook_breaks_down(dense.numpy(), np.array(rhs)):
            continue
        broken += 1
        for scale in (1.0, 0.1, 1 / 3, 1 / 7):
            right = 0.3 * torch.tensor([[rhs]], dtype=torch.float64)
            matrix = chain([a, c, 2], [b, d], [e, f]).affine(scale, 0.0)
            solution = bicgstab(matrix, right, torch.zeros_like(right), 1e-12, 200, identity)
            torch.testing.assert_close(scale * dense @ solution.x[0, 0], right[0, 0], atol=1e-11, rtol=0)
            assert solution.iterations <= 5
    assert broken > 3


def textbook_breaks_down(A: Array, b: Array) -> bool:
    """van der Vorst's recursion, unguarded: whether a scalar product that it divides by vanishes before the end."""
    r = b.copy()
    shadow, p, rho = r.copy(), r.copy(), r @ r
    for _ in range(50):
        v = A @ p
        sigma = shadow @ v
        if abs(sigma) < 1e-14:
            return True
        s = r - rho / sigma * v
        if np.abs(s).max() < 1e-13:
            return False
        t = A @ s
        omega = (t @ s) / (t @ t)
        new = s - omega * t
        if np.abs(new).max() < 1e-13:
            return False
        if abs(shadow @ new) < 1e-14 or abs(omega) < 1e-14:
            return True
        p = new + (shadow @ new) / rho * (rho / sigma) / omega * (p - omega * v)
        r, rho = new, shadow @ new
    return False


@pytest.mark.parametrize("solver", [bicgstab, conjugate_gradients])
def test_systems_that_do_not_converge_are_an_error_with_the_figures(solver: Any) -> None:
    v, u = guidance_images(2, 3, 20, 20), images(2, 3, 20, 20)
    matrix = OsmosisOperator(v).stencil(torch.float64, white=True).affine(1e4, 1.0)
    b = u.flatten(-2)
    with pytest.raises(UserError) as caught:
        solver(matrix, b, b, 1e-10, 3)
    message = str(caught.value)
    assert "residual 1e-10" in message and "3 iterations" in message and "worst" in message and "steps" in message


def test_singular_systems_and_nan_do_not_pass_for_solved() -> None:
    singular = chain([0, 0], [1], [-1])  # <A r, r> = 0 for every r
    b = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    with pytest.raises(UserError, match="did not reach the relative residual"):
        bicgstab(singular, b, torch.zeros_like(b), 1e-8, 20, identity)
    matrix = chain([1, 1], [0], [0])
    for solver in (bicgstab, conjugate_gradients):
        with pytest.raises(UserError, match="did not reach the relative residual"):
            solver(matrix, b * torch.nan, b, 1e-8, 5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "bicgstabb"}, ["did you mean 'bicgstab'", "cg"]),
        ({"method": "cg"}, ["symmetric", "whitened coordinates"]),
        ({"num_steps": 2.5}, ["num_steps", "2.5"]),
        ({"num_steps": [3, 0]}, ["num_steps", "[3, 0]"]),
        ({"num_steps": "23"}, ["num_steps", "23"]),
        ({"step_size": -1.0}, ["step_size", "-1.0"]),
        ({"times": [2.0, 1.0]}, ["times", "ascending", "[2.0, 1.0]"]),
        ({"times": [-1.0]}, ["times", ">= 0", "[-1.0]"]),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments: dict[str, Any], words: list[str]) -> None:
    stencil = OsmosisOperator(guidance_images(1, 1, 4, 5)).stencil(torch.float64)
    with pytest.raises(UserError) as caught:
        implicit_euler(stencil, images(1, 1, 4, 5), **({"times": [1.0, 2.0]} | arguments))
    assert all(word in str(caught.value) for word in words), caught.value


# --- steady states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), SIZES + [(24, 37)])
def test_the_steady_state_of_canonical_drift_is_the_guidance_image(height: int, width: int) -> None:
    v, u = guidance_images(2, 3, height, width, dark=0), images(2, 3, height, width)
    steady = steady_state(OsmosisOperator(v).stencil(torch.float64), u)
    torch.testing.assert_close(steady, v * means(u) / means(v), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(5, 8), (7, 7), (1, 6), (2, 3)])
def test_the_steady_state_of_general_drift_is_the_null_vector_of_the_dense_matrix(height: int, width: int) -> None:
    right, down = 2 * images(1, 1, height, width - 1) - 1, 2 * images(1, 1, height - 1, width, seed=1) - 1
    u = images(1, 1, height, width, seed=2)
    _, _, rows = np.linalg.svd(drift_matrix(right[0, 0].numpy(), down[0, 0].numpy()))
    null = torch.from_numpy(rows[-1] / rows[-1].mean()).reshape(1, 1, height, width)
    torch.testing.assert_close(steady_state(drift_stencil(right, down), u), null * means(u), atol=1e-6, rtol=0)


def test_a_slow_mode_is_not_taken_for_a_steady_state() -> None:
    """300 pixels in a row: the first step of 10 px^2 hardly changes the longest wave."""
    wave = torch.cos(torch.pi * (torch.arange(300, dtype=torch.float64) + 0.5) / 300).reshape(1, 1, 1, 300)
    stencil = OsmosisOperator(torch.ones(1, 1, 1, 300)).stencil(torch.float64)
    steady = steady_state(stencil, 1 + 1e-3 * wave)
    torch.testing.assert_close(steady, torch.ones_like(steady), atol=1e-6, rtol=0)


def test_a_steady_state_that_is_not_reached_is_an_error_with_the_figures() -> None:
    v, u = guidance_images(1, 1, 20, 20, dark=0), images(1, 1, 20, 20)
    with pytest.raises(UserError, match="after 1 steps an image still changes by 0"):
        steady_state(OsmosisOperator(v).stencil(torch.float64), u, max_steps=1)
