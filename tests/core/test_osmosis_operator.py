"""f(L) of the osmosis operator against the eigenvectors of dense matrices, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpm_scales.errors import UserError
from dpm_scales.operators import Decay, HeatOperator, OsmosisOperator, SpectralFunction, chebyshev
from support.osmosis_twins import SIZES, guidance_images, images, means, white_function

BATCHES = [(2, 3), (1, 3), (2, 1), (1, 1)]

#: a function for torch, the same for numpy, and a degree that is enough for 1e-12
FUNCTIONS: dict[str, tuple[SpectralFunction, Callable[[Any], Any], int]] = {
    "heat": (lambda mu: torch.exp(-3 * mu), lambda mu: np.exp(-3 * mu), 40),
    "long heat": (lambda mu: torch.exp(-60 * mu), lambda mu: np.exp(-60 * mu), 140),
    "rational": (lambda mu: 1 / (0.5 + mu), lambda mu: 1 / (0.5 + mu), 80),
    "1 / ratio": (
        lambda mu: 1 / (0.999 * torch.exp(-2 * mu) + 0.001),
        lambda mu: 1 / (0.999 * np.exp(-2 * mu) + 0.001),
        130,
    ),
    "polynomial": (lambda mu: mu**2 - 0.3, lambda mu: mu**2 - 0.3, 2),
    "cosine": (torch.cos, np.cos, 30),
    "constant": (lambda mu: torch.full((1, 1), 0.7, dtype=torch.float64), lambda mu: np.full_like(mu, 0.7), 1),
}


def float64(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- f(L) -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_apply_is_the_function_of_the_dense_matrix(name: str, height: int, width: int) -> None:
    f, dense, degree = FUNCTIONS[name]
    v, y = guidance_images(2, 3, height, width), images(2, 3, height, width) - 0.5
    result = OsmosisOperator(v, degree).apply(f, y)
    scale = max(1.0, float(np.abs(dense(np.linspace(0, 8, 99))).max()))
    torch.testing.assert_close(result, white_function(dense, v, y), atol=1e-11 * scale, rtol=0)


@pytest.mark.parametrize("batch", BATCHES)
def test_one_guidance_image_may_serve_samples_and_channels(batch: tuple[int, int]) -> None:
    v, y = guidance_images(*batch, 4, 5), images(2, 3, 4, 5)
    f, dense, degree = FUNCTIONS["rational"]
    op = OsmosisOperator(v, degree)
    torch.testing.assert_close(op.apply(f, y), white_function(dense, v, y), atol=1e-11, rtol=0)
    torch.testing.assert_close(op.to_pixels(y), y * (v / means(v)).sqrt(), atol=1e-13, rtol=0)


@pytest.mark.parametrize("constant", [False, True])
def test_apply_takes_one_function_per_sample(constant: bool) -> None:
    v, y, c = guidance_images(3, 2, 5, 4), images(3, 2, 5, 4), float64([0.0, 0.5, 9.0])

    def f(mu: Tensor) -> Tensor:
        return 1 + c.reshape(-1, 1, 1, 1) if constant else torch.exp(-c.reshape(-1, 1, 1, 1) * mu)

    result = OsmosisOperator(v, 80).apply(f, y)
    for b, value in enumerate(c.tolist()):
        expected = white_function(
            lambda mu, v=value: np.full_like(mu, 1 + v) if constant else np.exp(-v * mu), v[b : b + 1], y[b : b + 1]
        )
        torch.testing.assert_close(result[b : b + 1], expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("floor", [0.0, 0.001, 0.3])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_decay(floor: float, timed: bool, per_sample: bool) -> None:
    v, y = guidance_images(3, 2, 5, 4), images(3, 2, 5, 4)
    log_scale = float64([-0.1, 0.0, -2.0] if per_sample else -0.7)
    time = float64([0.0, 0.6, 9.0] if per_sample else 0.6) if timed else None
    result = OsmosisOperator(v, 80).apply(Decay(log_scale, time, floor), y)
    for b in range(3):
        scale = math.exp(log_scale[b] if per_sample else log_scale)
        T = 0.0 if time is None else float(time[b] if per_sample else time)
        expected = white_function(
            lambda mu, scale=scale, T=T: scale * ((1 - floor) * np.exp(-mu * T) + floor), v[b : b + 1], y[b : b + 1]
        )
        torch.testing.assert_close(result[b : b + 1], expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    "names", [["heat"], ["constant"], ["heat", "constant"], ["rational", "cosine", "constant", "polynomial", "heat"]]
)
@pytest.mark.parametrize(("height", "width"), [(5, 4), (1, 6), (1, 1)])
def test_combine_and_apply_all_are_sums_and_lists_of_dense_functions(names: list[str], height: int, width: int) -> None:
    v = guidance_images(2, 3, height, width)
    op = OsmosisOperator(v, 90)
    ys = [images(2, 3, height, width, seed=i) - 0.3 for i in range(len(names))]
    parts = [white_function(FUNCTIONS[name][1], v, y) for name, y in zip(names, ys, strict=True)]
    combined = op.combine(*((FUNCTIONS[name][0], y) for name, y in zip(names, ys, strict=True)))
    torch.testing.assert_close(combined, torch.stack(parts).sum(0), atol=1e-10, rtol=0)
    several = op.apply_all([FUNCTIONS[name][0] for name in names], ys[0])
    for name, result in zip(names, several, strict=True):
        torch.testing.assert_close(result, white_function(FUNCTIONS[name][1], v, ys[0]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_constant_guidance_is_the_heat_operator_with_the_discrete_spectrum(name: str, height: int, width: int) -> None:
    f, _, degree = FUNCTIONS[name]
    y = images(2, 3, height, width)
    op = OsmosisOperator(torch.full((1, 1, height, width), 200.0, dtype=torch.float64), degree)
    heat = HeatOperator("discrete")
    torch.testing.assert_close(op.apply(f, y), heat.apply(f, y), atol=1e-9, rtol=0)
    torch.testing.assert_close(op.combine((f, y), (f, 2 * y)), heat.combine((f, 3 * y)), atol=3e-9, rtol=0)
    assert torch.equal(op.eigenvalues(height, width), heat.eigenvalues(height, width))


@settings(deadline=None, max_examples=30)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 999),
    first=st.floats(0, 5),
    second=st.floats(0, 5),
)
def test_functions_compose_and_are_linear_and_self_adjoint(
    height: int, width: int, seed: int, first: float, second: float
) -> None:
    op = OsmosisOperator(guidance_images(2, 1, height, width, seed=seed), 60)
    y, w = images(2, 1, height, width, seed=seed) - 0.5, images(2, 1, height, width, seed=seed + 1)

    def heat(time: float) -> Decay:
        return Decay(float64(0.0), float64(time))

    together = op.apply(heat(first + second), y)
    torch.testing.assert_close(op.apply(heat(first), op.apply(heat(second), y)), together, atol=1e-11, rtol=0)
    mixed = 2 * op.apply(heat(first), y) - op.apply(heat(first), w)
    torch.testing.assert_close(op.apply(heat(first), 2 * y - w), mixed, atol=1e-12, rtol=0)
    left, right = (op.apply(heat(first), y) * w).sum((-2, -1)), (y * op.apply(heat(first), w)).sum((-2, -1))
    torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


def test_mean_grey_value_is_exact_at_any_degree() -> None:
    """f(0) = 1 keeps sum(sqrt(v) y) = sum(x), even where the expansion is far too short for f."""
    v, x = guidance_images(2, 3, 9, 8), images(2, 3, 9, 8)
    op = OsmosisOperator(v, 3)
    f = Decay(float64(0.0), float64(500.0))
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 3e-7)):
        y = op.to_white(x.to(dtype))
        for result in (op.apply(f, y), op.combine((f, y / 2), (f, y / 2)), op.apply_all([f, f], y)[1]):
            torch.testing.assert_close(means(op.to_pixels(result)).double(), means(x), atol=tolerance, rtol=0)


# --- coordinates ------------------------------------------------------------------------------------------------------


def test_white_coordinates_are_those_of_normalised_guidance_of_any_scale() -> None:
    v, x = guidance_images(2, 3, 5, 4), images(2, 3, 5, 4)
    for scale in (1.0, 255.0):
        op = OsmosisOperator(scale * v)
        root = (v / means(v)).sqrt()
        torch.testing.assert_close(op.to_white(x), x / root, atol=1e-10, rtol=1e-12)
        torch.testing.assert_close(op.to_pixels(op.to_white(x)), x, atol=1e-13, rtol=0)
        expected = np.log(root.numpy()).sum((-2, -1))
        np.testing.assert_allclose(op.log_volume().numpy(), expected, atol=1e-10)
    assert op.log_volume().shape == (2, 3) and (op.log_volume() <= 0).all()


def test_noise_that_is_white_in_y_has_variance_v_in_pixels() -> None:
    v = guidance_images(1, 1, 2, 3, dark=0)
    op = OsmosisOperator(v)
    noise = torch.randn(40000, 1, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    variance = op.to_pixels(noise).var(0)[0] / (v / means(v))[0, 0]
    assert (variance - 1).abs().max() < 5 * math.sqrt(2 / 40000)


# --- numbers, batches, gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_images_keep_their_number_format(dtype: torch.dtype, tolerance: float) -> None:
    v, y = guidance_images(2, 3, 8, 7), images(2, 3, 8, 7, dtype=dtype)
    op = OsmosisOperator(v, 60)
    f, dense, _ = FUNCTIONS["heat"]
    exact = white_function(dense, v, y.double())
    results = [op.apply(f, y), *op.apply_all([f, f], y)]
    results.append(op.combine((f, y), (lambda mu: torch.zeros(1, 1, dtype=torch.float64), y)))
    for result in results:
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), exact, atol=tolerance, rtol=0)


def test_batches_are_cut_to_the_cache_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    v, y, c = guidance_images(5, 3, 6, 7), images(5, 3, 6, 7), torch.linspace(0, 2, 5).double()

    def f(mu: Tensor) -> Tensor:
        return torch.exp(-c.reshape(-1, 1, 1, 1) * mu)

    def results(v: Tensor) -> list[Tensor]:
        op = OsmosisOperator(v, 50)
        return [op.apply(f, y), *op.apply_all([f, torch.cos], y), op.combine((f, y), (torch.cos, y.flip(0)))]

    for guidance in (v, v[:1], v[:, :1]):
        whole = results(guidance)
        for size in (1, 2 * 42 * 8 + 9, 2 * 3 * 42 * 8 + 9):  # by channel, by two channels, by two samples
            monkeypatch.setattr(chebyshev, "CACHE_BYTES", size)
            for cut, expected in zip(results(guidance), whole, strict=True):
                assert torch.equal(cut, expected)
        monkeypatch.undo()


def test_a_sample_does_not_depend_on_the_batch_it_is_in() -> None:
    v, y = guidance_images(4, 2, 6, 7), images(4, 2, 6, 7, dtype=torch.float32)
    f = FUNCTIONS["heat"][0]
    whole = OsmosisOperator(v, 50).apply(f, y)
    for b in range(4):
        assert torch.equal(OsmosisOperator(v[b : b + 1], 50).apply(f, y[b : b + 1]), whole[b : b + 1])


def test_views_are_taken() -> None:
    v, y = guidance_images(2, 2, 6, 7), images(2, 2, 7, 12)
    op, view = OsmosisOperator(v, 50), y.mT[:, :, ::2]
    f = FUNCTIONS["heat"][0]
    assert torch.equal(op.apply(f, view), op.apply(f, view.contiguous()))
    assert torch.equal(op.matvec(view), op.matvec(view.contiguous()))


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_flow_to_images_and_functions(per_sample: bool) -> None:
    y = images(2, 2, 2, 3).requires_grad_()
    w = images(2, 2, 2, 3, seed=1).requires_grad_()
    time = float64([0.4, 1.2] if per_sample else 0.4).requires_grad_()
    scale = float64(-0.3).requires_grad_()
    op = OsmosisOperator(guidance_images(2, 2, 2, 3), 12)

    def apply(y: Tensor, time: Tensor, scale: Tensor) -> Tensor:
        return op.apply(Decay(scale, time, 0.1), y)

    def combine(y: Tensor, w: Tensor, time: Tensor) -> Tensor:
        return op.combine((Decay(float64(0.0), time), y), (torch.cos, w), (lambda mu: time.mean().reshape(1, 1), y))

    def apply_all(y: Tensor, time: Tensor) -> Any:
        return tuple(op.apply_all([Decay(float64(0.0), time), lambda mu: 1 / (1 + mu * time.mean()), torch.cos], y))

    assert torch.autograd.gradcheck(apply, (y, time, scale))
    assert torch.autograd.gradcheck(combine, (y, w, time))
    assert torch.autograd.gradcheck(apply_all, (y, time))


def test_gradients_keep_no_basis_images() -> None:
    """What is remembered for the gradient does not grow with the degree."""

    def kept(degree: int) -> int:
        sizes = []
        op, y = OsmosisOperator(guidance_images(1, 1, 8, 8), degree), images(1, 1, 8, 8).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            op.apply(torch.cos, y)
        return sizes.count(64)

    assert kept(8) == kept(200) > 0


# --- devices and mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
def test_everything_stays_on_the_device_and_nothing_waits_for_it(per_sample: bool) -> None:
    with FakeTensorMode():
        v, y = torch.rand(4, 3, 6, 9, device="cuda"), torch.rand(4, 3, 6, 9, device="cuda")
        time = torch.rand(4 if per_sample else (), device="cuda").double()
        op, f = OsmosisOperator(v, 8), Decay(torch.zeros_like(time), time, 0.01)
        results = [op.apply(f, y), *op.apply_all([f, torch.cos, lambda mu: mu[:, :1] + 1], y)]
        results += [op.combine((f, y), (torch.cos, y)), op.to_pixels(op.to_white(y)), op.matvec(y)]
        for result in results:
            assert result.device.type == "cuda" and result.shape == y.shape
        assert op.log_volume().device.type == op.eigenvalues(6, 9, y.device).device.type == "cuda"


def test_the_pretended_gpu_notices_mixed_devices() -> None:
    with FakeTensorMode(), pytest.raises(Exception, match="device"):
        OsmosisOperator(torch.rand(1, 1, 6, 9, device="cuda"), 8).apply(torch.cos, torch.rand(1, 1, 6, 9))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_functions_on_a_gpu_are_those_on_the_cpu() -> None:
    v, y = guidance_images(3, 2, 9, 8), images(3, 2, 9, 8)
    f = Decay(float64([-0.1, 0.0, -1.0]), float64([0.5, 2.0, 9.0]), 0.01)
    g = Decay(f.log_scale.cuda(), float64([0.5, 2.0, 9.0]).cuda(), 0.01)
    expected, actual = OsmosisOperator(v).apply(f, y), OsmosisOperator(v.cuda()).apply(g, y.cuda())
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"guidance_image": torch.zeros(1, 1, 4, 5)}, ["positive", "from 0 to 0", "clip"]),
        ({"guidance_image": torch.linspace(-1, 1, 20).reshape(1, 1, 4, 5)}, ["positive", "from -1 to 1"]),
        ({"guidance_image": torch.full((1, 1, 4, 5), math.nan)}, ["finite", "nan"]),
        ({"guidance_image": torch.tensor([[[1.0, math.inf]]])}, ["finite", "inf"]),
        ({"guidance_image": torch.ones(4, 5)}, ["(B, C, H, W)", "(4, 5)"]),
        ({"guidance_image": torch.ones(1, 1, 0, 5)}, ["not empty", "(1, 1, 0, 5)"]),
        ({"guidance_image": torch.ones(1, 1, 4, 5, dtype=torch.uint8)}, ["float dtype", "torch.uint8"]),
        ({"guidance_image": [[1.0]]}, ["(B, C, H, W)", "list"]),
        ({"guidance_image": torch.ones(1, 1, 4, 5, requires_grad=True)}, ["detach()"]),
        ({"degree": 0}, ["degree", ">= 1", "0"]),
        ({"degree": 3.5}, ["degree", "whole number", "3.5"]),
        ({"degree": True}, ["degree", "True"]),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        OsmosisOperator(**({"guidance_image": torch.ones(1, 1, 4, 5)} | arguments))
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (3, 3, 4, 5), (2, 1, 4, 5), (2, 4, 4, 5), (4, 5), (3, 4, 5)])
def test_images_that_do_not_fit_the_guidance_are_refused(shape: tuple[int, ...]) -> None:
    op, x = OsmosisOperator(torch.ones(2, 3, 4, 5)), torch.ones(shape)
    calls: list[Callable[[], Any]] = [
        lambda: op.matvec(x),
        lambda: op.apply(torch.cos, x),
        lambda: op.apply_all([torch.cos], x),
        lambda: op.combine((torch.cos, torch.ones(2, 3, 4, 5)), (torch.cos, x)),
        lambda: op.to_white(x),
        lambda: op.to_pixels(x),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"do not fit a guidance image of shape \(2, 3, 4, 5\)"):
            call()


def test_guidance_of_three_axes_is_one_for_all_samples() -> None:
    v, y = guidance_images(3, 4, 5), images(2, 3, 4, 5)
    assert torch.equal(OsmosisOperator(v).apply(torch.cos, y), OsmosisOperator(v[None]).apply(torch.cos, y))
    assert torch.equal(OsmosisOperator(v[:1]).apply(torch.cos, y), OsmosisOperator(v[:1, None]).apply(torch.cos, y))
