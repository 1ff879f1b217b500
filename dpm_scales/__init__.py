"""Generative models whose forward process is any scale-space.

    import dpm_scales as ds

    model = ds.Model(ds.UNet(width=32), ds.Blurring(), image_size=32, channels=1)
    ds.train(model, images, steps=2000)
    samples = model.sample(16, seed=0)
    model.save("digits")
    model = ds.load("digits")

Names are imported on first use: `import dpm_scales` alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpm_scales.api import Losses, train
    from dpm_scales.data import (
        BSDS500,
        ArraySource,
        Digits,
        ImageDataModule,
        ImageDataset,
        ImageFolder,
        ImageSource,
        Mnist5000,
        Photos,
    )
    from dpm_scales.describe import configured
    from dpm_scales.errors import UserError
    from dpm_scales.guidance import GuidanceCurve, ListedGuidance, LowHigh
    from dpm_scales.images import make_grid, save_png
    from dpm_scales.models.io import load_model as load
    from dpm_scales.models.model import Model
    from dpm_scales.networks import EDM2, DiffusersUNet, JiT, UNet
    from dpm_scales.priors import DataPrior, GaussianPrior, OsmosisPrior, Prior
    from dpm_scales.processes import (
        VE,
        VP,
        Blurring,
        BlurringChain,
        Homogeneous,
        InverseHeat,
        InverseOsmosis,
        OsmosisDiffusion,
        OsmosisFilter,
        Process,
        Spectral,
        Warm,
    )
    from dpm_scales.samplers import DDIM, Ancestral, Cold, Dissipation, DPMSolver, Heun, Sampler, UniPC
    from dpm_scales.schedules import (
        BlurSchedule,
        Clock,
        Color,
        ConstantBeta,
        ConstantNoise,
        CosineLogSNR,
        CutOff,
        DataPower,
        EDMNoise,
        FlowBlur,
        GeometricNoise,
        KernelColor,
        LinearBeta,
        LinearTimeBlur,
        ListedBeta,
        ListedBlurSigmas,
        ListedColor,
        ListedDissipationTimes,
        ListedNoise,
        LogBlur,
        LowPass,
        NoiseSchedule,
        PowerLaw,
        Rectified,
        SigmoidSignal,
        SinSquaredBlur,
        SpectralClock,
        WhiteColor,
    )
    from dpm_scales.targets import Clean, Flow, NextScale, Noise, Target, Velocity
    from dpm_scales.weights import EDM, P2, FlowLoss, Learned, LossWeight, MinSNR

__version__ = "0.1.0"

#: the module of each public name
_PLACES = {
    "api": ("Losses", "train"),
    "models.model": ("Model",),
    "models.io": ("load",),
    "describe": ("configured",),
    "errors": ("UserError",),
    "guidance": ("GuidanceCurve", "ListedGuidance", "LowHigh"),
    "networks": ("EDM2", "DiffusersUNet", "JiT", "UNet"),
    "processes": (
        *("VE", "VP", "Blurring", "BlurringChain", "Homogeneous", "InverseHeat", "InverseOsmosis"),
        *("OsmosisDiffusion", "OsmosisFilter", "Process", "Spectral", "Warm"),
    ),
    "schedules": (
        *("BlurSchedule", "Clock", "Color", "ConstantBeta", "ConstantNoise", "CosineLogSNR", "CutOff", "DataPower"),
        *("EDMNoise", "FlowBlur", "GeometricNoise", "KernelColor", "LinearBeta", "LinearTimeBlur", "ListedBeta"),
        *("ListedBlurSigmas", "ListedColor", "ListedDissipationTimes", "ListedNoise", "LogBlur", "LowPass"),
        *("NoiseSchedule", "PowerLaw", "Rectified", "SigmoidSignal", "SinSquaredBlur", "SpectralClock", "WhiteColor"),
    ),
    "targets": ("Clean", "Flow", "NextScale", "Noise", "Target", "Velocity"),
    "weights": ("EDM", "FlowLoss", "Learned", "LossWeight", "MinSNR", "P2"),
    "priors": ("DataPrior", "GaussianPrior", "OsmosisPrior", "Prior"),
    "samplers": ("DDIM", "Ancestral", "Cold", "DPMSolver", "Dissipation", "Heun", "Sampler", "UniPC"),
    "data": (
        *("BSDS500", "ArraySource", "Digits", "ImageDataModule", "ImageDataset", "ImageFolder", "ImageSource"),
        *("Mnist5000", "Photos"),
    ),
    "images": ("make_grid", "save_png"),
}
#: names that differ from those in their modules
_RENAMED = {"load": "load_model"}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "BSDS500",
    "DDIM",
    "EDM",
    "P2",
    "VE",
    "VP",
    "Ancestral",
    "ArraySource",
    "BlurSchedule",
    "Blurring",
    "BlurringChain",
    "Clean",
    "Clock",
    "Cold",
    "Color",
    "ConstantBeta",
    "ConstantNoise",
    "CosineLogSNR",
    "CutOff",
    "DPMSolver",
    "DataPower",
    "DataPrior",
    "DiffusersUNet",
    "Digits",
    "Dissipation",
    "EDMNoise",
    "Flow",
    "FlowBlur",
    "FlowLoss",
    "GaussianPrior",
    "GeometricNoise",
    "GuidanceCurve",
    "Heun",
    "Homogeneous",
    "ImageDataModule",
    "ImageDataset",
    "ImageFolder",
    "ImageSource",
    "InverseHeat",
    "InverseOsmosis",
    "KernelColor",
    "LinearBeta",
    "LinearTimeBlur",
    "ListedBeta",
    "ListedBlurSigmas",
    "ListedColor",
    "ListedDissipationTimes",
    "ListedGuidance",
    "ListedNoise",
    "LogBlur",
    "LossWeight",
    "Losses",
    "LowHigh",
    "LowPass",
    "MinSNR",
    "Mnist5000",
    "Model",
    "NextScale",
    "Noise",
    "NoiseSchedule",
    "OsmosisDiffusion",
    "OsmosisFilter",
    "OsmosisPrior",
    "Photos",
    "PowerLaw",
    "Prior",
    "Process",
    "Rectified",
    "Sampler",
    "SigmoidSignal",
    "SinSquaredBlur",
    "Spectral",
    "SpectralClock",
    "Target",
    "UNet",
    "UniPC",
    "UserError",
    "Velocity",
    "Warm",
    "WhiteColor",
    "configured",
    "load",
    "make_grid",
    "save_png",
    "train",
    "EDM2",
    "JiT",
    "Learned",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), _RENAMED.get(name, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
