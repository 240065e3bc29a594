"""What pyproject.toml can't say: hparams/ goes into the wheel, so that an empty folder has settings (spilt/settings/files.py: tree_of)."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithSettings(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("hparams", Path(self.build_lib) / "spilt" / "hparams", dirs_exist_ok=True)


setup(cmdclass={"build_py": WithSettings})
