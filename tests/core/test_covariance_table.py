"""The measured variance of a network's error: what is measured, the table that keeps it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.covariance import ErrorVariance, denoiser_digest, hats, knots_of
from dpm_scales.denoisers import BaseDenoiser, Denoiser
from dpm_scales.editing import Consistent, Mask, Resampling, restore
from dpm_scales.guidance import Autoguidance, ClassifierFreeGuidance
from dpm_scales.models.instantiate import build
from dpm_scales.priors import GaussianPrior
from dpm_scales.processes import VP, Blurring, Homogeneous, OsmosisDiffusion, Process, Spectral
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Ancestral, DPMSolver, Heun, Sampler, UniPC, auto_sampler
from dpm_scales.samplers.measuring import measure_error_variance, measured_scales
from dpm_scales.schedules import PowerLaw, Rectified, SinSquaredBlur, SpectralClock
from dpm_scales.targets import Clean, NextScale
from support.oracles import (
    H,
    OracleDenoiser,
    TinyNetwork,
    W,
    close,
    curves,
    float64,
    gaussian_data,
    generator,
    images,
    named,
    refused,
)
from support.reference import Array, eigenvalues

OPTIMAL = "optimal"


def table(ratio: float, denoiser: BaseDenoiser) -> ErrorVariance:
    """The same r everywhere, for the denoiser's weights."""
    digest, rows, columns = denoiser_digest(denoiser.state_dict()), float64([0.0, 0.7]), float64([0.0, 0.4, 0.9])
    return ErrorVariance(
        float64([0.1, 1.0]), rows, columns, torch.full((2, 2, 3), ratio, dtype=torch.float64), digest, 2, 0
    )


PROCESSES: dict[str, Callable[[], Process]] = {
    "vp": lambda: VP(8),
    "blurring": lambda: Blurring(8, blur=SinSquaredBlur(3.0)),
    "coloured": lambda: Spectral(8, color=PowerLaw(0.5)),
    "rectified": lambda: Spectral(8, Rectified()),
    "clocked": lambda: Spectral(8, clock=SpectralClock(2.0)),
}


@pytest.mark.parametrize("process", PROCESSES)
def test_a_table_of_zeros_changes_no_bit_and_others_all_images(process: str) -> None:
    """float32, through `sample`, from the same noise; also where a clock stands still, and without any signal left."""
    denoiser = Denoiser(TinyNetwork(), PROCESSES[process](), Clean())
    denoiser.process.bind_size((H, W))

    def sampled(sampler: Sampler, ratio: float) -> Tensor:
        denoiser.error_variance = table(ratio, denoiser)
        return sampler.sample(denoiser, GaussianPrior(), CounterRNG(3, 4), (1, H, W))

    for make in (
        lambda c: Ancestral(4, covariance=c),
        lambda c: DDIM(0.4, 4, covariance=c),
        lambda c: DPMSolver(1.0, 4, "uniform", covariance=c),
    ):
        published, nothing, something = (
            sampled(make(None), 1.0),
            sampled(make(OPTIMAL), 0.0),
            sampled(make(OPTIMAL), 1.0),
        )
        assert torch.equal(nothing, published)
        assert something.isfinite().all() and ((something - published).abs().flatten(1).amax(1) > 1e-4).all()


# --- measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "known"), [("vp-cosine", False), ("blurring", True), ("inverse-heat-0.1", True)])
def test_the_measured_error_of_the_wiener_estimate_is_its_closed_form(name: str, known: bool) -> None:
    """2000 images, each frequency in turn; what is stored is relative to a spectrum, known or not.

    Between the scales of the table the tolerance is that of straight lines, where the spectrum is not known.
    """
    twin, data = named(name)[0], gaussian_data()
    x, mu = data.sample(2000, seed=5), torch.from_numpy(eigenvalues(H, W))
    denoiser = OracleDenoiser(twin, data)
    denoiser.spectrum.double().std.fill_(float(x.std()))
    if known:
        denoiser.spectrum.fit([(x - x.mean((-2, -1), keepdim=True), x.mean((-2, -1)))])
    measured = measure_error_variance(denoiser, [(x, None)], seed=1)
    scales = measured.scales.tolist()
    assert len(scales) == min(32, twin.num_scales) and scales[-1] == 1.0
    for t in (scales[0], scales[len(scales) // 2], sum(scales[-3:-1]) / 2, scales[-1]):
        v = measured(denoiser.process, denoiser.spectrum, float64(t), mu)
        assert v.shape == (1, 1, H, W)
        off = np.abs(np.log(v[0, 0].numpy() / data.uncertainty(*curves(twin, t))))
        # a variance from n squares has a relative error of sqrt(2 / n), 3 %
        assert np.median(off) < 0.04 and off.max() < 0.13


@pytest.mark.parametrize("size", [(H, W), (20, 34)])
def test_at_the_scales_of_the_table_the_errors_of_all_frequencies_sum_to_the_measured_one(
    size: tuple[int, int],
) -> None:
    """Of an estimate that is always 0, the squared norm of the images: Parseval, to rounding, however many knots."""

    class Nothing(OracleDenoiser):
        def predict_mean(self, y_t: Tensor, *_: object, **__: object) -> Tensor:
            return torch.zeros_like(y_t)

    denoiser, x = Nothing(named("blurring")[0], gaussian_data()), images(7, 2, *size)
    v = measure_error_variance(denoiser, [(x, None)])
    assert v.ratio.shape[1:] == tuple(min(side, 16) for side in size)
    mu = torch.from_numpy(eigenvalues(*size))
    found = v(denoiser.process, denoiser.spectrum, v.scales, mu).sum((-2, -1))[:, 0]
    close(found, np.full(len(v.scales), float(x.square().sum((-2, -1)).mean())), 1e-12)


def test_measuring_depends_on_image_and_seed_and_not_on_the_batches() -> None:
    denoiser, x = Denoiser(TinyNetwork(), VP(5), Clean()), images(6, 1, H, W).float()
    counts: list[int] = []
    whole = measure_error_variance(denoiser, [(x, None)], 4, counts.append)
    parts = measure_error_variance(denoiser, [(x[:4], None), (x[4:], None)], 4)
    other = measure_error_variance(denoiser, [(x, None)], 5)
    close(parts.ratio, whole.ratio, 0, 1e-6)  # the network rounds to float32
    assert float((other.ratio / whole.ratio).log().abs().max()) > 1e-2
    assert counts == [6] * 5 and (whole.num_images, whole.seed) == (6, 4)
    assert whole.weights_sha256 == denoiser_digest(denoiser.state_dict())


def test_labels_reach_the_network() -> None:
    denoiser, x = Denoiser(TinyNetwork(), VP(5), Clean()), images(6, 1, H, W).float()
    plain, labelled = (measure_error_variance(denoiser, [(x, n)]) for n in (None, torch.arange(6)))
    assert not torch.equal(plain.ratio, labelled.ratio)


def test_scales_are_evenly_spaced_in_logsnr_and_under_constant_noise_in_t() -> None:
    zero = float64([0.0])
    process = VP()
    steps = process.log_snr(measured_scales(process), zero).flatten().diff()
    close(steps, np.full(31, float(steps.mean())), 1e-6)
    heat = named("inverse-heat-0.1")[0].build()
    assert (measured_scales(heat) * heat.num_scales).round().tolist() == (
        measured_scales(heat) * heat.num_scales
    ).tolist()
    assert measured_scales(VP(1)).tolist() == [1.0]


# --- the table --------------------------------------------------------------------------------------------------------


def test_r_is_linear_in_t_and_bilinear_in_the_frequencies_and_constant_beyond_its_ends() -> None:
    denoiser = Denoiser(TinyNetwork(), VP(10), Clean())
    ratio = torch.rand(3, 2, 3, generator=generator(2), dtype=torch.float64)
    axes = (float64([0.2, 0.5, 1.0]), float64([0.0, 0.5]), float64([0.0, 0.1, 0.6]))
    made, one = (ErrorVariance(*axes, values, "00" * 32, 2, 0) for values in (ratio, torch.ones_like(ratio)))
    mu = torch.from_numpy(eigenvalues(4, 5))  # frequencies 0, 0.25, 0.5, 0.75 and 0, 0.2, 0.4, 0.6, 0.8

    def r(t: Tensor) -> Array:
        found, linear = (v(denoiser.process, denoiser.spectrum, t, mu) for v in (made, one))
        return (found / linear)[:, 0].numpy()

    def expected(table: Tensor) -> Array:
        rows = np.stack([np.interp([0, 0.25, 0.5, 0.75], [0, 0.5], column) for column in table.T.numpy()], 1)
        return np.stack([np.interp([0, 0.2, 0.4, 0.6, 0.8], [0, 0.1, 0.6], row) for row in rows])

    close(r(float64(0.3))[0], expected(ratio[0] * 2 / 3 + ratio[1] / 3))
    close(r(float64(0.5))[0], expected(ratio[1]))
    close(
        r(float64([0.1, 0.75, 1.0])),
        np.stack([expected(ratio[0]), expected((ratio[1] + ratio[2]) / 2), expected(ratio[2])]),
    )


@pytest.mark.parametrize("size", [1, 2, 16, 17, 40, 300])
def test_knots_are_all_frequencies_of_a_small_side_and_few_of_a_large_one(size: int) -> None:
    knots = knots_of(size)
    assert len(knots) == min(size, 16) and knots[0] == 0 and float(knots[-1]) == pytest.approx((size - 1) / size)
    k = torch.arange(size, dtype=torch.float64)
    close(hats(knots, size).sum(1), np.ones(size))
    close(hats(knots, size) @ knots, k / size, 1e-12)  # straight lines stay straight
    assert hats(knots, size).sum(0).min() > 0.2  # every knot has its share of an image's frequencies
    if size <= 16:
        assert torch.equal(hats(knots, size), torch.eye(size, dtype=torch.float64))
    close(hats(knots, 2 * size)[-1], hats(knots, size)[-1])  # of a larger image: constant beyond


def test_a_table_survives_its_tensors_and_is_no_weight() -> None:
    denoiser = Denoiser(TinyNetwork(), VP(10), Clean())
    before = denoiser.state_dict().keys()
    made = measure_error_variance(denoiser, [(images(3, 1, H, W).float(), None)], seed=7)
    denoiser.error_variance = made
    again = ErrorVariance.from_tensors({k: v.clone() for k, v in made.to_tensors().items()}, "here")
    assert torch.equal(again.ratio, made.ratio) and again.record() == made.record() and again.seed == 7
    again.require_weights(denoiser)
    assert denoiser.state_dict().keys() == before
    assert denoiser.half().error_variance.ratio.dtype == torch.float64  # type: ignore[union-attr]
    with refused("measured with other weights", "measure it again"):
        made.require_weights(denoiser)


def test_other_tensors_are_refused_with_their_file() -> None:
    denoiser = Denoiser(TinyNetwork(), VP(10), Clean())
    good = table(1.0, denoiser).to_tensors()
    for change, words in [
        ({"ratio": good["ratio"][:1]}, ("scales (2,)", "rows (2,)", "columns (3,)", "ratio (1, 2, 3)")),
        ({"ratio": good["ratio"].float()}, ("no table",)),
        ({"ratio": good["ratio"] - 2}, ("below 0",)),
        ({"ratio": good["ratio"] * float("nan")}, ("no numbers",)),
        ({"rows": good["rows"].flip(0)}, ("its rows do not ascend",)),
        ({"scales": good["scales"] * 2}, ("its scales leave (0, 1]",)),
        ({"columns": good["columns"] + 0.1}, ("do not begin at 0",)),
        ({"weights_sha256": good["weights_sha256"][:3]}, ("weights_sha256 (3,)",)),
        ({"seed": good["ratio"]}, ("x.safetensors",)),
    ]:
        with refused("x.safetensors", *words):
            ErrorVariance.from_tensors({**good, **change}, "x.safetensors")
    with refused("x.safetensors", "'seed' is missing"):
        ErrorVariance.from_tensors({k: v for k, v in good.items() if k != "seed"}, "x.safetensors")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_models_without_such_an_error_are_refused() -> None:
    x = images(2, 1, 4, 4).float()
    for process, target, words in [
        (OsmosisDiffusion(4), Clean(), ("DCT", "OsmosisDiffusion", "eigenvectors of its own")),
        (VP(4), NextScale(), ("target=finer", "clean image")),
        (Homogeneous(4), Clean(), ("Homogeneous has no noise",)),
    ]:
        denoiser = Denoiser(TinyNetwork(), process, target)
        with refused(*words):
            measure_error_variance(denoiser, [(x, None)])
        with refused(*words):
            Ancestral(covariance=OPTIMAL).check(denoiser)
    with refused("no images"):
        measure_error_variance(Denoiser(TinyNetwork(), VP(4), Clean()), [])


def test_a_model_without_its_own_table_is_refused() -> None:
    denoiser, sampler = Denoiser(TinyNetwork(), VP(4), Clean()), DDIM(0.5, 3, covariance=OPTIMAL)
    with refused("does not hold", "dpm-scales measure MODEL", "model.measure_covariance(images)"):
        sampler.check(denoiser)
    denoiser.error_variance = table(1.0, denoiser)
    sampler.check(denoiser)
    with torch.no_grad():
        next(denoiser.network.parameters()).mul_(1.01)
    with refused("measured with other weights"):
        sampler.check(denoiser)
    Ancestral().check(denoiser)


def test_guidance_takes_the_table_of_its_model() -> None:
    denoiser = Denoiser(TinyNetwork(), VP(4), Clean())
    denoiser.error_variance = table(1.0, denoiser)
    other = Denoiser(TinyNetwork(), denoiser.process, Clean())
    for guided in (ClassifierFreeGuidance(denoiser, 2, 2.0), Autoguidance(denoiser, other, 2.0)):
        Ancestral(3, covariance=OPTIMAL).check(guided)
        assert guided.error_variance is denoiser.error_variance


def test_bad_arguments_are_refused() -> None:
    with refused("covariance", "'best'", "optimal"):
        Ancestral(covariance="best")
    with refused("variance=transition", "leave one of them out"):
        Ancestral(variance="transition", covariance=OPTIMAL)
    with refused("eta=0 is the probability flow", "sampler.eta=1"):
        DPMSolver(0.0, covariance=OPTIMAL)
    for kind in (Heun, UniPC):  # deterministic, and no family with noise at its other end
        with refused("unknown option 'sampler.covariance'"):
            build({"_target_": f"dpm_scales.samplers.{kind.__name__}", "covariance": OPTIMAL}, Sampler, "sampler")


def test_noise_is_drawn_after_the_start_also_by_ddim_at_eta_0() -> None:
    assert DDIM(0.0, covariance=OPTIMAL).is_random and not DDIM(0.0).is_random
    assert not Heun().is_random and not UniPC().is_random


def test_auto_takes_a_sampler_that_has_a_covariance() -> None:
    for process in (VP(20), Blurring(20)):
        denoiser = Denoiser(TinyNetwork(), process, Clean())
        chosen = auto_sampler(denoiser, 5, covariance=OPTIMAL)
        assert isinstance(chosen, DPMSolver) and (chosen.eta, chosen.steps, chosen.covariance) == (1.0, 5, OPTIMAL)


def test_restoring_an_image_refuses_it() -> None:
    """Estimates that are bent towards a given image have less error than was measured."""
    denoiser = Denoiser(TinyNetwork(), VP(4), Clean())
    denoiser.error_variance = table(1.0, denoiser)
    known = torch.ones(H, W, dtype=torch.bool)
    bent = Consistent(denoiser, Mask(known), images(1, 1, H, W).float(), 0.0)
    sampler = Resampling(Ancestral(3, covariance=OPTIMAL), 1)
    with refused("guided towards the given image", "leave sampler.covariance out"):
        restore(bent, sampler, float64([1.0, 0.5, 0.0]), CounterRNG(0, 1), (1, H, W))
