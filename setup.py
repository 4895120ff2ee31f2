"""Everything is declared in pyproject.toml but the two extensions, each built where its compiler is.

``diffprune._cpu``: csrc/cpu, C++ for the CPU. DIFFPRUNE_CPP: ``auto`` (default) builds where a C++ compiler works,
``1`` makes a failure an error, ``0`` skips. ``diffprune._C``: csrc, CUDA; see csrc/cuda_build.py.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import cpu_flags
import cuda_build

ROOT = cuda_build.ROOT
CPP_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread"]
PLAIN_SUMS = ["-ffp-contract=off"]  # w·x is rounded before it is added, as in PyTorch


class BuildExtensions(build_ext):
    """Builds diffprune._cpu, each source with the flags of its instruction set, and diffprune._C with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            if ext.name == "diffprune._C":
                cuda_build.build(target)
            else:
                self.build_cpp(ext, target)
        except cuda_build.BuildError as error:
            sys.exit(str(error))

    def build_cpp(self, ext: Extension, target: Path) -> None:
        objects = []
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        for source in ext.sources:
            stem = Path(source).stem
            flags = CPP_FLAGS + (PLAIN_SUMS if stem == "kmeans_update" else [])
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=[(name, None) for name in cpu_flags.macros()],
                include_dirs=[cuda_build.pybind11_headers()],
                extra_postargs=flags + cpu_flags.instruction_set(stem, compiler),
                depends=ext.depends,
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), extra_postargs=["-pthread"], target_lang="c++")


def cpp_extension() -> list[Extension]:
    setting = os.environ.get("DIFFPRUNE_CPP", "auto")
    if setting not in ("auto", "0", "1"):
        sys.exit(f"expected DIFFPRUNE_CPP to be auto, 0 or 1, got {setting!r}")
    if setting == "0" or (setting == "auto" and os.name != "posix"):  # the flags are GCC's and Clang's
        return []
    folder = ROOT / "csrc" / "cpu"
    sources, headers = (
        sorted(str(path.relative_to(ROOT)) for path in folder.glob(kind)) for kind in ("*.cpp", "*.[hi]*")
    )
    return [Extension("diffprune._cpu", sources=sources, depends=headers, language="c++", optional=setting == "auto")]


try:
    extensions = [Extension("diffprune._C", sources=[])] if cuda_build.wanted() else []
except cuda_build.BuildError as error:
    sys.exit(str(error))

setup(ext_modules=extensions + cpp_extension(), cmdclass={"build_ext": BuildExtensions})
