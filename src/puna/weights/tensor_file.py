"""One safetensors file, written tensor by tensor: memory holds one of them, and the checksum is ready with the file.

safetensors' own writer wants all tensors at once, and hashing its file means to read it again; this one hashes each
tensor in a second thread while it goes to the disk. Format: https://huggingface.co/docs/safetensors, "Format" - the
length of the header (8 bytes, little endian), the header (JSON), then the tensors end to end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.weights.manifest import Digests, FileDigest
from puna.weights.names import HUGGINGFACE, names_on_disk
from puna.weights.shards import WeightFile

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
           torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
           torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
_PIECE = 16 << 20  # bytes between two looks at whether the hash keeps up

Entry = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape


def write_files(
    files: Sequence[WeightFile], tensors: Iterator[Tensor], entries: Mapping[str, Entry], folder: Path
) -> Digests:
    """Write these files from `tensors`, which come in the files' order; `entries` by parameter name (ours).

    `tensors` is run to its end even if writing fails: behind it other ranks wait for the parts that this one has.
    """
    digests = {}
    try:
        for file in files:
            disk_names = names_on_disk(file.parameters, HUGGINGFACE)
            with TensorFile(folder / file.name, {disk_names[name]: entries[name] for name in file.parameters}) as out:
                for _ in file.parameters:
                    out.add(next(tensors))
            digests[file.name] = out.digest
    finally:
        for _ in tensors:
            pass
    return digests


class TensorFile:
    """A new safetensors file with these tensors; `add` them in this order. Leaving the context fsyncs and closes it.

    Raises OSError as the operating system gives it (a full disk).
    """

    def __init__(self, path: Path, entries: dict[str, Entry]):
        self._entries, self._next = list(entries.values()), 0
        self._digest, self._size = hashlib.sha256(), 0
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="puna-hash")
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115
        self._header = _header(entries)

    def __enter__(self) -> TensorFile:
        self._write(memoryview(self._header))
        return self

    def add(self, tensor: Tensor) -> None:
        """The next tensor, on the CPU, of the dtype and shape that were announced."""
        dtype, shape = self._entries[self._next]
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), f"announced {dtype} {shape}, got {tensor.shape}"
        self._next += 1
        flat = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for first in range(0, len(flat), _PIECE):
            self._write(flat[first : first + _PIECE])

    @property
    def digest(self) -> FileDigest:
        """Size and sha256 of what was written."""
        return FileDigest(self._size, self._digest.hexdigest())

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                assert self._next == len(self._entries), f"{self._next} of {len(self._entries)} tensors written"
                os.fsync(self._file.fileno())
        finally:
            self._hasher.shutdown()
            self._file.close()

    def _write(self, data: memoryview) -> None:
        hashed = self._hasher.submit(self._digest.update, data)
        try:
            rest = data
            while rest:
                rest = rest[self._file.write(rest) :]
        finally:
            hashed.result()  # the memory is the caller's again
        self._size += len(data)


def _header(entries: dict[str, Entry]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        fields[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned in a mapped file
    return len(text).to_bytes(8, "little") + text
