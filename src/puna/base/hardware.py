"""What this machine is: device, dtype, and the names that go on a start card."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import lru_cache
from pathlib import Path

import torch

from puna.base.console import PunaError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def parse_dtype(name: str) -> torch.dtype:
    """'float32', 'bfloat16', 'float16' or their short forms -> torch dtype."""
    full = _SHORT.get(name, name)
    if full not in DTYPES:
        raise PunaError(f"unknown dtype {name!r}", f"use one of {', '.join([*DTYPES, *_SHORT])}")
    return DTYPES[full]


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> 'float32', as config.json writes it."""
    return str(dtype).removeprefix("torch.")


def pick_device(name: str = "auto") -> torch.device:
    """'auto' takes the GPU if there is one; anything else is checked and taken as it is."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PunaError(f"unknown device {name!r}", "use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PunaError("device cuda was asked for, but torch sees no GPU", "use --device cpu")
    return device


@lru_cache(maxsize=1)
def describe() -> str:
    """One line for cards and logs: processor or GPU, cores, torch."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{_cpu_name()}, {usable_cores()} cores, torch {torch.__version__}"


def usable_cores() -> int:
    """Cores this process may run on (a container may see more than it can use)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def available_memory() -> int:
    """Bytes that this machine can still give without swapping; a large number where it does not say."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 50


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let the C allocator keep what training frees instead of returning it to the kernel.

    Each step allocates the same large tensors; by default glibc maps and unmaps them every time, and the kernel zeroes
    every page anew. Costs nothing but the peak staying reserved. Figures: docs/log.md, 2026-11-21. Linux only.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)


# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
