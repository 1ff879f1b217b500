"""Commands of the tests get the configs that Hydra composes, though their files are read once."""

from __future__ import annotations

import pickle
from pathlib import Path
from unittest import mock

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from support import compositions
from support.compositions import CONFIGS, remembered

CHOICES = [
    (),
    ("process=blurring", "process/color=power_law", "network.widths=[8,8]"),
    ("experiment=digits_heat", "process.num_scales=7", "+network.more=1", "~logger"),
    ("sampler=heun", "+logger=csv"),
]


def composed(*overrides: str, folder: Path = CONFIGS) -> DictConfig:
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=True)


def text(config: DictConfig) -> str:
    return OmegaConf.to_yaml(config) + "\n".join(f"{key} {node._metadata}" for key, node in config._content.items())


def test_remembered_configs_are_those_of_hydra() -> None:
    expected = [text(composed(*choices)) for choices in CHOICES[:3]]
    with remembered():
        for _ in range(2):
            assert [text(composed(*choices)) for choices in CHOICES[:3]] == expected
        composed("process=blurring").process.blur.blur_sigma_max = 3  # what one command does to its config
        assert composed("process=blurring").process.blur.blur_sigma_max != 3
    for choices in (CHOICES[3], ("process=unheard",), ("network.unheard=1",)):
        messages = []
        for within in (remembered, mock.MagicMock):
            with within(), pytest.raises(ConfigCompositionException) as caught:
                composed(*choices)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_configs_of_others_are_read_again(tmp_path: Path) -> None:
    with remembered():
        for value in (1, 2):
            (tmp_path / "train.yaml").write_text(f"value: {value}")
            assert composed(folder=tmp_path).value == value
    assert not any("value" in pickle.loads(config) for config in compositions._merged.values())
