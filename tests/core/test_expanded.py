"""Expanded operators: edge weights against dense matrices; degrees that nobody announces; devices that never wait."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpm_scales.denoisers import Denoiser
from dpm_scales.editing import encode
from dpm_scales.likelihood import follow_flow
from dpm_scales.operators import (
    Degrees,
    HeatOperator,
    Operator,
    OsmosisOperator,
    PixelOperator,
    SpectralFunction,
    StencilOperator,
)
from dpm_scales.operators.degrees import ROUGH_ERROR, _guarded_series, adapted_series, kind_of
from dpm_scales.priors import Mixture
from dpm_scales.processes import Context, ExpandedProcess, InverseOsmosis, OsmosisDiffusion, StencilProcess
from dpm_scales.rng import CounterRNG, Randomness
from dpm_scales.samplers import DDIM, Ancestral, Dissipation, DPMSolver, Heun, Sampler, StepContext, UniPC
from dpm_scales.schedules import CosineLogSNR, LogBlur, SinSquaredBlur
from dpm_scales.targets import Clean, Target, Velocity
from support.dense_operator import DenseOperator, dense_twin
from support.oracles import TinyNetwork, close, float64, generator, images, pretended_gpu, refused
from support.osmosis_twins import SIZES, edges, guidance_images


def edge_weights(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw weights in [0, 1] for images of this shape, a fifth of them 0."""
    rng, (batch, channels, height, width) = generator(seed), shape
    drawn = [
        torch.rand(size, generator=rng, dtype=torch.float64).sub(0.25).clamp(min=0) / 0.75
        for size in ((batch, channels, height, width - 1), (batch, channels, height - 1, width))
    ]
    return drawn[0], drawn[1]


def summed(right: np.ndarray, down: np.ndarray) -> np.ndarray:
    """L of one image from its edges, one after another."""
    height, width = right.shape[0], down.shape[1]
    matrix = np.zeros((height * width,) * 2)
    for i, j in edges(height, width):
        row, column = divmod(i, width)
        w = right[row, column] if j == i + 1 and column + 1 < width else down[row, column]
        matrix[[i, j], [i, j]] += w
        matrix[[i, j], [j, i]] -= w
    return matrix


class Uneven(StencilProcess):
    """Weights exp(-3 |difference of neighbours|) of the image itself."""

    def __init__(self, num_scales: int = 12, tolerance: float = 1e-9) -> None:
        super().__init__(
            num_scales,
            CosineLogSNR(-8, 8),
            SinSquaredBlur(3.0),
            min_decay=0.01,
            value_range=(-1, 1),
            tolerance=tolerance,
        )

    def context(self, x_0: Tensor, generator: Randomness = None) -> Context:
        return x_0

    def edge_weights(self, context: Tensor) -> tuple[Tensor, Tensor]:
        right, down = (torch.exp(-3 * context.diff(dim=dim).abs()) for dim in (-1, -2))
        return right, down


PROCESSES: list[Callable[[], ExpandedProcess]] = [
    Uneven,
    lambda: OsmosisDiffusion(12, blur=SinSquaredBlur(3.0), tolerance=1e-9),
]


# --- the operator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("batch", [(2, 3), (1, 3), (2, 1)])
def test_the_stencil_is_the_matrix_summed_edge_by_edge(height: int, width: int, batch: tuple[int, int]) -> None:
    right, down = edge_weights(*batch, height, width)
    dense = StencilOperator(right, down).dense().numpy()
    for b in range(batch[0]):
        for c in range(batch[1]):
            close(dense[b, c], summed(right[b, c].numpy(), down[b, c].numpy()), 1e-14)
            assert np.linalg.eigvalsh(dense[b, c]).max() <= 8


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_functions_are_those_of_the_dense_matrix(height: int, width: int) -> None:
    """apply, apply_all and combine, of one function and of several, for each sample and channel its own weights."""
    op, c = StencilOperator(*edge_weights(3, 2, height, width), degrees=Degrees(1e-11)), float64([0.0, 0.4, 30.0])
    exact, y, w = DenseOperator(op), images(3, 2, height, width), images(3, 2, height, width, seed=1)

    def decay(mu: Tensor) -> Tensor:
        return torch.exp(-c.reshape(-1, 1, 1, 1) * mu)

    def pair(mu: Tensor) -> Sequence[Tensor]:
        return decay(mu), 1 / (0.3 + mu)

    close(op.apply(decay, y).numpy(), exact.apply(decay, y).numpy(), 1e-9)
    close(op.apply_all([torch.cos, decay], y)[1].numpy(), exact.apply(decay, y).numpy(), 1e-9)
    expected = exact.apply(decay, y) + exact.apply(lambda mu: 1 / (0.3 + mu), w) + exact.apply(torch.cos, w)
    close(op.combine((pair, [y, w]), (torch.cos, w)).numpy(), expected.numpy(), 1e-9)
    close(exact.combine((pair, [y, w]), (torch.cos, w)).numpy(), expected.numpy(), 1e-12)
    assert op.log_volume() == 0 and torch.equal(op.to_white(y), y) and torch.equal(op.to_pixels(y), y)


def test_weights_of_one_are_the_heat_operator_and_the_mean_is_kept_at_any_degree() -> None:
    y = images(2, 3, 6, 7)
    op = StencilOperator(torch.ones(1, 1, 6, 6), torch.ones(1, 1, 5, 7))
    close(op.apply(torch.cos, y).numpy(), HeatOperator("discrete").apply(torch.cos, y).numpy(), 1e-6)
    short = StencilOperator(*edge_weights(2, 3, 6, 7), degree=3).apply(lambda mu: torch.exp(-500 * mu), y)
    close(short.mean((-2, -1)).numpy(), y.mean((-2, -1)).numpy(), 1e-13)


def test_one_function_for_several_images_is_called_once_by_operators_of_a_transform() -> None:
    calls: list[int] = []

    def weights(mu: Tensor) -> Sequence[Tensor]:
        calls.append(mu.numel())
        return torch.exp(-mu), 1 / (1 + mu), torch.full((1, 1), 0.3, dtype=torch.float64)

    ys = [images(2, 1, 4, 5, seed=i) for i in range(3)]
    for op in (HeatOperator(), PixelOperator()):
        calls.clear()
        found = op.combine((weights, ys))
        assert len(calls) == 1
        expected = sum(op.apply(lambda mu, k=k: weights(mu)[k], y) for k, y in enumerate(ys))
        close(found.numpy(), expected.numpy(), 1e-14)


@pytest.mark.parametrize(
    ("right", "down", "words"),
    [
        (torch.ones(1, 1, 4, 5), torch.ones(1, 1, 4, 5), ("(1, 1, 4, 5)",)),
        (torch.ones(1, 1, 4, 4), torch.ones(2, 1, 3, 5), ("(2, 1, 3, 5)",)),
        (torch.full((1, 1, 4, 4), 1.5), torch.ones(1, 1, 3, 5), ("[0, 1]", "dissipation time")),
        (torch.ones(1, 1, 4, 4), torch.full((1, 1, 3, 5), torch.nan), ("[0, 1]",)),
        (torch.ones(1, 1, 4, 4, requires_grad=True), torch.ones(1, 1, 3, 5), ("detached",)),
    ],
)
def test_weights_that_are_refused(right: Tensor, down: Tensor, words: tuple[str, ...]) -> None:
    with refused("edge weights", *words):
        StencilOperator(right, down)


def test_images_that_do_not_fit_are_refused() -> None:
    op = StencilOperator(*edge_weights(2, 3, 4, 5))
    for shape in ((2, 3, 5, 4), (3, 3, 4, 5), (2, 1, 4, 5), (4, 5)):
        with refused("do not fit edge weights", "4x5"):
            op.apply(torch.cos, torch.ones(shape))


# --- degrees ----------------------------------------------------------------------------------------------------------

#: a function, and its bound on [0, 8]
UNANNOUNCED: list[SpectralFunction] = [
    lambda mu: torch.exp(-700 * mu),
    lambda mu: 1 / (1e-3 + (mu - 2) ** 2),
    lambda mu: torch.cos(40 * mu),
    lambda mu: mu**3,
    lambda mu: torch.exp(-mu * float64([0.01, 300.0]).reshape(2, 1, 1, 1)),
]


@pytest.mark.parametrize("f", UNANNOUNCED)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-10])
def test_any_function_is_met_to_the_tolerance(f: SpectralFunction, tolerance: float) -> None:
    y = images(2, 2, 6, 7)
    for op in (
        StencilOperator(*edge_weights(2, 2, 6, 7), degrees=Degrees(tolerance)),
        OsmosisOperator(guidance_images(2, 2, 6, 7), degrees=Degrees(tolerance)),
    ):
        error = (op.apply(f, y) - DenseOperator(op).apply(f, y)).flatten(2).norm(dim=-1)
        largest = f(torch.linspace(0, 8, 4001, dtype=torch.float64)[None]).expand(2, 1, 1, 4001).abs().amax((-2, -1))
        assert (error <= tolerance * largest * y.flatten(2).norm(dim=-1) + 1e-12 * largest).all()


def test_a_sample_has_its_own_degree_whatever_the_batch() -> None:
    right, down = edge_weights(3, 1, 6, 7)
    y, times = images(3, 1, 6, 7), float64([0.02, 3.0, 900.0])

    def decay(times: Tensor) -> SpectralFunction:
        return lambda mu: torch.exp(-times.reshape(-1, 1, 1, 1) * mu)

    whole = StencilOperator(right, down).apply(decay(times), y)
    for b in range(3):
        one = slice(b, b + 1)
        assert torch.equal(StencilOperator(right[one], down[one]).apply(decay(times[one]), y[one]), whole[one])


def test_roots_are_met_to_a_hundredth_and_steps_are_refused() -> None:
    op, y = StencilOperator(*edge_weights(2, 1, 6, 7)), images(2, 1, 6, 7)
    error = (op.apply(torch.sqrt, y) - DenseOperator(op).apply(torch.sqrt, y)).flatten(1).norm(dim=-1)
    assert 1e-6 < float((error / y.flatten(1).norm(dim=-1)).max()) < ROUGH_ERROR * 8**0.5
    with refused("changes too fast", "4096"):
        op.apply(lambda mu: (mu < 1).to(torch.float64), y)
    with refused("not finite"):
        op.apply(lambda mu: 1 / mu, y)


def test_kinds_are_told_apart_by_code_and_by_what_they_call() -> None:
    def scaled(f: SpectralFunction, by: float) -> SpectralFunction:
        return lambda mu: by * f(mu)

    def other(mu: Tensor) -> Tensor:
        return mu

    assert kind_of(scaled(other, 1.0)) == kind_of(scaled(other, 2.0)) != kind_of(scaled(lambda mu: mu, 1.0))
    process = OsmosisDiffusion(4)
    assert kind_of(process.step(0.1, 0.2).rho) == kind_of(process.step(0.5, 0.7).rho) != kind_of(other)
    assert kind_of(process.signal(0.1)) == kind_of(process.signal(0.9))


# --- whole runs against dense algebra ---------------------------------------------------------------------------------


class Own(Sampler):
    """A sampler with functions that nobody has met before."""

    def step(self, move: StepContext, y: Tensor, m: Tensor) -> Tensor:
        def sharp(mu: Tensor) -> Tensor:
            return torch.exp(-200 * mu) + 1 / (1 + 300 * (mu - 1) ** 2)

        return m + move.operator.combine((sharp, y - move.operator.apply(move.curves.rho, m)))


SAMPLERS = [
    Own(6),
    Ancestral(6),
    DDIM(0.5, 6),
    DPMSolver(1.0, 6, "uniform"),
    UniPC(3, 6, "uniform"),
    Heun(6, "uniform", variable="logsnr"),
    Heun(6, "uniform", variable="logsnr", s_churn=2.0),
    Dissipation(1.25, 6),
]


@pytest.mark.parametrize("number", range(len(SAMPLERS)), ids=lambda i: type(SAMPLERS[i]).__name__)
def test_samplers_are_those_of_dense_matrices(number: int) -> None:
    """Functions of samplers and targets that were never announced, within the tolerance of 1e-9 of each."""
    sampler, process, y = SAMPLERS[number], PROCESSES[number % 2](), images(2, 1, 5, 6)
    target: Target = Velocity() if number % 4 > 1 else Clean("scalar", clip=False)
    context = process.context(images(2, 1, 5, 6, seed=1), generator())

    def run(process: ExpandedProcess) -> Tensor:
        denoiser = Denoiser(Blind(), process, target).double()
        return sampler.reverse(denoiser, y, CounterRNG(0, 2), context)

    exact = run(dense_twin(process))
    close(run(process).numpy(), exact.numpy(), 1e-6 * float(exact.abs().max()))


class Blind(nn.Module):
    """A network that does not look at the context."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyNetwork()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.inner(x[:, :1], t, labels)
        return out


@pytest.mark.parametrize("make", PROCESSES)
def test_encoding_and_flow_are_those_of_dense_matrices(make: Callable[[], ExpandedProcess]) -> None:
    process, x = make(), images(2, 1, 5, 6)
    context = process.context(x, generator())
    found = []
    for one in (process, dense_twin(process)):
        denoiser = Denoiser(Blind(), one, Clean("scalar", clip=False)).double()
        scales, zero = DDIM(0.0, 6).scales(one), torch.zeros(2, dtype=torch.float64)
        y = encode(denoiser, x, scales, context)
        start = Mixture(one.operator(context), zero, zero[:1, None], lambda _, y: y.flatten(1).square().sum(1)[:, None])
        last, traces = follow_flow(denoiser, start, y, scales[:-1], CounterRNG(1, 2), context)
        found.append([y, last, traces])
    for ours, exact in zip(*found, strict=True):
        close(ours.numpy(), exact.numpy(), 1e-6 * float(exact.abs().max()))


# --- devices ----------------------------------------------------------------------------------------------------------


SMALL: list[Callable[[], ExpandedProcess]] = [
    lambda: Uneven(6, tolerance=1e-3),
    lambda: OsmosisDiffusion(6, blur=SinSquaredBlur(1.0), tolerance=1e-3),
    lambda: InverseOsmosis(6, blur=LogBlur(0.3, 1.0), tolerance=1e-3),
]


@pytest.mark.parametrize("number", range(len(SAMPLERS)), ids=lambda i: type(SAMPLERS[i]).__name__)
def test_a_checked_sampler_never_waits_for_the_device(number: int) -> None:
    sampler, process = SAMPLERS[number], SMALL[number % 3]()
    denoiser = Denoiser(Blind(), process, Clean())
    context = process.context(torch.rand(4, 2, 6, 9), generator())
    assert context is not None
    sampler.check(denoiser)
    degrees, before = process.degrees, dict(process.degrees._known)
    sampler.check(copy.deepcopy(denoiser))  # the same once more: nothing to learn, for a copy neither
    assert degrees._known == before
    with pretended_gpu(denoiser):
        y, v = torch.randn(4, 1, 6, 9, device="cuda"), context.to("cuda")
        scales = sampler.scales(process)[-4:].to("cuda")
        out = sampler.reverse(denoiser, y, CounterRNG(0, 4, device="cuda"), v[:, :1], scales=scales)
        assert out.device.type == "cuda" and denoiser.loss(y[:3], scales[:3], context=v[:3, :1]).device.type == "cuda"


class Choosy(Own):
    """A sampler that looks at the context, which a rehearsal lacks, after its first step."""

    def step(self, move: StepContext, y: Tensor, m: Tensor) -> Tensor:
        y = super().step(move, y, m)
        assert move.context is not None
        return y


def test_a_rehearsal_that_breaks_off_has_learnt_nothing() -> None:
    process = SMALL[0]()
    before = dict(process.degrees._known)
    Choosy(4).check(Denoiser(Blind(), process, Clean()))
    assert process.degrees._known == before and not process.degrees.rehearsed
    Own(4).check(Denoiser(Blind(), process, Clean()))
    assert len(process.degrees._known) > len(before)
    assert type(process.operator()) is HeatOperator


def test_an_unknown_function_waits_for_the_device() -> None:
    with pretended_gpu(), pytest.raises(Exception, match="_local_scalar_dense|data-dependent"):
        op = StencilOperator(torch.rand(1, 1, 6, 8, device="cuda"), torch.rand(1, 1, 5, 9, device="cuda"))
        op.apply(torch.cos, torch.rand(1, 1, 6, 9, device="cuda"))


def test_a_learnt_degree_that_is_not_enough_gives_nan() -> None:
    """What a device without waiting does, on a CPU: the series of functions whose kind was learnt."""

    def decay(time: float) -> SpectralFunction:
        return lambda mu: torch.exp(-time * mu)

    degrees = Degrees(1e-6)
    degrees.learn(decay(1.0), decay(20.0))
    known = degrees._known[kind_of(decay(1.0)), 1]
    fits, short = (_guarded_series(decay(time), known, torch.device("cpu"))[0] for time in (19.0, 400.0))
    exact = adapted_series(decay(19.0), [1e-9])[0]
    assert fits.coefficients is not None and short.coefficients is not None and exact.coefficients is not None
    number = fits.coefficients.shape[-1]
    padded = nn.functional.pad(exact.coefficients, (0, max(0, number - exact.coefficients.shape[-1])))[..., :number]
    close(fits.coefficients.numpy(), padded.numpy(), 1e-7)
    assert bool(short.coefficients.isnan().all())


def test_degrees_are_shared_by_copies_and_not_stored() -> None:
    degrees = Degrees(1e-5)
    degrees.learn(torch.cos)
    assert copy.deepcopy(degrees) is degrees
    fresh = pickle.loads(pickle.dumps(degrees))
    assert fresh.tolerance == 1e-5 and not fresh._known


def test_a_process_without_context_is_that_of_weights_one() -> None:
    process, x = Uneven(), images(2, 1, 5, 6)
    flat: Operator = process.operator(torch.zeros_like(x))
    close(process.operator().apply(torch.cos, x).numpy(), flat.apply(torch.cos, x).numpy(), 1e-8)
    with pytest.raises(TypeError, match="abstract"):
        StencilProcess(4, CosineLogSNR(), None)  # type: ignore[abstract]
