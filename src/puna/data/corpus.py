"""Documents from files: read, deduplicated, and split into training and validation by whole files."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from puna.base.console import PunaError, say

# Names the text that every machine with Python has, wherever a path may stand.
STANDARD_LIBRARY = "python:stdlib"


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


def read_documents(paths: Sequence[str | Path]) -> list[Document]:
    """The text of files, folders (recursively) and globs, exact duplicates once, in sorted order of their names.

    Files that are not UTF-8 text are left out and counted. Raises PunaError for a path that does not exist and for a
    corpus without any text.
    """
    files = sorted({file for path in paths for file in _expand(str(path))})
    documents, seen, unreadable, repeated = [], set(), 0, 0
    for file in files:
        text = _read_text(file)
        if text is None:
            unreadable += 1
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen or not text.strip():
            repeated += digest in seen
            continue
        seen.add(digest)
        documents.append(Document(str(file), text))
    if unreadable or repeated:
        say(f"left out: {unreadable} files that are not UTF-8 text, {repeated} exact duplicates")
    if not documents:
        names = ", ".join(str(path) for path in paths)
        raise PunaError(f"no text in {names} ({len(files)} files looked at)", "give files or folders with UTF-8 text")
    return documents


def hold_out(documents: Sequence[Document], fraction: float, seed: int = 0) -> tuple[list[Document], list[Document]]:
    """(training, validation): whole files, in an order set by a hash of their text, until `fraction` of the bytes.

    A file larger than twice that share stays in training. A single document is cut at a line near its end instead.
    """
    if len(documents) == 1:
        return _cut_one(documents[0], fraction)
    sizes = {id(d): len(d.text.encode()) for d in documents}
    wanted = fraction * sum(sizes.values())
    ranked = sorted(documents, key=lambda d: hashlib.sha256(f"{seed}\0{d.text}".encode()).digest())
    held: set[int] = set()
    for document in ranked:
        if sum(sizes[i] for i in held) < wanted and sizes[id(document)] <= 2 * wanted:
            held.add(id(document))
    held = held or {min(sizes, key=sizes.__getitem__)}
    return [d for d in documents if id(d) not in held], [d for d in documents if id(d) in held]


def _cut_one(document: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    place = document.text.find("\n", round(len(document.text) * (1 - fraction))) + 1
    if not 0 < place < len(document.text):
        raise PunaError(
            f"{document.name} is the only document ({len(document.text)} characters) and cannot be cut at a line",
            "give at least two files",
        )
    head, tail = document.text[:place], document.text[place:]
    return [Document(document.name, head)], [Document(f"{document.name} (end)", tail)]


def standard_library() -> list[Path]:
    """Python's own library sources, without tests and installed packages: about 12 MB of real text on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__", "lib-dynload"}
    return [file for file in sorted(root.rglob("*.py")) if not skip.intersection(file.relative_to(root).parts)]


def total_bytes(documents: Iterable[Document]) -> int:
    """Size of the texts in UTF-8."""
    return sum(len(document.text.encode()) for document in documents)


def _expand(path: str) -> list[Path]:
    if path == STANDARD_LIBRARY:
        return standard_library()
    found = [Path(path)] if Path(path).exists() else [Path(p) for p in glob.glob(path, recursive=True)]
    if not found:
        raise PunaError(f"{path} does not exist", "give existing files, folders or a quoted glob")
    files: list[Path] = []
    for item in found:
        files += [f for f in item.rglob("*") if f.is_file() and not _hidden(f, item)] if item.is_dir() else [item]
    return files


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(root).parts)


def _read_text(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return None if "\0" in text else text
