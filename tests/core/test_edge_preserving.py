"""The example of edge-preserving diffusion: weights against numpy; law, likelihood and edits against dense algebra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch

from dpm_scales.denoisers import Denoiser
from dpm_scales.editing import Consistent, Mask, context_of, restore
from dpm_scales.likelihood import FlowLikelihood, VariationalBound
from dpm_scales.operators import StencilOperator
from dpm_scales.priors import ContextPrior, auto_prior
from dpm_scales.processes import VP
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DPMSolver
from dpm_scales.schedules import ConstantNoise, CosineLogSNR, LogBlur, SinSquaredBlur
from dpm_scales.targets import Clean
from examples.edge_preserving import EdgePreserving
from support.dense_operator import DenseOperator, dense_twin
from support.oracles import TinyNetwork, close, float64, images, pretended_gpu, refused

H, W, K = 5, 6, 8


def process(**options: Any) -> EdgePreserving:
    return EdgePreserving(K, CosineLogSNR(-12, 8), SinSquaredBlur(3.0), tolerance=1e-9, **options)


def denoiser(of: EdgePreserving) -> Denoiser:
    return Denoiser(TinyNetwork(), of, Clean("scalar", clip=False)).double()


@pytest.mark.parametrize(
    ("diffusivity", "g"),
    [
        ("perona_malik", lambda s: 1 / (1 + s**2)),
        ("weickert", lambda s: 1 - np.exp(-3.31488 / np.maximum(s, 1e-9) ** 8)),
    ],
)
def test_weights_are_the_published_diffusivities(diffusivity: str, g: Callable[[Any], Any]) -> None:
    """g(|grad v|^2) by central differences on v extended by its border, averaged on edges; colours share it."""
    v = images(2, 3, H, W)
    found = process(diffusivity=diffusivity, contrast=0.2).edge_weights(v)
    for b in range(2):
        gradients = [
            scipy.ndimage.correlate1d(channel, [-0.5, 0, 0.5], axis=axis, mode="nearest")
            for channel in v[b].numpy() / 2  # [-1, 1] has twice the contrast of [0, 1]
            for axis in (0, 1)
        ]
        exact = g(np.sqrt(sum(d**2 for d in gradients)) / 0.2)
        close(found[0][b, 0].numpy(), (exact[:, 1:] + exact[:, :-1]) / 2, 1e-9)
        close(found[1][b, 0].numpy(), (exact[1:] + exact[:-1]) / 2, 1e-9)
    assert all(float(w.min()) >= 0 and float(w.max()) <= 1 for w in found)


def test_the_context_is_the_smoothed_image_and_law_that_of_the_dense_matrix() -> None:
    own, x = process(), images(2, 1, H, W)
    context = own.context(x)
    assert (
        context is not None and own.condition == "context" and own.steady_state(x.mean((-2, -1))).shape[-2:] == (1, 1)
    )
    operator = own.operator(context)
    assert isinstance(operator, StencilOperator)
    for t in (0.2, 0.7, 1.0):
        signal = own.signal(float64(t))
        close(own.marginal(x, t, context).mean.numpy(), DenseOperator(operator).apply(signal, x).numpy(), 1e-7)
    flat = own.marginal(torch.full_like(x, 0.3), 1.0, context).mean / own.signal_scale(1.0, float64([0.0]))
    close(flat.numpy(), 0.3 * np.ones(x.shape), 1e-9)


def test_bound_and_flow_are_those_of_dense_algebra() -> None:
    """Given the context, from the noise of scale 1, in float64."""
    own, x = process(), images(2, 1, H, W)
    prior = auto_prior(own)
    assert isinstance(prior, ContextPrior)
    prior.fit(images(4, 1, H, W, seed=5), own)
    for make in (
        lambda d: VariationalBound(d, prior, levels=None),
        lambda d: VariationalBound(d, prior, reverse="dissipation", draws=3, num_bands=2),
        lambda d: FlowLikelihood(d, prior, steps=5),
    ):
        ours, exact = (make(denoiser(p))(x, CounterRNG(3, 2)) for p in (own, dense_twin(own)))
        close(ours.total.numpy(), exact.total.numpy(), 1e-4, 1e-7)
        close(ours.steps.numpy(), exact.steps.numpy(), 1e-4, 1e-6)
        assert bool((ours.context == 0).all())


def test_the_start_is_noise_with_contexts_of_training_images() -> None:
    own, data = process(), images(4, 1, H, W, seed=5)
    prior = ContextPrior(noise_ratio=0.5)
    prior.fit(data, own)
    y, context = prior.sample(own, CounterRNG(0, 3000), (1, H, W), torch.float64)
    assert context is not None
    known = own.context(data.float().double())
    assert known is not None
    distances = torch.cdist(context.flatten(1), known.flatten(1))
    assert float(distances.amin(1).max()) < 1e-6 and distances.argmin(1).bincount().min() > 600
    gamma = float(own.noise_scale(1.0, float64([0.0])))
    close(float(y.square().mean()), (0.5 * gamma) ** 2, 0, 0.03)
    start, same = prior.law(own, data, CounterRNG(0, 4))
    assert same is not None and torch.equal(same, own.context(data))
    z = y[:4].flatten(1) / gamma
    expected = 2 * (z**2).sum(1) + z.shape[1] * (np.log(0.5) + 0.5 * np.log(2 * np.pi))
    close(start.negative_log_density(y[:4]).numpy(), expected.numpy(), 1e-9)
    prior.steer(data[2:], own)
    steered = prior.sample(own, CounterRNG(0, 4), (1, H, W), torch.float64)[1]
    assert steered is not None and known is not None
    close(steered.numpy(), torch.cat([known[2:], known[2:]]).numpy(), 1e-6)
    again = ContextPrior()
    again.load_state_dict(prior.state_dict())
    assert torch.equal(again.images, prior.images)


def test_a_process_that_ends_in_blur_starts_from_blurred_images_and_has_no_likelihood() -> None:
    own = EdgePreserving(K, ConstantNoise(1e-9), LogBlur(0.3, 3.0), 0.0, tolerance=1e-9)
    data, prior = images(2, 1, H, W), ContextPrior()
    prior.fit(data, own)
    prior.steer(data, own)
    y, context = prior.sample(own, CounterRNG(0, 2), (1, H, W), torch.float64)
    close(y.numpy(), own.marginal(data, 1.0, context).mean.numpy(), 1e-6)
    with refused("EdgePreserving", "no likelihood"):
        prior.law(own, data, CounterRNG(0, 2))


def test_what_the_prior_refuses() -> None:
    own, prior = process(), ContextPrior()
    with refused("ContextPrior", "VP", "prior=auto"):
        prior.check(VP(4))
    with refused("train the model first"):
        prior.sample(own, CounterRNG(0, 1), (1, H, W))
    prior.fit(images(2, 1, H, W), own)
    with refused("5x6", "6x6"):
        prior.sample(own, CounterRNG(0, 1), (1, 6, 6))
    with refused("1 channel(s)", "3"):
        prior.sample(own, CounterRNG(0, 1), (3, H, W))
    for bad in ({"contrast": 0.0}, {"guidance_sigma": -1.0}, {"diffusivity": "perona"}):
        with refused("EdgePreserving" if "diffusivity" not in bad else "diffusivity", next(iter(bad))):
            EdgePreserving(4, **bad)  # type: ignore[arg-type]


def test_inpainting_keeps_known_pixels_and_is_that_of_dense_algebra() -> None:
    own, x, known = process(), images(2, 1, H, W), torch.arange(H * W).reshape(H, W) % 3 > 0
    found = []
    for one in (own, dense_twin(own)):
        consistent = Consistent(denoiser(one), Mask(known), Mask(known).forward(x))
        scales = DPMSolver(1.0, 6, "uniform").scales(one)
        drawn = restore(
            consistent, DPMSolver(1.0, 6, "uniform"), scales, CounterRNG(2, 2), (1, H, W), dtype=torch.float64
        )
        close(drawn[..., known].numpy(), x[..., known].numpy(), 1e-9)
        found.append(drawn)
    close(found[0].numpy(), found[1].numpy(), 1e-6)
    edited = context_of(own, x, CounterRNG(0, 2))
    assert edited is not None and torch.equal(edited, own.context(x))


def test_likelihood_and_sampling_never_wait_for_the_device() -> None:
    own, prior = EdgePreserving(4, blur=SinSquaredBlur(1.0), tolerance=1e-3), ContextPrior()
    prior.fit(images(2, 1, H, W), own)
    model, sampler = Denoiser(TinyNetwork(), own, Clean()), DPMSolver(1.0, 4, "uniform")
    sampler.check(model)
    bound, scales = VariationalBound(model, prior), sampler.scales(own)
    with pretended_gpu(model, prior):
        noise = CounterRNG(0, 3, device="cuda")
        x = sampler.sample(model, prior, noise, (1, H, W), scales=scales.to("cuda"))
        assert x.device.type == "cuda" and bound(x, noise).total.device.type == "cuda"
