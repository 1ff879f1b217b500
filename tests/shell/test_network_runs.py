"""Runs of `network=jit`, `network=edm2` and `weight=learned`: exact resume, lengths of weights, exports, messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dpm_scales as ds
from dpm_scales.errors import UserError
from dpm_scales.models.io import load_model
from dpm_scales.networks import EDM2
from dpm_scales.networks.magnitude import MPLayer
from support.networks import TOY
from support.shell import FAST, SMALL, Outcome, assert_equal, call, checkpoint, column, files, sample

RUN = (*(option for option in SMALL if not option.startswith("network.")), *FAST, "trainer.max_steps=4")


def attempt(run_dir: Path, *options: str) -> Outcome:
    return call("train.py", *RUN, *options, f"run_dir={run_dir}", cwd=run_dir.parent)


def train(run_dir: Path, *options: str) -> Path:
    end = attempt(run_dir, *options)
    assert end.status == 0, end.err
    return run_dir


@pytest.mark.parametrize("process", ["osmosis_diffusion", "heat"])
@pytest.mark.parametrize("network", ["edm2", "jit"])
def test_runs_resume_exactly(network: str, process: str, tmp_path: Path) -> None:
    """With the learned weight, labels, and, of osmosis, the context; heat has no noise to weight by."""
    options = (*TOY[network], "weight=learned", "conditional=true", f"process={process}", "process.num_scales=20")
    options = (*options, "trainer.val_check_interval=2", "checkpoint.every_n_steps=2")
    whole = train(tmp_path / "whole", *options)
    train(tmp_path / "part", *options, "trainer.max_steps=2")
    part = train(tmp_path / "part", *options)
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert_equal(checkpoint(whole)[key], checkpoint(part)[key])
    assert column(whole, "train/loss") == column(part, "train/loss")
    assert files(whole)["model/model.safetensors"] == files(part)["model/model.safetensors"]

    learned = checkpoint(whole)["current_model_state"]["loss_weight.series.weight"]
    assert learned.abs().min() > 0
    exported = load_file(whole / "model/model.safetensors")
    assert exported and not any("loss_weight" in name for name in exported)
    model = load_model(whole)
    if isinstance(model.denoiser.network, EDM2):
        current = checkpoint(whole)["current_model_state"]
        names = [name for name, part in model.denoiser.network.named_modules() if isinstance(part, MPLayer)]
        for name in names:
            rows = current[f"model.denoiser.network.{name}.weight"].flatten(1)
            size = rows.double().square().mean(1).sqrt()
            torch.testing.assert_close(size, torch.full_like(size, 0.1), rtol=1e-5, atol=0)
    drawn = sample(whole, tmp_path / "samples", "num_samples=2", "labels=[3]")
    assert (drawn / "000001.png").is_file()


def test_sizes_that_patches_do_not_divide_are_drawn(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", *TOY["jit"], "trainer.max_steps=1")
    drawn = sample(folder, tmp_path / "samples", "size=[8,10]", "num_samples=1")
    with Image.open(drawn / "000000.png") as image:
        assert image.size == (10, 8)


class Square(ds.UNet):
    """A network for square images."""

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise UserError for other images."""
        if size[0] != size[1]:
            raise UserError(f"images of {size[0]}x{size[1]} pixels: give square ones")


def test_a_size_that_the_network_can_not_take_is_refused_before_work() -> None:
    for size, given in (((8, 8), (8, 10)), ((8, 10), None)):
        with pytest.raises(UserError, match="images of 8x10 pixels: give square ones"):
            ds.Model(Square(width=4), ds.VP(20), image_size=size, channels=1).sample(1, size=given)


def test_the_learned_weight_trains_from_python(tmp_path: Path) -> None:
    model = ds.Model(ds.EDM2(widths=[8, 8], head_dim=4), ds.VP(20), image_size=8, channels=1)
    images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)
    weight = ds.Learned()
    loss = model.loss(images, 0.5, generator=0, loss_weight=weight)
    loss.backward()
    assert loss == model.loss(images, 0.5, generator=0)  # u = 0
    assert weight.series.weight.grad is not None and weight.series.weight.grad.abs().max() > 0
    ds.train(model, images, steps=2, weight=weight, data={"batch_size": 8}, run_dir=tmp_path / "run", progress=False)
    assert "loss_weight.series.weight" in checkpoint(tmp_path / "run")["state_dict"]


def one_line(end: Outcome, *words: str) -> None:
    assert end.status == 2 and end.err.count("\n") == 1, end.err
    assert all(word in end.err for word in words), end.err


def test_what_can_not_be_is_one_line(tmp_path: Path) -> None:
    for options, words in (
        ((*TOY["jit"], "network.patch_size=0"), ("patch_size is 0",)),
        ((*TOY["edm2"], "network.rate_scale=0"), ("rate_scale must be > 0",)),
        ((*TOY["edm2"], "network.head_dim=3"), ("head_dim is 3",)),
        (("weight=learned", "weight.terms=0", *TOY["jit"]), ("terms must be a whole number",)),
        (("weight=learned", "scale_sampling=importance", *TOY["jit"]), ("importance", "weight=learned", "use one")),
    ):
        one_line(attempt(tmp_path / "run", *options), *words)
        assert not (tmp_path / "run").exists()


def test_a_run_resumes_with_its_own_kind_of_weight_alone(tmp_path: Path) -> None:
    for before, after in (("learned", "target"), ("target", "learned")):
        folder = train(tmp_path / before, *TOY["jit"], f"weight={before}", "trainer.max_steps=2")
        kept = files(folder)
        end = attempt(folder, *TOY["jit"], f"weight={after}")
        one_line(end, "can't be resumed with this weight=", "choose another run_dir")
        assert files(folder) == kept
