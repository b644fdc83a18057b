"""What setuptools cannot be told in pyproject.toml: a wheel takes `configs/` and `slurm/` along, inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

INSIDE = ("configs", "slurm")
"""Folders of the checkout that `multitrain.config.config_folder` and users find inside the installed package."""


class BuildPy(build_py):
    def run(self) -> None:
        for name in INSIDE:  # also what an earlier build has left
            shutil.rmtree(Path(self.build_lib, "multitrain", name), ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for name in INSIDE:
                target = Path(self.build_lib, "multitrain", name)
                shutil.copytree(name, target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildPy})
