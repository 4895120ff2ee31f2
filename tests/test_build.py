"""The extensions: what nvcc made of csrc/, the C++ compiler of csrc/cpu, and what is said where one cannot run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import torch

from diffprune.kernels import cpp, cuda, dispatch, kmeans_assign, kmeans_update, linear_grad_dot, linear_grad_sqnorm

sys.path.insert(0, str(Path(__file__).parents[1] / "csrc"))
import cuda_build

ARCHITECTURES = {"sm_80", "sm_90a", "sm_100"}
HOPPER_KERNELS = {
    "linear_grad_dot_sm90": 8,  # two dtypes, two widths of tiles, two layouts
    "gram_sqnorm_sm90": 2,
    "direct_sqnorm_sm90": 2,
    "kmeans_search_sm90": 1,
}
BLOCK_KERNELS = {"linear_grad_dot_sm80": 4, "gram_sqnorm_sm80": 2, "direct_sqnorm_sm80": 2, "kmeans_search_sm80": 1}


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    """The compiled sources, up to date; nothing to do after an installation."""
    if not cuda_build.wanted():
        pytest.skip("no nvcc here" if cuda_build.find_nvcc() is None else "DIFFPRUNE_CUDA=0")
    if {f"sm_{name}" for name in cuda_build.architectures()} != ARCHITECTURES:
        pytest.skip("DIFFPRUNE_CUDA_ARCHS is not the default")
    return cuda_build.compile_objects()


def test_ptxas_spills_nothing_and_warns_of_nothing(objects: list[Path]) -> None:
    """A warning here is wgmma made synchronous, or setmaxnreg ignored."""
    kernels = defaultdict(set)
    for log in (path.with_suffix(".log") for path in objects):
        text = log.read_text()
        assert "warning" not in text.lower() and "Potential Performance Loss" not in text, f"{log}:\n{text}"
        for name, architecture, frame, stores, loads in re.findall(
            r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads",
            text,
            flags=re.DOTALL,
        ):
            assert (frame, stores, loads) == ("0", "0", "0"), f"{name} for {architecture} in {log}"
            kernels[name].add(architecture)
    assert len(kernels) > 30
    for name, compiled in kernels.items():
        assert compiled == ({"sm_90a"} if "sm90" in name else ARCHITECTURES), name


def test_matrix_kernels_use_the_tensor_cores_and_the_copy_engine(objects: list[Path]) -> None:
    """wgmma, and copies by TMA, on Hopper; mma.sync and cp.async elsewhere."""
    hopper = instructions([path for path in objects if "_sm90" in path.name], "sm_90a")
    for kernel, variants in HOPPER_KERNELS.items():
        found = [code for name, code in hopper.items() if kernel in name]
        assert len(found) == variants, kernel
        for code in found:
            assert code.count("HGMMA.64x") >= 4 and code.count("UTMALDG.3D") >= 2, kernel
            cluster = kernel in ("linear_grad_dot_sm90", "kmeans_search_sm90")
            assert (".MULTICAST" in code) == cluster
            # A fence of all memory where the blocks of a cluster begin and end, none in the loops.
            assert code.count("MEMBAR.ALL.GPU") == (2 if cluster else 0), kernel
    sources = ("linear_grad_dot.cu", "linear_grad_sqnorm.cu", "kmeans_assign.cu")
    ampere = instructions([path for path in objects if path.stem in sources], "sm_80")
    for kernel, variants in BLOCK_KERNELS.items():
        found = [code for name, code in ampere.items() if kernel in name]
        assert len(found) == variants, kernel
        assert all(code.count("HMMA.16816.F32") >= 64 and "LDGSTS.E.BYPASS" in code for code in found), kernel


def instructions(objects: list[Path], architecture: str) -> dict[str, str]:
    """Machine code by mangled name of the kernel."""
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump here, neither CUDA's nor that of the package triton")
    sass = {}
    for path in objects:
        command = [tool, "--dump-sass", "--gpu-architecture", architecture, str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for function in text.split("Function : ")[1:]:
            name, code = function.split("\n", 1)
            sass[name.strip()] = code
    return sass


def find_cuobjdump() -> str | None:
    beside = Path(cuda_build.find_nvcc()).with_name("cuobjdump")
    spec = find_spec("triton")
    places = [beside, Path("/usr/local/cuda/bin/cuobjdump")]
    places += [Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"] if spec and spec.origin else []
    return shutil.which("cuobjdump") or next((str(path) for path in places if path.exists()), None)


def test_module_imports_without_a_driver(objects: list[Path], tmp_path: Path) -> None:
    library = cuda_build.build(tmp_path / cuda_build.MODULE)
    first = library.stat().st_mtime_ns
    assert cuda_build.build(library).stat().st_mtime_ns == first, "linked again though nothing changed"
    loader = ExtensionFileLoader("built._C", str(library))
    module = module_from_spec(spec_from_loader("built._C", loader))
    loader.exec_module(module)
    assert module.architectures() == "80;90a;100"
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cudaSetDevice: cudaError"):
            module.linear_grad_dot_partials(module.Where(0, 0), 1, 1, 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_each_op_says_why_in_one_sentence() -> None:
    built = find_spec("diffprune._C") is not None
    reason = "needs a CUDA device" if built else "needs the extension diffprune._C"
    assert cuda.unavailable().startswith(reason)
    half, index = torch.ones(2, 2, 8, dtype=torch.float16), torch.zeros(2, dtype=torch.int32)
    for call in (
        lambda: linear_grad_dot(half, half, half[0, :1].expand(8, 8), impl="cuda"),
        lambda: linear_grad_sqnorm(half, half, True, impl="cuda"),
        lambda: kmeans_assign(half[0], half[0], impl="cuda"),
        lambda: kmeans_update(half[0], index, 1, impl="cuda"),
    ):
        with pytest.raises(NotImplementedError, match=f"cuda: {reason}"):
            call()
    assert dispatch.report()["kmeans_assign"]["cuda"].startswith(reason)


def test_refuses_tensors_that_are_not_on_a_gpu() -> None:
    from diffprune.kernels.cuda import kmeans_assign as implementation

    assert implementation.refuse(torch.ones(2, 8), torch.ones(2, 8)) == "needs CUDA tensors, got cpu"


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: None)
    for setting, wanted in [("auto", False), ("0", False)]:
        monkeypatch.setenv("DIFFPRUNE_CUDA", setting)
        assert cuda_build.wanted() == wanted
    monkeypatch.setenv("DIFFPRUNE_CUDA", "1")
    with pytest.raises(cuda_build.BuildError, match="DIFFPRUNE_CUDA=1, but there is no nvcc"):
        cuda_build.wanted()
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: "nvcc")
    assert cuda_build.wanted()
    monkeypatch.setenv("DIFFPRUNE_CUDA", "yes")
    with pytest.raises(cuda_build.BuildError, match="expected DIFFPRUNE_CUDA to be auto, 0 or 1, got 'yes'"):
        cuda_build.wanted()
    monkeypatch.setenv("DIFFPRUNE_CUDA_ARCHS", "sm_90a; 80")
    assert cuda_build.architectures() == ["80", "90a"]
    monkeypatch.setenv("DIFFPRUNE_CUDA_ARCHS", "hopper")
    with pytest.raises(cuda_build.BuildError, match="expected DIFFPRUNE_CUDA_ARCHS like"):
        cuda_build.architectures()


def test_a_failed_compilation_shows_the_compilers_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cuda_build.find_nvcc() is None:
        pytest.skip("no nvcc here")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "broken.cu").write_text("__global__ void kernel() { undeclared = 1; }\n")
    monkeypatch.setattr(cuda_build, "SOURCES", tmp_path / "csrc")
    monkeypatch.setattr(cuda_build, "OBJECTS", tmp_path / "build")
    monkeypatch.setenv("DIFFPRUNE_CUDA_ARCHS", "80")
    with pytest.raises(cuda_build.BuildError, match='identifier "undeclared" is undefined'):
        cuda_build.build(tmp_path / cuda_build.MODULE)
    assert not list(tmp_path.glob("*.so"))


def test_the_cpu_extension_is_there_where_a_compiler_is() -> None:
    """Its tests are skipped without it: a build that fails must not look like a processor that lacks AVX2."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    assert find_spec("diffprune._cpu") is not None, "pip install -e . did not build csrc/cpu"
    assert cpp.extension().variants()[-1] == "portable"


@pytest.mark.parametrize(("setting", "built"), [("0", False), ("auto", True), ("1", True)])
def test_the_setting_of_the_cpu_extension(setting: str, built: bool) -> None:
    code = "import sys; sys.argv = ['setup.py', '--name']; import runpy; found = runpy.run_path('setup.py')"
    code += "; print([(e.name, e.optional) for e in found['cpp_extension']()])"
    result = run_setup(code, DIFFPRUNE_CPP=setting)
    expected = [("diffprune._cpu", setting == "auto")] if built else []
    assert result.stdout.splitlines()[-1] == str(expected)


def test_a_bad_setting_of_the_cpu_extension() -> None:
    result = run_setup(
        "import sys; sys.argv = ['setup.py', '--name']; import runpy; runpy.run_path('setup.py')", DIFFPRUNE_CPP="yes"
    )
    assert result.returncode != 0
    assert "expected DIFFPRUNE_CPP to be auto, 0 or 1, got 'yes'" in result.stderr


def run_setup(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cuda_build.ROOT,
        env={**os.environ, "DIFFPRUNE_CUDA": "0", **environment},
    )
