"""Straight, exploding and coloured paths on the osmosis operator, and the flow target, against dense eigenvectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpm_scales.denoisers import BaseDenoiser, Denoiser
from dpm_scales.priors import OsmosisPrior
from dpm_scales.processes import InverseOsmosis, Osmosis, OsmosisDiffusion, Spectral
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM, Ancestral, DPMSolver, Heun, Sampler, UniPC, auto_sampler
from dpm_scales.schedules import Color, EDMNoise, FlowBlur, ListedNoise, LowPass, Rectified, SinSquaredBlur
from dpm_scales.spectrum import DataSpectrum
from dpm_scales.targets import Clean, Flow
from dpm_scales.weights import FlowLoss
from support.oracles import TinyNetwork, close, float64, pretended_gpu, refused
from support.osmosis_twins import guidance_images, images, means, white_function
from support.reference import Array

SIZE = (4, 6)
EXACT = 1e-12  # tolerance of the expansion
END = 1 - 1e-4  # of t in FlowBlur

Curve = Callable[[float, Array], Array]


@dataclass(frozen=True)
class Path:
    """A process, and lambda_t(mu) and gamma_t(mu) written out."""

    make: Callable[[], Osmosis]
    signal: Curve
    noise: Curve
    #: where sampling by the flow target starts: a step must not blur by more than it can divide by
    start: float = 1.0


def flow_decay(t: float, mu: Array, floor: float = 0.001) -> Array:
    return np.asarray((1 - floor) * (1 - END * t) ** (mu / 2) + floor)


def sine_decay(t: float, mu: Array, sigma: float) -> Array:
    blur = (sigma * np.sin(np.pi * t / 2) ** 2) ** 2 / 2
    return np.asarray(0.999 * np.exp(-mu * blur) + 0.001)


def edm(t: float) -> float:
    """Return the noise of EDM's levels from 0.02 at k = 1 of 20 to 5."""
    low, high = 0.02 ** (1 / 7), 5.0 ** (1 / 7)
    return float((low + (20 * t - 1) / 19 * (high - low)) ** 7)


PATHS = {
    "flow": Path(
        lambda: OsmosisDiffusion(20, Rectified(), FlowBlur(), tolerance=EXACT),
        lambda t, mu: (1 - t) * flow_decay(t, mu),
        lambda t, mu: t + 0 * mu,
    ),
    "straight": Path(
        lambda: OsmosisDiffusion(20, Rectified(), SinSquaredBlur(2.0), tolerance=EXACT),
        lambda t, mu: (1 - t) * sine_decay(t, mu, 2.0),
        lambda t, mu: t + 0 * mu,
    ),
    "exploding": Path(
        lambda: OsmosisDiffusion(20, EDMNoise(0.02, 5.0), SinSquaredBlur(2.0), tolerance=EXACT),
        lambda t, mu: sine_decay(t, mu, 2.0),
        lambda t, mu: edm(t) + 0 * mu,
    ),
    "colored": Path(
        lambda: OsmosisDiffusion(20, Rectified(), FlowBlur(), color=LowPass(0.25), tolerance=EXACT),
        lambda t, mu: (1 - t) * flow_decay(t, mu),
        lambda t, mu: t * np.exp(-mu * 0.25 * (1 - t)),
    ),
    "inverse": Path(
        lambda: InverseOsmosis(20, Rectified(), FlowBlur(), tolerance=EXACT),
        lambda t, mu: (1 - t) * flow_decay(t, mu, 0.0),
        lambda t, mu: t + 0 * mu,
        0.9,
    ),
}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=list(PATHS))
T = [0.12, 0.53, 0.91]  # between the scales of the chain


def guidance(number: int) -> Tensor:
    return guidance_images(number, 2, *SIZE, dark=0.0)


def dense(curve: Curve, t: list[float], v: Tensor, y: Tensor) -> Tensor:
    """Return curve_t(L) y for one t per sample, from the eigenvectors of each guidance image's dense matrix."""
    each = [white_function(lambda mu, t=now: curve(t, mu), v[b : b + 1], y[b : b + 1]) for b, now in enumerate(t)]
    return torch.cat(each)


def at(path: Path, t: list[float], v: Tensor, y_0: Tensor, white: Tensor) -> Tensor:
    """Return y_t from the dense matrices."""
    return dense(path.signal, t, v, y_0) + dense(path.noise, t, v, white)


# --- the law ----------------------------------------------------------------------------------------------------------


@paths
def test_the_marginal_is_that_of_the_dense_matrices(path: Path) -> None:
    process, v, white = path.make(), guidance(3), images(3, 2, *SIZE, seed=1)
    operator = process.operator(v)
    y_0 = operator.to_white(images(3, 2, *SIZE))
    close(process.perturb(y_0, float64(T), white, operator), at(path, T, v, y_0, white), 1e-9)
    # in pixels, with v of mean one
    root = (v / means(v)).sqrt()
    x_0 = y_0 * root
    close(process.marginal(x_0, float64(T), v).mean, root * dense(path.signal, T, v, y_0), 1e-9)


@paths
def test_the_transition_is_that_of_the_dense_matrices(path: Path) -> None:
    """Mean and covariance from s to t, as matrices; they carry the marginal's covariance from s to t."""
    s, t, number = 0.31, 0.58, SIZE[0] * SIZE[1]
    process, v = path.make(), guidance_images(1, 1, *SIZE, dark=0.0)
    unit = torch.eye(number, dtype=torch.float64).reshape(number, 1, *SIZE)
    each = v.expand(number, -1, -1, -1)
    operator = process.operator(each)

    def matrix(y: Tensor) -> Array:
        return np.asarray(y.reshape(number, number).T.numpy())

    def of(curve: Callable[[Array], Array]) -> Array:
        return matrix(white_function(curve, each, unit))

    law = process.transition(operator.to_pixels(unit), s, t, each)
    rho, beta = matrix(operator.to_white(law.mean)), matrix(operator.apply(law.std, unit))
    close(rho, of(lambda mu: path.signal(t, mu) / path.signal(s, mu)), 1e-9)
    variance = of(
        lambda mu: path.noise(t, mu) ** 2 - (path.signal(t, mu) / path.signal(s, mu) * path.noise(s, mu)) ** 2
    )
    close(beta @ beta.T, variance, 1e-9)
    assert np.linalg.eigvalsh(variance).min() > 0
    before, after = (of(lambda mu, r=r: path.noise(r, mu) ** 2) for r in (s, t))
    close(rho @ before @ rho.T + beta @ beta.T, after, 1e-9)


@pytest.mark.parametrize("dark", [0.0, 0.3])
@paths
def test_a_path_leads_from_the_image_to_noise_for_any_guidance(path: Path, dark: float) -> None:
    """In float32, with pixels of v = 1e-6: finite at every scale, and at t = 1 free of the image's detail."""
    process = path.make()
    x_0, v = images(3, 1, *SIZE, dtype=torch.float32), guidance_images(3, 1, *SIZE, dark=dark)
    for t in (0.0, 0.05, 1.0):
        assert process.marginal(x_0, t, v).mean.isfinite().all()
        assert process.sample(x_0, t, context=v).isfinite().all()
    close(process.marginal(x_0, 0.0, v).mean, x_0, 1e-5)
    left = process.signal_scale(1.0, float64([0.5, 2.0, 8.0])) / process.noise_scale(1.0, float64([0.5, 2.0, 8.0]))
    assert float(left.max()) < 0.1


class Falling(Color):
    """Noise that loses its high frequencies towards t = 1."""

    is_fixed = False

    def log_shape(self, t: Tensor, mu: Tensor) -> Tensor:
        return mu * (1 - t)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OsmosisDiffusion(3, ListedNoise([0.1, 0.5, 0.3])), ("k=3 of 3", "variance -0.16", "raise the noise")),
        (
            lambda: OsmosisDiffusion(50, Rectified(), FlowBlur(), color=Falling("published")),
            ("at scale k=", "eigenvalue mu=7.9", "the noise falls"),
        ),
        (lambda: OsmosisDiffusion(50, Rectified(0.0)), ("signal_min", "(0, 1)")),
    ],
)
def test_curves_without_a_chain_are_refused(make: Callable[[], Osmosis], words: tuple[str, ...]) -> None:
    with refused(*words):
        make()


# --- the flow ---------------------------------------------------------------------------------------------------------


@paths
def test_the_flow_target_is_the_derivative_of_the_path(path: Path) -> None:
    """Against a central difference of the dense path, whose own error is below 1e-8."""
    process, target, step = path.make(), Flow(), 1e-5
    target.check(process)
    v, white = guidance(3), images(3, 2, *SIZE, seed=1)
    operator = process.operator(v)
    x_0, t = images(3, 2, *SIZE), float64(T)
    y_0 = operator.to_white(x_0)
    ahead, behind = (at(path, [now + sign * step for now in T], v, y_0, white) for sign in (1, -1))
    difference = (ahead - behind) / (2 * step)
    velocity = target.regression_target(process, operator, x_0, x_0, white, t)
    close(velocity, difference, 1e-7, 1e-7)
    # and the image at any finer scale follows from it
    y_t = at(path, T, v, y_0, white)
    for s in ([0.0, 0.0, 0.0], [0.05, 0.5, 0.6]):
        mean = target.predict_mean(process, operator, velocity, y_t, t, float64(s))
        close(mean, dense(path.signal, s, v, y_0), 1e-7)


@paths
def test_the_flow_loss_of_an_image_is_that_of_its_velocity(path: Path) -> None:
    """Weights of the error of x_0: (D / gamma)^2, with D by differences of the curves, averaged over the spectrum."""
    process, step = path.make(), 1e-6
    mu = process.operator().eigenvalues(*SIZE).numpy()
    data = DataSpectrum()
    weight = FlowLoss(max_weight=1e9)(process, process.operator(), Clean(), float64(T), data, SIZE)
    for found, t in zip(weight.flatten().tolist(), T, strict=True):
        signal_rate, noise_rate = (
            (curve(t + step, mu) - curve(t - step, mu)) / (2 * step) for curve in (path.signal, path.noise)
        )
        speed = path.signal(t, mu) * noise_rate - signal_rate * path.noise(t, mu)
        assert found == pytest.approx(((speed / path.noise(t, mu)) ** 2).mean(), rel=1e-6)


class Informed(BaseDenoiser):
    """Predicts the velocity of one known path, as a network with `target=flow` would."""

    def __init__(self, path: Path, y_0: Tensor, white: Tensor, v: Tensor) -> None:
        super().__init__()
        self.process, self.target, self.spectrum = path.make(), Flow(), DataSpectrum()
        self.y_0, self.white, self.v = y_0, white, v

    def predict_mean(
        self, y_t: Tensor, t: Tensor, s: Tensor, context: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        operator = self.process.operator(context)
        x_0 = operator.to_pixels(self.y_0)
        velocity = self.target.regression_target(self.process, operator, x_0, x_0, self.white, t)
        return self.target.predict_mean(self.process, operator, velocity, y_t, t, s)


SOLVERS: dict[str, Callable[[], Sampler]] = {
    "ddim": lambda: DDIM(0.0),
    "dpmpp": lambda: DPMSolver(0.0),
    "unipc": lambda: UniPC(2),
    "heun": lambda: Heun(grid="uniform"),
}


@pytest.mark.parametrize("solver", SOLVERS)
@paths
def test_solvers_follow_the_path_of_a_known_velocity_back_to_the_image(path: Path, solver: str) -> None:
    v, white = guidance(2), images(2, 2, *SIZE, seed=1)
    y_0 = path.make().operator(v).to_white(images(2, 2, *SIZE))
    denoiser, scales = Informed(path, y_0, white, v), float64([path.start, 0.7, 0.5, 0.3, 0.1, 0.0])
    operator = denoiser.process.operator(v)
    start = at(path, [path.start] * 2, v, y_0, white)
    seen: list[Tensor] = []
    SOLVERS[solver]().reverse(denoiser, start, CounterRNG(0, 2), v, scales=scales, on_step=lambda i, x: seen.append(x))
    for s, x in zip(scales[1:].tolist(), seen, strict=True):
        expected = at(path, [s, s], v, y_0, white) if s > 0 else y_0
        close(operator.to_white(x), expected, 1e-7)


class Blind(nn.Module):
    """A network that does not see the guidance image."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyNetwork(2)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.inner(x[:, :2], t, labels)
        return out


@pytest.mark.parametrize("sampler", [Ancestral(5), DPMSolver(1.0, 5, "uniform")], ids=lambda x: type(x).__name__)
def test_constant_guidance_gives_the_flow_of_the_heat_operator(sampler: Sampler) -> None:
    """Loss and samples of `target=flow`, from the same noise."""
    network = Blind().double()
    ours = Denoiser(network, PATHS["flow"].make(), Flow()).double()
    heat = Spectral(20, Rectified(), FlowBlur(), min_decay=0.001, spectrum="discrete")
    theirs = Denoiser(network.inner, heat, Flow()).double()
    y, t = images(3, 2, *SIZE, seed=2), float64(T)
    flat = torch.full_like(y, 0.37)
    white = images(3, 2, *SIZE, seed=3)
    losses = []
    for denoiser, v in ((ours, flat), (theirs, None)):
        operator = denoiser.process.operator(v)
        x_t = operator.to_pixels(denoiser.process.perturb(operator.to_white(y), t, white, operator))
        losses.append(denoiser.target.regression_target(denoiser.process, operator, y, x_t, white, t))
    close(losses[0], losses[1], 1e-9)
    ends = [sampler.reverse(d, y, CounterRNG(0, 3), v) for d, v in ((ours, flat), (theirs, None))]
    close(ends[0].detach(), ends[1].detach(), 1e-8, 1e-8)


# --- training and devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PATHS.keys() - {"inverse"}))
def test_flow_losses_and_samples_stay_on_the_device(name: str) -> None:
    process = PATHS[name].make()
    denoiser = Denoiser(Blind(), process, Flow())
    prior = OsmosisPrior()
    prior.fit(images(5, 2, *SIZE, dtype=torch.float32), process)
    sampler = auto_sampler(denoiser, 3)
    sampler.check(denoiser)
    with pretended_gpu(denoiser, prior):
        x_0 = torch.rand(3, 2, *SIZE, device="cuda")
        assert denoiser.loss(x_0, torch.rand(3, device="cuda", dtype=torch.float64)).device.type == "cuda"
        scales = float64([1.0, 0.5, 0.25, 0.0]).cuda()
        out = sampler.sample(denoiser, prior, CounterRNG(0, 3, device="cuda"), (2, *SIZE), scales=scales)
        assert out.device.type == "cuda"


def test_blur_without_a_floor_is_learnt_by_the_image_and_the_loss_of_its_velocity() -> None:
    """The flow target would divide by what is left of high frequencies, 1e-16 at t = 1."""
    process = PATHS["inverse"].make()
    with refused("flow target divides", "1e-6 can be undone", "use target=clean"):
        auto_sampler(Denoiser(Blind(), process, Flow())).check(Denoiser(Blind(), process, Flow()))
    denoiser = Denoiser(Blind(), process, Clean())
    auto_sampler(denoiser).check(denoiser)
    loss = denoiser.loss(images(3, 2, *SIZE, dtype=torch.float32), float64(T), loss_weight=FlowLoss())
    assert loss.shape == (3,) and bool(torch.isfinite(loss).all())
