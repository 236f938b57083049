"""The journal of a folder that is written part by part: what it will be, and which parts are finished.

    journal.jsonl   line 1: what is written here; then a line per part: its file, sha256, what is in it

A part counts from the moment its line is on the disk; its file was there before. A line cut short by a crash counts as
not written.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from puna.base.console import PunaError
from puna.base.hardware import dtype_name
from puna.base.storage import disk_error
from puna.ops.formats.scheme import Scheme
from puna.weights.manifest import digest_file
from puna.weights.quantization import LayerFormat
from puna.weights.tensor_file import Entry

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Part:
    """A finished part. parameters: our names. entries: the tensors of its file. layers: its linear layers and how they
    are stored (None: plain).
    """

    name: str
    sha256: str
    size: int
    parameters: tuple[str, ...]
    entries: dict[str, Entry]
    layers: dict[str, LayerFormat | None]

    @property
    def file(self) -> str:
        """Its file within the folder."""
        return f"{self.name}.safetensors"

    @property
    def tensor_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.entries.values())


class PartJournal:
    """Opens or continues the journal in `folder`, which it locks against a second writer.

    header: plain values that must be the same for a run that goes on. resume False begins anew. Raises PunaError for
    a folder that another process writes, that is of another model, or whose files are damaged.
    """

    def __init__(self, folder: Path, header: dict[str, Any], resume: bool = True):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / JOURNAL, "a+b")  # noqa: SIM115
        except OSError as error:
            raise disk_error(error, folder) from error
        try:
            self._lock()
            lines = self._whole_lines() if resume else []
            if not lines:
                self._begin(header)
            else:
                self._check(lines[0], header)
            self.parts = self._finished(lines[1:])
        except OSError as error:
            self._file.close()
            raise disk_error(error, folder) from error
        except BaseException:
            self._file.close()
            raise

    def append(self, part: Part) -> None:
        """The part's file is on the disk: from now on it counts. Raises OSError as the operating system gives it."""
        entries = {name: [dtype_name(dtype), list(shape)] for name, (dtype, shape) in part.entries.items()}
        self._append({**asdict(part), "entries": entries})
        self.parts.pop(part.name, None)
        self.parts[part.name] = part

    def close(self) -> None:
        """Let others write."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PunaError(f"another process is writing {self.folder}", "wait, or choose another --out") from error

    def _whole_lines(self) -> list[dict[str, Any]]:
        """Lines up to the first that was cut short; the rest is taken away, so that the next begins on its own."""
        self._file.seek(0)
        data = self._file.read()
        self._file.truncate(data.rfind(b"\n") + 1)
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]

    def _begin(self, header: dict[str, Any]) -> None:
        for left in self.folder.glob("*.safetensors"):  # whatever else lies here has an owner of its own
            left.unlink()
        self._file.truncate(0)
        self._append(header)

    def _check(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        differs = [key for key in header if found.get(key) != json.loads(json.dumps(header[key]))]
        if differs:
            raise PunaError(
                f"{self.folder} is of an interrupted run with another {', '.join(differs)}",
                f"give the same options to go on with it, or remove {self.folder} to begin anew",
            )

    def _finished(self, lines: list[dict[str, Any]]) -> dict[str, Part]:
        """The last of each name, compared with its checksum."""
        found: dict[str, Part] = {}
        for part in map(_part_of, lines):
            found.pop(part.name, None)
            found[part.name] = part
        for part in found.values():
            path = self.folder / part.file
            if not path.exists() or digest_file(path).sha256 != part.sha256:
                raise PunaError(f"{path} is not what was written", f"remove {self.folder} to begin anew")
        return found

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _part_of(line: dict[str, Any]) -> Part:
    entries = {name: (getattr(torch, dtype), tuple(shape)) for name, (dtype, shape) in line["entries"].items()}
    layers = {layer: None if form is None else _form_of(form) for layer, form in line["layers"].items()}
    return Part(line["name"], line["sha256"], line["size"], tuple(line["parameters"]), entries, layers)


def _form_of(line: dict[str, Any]) -> LayerFormat:
    inputs = line["activations"]
    return LayerFormat(**{**line, "scheme": Scheme(**line["scheme"]), "activations": inputs and Scheme(**inputs)})
