"""Whole objects kept on a node's disk, up to a number of bytes: one download per object per node, checked by sha256.

    root/ab/<sha256>         the object, named by its content: jobs share it, and it never goes stale
    root/ab/<sha256>.part    a download under way, as long as the object, so that its length reserves the room
    root/ab/<sha256>.lock    flock: held while the object is downloaded, opened or evicted; a dead process lets go of it
    root/evict.lock          flock: one process at a time counts the bytes and makes room

No lock is waited for while evict.lock is held, and who has reserved room waits for no other's: there is no circle.
The least recently used object goes first (its mtime is the time of its last use). A reader that has it open or mapped
keeps its bytes: the name goes, the file stays until it is closed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from puna.base.console import PunaError
from puna.base.console import size as in_units
from puna.base.files import open_stream
from puna.base.storage import sha256_file

AT_ONCE = 8  # ranged reads in flight per download
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def default_cache_root() -> Path:
    """PUNA_CACHE, else $XDG_CACHE_HOME/puna, else ~/.cache/puna."""
    if chosen := os.environ.get("PUNA_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "puna"


class Cache:
    """A folder of at most `capacity` bytes, shared by all processes of a node; each honours its own capacity."""

    def __init__(self, root: Path, capacity: int):
        self.root = Path(root)
        self.capacity = capacity

    def fetch(self, url: str, size: int, sha256: str, verify: bool = False) -> Path:
        """The path of the object's local copy, downloaded if absent; `verify` also hashes a copy that was there.

        Another process may evict it right after: to read it, use `open`. Raises PunaError for an object that does not
        fit, cannot be read, or has another checksum, and for a disk that is full or not writable.
        """
        with self._locked(url, size, sha256):
            return self._present(url, size, sha256, verify)

    def open(self, url: str, size: int, sha256: str, verify: bool = False) -> BinaryIO:
        """The object's local copy, open for reading; its bytes stay even if its name is evicted. The caller closes."""
        with self._locked(url, size, sha256):
            return open(self._present(url, size, sha256, verify), "rb")

    def link(self, url: str, size: int, sha256: str, target: Path) -> None:
        """Give the object's local copy a second name on the same disk, which no eviction takes away."""
        with self._locked(url, size, sha256):
            path = self._present(url, size, sha256, verify=False)
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                os.link(path, target)

    @contextmanager
    def _locked(self, url: str, size: int, sha256: str) -> Iterator[None]:
        if size > self.capacity:
            raise PunaError(
                f"{url} has {in_units(size)}, the cache {self.root} may hold {in_units(self.capacity)}",
                "raise data.cache_gib, or make smaller shards",
            )
        try:
            path = self._path(sha256)
            path.parent.mkdir(parents=True, exist_ok=True)
            with _flock(_lock_of(path)):
                yield
        except OSError as error:
            raise self._disk_error(error, url, size) from error

    def _path(self, sha256: str) -> Path:
        return self.root / sha256[:2] / sha256

    def _present(self, url: str, size: int, sha256: str, verify: bool) -> Path:
        path = self._path(sha256)
        if path.exists() and path.stat().st_size == size and not (verify and sha256_file(path) != sha256):
            os.utime(path, ns=(time.time_ns(),) * 2)
            return path
        path.unlink(missing_ok=True)  # cut short or damaged on disk
        for last_try in (False, True):
            got = self._download(url, size, path)
            if got == sha256:
                os.utime(_part_of(path), ns=(time.time_ns(),) * 2)
                with _flock(self.root / "evict.lock"):  # who counts must see one of the two names
                    os.rename(_part_of(path), path)
                return path
            _part_of(path).unlink()
            if last_try:
                break
        raise PunaError(
            f"{url} is corrupt: sha256 expected {sha256}, got {got} (downloaded twice)",
            "write the object again from its source, or its checksum, if the object is right",
        )

    def _download(self, url: str, size: int, path: Path) -> str:
        """Write `url` to the part file and return its sha256. When the disk is full: evict and try once more."""
        try:
            return self._download_once(url, size, path, 0)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
        return self._download_once(url, size, path, size)

    def _download_once(self, url: str, size: int, path: Path, evict: int) -> str:
        part = _part_of(path)
        part.unlink(missing_ok=True)  # of a process that died: whoever writes one holds the lock, and that is us
        try:
            self._reserve(part, size, evict)
            return _copy(url, size, part)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    # ---- room ----

    def _reserve(self, part: Path, size: int, evict: int) -> None:
        """Make room for `size` bytes, evicting at least `evict`, and take it: the part file at its full length."""
        while True:
            with _flock(self.root / "evict.lock"):
                busy = self._make_room(size, evict)
                if busy is None:
                    part.touch()
                    os.truncate(part, size)
                    return
            with suppress(FileNotFoundError), _flock(busy, create=False):
                pass  # that download is done: its object can be evicted, or its room is free

    def _make_room(self, size: int, evict: int) -> Path | None:
        """Evict until `size` more bytes fit; None if they do, else the lock of someone who holds what is in the way.

        A disk with too little free space is no reason to wait: others fill it, too, and writing will tell.
        """
        files = sorted(self._scan())
        used = sum(bytes_ for _, bytes_, _ in files)
        missing = max(size - shutil.disk_usage(self.root).free, evict)
        busy = None
        for _, bytes_, path in files:
            if used + size <= self.capacity and missing <= 0 and path.suffix != ".part":
                continue
            if _remove_unheld(path):
                used, missing = used - bytes_, missing - bytes_
            else:
                busy = busy or _lock_of(path)
        return busy if used + size > self.capacity else None

    def _scan(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use in ns, bytes, path) of every object and every download under way or left behind."""
        for folder in self.root.glob("[0-9a-f][0-9a-f]"):
            for path in folder.iterdir():
                if path.suffix != ".lock":
                    with suppress(FileNotFoundError):  # renamed or gone meanwhile
                        entry = path.stat()
                        yield entry.st_mtime_ns, entry.st_size, path

    def _disk_error(self, error: OSError, url: str, size: int) -> PunaError:
        hint = "set PUNA_CACHE or data.cache_dir to another disk"
        if error.errno not in _NO_SPACE:
            return PunaError(f"cannot write to the cache {self.root}: {error.strerror or error}", hint)
        existing = next(p for p in (self.root, *self.root.parents) if p.exists())
        return PunaError(
            f"the disk of the cache {self.root} is full: {url} needs {in_units(size)}, "
            f"{in_units(shutil.disk_usage(existing).free)} are free",
            f"free some space, {hint}, or lower data.cache_gib",
        )


def _copy(url: str, size: int, part: Path) -> str:
    """Write the object over `part`, to the disk itself; return its sha256."""
    digest, written = hashlib.sha256(), 0
    descriptor = os.open(part, os.O_WRONLY)
    try:
        for piece in open_stream(url, at_once=AT_ONCE):
            written += len(piece)
            if written > size:
                break
            digest.update(piece)
            _write_all(descriptor, piece)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if written != size:
        more = "at least " if written > size else ""
        raise PunaError(f"{url} has {more}{written} bytes, {size} were expected", "write the object or its index again")
    return digest.hexdigest()


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _part_of(path: Path) -> Path:
    return path.with_suffix(".part")


def _lock_of(path: Path) -> Path:
    return path.with_suffix(".lock")


def _remove_unheld(path: Path) -> bool:
    """Remove an object or a dead process's part, with its lock file, unless someone holds the lock."""
    lock = _lock_of(path)
    descriptor = _take(lock, wait=False)
    if descriptor is None:
        return False
    try:
        path.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
    finally:
        _release(descriptor)
    return True


@contextmanager
def _flock(path: Path, create: bool = True) -> Iterator[None]:
    descriptor = _take(path, create=create)
    assert descriptor is not None
    try:
        yield
    finally:
        _release(descriptor)


def _take(path: Path, wait: bool = True, create: bool = True) -> int | None:
    """An exclusive flock on the file that has this name now; None if it is held and `wait` is False."""
    while True:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the lock file was removed while we waited for it: a new one has its name


def _release(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it with a child forked meanwhile
    os.close(descriptor)
