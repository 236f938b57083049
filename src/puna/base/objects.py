"""Objects in s3://, gs:// and az:// stores: listed, read in ranges, written, removed; a fault is mended or one error.

The client is obstore (Rust), used nowhere else. Its own retries are off: a body that is too short is a fault here, too.
One request takes at most TRIES time-outs and the waits between them: two minutes on a dead line as set below.

A read asks for one version of an object throughout (its ETag), so an object replaced meanwhile is an error and not a
mixture. Bytes flipped on the way are not noticed here but by the cache (`base.cache`), which knows the checksum.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import obstore
from obstore.store import AzureStore, GCSStore, S3Store

from puna.base.console import PunaError, say
from puna.base.credentials import CREDENTIALS_HINT, clean, credential_options, credential_source

PART = 8 << 20  # bytes per ranged read: S3's advice is 8-16 MiB
PAGE = 1000  # objects per piece of a listing: what S3 answers at once
AT_ONCE = 8  # ranged reads in flight; one connection of S3 gives ~90 MB/s
UPLOAD_PART = 16 << 20  # bytes per part of an upload
MAX_PARTS = 9_000  # of one object; S3 takes 10,000
TRIES = 6
FIRST_WAIT, WAIT_GROWTH, LONGEST_WAIT = 0.1, 3.0, 8.0  # seconds: 0.1, 0.3, 0.9, 2.7, 8, each times 0.5 to 1.5
TIMEOUT = 20.0  # seconds without a byte; PUNA_STORE_TIMEOUT overrides it
SECONDS_BETWEEN_LINES = 5.0

_STORES: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}


@dataclass(frozen=True)
class FileInfo:
    """A file or object as it stands: `size` in bytes; `version` is the ETag (remote) or mtime in ns (local)."""

    path: str
    size: int
    version: str


class _Trouble(Exception):
    """A fault that may pass: the text is the reason, in a few words."""


def list_objects(url: str) -> Iterator[FileInfo]:
    """Everything below a prefix, in key order, with folder semantics: s3://b/web lists web/x, not web2/x.

    A failed page is asked for again from the last key seen. Raises PunaError for a bucket that is absent or closed.
    """
    scheme, bucket, key = split_url(url)
    stream: Any = None
    last: str | None = None

    def next_page() -> list[Any]:
        nonlocal stream
        try:
            stream = stream or iter(obstore.list(_store(url), key.rstrip("/") or None, offset=last, chunk_size=PAGE))
            return list(next(stream, []))
        except Exception:
            stream = None  # a stream that failed has ended
            raise

    while page := _persist(url, "list", next_page):
        last = page[-1]["path"]
        for meta in page:
            yield FileInfo(f"{scheme}://{bucket}/{meta['path']}", meta["size"], meta["e_tag"] or "")


def head(url: str) -> FileInfo | None:
    """Size and version of one object; None if there is none."""
    key = split_url(url)[2]
    if not key:
        return None  # a bucket is no object
    try:
        meta = _persist(url, "read", lambda: obstore.head(_store(url), key))
    except FileNotFoundError:
        return None
    return FileInfo(url, meta["size"], meta["e_tag"] or "")


def read_range(url: str, start: int, stop: int, version: str = "") -> bytes:
    """Exactly the bytes [start, stop) of an object, of the given version if one is named; else PunaError."""
    return _read(url, start, stop, version, threading.Event())


def read_parallel(url: str, size: int, version: str = "", part: int = PART, at_once: int = AT_ONCE) -> Iterator[bytes]:
    """The first `size` bytes of an object in order, in pieces of `part` bytes, `at_once` of them being fetched ahead.

    In order, so that one pass can write and hash them. Memory: at_once * part bytes.
    """
    stop = threading.Event()
    starts = iter(range(0, size, part))
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="puna-read")
    pending: deque[Any] = deque()

    def submit_next() -> None:
        if (start := next(starts, None)) is not None:
            pending.append(pool.submit(_read, url, start, min(start + part, size), version, stop))

    try:
        for _ in range(at_once):
            submit_next()
        while pending:
            piece = pending.popleft().result()
            submit_next()
            yield piece
    finally:
        stop.set()  # the reader left, or one part failed for good: the others need not go on
        pool.shutdown(wait=False, cancel_futures=True)


def write(url: str, data: bytes | memoryview) -> None:
    """Put one object: whole or absent, an older one is replaced."""
    key = split_url(url)[2]
    _persist(url, "write", lambda: obstore.put(_store(url), key, data))


def upload(url: str, source: Path) -> None:
    """Put a local file as one object, whole or absent, in parts of UPLOAD_PART bytes: memory holds a few of them.

    A kill leaves the parts of an unfinished upload in the bucket, unseen but paid for: set a lifecycle rule there that
    drops incomplete uploads after a day.
    """
    key, part = split_url(url)[2], max(UPLOAD_PART, -(-source.stat().st_size // MAX_PARTS))
    _persist(url, "write", lambda: obstore.put(_store(url), key, source, chunk_size=part, max_concurrency=AT_ONCE))


def remove(urls: Sequence[str]) -> None:
    """Remove objects of one bucket; one that is absent is no error."""
    keys = [split_url(url)[2] for url in urls]
    for first in range(0, len(keys), PAGE):
        _remove_some(urls[first : first + PAGE], keys[first : first + PAGE])


def _remove_some(urls: Sequence[str], keys: Sequence[str]) -> None:
    try:
        _persist(urls[0], "remove", lambda: obstore.delete(_store(urls[0]), keys))
    except FileNotFoundError:  # Google's and Azure's stores complain of an absent one, and leave the rest undone
        if len(urls) > 1:
            remove(urls[: len(urls) // 2])
            remove(urls[len(urls) // 2 :])


def list_folders(url: str) -> list[str]:
    """The names one level below a prefix that have objects below them: s3://b/run -> ['step-000100']."""
    key = split_url(url)[2].rstrip("/")
    found = _persist(url, "list", lambda: obstore.list_with_delimiter(_store(url), key or None))
    return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"])


def split_url(url: str) -> tuple[str, str, str]:
    """s3://bucket/a/b -> ('s3', 'bucket', 'a/b'); PunaError for other schemes or no bucket."""
    scheme, found, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if not found or scheme not in _STORES or not bucket:
        raise PunaError(f"{clean(url)} is no address of an object", "write s3://bucket/key, gs://… or az://container/…")
    if "//" in key or "/./" in f"/{key}/" or "/../" in f"/{key}/":
        raise PunaError(f"{clean(url)} has an empty, '.' or '..' part", "rename the object or correct the path")
    return scheme, bucket, key


def _read(url: str, start: int, stop: int, version: str, cancelled: threading.Event) -> bytes:
    if stop <= start:
        return b""
    key = split_url(url)[2]
    try:
        return _persist(url, "read", lambda: _read_once(url, key, start, stop, version), cancelled)
    except FileNotFoundError:
        raise PunaError(f"{url} does not exist", "check the path; `aws s3 ls` shows what the bucket holds") from None


def _read_once(url: str, key: str, start: int, stop: int, version: str) -> bytes:
    result = obstore.get(_store(url), key, options={"range": (start, stop)})
    tag, whole = result.meta["e_tag"] or "", result.meta["size"]
    if version and tag and tag != version:
        raise PunaError(f"{url} was replaced while it was read", "start again; do not overwrite data that a job reads")
    if stop > whole:
        raise PunaError(f"{url} has {whole} bytes, {stop} were expected", "it was replaced or cut short")
    data = bytes(result.bytes())
    if len(data) != stop - start:
        raise _Trouble(f"the answer held {len(data)} of {stop - start} bytes")
    return data


# ---- the store object ----


def _store(url: str) -> Any:
    """One client per bucket, made anew when the environment (credentials, endpoint) changes."""
    _refuse_forked()
    scheme, bucket, _ = split_url(url)
    prefixes = ("AWS_", "GOOGLE_", "AZURE_", "PUNA_STORE_")
    return _open_store(scheme, bucket, tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(prefixes))))


@lru_cache(maxsize=64)
def _open_store(scheme: str, bucket: str, environment: tuple[tuple[str, str], ...]) -> Any:
    del environment  # part of the key only; obstore reads it itself
    seconds = store_timeout()
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=min(5.0, seconds)),
        "read_timeout": timedelta(seconds=seconds),
        "timeout": timedelta(seconds=3 * seconds),  # a server that drips a byte now and then is given up, too
    }
    options: dict[str, Any] = {"retry_config": {"max_retries": 0, "retry_timeout": timedelta(seconds=3 * seconds)}}
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        client["allow_http"] = endpoint.startswith("http://")  # only if asked for; obstore reads the address itself
        options |= credential_options()
    return _STORES[scheme](bucket, client_options=client, **options)


def store_timeout() -> float:
    """Seconds without a byte after which a try is given up: PUNA_STORE_TIMEOUT, or TIMEOUT."""
    text = os.environ.get("PUNA_STORE_TIMEOUT", "")
    try:
        return float(text) if text else TIMEOUT
    except ValueError:
        raise PunaError(f"PUNA_STORE_TIMEOUT is {text!r}, not a number of seconds", "for example 20") from None


_first_process = 0


def _refuse_forked() -> None:
    """obstore's threads do not survive a fork: a child would wait for them for ever, so it is told at once."""
    global _first_process
    _first_process = _first_process or os.getpid()
    if _first_process != os.getpid():
        raise PunaError(
            f"process {os.getpid()} was forked from {_first_process}, which had read from an object store",
            'start workers with multiprocessing.get_context("spawn") or "forkserver"',
        )


# ---- tries ----

_JITTER = random.Random()  # its own: reading data must not move anyone's random numbers


def _persist(url: str, verb: str, call: Callable[[], Any], cancelled: threading.Event | None = None) -> Any:
    """`call()`, again after each fault that may pass. Raises FileNotFoundError for an absent object, else PunaError."""
    cancelled = cancelled or threading.Event()
    began, wait = time.monotonic(), FIRST_WAIT
    for number in range(1, TRIES + 1):
        try:
            return call()
        except (_Trouble, obstore.exceptions.BaseError, OSError, ValueError) as error:
            failed = error
        reason = _judge(failed, url, verb)  # out here, so that no traceback shows obstore's own text
        if number == TRIES or cancelled.wait(wait * _JITTER.uniform(0.5, 1.5)):
            break
        if number > 1:
            _say_sometimes(f"{url}: {reason}, try {number + 1} of {TRIES}")
        wait = min(wait * WAIT_GROWTH, LONGEST_WAIT)
    raise PunaError(
        f"{url} did not answer after {number} tries in {time.monotonic() - began:.1f} s: {reason}",
        "check the network and the store, then start again; PUNA_STORE_TIMEOUT sets the seconds a try waits for a byte",
    )


_last_line = 0.0


def _say_sometimes(text: str) -> None:
    global _last_line
    if time.monotonic() - _last_line >= SECONDS_BETWEEN_LINES:
        _last_line = time.monotonic()
        say(text)


def _judge(error: Exception, url: str, verb: str) -> str:
    """The reason for another try, or the error that ends all tries."""
    text = str(error)
    if isinstance(error, _Trouble):
        return text
    status = int(found[1]) if (found := re.search(r"status code: (\d{3})", text)) else 0
    code = found[1] if (found := re.search(r"<Code>(\w+)</Code>", text)) else ""
    reason = f"{status or ''} {code}".strip()
    scheme, bucket = url.partition(":")[0], "/".join(url.split("/")[:3])
    if code == "NoSuchBucket" or "ContainerNotFound" in text:
        raise PunaError(f"the bucket {bucket} does not exist", "check its name, AWS_ENDPOINT_URL and AWS_REGION")
    if isinstance(error, FileNotFoundError) and verb in ("read", "remove"):
        raise error
    if status >= 500 or status in (408, 429) or code in ("RequestTimeout", "SlowDown", "InternalError"):
        return reason
    if _asked_for_credentials(text):
        raise PunaError(f"no credentials to {verb} {url}: {credential_source(scheme)}", CREDENTIALS_HINT[scheme])
    if status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
        message = f"no permission to {verb} {url} ({reason}; {credential_source(scheme)})"
        raise PunaError(message, f"ask the bucket's owner, or {CREDENTIALS_HINT[scheme]}")
    if "Received redirect" in text or status in (301, 307) or code == "AuthorizationHeaderMalformed":
        raise PunaError(f"{bucket} is in another region than the one asked", "set AWS_REGION to the bucket's region")
    if status == 416:
        raise PunaError(f"{url} ends before the bytes asked for", "it was replaced or cut short")
    if broken := next((name for mark, name in _TRANSPORT.items() if mark in text and not status), ""):
        return broken
    raise PunaError(f"cannot {verb} {url}: {reason or clean(text)}", "check the path and the store's settings")


# What obstore's error text holds when no answer came, and what a person calls it; the last two fit all the rest.
_TRANSPORT = {"kind: Timeout": "time-out", "TimedOut": "time-out", "kind: Connect": "no connection"}
_TRANSPORT |= {"IncompleteMessage": "the connection broke", "IncompleteBody": "the answer was cut short"}
_TRANSPORT |= {"invalid list response": "the list was garbled", "error decoding": "the answer was cut short"}
_TRANSPORT |= {"HTTP error": "the connection broke", "kind: ": "the connection broke"}


def _asked_for_credentials(text: str) -> bool:
    """Whether the failed request was one for the credentials of this machine, not for the object."""
    line = text.partition("\n")[0]
    asked = found[1] if (found := re.search(r"Error performing \w+ (\S+) in ", line)) else ""
    places = (
        "http://169.254.",
        "http://metadata.google.",
        os.environ.get("AWS_METADATA_ENDPOINT") or "http://169.254.",
    )
    return asked.startswith(places) or "credential" in line.replace(asked, "").lower()
