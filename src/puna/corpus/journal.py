"""How an interrupted job goes on: a journal beside the finished shards, and what only memory knew.

    OUT/progress.jsonl         the settings; then a line per finished shard, written after the shard's files
    OUT/progress-000000.npz    keys of the documents seen since the shard before, documents that await validation

Both go when the manifest is written. What a line says is true whatever happens next, so a killed job loses the work
since its last line and nothing else.
"""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from puna.base.console import PunaError
from puna.base.files import is_remote, join, list_files, name_of, read_file, stat, write_file
from puna.base.storage import disk_error
from puna.data.shards import token_dtype

JOURNAL, SETTINGS = "progress.jsonl", "settings.json"


class Journal:
    """The journal of the job that writes `out`. `records`: what an interrupted run had finished, oldest first.

    Raises PunaError when `out` holds something else, or the work of a job with other settings.
    """

    def __init__(self, out: str, settings: Mapping[str, Any]):
        self._out, self._path = out, join(out, JOURNAL)
        lines = _whole_lines(self._path)
        if not lines:
            _refuse_foreign(out)
        else:
            check_settings(out, json.loads(lines[0]), settings)
        self._vocab_size = settings["vocab_size"]
        self.records: list[dict[str, Any]] = []
        self.records += itertools.takewhile(self._is_there, map(json.loads, lines[1:]))
        self._lines = [json.dumps(line) for line in (settings, *self.records)]
        self._count = len(self.records)
        _remove_temporary(out)
        self._rewrite()

    def append(self, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Note a finished shard, whose files are in place, with what the next run must know."""
        if arrays:
            file = io.BytesIO()
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]  # numpy's stub takes the names for its flags
            write_file(_side(self._out, self._count), file.getbuffer())
        self._lines.append(json.dumps({**record, "number": self._count, "side": bool(arrays)}))
        self._count += 1
        if is_remote(self._out):
            self._rewrite()
            return
        try:
            with open(self._path, "a") as journal:
                journal.write(self._lines[-1] + "\n")
                journal.flush()
                os.fsync(journal.fileno())
        except OSError as error:
            raise disk_error(error, Path(self._path)) from error

    def arrays(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """What was noted under these names with each line, oldest first; lines without anything are passed over."""
        for number in range(self._count):
            if json.loads(self._lines[number + 1])["side"]:
                with np.load(io.BytesIO(read_file(_side(self._out, number)))) as file:
                    yield {name: file[name] for name in names if name in file.files}

    def close(self) -> None:
        """The job is done: journal and side files go, the journal last of all."""
        remove_journal(self._out)

    def _rewrite(self) -> None:
        write_file(self._path, "".join(f"{line}\n" for line in self._lines).encode())

    def _is_there(self, record: Mapping[str, Any]) -> bool:
        """Are a line's files what it says? What was deleted or cut is made again, with all that came after it."""
        shard = record["shard"]
        width = np.dtype(token_dtype(self._vocab_size)).itemsize
        tokens = None if shard is None else stat(join(self._out, f"{shard['name']}.bin"))
        documents = None if shard is None else stat(join(self._out, f"{shard['name']}.docs"))
        good = shard is None or (tokens is not None and documents is not None)
        good = good and (tokens is None or tokens.size == shard["tokens"] * width)
        return good and (not record["side"] or stat(_side(self._out, record["number"])) is not None)


def check_settings(out: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to mix the work of two jobs: PunaError that names what differs."""
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        what = "; ".join(f"{name}: {_brief(old.get(name))} then, {_brief(new.get(name))} now" for name in changed)
        raise PunaError(f"{out} holds the work of another job ({what})", f"delete {out}, or choose another --out")


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(part)}" for key, part in value.items())
    return str(value)[:12] if value is not None else "none"


def _whole_lines(path: str) -> list[bytes]:
    """The lines of a journal, without a last one that was cut."""
    if stat(path) is None:
        return []
    return read_file(path).split(b"\n")[:-1]


def _refuse_foreign(out: str) -> None:
    if not is_remote(out) and not Path(out).exists():
        return
    if not is_remote(out) and not Path(out).is_dir():
        raise PunaError(f"{out} is a file, not a folder", "choose another --out")
    try:
        names = [name_of(info.path) for info in list_files(out) if info.size or not _is_ours(info.path)]
    except PunaError:
        if not is_remote(out):
            raise
        names = []  # nothing below the prefix yet
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise PunaError(f"{out} is not empty: it holds {shown}", f"choose another --out, or delete {out}")


def remove_journal(out: str) -> None:
    """Remove journal and side files, if they are still there; the journal last of all."""
    for line in reversed(_whole_lines(join(out, JOURNAL))):
        record = json.loads(line)
        if record.get("side"):
            _remove(_side(out, record["number"]))
    _remove(join(out, JOURNAL))


def _side(out: str, number: int) -> str:
    return join(out, f"progress-{number:06d}.npz")


def _is_ours(path: str) -> bool:
    return name_of(path).startswith("progress")


def _remove(path: str) -> None:
    """Delete a local file; an object becomes empty instead, as a store may let its writers delete nothing."""
    if not is_remote(path):
        Path(path).unlink(missing_ok=True)
    elif stat(path) is not None:
        write_file(path, b"")


def _remove_temporary(out: str) -> None:
    """What a killed run was about to rename."""
    if not is_remote(out) and Path(out).is_dir():
        for folder in (Path(out), Path(out) / "validation"):
            for file in folder.glob(".*.tmp"):
                file.unlink(missing_ok=True)


@contextmanager
def only_writer(out: str) -> Iterator[None]:
    """Refuse a second job that writes the same local folder at the same time."""
    if is_remote(out):
        yield
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, Path(out)) from error
    folder = os.open(out, os.O_RDONLY)
    try:
        _lock(folder, out)
        yield
    finally:
        os.close(folder)  # and with it goes the lock, also when the process is killed


def _lock(folder: int, out: str) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PunaError(f"another puna tokenize is writing {out}", "wait for it, or choose another --out") from error
    except OSError:  # some network file systems know no locks
        return
