"""Blocks: a corpus cut into units of work of a few MiB of text, by the sorted list of its files alone.

How a corpus is cut does not depend on who reads it: any number of workers gives the same documents in the same order.

    small text files           several whole files in a block
    a large text file          ranges that end at a line; their texts are parts of one document
    .jsonl                     byte ranges; a range owns the lines that begin in it
    .parquet                   row groups, several in a block
    .gz, .zst, wide row groups unpacked here and cut; the block carries its bytes
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.base.console import PunaError
from puna.base.files import FileInfo, is_remote, list_files, name_of, open_stream, stat
from puna.corpus.documents import Rules, file_kind
from puna.corpus.unpack import open_parquet, pack_rows, unpack, whole_parquet

# Names the text that every machine with Python has, wherever a path may stand.
STANDARD_LIBRARY = "python:stdlib"
# Bytes of text in a block: half a second of work, so that the last ones end together, and little per-block cost.
BLOCK = 2 << 20
SEAM = 1 << 16  # bytes in which the end of a line is looked for
WIDE = 4 * BLOCK  # bytes of text in a row group that is cut
_FILES = 512  # small files in a block


@dataclass(frozen=True)
class Input:
    """One file of a corpus, the number of the PATH that named it, and the domain of its documents."""

    info: FileInfo
    argument: int
    domain: str


@dataclass(frozen=True)
class Block:
    """A unit of work. `at`: (number of its first file, number within that file); `after`: of the block that follows.

    `span`: bytes of a text or jsonl file, or row groups; `data`: what the planner unpacked. `weight`: bytes of input.
    `first`: lines or rows (bytes of an unpacked text) before it, -1 when only who reads all blocks in order knows.
    `part`: its text is one of several parts of a document, which is one file.
    """

    at: tuple[int, int]
    after: tuple[int, int]
    inputs: tuple[Input, ...]
    weight: int
    span: tuple[int, int] = (0, 0)
    data: bytes | None = None
    first: int = 0
    part: bool = False

    @property
    def ends_file(self) -> bool:
        """Whether the next block is of another file."""
        return self.after[1] == 0


def standard_library() -> list[Path]:
    """Python's own library sources, without tests and installed packages: about 12 MB of real text on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__", "lib-dynload"}
    return [file for file in sorted(root.rglob("*.py")) if not skip.intersection(file.relative_to(root).parts)]


def find_inputs(paths: Sequence[str | Path], leave_out: str | Path = "") -> list[Input]:
    """The files of files, folders, globs and `python:stdlib`, each once, sorted by path; none below `leave_out`.

    The domain of a file is the first folder below the PATH that named it, else the PATH's own name. Raises PunaError
    for a path that does not exist.
    """
    found: dict[str, Input] = {}
    for number, path in enumerate(map(str, paths)):
        for info in _expand(path):
            found.setdefault(info.path, Input(info, number, _domain(path, info.path)))
    below = _absolute(leave_out) + "/" if leave_out else "\0"
    return [item for name, item in sorted(found.items()) if not _absolute(name).startswith(below)]


def _expand(path: str) -> list[FileInfo]:
    if path != STANDARD_LIBRARY:
        return list_files(path)
    return [info for file in standard_library() if (info := stat(file))]


def _absolute(path: str | Path) -> str:
    return str(path).rstrip("/") if is_remote(path) else os.path.abspath(path)


def _domain(argument: str, path: str) -> str:
    if argument == STANDARD_LIBRARY:
        return "python"
    if argument == path:
        return name_of(path).split(".")[0] or name_of(path)
    base = re.split(r"[^/]*[*?\[]", argument, maxsplit=1)[0].rstrip("/")
    below = path.removeprefix(base).strip("/").split("/")
    return below[0] if len(below) > 1 else name_of(_absolute(base))


def check_unchanged(info: FileInfo) -> None:
    """PunaError for a local file that vanished or changed since it was listed (reads of objects check theirs)."""
    if is_remote(info.path):
        return
    now = stat(info.path)
    if now != info:
        what = "vanished" if now is None else f"changed ({info.size} bytes when it was listed, {now.size} now)"
        raise PunaError(f"{info.path} {what} while it was read", "restore the file and run the same command again")


# ---- planning ----


def plan(inputs: Sequence[Input], rules: Rules, start: tuple[int, int] = (0, 0)) -> Iterator[Block]:
    """All blocks from `start` on, in order. Raises PunaError for a file that is damaged or not what it was."""
    number, skip = start
    while number < len(inputs):
        group = _group(inputs, number)
        if group:
            weight = sum(item.info.size for item in group)
            yield Block((number, 0), (number + len(group), 0), group, weight)
            number += len(group)
            continue
        for block in _plan_file(inputs[number], number, rules):
            if block.at[1] >= skip:
                yield block
        number, skip = number + 1, 0


def _group(inputs: Sequence[Input], first: int) -> tuple[Input, ...]:
    """Small text files from `first` on that fill a block together."""
    total, stop = 0, first
    while stop < len(inputs) and stop - first < _FILES and total < BLOCK:
        info = inputs[stop].info
        if file_kind(info.path) != ("text", "") or info.size > 2 * BLOCK:
            break
        total, stop = total + info.size, stop + 1
    return tuple(inputs[first:stop])


def _plan_file(item: Input, number: int, rules: Rules) -> Iterator[Block]:
    """The pieces of one file, numbered; the last one's `after` is the next file."""
    kind, packed = file_kind(item.info.path)
    pieces = _row_groups(item, rules) if kind == "rows" else _unpacked(item) if packed else _ranges(item)
    part = kind == "text"
    waiting: dict[str, Any] | None = None
    count = 0
    for piece in pieces:
        if waiting is not None:
            yield Block((number, count), (number, count + 1), (item,), part=part, **waiting)
            count += 1
        waiting = piece
    if waiting is not None:
        yield Block((number, count), (number + 1, 0), (item,), part=part and count > 0, **waiting)


def _ranges(item: Input) -> Iterator[dict[str, Any]]:
    size = item.info.size
    for begin in range(0, size, BLOCK):
        end = min(begin + BLOCK, size)
        yield {"span": (begin, end), "weight": end - begin, "first": -1 if begin else 0}


def _unpacked(item: Input) -> Iterator[dict[str, Any]]:
    """A compressed file, cut where a line ends. Its text is one document, in parts when it is larger than a block."""
    path, kind = item.info.path, file_kind(item.info.path)
    eaten, told, before, rest = [0], 0, 0, bytearray()
    is_text = kind[0] == "text"
    for out in unpack(_counted(item.info, eaten), kind[1], path):
        rest += out
        while len(rest) > 2 * BLOCK and (place := find_seam(rest, BLOCK) if is_text else rest.find(b"\n", BLOCK) + 1):
            yield {"data": bytes(rest[:place]), "weight": eaten[0] - told, "first": before}
            before, told = before + (place if is_text else rest.count(b"\n", 0, place)), eaten[0]
            del rest[:place]
    yield {"data": bytes(rest), "weight": item.info.size - told, "first": before}


def _counted(info: FileInfo, eaten: list[int]) -> Iterator[bytes]:
    check_unchanged(info)
    for piece in open_stream(info.path, 1 << 20):
        eaten[0] += len(piece)
        yield piece


def find_seam(data: bytes | bytearray, begin: int) -> int:
    """A place near `begin` to cut a text: most tokenizers give the same tokens for it in two parts.

    After a line break between two lines that have no blanks there, else after any line break, else between characters.
    """
    window = bytes(data[begin : begin + SEAM])
    found = _CLEAN_BREAK.search(window) or _ANY_BREAK.search(window)
    if found:
        return begin + found.end()
    return begin + next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)


_CLEAN_BREAK, _ANY_BREAK = re.compile(rb"(?<=\S)\n(?=\S)"), re.compile(rb"\n")


def _row_groups(item: Input, rules: Rules) -> Iterator[dict[str, Any]]:
    """Row groups that fill a block together; a wide one is unpacked here, once, and cut into several blocks."""
    check_unchanged(item.info)
    file = open_parquet(item.info)
    columns = parquet_columns(file.schema_arrow, item.info.path, rules)
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    sizes = [_text_bytes(group, rules) for group in groups]
    total, first, begin = max(1, sum(sizes)), 0, 0
    while begin < len(groups):
        stop, size = begin + 1, sizes[begin]
        while stop < len(groups) and size < BLOCK and sizes[stop] <= WIDE:
            stop, size = stop + 1, size + sizes[stop]
        weight = item.info.size * size // total
        if size > WIDE and stop == begin + 1:
            yield from _row_batches(file, item.info.path, begin, columns, (first, size, weight))
        else:
            yield {"span": (begin, stop), "weight": weight, "first": first}
        first += sum(group.num_rows for group in groups[begin:stop])
        begin = stop


def _row_batches(
    file: Any, path: str, group: int, columns: list[str], figures: tuple[int, int, int]
) -> Iterator[dict[str, Any]]:
    first, size, weight = figures
    rows = file.metadata.row_group(group).num_rows
    with whole_parquet(path):
        for batch in file.iter_batches(max(1, rows * BLOCK // size), row_groups=[group], columns=columns):
            yield {"data": pack_rows(batch), "weight": weight * batch.num_rows // rows, "first": first}
            first += batch.num_rows


def parquet_columns(schema: Any, path: str, rules: Rules) -> list[str]:
    """The columns that are read. PunaError for a field that the file has not."""
    wanted = [(rules.text_field, "--text-field")]
    wanted += [(rules.tag_field, "--tag-field")] if rules.tag and rules.tag_field else []
    for name, option in wanted:
        if name not in schema.names and name.split(".")[0] not in schema.names:
            raise PunaError(
                f"{path} has no field {name!r}", f"its fields are {', '.join(schema.names)}; choose with {option}"
            )
    found = [name if name in schema.names else name.split(".")[0] for name, _ in wanted]
    if rules.tag and not rules.tag_field:
        found += [name for name in ("url", "source", "domain") if name in schema.names]
    return list(dict.fromkeys(found))


def _text_bytes(group: Any, rules: Rules) -> int:
    columns = [group.column(i) for i in range(group.num_columns)]
    name = rules.text_field
    return sum(c.total_uncompressed_size for c in columns if f"{c.path_in_schema}.".startswith(f"{name}."))
