"""What a number format is: how many bits, integer or float, and how many numbers share one scale.

A matrix is covered by equal tiles and every tile has one scale (and one zero point): that is all a granularity is.

    tensor (N, D)    channel, token (1, D)    group (1, g)    block (g, g)

`head` is for the KV cache alone, whose tiles are (tokens, 1, width): see `kv`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from puna.base.console import PunaError

Kind = Literal["int", "float"]
Granularity = Literal["tensor", "channel", "group", "block", "token", "head"]

FLOAT8_MAX = 448.0  # largest finite float8_e4m3fn (Micikevicius et al. 2022, arXiv:2209.05433, table 1)


@dataclass(frozen=True)
class Scheme:
    """A number format. `bits` 2..8 for integers and 8 for floats (float8_e4m3fn, always symmetric).

    group_size: columns of a group or side of a block, 0 otherwise. Errors: `PunaError` for what cannot be.
    """

    bits: int = 8
    kind: Kind = "int"
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.granularity not in get_args(Granularity):
            raise PunaError(
                f"no number format has kind '{self.kind}' with granularity '{self.granularity}'",
                f"kinds: {', '.join(get_args(Kind))}; granularities: {', '.join(get_args(Granularity))}",
            )
        if self.kind == "float" and (self.bits != 8 or not self.symmetric):
            raise PunaError(
                f"float with {self.bits} bits, symmetric={self.symmetric}, is not a format here",
                "floats have 8 bits and are symmetric; use kind 'int' for the rest",
            )
        if not 2 <= self.bits <= 8:
            raise PunaError(f"integers of {self.bits} bits are not a format here", "use 2 to 8 bits")
        if (self.group_size > 0) != (self.granularity in ("group", "block")):
            raise PunaError(
                f"group_size {self.group_size} does not go with granularity '{self.granularity}'",
                "give a group_size above 0 for group and block, none for the others",
            )

    @property
    def lowest(self) -> float:
        """The smallest code: -8 for four bits, -448 for float8."""
        return -FLOAT8_MAX if self.kind == "float" else -(2.0 ** (self.bits - 1))

    @property
    def highest(self) -> float:
        """The largest code: 7 for four bits, 448 for float8."""
        return FLOAT8_MAX if self.kind == "float" else 2.0 ** (self.bits - 1) - 1

    @property
    def half_range(self) -> float:
        """What absmax is divided by for a symmetric scale: 7.5 for four bits, 127.5 for eight, 448 for float8.

        7.5 and not 7, as compressed-tensors does: +absmax then lies half a step above code 7 and is clamped to it, so
        no error is above half a step while a sixteenth code is used.
        """
        return (self.highest - self.lowest) / 2

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) that share one scale in a matrix of `shape`; `PunaError` if tiles do not cover it evenly."""
        rows, columns = shape
        if self.granularity == "tensor":
            return rows, columns
        if self.granularity in ("channel", "token"):
            return 1, columns
        assert self.granularity != "head", "heads are no tiles of a matrix: see formats/kv"
        height = self.group_size if self.granularity == "block" else 1
        if columns % self.group_size or rows % height:
            raise PunaError(
                f"a weight of {rows} x {columns} does not divide into {self.granularity}s of {self.group_size}",
                f"use a group size that divides {columns}{f' and {rows}' if height > 1 else ''}, or per channel",
            )
        return height, self.group_size

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of a matrix of `shape`."""
        height, width = self.tile(shape)
        return shape[0] // height if height else 0, shape[1] // width if width else 0


INT8 = Scheme()
INT8_TOKEN = Scheme(granularity="token")
FLOAT8 = Scheme(kind="float")
FLOAT8_TENSOR = Scheme(kind="float", granularity="tensor")
FLOAT8_TOKEN = Scheme(kind="float", granularity="token")
INT4 = Scheme(bits=4, granularity="group", group_size=128)
