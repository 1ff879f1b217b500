"""Compose a config of the package from Python, whether or not Hydra is running in this process."""

from __future__ import annotations

from collections.abc import Sequence

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dpm_scales.errors import UserError
from dpm_scales.models.instantiate import CONFIGS, root_cause_line


def composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """Return the config `name` with these overrides, and restore Hydra's global state.

    Raises: UserError for overrides that do not compose.
    """
    instance = GlobalHydra.instance()
    held, instance.hydra = instance.hydra, None
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose(name, overrides=[*overrides])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(root_cause_line(error)) from error
    finally:
        instance.hydra = held
