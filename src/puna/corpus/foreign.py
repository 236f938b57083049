"""What the token files of other programs say: Megatron-LM's .bin and .idx, nanoGPT's and llm.c's .bin.

    Megatron   PREFIX.bin   ids of all sequences, end to end
               PREFIX.idx   "MMIDIDX\\0\\0", version 1 (uint64), type code (uint8), sequences n, entries m (uint64);
                            lengths (n int32), byte offsets (n int64), sequence at which each document begins, then n
                            (m int64); multimodal files add n mode bytes, which are not read
    nanoGPT    .bin         ids, nothing else; llm.c and modded-nanogpt put 256 int32 before: magic, version, count

Sources: NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py; karpathy/nanoGPT, data/openwebtext/prepare.py;
karpathy/llm.c, dev/data/data_common.py.
"""

from __future__ import annotations

import struct

import numpy as np

from puna.base.console import PunaError
from puna.base.files import stat
from puna.text.tokenizer import Tokenizer

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
_HEAD = struct.Struct("<9sQBQQ")
# 9 and 10 are fairseq's. 6 and 7 are floats: no token ids.
TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16", 9: "uint32", 10: "uint64"}
# Magic number and version of llm.c's header -> type of the ids after it.
HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
HEADER_BYTES = 256 * 4
CHUNK = 1 << 22  # ids looked at together
_DAMAGED = "restore the file from its source; nothing was written"


def read_index(path: str, data_path: str) -> tuple[str, np.ndarray]:
    """Type of the ids and token offsets of the documents, (documents + 1,) int64, once .idx and .bin agree.

    Raises PunaError for a file that is missing, cut, of another format, or that does not fit the other.
    """
    dtype, n, m = _read_head(path, _size(path, data_path))
    lengths, offset = _column(path, "<i4", n, _HEAD.size)
    pointers, offset = _column(path, "<i8", n, offset)
    documents, _ = _column(path, "<i8", m, offset)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    width, found = np.dtype(dtype).itemsize, _size(data_path, path)
    _check_index(path, lengths, pointers, documents, offsets, width)
    if found != offsets[-1] * width:
        raise _cut(data_path, found, int(offsets[-1]) * width, f"for the {offsets[-1]} tokens of {path}")
    if not found:
        raise PunaError(f"{data_path} holds no tokens", "give a file that holds some")
    return dtype, offsets[documents]


def _size(path: str, other: str) -> int:
    info = stat(path)
    if info is None:
        raise PunaError(f"{path} does not exist", f"Megatron's format is two files; it belongs to {other}")
    return info.size


def _read_head(path: str, size: int) -> tuple[str, int, int]:
    """(type of the ids, sequences, entries of the document index) of an .idx that is long enough for them."""
    with open(path, "rb") as file:
        head = file.read(_HEAD.size)
    if not head or head[: len(MAGIC)] != MAGIC[: len(head)]:
        raise PunaError(f"{path} is no Megatron index: it begins with {head[:9]!r}, not {MAGIC!r}", _DAMAGED)
    if len(head) < _HEAD.size:
        raise _cut(path, len(head), _HEAD.size, "for its header alone")
    _, version, code, n, m = _HEAD.unpack(head)
    if version != VERSION or code not in TYPES:
        known = ", ".join(f"{number} {name}" for number, name in TYPES.items())
        raise PunaError(
            f"{path} has version {version} and type code {code}; read are version {VERSION} and the codes {known}",
            "write it again with a current Megatron-LM",
        )
    whole = _HEAD.size + 12 * n + 8 * m
    if size not in (whole, whole + n):  # with modes
        raise _cut(path, size, whole, f"for its {n} sequences and {m} index entries")
    return TYPES[code], n, m


def _column(path: str, dtype: str, length: int, offset: int) -> tuple[np.ndarray, int]:
    column = np.memmap(path, dtype, "r", offset, (length,)) if length else np.empty(0, dtype)
    return column, offset + column.nbytes


def _check_index(
    path: str, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray, offsets: np.ndarray, width: int
) -> None:
    """The columns of an index must tell one story."""
    wrong = np.flatnonzero((lengths < 0) | (pointers != offsets[:-1] * width))
    if len(wrong):
        i = wrong[0]
        expected = f"after {offsets[i]} tokens of {width} bytes"
        raise PunaError(f"{path}: sequence {i} has {lengths[i]} tokens at byte {pointers[i]}, {expected}", _DAMAGED)
    ends = (int(documents[0]), int(documents[-1])) if len(documents) else (None, None)
    if ends != (0, len(lengths)) or (np.diff(documents) < 0).any():
        raise PunaError(
            f"{path}: the documents go from sequence {ends[0]} to {ends[1]}, not in order from 0 to {len(lengths)}",
            _DAMAGED,
        )


def _cut(path: str, found: int, expected: int, why: str) -> PunaError:
    return PunaError(f"{path} has {found} bytes, not {expected} {why}", _DAMAGED)


def open_ids(path: str, dtype: str) -> tuple[np.ndarray, str]:
    """The ids of a nanoGPT or llm.c file, mapped, and which of the two it is."""
    info = stat(path)
    if info is None:
        raise PunaError(f"{path} does not exist", "give a .bin file of token ids")
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    magic, version, tokens = struct.unpack("<3i", head[:12]) if len(head) >= 12 else (0, 0, 0)
    kind, offset = "nanogpt", 0
    if magic in {known for known, _ in HEADERS}:
        if (magic, version) not in HEADERS:
            raise PunaError(f"{path} has an llm.c header of version {version}", f"read are {sorted(HEADERS)}")
        kind, offset, dtype = "llm.c", HEADER_BYTES, HEADERS[magic, version]
        whole = offset + tokens * np.dtype(dtype).itemsize
        if info.size != whole:
            raise _cut(path, info.size, whole, f"for the {tokens} tokens of its header")
    width = np.dtype(dtype).itemsize
    if info.size <= offset or (info.size - offset) % width:
        raise PunaError(
            f"{path} holds {info.size - offset} bytes of ids, which is no whole number of {dtype} above 0",
            "was it cut short, or are its ids of another type? (--dtype uint16 or uint32)",
        )
    return np.memmap(path, dtype=np.dtype(dtype), mode="r", offset=offset), kind


def document_starts(ids: np.ndarray, tokenizer: Tokenizer, piece: int) -> tuple[np.ndarray, str]:
    """Where documents begin in ids without an index, and by which rule, in words.

    Documents end after eos (nanoGPT). Where eos serves as bos, too, as in GPT-2, a file that begins with it has it
    before each document (llm.c, modded-nanogpt) or on both sides (puna's own shards). A file without eos is cut before
    each bos; without either, where documents end is not known, and pieces of `piece` tokens stand for them.
    Shapes: ids (n,); returns (documents + 1,) int64, from 0 to n.
    """
    eos, bos = next(iter(tokenizer.eos_ids), None), tokenizer.bos_id
    marks = _positions(ids, eos)
    if len(marks) and int(ids[0]) == eos and bos in (eos, None):
        is_framed = len(marks) % 2 == 0 and marks[-1] == len(ids) - 1 and (marks[2::2] == marks[1:-1:2] + 1).all()
        cuts, rule = (marks[1::2] + 1, "stand between two eos") if is_framed else (marks, "begin with eos")
    elif len(marks):
        cuts, rule = marks + 1, "end after eos"
    elif len(marks := _positions(ids, bos)):
        cuts, rule = marks, "begin with bos (there is no eos)"
    else:
        cuts, rule = np.arange(0, len(ids), piece), f"unknown (no eos, no bos): pieces of {piece} tokens instead"
    return np.unique(np.concatenate(([0], cuts, [len(ids)]))).astype(np.int64), rule


def _positions(ids: np.ndarray, token: int | None) -> np.ndarray:
    parts = [np.flatnonzero(ids[i : i + CHUNK] == token) + i for i in range(0, len(ids), CHUNK) if token is not None]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def index_bytes(dtype: str, lengths: np.ndarray) -> bytes:
    """The .idx of documents of these lengths (tokens, int64) in ids of `dtype`: one sequence each."""
    if len(lengths) and lengths.max() >= 2**31:
        raise PunaError(
            f"a document has {lengths.max()} tokens; Megatron's index holds 2147483647", "export to nanogpt"
        )
    code = next(code for code, name in TYPES.items() if name == dtype)
    head = _HEAD.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1)
    pointers = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    columns = (lengths.astype("<i4"), pointers.astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8"))
    return b"".join((head, *(column.tobytes() for column in columns)))
