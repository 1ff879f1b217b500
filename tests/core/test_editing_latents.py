"""Images into the scales and back: noised, encoded, mixed, and with shared noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dpm_scales.editing import BranchingNoise, between, context_of, encode, nearest_blur, noised, scales_from, slerp
from dpm_scales.processes import VP, Blurring, InverseHeat, InverseOsmosis, Osmosis, OsmosisDiffusion
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Ancestral
from dpm_scales.schedules import SinSquaredBlur
from dpm_scales.targets import Clean
from support.oracles import (
    BY_NAME,
    NOISY_MEMBERS,
    H,
    OracleDenoiser,
    ScriptedNoise,
    TinyNetwork,
    W,
    close,
    float64,
    gaussian_data,
    generator,
    images,
    named,
    over,
    pretended_gpu,
    refused,
    with_target,
)
from support.oracles import (
    noised as twin_noised,
)
from support.reference import Twin, cosine_log_snr, log_snr_curve, sin_squared_blur

MANY = 80  # scales, no fewer than steps: before the first one the noise vanishes
FLOWS = [
    Twin("vp", lambda: VP(MANY), MANY, log_snr_curve(cosine_log_snr, MANY)),
    Twin(
        "blurring",
        lambda: Blurring(MANY, blur=SinSquaredBlur(4.0)),
        MANY,
        log_snr_curve(cosine_log_snr, MANY),
        sin_squared_blur(4.0),
        "continuous",
        0.001,
    ),
]


def there_and_back(twin: Twin, steps: int, refine: int, start: float = 1.0) -> float:
    """Largest error of an image that was encoded and decoded, with the ideal denoiser of Gaussian data."""
    data = gaussian_data(H, W)
    denoiser = OracleDenoiser(twin, data)
    x = data.sample(2, seed=1)
    scales = torch.linspace(start, 0, steps + 1, dtype=torch.float64)
    y = encode(denoiser, x, scales, refine=refine)
    back = DDIM(0.0).reverse(denoiser, y, CounterRNG(0, 2), scales=scales)
    return float((back - x).abs().max())


# --- the flow upwards -------------------------------------------------------------------------------------------------


@over(FLOWS)
def test_the_explicit_inversion_s_error_falls_with_the_steps(twin: Twin) -> None:
    errors = [there_and_back(twin, steps, refine=0) for steps in (8, 24, 72)]
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0], errors


@over(FLOWS)
def test_the_fixed_point_is_the_inverse_of_the_very_steps(twin: Twin) -> None:
    """So that an image comes back nearer and nearer, with the number of steps unchanged; of small steps, where the
    iteration is a contraction."""
    explicit, few, many = (there_and_back(twin, 40, refine, start=0.75) for refine in (0, 3, 8))
    assert few < 0.1 * explicit and many < 0.02 * explicit, (explicit, few, many)


def test_gaussian_data_are_encoded_as_their_whitened_selves() -> None:
    """The flow of Gaussian data under VP is linear: y_t - a_t m = sqrt(a_t^2 v + gamma_t^2) / sqrt(v) (x - m)."""
    from support.oracles import coefficients, curves, pixels

    twin, data = BY_NAME["vp-cosine"], gaussian_data(H, W)
    x = data.sample(2, seed=1)
    scales = torch.linspace(0.8, 0, 201, dtype=torch.float64)
    y = encode(OracleDenoiser(twin, data), x, scales, refine=1)
    signal, noise = curves(twin, 0.8)
    ratio = np.sqrt((signal**2 * data.variance + noise**2) / data.variance)
    expected = pixels(signal * data.mean + ratio * (coefficients(x.numpy()) - data.mean))
    close(y, expected, atol=0.02 * np.abs(expected).max())


# --- marginals --------------------------------------------------------------------------------------------------------


@over(named(*NOISY_MEMBERS))
def test_noised_is_the_marginal(twin: Twin) -> None:
    x, noise = images(2, 1, H, W), torch.randn(2, 1, H, W, generator=generator(), dtype=torch.float64)
    found = noised(twin.build(), x, float64(0.6), ScriptedNoise([noise]))
    close(found, twin_noised(twin, x, noise, 0.6))


@pytest.mark.parametrize("process", ["vp-cosine", "blurring", "inverse-heat"])
def test_from_nearly_no_scale_an_image_comes_back(process: str) -> None:
    """As `from` falls to k = 1 what returns is the image but for the noise that is there."""
    twin, data = BY_NAME[process], gaussian_data(H, W)
    denoiser, x = OracleDenoiser(twin, data), data.sample(40, seed=1)
    distances = []
    for start in (1.0, 0.5, 1e-9):
        scales = scales_from(Ancestral(), denoiser.process, start)
        y = noised(denoiser.process, x, scales[0], CounterRNG(0, 40))
        back = Ancestral().reverse(denoiser, y, CounterRNG(1, 40), scales=scales)
        distances.append(float((back - x).square().mean().sqrt()))
    noise = float(denoiser.process.noise_scale(1 / twin.num_scales, torch.zeros(1, dtype=torch.float64)))
    assert distances[2] <= 1.2 * noise + 0.05 and distances[2] < distances[1] < distances[0], (distances, noise)


def test_scales_start_at_the_nearest_multiple() -> None:
    process = VP(num_scales=10)
    close(scales_from(Ancestral(), process, 0.52), [0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    close(scales_from(Ancestral(5), process, 0.5), [0.5, 0.4, 0.2, 0.0])
    close(scales_from(Ancestral(), process, 1e-6), [0.1, 0.0])
    close(scales_from(Ancestral(), process, 1.0), Ancestral().scales(process))


def test_nearest_blur() -> None:
    process = InverseHeat(num_scales=50)
    assert process.blur is not None
    for wanted in (0.4, 3.0, 17.0, 1000.0):
        t, sigma = nearest_blur(process, wanted)
        every = [math.sqrt(2 * float(process.blur(float64(k / 50)))) for k in range(1, 51)]
        best = min(every, key=lambda s: abs(s - wanted))
        assert sigma == pytest.approx(best) and math.sqrt(2 * float(process.blur(float64(t)))) == pytest.approx(best)
    with refused("VP does not blur"):
        nearest_blur(VP(), 1.0)


def test_contexts_are_those_of_the_images() -> None:
    x = images(3, 1, 8, 6)
    assert context_of(VP(), x, CounterRNG(0, 3)) is None
    process = OsmosisDiffusion(num_scales=4)
    context = context_of(process, x, CounterRNG(0, 3))
    assert isinstance(context, torch.Tensor) and context.shape == x.shape
    again = context_of(process, x[1:], CounterRNG(0, 2, 1))
    close(context[1:], again)
    grey = (x.mean((-2, -1)) + 1) / 2
    close(context.mean((-2, -1)), grey, atol=0.06)
    with refused("guidance_image=other", "nothing to edit"):
        context_of(OsmosisDiffusion(num_scales=4, guidance_image="other"), x, CounterRNG(0, 3))


def test_every_process_with_a_guidance_image_gets_one() -> None:
    for process in (InverseOsmosis(num_scales=4), OsmosisDiffusion(num_scales=4)):
        assert isinstance(process, Osmosis)
        assert context_of(process, images(2, 3, 8, 6), CounterRNG(0, 2)) is not None


# --- in between -------------------------------------------------------------------------------------------------------


def test_slerp() -> None:
    """On the sphere, at equal angles; straight between parallel images."""
    a, b = (torch.randn(1, 1, H, W, generator=generator(i), dtype=torch.float64) for i in range(2))
    a, b = a / a.norm(), b / b.norm()
    weights = torch.linspace(0, 1, 6, dtype=torch.float64)
    path = slerp(a.expand(6, -1, -1, -1), b.expand(6, -1, -1, -1), weights)
    close(path.flatten(1).norm(dim=1), np.ones(6)), close(path[0], a[0]), close(path[-1], b[0])
    whole = math.acos(float((a * b).sum()))
    close(torch.acos((path[:-1] * path[1:]).sum((-3, -2, -1))), np.full(5, whole / 5))
    half = float64([0.25])
    close(slerp(a, a, half), a)
    close(slerp(a, 3 * a, half), 1.5 * a)


@pytest.mark.parametrize("process", ["vp-cosine", "blurring"])
def test_between_starts_and_ends_in_the_latents(process: str) -> None:
    built = BY_NAME[process].build()
    x, y = [images(2, 1, H, W, seed=i) for i in range(2)], [images(2, 1, H, W, seed=i) for i in (3, 4)]
    ends, latents, t = (x[0], x[1]), (y[0], y[1]), float64(0.6)
    close(between(built, ends, latents, t, float64([0.0, 1.0]), None), torch.stack([y[0][0], y[1][1]]), atol=1e-9)
    # what is left of the images goes straight: no noise, no arc
    means = [built.operator().apply(built.signal(t), v) for v in x]
    middle = between(built, ends, (means[0], means[1]), t, float64([0.5, 0.5]), None)
    close(middle, (means[0] + means[1]) / 2)


# --- shared noise -----------------------------------------------------------------------------------------------------


def test_noise_is_shared_down_to_a_branch() -> None:
    noise = BranchingNoise(3, 6, 0, group=3)
    common, plain = noise.normal((2, 2), torch.float64), CounterRNG(3, 2).normal((2, 2), torch.float64)
    close(common, plain.repeat_interleave(3, 0), atol=0, rtol=0)
    noise.shared = False
    own = noise.normal((500,), torch.float64)
    correlation = np.corrcoef(own.numpy()) - np.eye(6)
    assert np.abs(correlation).max() < 0.2
    # what the group has drawn is not drawn again by its first sample
    fresh = CounterRNG(3, 6)
    first, second = fresh.normal((500,), torch.float64), fresh.normal((500,), torch.float64)
    close(own, second, atol=0, rtol=0)
    assert float((own - first).abs().min(1).values.max()) > 0


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 4], [5, 2]])
def test_shared_noise_does_not_depend_on_batches(sizes: list[int]) -> None:
    """Groups of three, of which batches may cut any."""
    whole, first = BranchingNoise(1, 7, 0, group=3), 0
    draws = [whole.normal((4,)), whole.uniform((2,))]
    whole.shared = False
    draws.append(whole.normal((4,)))
    for size in sizes:
        part = BranchingNoise(1, size, first, group=3)
        found = [part.normal((4,)), part.uniform((2,))]
        part.shared = False
        found.append(part.normal((4,)))
        for expected, got in zip(draws, found, strict=True):
            assert torch.equal(expected[first : first + size], got)
        first += size


def test_samples_that_share_their_start_share_their_low_frequencies() -> None:
    """Under blur: of what differs in the end, the lowest frequencies have little; all of it without sharing."""
    denoiser = OracleDenoiser(BY_NAME["inverse-heat"], gaussian_data(H, W))
    x = images(1, 1, H, W).expand(200, -1, -1, -1)
    scales = Ancestral().scales(denoiser.process)

    def results(shared: bool) -> torch.Tensor:
        noise = BranchingNoise(0, 200, 0, group=200)
        noise.shared = shared
        y = noised(denoiser.process, x, scales[0], noise)
        noise.shared = False
        return Ancestral().reverse(denoiser, y, noise, scales=scales)

    from support.oracles import coefficients

    together, apart = (coefficients(results(shared).numpy()).std(0)[0] for shared in (True, False))
    assert together[0, 0] < 0.2 * apart[0, 0]
    assert together[-1, -1] == pytest.approx(apart[-1, -1], rel=0.2)


def test_nothing_waits_for_the_device() -> None:
    process = Blurring(num_scales=8, blur=SinSquaredBlur(1.0))
    denoiser = with_target(BY_NAME["blurring"], Clean(), TinyNetwork())
    with pretended_gpu(denoiser, process):
        x = torch.rand(2, 1, 4, 2, device="cuda")
        scales = torch.linspace(1, 0, 3, dtype=torch.float64, device="cuda")
        y = encode(denoiser, x, scales, refine=1)
        weight = torch.rand(2, device="cuda")
        noise = BranchingNoise(0, 2, 0, 2, device="cuda")
        y = between(denoiser.process, (x, x), (y, y), scales[0], weight, None) + noise.normal((1, 4, 2))
        assert DDIM(1.0).reverse(denoiser, y, noise, scales=scales).device.type == "cuda"
        assert noised(process, x, scales[0], noise).device.type == "cuda"
