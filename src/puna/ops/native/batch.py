"""Fills a training batch from token files in one native pass; its twin is numpy, in data/pack."""

from __future__ import annotations

import struct

import numpy as np

from puna.ops.native import library

_STRUCT = struct.Struct("PPPPPPPqqq")  # `Batch` in batch.cpp


def available() -> bool:
    """True if the native kernels are loaded."""
    return library.available()


def fill(
    out: tuple[np.ndarray, np.ndarray, np.ndarray],
    source: np.ndarray,
    place: np.ndarray,
    length: np.ndarray,
    ends: np.ndarray,
    width: int,
    ignore: int,
) -> None:
    """Write tokens, targets and positions of pieces, each (T,) int64, contiguous.

    Shapes, all (pieces,): `source` uint64 addresses of ids of `width` bytes (2 or 4), `place` and `length` int64,
    `ends` bool: the piece's last target is `ignore`, elsewhere the id behind the piece, which must exist. Pieces have
    at least one id and lie inside `out`: the caller vouches for that.
    """
    kernels = library.load().kernels
    assert kernels is not None
    arrays = [np.ascontiguousarray(x, dtype) for x, dtype in
              ((source, np.uint64), (place, np.int64), (length, np.int64), (ends, np.uint8))]  # fmt: skip
    addresses = [x.ctypes.data for x in (*out, *arrays)]
    kernels.puna_fill_batch(_STRUCT.pack(*addresses, len(place), width, ignore))
