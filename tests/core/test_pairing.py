"""Images paired with the nearest of several noises, in the coordinates where the noise is white."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.operators import HeatOperator
from dpm_scales.processes import (
    VE,
    VP,
    Blurring,
    BlurringChain,
    Homogeneous,
    InverseHeat,
    OsmosisDiffusion,
    Process,
    Spectral,
)
from dpm_scales.processes.pairing import nearest_noise
from dpm_scales.rng import CounterRNG, white_noise
from dpm_scales.schedules import LinearTimeBlur, LowPass, PowerLaw, Rectified, SinSquaredBlur, SpectralClock
from dpm_scales.targets import Clean
from dpm_scales.training.pairing import MOST, USUAL, candidates_of
from support.oracles import Answer, TinyNetwork, close, float64, images, pretended_gpu, refused
from support.reference import Array, dct_basis, eigenvalues

H, W, BATCH, CANDIDATES = 4, 6, 7, 5
K = 20
T = float64([0.05, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0])
MU = eigenvalues(H, W)
R = np.sqrt(MU) / (2 * math.pi)


def power_law(t: float) -> Array:
    return np.asarray((R + 0.05) ** 0.9)


def unit(w: Array) -> Array:
    return np.asarray(w / np.sqrt((w**2).mean()))


#: a process, and w_t(mu) by numpy
CASES: dict[str, tuple[Callable[[], Process], Callable[[float], Array]]] = {
    "vp": (lambda: VP(K), lambda t: np.ones((1, 1))),
    "blurring": (lambda: Blurring(K, blur=SinSquaredBlur(2.0)), lambda t: np.ones((1, 1))),
    "clocked": (lambda: VP(K, clock=SpectralClock(1.0)), lambda t: np.ones((1, 1))),
    "power-law": (lambda: Spectral(K, Rectified(), color=PowerLaw(0.9)), lambda t: unit(power_law(t))),
    "published": (lambda: VP(K, color=PowerLaw(0.9, energy="published")), power_law),
    "heat": (
        lambda: InverseHeat(K, blur=LinearTimeBlur(2.0), color=PowerLaw(0.9)),
        lambda t: unit(power_law(t)),
    ),
    "low-pass": (lambda: Spectral(K, Rectified(), color=LowPass(0.2)), lambda t: np.exp(-0.2 * MU * (1 - t))),
}


def drawn(number: int = CANDIDATES) -> list[Array]:
    """The noises that are to choose from, in their order."""
    rng, like = CounterRNG(3, BATCH), torch.zeros(BATCH, 2, H, W, dtype=torch.float64)
    return [white_noise(like, rng).numpy() for _ in range(number)]


def nearest(z: Array, noises: list[Array]) -> Array:
    """One image and one noise after another."""
    chosen = []
    for b, image in enumerate(z):
        distances = [float(((image - noise[b]) ** 2).sum()) for noise in noises]
        chosen.append(noises[int(np.argmin(distances))][b])
    return np.stack(chosen)


@pytest.mark.parametrize("name", CASES)
def test_the_noise_is_the_nearest_to_the_whitened_mean(name: str) -> None:
    """By loops in float64: |w^-1 lambda y_0 - eps|, w by its formula."""
    make, colour = CASES[name]
    process, y_0 = make(), 3 * images(BATCH, 2, H, W)
    process.bind_size((H, W))
    rows, columns = dct_basis(H), dct_basis(W)
    u, mu = rows @ y_0.numpy() @ columns.T, torch.from_numpy(MU)
    signal = [process.signal_scale(float(t), mu).numpy() for t in T]
    weights = [np.broadcast_to(colour(float(t)), (H, W)) for t in T]
    z = np.stack([rows.T @ (s / w * one) @ columns for s, w, one in zip(signal, weights, u, strict=True)])
    found = nearest_noise(process, process.operator(), y_0, T, CounterRNG(3, BATCH), CANDIDATES)
    close(found, nearest(z, drawn()), 0, 0)
    plain = np.stack([rows.T @ (s * one) @ columns for s, one in zip(signal, u, strict=True)])
    colored = not all(np.allclose(w, 1) for w in weights)
    assert (np.abs(nearest(plain, drawn()) - found.numpy()).max() > 0) == colored
    # and the weights are those of the process's noise
    for t, w in zip(T.tolist(), weights, strict=True):
        if process.clock is None:
            noise = process.noise_scale(t, mu).numpy() / w
            close(noise, np.full_like(noise, noise.flat[0]), 1e-12)


def test_the_noise_of_a_chain_is_whitened_too() -> None:
    """It has no colour of its own; what it keeps of each step's noise differs between frequencies."""
    process, mu = BlurringChain(K, blur=LinearTimeBlur(3.0)), torch.from_numpy(MU)
    for t in (0.1, 0.5, 1.0):
        noise = process.noise_scale(t, mu)
        assert float(noise.max() / noise.min()) > (1.5 if t > 0.1 else 1.0)
        close(process.white_signal(t)(mu), process.signal_scale(t, mu) / (noise / noise[0, 0]), 1e-12)


def test_colored_osmosis_is_whitened_by_its_own_operator() -> None:
    """w(L) of the whitened mean is lambda(L) y_0."""
    process = OsmosisDiffusion(8, blur=LinearTimeBlur(2.0), color=LowPass(0.2), guidance_noise=0.3)
    x, t = images(3, 1, H, W), float64([0.3, 0.6, 1.0])
    operator = process.operator(process.context(x, torch.Generator().manual_seed(0)))
    color, y_0 = process.color, operator.to_white(x)
    assert color is not None
    z = operator.apply(process.white_signal(t), y_0)
    back = operator.apply(lambda mu: color.log(t.reshape(-1, 1, *(1,) * mu.ndim), mu).exp(), z)
    close(back, operator.apply(process.signal(t), y_0), 1e-4, 1e-4)
    found = nearest_noise(process, operator, y_0, t, CounterRNG(0, 3), 4)
    rng = CounterRNG(0, 3)
    close(found, nearest(z.numpy(), [white_noise(y_0, rng).numpy() for _ in range(4)]), 0, 0)


def test_one_candidate_is_no_choice() -> None:
    process, x = VP(K, color=PowerLaw(0.5)), images(BATCH, 1, H, W)
    found = nearest_noise(process, HeatOperator(), x, T, CounterRNG(0, BATCH), 1)
    assert torch.equal(found, white_noise(x, CounterRNG(0, BATCH)))
    denoiser = Denoiser(TinyNetwork().double(), process, Clean())
    plain, one, more = (
        denoiser.loss(x, T, generator=CounterRNG(0, BATCH), **options)
        for options in ({}, {"candidates": 1}, {"candidates": 8})
    )
    assert torch.equal(plain, one) and not torch.equal(plain, more)


def test_the_network_is_shown_the_image_with_the_noise_chosen() -> None:
    process, x = Spectral(K, Rectified(), color=PowerLaw(0.9)), images(BATCH, 2, H, W)
    process.bind_size((H, W))
    network = Answer(torch.zeros_like(x))
    Denoiser(network, process, Clean("none", clip=False, scale_input=False)).loss(
        x, T, generator=CounterRNG(3, BATCH), candidates=4
    )
    noise = nearest_noise(process, process.operator(), x, T, CounterRNG(3, BATCH), 4)
    ((seen, _, _),) = network.seen
    close(seen, process.perturb(x, T, noise, process.operator()), 1e-12)


def test_along_the_image_the_noise_is_the_largest_of_k_normal_numbers() -> None:
    """For images far out; the rest of the noise stays standard normal."""
    number, k = 3000, 8
    y_0 = 300 * images(1, 1, H, W, seed=2).expand(number, 1, H, W)
    noise = nearest_noise(VE(K), VE(K).operator(), y_0, 0.5, CounterRNG(0, number), k)
    along = (noise * y_0).flatten(1).sum(1) / y_0.flatten(1).norm(dim=1)

    def density(x: float) -> float:
        return float(x * k * scipy.stats.norm.pdf(x) * scipy.stats.norm.cdf(x) ** (k - 1))

    expected, _ = scipy.integrate.quad(density, -10, 10)
    assert float(along.mean()) == pytest.approx(expected, abs=5 * float(along.std()) / math.sqrt(number))
    assert expected == pytest.approx(1.42, abs=0.01)
    rest = noise.flatten(1) - along[:, None] * torch.nn.functional.normalize(y_0.flatten(1), dim=1)
    squares = rest.square().sum(1)
    assert float(squares.mean()) == pytest.approx(H * W - 1, abs=5 * float(squares.std()) / math.sqrt(number))


def test_ranks_choose_what_one_process_chooses() -> None:
    process, x = VP(K, color=PowerLaw(0.9)), 3 * images(BATCH, 1, H, W).float()
    whole = nearest_noise(process, HeatOperator(), x, T, CounterRNG(1, BATCH, 20), 6)
    for rank in range(2):
        part = x[rank::2]
        rng = CounterRNG(1, len(part), 20 + rank, stride=2)
        assert torch.equal(nearest_noise(process, HeatOperator(), part, T[rank::2], rng, 6), whole[rank::2])


@pytest.mark.parametrize("make", [lambda: VP(K, color=PowerLaw(0.9)), lambda: Blurring(K)])
def test_choosing_never_waits_for_the_device(make: Callable[[], Process]) -> None:
    denoiser = Denoiser(TinyNetwork(), make(), Clean())
    with pretended_gpu(denoiser):
        x, t = torch.randn(4, 1, H, W, device="cuda"), torch.rand(4, device="cuda", dtype=torch.float64)
        loss: Tensor = denoiser.loss(x, t, generator=CounterRNG(0, 4, device="cuda"), candidates=3)
        assert loss.shape == (4,) and loss.device.type == "cuda"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("near", None, VP(K)), ("unknown training.pairing 'near'", "did you mean 'nearest'")),
        (("nearest", 0, VP(K)), ("training.candidates", ">= 1", "got 0")),
        (("nearest", 1.5, VP(K)), ("training.candidates", "whole number", "1.5")),
        (("nearest", MOST + 1, VP(K)), ("training.candidates", f"<= {MOST}")),
        (("nearest", "many", VP(K)), ("training.candidates", "'many'")),
        (("none", 4, VP(K)), ("training.candidates=4", "training.pairing=nearest")),
        (("nearest", None, Homogeneous(K)), ("training.pairing=nearest", "Homogeneous has none")),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, int | None, Process], words: tuple[str, ...]) -> None:
    with refused(*words):
        candidates_of(*arguments)


def test_options() -> None:
    assert candidates_of("none", None, Homogeneous(K)) == 1
    assert candidates_of("nearest", None, VP(K)) == USUAL and candidates_of("nearest", 3, VP(K)) == 3
