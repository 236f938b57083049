"""A save in a bucket as a local folder: every file fetched once per machine, and checked against the manifest."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from puna.base import files
from puna.base.cache import Cache, default_cache_root
from puna.base.console import PunaError
from puna.weights.manifest import MANIFEST, manifest_bytes, read_manifest

_UNUSED = 24 * 3600.0  # seconds after which a folder that nobody asked for is removed
_NO_LIMIT = 1 << 62  # bytes: what is being loaded must fit, and the disk sets the limit


def local_folder(path: str | Path, state: bool = True, cache: Cache | None = None) -> Path:
    """The folder itself if `path` is local; a save's URL, or RUN/latest: a folder with its files on this machine.

    The files are shared with the cache (hard links: evicting them does not take them away), so that all processes of a
    machine fetch them once. `state` False leaves out the optimizer's, which loading a model does not need. A folder
    goes when none has asked for it for a day. Raises PunaError for a URL that holds no save, and as `Cache.fetch` does.
    """
    if not files.is_remote(path):
        return Path(path)
    save = follow_latest(str(path))
    digests = read_manifest(save)
    cache = cache or Cache(default_cache_root(), _NO_LIMIT)
    manifest = manifest_bytes(digests)
    home = cache.root / "saves"
    _remove_unused(home)
    folder = home / hashlib.sha256(manifest).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for name, digest in digests.items():
        if state or not name.startswith("state/"):
            cache.link(files.join(save, name), digest.size, digest.sha256, folder / name)
    if state:
        files.write_file(folder / MANIFEST, manifest)
    return folder


def follow_latest(url: str) -> str:
    """A save's URL, also from RUN/latest, in a bucket an object that names a save beside it."""
    url = url.rstrip("/")
    if files.stat(files.join(url, MANIFEST)) is None and files.stat(url) is not None:
        name = files.read_file(url).decode(errors="replace").strip()
        if not name.startswith("step-") or "/" in name:
            raise PunaError(f"{url} does not name a save", "give a step folder's URL, or RUN/latest")
        return files.join(url.rpartition("/")[0], name)
    return url


def _remove_unused(home: Path) -> None:
    for folder in home.glob("*"):
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > _UNUSED:
                shutil.rmtree(folder, ignore_errors=True)
