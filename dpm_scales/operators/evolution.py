r"""The osmosis filter: u(t) = exp(tP) u(0) for a guidance image v, at all times in one sweep.

    u(t) = m v + V^{1/2} exp(-tL) V^{-1/2} (u(0) - m v),    m = mean(u(0)) / mean(v)

m v is the steady state, Eq. (49), Peter 2024. The rest is a Chebyshev expansion on [0, 8] whose terms all times share:
about sqrt(8 t_max ln(4 / tol)) products with L, no inner products, and no synchronisation with the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from dpm_scales.errors import UserError, require, require_choice
from dpm_scales.operators.chebyshev import Coefficients, expand, heat_coefficients
from dpm_scales.operators.expanded import working_dtype
from dpm_scales.operators.implicit import implicit_euler
from dpm_scales.operators.osmosis import OsmosisOperator

METHODS = ("chebyshev", "bicgstab", "cg")

Times = Sequence[float] | Sequence[Sequence[float]] | Tensor


def evolve(
    u: Tensor,
    guidance_image: Tensor,
    times: Times,
    method: str = "chebyshev",
    tol: float = 1e-6,
    num_steps: int | Sequence[int] | None = None,
    step_size: float | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Evolve images by osmosis with canonical drift and reflecting boundaries, Eq. (46)-(49), Peter 2024.

    Args:
        u: images >= 0, ``(B, C, H, W)``, any float dtype.
        guidance_image: v > 0, ``(B | 1, C | 1, H, W)`` or ``(C | 1, H, W)``; its scale does not matter.
        times: T ascending times >= 0 in px^2, the same for all samples; or ``(T, B)`` with a column of ascending times
            for each sample ("chebyshev" only). Reading them from a tensor on a device waits for it.
        method: "chebyshev", exact in time; "bicgstab", implicit Euler, the published scheme; "cg", the same solved by
            conjugate gradients. See `implicit_euler` for general drift, and for iterations and residuals.
        tol: "chebyshev": the omitted terms are below tol / 10 times u(0) - m v in the norm sum u^2 / v; the resulting
            error of any pixel stays below tol times the largest pixel, even for dark v; rounding adds to it, see
            below. "bicgstab", "cg": the relative residual of each system; their error in time depends on the steps.
        num_steps: for "bicgstab" and "cg", equal steps from each time to the next: one number (default 10), or T.
        step_size: for "bicgstab" and "cg", largest step in px^2, instead of `num_steps`.
        validate: whether to check the values of u and v, which waits for the device; None checks them on the CPU only.

    Returns: ``(T, *u.shape)``, same dtype. Every method leaves errors of the size of `tol` or of rounding. So that they
    neither make an image negative nor change its mean intensity, values below 0 are set to 0 and each image channel is
    then rescaled to the mean of u.

    Rounding in float32 (and half precision, which is computed in it) grows with the time and with the contrast of v.
    Largest pixel error of "chebyshev", relative to the largest pixel, for tol 1e-6 and 24 x 31 pixels, a third of them
    at the smallest v:

        t in px^2     1       10      100     1000    10000
        v >= 1e-2     2e-7    5e-7    7e-7    6e-7    4e-7
        v >= 1e-6     3e-7    2e-6    1e-5    5e-5    3e-4

    In float64 all of these stay below tol; cast u to it where dark guidance and long times need more digits.

    Raises: UserError for invalid arguments, and for systems that do not converge.
    """
    require_choice("method", method, METHODS)
    ok = isinstance(tol, float) and 1e-12 <= tol < 1
    require(ok, f"evolve: tol must lie in [1e-12, 1), got {tol!r}")
    _check_images(u, validate)
    operator = OsmosisOperator(guidance_image, validate=validate)
    operator.check_images(u)
    rows = _check_times(times, u.shape[0])
    start = u.to(torch.float64)
    if method == "chebyshev":
        require(num_steps is None and step_size is None, "evolve: steps are for bicgstab and cg; chebyshev takes none")
        images = _expanded(operator, start, rows, tol, working_dtype(u.dtype))
    else:
        require(all(len(row) == 1 for row in rows), f"evolve: {method} takes the same times for all samples")
        number, shared = 10 if num_steps is None else num_steps, [row[0] for row in rows]
        images = _stepped(operator, start, shared, method, number, step_size, tol, working_dtype(u.dtype))
    return torch.stack([_conserve(image, start).to(u.dtype) for image in images])


def _expanded(
    operator: OsmosisOperator, start: Tensor, rows: list[list[float]], tol: float, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Return u at each time by one Chebyshev sweep in `dtype`; float64."""
    steady = start.mean((-2, -1), keepdim=True) * operator.guidance
    y = operator.to_white(start - steady).to(dtype).flatten(-2)
    parts = expand(operator.stencil(dtype, white=True), y, [_coefficients(row, tol, y) for row in rows])
    return (steady + operator.to_pixels(part.view(start.shape).to(torch.float64)) for part in parts)


def _stepped(
    operator: OsmosisOperator,
    start: Tensor,
    times: list[float],
    method: str,
    num_steps: int | Sequence[int],
    step_size: float | None,
    tol: float,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """Return u at each time by implicit Euler in `dtype`, in pixels, or for CG in whitened coordinates; float64."""
    if method == "cg":
        stencil, x = operator.stencil(dtype, white=True).affine(-1.0, 0.0), operator.to_white(start).to(dtype)
    else:
        stencil, x = operator.stencil(dtype), start.to(dtype)
    for image in implicit_euler(stencil, x, times, num_steps, step_size, method, tol).images:
        image = image.to(torch.float64)
        yield operator.to_pixels(image) if method == "cg" else image


def _conserve(image: Tensor, start: Tensor) -> Tensor:
    """Return images clipped at 0 and rescaled to the mean intensities of `start`."""
    image = image.clamp(min=0)
    mean = image.mean((-2, -1), keepdim=True)
    return image * torch.where(mean > 0, start.mean((-2, -1), keepdim=True) / mean, 1)


def _coefficients(row: list[float], tol: float, y: Tensor) -> Coefficients:
    """Return the coefficients, as numbers if all samples share the time, otherwise ``(B, 1, 1, K + 1)``."""
    series = [heat_coefficients(time, 0.1 * tol) for time in row]
    if len(series) == 1:
        return series[0]
    length = max(map(len, series))
    padded = [[*one, *[0.0] * (length - len(one))] for one in series]
    return torch.tensor(padded, dtype=y.dtype, device=y.device)[:, None, None]


def _check_images(u: Tensor, validate: bool | None) -> None:
    shape = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
    require(isinstance(u, Tensor) and u.ndim == 4 and u.numel() > 0, f"images must be (B, C, H, W), got {shape}")
    require(u.is_floating_point(), f"images must be of a float dtype, got {u.dtype}; convert with .float()")
    if u.device.type == "cpu" if validate is None else validate:
        low, high = (float(edge) for edge in u.detach().aminmax())
        if not (low >= 0 and math.isfinite(high)):
            raise UserError(
                f"osmosis is for finite images >= 0, got values from {low:g} to {high:g}; map them to [0, 1]"
            )


def _check_times(times: Times, batch: int) -> list[list[float]]:
    """Return the times, row by row: one number for all samples, or one for each."""
    plain: Any = times.tolist() if hasattr(times, "tolist") else times  # tensors, and numpy arrays
    rows: list[Any] = list(plain) if isinstance(plain, Sequence) and not isinstance(plain, str) else []
    require(len(rows) > 0, f"evolve: times must be a sequence of numbers in px^2, not empty, got {times!r}")
    each = isinstance(rows[0], Sequence)
    table: list[list[Any]] = [list(row) if isinstance(row, Sequence) else [row] for row in rows]
    if any(len(row) != (batch if each else 1) for row in table) or any(isinstance(r, Sequence) != each for r in rows):
        raise UserError(f"evolve: times must be (T,) numbers or (T, {batch}), one for each image, got {times!r}")
    for time in (time for row in table for time in row):
        if isinstance(time, bool) or not isinstance(time, Real) or not 0 <= float(time) < math.inf:
            raise UserError(f"evolve: times must be finite numbers >= 0 px^2, got {time!r}")
    for column in zip(*table, strict=True):
        require(sorted(column) == list(column), f"evolve: times must be ascending, got {list(column)}")
    return [[float(time) for time in row] for row in table]
