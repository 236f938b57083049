"""Documents from files: read, deduplicated, and split into training and validation by whole files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from puna.base.console import PunaError, say
from puna.corpus.blocks import STANDARD_LIBRARY, find_inputs, standard_library
from puna.corpus.documents import INVALID, Document, Rules
from puna.corpus.encode import utf8_bytes
from puna.corpus.read_blocks import read_all

__all__ = ["STANDARD_LIBRARY", "Document", "hold_out", "read_documents", "standard_library", "total_bytes"]


def read_documents(paths: Sequence[str | Path]) -> list[Document]:
    """The documents of files of every kind (text, jsonl, parquet, compressed; local or s3://), folders and globs.

    Exact duplicates once, in order of the files' names. What is empty or no text is left out and counted. Raises
    PunaError for a path that does not exist and for a corpus without any text.
    """
    inputs = find_inputs(paths)
    reading = read_all(inputs, Rules())
    documents: dict[bytes, Document] = {}
    for document in reading.documents:
        documents.setdefault(hashlib.sha256(document.text.encode()).digest(), document)
    repeated = len(reading.documents) - len(documents)
    mended = reading.left_out.pop(INVALID, 0)
    left_out = [f"{number} {what}" for what, number in reading.left_out.items()]
    left_out += [f"{repeated} exact duplicates"] if repeated else []
    if left_out:
        say(f"left out: {', '.join(left_out)}")
    if mended:
        say(f"mended: {mended} documents that are not valid UTF-8 (U+FFFD stands for what is wrong)")
    if not documents:
        names = ", ".join(str(path) for path in paths)
        raise PunaError(f"no text in {names} ({len(inputs)} files looked at)", "give files or folders with UTF-8 text")
    return list(documents.values())


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


def total_bytes(documents: Iterable[Document]) -> int:
    """Size of the texts in UTF-8."""
    return sum(utf8_bytes(document.text) for document in documents)
