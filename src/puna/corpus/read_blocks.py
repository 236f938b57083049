"""Reading a block: its own bytes and no other's, so that every document of a corpus is read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from puna.base.console import PunaError
from puna.base.files import FileInfo, is_remote, read_range
from puna.corpus.blocks import SEAM, Block, Input, check_unchanged, find_seam, parquet_columns, plan
from puna.corpus.documents import (
    BINARY,
    EMPTY,
    Document,
    Note,
    Reading,
    Refusal,
    Rules,
    add_lines,
    add_row,
    add_text,
    file_kind,
    read_text,
)
from puna.corpus.unpack import open_parquet, parquet_rows, unpack_rows, whole_parquet


def read_block(block: Block, rules: Rules) -> Reading:
    """The documents of a block. Raises Refusal for a row or a file that is not taken, PunaError for a vanished file.

    Of a part of a document the text is given even if it is blank, and `left_out` says so.
    """
    reading = Reading()
    item, path = block.inputs[0], block.inputs[0].info.path
    kind = file_kind(path)[0]
    if block.part:
        _read_part(block, rules, reading)
    elif kind == "lines":
        data = _own_lines(item.info, *block.span) if block.data is None else block.data
        add_lines(data, path, item.domain, rules, reading)
    elif kind == "rows":
        _read_rows(block, rules, reading)
    elif block.data is not None:
        add_text(block.data, path, item.domain, rules, reading)
    else:
        for each, data in zip(block.inputs, _read_files(block.inputs), strict=True):
            add_text(data, each.info.path, each.domain, rules, reading)
    return reading


def _read_files(inputs: Sequence[Input]) -> Iterator[bytes]:
    if not any(is_remote(item.info.path) for item in inputs):
        yield from (_read(item.info, 0, item.info.size) for item in inputs)
        return
    with ThreadPoolExecutor(8) as pool:  # a small object takes a round trip and no bandwidth
        yield from pool.map(lambda item: _read(item.info, 0, item.info.size), inputs)


def _read_part(block: Block, rules: Rules, reading: Reading) -> None:
    item = block.inputs[0]
    offset, data = _own_text(item.info, *block.span) if block.data is None else (block.first, block.data)
    text = read_text(data, item.info.path, rules, reading, offset)
    if text is not None and not text.strip():
        reading.leave_out(EMPTY)
    reading.documents.append(Document(item.info.path, text or "", "" if block.at[1] else item.domain))


def _own_text(info: FileInfo, begin: int, end: int) -> tuple[int, bytes]:
    """(offset, text) of a range: from the seam near its begin to the seam near its end."""
    data = _read(info, begin, min(end + SEAM, info.size))
    first = find_seam(data[:SEAM], 0) if begin else 0
    last = len(data) if end == info.size else end - begin + find_seam(data[end - begin :], 0)
    return begin + first, data[first:last]


def _own_lines(info: FileInfo, begin: int, end: int) -> bytes:
    """The lines that begin in a range, the last one to its end, however far that is."""
    reach, start = min(end + SEAM, info.size), max(0, begin - 1)  # a line begins at `begin` if a line ends before it
    data = _read(info, start, reach)
    first = data.find(b"\n") + 1 if begin else 0
    if (begin and not first) or start + first >= end:
        return b""
    while reach < info.size and data.find(b"\n", end - 1 - start) < 0:
        more = min(reach + len(data), info.size)
        data, reach = data + _read(info, reach, more), more
    last = data.find(b"\n", end - 1 - start) + 1
    return data[first : last or len(data)]


def _read_rows(block: Block, rules: Rules, reading: Reading) -> None:
    item = block.inputs[0]
    if block.data is not None:
        rows = unpack_rows(block.data)
    else:
        check_unchanged(item.info)
        file = open_parquet(item.info)
        columns = parquet_columns(file.schema_arrow, item.info.path, rules)
        with whole_parquet(item.info.path):
            rows = parquet_rows(file.read_row_groups(list(range(*block.span)), columns=columns))
    for place, row in enumerate(rows, 1):
        add_row(row, item.info.path, place, item.domain, rules, reading)
    reading.places = len(rows)


def _read(info: FileInfo, start: int, stop: int) -> bytes:
    check_unchanged(info)
    return read_range(info.path, start, stop, info.version if is_remote(info.path) else "")


def read_all(inputs: Sequence[Input], rules: Rules) -> Reading:
    """Everything in memory, in order. PunaError names the line of what is refused."""
    whole, parts, before = Reading(), [], 0
    for block in plan(inputs, rules):
        before = block.first if block.first >= 0 else before
        try:
            reading = read_block(block, rules)
        except Refusal as refusal:
            raise refused(refusal.note, before) from refusal
        whole.notes += placed(reading.notes, before)
        before += reading.places
        if not block.part:
            whole.documents += reading.documents
            whole.left_out += reading.left_out
            continue
        parts.append(reading)
        if block.ends_file:
            texts = [part.documents[0] for part in parts]
            left_out = of_parts(part.left_out for part in parts)
            if not left_out.keys() & {EMPTY, BINARY}:
                whole.documents.append(replace(texts[0], text="".join(part.text for part in texts)))
            whole.left_out += left_out
            parts = []
    return whole


def of_parts(counts: Iterable[Counter[str]]) -> Counter[str]:
    """What was left out of a document that was read in parts: it is empty if all are, and counts once."""
    parts = list(counts)
    whole: Counter[str] = Counter()
    for part in parts:
        whole |= part
    if BINARY in whole:
        return Counter({BINARY: 1})
    if not all(EMPTY in part for part in parts):
        del whole[EMPTY]
    return whole


def placed(notes: Iterable[Note], before: int) -> list[Note]:
    """Notes of a block with their lines counted from the beginning of the file."""
    return [replace(note, place=note.place and note.place + before) for note in notes]


def refused(note: Note, before: int) -> PunaError:
    """The error that a refusal becomes where the lines before it are known."""
    return PunaError(placed([note], before)[0].text(), note.hint)
