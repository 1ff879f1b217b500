"""Put the folder configs/, which lies beside the package in a checkout, into the package of a wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPackage(build_py):
    """Copy the package and its configs; an editable installation uses those of the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "dpm_scales", "configs")
            shutil.rmtree(target, ignore_errors=True)  # a build folder that is used again may hold a removed config
            for config in Path("configs").rglob("*.yaml"):
                self.mkpath(str(target / config.parent.relative_to("configs")))
                self.copy_file(str(config), str(target / config.relative_to("configs")))


setup(cmdclass={"build_py": BuildPackage})
