"""Hidden states of many sequences on disk, so that memory holds a few of them and a killed run finds them again.

Two files take turns: layer i is read from one while layer i + 1 is written into the other. Plain reads and writes, not
a mapping: mapped pages count as the process's memory.

Shapes: S sequences of T tokens, width D.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

TOKENS_AT_ONCE = 4096  # of a forward pass: enough to keep every core busy, little enough to stay out of the way


class Stream:
    """One set of sequences on its way through the layers; `at(i)` is what goes into layer i."""

    def __init__(self, folder: Path, name: str, sequences: int, length: int, width: int):
        self.sequences, self.length, self.width = sequences, length, width
        self._files = [os.open(folder / f"{name}.{side}", os.O_RDWR | os.O_CREAT) for side in (0, 1)]

    @staticmethod
    def bytes_on_disk(sequences: int, length: int, width: int) -> int:
        """Both files."""
        return 2 * sequences * length * width * 4

    def batches(self) -> Iterator[slice]:
        """Sequences that go through a layer together."""
        step = max(1, TOKENS_AT_ONCE // self.length)
        for first in range(0, self.sequences, step):
            yield slice(first, min(first + step, self.sequences))

    def read(self, layer: int, rows: slice) -> Tensor:
        """fp32 hidden states (tokens, D) of these sequences before `layer`."""
        tokens = (rows.stop - rows.start) * self.length
        buffer = bytearray(tokens * self.width * 4)
        got = os.preadv(self._files[layer % 2], [buffer], self._offset(rows))
        assert got == len(buffer), f"stream ends after {got} of {len(buffer)} bytes"
        return torch.frombuffer(buffer, dtype=torch.float32).view(tokens, self.width)

    def write(self, layer: int, rows: slice, hidden_TD: Tensor) -> None:
        """What goes into `layer`."""
        data = memoryview(hidden_TD.detach().to("cpu", torch.float32).contiguous().numpy()).cast("B")  # type: ignore[arg-type]
        offset = self._offset(rows)
        while data:
            written = os.pwrite(self._files[layer % 2], data, offset)
            data, offset = data[written:], offset + written

    def sync(self, layer: int) -> None:
        """Wait until everything that goes into `layer` is on the disk."""
        os.fsync(self._files[layer % 2])

    def close(self) -> None:
        for file in self._files:
            os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _offset(self, rows: slice) -> int:
        return rows.start * self.length * self.width * 4
