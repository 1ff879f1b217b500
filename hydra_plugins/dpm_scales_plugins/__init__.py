"""The configs of active plugins: Hydra loads extensions only from this package; see dpm_scales/cli/plugins.py."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class PluginConfigs(SearchPathPlugin):
    """Adds the folders of configs that `plugins=[NAME]` has switched on, after all others."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from dpm_scales.cli.plugins import config_folders

        for folder in config_folders():
            search_path.append("plugin", f"file://{folder}")
