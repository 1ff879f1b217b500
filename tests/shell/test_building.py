"""A `_target_` that is not there, or makes something else than its place asks for, is told in one line, everywhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from torch import nn

from dpm_scales.data import ImageDataModule
from dpm_scales.denoisers import Denoiser
from dpm_scales.errors import UserError
from dpm_scales.models.instantiate import build, check_kind
from dpm_scales.operators import Operator
from dpm_scales.priors import Prior
from dpm_scales.processes import VP, InverseHeat, Process
from dpm_scales.samplers import DDIM, Heun, Sampler
from dpm_scales.schedules import BlurSchedule, ConstantNoise, LogBlur, NoiseSchedule
from dpm_scales.targets import Clean, Target
from dpm_scales.training import save_model
from dpm_scales.weights import LossWeight
from support.shell import Outcome, call, composed, files, small_model

P = "dpm_scales.processes."


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person's own: one that can't be imported, and one without type hints."""
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    (tmp_path / "own_module.py").write_text(
        "from dpm_scales.processes import VP\n\n\n"
        "def vp(num_scales):\n    return VP(num_scales)\n\n\n"
        "def ddim():\n    from dpm_scales.samplers import DDIM\n\n    return DDIM()\n\n\n"
        "def told(noise: 'Nowhere') -> 'Nowhere':\n    return VP(7)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("broken_module", "own_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)


MISTAKES: dict[str, tuple[Any, str]] = {
    "no config": (3, "must be a config with a _target_, got 3"),
    "none": (None, "must be a config with a _target_, got None"),
    "no target": ({"num_scales": 3}, "._target_ must name a class, got None"),
    "a number": ({"_target_": 3}, "._target_ must name a class, got 3"),
    "a list": ({"_target_": [P + "VP"]}, "._target_ must name a class, got .'dpm_scales.processes.VP'."),
    "empty": ({"_target_": ""}, "._target_ must name a class, got ''"),
    "misspelt": ({"_target_": P + "Vp"}, "._target_=dpm_scales.processes.Vp: there is no such class"),
    "no package": ({"_target_": "nowhere.VP"}, "._target_=nowhere.VP: there is no such class"),
    "no import": ({"_target_": "broken_module.VP"}, "._target_=broken_module.VP can't be imported: division by zero"),
    "a module": ({"_target_": "dpm_scales.processes"}, "._target_=dpm_scales.processes makes no Process"),
    "a class": (
        {"_target_": "dpm_scales.samplers.DDIM"},
        "DDIM makes no Process; name .* dpm_scales.processes.Process$",
    ),
    "a function": ({"_target_": P + "as_scale"}, "._target_=dpm_scales.processes.as_scale makes no Process"),
    "one without hints": ({"_target_": "own_module.ddim"}, "._target_=own_module.ddim makes no Process"),
    "built in C": ({"_target_": "os.getcwd"}, "._target_=os.getcwd makes no Process"),
    "partial": ({"_target_": P + "VP", "_partial_": True}, "._partial_=true would make nothing; leave it out"),
    "partial what": ({"_target_": P + "VP", "_partial_": "x"}, "._partial_ must be true or false, got 'x'"),
    "args": ({"_target_": P + "VP", "_args_": [9]}, " holds the key '_args_'; give a class its arguments by"),
    "recursive": ({"_target_": P + "VP", "_recursive_": False}, " holds the key '_recursive_'"),
    "noise": (
        {"_target_": P + "VP", "noise": {"_target_": P + "VP"}},
        r"\.noise\._target_=.*VP makes no NoiseSchedule; name a class derived from dpm_scales.schedules.NoiseSchedule$",
    ),
    "blur": (
        {"_target_": P + "InverseHeat", "blur": {"_target_": "dpm_scales.schedules.NoNoise"}},
        r"\.blur\._target_=dpm_scales.schedules.NoNoise makes no BlurSchedule",
    ),
    "noise is not there": (
        {"_target_": P + "VP", "noise": {"_target_": "dpm_scales.schedules.Cosine"}},
        r"\.noise\._target_=dpm_scales.schedules.Cosine: there is no such class",
    ),
    "noise later": (
        {"_target_": P + "VP", "noise": {"_target_": "dpm_scales.schedules.EDMNoise", "_partial_": True}},
        r"\.noise\._partial_=true would make nothing",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, modules: None) -> None:
    config, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as caught:
        build(config, Process, "processes.own")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("processes.own")


def test_processes_look_at_their_schedules() -> None:
    with pytest.raises(UserError, match="^VP: noise=3 is no noise schedule; see dpm_scales.schedules$"):
        VP(noise=3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="^InverseHeat: blur=ConstantNoise.. is no blur schedule"):
        InverseHeat(blur=ConstantNoise())  # type: ignore[arg-type]


def test_what_is_right_is_built(modules: None) -> None:
    config = OmegaConf.create({"scales": 4, "p": {"_target_": P + "VP", "num_scales": "${scales}"}})
    assert build(config.p, Process, "process").num_scales == 4
    heat = build(
        {
            "_target_": P + "InverseHeat",
            "noise": {"_target_": "dpm_scales.schedules.ConstantNoise", "noise_std": 0.2},
            "blur": {"_target_": "dpm_scales.schedules.LogBlur"},
        },
        Process,
        "process",
    )
    assert isinstance(heat, InverseHeat) and isinstance(heat.blur, LogBlur)
    assert isinstance(heat.noise, ConstantNoise) and heat.noise.noise_std == 0.2
    assert build({"_target_": "own_module.vp"}, Process, "process", kwargs={"num_scales": 5}).num_scales == 5
    assert build({"_target_": "own_module.told", "noise": None}, Process, "process").num_scales == 7


@pytest.mark.parametrize(
    "kind", [Sampler, Target, Prior, LossWeight, Operator, NoiseSchedule, BlurSchedule], ids=lambda k: k.__name__
)
def test_abstract_classes_are_not_built(kind: type) -> None:
    name = f"{kind.__module__}.{kind.__name__}"
    with pytest.raises(TypeError, match="abstract"):
        kind()
    with pytest.raises(UserError, match=f"^place._target_={name} is an abstract class; name a class derived from it$"):
        build({"_target_": name}, kind, "place")


def test_functions_of_what_was_built_before() -> None:
    auto = {"_target_": "dpm_scales.samplers.auto_sampler", "_partial_": True, "steps": 3}
    late = {"denoiser": Denoiser(nn.Identity(), VP(9), Clean())}
    sampler = build(auto, Sampler, "sampler", late)
    assert isinstance(sampler, Heun) and sampler.steps == 3
    ddim = {"_target_": "dpm_scales.samplers.DDIM", "eta": 0.5}
    assert isinstance(build(ddim, Sampler, "sampler", late), DDIM)
    for config, message in (
        (
            ddim | {"_partial_": True},
            "_partial_=true is for functions of the denoiser, and .*DDIM is a class; set sampler._partial_=false",
        ),
        ({"_target_": "dpm_scales.samplers.karras_grid", "_partial_": True}, "karras_grid makes no Sampler"),
        ({"_target_": "dpm_scales.priors.auto_prior", "_partial_": True}, "auto_prior makes no Sampler"),
        (
            {"_target_": "builtins.print", "_partial_": True},
            "print takes no argument denoiser, which it would be given",
        ),
        (auto | {"_args_": [1]}, "sampler holds the key '_args_'"),
    ):
        with pytest.raises(UserError, match=message):
            build(config, Sampler, "sampler", late)


def test_given_arguments_must_be_taken() -> None:
    config = {"_target_": P + "VP"}
    with pytest.raises(UserError, match="network._target_=.*VP takes no argument in_channels, which it would be given"):
        build(config, nn.Module, "network", kwargs={"in_channels": 3})
    with pytest.raises(UserError, match="unknown option 'process.colour': did you mean 'process.color'"):
        build(config | {"colour": 3}, Process, "process")


#: what every group's `_target_` must make
KINDS = {
    "process": Process,
    "target": Target,
    "prior": Prior,
    "sampler": Sampler,
    "network": nn.Module,
    "data": ImageDataModule,
    "weight": LossWeight,
    "logger": Logger,
}
#: what functions are given where one may stand in place of a class
LATE = {"prior": ["process"], "sampler": ["denoiser"]}


def assert_one_line(outcome: Outcome, message: str) -> None:
    assert outcome.status == 2 and outcome.err == f"error: {message}\n", outcome.err


@pytest.mark.parametrize("group", [*KINDS, "trainer"])
def test_training_tells_a_class_of_another_kind(group: str, tmp_path: Path) -> None:
    """One that is there, and allowed; that the group's other keys are not its arguments is not complained of."""
    other = "dpm_scales.targets.Noise" if group == "sampler" else "dpm_scales.samplers.DDIM"
    kind = KINDS[group].__name__ if group in KINDS else "Trainer"
    outcome = call("train.py", f"{group}._target_={other}", "run_dir=run", cwd=tmp_path)
    rooms = {"network": "torch.nn", "logger": "lightning.pytorch.loggers", "trainer": "lightning"}
    room = rooms.get(group, f"dpm_scales.{ {'process': 'processes', 'data': 'data'}.get(group, group + 's') }")
    assert_one_line(outcome, f"{group}._target_={other} makes no {kind}; name a class derived from {room}.{kind}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("group", KINDS)
def test_what_configs_name_passes(group: str) -> None:
    config = composed(
        "logger=tensorboard", "weight=edm", "run_dir=x", f"{group}.seed=3" if group == "data" else "seed=3"
    )
    check_kind(config[group], KINDS[group], group, partial_kwargs=LATE.get(group))


def test_a_network_without_weights(tmp_path: Path) -> None:
    outcome = call("train.py", "network._target_=torch.nn.Identity", "run_dir=run", cwd=tmp_path)
    assert_one_line(outcome, "network: Identity has no weights to train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option",
    [
        "sampler._target_=os.getcwd",
        "sampler._target_=dpm_scales.priors.GaussianPrior",
        "sampler._target_=dpm_scales.processes.VP",
    ],
)
def test_sampling_and_judging_tell_it(option: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", small_model())
    before = files(tmp_path)
    expected = f"{option} makes no Sampler; name a class derived from dpm_scales.samplers.Sampler"
    assert_one_line(call("sample.py", "model=model", "out=out", option, cwd=tmp_path), expected)
    options = ("model=model", "reference=digits", "features=efflite0", "out=out", option)
    assert_one_line(call("evaluate.py", *options, cwd=tmp_path), expected)
    assert files(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_stored_model_of_another_kind(tmp_path: Path) -> None:
    """Of classes that a stranger's model may name."""
    save_model(tmp_path / "model", small_model())
    config = tmp_path / "model" / "config.yaml"
    config.write_text(config.read_text().replace("dpm_scales.processes.VP", "dpm_scales.targets.Velocity"))
    outcome = call("sample.py", "model=model", "out=out", cwd=tmp_path)
    expected = "process._target_=dpm_scales.targets.Velocity makes no Process; name a class derived from"
    source = "model/model.safetensors: the model's config can't be built"
    assert_one_line(outcome, f"{source}: {expected} dpm_scales.processes.Process")
