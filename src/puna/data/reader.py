"""The shards of one source, opened when they are needed and checked against the manifest before a token is read.

Local shards are mapped where they lie; those of a bucket are brought into the node's cache first.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO

import numpy as np

from puna.base.cache import Cache
from puna.base.console import PunaError
from puna.base.files import is_remote, join, name_of, read_file, stat
from puna.data.shards import Manifest, Shard, ShardInfo, check_tokenizer, describe_shard, read_manifest
from puna.text.tokenizer import Tokenizer

# Open shards are only mappings; this bounds the address space, the open plans of how they are cut, and what of the
# page cache counts as this process's memory.
KEEP_OPEN = 48
_RESTORE = "restore the shard from its source, or run `puna tokenize` again into a new folder"


class ShardReader:
    """Random access to the shards of one folder. Safe to use from several threads."""

    def __init__(self, folder: str, manifest: Manifest, cache: Cache | None = None, keep: int = KEEP_OPEN):
        self.folder, self.manifest, self._cache, self._keep = folder, manifest, cache, keep
        self._open: OrderedDict[int, Future[Shard]] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Tokenizer, cache: Cache | None = None) -> ShardReader:
        """Read the manifest and refuse shards of another tokenizer. A bucket needs a cache."""
        manifest = read_manifest(folder)
        check_tokenizer(manifest, tokenizer, folder)
        assert cache is not None or not is_remote(folder)
        return cls(str(folder), manifest, cache)

    @classmethod
    def in_memory(cls, shard: Shard, text_bytes: int, tokenizer: Tokenizer, name: str = "memory") -> ShardReader:
        """Documents that were tokenized just now, as one shard that lies nowhere."""
        info = describe_shard("shard-000000", shard, text_bytes)
        eos = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
        manifest = Manifest(
            dtype=shard.tokens.dtype.name,
            vocab_size=tokenizer.vocab_size,
            vocab_hash=tokenizer.vocab_hash,
            bos_id=tokenizer.bos_id,
            eos_id=eos,
            tagged=shard.tags is not None,
            shards=[info],
        )
        reader = cls(name, manifest)
        reader._open[0] = Future()
        reader._open[0].set_result(shard)
        return reader

    @property
    def name(self) -> str:
        """Last part of the folder: how the source is called in logs."""
        return name_of(self.folder)

    def shard(self, number: int) -> Shard:
        """An open shard. The first call for it fetches, checks and maps it; others wait for that.

        Raises PunaError for a shard that is gone, cut short or damaged.
        """
        with self._lock:
            future = self._open.get(number)
            mine = future is None
            if future is None:
                future = self._open[number] = Future()
            self._open.move_to_end(number)
        if mine:
            self._fill(number, future)
        return future.result()

    def _fill(self, number: int, future: Future[Shard]) -> None:
        try:
            future.set_result(self._load(self.manifest.shards[number]))
        except BaseException as error:
            with self._lock:
                self._open.pop(number, None)  # the next call tries again
            future.set_exception(error)
        with self._lock:
            while len(self._open) > self._keep:
                self._open.popitem(last=False)  # arrays that are still in use keep their mapping

    def starts(self, number: int) -> np.ndarray:
        """Document offsets of a shard, (documents + 1,), without its tokens."""
        with self._lock:
            future = self._open.get(number)
        if future is not None and future.done() and future.exception() is None:
            return future.result().starts
        info = self.manifest.shards[number]
        path = join(self.folder, f"{info.name}.docs")
        data = self._checked(path, _documents_size(info, self.manifest.tagged), info.documents_sha256)
        return np.frombuffer(data, dtype=np.int64, count=info.documents + 1)

    def _load(self, info: ShardInfo) -> Shard:
        tagged = self.manifest.tagged
        docs = self._checked(
            join(self.folder, f"{info.name}.docs"), _documents_size(info, tagged), info.documents_sha256
        )
        starts = np.frombuffer(docs, dtype=np.int64, count=info.documents + 1)
        tags = np.frombuffer(docs, dtype=np.uint16, offset=starts.nbytes) if tagged else None
        dtype = np.dtype(self.manifest.dtype)
        with self._file(join(self.folder, f"{info.name}.bin"), info.tokens * dtype.itemsize, info.sha256) as file:
            # A plain array over the mapping, which outlives the file: slices of a memmap cost four times as much.
            return Shard(np.memmap(file, dtype=dtype, mode="r").view(np.ndarray), starts, tags)

    def _checked(self, path: str, size: int, sha256: str) -> bytes:
        """A small file as bytes, once they are what the manifest says."""
        if self._cache is not None and is_remote(path):
            with self._cache.open(path, size, sha256) as file:
                data = file.read()
        else:
            _check_size(path, size)
            data = read_file(path)
        _check_hash(path, hashlib.sha256(data).hexdigest(), sha256)
        return data

    def _file(self, path: str, size: int, sha256: str) -> BinaryIO:
        """A large file, opened after its size and hash were checked."""
        if self._cache is not None and is_remote(path):
            return self._cache.open(path, size, sha256, verify=True)
        _check_size(path, size)
        file = open(path, "rb")  # noqa: SIM115 - handed on
        try:
            _check_hash(path, hashlib.file_digest(file, "sha256").hexdigest(), sha256)
        except BaseException:
            file.close()
            raise
        return file


def _documents_size(info: ShardInfo, tagged: bool) -> int:
    return 8 * (info.documents + 1) + (2 * info.documents if tagged else 0)


def _check_size(path: str, size: int) -> None:
    found = stat(path)
    if found is None:
        raise PunaError(f"{path} is gone, but the manifest lists it", _RESTORE)
    if found.size != size:
        raise PunaError(f"{path} has {found.size} bytes, the manifest says {size}", _RESTORE)


def _check_hash(path: str, found: str, expected: str) -> None:
    if found != expected:
        raise PunaError(f"{path} is damaged: sha256 {found[:12]}..., the manifest says {expected[:12]}...", _RESTORE)
