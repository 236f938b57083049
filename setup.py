"""Builds the optional native kernels; everything else is in pyproject.toml.

The kernels have a plain C interface and are loaded with ctypes, so the shared library needs neither Python's nor
torch's headers and compiles in a few seconds. Without a C++ compiler the build goes on and torch does the work.
"""

from pathlib import Path

from setuptools import Extension, setup

KERNELS = Path("src/puna/ops/native")

setup(
    ext_modules=[
        Extension(
            "puna.ops.native._kernels",
            sources=sorted(str(path) for path in KERNELS.glob("*.cpp")),
            depends=sorted(str(path) for path in KERNELS.glob("*.h")),
            language="c++",
            extra_compile_args=["-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-Wno-psabi"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
