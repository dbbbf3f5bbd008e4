"""Everything is in pyproject.toml, but for one file: the wheel carries the weights manifest too."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithManifest(build_py):
    """Copies `weights_manifest.json` from the repository's root into the built package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file("weights_manifest.json", str(Path(self.build_lib, "deltaconv_core")))


setup(cmdclass={"build_py": BuildWithManifest})
