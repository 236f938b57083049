"""Compressed and columnar files as streams: gzip by zlib, Zstandard and parquet by pyarrow (the `data` extra)."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from puna.base.console import PunaError
from puna.base.files import FileInfo, is_remote, read_range

_PIECE = 1 << 20  # bytes of unpacked data at a time


def arrow() -> Any:
    """pyarrow with its parquet module; PunaError when it is not installed. Imported late: it takes a quarter second."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise PunaError(f"parquet and .zst files need pyarrow: {error}", 'pip install "puna[data]"') from error
    return pyarrow


def unpack(pieces: Iterator[bytes], packed: str, path: str) -> Iterator[bytes]:
    """The bytes of a .gz or .zst file of any number of members or frames. PunaError when it is cut short or damaged."""
    try:
        yield from _gunzip(pieces) if packed == "gz" else _unzstd(pieces)
    except (zlib.error, EOFError, OSError) as error:
        kind = "gzip" if packed == "gz" else "Zstandard"
        raise PunaError(f"{path} is not a whole {kind} file: {error}", "download or write it again") from error


def _gunzip(pieces: Iterator[bytes]) -> Iterator[bytes]:
    machine: Any = None
    for piece in pieces:
        while piece:
            if machine is None:
                piece = piece.lstrip(b"\0")  # members may be padded with zeros
                machine = zlib.decompressobj(31) if piece else None
                continue
            out = machine.decompress(piece, _PIECE)
            while out:  # a small piece may unpack to much
                yield out
                piece = machine.unconsumed_tail
                out = b"" if machine.eof else machine.decompress(piece, _PIECE)
            piece = machine.unused_data
            machine = None if machine.eof else machine
    if machine is not None:
        raise EOFError("it ends too early")


def _unzstd(pieces: Iterator[bytes]) -> Iterator[bytes]:
    pyarrow = arrow()
    with pyarrow.CompressedInputStream(pyarrow.PythonFile(_Stream(pieces), mode="r"), "zstd") as stream:
        while out := stream.read(_PIECE):
            yield out


class _Stream(io.RawIOBase):
    """Pieces of bytes as a file to read."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._rest = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._pieces, b"")
        part, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


class _Remote(io.RawIOBase):
    """An object of a store as a file with random access."""

    def __init__(self, info: FileInfo):
        self._info, self._place = info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0, self._place, self._info.size)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        stop = min(self._place + len(buffer), self._info.size)
        data = read_range(self._info.path, self._place, stop, self._info.version)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


@contextmanager
def whole_parquet(path: str) -> Iterator[None]:
    """Errors of the reads within become PunaErrors."""
    pyarrow = arrow()
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise PunaError(f"{path} is not a whole parquet file: {error}", "download or write it again") from error


def open_parquet(info: FileInfo) -> Any:
    """A pyarrow.parquet.ParquetFile; PunaError if it is none."""
    pyarrow = arrow()
    with whole_parquet(info.path):
        source = pyarrow.PythonFile(_Remote(info), mode="r") if is_remote(info.path) else info.path
        return pyarrow.parquet.ParquetFile(source)


def parquet_rows(table: Any) -> list[dict[str, Any]]:
    """Rows of a pyarrow Table or RecordBatch; text as bytes, as a damaged writer's may not be UTF-8."""
    pyarrow = arrow()
    columns = []
    for column in table.columns:
        text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
        columns.append((column.cast(pyarrow.large_binary()) if text else column).to_pylist())
    return [dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def pack_rows(batch: Any) -> bytes:
    """A pyarrow RecordBatch as bytes that another process opens with `unpack_rows`."""
    pyarrow = arrow()
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def unpack_rows(data: bytes) -> list[dict[str, Any]]:
    """The rows that `pack_rows` packed."""
    return parquet_rows(arrow().ipc.open_stream(data).read_all())
