"""Objects described by their constructors' arguments, and rebuilt: equal in recipe and in outputs, bit by bit."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dpm_scales as ds
from dpm_scales import networks, priors, processes, samplers, schedules, targets, weights
from dpm_scales.describe import Describable, DescriptionError, configured, describe
from dpm_scales.models.instantiate import build
from dpm_scales.moments import Moments
from dpm_scales.spectrum import DataSpectrum

#: arguments of classes that can't be made without, or whose defaults would leave something out
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ListedBeta": {"betas": (0.1, 0.2, 0.3)},
    "ListedNoise": {"noise_scales": [1, 2, 3]},
    "ListedBlurSigmas": {"blur_sigmas": [0.5, 1.0, 2.0]},
    "ListedDissipationTimes": {"dissipation_times": range(1, 4)},
    "ConstantBeta": {"beta": 0.2, "steps": [1, 5, 9]},
    "UNet": {"in_channels": 2, "out_channels": 1, "width": 8, "num_classes": 3, "dropout": 0.1},
    "DiffusersUNet": {
        "in_channels": 1,
        "out_channels": 1,
        "unet": {
            "block_out_channels": (32,),
            "down_block_types": ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",),
            "layers_per_block": 1,
        },
    },
    "ListedColor": {"weights": [1.0, 2.0], "frequencies": [0.0, 0.4]},
    "NoiseBlur": {"noise": schedules.EDMNoise(0.1, 3.0)},
    "Heun": {"steps": 3, "s_churn": 1.5, "s_max": 50.0},
    "OsmosisDiffusion": {"guidance_pattern": "smooth", "num_scales": 10},
    "Clean": {"preconditioning": "wiener", "clip": False},
}
ROOMS = (processes, schedules, targets, weights, priors, samplers, networks)
FOUND = {found for room in ROOMS for found in vars(room).values() if inspect.isclass(found)}
SHIPPED = [kind for kind in FOUND if issubclass(kind, Describable) and not inspect.isabstract(kind)]
#: the law itself, whose operator no file may name
BASES = ("Describable", "Process", "Osmosis", "Schedule")
MADE = sorted((kind for kind in SHIPPED if kind.__name__ not in BASES and kind.__name__[0] != "_"), key=str)


def make(kind: type) -> Any:
    torch.manual_seed(0)
    return kind(**ARGUMENTS.get(kind.__name__, {}))


def values_of(made: Any) -> list[torch.Tensor]:
    """Return what an object computes, and its weights."""
    t = torch.linspace(0.1, 1, 7, dtype=torch.float64)
    mu = torch.linspace(0, 8, 5, dtype=torch.float64)
    if isinstance(made, processes.Process):
        return [made.signal_scale(t, mu), made.noise_scale(t, mu)]
    if isinstance(made, schedules.NoiseSchedule | schedules.BlurSchedule):
        made.bind(3)
        found = made(t)
        return list(found) if isinstance(found, tuple) else [found]
    if isinstance(made, samplers.Sampler):
        return [made.scales(processes.VP(num_scales=60))]
    if isinstance(made, targets.Target):
        c = made.scalings(Moments(ds.VP(), ds.VP().operator(), t, DataSpectrum(), (8, 8)))
        return [c.skip, c.out, c.inner, c.weight]
    if isinstance(made, weights.Learned):
        torch.nn.init.ones_(made.series.weight)
        return [made.log_level(processes.VP(), t)]
    if isinstance(made, weights.LossWeight):
        return [made.of_curves(processes.VP(), t, mu, torch.tensor(0.3))]
    if isinstance(made, schedules.Clock):
        return [made(t[:, None, None], mu, 8.0)]
    if isinstance(made, schedules.Color):
        made.bind_spectrum(mu)
        return [made.log(t[:, None, None], mu)]
    assert isinstance(made, nn.Module)
    return list(made.state_dict().values())


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.__name__)
def test_every_shipped_class_is_rebuilt_from_its_description(kind: type) -> None:
    made = make(kind)
    settings = describe(made)
    assert settings["_target_"] == f"dpm_scales.{kind.__module__.split('.')[1]}.{kind.__name__}"
    parameters = inspect.signature(kind).parameters.values()
    assert list(settings)[1:] == [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    torch.manual_seed(0)
    again = build(settings, object, "part")
    assert type(again) is kind and describe(again) == settings
    assert same(values_of(again), values_of(made))


def test_no_class_is_left_out() -> None:
    assert {"VP", "Blurring", "CosineLogSNR", "Velocity", "EDM", "DataPrior", "UniPC", "UNet"} <= {
        kind.__name__ for kind in MADE
    }
    assert len(MADE) >= 40


def test_arguments_are_those_of_the_call_however_given() -> None:
    assert describe(ds.VP(7)) == describe(ds.VP(num_scales=7)) != describe(ds.VP())
    made = ds.LogBlur(1.0, blur_sigma_max=4.0)
    assert describe(made) == {
        "_target_": "dpm_scales.schedules.LogBlur",
        "blur_sigma_min": 1.0,
        "blur_sigma_max": 4.0,
    }
    assert describe(copy.deepcopy(made)) == describe(pickle.loads(pickle.dumps(made))) == describe(made)


def test_what_the_constructor_chose_for_none_is_written_down() -> None:
    assert describe(ds.Blurring())["blur"] == describe(ds.SinSquaredBlur())
    assert describe(ds.Heun())["variable"] is None


def test_later_changes_of_a_list_do_not_reach_it() -> None:
    betas = [0.1, 0.2]
    made = ds.ListedBeta(betas)
    betas.append(0.9)
    assert describe(made)["betas"] == [0.1, 0.2]


def test_a_wrong_call_fails_as_without_recording() -> None:
    with pytest.raises(TypeError, match="VP.*unexpected keyword argument 'colour'"):
        ds.VP(colour=1)  # type: ignore[call-arg]
    assert list(inspect.signature(ds.VP).parameters) == [
        *("num_scales", "noise", "value_range", "color", "clock"),
    ]


class Kept(nn.Module):
    """Keeps its arguments in attributes of their names."""

    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.width, self.depth = width, depth


class Lost(nn.Module):
    """Keeps nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()


class Many(ds.Target):
    """Takes arguments without names."""

    def __init__(self, *values: float) -> None: ...

    regression_target = predict_mean = None  # type: ignore[assignment]


def test_other_classes_by_their_attributes_or_configured() -> None:
    name = f"{__name__}.Kept"
    assert describe(Kept(3)) == {"_target_": name, "width": 3, "depth": 2}
    assert describe(configured(Kept, width=3, depth=[Path("a"), 1.5, None])) == {
        "_target_": name,
        "width": 3,
        "depth": ["a", 1.5, None],
    }
    assert describe(configured(Kept, width=torch.ones(2)))["width"] == [1.0, 1.0]
    assert describe(configured(Lost, width=ds.VP(5)))["width"] == describe(ds.VP(5))
    with pytest.raises(ds.UserError, match="Kept takes no argument 'wdith': did you mean 'width'"):
        configured(Kept, wdith=3)
    with pytest.raises(ds.UserError, match="configured takes a class"):
        configured(Kept(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            Lost(3),
            r"Lost keeps no attribute of the name of its argument 'width'; keep it as self.width, or give .*ds.confi",
        ),
        (Many(1.0), "Many was made with arguments that have no names"),
        (ds.VP.forward, "can't be written"),
        (configured(Kept, width=object()), "Kept.width: "),
        (type("Local", (Kept,), {"__qualname__": "f.<locals>.Local"})(1), "Local is defined in a function"),
        (
            type("Mine", (Kept,), {"__module__": "__main__"})(1),
            "Mine is defined in the program itself; move it to a mod",
        ),
    ],
    ids=["lost", "many", "function", "tensor", "local", "main"],
)
def test_what_can_not_be_described_says_why(value: object, message: str) -> None:
    with pytest.raises(DescriptionError, match=message):
        describe(value)
