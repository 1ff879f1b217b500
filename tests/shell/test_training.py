"""The LightningModule and its callbacks, each figure recomputed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dpm_scales.data import Digits, ImageDataModule
from dpm_scales.denoisers import Denoiser, spread_evenly, uniform_scales
from dpm_scales.errors import UserError
from dpm_scales.images import load_image, make_grid, to_range, to_uint8
from dpm_scales.rng import CounterRNG
from dpm_scales.training import load_model
from dpm_scales.training.callbacks import ORDER, check_order
from dpm_scales.training.ema import EMA
from dpm_scales.training.fit import fit_to_data
from dpm_scales.training.module import BANDS, VALIDATION, DiffusionModule, step_seed
from support.shell import FAST, attempt, call, checkpoint, column, composed, network_weights, small_model, table, train


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The raw weights after every step of the runs of a test."""
    kept: list[dict[str, Tensor]] = []

    def note(self: DiffusionModule, *_: Any) -> None:
        kept.append({name: value.clone() for name, value in self.state_dict().items() if ".network." in name})

    monkeypatch.setattr(DiffusionModule, "on_train_batch_end", note)
    return kept


# --- average of the weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.999, 0.2])
def test_average_of_the_weights_by_hand(decay: float, tmp_path: Path, history: list[dict[str, Tensor]]) -> None:
    """The first step's weights, then average <- d average + (1 - d) weights with d = min(decay, (1 + n) / (10 + n))."""
    run_dir = train(tmp_path / "run", *FAST, f"ema.decay={decay}")
    average = {name: value.double() for name, value in history[0].items()}
    for n, step in enumerate(history[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = {name: d * average[name] + (1 - d) * step[name].double() for name in average}
    stored = network_weights(checkpoint(run_dir)["state_dict"])
    assert len(history) == 6 and stored.keys() == average.keys()
    for name, value in average.items():
        torch.testing.assert_close(stored[name].double(), value, rtol=1e-5, atol=1e-7)
        assert torch.equal(history[-1][name], checkpoint(run_dir)["current_model_state"][name])


def test_average_warms_up() -> None:
    average = EMA(0.999)
    for n in (1, 5, 90, 10000):
        values = [torch.ones(1), torch.full((2,), 2.0)]
        average._average(values, [torch.zeros(1), torch.zeros(2)], n, n)
        expected = min(0.999, (1 + n) / (10 + n))
        assert torch.cat(values).tolist() == pytest.approx([expected, 2 * expected, 2 * expected], rel=1e-6)


def test_buffers_are_not_averaged(tmp_path: Path) -> None:
    values = checkpoint(train(tmp_path / "run", "process=heat", "process.num_scales=4", "sampler.steps=null"))
    buffers = [name for name in values["state_dict"] if ".network." not in name]
    assert "model.prior.image_size" in buffers and "model.denoiser.spectrum.log_factor" in buffers
    for name in buffers:
        assert torch.equal(values["state_dict"][name], values["current_model_state"][name])


# --- learning rate, gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["cosine", "constant"])
def test_learning_rate(decay: str, tmp_path: Path) -> None:
    """Linear warm-up times half a cosine to zero at max_steps."""
    overrides = ("optimizer.learning_rate=0.01", "optimizer.warmup_steps=3", f"optimizer.decay={decay}")
    rates = column(train(tmp_path / "run", *overrides), "lr-AdamW")
    warm = np.minimum(1, (np.arange(6) + 1) / 4)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(6) / 6)) if decay == "cosine" else 1.0
    np.testing.assert_allclose(rates, 0.01 * warm * cosine, rtol=1e-6)


def test_warm_up_follows_from_the_number_of_steps() -> None:
    """A tenth, at most 100 steps; the same factor as with that number."""
    auto, ten, hundred = (DiffusionModule(small_model(), warmup_steps=steps) for steps in ("auto", 10, 100))
    assert [auto.rate(step, 100) for step in range(20)] == [ten.rate(step, 100) for step in range(20)]
    for steps in (-1, 5000):
        assert auto.rate(7, steps) == hundred.rate(7, steps) < 0.1
    assert auto.rate(0, 9) == 1.0
    with pytest.raises(UserError, match="optimizer.warmup_steps=later: allowed are numbers and auto"):
        DiffusionModule(small_model(), warmup_steps="later")


def test_first_step_is_adams(tmp_path: Path, history: list[dict[str, Tensor]]) -> None:
    """AdamW's first step moves every weight with a gradient by the learning rate, whatever the gradient's size."""
    train(tmp_path / "run", *FAST, "trainer.max_steps=2", "trainer.val_check_interval=2")
    torch.manual_seed(0)
    before = dict(small_model().denoiser.network.named_parameters())
    assert history[0].keys() == {f"model.denoiser.network.{name}" for name in before}
    name = "model.denoiser.network.conv_out.weight"  # starts at zero, and has gradients from the first step
    moved = history[0][name].abs()
    torch.testing.assert_close(moved.max(), torch.tensor(0.01), rtol=1e-3, atol=0)


def test_gradients_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the norm asked for, in one factor; metrics.csv has the norm before."""
    norms: list[float] = []
    clip = DiffusionModule.configure_gradient_clipping

    def watch(self: DiffusionModule, *args: Any, **kwargs: Any) -> None:
        clip(self, *args, **kwargs)
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in self.parameters() if p.grad is not None)))

    monkeypatch.setattr(DiffusionModule, "configure_gradient_clipping", watch)
    run_dir = train(tmp_path / "clipped", "trainer.gradient_clip_val=0.05")
    logged = column(run_dir, "train/grad_norm")
    assert min(logged) > 0.05
    np.testing.assert_allclose(norms, 0.05, rtol=1e-4)
    norms.clear()
    run_dir = train(tmp_path / "free", "trainer.gradient_clip_val=null")
    np.testing.assert_allclose(norms, column(run_dir, "train/grad_norm"), rtol=1e-5)


def test_accumulated_batches_make_one_step(tmp_path: Path, history: list[dict[str, Tensor]]) -> None:
    run_dir = train(tmp_path / "run", "trainer.accumulate_grad_batches=2", "trainer.max_steps=3", *FAST)
    assert len(history) == 6 and checkpoint(run_dir)["global_step"] == 3
    name = "model.denoiser.network.conv_out.weight"
    changed = [not torch.equal(a[name], b[name]) for a, b in zip(history, history[1:], strict=False)]
    assert changed == [True, False, True, False, True]


# --- losses that are not finite ---------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Training losses of the steps (counted from 0) for which `bad` holds become NaN."""
    loss = Denoiser.loss
    count = iter(range(10**6))

    def poisoned(self: Denoiser, *args: Any, **kwargs: Any) -> Tensor:
        value = loss(self, *args, **kwargs)
        if torch.is_grad_enabled() and bad(next(count)):
            value = value * math.nan
        return value

    monkeypatch.setattr(Denoiser, "loss", poisoned)


def test_steps_with_nan_are_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: list[dict[str, Tensor]]
) -> None:
    poison(monkeypatch, lambda step: step in (2, 3))
    run_dir = train(tmp_path / "run", *FAST)
    name = "model.denoiser.network.conv_out.weight"
    changed = [not torch.equal(a[name], b[name]) for a, b in zip(history, history[1:], strict=False)]
    assert changed == [True, False, False, True, True]
    assert column(run_dir, "train/bad_steps") == [0, 0, 1, 2, 2, 2]
    state = checkpoint(run_dir)["optimizer_states"][0]["state"][0]
    assert float(state["step"]) == 4  # Adam's own count leaves the skipped steps out
    assert all(torch.isfinite(value).all() for value in checkpoint(run_dir)["state_dict"].values())


@pytest.mark.parametrize("number", [19, 20])
def test_too_many_nan_in_a_row_end_the_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row may lie before the next look at it; the last checkpoint is kept, with finite weights, and can go on."""
    poison(monkeypatch, lambda step: 12 <= step < 12 + number)
    overrides = ("trainer.max_steps=60", "trainer.val_check_interval=60", "checkpoint.every_n_steps=10")
    outcome = attempt(tmp_path / "run", *overrides, "samples.num_images=0")
    values = checkpoint(tmp_path / "run")
    assert all(torch.isfinite(value).all() for value in values["current_model_state"].values())
    if number < 20:
        assert outcome.status == 0, outcome.err
        return
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    run_dir = tmp_path / "run"
    command = f"python train.py run_dir={run_dir} optimizer.learning_rate=0.0001"
    assert "the loss was not finite for 20 steps in a row until step 40; none of it is saved. " in outcome.err
    assert outcome.err.endswith(f"The last good checkpoint is of step 10: resume with {command}\n")
    assert values["global_step"] == 10 and not (run_dir / "model").exists()
    monkeypatch.undo()
    outcome = call(*command.split()[1:], cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert checkpoint(run_dir)["bad_steps"][0] == 0 and checkpoint(run_dir)["global_step"] == 60


# --- scales, validation -----------------------------------------------------------------------------------------------


def test_stratified_scales() -> None:
    """Each k / num_scales is as likely as any other, and every batch spreads over all of them."""
    offsets = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    evens = [spread_evenly(torch.arange(16), 16, offset) for offset in offsets.tolist()]
    draws = torch.stack([uniform_scales(even, 10) for even in evens])
    k = (draws * 10).round()
    assert torch.allclose(draws * 10, k, atol=1e-12) and (int(k.min()), int(k.max())) == (1, 10)
    shares = torch.bincount(k.long().flatten(), minlength=11)[1:] / k.numel()
    assert torch.allclose(shares, torch.full((10,), 0.1), atol=2e-3)
    each = torch.stack([torch.bincount(row.long(), minlength=11)[1:] for row in k])
    assert int(each.min()) >= 1 and int(each.max()) <= 2  # 16 images over 10 scales


def test_stratified_scales_of_a_long_chain() -> None:
    t = uniform_scales(spread_evenly(torch.arange(4), 4, 0.7), 1000)
    steps = t.diff()
    assert torch.allclose(steps, torch.full_like(steps, 0.25), atol=1e-3)
    assert t.min() > 0 and t.max() <= 1


def test_steps_have_seeds_of_their_own() -> None:
    seeds = {step_seed(seed, rank, number) for seed in range(20) for rank in range(20) for number in range(20)}
    assert len(seeds) == 8000 and all(0 <= seed < 2**63 for seed in seeds)


def test_validation_loss_per_band_by_hand(tmp_path: Path) -> None:
    """With the averaged weights, on fixed scales and noise: the mean of all images, and of those of each quarter."""
    run_dir = train(tmp_path / "run", *FAST, "trainer.val_check_interval=6")
    model = load_model(run_dir)
    data = instantiate(composed("data.batch_size=16").data)
    bands: list[list[float]] = [[] for _ in range(BANDS)]
    for index, (images, _) in enumerate(data.val_dataloader()):
        if index == 2:  # limit_val_batches
            break
        noise = CounterRNG(step_seed(0, VALIDATION, 0), 16, index * 16)
        even = spread_evenly(torch.arange(16), 16, step_seed(0, VALIDATION, index + 1) / 2**63)
        t = uniform_scales(even, 1000)
        with torch.no_grad():
            losses = model.denoiser.loss(to_range(images, (-1, 1)), t, None, noise)
        for scale, loss in zip(t.tolist(), losses.tolist(), strict=True):
            bands[math.ceil(scale * BANDS) - 1].append(loss)
    (row,) = [row for row in table(run_dir) if row["val/loss"]]
    everything = [loss for band in bands for loss in band]
    assert float(row["val/loss"]) == pytest.approx(np.mean(everything), rel=1e-5)
    for index, band in enumerate(bands):
        assert float(row[f"val/loss_t{(index + 1) / BANDS:.2f}"]) == pytest.approx(np.mean(band), rel=1e-5)


def test_validation_is_the_same_every_time(tmp_path: Path) -> None:
    losses = column(train(tmp_path / "run", "optimizer.learning_rate=0.0"), "val/loss")
    assert len(losses) == 2 and losses[0] == losses[1]


def test_last_step_is_validated_wherever_the_next_was_due(tmp_path: Path) -> None:
    run_dir = train(tmp_path / "run", "trainer.val_check_interval=4")
    assert [row["step"] for row in table(run_dir) if row["val/loss"]] == ["3", "5"]
    drawn = sorted(p.name for p in (run_dir / "samples").iterdir())
    assert drawn == [f"{kind}-{step:06d}.png" for kind in ("step", "trajectory") for step in (4, 6)]


def test_grid_is_drawn_from_the_average_with_the_same_noise(tmp_path: Path) -> None:
    run_dir = train(tmp_path / "run", *FAST, "seed=3")
    model = load_model(run_dir)
    x = model.sampler.sample(model.denoiser, model.prior, CounterRNG(3, 4), (1, 8, 8))
    expected = make_grid(to_uint8(x, (-1, 1)))
    assert torch.equal(load_image(run_dir / "samples" / "step-000006.png"), expected)


def test_without_validation_images_training_goes_on(tmp_path: Path) -> None:
    run_dir = train(tmp_path / "run", "data.val_fraction=0.0")
    assert (run_dir / "model" / "model.safetensors").is_file() and not (run_dir / "samples").exists()
    assert not column(run_dir, "val/loss")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", "fast"),
        ("warmup_steps", -1),
        ("warmup_steps", 1.5),
        ("decay", "linear"),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("betas", "ab"),
        ("weight_decay", -0.1),
    ],
)
def test_module_checks_its_values(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"optimizer.{name}"):
        DiffusionModule(small_model(), **{name: value})


def test_fitting_to_data_leaves_the_recipe_as_it_was() -> None:
    model = small_model("process=heat", "target.preconditioning=auto")
    fitted = fit_to_data(model, ImageDataModule(Digits(), batch_size=8))
    assert model.recipe.parts["target"]["preconditioning"] == "auto"
    assert fitted.recipe.parts["target"]["preconditioning"] in ("scalar", "wiener")
    assert fitted.denoiser is model.denoiser and fitted.recipe.parts["network"] == model.recipe.parts["network"]


@pytest.mark.parametrize(("earlier", "later"), [pair[:2] for pair in ORDER])
def test_callbacks_in_the_wrong_order_are_refused(earlier: type[Callback], later: type[Callback]) -> None:
    first, second = object.__new__(earlier), object.__new__(later)
    check_order([first, Callback(), second])
    check_order([second])
    with pytest.raises(AssertionError, match=f"{earlier.__name__} must come before {later.__name__}"):
        check_order([second, first])
