"""manifest.json: the size and sha256 of every file of a save, written last. A folder without it is no save.

Its bytes follow from its content (sorted, indented) and it holds their checksum, so that a flipped bit in it is found
as well: it either breaks the JSON, or changes the content, or leaves bytes that the content does not give.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puna.base import files
from puna.base.console import PunaError
from puna.base.storage import sha256_file

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileDigest:
    """`size` in bytes, `sha256` in hex."""

    size: int
    sha256: str


Digests = dict[str, FileDigest]  # by path within the save


def digest_file(path: Path) -> FileDigest:
    """Size and sha256 of a local file."""
    return FileDigest(path.stat().st_size, sha256_file(path))


def manifest_bytes(digests: Mapping[str, FileDigest]) -> bytes:
    """The one way to write these digests down."""
    entries = {name: asdict(digest) for name, digest in sorted(digests.items())}
    return _canonical({"files": entries, "sha256": hashlib.sha256(_canonical(entries)).hexdigest()})


def read_manifest(save: str | Path) -> Digests:
    """What a save should hold, from its manifest. Raises PunaError if there is none or it is damaged."""
    path = files.join(save, MANIFEST)
    if files.stat(path) is None:
        raise PunaError(f"{save} is no complete save: it has no {MANIFEST}", "give a step folder, or RUN/latest")
    digests = _parse(files.read_file(path))
    if digests is None:
        raise PunaError(f"{path} is damaged: it is not what was written", "use an earlier save")
    return digests


def verify(save: str | Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Names of files that are missing or differ from the manifest; empty when the save is whole.

    `share` (i, n): only every n-th file, for n helpers that together look at all of them; each looks at the manifest.
    Raises PunaError for a folder without a manifest, and for a bucket that does not answer.
    """
    path = files.join(save, MANIFEST)
    if files.stat(path) is None:
        read_manifest(save)
    digests = _parse(files.read_file(path))
    if digests is None:
        return [MANIFEST]
    largest_first = sorted(digests, key=lambda name: (-digests[name].size, name))
    return sorted(name for name in largest_first[share[0] :: share[1]] if not _matches(save, name, digests[name]))


def _canonical(payload: Any) -> bytes:
    return (json.dumps(payload, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def _parse(data: bytes) -> Digests | None:
    """The digests, None if these are not the bytes that `manifest_bytes` gives for them."""
    try:
        entries: dict[str, dict[str, Any]] = json.loads(data)["files"]
        if any(isinstance(entry, str) for entry in entries.values()):
            raise PunaError("this save is of an early format (sha256 only)", "it cannot be read any more; train anew")
        digests = {name: FileDigest(entry["size"], entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return digests if manifest_bytes(digests) == data and all(map(_stays_inside, digests)) else None


def _stays_inside(name: str) -> bool:
    """Names come from a file: one that leads out of the folder must never be followed."""
    return not name.startswith(("/", "..")) and posixpath.normpath(name) == name


def _matches(save: str | Path, name: str, digest: FileDigest) -> bool:
    path = files.join(save, name)
    found = files.stat(path)
    if found is None or found.size != digest.size:
        return False
    hashed = hashlib.sha256()
    for piece in files.open_stream(path):
        hashed.update(piece)
    return hashed.hexdigest() == digest.sha256
