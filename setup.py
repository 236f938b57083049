"""Builds the optional native kernels; everything else is in pyproject.toml.

The kernels have a plain C interface and are loaded with ctypes, so the shared library needs neither Python's nor
torch's headers. Files are compiled side by side. Without a C++ compiler the build goes on and torch does the work.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("src/puna/ops/native")


class BuildSideBySide(build_ext):
    """Compiles the files of an extension in parallel: one after another they take over a minute."""

    def build_extensions(self) -> None:
        compile_files = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor() as pool:
                return [
                    path for paths in pool.map(lambda file: compile_files([file], **options), sources) for path in paths
                ]

        self.compiler.compile = compile_all
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildSideBySide},
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
    ],
)
