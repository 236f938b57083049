"""Files that are whole or absent: every write goes beside its target, is fsynced and then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from puna.base.console import PunaError, size


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` in one step: a reader sees the old or the new file, never a part."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # a parent that is a file cannot be searched either
            beside.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def write_json(path: Path, payload: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(payload, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; a missing or broken one is a PunaError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PunaError(f"{path} does not exist", "check the path; a model folder holds a config.json") from error
    except (ValueError, OSError) as error:
        raise PunaError(f"{path} is not readable JSON: {error}", "restore the file from its source") from error


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success every file in it is fsynced and it is renamed to `target`.

    On any error the folder is removed, so `target` is whole or absent. An existing `target` is replaced at the end.
    """
    target = Path(target)
    beside = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        sync_tree(beside)
        swap_in(beside, target)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise disk_error(error, target) from error
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def swap_in(beside: Path, target: Path) -> None:
    """Rename a folder to its sibling `target`, which is replaced if it exists; it stays whole until then."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)  # a folder cannot be replaced in one call; the old one stays whole until the new is in
    os.rename(beside, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def point_latest(link: Path, target: Path) -> None:
    """Make the symbolic link `link` name its sibling `target`, in one step."""
    beside = link.with_name(f".{link.name}.tmp")  # one name: what a killed process left is taken away here
    beside.unlink(missing_ok=True)
    os.symlink(target.name, beside)
    os.replace(beside, link)
    sync_folder(link.parent)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, so that a rename after it survives a power cut."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(root, name))
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """fsync a folder's entries (its renames and new names)."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """fsync one file, whoever wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def disk_error(error: OSError, target: Path) -> PunaError:
    """Turn a failed write into a message with the numbers a person needs."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = _free_space(target)
        return PunaError(
            f"the disk is full while writing {target} ({free} free)",
            "free some space or choose another --out; files that were already complete are untouched",
        )
    return PunaError(f"cannot write {target}: {error.strerror or error}", "check the path and its permissions")


def _free_space(path: Path) -> str:
    """Of the disk that `path` is or would be on; another rank may be removing its folders meanwhile."""
    for place in (path, *path.parents):
        with suppress(FileNotFoundError):
            return size(shutil.disk_usage(place).free)
    return "an unknown number of bytes"
