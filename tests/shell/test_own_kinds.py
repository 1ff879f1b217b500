"""One class of one's own of each kind, from the pages' package: trained, sampled, evaluated, resumed, loaded.

Each with trust in the package and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_scales.errors import UserError
from dpm_scales.models import Model, load_model
from dpm_scales.operators import heat_blur
from dpm_scales.rng import CounterRNG
from dpm_scales.training.resuming import trust_needed
from support.own_package import command, forget, imported, installed
from support.shell import SMALL, call, column, composed, drawn, files, sample, small_model


@dataclass(frozen=True)
class Kind:
    """A part of one's own.

    Attributes:
        options: choose it.
        part: returns it from a model; None if it is no part of one.
        opened_by: the commands that need trust in its package.
    """

    options: tuple[str, ...]
    part: Callable[[Model], Any] | None
    opened_by: tuple[str, ...] = ("sample.py", "evaluate.py", "train.py", "load_model")


STRIPES = "{_target_: dpm_scales.data.ImageDataModule, source: {_target_: mynet.data.Stripes}, batch_size: 16}"
KINDS = {
    "network": Kind(
        ("network={_target_: mynet.networks.DiT, width: 16, depth: 1, patch: 2}",), lambda m: m.denoiser.network
    ),
    "target": Kind(("target={_target_: mynet.targets.Degradation}",), lambda m: m.denoiser.target),
    "weight": Kind(("weight={_target_: mynet.weights.Flat}",), None, ("train.py",)),
    "process": Kind(("process={_target_: mynet.processes.SlightBlur, num_scales: 20}",), lambda m: m.denoiser.process),
    "straight path": Kind(
        ("process={_target_: mynet.processes.RectifiedFlow, num_scales: 20}",), lambda m: m.denoiser.process
    ),
    "operator": Kind(
        ("process={_target_: mynet.diffusion.EdgeStopping, num_scales: 8}",), lambda m: m.denoiser.process
    ),
    "torus": Kind(("process={_target_: mynet.operators.Torus, num_scales: 8}",), lambda m: m.denoiser.process),
    "noise": Kind(("process.noise={_target_: mynet.schedules.Sine}",), lambda m: m.denoiser.process.noise),
    "blur": Kind(
        ("process=blurring", "process.num_scales=20", "process.blur={_target_: mynet.schedules.SteadyBlur}"),
        lambda m: m.denoiser.process.blur,
    ),
    "prior": Kind(("prior={_target_: mynet.priors.WideNoise}",), lambda m: m.prior),
    "sampler": Kind(("sampler={_target_: mynet.samplers.Straight, steps: 3}",), lambda m: m.sampler),
    "data": Kind((f"data={STRIPES}",), None, ("evaluate.py", "train.py")),
}


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with installed(tmp_path_factory.mktemp("elsewhere")) as folder:
        yield folder


def settings(kind: str) -> list[str]:
    """The small run's options without those of the part that is replaced."""
    return [option for option in SMALL if not option.startswith((f"{kind}.", "trainer.max_steps"))]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_with_trust_and_without(kind: str, package: Path, tmp_path: Path) -> None:
    own, run = KINDS[kind], tmp_path / "run"
    outcome = call("train.py", *settings(kind), *own.options, "trainer.max_steps=2", f"run_dir={run}", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    who = "loads or resumes" if own.part is not None or kind == "data" else "resumes"
    assert (
        f"this run uses classes of mynet: files are not trusted, so whoever {who} it gives allow=mynet" in outcome.out
    )

    commands = {
        "sample.py": [f"model={run}", "num_samples=2", f"out={tmp_path / 'refused'}"],
        "evaluate.py": [f"model={run}", "reference=data", "num_samples=2", "num_reference=3"],
        "train.py": [f"run_dir={run}", "trainer.max_steps=3"],
    }
    before = files(run)
    for name in own.opened_by:
        forget(package)
        if name == "load_model":
            with pytest.raises(UserError) as caught:
                load_model(run)
            line = str(caught.value)
        else:
            outcome = call(name, *commands[name], cwd=tmp_path)
            assert outcome.status == 2
            line = outcome.err.strip()
        assert line.endswith("; if you trust it: allow=mynet") and "\n" not in line, line
        assert not imported(package) and files(run) == before and not (tmp_path / "refused").exists()

    forget(package)
    model = load_model(run, allow=["mynet"] if "load_model" in own.opened_by else [])
    if own.part is None:
        assert not imported(package)
    else:
        assert type(own.part(model)).__module__.partition(".")[0] == "mynet"
    allowed = ["allow=[mynet]"] if "sample.py" in own.opened_by else []
    assert len(drawn(sample(run, tmp_path / "out", "num_samples=2", *allowed))) == 2
    judged = ["allow=[mynet]", "measures=[{_target_: mynet.metrics.Sharpness}]", "cache=false"]
    outcome = call("evaluate.py", *commands["evaluate.py"], *judged, cwd=tmp_path)
    assert outcome.status == 0 and "sharpness" in outcome.out, outcome.err
    outcome = call("train.py", *commands["train.py"], "allow=[mynet]", cwd=tmp_path)
    assert outcome.status == 0 and "resuming" in outcome.out, outcome.err
    assert len(column(run, "train/loss")) == 3


def test_the_pages_commands(tmp_path: Path) -> None:
    short = [o for o in SMALL if not o.startswith(("network", "trainer.max_steps"))] + ["trainer.max_steps=1"]
    for page in ("own_network", "own_process"):
        outcome = call("train.py", *command(page, "train.py"), *short, cwd=tmp_path)
        assert outcome.status == 0, outcome.err
    short = [o for o in SMALL if not o.startswith(("data", "trainer.max_steps"))] + ["trainer.max_steps=1"]
    outcome = call("train.py", *command("own_data", "train.py"), *short, cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    (tmp_path / "runs" / "data").rename(tmp_path / "runs" / "mine")
    outcome = call("sample.py", *command("own_sampler", "sample.py"), cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert len(drawn(tmp_path / "samples" / "mine")) == 4
    audited = ("process={_target_: mynet.processes.SlightBlur, num_scales: 8}", "out=audited")
    outcome = call("evolve.py", "task=audit", *audited, cwd=tmp_path)
    assert outcome.status == 0, outcome.err


def test_rows_of_pictures_are_a_data_set() -> None:
    """The page's data set for `datasets`, on rows of its form."""
    import numpy as np
    from mynet.data import Rows  # type: ignore[import-not-found]
    from PIL import Image

    levels = np.arange(3, dtype=np.uint8)[:, None, None] * np.ones((5, 7), np.uint8)
    rows = Rows([{"image": Image.fromarray(level), "label": n} for n, level in enumerate(levels)], 4)
    image, label = rows.get(2, None)
    assert len(rows) == 3 and label == 2 and image.shape == (3, 4, 4) and image.dtype == torch.uint8
    assert bool((image == 2).all())


def test_a_class_replaced_by_its_name_drops_the_options_that_it_has_not(tmp_path: Path) -> None:
    """At the top and nested; those that it has too are kept, and unknown ones that were typed are refused."""
    small = [o for o in SMALL if not o.startswith(("network", "trainer.max_steps"))] + ["trainer.max_steps=1"]
    names = ["network._target_=mynet.networks.Plain", "process.noise._target_=mynet.schedules.Sine"]
    outcome = call("train.py", *small, *names, "network.width=8", "run_dir=run", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    parts = load_model(tmp_path / "run", allow=["mynet"]).recipe.parts
    assert parts["network"] == {"_target_": "mynet.networks.Plain", "width": 8}
    assert parts["process"]["noise"] == {"_target_": "mynet.schedules.Sine"}
    assert parts["process"]["num_scales"] == composed().process.num_scales
    outcome = call("train.py", *small, *names, "process.noise.shift=2", "run_dir=other", cwd=tmp_path)
    assert outcome.status == 2 and "process.noise.shift" in outcome.err and outcome.err.count("\n") == 1
    both = ["process._target_=mynet.processes.SlightBlur", "process.num_scales=20", names[1]]
    outcome = call("train.py", *small, "network.width=8", names[0], *both, "run_dir=both", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    process = load_model(tmp_path / "both", allow=["mynet"]).recipe.parts["process"]
    assert process == {
        "_target_": "mynet.processes.SlightBlur", "num_scales": 20, "noise": {"_target_": "mynet.schedules.Sine"}
    }  # fmt: skip


def test_the_parts_are_what_they_claim() -> None:
    """Against closed forms and the shipped twins, on rectangles, in float64."""
    from mynet import networks, priors, processes, samplers, targets

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 6, 10, generator=generator, dtype=torch.float64) * 2 - 1
    t, s = torch.tensor([0.25, 0.9], dtype=torch.float64), torch.tensor([0.1, 0.5], dtype=torch.float64)
    flow = processes.RectifiedFlow(20)
    torch.testing.assert_close(flow.marginal(x, t).mean, (1 - 0.999 * t)[:, None, None, None] * x)
    torch.testing.assert_close(flow.noise_scale(t, torch.zeros((), dtype=torch.float64)).flatten(), t)

    blur = processes.SlightBlur(20)
    signal = blur.noise(t)[0].exp()[:, None, None, None]
    expected = signal * (0.01 * x + 0.99 * heat_blur(x, 0.5 * (2 * t) ** 2))  # min_decay
    torch.testing.assert_close(blur.marginal(x, t).mean, expected, atol=1e-9, rtol=0)

    target, operator = targets.Degradation(), blur.operator()
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    y_t = blur.perturb(operator.to_white(x), t, noise, operator)
    ideal = target.regression_target(blur, operator, x, operator.to_pixels(y_t), noise, t)
    found = target.predict_mean(blur, operator, ideal, y_t, t, s)
    torch.testing.assert_close(found, operator.apply(blur.signal(s), operator.to_white(x)), atol=1e-9, rtol=0)

    start = priors.WideNoise(1.5).sample(flow, CounterRNG(0, 500), (1, 8, 8), torch.float64)[0]
    assert abs(float(start.std()) - 1.5) < 4 * 1.5 / (2 * start.numel()) ** 0.5

    model = small_model("sampler=ddim", "sampler.steps=5")
    drawn_by = [
        sampler.sample(model.denoiser, model.prior, CounterRNG(3, 4), (1, 8, 8))
        for sampler in (model.sampler, samplers.Straight(steps=5))
    ]
    torch.testing.assert_close(drawn_by[0], drawn_by[1], atol=1e-5, rtol=0)

    network = networks.DiT(3, 2, 5, width=16, depth=2, heads=2, patch=2).double()
    labels = (torch.tensor([0, 5]), torch.tensor([1, 5]))
    outputs = [network(x, scales, own) for scales in (t, s) for own in labels]
    assert all(output.shape == (2, 2, 6, 10) for output in outputs)
    assert not torch.allclose(outputs[0], outputs[2]) and not torch.allclose(outputs[0][0], outputs[1][0])
    torch.testing.assert_close(outputs[0][1], outputs[1][1])  # the same label beside another


WRONG = """
from torch import nn

class Two(nn.Conv2d):
    def __init__(self, in_channels, out_channels, num_classes): super().__init__(in_channels, out_channels, 1)
    def forward(self, x, t): return super().forward(x)

class Small(Two):
    def forward(self, x, t, labels=None): return super().forward(x, t)[..., :1]
"""


def test_a_network_that_does_not_fit_ends_in_one_line(package: Path, tmp_path: Path) -> None:
    """One that takes no labels, and one whose answer broadcasting would stretch."""
    (package / "mynet" / "wrong.py").write_text(WRONG)
    for name, line in {
        "Two": "network: mynet.wrong.Two.forward takes (x, t); it must take (x, t, labels=None)",
        "Small": "the network Small returned (16, 1, 8, 1) for images (16, 1, 8, 8); it must return their shape",
    }.items():
        given = (
            *settings("network"),
            f"network={{_target_: mynet.wrong.{name}}}",
            "trainer.max_steps=1",
            "run_dir=run",
        )
        outcome = call("train.py", *given, cwd=tmp_path)
        assert outcome.status == 2 and line in outcome.err and outcome.err.count("\n") == 1, outcome.err


def test_shipped_loss_weights_need_no_trust(tmp_path: Path) -> None:
    given = ("weight={_target_: dpm_scales.weights.P2, gamma: 0.5}", "run_dir=run")
    outcome = call("train.py", *settings("weight"), *given, "trainer.max_steps=1", cwd=tmp_path)
    assert outcome.status == 0 and "allow" not in outcome.out, outcome.err
    outcome = call("train.py", "run_dir=run", "trainer.max_steps=2", cwd=tmp_path)
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    ("loading", "resuming", "end"),
    [
        ([], [], ""),
        (["a"], ["a"], "classes of a: files are not trusted, so whoever loads or resumes it gives allow=a"),
        (["a"], [], "classes of a: files are not trusted, so whoever loads it gives allow=a"),
        ([], ["b"], "classes of b: files are not trusted, so whoever resumes it gives allow=b"),
        (["a"], ["b"], "so whoever loads it gives allow=a, and whoever resumes it 'allow=[a,b]'"),
    ],
)
def test_the_line_on_what_is_needed(loading: list[str], resuming: list[str], end: str) -> None:
    line = trust_needed(loading, resuming)
    assert line.endswith(end) and bool(line) == bool(end)
