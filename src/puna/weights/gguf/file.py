"""One GGUF file: metadata and a table of tensors in front, their bytes behind. Read by mapping, written in a stream.

    magic "GGUF" | version u32 | tensors u64 | keys u64
    keys x     (name, kind u32, value)            kinds 0..12; an array is (kind u32, length u64, values)
    tensors x  (name, dimensions u32, sizes u64.., type u32, offset u64)      sizes innermost first
    padding, then the data: tensor i lies at `offset` behind here, each start a multiple of the alignment (32 bytes)

Strings are a u64 length and UTF-8. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.base.console import PunaError, size
from puna.base.storage import disk_error, sync_folder
from puna.ops.formats.gguf import TYPES

ALIGNMENT = 32  # of tensor data, unless general.alignment says otherwise
_MAGIC, _VERSION = b"GGUF", 3
_NUMBERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "", "", "uint64", "int64",
            "float64")  # fmt: skip
_KIND_OF = {np.dtype(name): kind for kind, name in enumerate(_NUMBERS) if name}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_NAME_OF = {kind.number: name for name, kind in TYPES.items()}
# ggml's other types, so that a refusal can name them.
_OTHER_TYPES = {
    10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor in the file: its type's name (ops.formats.gguf), shape in torch's order, first byte, and bytes."""

    type: str
    shape: tuple[int, ...]
    start: int
    bytes: int


def stored_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of that type; its rows must be whole blocks."""
    kind = TYPES[type_name]
    return math.prod(shape) // kind.weights * kind.bytes


class GgufFile:
    """The front of a file, checked: `metadata` (str, int, float, bool, numpy arrays, lists of str) and `tensors`.

    Errors: PunaError for what is no GGUF, of another version or byte order, cut short, or contradicts itself.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.bytes = os.fstat(file.fileno()).st_size
                if self.bytes < 24:
                    raise _damaged(self.path, f"it has {self.bytes} bytes, a header alone has 24")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._parse(_Cursor(data, self.path))
        except OSError as error:
            raise PunaError(f"cannot read {self.path}: {error.strerror or error}", "check the path") from error

    def raw(self, name: str) -> Tensor:
        """The bytes of a tensor, (..., bytes per row) uint8: the mapped file itself, copied only where written to."""
        entry = self.tensors[name]
        if not entry.bytes:
            return torch.empty(*entry.shape[:-1], 0, dtype=torch.uint8)
        mapped = np.memmap(self.path, np.uint8, "c", entry.start, (entry.bytes,))
        return torch.from_numpy(mapped).view(*entry.shape[:-1], -1)

    def _parse(self, at: _Cursor) -> None:
        _check_start(at)
        count, keys = at.number(_U64), at.number(_U64)
        at.expect(keys, 13, "metadata keys")
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = at.text()
            if name in self.metadata:
                raise _damaged(self.path, f"the key {name} appears twice")
            self.metadata[name] = at.value(at.number(_U32))
        at.expect(count, 24, "tensors")
        found = [_entry(at) for _ in range(count)]
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _damaged(self.path, f"general.alignment is {alignment}, not a power of two")
        start = -(-at.position // alignment) * alignment
        self.tensors = self._placed(found, start, alignment)

    def _placed(self, found: list[tuple[str, Entry]], start: int, alignment: int) -> dict[str, Entry]:
        """Entries with their place in the file; they must lie in it, aligned, and apart."""
        tensors: dict[str, Entry] = {}
        for name, entry in found:
            if name in tensors:
                raise _damaged(self.path, f"the tensor {name} appears twice")
            if entry.start % alignment:
                raise _damaged(self.path, f"{name} lies at {entry.start}, no multiple of the alignment {alignment}")
            tensors[name] = Entry(entry.type, entry.shape, start + entry.start, entry.bytes)
        end, before = start, ""
        for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
            if entry.start < end and entry.bytes:
                raise _damaged(self.path, f"{name} begins at {entry.start}, before the end of {before} at {end}")
            end, before = max(end, entry.start + entry.bytes), name
        if end > self.bytes:
            raise _damaged(self.path, f"its tensors need {size(end)} ({end} bytes), the file has {self.bytes}")
        return tensors


def _check_start(at: _Cursor) -> None:
    magic = at.take(4)
    if magic != _MAGIC:
        hint = "it is a Git LFS pointer: run `git lfs pull`" if magic == b"vers" else "give a .gguf file"
        raise PunaError(f"{at.path} begins with {magic!r}, a GGUF file with {_MAGIC!r}", hint)
    version = at.number(_U32)
    if version & 0xFFFF == 0 and version:
        raise PunaError(f"{at.path} is written for big-endian machines", "fetch the ordinary little-endian file")
    if version != _VERSION:
        raise PunaError(
            f"{at.path} is GGUF version {version}, puna reads version {_VERSION}",
            "convert it with llama.cpp's `llama-quantize --allow-requantize IN OUT COPY`",
        )


def _entry(at: _Cursor) -> tuple[str, Entry]:
    """A row of the tensor table; `start` still counts from the beginning of the data."""
    name, dimensions = at.text(), at.number(_U32)
    if not 1 <= dimensions <= 4:
        raise _damaged(at.path, f"{name} has {dimensions} dimensions, GGUF allows 1 to 4")
    shape = tuple(at.number(_U64) for _ in range(dimensions))[::-1]
    number, start = at.number(_U32), at.number(_U64)
    if number not in _NAME_OF:
        other = _OTHER_TYPES.get(number, "unknown")
        raise PunaError(
            f"{name} in {at.path} has ggml type {number} ({other}), which puna does not read",
            f"types: {', '.join(TYPES)}; fetch the file in one of them (Q4_K_M, Q8_0, ...)",
        )
    block = TYPES[_NAME_OF[number]].weights
    if shape[-1] % block:
        raise _damaged(at.path, f"{name} {list(shape)} has rows that are no whole {_NAME_OF[number]} blocks of {block}")
    return name, Entry(_NAME_OF[number], shape, start, stored_bytes(_NAME_OF[number], shape))


class _Cursor:
    """A place in the mapped front of a file; every step is checked against its end."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.position = data, path, 0

    def take(self, count: int) -> bytes:
        self.expect(count, 1, "bytes")
        self.position += count
        return self.data[self.position - count : self.position]

    def expect(self, count: int, least: int, what: str) -> None:
        """Refuse a count of things of at least `least` bytes each that cannot be in the rest of the file."""
        left = len(self.data) - self.position
        if count * least > left:
            raise _damaged(self.path, f"it promises {count} {what} at byte {self.position}, {left} bytes are left")

    def number(self, form: struct.Struct) -> int:
        return int(form.unpack(self.take(form.size))[0])

    def text(self) -> str:
        start = self.position
        try:
            return self.take(self.number(_U64)).decode()
        except UnicodeDecodeError as error:
            raise _damaged(self.path, f"the text at byte {start} is no UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        """A metadata value: a Python scalar, a numpy array, or a list of strings (or of arrays)."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(depth)
        return self._numbers(kind, 1)[0].item()

    def _array(self, depth: int) -> Any:
        kind, length = self.number(_U32), self.number(_U64)
        if kind not in (_STRING, _ARRAY):
            return self._numbers(kind, length)
        if depth > 3:
            raise _damaged(self.path, f"arrays are nested {depth + 1} deep at byte {self.position}")
        self.expect(length, 8, "array elements")
        return [self.value(kind, depth + 1) for _ in range(length)]

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if not (0 <= kind < len(_NUMBERS) and _NUMBERS[kind]):
            raise _damaged(
                self.path, f"a metadata value before byte {self.position} has kind {kind}, known are 0 to 12"
            )
        dtype = np.dtype(_NUMBERS[kind])
        self.expect(count, dtype.itemsize, "numbers")
        data = self.take(count * dtype.itemsize)
        return np.frombuffer(data, "uint8") != 0 if dtype.kind == "b" else np.frombuffer(data, dtype)


def _damaged(path: Path, message: str) -> PunaError:
    return PunaError(f"{path} is not a whole GGUF file: {message}", "the file is cut short or damaged; fetch it again")


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    data: Callable[[str], Tensor],
) -> None:
    """Write a file, or nothing: beside its target, fsynced, then renamed. Memory: one tensor.

    metadata: str, bool, int (u32), float (f32), lists of those (int: i32), numpy scalars and arrays by their dtype.
    entries: {name: (type, shape)} in the order of the file; `data(name)` gives the bytes (uint8) when their turn
    comes. Errors: PunaError for a full disk or a path that cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(_front(metadata, entries))
            for name, (kind, shape) in entries.items():
                tensor = data(name).detach().cpu().contiguous().reshape(-1)
                expected = stored_bytes(kind, shape)
                assert tensor.dtype is torch.uint8
                assert len(tensor) == expected, f"{name}: {len(tensor)} of {expected} bytes"
                file.write(memoryview(tensor.numpy()))  # type: ignore[arg-type]
                file.write(bytes(-len(tensor) % ALIGNMENT))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        with suppress(OSError):  # after the rename there is nothing left
            beside.unlink()


def _front(metadata: Mapping[str, Any], entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(entries), len(metadata))]
    for name, value in metadata.items():
        kind, data = _packed(value)
        parts += [_text(name), struct.pack("<I", kind), data]
    start = 0
    for name, (type_name, shape) in entries.items():
        parts += [_text(name), struct.pack("<I", len(shape)), struct.pack(f"<{len(shape)}Q", *shape[::-1])]
        parts.append(struct.pack("<IQ", TYPES[type_name].number, start))
        start += -(-stored_bytes(type_name, shape) // ALIGNMENT) * ALIGNMENT
    front = b"".join(parts)
    return front + bytes(-len(front) % ALIGNMENT)


def _packed(value: Any) -> tuple[int, bytes]:
    """(kind, bytes) of a metadata value."""
    if isinstance(value, str):
        return _STRING, _text(value)
    if isinstance(value, list) and value and isinstance(value[0], str):
        return _ARRAY, struct.pack("<IQ", _STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(value, list | np.ndarray):
        array = np.asarray(value, None if isinstance(value, np.ndarray) else _element(value))
        kind = _KIND_OF[array.dtype]
        return _ARRAY, struct.pack("<IQ", kind, len(array)) + array.astype(array.dtype.newbyteorder("<")).tobytes()
    scalar = value if isinstance(value, np.generic) else np.asarray(value, _scalar(value))[()]
    return _KIND_OF[scalar.dtype], scalar.tobytes()


def _scalar(value: Any) -> str:
    return "bool" if isinstance(value, bool) else "uint32" if isinstance(value, int) else "float32"


def _element(values: list[Any]) -> str:
    kinds = {type(value) for value in values}
    return "bool" if kinds == {bool} else "int32" if kinds <= {int} else "float32"


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
