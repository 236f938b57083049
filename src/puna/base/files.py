"""The same few verbs for a local path and for a URL: list, stat, read, stream, write, remove.

A path is a str: local, or s3://bucket/key (gs://, az://). What cannot be done is a PunaError that names the path.
"""

from __future__ import annotations

import os
import re
import shutil
import stat as modes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from puna.base import objects
from puna.base.console import PunaError
from puna.base.objects import PART, FileInfo
from puna.base.storage import write_atomic

__all__ = ["FileInfo", "is_remote", "join", "list_files", "list_folders", "name_of", "open_stream", "read_file"]
__all__ += ["read_range", "remove", "remove_tree", "stat", "upload", "write_file"]


def is_remote(path: str | Path) -> bool:
    """Whether the path is a URL (scheme://...)."""
    return re.match(r"[a-z][a-z0-9+.-]*://", str(path)) is not None


def join(path: str | Path, *names: str) -> str:
    """A path below `path`."""
    if is_remote(path):
        return "/".join([str(path).rstrip("/"), *(name.strip("/") for name in names)])
    return os.path.join(path, *names)


def name_of(path: str | Path) -> str:
    """The last part of a path: 's3://b/web/a.txt' -> 'a.txt'."""
    return str(path).rstrip("/").rpartition("/")[2]


def list_files(path: str | Path) -> list[FileInfo]:
    """Every file of a file, folder or glob, sorted by path.

    A folder is walked with its subfolders (links followed once); names that begin with '.' and __pycache__ are left
    out. In a glob `*`, `?` and `[ab]` stay within one name and `**` is any number of folders; a folder that matches
    lists all of its files. Raises PunaError if the path does not exist, the glob matches nothing, or a folder cannot
    be read.
    """
    path = str(path)
    if is_remote(path) and _is_glob(path.split("/")[2]):
        raise PunaError(f"{path} has a pattern in its bucket", "name the bucket")
    single = stat(path) if not path.endswith("/") else None
    if single is not None:
        return [single]
    if _is_glob(path) and not (not is_remote(path) and os.path.isdir(path)):
        return _list_glob(path)
    found = sorted(_walk(path), key=lambda info: info.path)
    if not found and (is_remote(path) or not os.path.isdir(path)):
        raise PunaError(f"{path} does not exist", "check the path; a folder may be given, or a glob in quotes")
    return found


def stat(path: str | Path) -> FileInfo | None:
    """Size and version of one file; None if there is none (a folder is no file)."""
    path = str(path)
    if is_remote(path):
        return objects.head(path)
    try:
        entry = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _local_error(error, path) from error
    return FileInfo(path, entry.st_size, str(entry.st_mtime_ns)) if modes.S_ISREG(entry.st_mode) else None


def read_range(path: str | Path, start: int, stop: int, version: str = "") -> bytes:
    """Exactly the bytes [start, stop) of a file; PunaError if it ends before, or is remote and of another version."""
    path = str(path)
    if is_remote(path):
        return objects.read_range(path, start, stop, version)
    try:
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(max(0, stop - start))
    except OSError as error:
        raise _local_error(error, path) from error
    if len(data) != max(0, stop - start):
        raise PunaError(
            f"{path} ends at byte {start + len(data)}, {stop} were expected", "it was cut short: write it again"
        )
    return data


def read_file(path: str | Path) -> bytes:
    """All bytes of a file."""
    return b"".join(open_stream(path))


def open_stream(path: str | Path, chunk: int = PART, at_once: int = 4) -> Iterator[bytes]:
    """The bytes of a file in order, in pieces of `chunk`; of a remote one, `at_once` pieces are fetched ahead."""
    path = str(path)
    if not is_remote(path):
        yield from _read_pieces(path, chunk)
        return
    info = objects.head(path)
    if info is None:
        raise PunaError(f"{path} does not exist", "check the path")
    yield from objects.read_parallel(path, info.size, info.version, chunk, at_once)


def write_file(path: str | Path, data: bytes | memoryview) -> None:
    """Replace a file by `data`: a reader sees the old or the new one, never a part."""
    if is_remote(path):
        objects.write(str(path), data)
    else:
        write_atomic(Path(path), cast("bytes", data))  # any buffer does


def upload(path: str | Path, source: Path) -> None:
    """Put a local file into a bucket, streamed: for files that should not be read into memory."""
    objects.upload(str(path), source)


def remove(paths: Sequence[str | Path]) -> None:
    """Remove files of one folder tree or bucket, in no order; one that is absent is no error."""
    remote = [str(path) for path in paths if is_remote(path)]
    objects.remove(remote)
    for path in paths:
        if not is_remote(path):
            Path(path).unlink(missing_ok=True)


def remove_tree(path: str | Path) -> None:
    """Remove a folder and all below it, hidden names too; an absent one is no error."""
    if is_remote(path):
        objects.remove([info.path for info in objects.list_objects(str(path))])
    elif os.path.lexists(path):
        shutil.rmtree(path)


def list_folders(path: str | Path) -> list[str]:
    """The names of the folders in a folder, sorted, hidden ones too; none if it does not exist."""
    if is_remote(path):
        return objects.list_folders(str(path))
    try:
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def _read_pieces(path: str, chunk: int) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while piece := file.read(chunk):
                yield piece
    except OSError as error:
        raise _local_error(error, path) from error


def _walk(path: str) -> Iterator[FileInfo]:
    return _walk_remote(path) if is_remote(path) else _walk_local(path)


def _walk_remote(url: str) -> Iterator[FileInfo]:
    above = len(url.rstrip("/")) + 1
    found = [info for info in objects.list_objects(url) if not _is_hidden(info.path[above:])]
    folders = {os.path.dirname(info.path) for info in found}
    # Consoles write an empty object as a folder's marker: 'web/' of size 0 beside 'web/x'.
    return (info for info in found if info.size or info.path not in folders)


def _walk_local(folder: str) -> Iterator[FileInfo]:
    seen: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise _local_error(error, error.filename or folder) from error

    if not os.path.isdir(folder):
        return
    for root, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        here = os.stat(root)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()  # a link back to a folder above, or a second link to one
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in names:
            if not _is_hidden(name) and (info := _stat_entry(os.path.join(root, name))):
                yield info


def _stat_entry(path: str) -> FileInfo | None:
    info = stat(path)
    if info is None and not os.path.exists(path):
        raise PunaError(f"{path} is a link to nothing, or vanished while the folder was listed", "remove or repair it")
    return info  # None for sockets, pipes and the like


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.split("/"))


def _is_glob(path: str) -> bool:
    return any(letter in path for letter in "*?[")


def _list_glob(pattern: str) -> list[FileInfo]:
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if _is_glob(part))
    base = "/".join(parts[:first])
    matches = re.compile(_translate(pattern.rstrip("/")))
    found = list(_walk(base or ("/" if pattern.startswith("/") else ".")))
    chosen = [FileInfo(_trim(info.path, base), info.size, info.version) for info in found]
    chosen = sorted((info for info in chosen if matches.fullmatch(info.path)), key=lambda info: info.path)
    if not chosen:
        raise PunaError(f"no file matches {pattern} ({len(found)} looked at)", "check the pattern; ** is any folder")
    return chosen


def _trim(path: str, base: str) -> str:
    return path if base else path.removeprefix("./")


def _translate(pattern: str) -> str:
    """A glob as a regular expression that also matches everything below a folder that it matches."""
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out, i = out + "(?:[^/]+/)*", i + 3
        elif pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] in "*?":
            out, i = out + ("[^/]*" if pattern[i] == "*" else "[^/]"), i + 1
        elif pattern[i] == "[" and (end := pattern.find("]", i + 2)) > 0:
            inside = pattern[i + 1 : end].replace("\\", "\\\\")
            out, i = out + "[" + ("^/" + inside[1:] if inside[0] in "!^" else inside) + "]", end + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    return out + "(?:/.*)?"


def _local_error(error: OSError, path: str) -> PunaError:
    if isinstance(error, FileNotFoundError):
        return PunaError(f"{path} does not exist", "check the path")
    if isinstance(error, IsADirectoryError):
        return PunaError(f"{path} is a folder, not a file", "name a file in it")
    return PunaError(f"cannot read {path}: {error.strerror or error}", "check the path and its permissions")
