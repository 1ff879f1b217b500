r"""Implicit Euler for du/dt = P u, the scheme of the published osmosis filters (Vogel et al. 2013).

    (I - tau P) u^{k+1} = u^k

It allows any drift and any step: I - tau P is an M-matrix with column sums 1, so images stay positive and keep their
mean intensity. It is first order in tau. The systems are solved, all samples and channels together, by

    bicgstab    stabilised biconjugate gradients (van der Vorst 1992), restarted where it breaks down
    cg          conjugate gradients, for a symmetric matrix: canonical drift in whitened coordinates, which is CG for P
                in the inner product sum u w / v

Every system has its own scalars, and stops once its residual falls below `tol` times its right-hand side; it is not
updated after that. The host checks once per iteration whether all have stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpm_scales.errors import UserError, require, require_choice
from dpm_scales.operators.multigrid import multigrid
from dpm_scales.operators.stencil import CACHE_BYTES, Stencil, blocks, cut

Preconditioner = Callable[[Tensor, Tensor], None]
"""Writes an approximate solution of A x = r, ``(B, C, N)``, into the second tensor; symmetric where CG uses it."""


@dataclass(frozen=True)
class Solution:
    """Solved systems: `x` ``(B, C, N)``; `iterations` and relative `residuals` |b - A x| / |b|, ``(B, C)``."""

    x: Tensor
    iterations: Tensor
    residuals: Tensor


@dataclass(frozen=True)
class ImplicitEvolution:
    """Result of `implicit_euler`: `images` ``(T, B, C, H, W)`` at the T times; `iterations` and relative `residuals`
    of each step, ``(steps, B, C)``."""

    images: Tensor
    iterations: Tensor
    residuals: Tensor


# --- solvers ----------------------------------------------------------------------------------------------------------


def jacobi(matrix: Stencil) -> Preconditioner:
    """Return the preconditioner that divides by the diagonal."""
    inverse = 1 / matrix.diagonal

    def precondition(r: Tensor, out: Tensor) -> None:
        torch.mul(inverse, r, out=out)

    return precondition


def bicgstab(
    matrix: Stencil,
    b: Tensor,
    x: Tensor,
    tol: float = 1e-6,
    max_iterations: int = 1000,
    precondition: Preconditioner | None = None,
) -> Solution:
    """Solve A x = b for a batch of general matrices, each sample and channel independently.

    Args:
        matrix: A.
        b: right-hand sides ``(B, C, N)``.
        x: initial guess ``(B, C, N)``.
        tol: relative residual at which a system stops.
        max_iterations: maximum number of iterations, of two products each.
        precondition: right preconditioner; None for `jacobi`.

    Raises: UserError, with the worst residual, for systems that have not stopped after `max_iterations`.
    """
    inverse = jacobi(matrix) if precondition is None else precondition
    epsilon = torch.finfo(b.dtype).eps
    x = x.clone()
    r = b - matrix.flat_product(x)
    p, shadow = r.clone(), r.clone()
    p_hat, v, r_hat, t, scratch = (torch.empty_like(r) for _ in range(5))
    first, second = matrix.bind(p_hat, v), matrix.bind(r_hat, t)

    def dot(a: Tensor, c: Tensor) -> Tensor:
        return torch.mul(a, c, out=scratch).sum(-1, keepdim=True)

    goal, rho, shadow_norm = tol * _norm(b), dot(r, r), _norm(r)
    active = ~(shadow_norm <= goal)
    iterations = active.new_zeros(active.shape, dtype=torch.int64)
    running = bool(active.any())
    for _ in range(max_iterations):
        if not running:
            break
        iterations += active
        inverse(p, p_hat)
        first.set()
        sigma = dot(v, shadow)
        broken = sigma.abs() <= epsilon * _norm(v) * shadow_norm
        alpha = _ratio(rho, sigma, active & ~broken)
        r.addcmul_(alpha, v, value=-1)
        inverse(r, r_hat)
        second.set()
        omega = _ratio(dot(t, r), dot(t, t), active)
        x.addcmul_(alpha, p_hat).addcmul_(omega, r_hat)
        r.addcmul_(omega, t, value=-1)
        size, previous, rho = _norm(r), rho, dot(r, shadow)
        broken = active & (broken | (rho.abs() <= epsilon * size * shadow_norm) | (omega == 0))
        beta = _ratio(rho * alpha, previous * omega, active & ~broken)
        p.addcmul_(omega, v, value=-1).mul_(beta).add_(r)
        active = active & ~(size <= goal)
        running, restart = torch.stack([active.any(), (active & broken).any()]).tolist()
        if restart:  # beta is 0 there, so p is r already
            shadow = torch.where(broken, r, shadow)
            rho, shadow_norm = torch.where(broken, size**2, rho), torch.where(broken, size, shadow_norm)
    return _solved("bicgstab", matrix, b, x, iterations, tol, active)


def conjugate_gradients(
    matrix: Stencil,
    b: Tensor,
    x: Tensor,
    tol: float = 1e-6,
    max_iterations: int = 1000,
    precondition: Preconditioner | None = None,
) -> Solution:
    """Solve A x = b for a batch of symmetric positive definite matrices; arguments and errors as in `bicgstab`."""
    inverse = jacobi(matrix) if precondition is None else precondition
    x = x.clone()
    r = b - matrix.flat_product(x)
    z, q, scratch = (torch.empty_like(r) for _ in range(3))
    inverse(r, z)
    p = z.clone()
    product = matrix.bind(p, q)

    def dot(a: Tensor, c: Tensor) -> Tensor:
        return torch.mul(a, c, out=scratch).sum(-1, keepdim=True)

    goal, rho = tol * _norm(b), dot(r, z)
    active = ~(_norm(r) <= goal)
    iterations = active.new_zeros(active.shape, dtype=torch.int64)
    for _ in range(max_iterations):
        if not bool(active.any()):
            break
        iterations += active
        product.set()
        alpha = _ratio(rho, dot(p, q), active)
        x.addcmul_(alpha, p)
        r.addcmul_(alpha, q, value=-1)
        active = active & ~(_norm(r) <= goal)
        inverse(r, z)
        previous, rho = rho, dot(r, z)
        p.mul_(_ratio(rho, previous, active)).add_(z)
    return _solved("cg", matrix, b, x, iterations, tol, active)


SOLVERS = {"bicgstab": bicgstab, "cg": conjugate_gradients}


def _solve(
    method: str,
    matrix: Stencil,
    b: Tensor,
    tol: float,
    max_iterations: int,
) -> Solution:
    """Solve A x = b from the initial guess b, on a CPU block by block, so that a solver's dozen arrays stay cached."""
    parts, x = [], torch.empty_like(b)
    for place in blocks(b, CACHE_BYTES // 2):
        part = SOLVERS[method](matrix.part(*place), b[place], b[place], tol, max_iterations)
        x[place] = part.x
        parts.append((place, part))
    if len(parts) == 1:
        return parts[0][1]
    iterations, residuals = b.new_zeros(b.shape[:2], dtype=torch.int64), b.new_zeros(b.shape[:2])
    for place, part in parts:
        iterations[place], residuals[place] = part.iterations, part.residuals
    return Solution(x, iterations, residuals)


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True)


def _ratio(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    """Return a / b, and 0 outside `where` and where b is 0, so that the update leaves those systems unchanged."""
    return torch.where(where & (b != 0), a / b, 0)


def _solved(
    name: str, matrix: Stencil, b: Tensor, x: Tensor, iterations: Tensor, tol: float, active: Tensor
) -> Solution:
    size = _norm(b)
    residuals = _ratio(_norm(b - matrix.flat_product(x)), size, size > 0)[..., 0]
    if bool(active.any()):
        raise UserError(
            f"{name} did not reach the relative residual {tol:g} in {int(iterations.max())} iterations (worst "
            f"{float(residuals.max()):.2g}); take smaller steps, float64, a larger tol or more max_iterations"
        )
    return Solution(x, iterations[..., 0], residuals)


# --- in time ----------------------------------------------------------------------------------------------------------


def implicit_euler(
    stencil: Stencil,
    u: Tensor,
    times: Sequence[float],
    num_steps: int | Sequence[int] = 10,
    step_size: float | None = None,
    method: str = "bicgstab",
    tol: float = 1e-6,
    max_iterations: int = 1000,
) -> ImplicitEvolution:
    """Integrate du/dt = P u by implicit Euler from time 0 through all `times`.

    Args:
        stencil: the matrix P of du/dt = P u, e.g. `drift_stencil` or ``OsmosisOperator.stencil``; symmetric for "cg".
        u: images ``(B, C, H, W)`` in the dtype of the stencil.
        times: T numbers in px^2, ascending.
        num_steps: equal steps from each time to the next, one number or T of them.
        step_size: largest step in px^2, instead of `num_steps`.
        method: "bicgstab" or "cg".
        tol: relative residual at which the solver's recursion stops. In float32 the true residual levels off near
            1e-7 (1 + 8 tau) while that of the recursion continues to fall; the `residuals` returned are the true ones.
        max_iterations: maximum number of iterations of each solve.

    Raises: UserError for invalid arguments, and for systems that do not converge.
    """
    require_choice("method", method, SOLVERS)
    symmetric = stencil.from_left is stencil.from_right and stencil.from_above is stencil.from_below
    require(method != "cg" or symmetric, "cg needs a symmetric matrix: canonical drift in whitened coordinates")
    x, images, solutions = u.flatten(-2), [], []
    matrix, before, last = stencil, 0.0, 0.0
    for time, number in zip(times, _steps(times, num_steps, step_size), strict=True):
        for _ in range(number):
            step = (time - before) / number
            if step != last:
                matrix, last = stencil.affine(-step, 1.0), step
            solutions.append(_solve(method, matrix, x, tol, max_iterations))
            x = solutions[-1].x
        images.append(x.view(u.shape))
        before = time
    none = x.new_zeros(0, *x.shape[:2])
    return ImplicitEvolution(
        torch.stack(images),
        torch.stack([s.iterations for s in solutions]) if solutions else none.long(),
        torch.stack([s.residuals for s in solutions]) if solutions else none,
    )


def _steps(times: Sequence[float], num_steps: int | Sequence[int], step_size: float | None) -> list[int]:
    """Return the number of steps to each time from the previous one."""
    lengths = [time - before for before, time in zip([0.0, *times], times, strict=False)]
    require(all(length >= 0 for length in lengths), f"times must be ascending numbers >= 0 px^2, got {list(times)}")
    if step_size is not None:
        require(
            step_size > 0 and math.isfinite(step_size), f"step_size must be a positive number of px^2, got {step_size}"
        )
        numbers = [math.ceil(length / step_size - 1e-9) for length in lengths]
    else:
        numbers = list(num_steps) if isinstance(num_steps, Sequence) else [num_steps] * len(lengths)
        ok = len(numbers) == len(lengths) and all(isinstance(n, int) and n >= 1 for n in numbers)
        require(ok, f"num_steps must be a whole number >= 1, or one for each of {len(lengths)} times, got {num_steps}")
    return [number if length > 0 else 0 for number, length in zip(numbers, lengths, strict=True)]


def steady_state(
    stencil: Stencil,
    u: Tensor,
    tol: float = 1e-6,
    max_steps: int = 40,
    max_iterations: int = 1000,
    fixed: Tensor | None = None,
) -> Tensor:
    """Return the limit of du/dt = P u, by implicit Euler steps, each a hundred times the last, until convergence.

    Args:
        stencil: P, any drift, in float64.
        u: start ``(B, C, H, W)``, float64; it determines the mean intensity, and otherwise only the number of steps.
        tol: largest relative change |u^{k+1} - u^k| / |u^k| of the last step.
        max_steps: maximum number of steps. Their size stops growing at 1e8 px^2.
        max_iterations: maximum number of iterations of each solve, which is preconditioned by multigrid.
        fixed: bool ``(B | 1, C | 1, H, W)``, pixels held at their values (Dirichlet data); None for none. With them
            the mean intensity is not preserved.

    Raises: UserError, with the last change, if it does not converge.
    """
    start, held = u.flatten(-2), None if fixed is None else fixed.flatten(-2)
    steady = torch.empty_like(start)
    for place in blocks(start, CACHE_BYTES // 2):
        part = None if held is None else cut(held, *place)
        steady[place] = _solve_steady(stencil.part(*place), start[place], tol, max_steps, max_iterations, part)
    return steady.view(u.shape)


def _solve_steady(
    stencil: Stencil, start: Tensor, tol: float, max_steps: int, max_iterations: int, fixed: Tensor | None
) -> Tensor:
    x, step, change = start, 10.0, math.inf
    slowest = (max(stencil.height, stencil.width) / math.pi) ** 2
    p = stencil if fixed is None else without_rows(stencil, fixed)
    for _ in range(max_steps):
        inverse = multigrid(stencil, step, x, fixed)
        after = bicgstab(p.affine(-step, 1.0), x, x, 0.01 * tol, max_iterations, inverse).x
        norm = _norm(x)
        change = float(_ratio(_norm(after - x), norm, norm > 0).max())
        x = after
        if change <= tol and step > slowest:
            return x
        step = min(100 * step, 1e8)
    raise UserError(f"no steady state: after {max_steps} steps an image still changes by {change:.2g} (tol {tol:g})")


def without_rows(p: Stencil, fixed: Tensor) -> Stencil:
    """Return P with rows of zeros for fixed pixels, whose values then never change."""
    free = (~fixed).to(p.diagonal.dtype)
    return Stencil(
        p.diagonal * free,
        p.from_right * free,
        p.from_left * free.roll(-1, -1),
        p.from_below * free,
        p.from_above * free.roll(-p.width, -1),
        p.height,
        p.width,
    )
