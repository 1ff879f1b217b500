"""Samples by a network in bfloat16, or a compiled one: the network's rounding alone differs, and the record has it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpm_scales.evaluation.generated import ModelSamples
from dpm_scales.images import load_image
from dpm_scales.models.generate import computed, draw
from dpm_scales.models.io import save_model
from dpm_scales.models.model import Model
from support.evaluate_helpers import Means, small_features
from support.shell import call, small_model

COUNT, SIZE = 6, (8, 12)


def lively(*overrides: str) -> Model:
    """A model whose fresh network returns something; priors that start from images have some."""
    torch.manual_seed(0)
    model = small_model(*overrides, "sampler.steps=3")
    model.prior.fit(torch.rand(4, 1, *SIZE), model.denoiser.process)
    nn.init.normal_(model.denoiser.network.conv_out.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    return model


def states(model: Model, precision: str = "32-true") -> list[Tensor]:
    """The samples after each step, as the sampler has them."""
    found: list[Tensor] = []
    with computed(model, precision):
        list(draw(model, COUNT, size=SIZE, on_step=lambda index, x: found.append(x.clone())))
    return found


def rounded(x: Any) -> Any:
    return x.to(torch.bfloat16).to(x.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def with_rounded_layers(model: Model) -> None:
    """Round weights, inputs and results of convolutions and matrix products to bfloat16, and compute in float32."""
    for layer in model.denoiser.network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            for parameter in layer.parameters():
                parameter.data = rounded(parameter.data)
            layer.register_forward_pre_hook(lambda _, inputs: tuple(map(rounded, inputs)))
            layer.register_forward_hook(lambda _, inputs, result: rounded(result))


@pytest.mark.parametrize(
    "overrides",
    [
        ("sampler=heun",),
        ("sampler=ddim",),
        ("sampler=ancestral",),
        ("sampler=unipc",),
        ("sampler=dpmpp", "process=blurring"),
        ("sampler=dissipation", "process=heat"),
    ],
)
def test_samples_differ_by_the_rounding_of_the_network(overrides: tuple[str, ...]) -> None:
    """As much as with a network in float32 whose layers alone are rounded; states keep their type."""
    model = lively(*overrides)
    full, half = states(model), states(model, "bf16")
    assert [x.dtype for x in half] == [x.dtype for x in full] and len(full) > 1
    with_rounded_layers(model)
    explained = float((states(model)[-1] - full[-1]).square().mean().sqrt())
    found = float((half[-1] - full[-1]).square().mean().sqrt())
    assert explained / 2 < found < 2 * explained
    assert 0 < found < 0.05 * float(full[-1].square().mean().sqrt())


def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let torch.compile run graphs as they are; return the list of those that it has compiled so far."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


def test_every_option_has_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model", lively())
    compile_ = torch.compile
    graphs = compiled_graphs(monkeypatch)

    def sample(out: str, *options: str) -> Any:
        return call("sample.py", "model=model", "num_samples=3", "batch_size=2", f"out={out}", *options, cwd=tmp_path)

    def images(out: str) -> np.ndarray[Any, Any]:
        return np.stack([load_image(tmp_path / out / f"{n:06d}.png", 1).numpy() for n in range(3)]).astype(int)

    options: dict[str, tuple[str, ...]] = {
        "plain": (),
        "bf16": ("precision=bf16",),
        "both": ("compile=true", "precision=bf16-mixed"),
    }
    for out, chosen in options.items():
        assert sample(out, *chosen).status == 0
        record = json.loads((tmp_path / out / "sample.json").read_text())
        kept = {"precision": None if out == "plain" else "bf16-mixed", "compile": True if out == "both" else None}
        assert {key: record.get(key) for key in kept} == kept
        assert not {"precision", "compile"} & set(record["options"])
    assert len(graphs) == 2, "one for each size of a batch"
    assert (images("both") == images("bf16")).all()
    assert 0 < abs(images("bf16") - images("plain")).mean() < 2

    assert sample("bf16", "precision=bf16-mixed").status == 0  # the same by another name
    assert 'precision is "bf16-mixed" there and null here' in sample("bf16").err
    assert "compile is null there and true here" in sample("plain", "compile=true").err
    for option, line in {
        "precision=16": "precision=16 overflows; use bf16-mixed or 32-true",
        "precision=float8": "unknown precision 'float8': allowed: ",
        "compile=null": "compile must be true or false, got None",
    }.items():
        outcome = sample("other", option)
        assert outcome.status == 2 and outcome.err.startswith(f"error: {line}") and outcome.err.count("\n") == 1

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such device")

    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=broken))
    outcome = sample("other", "compile=true")
    assert outcome.status == 2 and outcome.err == (
        "error: compile=true: compiling the network failed (RuntimeError: no such device); "
        "leave it out to sample uncompiled\n"
    )


def test_evaluation_draws_the_same_samples(tmp_path: Path) -> None:
    """Those of sample.py in bfloat16, by numbers; the record has it."""
    model = lively()
    with computed(model, "bf16"):
        wanted = torch.cat(list(draw(model, 5, seed=3, batch_size=2)))
    given = (model, "model", "averaged", None, 5, 3, None, torch.device("cpu"))
    half, full = ModelSamples(*given, precision="bf16-mixed"), ModelSamples(*given)
    parts = [torch.cat(list(half.batches(2, numbers))) for numbers in (range(3), range(3, 5))]
    difference = torch.cat(parts).int() - wanted.int()
    assert difference.abs().max() <= 1  # batches of other sizes round the last bits otherwise
    assert (torch.cat(list(full.batches(2))).int() != wanted.int()).any()
    assert half.origin()["precision"] == "bf16-mixed" and not {"precision", "compile"} & set(full.origin())
    assert ModelSamples(*given, compile=True).origin()["compile"] is True


@pytest.mark.filterwarnings("ignore:.*(covariance is singular|px are enlarged)")
def test_evaluate_takes_both_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model", lively())
    graphs = compiled_graphs(monkeypatch)
    np.save(tmp_path / "real.npy", np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8))
    options = ("model=model", "reference=real.npy", "num_samples=4", "batch_size=4", "measures=[frechet]")
    with small_features(Means()):
        outcome = call("evaluate.py", *options, "precision=bf16", "compile=true", "out=judged", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert found["fake"]["precision"] == "bf16-mixed" and found["fake"]["compile"] is True
    assert len(graphs) == 1
