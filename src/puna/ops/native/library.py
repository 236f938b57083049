"""Finds and loads the native kernels built with the package; says why when there are none."""

from __future__ import annotations

import ctypes
import os
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

# The exact name this Python's build gives the extension: one left behind by another Python or processor is not taken.
PATH = Path(__file__).with_name("_kernels" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))
_FUNCTIONS = (
    "puna_gemv_float32", "puna_gemv_bfloat16", "puna_attention_forward", "puna_attention_backward",
    "puna_norm_float32", "puna_norm_bfloat16",
    "puna_fill_batch",
    "puna_packed_product", "puna_packed_dequantize", "puna_tiles_product", "puna_tiles_pack", "puna_tiles_unpack",
    "puna_paged_attention", "puna_step",
    "puna_blocks_product", "puna_blocks_dequantize",
)  # fmt: skip
LEVELS = ("baseline", "AVX2", "AVX-512")


class Library(NamedTuple):
    """The loaded kernels (None if there are none), the instruction set they run with, and one line for a start card."""

    kernels: ctypes.CDLL | None
    level: int
    reason: str


@lru_cache(maxsize=1)
def load() -> Library:
    """Load the kernels once. `PUNA_NATIVE=0` keeps them off; torch then does the same work.

    Import torch before: its bundled libgomp then serves both, and the two share one pool of threads.
    """
    if os.environ.get("PUNA_NATIVE", "1") == "0":
        return Library(None, 0, "off (PUNA_NATIVE=0)")
    if not PATH.exists():
        return Library(None, 0, "not built (install a C++ compiler, then `pip install` puna again)")
    try:
        kernels = ctypes.CDLL(str(PATH))
        for name in _FUNCTIONS:
            many = (
                [ctypes.c_int64] if name.endswith("product") or "gemv" in name else []
            )  # how many structs lie one after another
            getattr(kernels, name).argtypes = [ctypes.c_char_p, *many]  # packed as the C++ file describes
        level = int(kernels.puna_cpu_level())
    except (OSError, AttributeError) as error:
        return Library(None, 0, f"not loadable ({error})")
    return Library(kernels, level, LEVELS[level])


def available() -> bool:
    """True if the native kernels are loaded."""
    return load().kernels is not None
