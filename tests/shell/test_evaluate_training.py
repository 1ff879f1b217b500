"""Figures in training: those of the averaged weights, in metrics.csv, and nothing else is changed by them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from dpm_scales.data import Digits, digits_data
from dpm_scales.metrics import frechet_distance, kernel_distance, manifolds
from dpm_scales.models.generate import draw
from dpm_scales.models.io import load_model
from dpm_scales.training.ema import EMA
from dpm_scales.training.module import DiffusionModule
from dpm_scales.training.monitoring import PeriodicEvaluation, periodic_evaluation
from support.evaluate_helpers import Means, small_features
from support.oracles import pretended_gpu
from support.shell import (
    FAST,
    assert_equal,
    attempt,
    call,
    checkpoint,
    column,
    composed,
    files,
    small_model,
    table,
    train,
)

EVALUATED = (
    "evaluation.every_n_steps=2",
    "evaluation.num_samples=9",
    "evaluation.num_reference=20",
    "evaluation.measures=[frechet,kernel,manifolds]",
    "evaluation.batch_size=4",
)
RUN = (*FAST, "trainer.max_steps=5", "checkpoint.every_n_steps=2", "ema.decay=0.9")
NAMES = ("eval/fd_means", "eval/kd_means", "eval/precision", "eval/recall", "eval/density", "eval/coverage")


@pytest.fixture(scope="module", autouse=True)
def network() -> Iterator[Means]:
    network = Means()
    with small_features(network):
        yield network


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with mock.patch.dict("os.environ", XDG_CACHE_HOME=str(folder)):
        yield folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "evaluated", *RUN, *EVALUATED)


def rows(run_dir: Path) -> list[tuple[str, ...]]:
    """What metrics.csv has of the figures, with the steps, which are counted from 0."""
    return [(row["step"], *(row[name] for name in NAMES)) for row in table(run_dir) if row[NAMES[0]]]


def test_figures_are_those_of_the_averaged_weights(evaluated: Path) -> None:
    """Every second step and the last; those of the last are of the exported model, sampled as by evaluate.py."""
    assert [row[0] for row in rows(evaluated)] == ["1", "3", "4"]
    model = load_model(evaluated)
    fake = Means()(torch.cat(list(draw(model, 9, seed=0))))
    images = Digits().train().images
    real = Means()(images[[i * len(images) // 20 for i in range(20)]])
    expected = (frechet_distance(real, fake), kernel_distance(fake, real).value, *manifolds(real, fake))
    assert tuple(map(float, rows(evaluated)[-1][1:])) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    raw = Means()(torch.cat(list(draw(load_model(evaluated, "raw"), 9, seed=0))))
    assert frechet_distance(real, raw) != pytest.approx(expected[0], rel=1e-3)
    result = json.loads((evaluated / "result.json").read_text())
    assert result["eval/fd_means"] == float(rows(evaluated)[-1][1])


def test_the_training_is_the_same_with_and_without(evaluated: Path, tmp_path: Path) -> None:
    """Weights, average, optimiser, losses, grids, export: to the last bit."""
    without = train(tmp_path / "without", *RUN)
    first, second = checkpoint(evaluated), checkpoint(without)
    for name in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert_equal(first[name], second[name], name)
    for name in ("train/loss", "val/loss"):
        assert column(evaluated, name) == column(without, name) != []
    assert files(evaluated / "samples") == files(without / "samples")
    assert files(evaluated / "model") == files(without / "model")
    assert not any(name.startswith("eval/") for name in table(without)[0])


def test_an_interrupted_run_has_the_same_figures(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after the third step, of which the checkpoint of the second knows nothing."""

    class PowerCutError(Exception):
        pass

    original = DiffusionModule.training_step

    def step(self: DiffusionModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 3:
            raise PowerCutError
        return original(self, batch, batch_idx)

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionModule, "training_step", step)
        with pytest.raises(PowerCutError):
            attempt(run_dir, *RUN, *EVALUATED)
    assert [row[0] for row in rows(run_dir)] == ["1"] and checkpoint(run_dir)["global_step"] == 2
    assert call("train.py", f"run_dir={run_dir}", cwd=tmp_path).status == 0
    assert (run_dir / "metrics.csv").read_text() == (evaluated / "metrics.csv").read_text()
    assert files(run_dir / "model") == files(evaluated / "model")


def test_with_gradients_accumulated_each_step_is_judged_once(tmp_path: Path) -> None:
    run_dir = train(tmp_path / "run", *RUN, *EVALUATED, "trainer.accumulate_grad_batches=3")
    assert [row[0] for row in rows(run_dir)] == ["1", "3", "4"]


def test_labels_of_a_conditional_model(tmp_path: Path) -> None:
    run_dir = train(tmp_path / "run", *RUN, *EVALUATED, "conditional=true", "trainer.max_steps=2")
    model = load_model(run_dir)
    fake = Means()(torch.cat(list(draw(model, 9, seed=0, labels=torch.arange(9)))))
    images = Digits().train().images
    real = Means()(images[[i * len(images) // 20 for i in range(20)]])
    assert float(rows(run_dir)[-1][1]) == pytest.approx(frechet_distance(real, fake), rel=1e-5)


def test_reference_features_are_kept(evaluated: Path, cache: Path, network: Means, tmp_path: Path) -> None:
    """For the next run of the same data, and for evaluate.py."""
    assert len(list(cache.rglob("*.safetensors"))) == 1
    calls = network.calls
    train(tmp_path / "next", *RUN, *EVALUATED)
    assert network.calls == calls + 3 * 3  # three times nine samples, four at a time
    assert len(list(cache.rglob("*.safetensors"))) == 1
    shutil.rmtree(cache / "dpm_scales")
    train(tmp_path / "alone", *RUN, *EVALUATED, "evaluation.cache=false", "trainer.max_steps=1")
    assert not (cache / "dpm_scales").exists()


def test_generators_are_left_as_they_were() -> None:
    """Though the network is made with random weights."""
    settings = composed(*EVALUATED).evaluation
    data = digits_data(**{key: value for key, value in composed().data.items() if key != "_target_"})
    before = torch.get_rng_state()
    assert len(periodic_evaluation(EMA(), data, 0, settings)) == 1
    assert torch.equal(torch.get_rng_state(), before)
    settings.every_n_steps = None
    assert periodic_evaluation(EMA(), data, 0, settings) == []


def test_samples_and_features_stay_on_the_device() -> None:
    """No tensor is made elsewhere or read by the host before the features are gathered."""
    settings = composed(*EVALUATED).evaluation
    data = digits_data(**{key: value for key, value in composed().data.items() if key != "_target_"})
    (callback,) = periodic_evaluation(EMA(), data, 0, settings)
    assert isinstance(callback, PeriodicEvaluation)
    model = small_model("sampler=ddim", "sampler.steps=3")  # whose grid is not sought, as that of heun is
    gathered: list[torch.Tensor] = []
    module: Any = SimpleNamespace(
        trainer=SimpleNamespace(world_size=2, global_rank=0),
        device=torch.device("cuda"),
        all_gather=lambda x: gathered.append(x) or torch.stack([x, x]),
    )
    network = Means()
    callback.sources = [network]
    with pretended_gpu(model, network):
        (features,) = callback._features(model, module)
    assert features.shape == (9, 12)
    assert gathered[0].device.type == "cuda" and gathered[0].shape == (5, 12)


MISTAKES = {
    "evaluation.every_n_steps=0": "evaluation.every_n_steps must be a whole number >= 1, got 0",
    "evaluation.num_samples=1": "evaluation.num_samples must be a whole number >= 2, got 1",
    "evaluation.num_reference=1": "evaluation.num_reference must be a whole number >= 2, got 1",
    "evaluation.measures=[fid]": "unknown measure 'fid'",
    "evaluation.split=test": "unknown split 'test'",
    "evaluation.split=val data.val_fraction=0": "evaluation.split=val has 0 images, and needs 2",
    "evaluation.num_samples=5": "manifolds needs 6 images or more in each set",
    "evaluation.features=missing": "no feature network",
    "evaluation.cache=maybe": "evaluation.cache must be true or false",
    "evaluation.every=3": "unknown option 'evaluation.every': did you mean 'evaluation.every_n_steps'",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_one_line_before_the_run_begins(options: str, tmp_path: Path) -> None:
    outcome = attempt(tmp_path / "run", *EVALUATED, *options.split())
    assert outcome.status == 2
    lines = outcome.err.splitlines()
    assert len(lines) == 1 and MISTAKES[options] in lines[0], outcome.err
    assert not (tmp_path / "run").exists()
