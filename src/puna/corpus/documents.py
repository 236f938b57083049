"""Documents from bytes: what counts as text, where a document's domain stands, and what is left out and counted."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from puna.base.files import name_of

# What `left_out` counts. Invalid UTF-8 is not left out but mended; the rest is.
EMPTY, BINARY, INVALID, BROKEN = "empty", "binary files", "invalid UTF-8", "broken lines"
_DOMAIN_FIELDS = ("url", "source", "domain")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BOM, _BOM_CHARACTER = b"\xef\xbb\xbf", "\ufeff"
_SPACE = b" \t\r\n\v\f"
_LONGEST_DOMAIN = 253  # characters, as of a host name


@dataclass(frozen=True)
class Document:
    """One text, where it came from, and the domain it may be tagged with."""

    name: str
    text: str
    domain: str = ""


@dataclass(frozen=True)
class Rules:
    """How bytes become documents. `text_field` and `tag_field` may be dotted; `strict` refuses what else is counted."""

    text_field: str = "text"
    tag: bool = False
    tag_field: str = ""
    strict: bool = False


@dataclass(frozen=True)
class Note:
    """Something about one place of a file: its line or row, counted from 1 (0: the file as such)."""

    path: str
    place: int
    what: str
    hint: str = ""

    def text(self) -> str:
        """The note as one line."""
        if not self.place:
            return f"{self.path} {self.what}"
        where = " row " if file_kind(self.path)[0] == "rows" else ":"
        return f"{self.path}{where}{self.place} {self.what}"


class Refusal(Exception):
    """Input that is not taken. Its one argument is a `Note`: only who knows what came before can name the line."""

    @property
    def note(self) -> Note:
        """What is refused, and where."""
        return self.args[0]


@dataclass
class Reading:
    """What was read: documents in order, what was left out, a few notes, and `places`: lines or rows gone through."""

    documents: list[Document] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[Note] = field(default_factory=list)
    places: int = 0

    def leave_out(self, what: str, note: Note | None = None, strict: bool = False) -> None:
        """Count one; the first few are noted. `strict`: refuse it."""
        if note is not None and strict:
            raise Refusal(note)
        self.left_out[what] += 1
        if note is not None and len(self.notes) < 3:
            self.notes.append(note)


def file_kind(path: str) -> tuple[str, str]:
    """(kind, compression) by the name: kind is text, lines (jsonl) or rows (parquet); compression '', gz or zst."""
    name = name_of(path).lower()
    packed = next((ending for ending in ("gz", "zst") if name.endswith(f".{ending}")), "")
    name = name.removesuffix(f".{packed}")
    if name.endswith((".jsonl", ".ndjson")):
        return "lines", packed
    return ("rows", "") if name.endswith(".parquet") and not packed else ("text", packed)


def read_text(data: bytes, path: str, rules: Rules, reading: Reading, offset: int = 0) -> str | None:
    """The text of a file, or of the part of it that begins at byte `offset`; None if it is binary.

    Counts what is wrong with it; whether it is empty is for the caller to say, who may have more parts.
    """
    if b"\0" in data:
        reading.leave_out(BINARY)
        return None
    return _decode(data if offset else data.removeprefix(_BOM), path, 0, rules, reading, offset)


def add_text(data: bytes, path: str, domain: str, rules: Rules, reading: Reading) -> None:
    """A whole file as one document."""
    text = read_text(data, path, rules, reading)
    if text is not None:
        _add(Document(path, text, domain), reading)


def add_lines(data: bytes, path: str, domain: str, rules: Rules, reading: Reading) -> None:
    """One document per line of JSON. Blank lines are passed over, what is not JSON is counted.

    Raises Refusal for a row without the text field, or with something else than text in it.
    """
    try:
        lines: Sequence[str | bytes] = data.decode().split("\n")
    except UnicodeDecodeError:
        lines = data.split(b"\n")
    for place, line in enumerate(lines, 1):
        if isinstance(line, bytes):
            line = "" if not line.strip(_SPACE) else _decode(line, path, place, rules, reading, 0)
        if not line or line.isspace():
            continue
        row = _parse(line, path, place, rules, reading)
        if row is not None:
            add_row(row, path, place, domain, rules, reading)
    reading.places += len(lines) - 1  # data ends with a line break, or with its file


def add_row(row: Mapping[str, Any], path: str, place: int, domain: str, rules: Rules, reading: Reading) -> None:
    """The document of one row of JSON or parquet."""
    value = _field(row, rules.text_field, path, place, "--text-field")
    if isinstance(value, bytes):
        value = _decode(value, path, place, rules, reading, 0)
    if value is None:
        value = ""
    if not isinstance(value, str):
        what = f"has {_kind_of(value)} in its field {rules.text_field!r}, not text"
        raise Refusal(Note(path, place, what, _choose(row, "--text-field")))
    tag = _row_domain(row, path, place, domain, rules) if rules.tag else ""
    _add(Document(path, _mend(value, path, place, rules, reading), tag), reading)


def _add(document: Document, reading: Reading) -> None:
    if not document.text or document.text.isspace():
        reading.leave_out(EMPTY)
    else:
        reading.documents.append(document)


def _decode(data: bytes, path: str, place: int, rules: Rules, reading: Reading, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        what = f"is not valid UTF-8 at byte {offset + error.start}{' of the line' if place else ''}"
        hint = "convert it to UTF-8, or leave out --strict: U+FFFD then stands for what is wrong"
        reading.leave_out(INVALID, Note(path, place, what, hint), rules.strict)
        return data.decode(errors="replace")


def _mend(text: str, path: str, place: int, rules: Rules, reading: Reading) -> str:
    """JSON can spell half a surrogate pair, which no UTF-8 can hold."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        what = f"has half a surrogate pair at character {error.start} of its text"
        hint = "mend the file, or leave out --strict: U+FFFD then stands for it"
        reading.leave_out(INVALID, Note(path, place, what, hint), rules.strict)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parse(line: str, path: str, place: int, rules: Rules, reading: Reading) -> dict[str, Any] | None:
    try:
        row = json.loads(line.lstrip(_BOM_CHARACTER))
        if not isinstance(row, dict):
            raise ValueError(f"{_kind_of(row)}, not an object")
        return row
    except (ValueError, RecursionError) as error:
        note = Note(
            path, place, f"is not a line of JSON: {error}", "mend the line, or leave out --strict to pass over it"
        )
        reading.leave_out(BROKEN, note, rules.strict)
        return None


def _field(row: Mapping[str, Any], name: str, path: str, place: int, option: str) -> Any:
    """A field by its name or dotted path; Refusal if there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise Refusal(Note(path, place, f"has no field {name!r}", _choose(row, option)))
        value = value[part]
    return value


def _choose(row: Mapping[str, Any], option: str) -> str:
    """A hint with the fields there are, the likeliest first: for text, that is the longest."""
    names = sorted(row, key=lambda name: -len(row[name]) if isinstance(row[name], str | bytes) else 1)
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"its fields are {shown}; for instance {option} {names[0]}" if names else "the row has no fields at all"


def _row_domain(row: Mapping[str, Any], path: str, place: int, domain: str, rules: Rules) -> str:
    if rules.tag_field:
        return as_domain(_field(row, rules.tag_field, path, place, "--tag-field"))
    return next((as_domain(row[name]) for name in _DOMAIN_FIELDS if row.get(name)), domain)


def as_domain(value: Any) -> str:
    """A URL's host; anything else as it is, on one line."""
    text = "" if value is None else value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    if _URL.match(text):
        try:
            text = urlsplit(text).hostname or ""
        except ValueError:  # such as http://[broken
            text = ""
    return " ".join(_UNPRINTABLE.sub(" ", text).split())[:_LONGEST_DOMAIN]


_UNPRINTABLE = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


def _kind_of(value: Any) -> str:
    names = {list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")
