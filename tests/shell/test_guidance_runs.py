"""Runs with labels, weights, importance sampling and the new samplers, from training to guided images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from dpm_scales.cli.arguments import tidy
from dpm_scales.models.guided import with_guidance
from dpm_scales.models.model import Recipe
from dpm_scales.networks import UNet
from dpm_scales.training import load_model
from dpm_scales.training.module import DiffusionModule
from support.shell import FAST, call, checkpoint, composed, drawn, files, sample, small_model, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout, min-SNR, importance sampling and UniPC."""
    options = ("conditional=true", "weight=min_snr", "scale_sampling=importance", "sampler=unipc", *FAST)
    return train(tmp_path_factory.mktemp("guided") / "run", *options, "process.num_scales=20")


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With labels that were never dropped, P2 and churn."""
    options = ("conditional=true", "label_dropout=0", "weight=p2", "sampler=heun", "sampler.s_churn=2", *FAST)
    return train(tmp_path_factory.mktemp("sure") / "run", *options)


def test_guidance_from_the_command_line(labelled: Path, tmp_path: Path) -> None:
    """1 is the unguided image to the byte; 0 does not depend on the labels; lists may come without their brackets."""
    some = ("num_samples=3", "labels=0,1,2")
    plain = files(sample(labelled, tmp_path / "plain", *some))
    assert files(sample(labelled, tmp_path / "one", *some, "guidance=1")) == plain
    strong = files(sample(labelled, tmp_path / "strong", *some, "guidance=5"))
    assert strong != plain
    assert drawn(sample(labelled, tmp_path / "zero", *some, "guidance=0")) == drawn(
        sample(labelled, tmp_path / "other", "num_samples=3", "labels=[7,8,9]", "guidance=0")
    )
    narrow = ("guidance=5", "guidance_interval=0.1,0.11")
    assert drawn(sample(labelled, tmp_path / "narrow", *some, *narrow, "sampler=ddim", "steps=4")) == drawn(
        sample(labelled, tmp_path / "ddim", *some, "sampler=ddim", "steps=4")
    )


def test_guided_samples_do_not_depend_on_the_batch(labelled: Path, tmp_path: Path) -> None:
    options = ("num_samples=3", "guidance=3", "guidance_interval=[-8,6]", "guidance_variable=logsnr")
    sample(labelled, tmp_path / "whole", *options)
    sample(labelled, tmp_path / "parts", *options, "batch_size=1")
    assert len(list((tmp_path / "whole").glob("0*.png"))) == 3
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_models_remember_that_labels_were_dropped(labelled: Path, sure: Path) -> None:
    """Files without the key are of models without dropout, as all older ones are."""
    kept = yaml.safe_load((labelled / "model" / "config.yaml").read_text())
    assert kept["labels"]["label_dropout"] == 0.1
    assert load_model(labelled).recipe.label_dropout == 0.1
    older = yaml.safe_load((sure / "model" / "config.yaml").read_text())
    assert older["labels"].keys() == {"num_classes", "class_names"}
    assert load_model(sure).recipe.label_dropout == 0 and load_model(sure).recipe.num_classes == 10
    assert Recipe.from_dict(kept, "here").to_dict() == kept
    assert checkpoint(labelled)["recipe"] == kept


def test_guidance_is_refused_where_nothing_was_learnt_without_labels(sure: Path, tmp_path: Path) -> None:
    for value in ("2", "0"):
        outcome = call("sample.py", f"model={sure}", f"out={tmp_path / 'out'}", f"guidance={value}", cwd=tmp_path)
        assert outcome.status == 2 and outcome.err.count("\n") == 1
        assert f"guidance={value}" in outcome.err and "train with label_dropout=0.1" in outcome.err
    sample(sure, tmp_path / "plain", "num_samples=2", "guidance=1")
    with pytest.raises(ValueError, match="trained without; drop guidance="):
        with_guidance(small_model(), 2.0)


def test_mistakes_end_with_one_line(labelled: Path, tmp_path: Path) -> None:
    for options, words in {
        ("guidance=-1",): "guidance must be a number >= 0 and <= 1e+30, got -1",
        ("guidance=2", "guidance_interval=[0.8,0.1]"): "guidance_interval must be [low,high]",
        ("guidance_interval=[2,1]",): "guidance_interval must be [low,high] or null, got [2, 1]",
        ("guidance=2", "guidance_variable=sigma"): "unknown guidance_variable 'sigma'",
        ("sampler=heun", "sampler.s_churn=-1"): "s_churn must be a number >= 0",
        ("sampler=unipc", "sampler.order=4"): "order must be a whole number from 1 to 3",
    }.items():
        outcome = call("sample.py", f"model={labelled}", f"out={tmp_path / 'out'}", *options, cwd=tmp_path)
        assert outcome.status == 2 and words in outcome.err, outcome.err
    for option, words in {
        "label_dropout=1": "label_dropout=1 leaves no label",
        "label_dropout=-0.1": "label_dropout must be a number >= 0 and <= 1",
        "weight=min_snr target=finer sampler=ancestral": "loss weight by the signal-to-noise ratio",
    }.items():
        outcome = call("train.py", "conditional=true", *option.split(), f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
        assert outcome.status == 2 and words in outcome.err, outcome.err


def test_lists_without_brackets() -> None:
    assert tidy(["labels=0,1,2", "guidance_interval=0.1,0.8"]) == ["labels=[0,1,2]", "guidance_interval=[0.1,0.8]"]
    untouched = ["labels=[0,1]", "labels=3", "labels='a,b'", "seed=1,2"]
    assert tidy(untouched) == untouched
    assert tidy(["-m", "labels=0,1"]) == ["-m", "labels=0,1"]  # a sweep


@pytest.mark.parametrize("process", ["blurring", "heat"])
def test_edms_weight_and_importance_under_blur(process: str, tmp_path: Path) -> None:
    """And UniPC and churned Heun through frequencies that blur away."""
    small = ("process.num_scales=8", "process.blur.blur_sigma_max=3", "trainer.max_steps=3", "sampler.grid=uniform")
    options = (f"process={process}", "weight=edm", "scale_sampling=importance", "sampler=unipc", *small)
    run_dir = train(tmp_path / "run", *options)
    sample(run_dir, tmp_path / "unipc", "num_samples=2")
    churn = ("sampler=heun", "sampler.grid=uniform", "sampler.s_churn=3", "steps=8")
    sample(run_dir, tmp_path / "churn", "num_samples=2", *churn)
    assert files(tmp_path / "unipc") != files(tmp_path / "churn")


def test_share_of_labels_that_training_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropped ones are the network's extra index; validation and grids keep all; 0 and 1 differ in nothing else."""
    seen: list[tuple[bool, Tensor]] = []
    embed = UNet._embed
    monkeypatch.setattr(
        UNet, "_embed", lambda self, t, labels: (seen.append((self.training, labels)), embed(self, t, labels))[1]
    )
    train(tmp_path / "half", "conditional=true", "label_dropout=0.5", "data.batch_size=64")
    trained = torch.cat([labels for training, labels in seen if training])
    share = float((trained == 10).double().mean())
    assert len(trained) == 6 * 64 and abs(share - 0.5) < 4 * 0.5 / len(trained) ** 0.5
    assert not any((labels == 10).any() for training, labels in seen if not training)
    half = trained
    seen.clear()
    train(tmp_path / "none", "conditional=true", "label_dropout=0", "data.batch_size=64")
    trained = torch.cat([labels for training, labels in seen if training])
    assert torch.equal(torch.where(half == 10, trained, half), trained)


def test_dropped_labels_are_those_of_the_images_whatever_the_number_of_processes() -> None:
    """Image i of the batch of all processes keeps or loses its label, on one process or on two."""
    config = composed("conditional=true")
    assert config.label_dropout == 0.1

    class Alone(DiffusionModule):
        rank, size = 0, 1

        @property
        def global_rank(self) -> int:
            return self.rank

        @property
        def trainer(self) -> Alone:  # type: ignore[override]
            return self

        @property
        def world_size(self) -> int:
            return self.size

    model = small_model()
    recipe = Recipe(model.recipe.parts, 1, (8, 8), 10, None, 0.4)
    model.recipe = recipe
    module, labels = Alone(model), torch.arange(10).repeat(8)
    whole = module._dropped(labels, torch.zeros(80, 1, 8, 8), 800)
    module.size = 2
    for module.rank in (0, 1):
        part = module._dropped(labels[module.rank :: 2], torch.zeros(40, 1, 8, 8), 800)
        assert part is not None and whole is not None and torch.equal(part, whole[module.rank :: 2])
    assert whole is not None and 0.2 < float((whole == 10).double().mean()) < 0.6
