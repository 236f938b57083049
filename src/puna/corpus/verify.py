"""Shards read through, each file against its manifest: for an export, and for `puna shards verify`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from puna.base.console import PunaError, count, size, status, table
from puna.base.files import join, read_file, stat
from puna.data.bestfit import count_bins
from puna.data.decompose import length_bits
from puna.data.shards import Manifest, Shard, ShardInfo, check_tokenizer, is_shards, read_manifest
from puna.text.tokenizer import Tokenizer

PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)
_THREADS = 4  # each holds a shard in memory
_SHOWN = 20  # problems that are named in the error
_RESTORE = "restore these files from their source, or run `puna tokenize` again into a new folder"


def read_shards(folder: str | Path, manifest: Manifest) -> Iterator[Shard]:
    """Each shard in turn, in memory, once its bytes are those that the manifest names; PunaError where they are not."""
    for info in manifest.shards:
        docs, data = _read_documents(folder, manifest, info), _read_tokens(folder, manifest, info)
        yield _shard(docs, data, manifest, info)


def verify_shards(folder: str | Path, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Read all of a shard folder or prefix, and of its validation part, and return a card of what it holds.

    Checked: sizes, sha256, document offsets (ascending from 0 to the number of tokens), tags, the counts that training
    plans by, ids below the size of the vocabulary, and the vocabulary itself if a tokenizer is given. Raises PunaError
    that names every problem, not only the first.
    """
    folder = str(folder).rstrip("/") or "/"
    parts = [folder, *(part for part in [join(folder, "validation")] if is_shards(part))]
    manifests = {part: read_manifest(part) for part in parts}
    if tokenizer is not None:
        for part, manifest in manifests.items():
            check_tokenizer(manifest, tokenizer, part)
    tasks = [(part, manifest, info) for part, manifest in manifests.items() for info in manifest.shards]
    tokens = sum(manifest.tokens for manifest in manifests.values())
    text = f"verifying {count(tokens)} tokens in {len(tasks)} shards of {folder}"
    with status(text), ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda task: _examine(*task), tasks))
    if problems := [problem for _, more in found for problem in more]:
        raise _report(folder, problems)
    cards = []
    for part, manifest in manifests.items():
        lengths = [each for (where, _, _), (each, _) in zip(tasks, found, strict=True) if where == part]
        cards.append(_card(part, manifest, np.concatenate(lengths)))
    return {**cards[0], "validation": cards[1] if len(cards) > 1 else None}


def _report(folder: str, problems: list[str]) -> PunaError:
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    head = f"{folder} is damaged, {len(problems)} problem{'s' if len(problems) > 1 else ''}:"
    return PunaError("\n  ".join([head, *problems[:_SHOWN], *more]), _RESTORE)


def _examine(folder: str, manifest: Manifest, info: ShardInfo) -> tuple[np.ndarray, list[str]]:
    """The document lengths of a shard, in tokens, and what is wrong with it."""
    problems: list[str] = []
    files: list[bytes | None] = []
    for read in (_read_documents, _read_tokens):
        try:
            files.append(read(folder, manifest, info))
        except PunaError as error:
            files.append(None)
            problems.append(error.message)
    docs, data = files
    name, lengths = join(folder, info.name), np.empty(0, dtype=np.int64)
    if docs is not None:
        shard = _shard(docs, b"", manifest, info)
        lengths = np.diff(shard.starts)
        problems += [f"{name}.docs: {text}" for text in _check_documents(shard, manifest, info)]
    if data is not None:
        highest = int(np.frombuffer(data, manifest.dtype).max(initial=0))
        if highest >= manifest.vocab_size:
            problems.append(f"{name}.bin holds id {highest}, the vocabulary has {manifest.vocab_size} tokens")
    return lengths, problems


def _check_documents(shard: Shard, manifest: Manifest, info: ShardInfo) -> Iterator[str]:
    """What a file with the right sha256 may still say wrongly: that of a program which wrote it so."""
    starts, lengths = shard.starts, np.diff(shard.starts)
    if starts[0] != 0 or starts[-1] != info.tokens:
        yield f"its documents go from token {starts[0]} to {starts[-1]}, not from 0 to {info.tokens}"
        return
    if (falls := np.flatnonzero(lengths < 0)).size:
        document = int(falls[0])
        yield f"document {document} ends at token {starts[document + 1]}, before it begins at {starts[document]}"
        return
    if shard.tags is not None and (wrong := np.flatnonzero(shard.tags > lengths)).size:
        document = int(wrong[0])
        yield f"document {document} has {lengths[document]} tokens, but a tag of {shard.tags[document]}"
    if length_bits(starts) != info.bits:
        yield f"its document lengths have bits {length_bits(starts)}, the manifest says {info.bits}"
    rows = {length: count_bins(starts, int(length)) for length in info.bins}
    if rows != info.bins:
        yield f"its best-fit rows are {rows}, the manifest says {info.bins}"


def _read_documents(folder: str | Path, manifest: Manifest, info: ShardInfo) -> bytes:
    expected = 8 * (info.documents + 1) + (2 * info.documents if manifest.tagged else 0)
    return _read_checked(join(folder, f"{info.name}.docs"), expected, info.documents_sha256)


def _read_tokens(folder: str | Path, manifest: Manifest, info: ShardInfo) -> bytes:
    expected = info.tokens * np.dtype(manifest.dtype).itemsize
    return _read_checked(join(folder, f"{info.name}.bin"), expected, info.sha256)


def _read_checked(path: str, expected: int, sha256: str) -> bytes:
    found = stat(path)
    if found is None:
        raise PunaError(f"{path} is gone, but the manifest lists it", _RESTORE)
    if found.size != expected:
        raise PunaError(f"{path} has {found.size} bytes, the manifest says {expected}", _RESTORE)
    data = read_file(path)
    if (digest := hashlib.sha256(data).hexdigest()) != sha256:
        raise PunaError(f"{path} is damaged: sha256 {digest[:12]}..., the manifest says {sha256[:12]}...", _RESTORE)
    return data


def _shard(docs: bytes, data: bytes, manifest: Manifest, info: ShardInfo) -> Shard:
    starts = np.frombuffer(docs, dtype=np.int64, count=info.documents + 1)
    tags = np.frombuffer(docs, dtype=np.uint16, offset=starts.nbytes) if manifest.tagged else None
    return Shard(np.frombuffer(data, manifest.dtype), starts, tags)


# ---- the card ----


def _card(folder: str, manifest: Manifest, lengths: np.ndarray) -> dict[str, Any]:
    marks = np.percentile(lengths, PERCENTILES, method="inverted_cdf").tolist() if len(lengths) else []
    rows = {length: sum(info.bins.get(length, 0) for info in manifest.shards) for length in manifest.shards[0].bins}
    return {
        "shards_folder": folder,
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "text_bytes": manifest.text_bytes,
        "shards": len(manifest.shards),
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "vocab_hash": manifest.vocab_hash,
        "tagged": manifest.tagged,
        "sources": manifest.sources,
        "left_out": manifest.left_out,
        "length_percentiles": dict(zip(map(str, PERCENTILES), marks, strict=False)),
        "best_fit_rows": rows,
    }


def print_shards(card: dict[str, Any]) -> None:
    """The card for people, on stdout."""
    lengths = ", ".join(f"p{p} {n}" if p != "100" else f"longest {n}" for p, n in card["length_percentiles"].items())
    rows = ", ".join(f"{count(n)} of {length}" for length, n in card["best_fit_rows"].items())
    left_out = ", ".join(f"{n} {reason}" for reason, n in card["left_out"].items())
    lines = [
        ("tokens", f"{count(card['tokens'])} ({card['tokens']:,}), {card['dtype']}, in {card['shards']} shards"),
        ("documents", f"{card['documents']:,}{', tagged with their domain' if card['tagged'] else ''}"),
        ("text", f"{size(card['text_bytes'])}, {card['text_bytes'] / max(1, card['tokens']):.3f} bytes per token"),
        ("vocabulary", f"{card['vocab_size']} tokens, hash {card['vocab_hash'][:12]}"),
        ("lengths", f"{lengths} tokens"),
        ("best-fit rows", rows),
        *(("source", f"{s.get('path')}: {s.get('documents', 0):,} documents") for s in card["sources"]),
        *([("left out", left_out)] if left_out else []),
    ]
    print(table(lines, title=f"{card['shards_folder']} is whole"))
    if card.get("validation"):
        print()
        print_shards(card["validation"])
