"""What pyproject.toml cannot say: the C++ extension, and where two packages lie."""

from __future__ import annotations

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

KERNELS = "rlspec.kernels"  # kept in kernels/triton, which has no __init__.py above it on purpose
CUDA = f"{KERNELS}.cuda"  # sources, which are compiled where they run

extension = Pybind11Extension(
    "rlspec._C",
    sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.hpp")),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
)

ParallelCompile().install()  # on all cores
setup(
    packages=[
        *find_packages(include=["rlspec", "rlspec.*"]),
        KERNELS,
        CUDA,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels/triton")),
    ],
    package_dir={KERNELS: "kernels/triton", CUDA: "csrc/cuda"},
    ext_modules=[extension],
)
