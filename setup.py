"""Builds lrds_fast._C: the CPU kernels always, the CUDA kernels for the GPUs that this machine has.

Environment: LRDS_FAST_CUDA=1 builds the CUDA kernels also where there is no GPU and fails without nvcc, 0 never builds
them; TORCH_CUDA_ARCH_LIST names the architectures, with or without a GPU. CUDA_HOME, CXX and MAX_JOBS mean what they
mean to every PyTorch extension, which from torch 2.13 on also uses an installed ccache. The rest is in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(f"setup.py: setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'")

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
# The architectures that LRDS_FAST_CUDA=1 builds on a machine without a GPU.
ALL_CUDA_ARCHS = "8.0;9.0;10.0;12.0+PTX"
HOW_TO_GET_NVCC = (
    "install a CUDA toolkit, or the wheels nvidia-cuda-nvcc, nvidia-cuda-crt and nvidia-nvvm of torch's CUDA version "
    "into this environment, or set CUDA_HOME"
)


def pybind11_include() -> list[str]:
    """pybind11's headers; torch carries a copy for where the package is not installed."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def version() -> str:
    text = (ROOT / "lrds_fast" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise SystemExit("setup.py: lrds_fast/_version.py does not define __version__")
    return found.group(1)


def find_cuda_home() -> Path | None:
    """The folder whose bin/nvcc compiles: CUDA_HOME, the PATH, the usual place, or the nvidia wheels of this Python."""
    on_path = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        cpp_extension.CUDA_HOME,
        str(Path(on_path).resolve().parent.parent) if on_path else None,
        "/usr/local/cuda",
    ]
    # Not find_spec("nvidia"): in an isolated build the wheels may stand beside torch only.
    for site in {sysconfig.get_paths()["purelib"], str(Path(torch.__file__).parent.parent)}:
        candidates += sorted(glob(f"{site}/nvidia/cu[0-9]*"), reverse=True)
    for candidate in candidates:
        # A wrapper in /usr/local/bin is a compiler without headers.
        home = Path(candidate) if candidate else None
        if home and (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home
    return None


def cuda_archs(wish: str) -> str:
    """The architectures to compile for, in the form of TORCH_CUDA_ARCH_LIST; "" for a CPU-only build."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    if given:
        return given
    devices = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    present = ";".join(f"{major}.{minor}" for major, minor in sorted(devices))
    return present or (ALL_CUDA_ARCHS if wish == "1" else "")


def cuda_build() -> tuple[Path, str] | None:
    """The CUDA folder and the architectures to compile for; None for a CPU-only build, with the reason on stderr."""
    wish = os.environ.get("LRDS_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"setup.py: LRDS_FAST_CUDA must be 0, 1 or unset; got {wish!r}")
    if wish == "0":
        print("lrds_fast: building for the CPU only (LRDS_FAST_CUDA=0)", file=sys.stderr)
        return None
    archs = cuda_archs(wish)
    home = find_cuda_home()
    missing = None
    if torch.version.cuda is None:
        missing = f"this torch ({torch.__version__}) is a CPU-only build; install a CUDA build of torch"
    elif not archs:
        missing = (
            "this machine has no GPU; to build the CUDA kernels anyway, set LRDS_FAST_CUDA=1 and optionally "
            f"TORCH_CUDA_ARCH_LIST (default {ALL_CUDA_ARCHS})"
        )
    elif home is None:
        missing = f"nvcc was not found; {HOW_TO_GET_NVCC}"
    if home is not None and missing is None:
        print(f"lrds_fast: building for the CPU and for CUDA {archs}", file=sys.stderr)
        return home, archs
    if wish == "1":
        raise SystemExit(f"setup.py: LRDS_FAST_CUDA=1, but {missing}")
    print(f"lrds_fast: building for the CPU only: {missing}", file=sys.stderr)
    return None


def nvcc_version(home: Path) -> str:
    """The release of nvcc, such as "13.0.88"; it may differ from the CUDA version of torch."""
    output = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", output)
    return found.group(1) if found else "unknown"


def cudart_folder(home: Path) -> list[str]:
    """Where the linker finds libcudart.so. The wheels ship it only under its versioned name, so it gets a link here."""
    for folder in (home / "lib64", home / "lib", home / "targets" / "x86_64-linux" / "lib"):
        if (folder / "libcudart.so").exists():
            return [str(folder)]
    for library in sorted((home / "lib").glob("libcudart.so.*")):
        links = ROOT / "build" / "cudart"
        links.mkdir(parents=True, exist_ok=True)
        link = links / "libcudart.so"
        link.unlink(missing_ok=True)
        link.symlink_to(library)
        return [str(links)]
    return []


def sources(pattern: str) -> list[str]:
    return sorted(str(Path(path).relative_to(ROOT)) for path in glob(str(ROOT / "csrc" / pattern)))


def extension() -> cpp_extension.CppExtension:
    cuda = cuda_build()
    macros: list[tuple[str, str | None]] = [
        ("LRDS_VERSION", f'"{version()}"'),
        ("LRDS_TORCH_VERSION", f'"{torch.__version__}"'),
    ]
    compile_args = {"cxx": ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall"]}
    files = sources("torch/*.cpp") + sources("cpu/*.cpp")
    options = {
        "include_dirs": [str(ROOT / "csrc"), *pybind11_include()],
        "extra_link_args": ["-fopenmp"],
    }
    if cuda is None:
        return cpp_extension.CppExtension(
            "lrds_fast._C", files, define_macros=macros, extra_compile_args=compile_args, **options
        )
    home, archs = cuda
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    # torch reads CUDA_HOME when it is imported; what was found may be a place that it does not look in.
    cpp_extension.CUDA_HOME = str(home)
    os.environ["CUDA_HOME"] = str(home)
    macros += [
        ("LRDS_WITH_CUDA", None),
        ("LRDS_CUDA_VERSION", f'"{nvcc_version(home)}"'),
        ("LRDS_CUDA_ARCHS", f'"{archs}"'),
    ]
    compile_args["nvcc"] = [
        "-O3",
        "-lineinfo",
        "-Werror",
        "all-warnings",
        "-Xcompiler",
        "-fvisibility=hidden",
    ]
    return cpp_extension.CUDAExtension(
        "lrds_fast._C",
        files + sources("cuda/*.cu"),
        define_macros=macros,
        extra_compile_args=compile_args,
        library_dirs=cudart_folder(home),
        **options,
    )


def write_record(extension: Path) -> None:
    """Writes build_info() of a built extension beside it, for lrds_fast/_build.py to read without loading it."""
    spec = importlib.util.spec_from_file_location("lrds_fast._C", extension)
    built = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(built)
    facts = {key: value for key, value in built.build_info().items() if key != "cpu_isa"}  # depends on the machine
    extension.with_name("_build.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


class BuildExt(cpp_extension.BuildExtension.with_options(use_ninja=True)):
    def run(self) -> None:
        super().run()
        for built in self.extensions:
            write_record(Path(self.get_ext_fullpath(built.name)))


class BdistWheel(bdist_wheel):
    """A wheel that requires the minor release of torch that it was built for."""

    archived = False

    def run(self) -> None:
        self.archived = True
        super().run()

    def write_wheelfile(self, wheelfile_base: str, *args: str) -> None:
        super().write_wheelfile(wheelfile_base, *args)
        if self.archived:
            metadata = Path(wheelfile_base, "METADATA")
            release = ".".join(torch.__version__.split(".")[:2])
            pinned = re.sub(
                r"^Requires-Dist: torch>=.*$",
                f"Requires-Dist: torch=={release}.*",
                metadata.read_text(encoding="utf-8"),
                flags=re.MULTILINE,
            )
            metadata.write_text(pinned, encoding="utf-8")


setup(
    # tools/build.sh has compiled in place already when it registers the checkout.
    ext_modules=[] if os.environ.get("LRDS_FAST_SKIP_BUILD") == "1" else [extension()],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
