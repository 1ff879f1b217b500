"""A process with an operator of one's own, outside of the package, in every command.

The example of edge-preserving diffusion, and the processes of docs/own_operator.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpm_scales.models import load_model
from dpm_scales.priors import ContextPrior
from support.evaluate_helpers import Means, small_features
from support.own_package import command, installed
from support.shell import ROOT, SMALL, Outcome, call, column, drawn, files, photos, sample

EXAMPLE = ROOT / "examples" / "edge_preserving"
CONFIGS = ("--config-dir", str(EXAMPLE / "configs"))
TRUST = "allow=[edge_preserving]"
SETTINGS = [o for o in SMALL if not o.startswith(("sampler", "trainer.max_steps"))]
SAMPLERS = sorted(path.stem for path in (ROOT / "configs" / "sampler").glob("*.yaml") if path.stem != "model")
#: options of each edit
EDITS = {
    "inpaint": ("image=a.png", "mask=m.png", "num_samples=2"),
    "deblur": ("image=a.png", "blur_sigma=1", "num_samples=2"),
    "superres": ("image=a.png", "num_samples=2"),
    "interpolate": ("start=a.png", "end=b.png", "frames=3"),
    "vary": ("start=a.png", "num_samples=2"),
    "coarse": ("starts=2", "num_samples=2"),
    "draw": ("num_samples=2", "prior_images=a.png"),
}


@pytest.fixture(scope="module", autouse=True)
def package() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training, beside images to edit."""
    folder = tmp_path_factory.mktemp("edges")
    small = ("process.num_scales=12", "process.blur.blur_sigma_max=3", "trainer.max_steps=3")
    outcome = call("train.py", *CONFIGS, "process=edge_preserving", *small, *SETTINGS, "run_dir=run", cwd=folder)
    assert outcome.status == 0, outcome.err
    rows, columns = np.mgrid[:8, :8]
    for name, seed in (("a", 0), ("b", 1)):
        grey = 128 + 60 * np.sin(0.6 * rows + seed) * np.cos(0.5 * columns - seed)
        Image.fromarray(grey.astype(np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:6, 3:7] = 255
    Image.fromarray(mask).save(folder / "m.png")
    return folder / "run"


def test_the_example_is_short() -> None:
    paths = [path for path in EXAMPLE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(paths) <= 4 and sum(len(path.read_text().splitlines()) for path in paths) <= 100


def test_it_is_trained_and_loaded_by_whoever_trusts_it(run: Path) -> None:
    assert np.isfinite(column(run, "train/loss")).all()
    model = load_model(run, allow=["edge_preserving"])
    assert type(model.denoiser.process).__module__ == "edge_preserving" and isinstance(model.prior, ContextPrior)
    assert len(model.prior.images) > 100


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_or_says_in_a_line_why_not(sampler: str, run: Path, tmp_path: Path) -> None:
    options = (f"sampler={sampler}", "steps=3", "num_samples=2", TRUST)
    first = drawn(sample(run, tmp_path / "a", *options))
    assert len(first) == 2 and drawn(sample(run, tmp_path / "b", *options, "batch_size=1")) == first


@pytest.mark.parametrize("task", sorted(EDITS))
def test_edits(task: str, run: Path, tmp_path: Path) -> None:
    options = (f"task={task}", "steps=4", f"out={tmp_path}", TRUST)
    outcome = call("sample.py", "model=run", *EDITS[task], *options, cwd=run.parent)
    assert outcome.status == 0, outcome.err
    results = sorted(tmp_path.glob("0*.png"))
    assert len(results) >= 2
    if task == "inpaint":
        known = np.asarray(Image.open(run.parent / "m.png")) == 0
        kept, image = np.asarray(Image.open(results[0])), np.asarray(Image.open(run.parent / "a.png"))
        assert (kept[known] == image[known]).all() and (kept[~known] != image[~known]).any()


def test_its_likelihood_is_one_given_the_context(run: Path, tmp_path: Path) -> None:
    with small_features(Means()):
        outcome = call(
            *("evaluate.py", "model=run", "reference=data", "num_samples=4", "num_reference=4", "measures=[kernel]"),
            *("features=means", "cache=false", "likelihood=vlb", "likelihood_scales=4", f"out={tmp_path}", TRUST),
            cwd=run.parent,
        )
    assert outcome.status == 0, outcome.err
    saved = json.loads((tmp_path / "evaluation.json").read_text())["likelihood"]
    assert saved["given"] == ["context"] and 0 < saved["bits"] < 20


def test_it_is_audited(tmp_path: Path) -> None:
    options = ("task=audit", "process=edge_preserving", "process.num_scales=20", f"out={tmp_path / 'out'}")
    outcome = call("evolve.py", *CONFIGS, *options, cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    (rows,) = json.loads((tmp_path / "out" / "audit.json").read_text())["processes"].values()
    violated = {(row["direction"], row["name"]) for row in rows if row["verdict"] == "violated"}
    # as of every variance-preserving process that blurs: a_t < 1 scales the grey value
    assert len(rows) > 20 and violated == {(way, "average grey value") for way in ("forward", "reverse")}


def test_it_joins_a_comparison(tmp_path: Path) -> None:
    data = f"data={photos(tmp_path / 'set', 2)}"
    times = ("times=[1,5]", "features=null", "process=edge_preserving", "process.num_scales=20")
    without = [f"processes.{name}=null" for name in ("vp", "homogeneous", "blurring")]
    outcome = call("evolve.py", *CONFIGS, data, *without, *times, f"out={tmp_path / 'out'}", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    before = files(tmp_path / "out" / "parts")
    again = call("evolve.py", *CONFIGS, data, *without, *times, f"out={tmp_path / 'out'}", cwd=tmp_path)
    assert again.status == 0 and files(tmp_path / "out" / "parts") == before  # the same process, not another one
    assert "edge_preserving" in (tmp_path / "out" / "variance.csv").read_text()


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with installed(tmp_path_factory.mktemp("elsewhere")):
        yield tmp_path_factory.mktemp("page")


def outcome_of(of: str, page: Path, *more: str) -> Outcome:
    outcome = call(of, *command("own_operator", of), *more, cwd=page)
    assert outcome.status == 0, outcome.err
    return outcome


def test_the_pages_commands(page: Path) -> None:
    outcome_of("train.py", page, *SETTINGS, "sampler.steps=3", "trainer.max_steps=2")
    outcome_of("sample.py", page)
    assert len(drawn(page / "samples" / "edges")) == 4
    outcome_of("evolve.py", page)
    assert "EdgeStopping" in (page / "evolution" / "edges" / "audit.md").read_text()


def test_the_pages_other_operator_is_that_of_the_torus(page: Path) -> None:
    """Against the dense matrix of a periodic grid, and in training."""
    from mynet.operators import Periodic  # type: ignore[import-not-found]

    shift = [np.roll(np.eye(n), 1, 0) for n in (4, 5)]
    laplacians = [s + s.T - 2 * np.eye(len(s)) for s in shift]
    matrix = -np.kron(laplacians[0], np.eye(5)) - np.kron(np.eye(4), laplacians[1])
    values, vectors = np.linalg.eigh(matrix)
    y = torch.rand(2, 1, 4, 5, dtype=torch.float64)
    expected = y.reshape(2, 20).numpy() @ vectors * np.exp(-0.7 * values) @ vectors.T
    found = Periodic().apply(lambda mu: torch.exp(-0.7 * mu), y)
    np.testing.assert_allclose(found.reshape(2, 20).numpy(), expected, atol=1e-12)
    options = ("process={_target_: mynet.operators.Torus, num_scales: 8}", "sampler.steps=3", "trainer.max_steps=2")
    outcome = call("train.py", *options, *SETTINGS, "run_dir=torus", cwd=page)
    assert outcome.status == 0, outcome.err
    assert len(drawn(sample(page / "torus", page / "drawn", "allow=[mynet]", "num_samples=2"))) == 2
