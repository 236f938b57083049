"""The node's cache: one download per object, never more than its capacity, and after any accident whole or absent."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from puna.base import cache as cache_file
from puna.base import objects
from puna.base.cache import Cache, default_cache_root
from puna.base.console import PunaError
from puna.base.files import write_file

SIZE = 10_000


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch) -> None:
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(objects, "LONGEST_WAIT", 0.002)


class Shelf:
    """Objects in a bucket, with what an index would say of them."""

    def __init__(self, bucket: str, number: int):
        self.bucket = bucket
        self.data = [random.Random(i).randbytes(SIZE) for i in range(number)]
        self.keys = [hashlib.sha256(data).hexdigest() for data in self.data]
        for i, data in enumerate(self.data):
            write_file(self.url(i), data)

    def url(self, i: int) -> str:
        return f"{self.bucket}/shards/{i:03d}"

    def of(self, i: int) -> tuple[str, int, str]:
        return self.url(i), SIZE, self.keys[i]


@pytest.fixture
def shelf(s3_bucket) -> Shelf:
    return Shelf(s3_bucket, 6)


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache", 3 * SIZE)


def held(cache: Cache) -> list[Path]:
    """Everything that takes room: objects and downloads."""
    return [path for path in cache.root.rglob("*") if path.is_file() and path.suffix != ".lock"]


def gets(proxy) -> list[int]:
    return sorted(proxy.gets.values())


def test_a_miss_downloads_and_a_hit_does_not(shelf, cache, fault_proxy) -> None:
    for _ in range(3):
        path = cache.fetch(*shelf.of(0))
        assert path.read_bytes() == shelf.data[0]
        with cache.open(*shelf.of(0)) as file:
            assert file.read() == shelf.data[0]
    assert path == cache.root / shelf.keys[0][:2] / shelf.keys[0]
    assert gets(fault_proxy) == [1]


def test_the_same_content_under_two_names_is_kept_once(shelf, cache, s3_bucket, fault_proxy) -> None:
    write_file(f"{s3_bucket}/copy", shelf.data[0])
    assert cache.fetch(*shelf.of(0)) == cache.fetch(f"{s3_bucket}/copy", SIZE, shelf.keys[0])
    assert gets(fault_proxy) == [1]


def test_the_least_recently_used_goes_first(shelf, cache) -> None:
    for i in (0, 1, 2):
        cache.fetch(*shelf.of(i))
    cache.fetch(*shelf.of(0))
    cache.fetch(*shelf.of(3))
    assert {path.name for path in held(cache)} == {shelf.keys[i] for i in (0, 2, 3)}
    cache.fetch(*shelf.of(4))
    assert {path.name for path in held(cache)} == {shelf.keys[i] for i in (0, 3, 4)}
    assert len([path for path in cache.root.rglob("*.lock") if len(path.stem) == 64]) == 3  # evicted with the objects


def test_each_process_honours_its_own_capacity(shelf, cache) -> None:
    for i in (0, 1, 2):
        cache.fetch(*shelf.of(i))
    Cache(cache.root, 2 * SIZE).fetch(*shelf.of(3))
    assert {path.name for path in held(cache)} == {shelf.keys[2], shelf.keys[3]}


def test_an_object_larger_than_the_cache_is_refused(shelf, tmp_path, fault_proxy) -> None:
    with pytest.raises(PunaError, match=r"has 9\.77 KiB, the cache .* may hold 9\.76 KiB"):
        Cache(tmp_path / "small", SIZE - 1).fetch(*shelf.of(0))
    assert gets(fault_proxy) == []
    assert Cache(tmp_path / "small", SIZE).fetch(*shelf.of(0)).read_bytes() == shelf.data[0]


def test_an_open_object_keeps_its_bytes_when_evicted(shelf, tmp_path) -> None:
    cache = Cache(tmp_path / "one", SIZE)
    with cache.open(*shelf.of(0)) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        cache.fetch(*shelf.of(1))
        assert [path.name for path in held(cache)] == [shelf.keys[1]]
        assert mapped[:] == shelf.data[0]


def test_a_linked_object_stays_when_evicted(shelf, tmp_path, fault_proxy) -> None:
    small, target = Cache(tmp_path / "cache", SIZE), tmp_path / "cache" / "saves" / "x" / "weights"
    for _ in range(2):
        small.link(*shelf.of(0), target)
    assert sum(gets(fault_proxy)) == 1
    small.fetch(*shelf.of(1))
    assert not small._path(shelf.keys[0]).exists()
    assert target.read_bytes() == shelf.data[0]


def test_threads_never_exceed_the_capacity_and_read_what_they_asked_for(shelf, cache, monkeypatch) -> None:
    totals, real = [], os.truncate

    def count_too(path: Path, size: int) -> None:
        """The moment at which room is taken, under evict.lock: nothing else grows meanwhile."""
        real(path, size)
        total = 0
        for other in held(cache):
            with suppress(FileNotFoundError):  # a download that ended: renamed
                total += other.stat().st_size
        totals.append(total)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(12):
            i = draw.randrange(6)
            with cache.open(*shelf.of(i)) as file:
                assert file.read() == shelf.data[i]

    monkeypatch.setattr(cache_file.os, "truncate", count_too)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert max(totals) == cache.capacity
    assert sum(path.stat().st_size for path in held(cache)) == cache.capacity


# ---- faults on the way ----


def test_faults_on_the_way(shelf, cache, fault_proxy) -> None:
    for i, fault in enumerate(("truncate", "short", "reset", "503")):
        fault_proxy.script(fault)
        assert cache.fetch(*shelf.of(i)).read_bytes() == shelf.data[i]
    assert gets(fault_proxy) == [2, 2, 2, 2]


def test_a_flipped_byte_is_caught_and_the_object_asked_for_again(shelf, cache, fault_proxy) -> None:
    fault_proxy.script("flip")
    assert cache.fetch(*shelf.of(0)).read_bytes() == shelf.data[0]
    assert gets(fault_proxy) == [2]


def test_a_corrupt_object_is_an_error_and_not_kept(shelf, cache, fault_proxy) -> None:
    fault_proxy.always("flip")
    with pytest.raises(PunaError, match=f"is corrupt: sha256 expected {shelf.keys[0]}, got ") as caught:
        cache.fetch(*shelf.of(0))
    assert caught.value.message.startswith(shelf.url(0))
    assert gets(fault_proxy) == [2]
    assert held(cache) == []


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1])
def test_an_object_of_another_size_is_an_error(shelf, cache, size) -> None:
    with pytest.raises(PunaError, match=f"has .*{SIZE} bytes, {size} were expected"):
        cache.fetch(shelf.url(0), size, shelf.keys[0])
    assert held(cache) == []


def test_a_store_that_fails_leaves_nothing_behind(shelf, cache, fault_proxy) -> None:
    fault_proxy.always("503")
    with pytest.raises(PunaError, match="did not answer after"):
        cache.fetch(*shelf.of(0))
    assert held(cache) == []
    fault_proxy.calm()
    assert cache.fetch(*shelf.of(0)).read_bytes() == shelf.data[0]


def test_local_objects_are_cached_too(tmp_path, cache) -> None:
    write_file(tmp_path / "x", b"abc")
    path = cache.fetch(str(tmp_path / "x"), 3, hashlib.sha256(b"abc").hexdigest())
    assert path.read_bytes() == b"abc"


# ---- damage on disk ----


def test_a_cached_file_cut_short_is_downloaded_again(shelf, cache, fault_proxy) -> None:
    os.truncate(cache.fetch(*shelf.of(0)), 100)
    assert cache.fetch(*shelf.of(0)).read_bytes() == shelf.data[0]
    assert gets(fault_proxy) == [2]


def test_verify_finds_damage_of_the_same_size(shelf, cache, fault_proxy) -> None:
    path = cache.fetch(*shelf.of(0))
    path.write_bytes(bytes(SIZE))
    assert cache.fetch(*shelf.of(0)).read_bytes() == bytes(SIZE)  # by size alone it looks whole
    assert cache.fetch(*shelf.of(0), verify=True).read_bytes() == shelf.data[0]
    cache.fetch(*shelf.of(0), verify=True)
    assert gets(fault_proxy) == [2]


def test_a_disk_that_takes_a_little_at_a_time(shelf, cache, monkeypatch) -> None:
    real = os.write
    monkeypatch.setattr(cache_file.os, "write", lambda descriptor, data: real(descriptor, data[:700]))
    assert cache.fetch(*shelf.of(0)).read_bytes() == shelf.data[0]


def test_a_full_disk_evicts_and_goes_on(shelf, cache, fault_proxy, monkeypatch) -> None:
    cache.fetch(*shelf.of(0))
    real, left = os.write, [1]

    def full_once(descriptor: int, data: bytes) -> int:
        if left and left.pop():
            real(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(cache_file.os, "write", full_once)
    assert cache.fetch(*shelf.of(1)).read_bytes() == shelf.data[1]
    assert [path.name for path in held(cache)] == [shelf.keys[1]]
    assert gets(fault_proxy) == [1, 2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_stays_full_is_one_error_with_the_numbers(shelf, cache, monkeypatch, number) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache_file.os, "write", full)
    with pytest.raises(PunaError, match=r"the disk of the cache .* is full: .* needs 9\.77 KiB, .* are free") as caught:
        cache.fetch(*shelf.of(0))
    assert str(cache.root) in caught.value.message
    assert "PUNA_CACHE" in caught.value.hint
    assert held(cache) == []


def test_too_little_free_space_evicts_before_the_download(shelf, cache, monkeypatch) -> None:
    for i in (0, 1):
        cache.fetch(*shelf.of(i))
    free = [SIZE // 2]
    monkeypatch.setattr(cache_file.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free[0]}))
    cache.fetch(*shelf.of(2))
    assert {path.name for path in held(cache)} == {shelf.keys[1], shelf.keys[2]}


def test_a_folder_that_cannot_be_written(shelf, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PunaError, match=r"cannot write to the cache .*file/cache: Not a directory") as caught:
        Cache(tmp_path / "file" / "cache", SIZE).fetch(*shelf.of(0))
    assert "PUNA_CACHE" in caught.value.hint


def test_where_it_is(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("PUNA_CACHE", raising=False)
    assert default_cache_root() == Path("/home/someone/.cache/puna")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert default_cache_root() == Path("/var/cache/puna")
    monkeypatch.setenv("PUNA_CACHE", "~/mine")
    assert default_cache_root() == Path("/home/someone/mine")


# ---- several processes, and their deaths ----

WORKER = """
import hashlib, sys
from pathlib import Path
from puna.base.cache import Cache
root, bucket, size, *keys = sys.argv[1:]
cache = Cache(Path(root), 100 * int(size))
print("ready", flush=True)
sys.stdin.readline()
for i, key in enumerate(keys):
    with cache.open(f"{bucket}/shards/{i:03d}", int(size), key) as file:
        assert hashlib.sha256(file.read()).hexdigest() == key
print("done", flush=True)
"""


def start(cache: Cache, shelf: Shelf, number: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(cache.root), shelf.bucket, str(SIZE), *shelf.keys[:number]]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "ready\n"
    return worker


def test_processes_download_each_object_once(s3_bucket, cache, fault_proxy) -> None:
    shelf = Shelf(s3_bucket, 20)
    fault_proxy.delay = 0.02  # so that they meet at the same object
    fault_proxy.always("delay")
    workers = [start(cache, shelf, 20) for _ in range(3)]
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    outputs = [worker.communicate(timeout=60)[0] for worker in workers]
    assert outputs == ["done\n"] * 3
    assert gets(fault_proxy) == [1] * 20


@pytest.mark.parametrize("same", [True, False])
def test_a_killed_download_leaves_no_lock_and_no_part(shelf, tmp_path, fault_proxy, same) -> None:
    cache = Cache(tmp_path / "one", SIZE)  # no room beside what the dead process left
    fault_proxy.always("stall")
    worker = start(cache, shelf, 1)
    worker.stdin.write("go\n")
    worker.stdin.flush()
    assert fault_proxy.stalled.wait(30)
    assert [(path.suffix, path.stat().st_size) for path in held(cache)] == [(".part", SIZE)]
    worker.send_signal(signal.SIGKILL)
    worker.communicate(timeout=30)
    fault_proxy.calm()
    i = 0 if same else 1
    assert cache.fetch(*shelf.of(i)).read_bytes() == shelf.data[i]
    assert [path.name for path in held(cache)] == [shelf.keys[i]]


def test_a_download_waits_for_the_room_that_another_holds(shelf, tmp_path, fault_proxy, monkeypatch) -> None:
    monkeypatch.setenv("PUNA_STORE_TIMEOUT", "0.5")
    cache = Cache(tmp_path / "one", SIZE)  # room for one
    fault_proxy.script("stall")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.fetch, *shelf.of(0))
        assert fault_proxy.stalled.wait(30)
        waiting = threading.Event()
        make_room = cache._make_room

        def watched(*args):
            busy = make_room(*args)
            if busy is not None:
                waiting.set()
            return busy

        monkeypatch.setattr(cache, "_make_room", watched)
        second = pool.submit(lambda: cache.open(*shelf.of(1)).read())
        assert waiting.wait(30)
        assert first.result(timeout=30).name == shelf.keys[0]
        assert second.result(timeout=30) == shelf.data[1]
    assert [path.name for path in held(cache)] == [shelf.keys[1]]
    assert gets(fault_proxy) == [1, 2]


def test_a_removed_lock_file_is_no_lock(tmp_path, monkeypatch) -> None:
    """Who waited for a lock file that was evicted meanwhile must take the new one of that name."""
    lock, waiting, flock = tmp_path / "x.lock", threading.Event(), cache_file.fcntl.flock

    def told(descriptor: int, how: int) -> None:
        waiting.set()
        flock(descriptor, how)

    first = cache_file._take(lock)
    monkeypatch.setattr(cache_file.fcntl, "flock", told)
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(cache_file._take, lock)
        assert waiting.wait(30)
        lock.unlink()
        cache_file._release(first)
        second = waiter.result(timeout=30)
    assert lock.exists()
    assert os.path.samestat(os.fstat(second), os.stat(lock))
    assert cache_file._take(lock, wait=False) is None
    cache_file._release(second)


def test_a_forked_child_does_not_keep_a_lock(tmp_path) -> None:
    """A fork copies the descriptor, and flock lasts until the last copy is closed: it is released, not only closed."""
    descriptor = cache_file._take(tmp_path / "x.lock")
    copy = os.dup(descriptor)
    cache_file._release(descriptor)
    again = cache_file._take(tmp_path / "x.lock", wait=False)
    assert again is not None
    cache_file._release(again)
    os.close(copy)
