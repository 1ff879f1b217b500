"""Guidance by frequency: the curves, and the DCT as a dense matrix on rectangular colour images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpm_scales.denoisers import Denoiser
from dpm_scales.guidance import ClassifierFreeGuidance, GuidanceCurve, ListedGuidance, LowHigh
from dpm_scales.processes import VP, Blurring, InverseHeat, OsmosisDiffusion, Process, Spectral
from dpm_scales.rng import CounterRNG
from dpm_scales.samplers import DDIM
from dpm_scales.schedules import Rectified
from dpm_scales.targets import Clean, Flow, NextScale, Noise, Target, Velocity
from support.oracles import TinyNetwork, close, float64, generator, images, pretended_gpu, refused
from support.reference import Array, dct_basis

NULL, COLOURS, HEIGHT, WIDTH = 2, 3, 4, 7
STEP = LowHigh(0.5, 6.0, 0.2, 3.0)


class Same(GuidanceCurve):
    """One weight that nobody knows to be constant."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, r: Tensor) -> Tensor:
        return torch.full_like(r, self.value)


class Colours(TinyNetwork):
    """Sees three colours, and the guidance image of osmosis beside them."""

    def __init__(self) -> None:
        super().__init__(COLOURS)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        rest = x[:, COLOURS:]
        return super().forward(x[:, :COLOURS], t, labels) + (0.1 * rest if rest.shape[1] else 0)


def low_high(r: Array, low: float, high: float, cutoff: float, sharpness: float) -> Array:
    with np.errstate(divide="ignore"):
        return np.asarray(low + (high - low) / (1 + (cutoff / r) ** sharpness))


def filtered(x: Tensor, weight: Any) -> Array:
    """Apply w(r) by a dense matrix, ``(H W, H W)``, to each colour of images ``(B, C, H, W)``."""
    height, width = x.shape[-2:]
    basis = np.kron(dct_basis(height), dct_basis(width))
    k, l = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")  # noqa: E741
    w = weight(np.sqrt(k**2 + l**2) / 2).ravel()
    matrix = basis.T @ (w[:, None] * basis)
    return np.asarray(x.detach().flatten(-2).numpy() @ matrix.T).reshape(x.shape)


def test_low_high_is_the_formula() -> None:
    r = np.array([0.0, 0.01, 0.1, 0.2, 0.5, 0.7])
    for arguments in ((1.0, 3.0, 0.1, 4.0), (5.0, 0.0, 0.25, 1.0), (0.0, 1e30, 0.2, 100.0)):
        close(LowHigh(*arguments)(torch.from_numpy(r)).numpy(), low_high(r, *arguments), 1e-12, 1e-12)
    assert LowHigh(2, 5)(float64([0.0])).tolist() == [2.0]
    close(LowHigh(2, 5, 0.1)(float64([0.1, 0.2])).numpy(), [3.5, 2 + 3 * 16 / 17], 1e-14)


def test_listed_weights_are_linear_between_their_frequencies() -> None:
    r = np.array([0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7])
    listed = ListedGuidance([0, 4.0, 1], [0.05, 0.2, 0.5])(torch.from_numpy(r)).numpy()
    close(listed, np.interp(r, [0.05, 0.2, 0.5], [0, 4, 1]), 1e-15)
    even = ListedGuidance([1, 3, 2])(torch.from_numpy(r)).numpy()
    close(even, np.interp(r, [0, 0.25, 0.5], [1, 3, 2]), 1e-15)


def test_known_constants() -> None:
    assert LowHigh(3, 3).constant == 3.0 and LowHigh().constant == 1.0 and LowHigh(1, 2).constant is None
    assert ListedGuidance([2, 2]).constant == 2.0 and ListedGuidance([2, 3]).constant is None


PROCESSES: dict[str, Process] = {
    "pixels": VP(8),
    "heat": Blurring(8),
    "discrete": InverseHeat(8, spectrum="discrete"),
    "osmosis": OsmosisDiffusion(8),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_a_curve_multiplies_the_dct_of_the_images_difference(name: str) -> None:
    """At s = 0, for every operator: x_0-hat = plain + K' w(r) K (labelled - plain), to 1e-12 of the largest value."""
    process = PROCESSES[name]
    denoiser = Denoiser(Colours(), process, Clean(clip=False)).double()
    y, labels, t, s = images(2, COLOURS, HEIGHT, WIDTH), torch.tensor([0, 1]), float64(0.75), float64(0.0)
    context = process.context(y, generator())
    operator = process.operator(context)

    def estimate(denoiser: Any, labels: Tensor) -> Tensor:
        return operator.to_pixels(denoiser.predict_mean(y, t, s, context, labels)).detach()

    labelled, plain = estimate(denoiser, labels), estimate(denoiser, torch.full((2,), NULL))
    guided = estimate(ClassifierFreeGuidance(denoiser, NULL, STEP), labels)
    expected = plain.numpy() + filtered(labelled - plain, lambda r: low_high(r, 0.5, 6.0, 0.2, 3.0))
    close(guided.numpy(), expected, 1e-12 * (1 + np.abs(expected).max()))
    assert np.abs(expected - (plain + 3 * (labelled - plain)).numpy()).max() > 1e-3


TARGETS: list[tuple[Target, Process]] = [
    *((Noise(), Blurring(8)), (Velocity(), Blurring(8)), (NextScale(), Blurring(8))),
    *((Flow(), Spectral(8, Rectified())), (Clean(clip=False), Blurring(8))),
]


@pytest.mark.parametrize(("target", "process"), TARGETS, ids=lambda value: type(value).__name__)
def test_every_targets_clean_images_are_filtered_alike(target: Target, process: Process) -> None:
    """Where the operator is diagonal in the DCT, since m_s is affine in the prediction and the filters commute."""
    denoiser, labels = Denoiser(Colours(), process, target).double(), torch.tensor([0, 1])
    y, t, s = images(2, COLOURS, HEIGHT, WIDTH), float64(0.75), float64(0.625)
    guided = ClassifierFreeGuidance(denoiser, NULL, STEP).predict_mean(y, t, s, None, labels)
    labelled, plain = (denoiser.predict_mean(y, t, s, None, v) for v in (labels, torch.full((2,), NULL)))
    expected = plain.detach().numpy() + filtered(labelled - plain, lambda r: low_high(r, 0.5, 6.0, 0.2, 3.0))
    close(guided.detach().numpy(), expected, 1e-9)


def test_the_same_weight_at_all_frequencies_is_the_number() -> None:
    """To 1e-12, through a whole sampler."""
    denoiser, labels = Denoiser(Colours(), Blurring(8), Clean()).double(), torch.tensor([0, 1])
    y = images(2, COLOURS, HEIGHT, WIDTH)
    curve, number = (
        DDIM(0.0, 4).reverse(ClassifierFreeGuidance(denoiser, NULL, scale), y, CounterRNG(0, 2), None, labels)
        for scale in (Same(2.5), 2.5)
    )
    close(curve.numpy(), number.numpy(), 1e-12)
    assert not torch.equal(number, DDIM(0.0, 4).reverse(denoiser, y, CounterRNG(0, 2), None, labels))


def test_a_curve_has_its_interval() -> None:
    denoiser, labels = Denoiser(Colours(), VP(8), Clean(clip=False)), torch.tensor([0, 1])
    y, t = images(2, COLOURS, HEIGHT, WIDTH).float(), torch.tensor([0.5, 0.75]).double()
    inside, everywhere = (
        ClassifierFreeGuidance(denoiser, NULL, STEP, interval).predict_mean(y, t, t / 2, None, labels)
        for interval in ([0.6, 1.0], None)
    )
    plain = denoiser.predict_mean(y, t, t / 2, None, labels)
    assert torch.equal(inside[0], plain[0]) and torch.equal(inside[1], everywhere[1])
    assert not torch.equal(everywhere[0], plain[0])


def test_a_curve_has_no_weights_to_store() -> None:
    denoiser = Denoiser(Colours(), Blurring(4), Clean())
    guided = ClassifierFreeGuidance(denoiser, NULL, ListedGuidance([1, 2]))
    assert guided.state_dict().keys() == denoiser.state_dict().keys()
    assert guided.half().scale.values.dtype == torch.float64  # type: ignore[union-attr]


@pytest.mark.parametrize("curve", [STEP, ListedGuidance([1, 3, 2])], ids=["step", "listed"])
def test_curves_stay_on_the_device_and_never_wait_for_it(curve: GuidanceCurve) -> None:
    guided = ClassifierFreeGuidance(Denoiser(TinyNetwork(2), Blurring(8), Clean()), NULL, curve)
    with pretended_gpu(guided):
        y, labels = torch.randn(4, 2, 6, 9, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
        t = torch.full((), 0.5, dtype=torch.float64, device="cuda")
        assert guided.predict_mean(y, t, t / 2, None, labels).device.type == "cuda"


MISTAKES: dict[str, tuple[type, tuple[Any, ...], str]] = {
    "negative": (LowHigh, (-1.0,), "guidance.low must be a number >= 0 and <= 1e+30, got -1.0"),
    "a word": (LowHigh, (1, "3"), "guidance.high must be a number"),
    "no cutoff": (LowHigh, (1, 3, 0), "guidance.cutoff must be positive, got 0"),
    "in pixels": (LowHigh, (1, 3, 4), "guidance.cutoff must be a number >= 0 and <= 1, got 4"),
    "not finite": (LowHigh, (1, 3, 0.1, float("inf")), "guidance.sharpness must be a number"),
    "one weight": (ListedGuidance, ([1],), "weights needs two or more entries"),
    "none": (ListedGuidance, ([],), "weights needs two or more entries"),
    "no list": (ListedGuidance, (3,), "weights must be a list of numbers, got 3"),
    "negative entry": (ListedGuidance, ([1, -2],), "entry 2 is -2; every entry must be a number >= 0"),
    "nan": (ListedGuidance, ([1, float("nan")],), "entry 2 is nan"),
    "too large": (ListedGuidance, ([1, 1e31],), "weights must be at most 1e+30, got 1e+31"),
    "lengths": (ListedGuidance, ([1, 2], [0, 0.1, 0.2]), "2 weights and 3 frequencies"),
    "descending": (ListedGuidance, ([1, 2], [0.3, 0.1]), "frequencies must ascend"),
    "beyond": (ListedGuidance, ([1, 2], [0, 16]), "cycles per pixel, at most 1, got 16"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_meant_is_refused(name: str) -> None:
    kind, arguments, words = MISTAKES[name]
    with refused(words):
        kind(*arguments)


class Short(Same):
    def forward(self, r: Tensor) -> Tensor:
        return r[:1]


def test_curves_of_ones_own_are_checked() -> None:
    denoiser = Denoiser(TinyNetwork(), VP(4), Clean())
    for curve, words in (
        (Same(-1), "guidance: Same has the weight -1 at 0 cycles per pixel; allowed are 0 to 1e+30"),
        (Same(float("nan")), "Same has the weight nan"),
        (Short(1), "Short returns (1,) for 65 frequencies; it must return one weight each"),
    ):
        with refused(words):
            ClassifierFreeGuidance(denoiser, NULL, curve)
