"""Everything is declared in pyproject.toml but the CUDA extension, built where nvcc is: see csrc/cuda_build.py."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import cuda_build


class BuildCuda(build_ext):
    """Builds diffprune._C with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        try:
            cuda_build.build(Path(self.get_ext_fullpath(ext.name)))
        except cuda_build.BuildError as error:
            sys.exit(str(error))


try:
    extensions = [Extension("diffprune._C", sources=[])] if cuda_build.wanted() else []
except cuda_build.BuildError as error:
    sys.exit(str(error))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildCuda})
