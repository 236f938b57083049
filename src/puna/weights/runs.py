"""Where the saves of a run live: a local or shared folder, or a bucket. Each save is whole, or is no save.

    run/step-000100/        a save; complete because its manifest.json was written last
    run/latest              a link to the newest (in a bucket an object with its name)
    run/.step-000200.tmp    being written (local only): renamed when its manifest is in
    run/.step-000050.gone   being removed (local only)

A bucket has no rename: there a save comes into being with its manifest, and goes with it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from puna.base import files
from puna.base.console import PunaError
from puna.base.storage import disk_error, point_latest, swap_in, sync_file, sync_folder, write_atomic
from puna.weights.manifest import MANIFEST


class Run(Protocol):
    """The saves of a run, for reading, writing and removing them. What writes is called in the order given here."""

    def steps(self) -> list[str]:
        """The complete saves, oldest first, as paths or URLs."""

    def begin(self, step: int, token: str) -> None:
        """Rank 0: make room for a save; remove what an unfinished one of this step left."""

    def stage(self, step: int, token: str) -> Path:
        """A local folder for this rank to write its files into. Raises PunaError if the ranks share no folder."""

    def hand_in(self, step: int, stage: Path, names: Iterable[str]) -> None:
        """This rank's files in `stage` are complete and on the disk: bring them where the save will be."""

    def seal(self, step: int, stage: Path, manifest: bytes) -> str:
        """Rank 0, when all have handed in: the manifest, with which the save exists; its path."""

    def leave(self, stage: Path) -> None:
        """This rank is done with its stage, whatever became of the save."""

    def abandon(self, step: int) -> None:
        """Rank 0: remove what there is of a save that failed."""

    def point(self, step: int) -> None:
        """Make `latest` name this save."""

    def drop(self, save: str) -> None:
        """Remove a save, its manifest first."""

    def clean(self) -> None:
        """Remove what killed processes left; nobody may be saving."""


def open_run(run: str | Path) -> Run:
    """The run at a path or URL; it need not exist yet."""
    return BucketRun(str(run)) if files.is_remote(run) else LocalRun(Path(run))


def step_name(step: int) -> str:
    """100 -> 'step-000100'."""
    return f"step-{step:06d}"


def step_of(save: str | Path) -> int:
    """'run/step-000100' -> 100."""
    return int(files.name_of(save).removeprefix("step-"))


def to_drop(saves: list[str], keep_last: int, keep_every: int) -> list[str]:
    """Which of these saves, oldest first, go: all but the `keep_last` newest and those of every `keep_every`-th step.

    `keep_last` 0: none go.
    """
    old = saves[:-keep_last] if keep_last > 0 else []
    return [save for save in old if not (keep_every and step_of(save) % keep_every == 0)]


class LocalRun:
    """Saves in a folder that all ranks see: a local disk, or one shared between nodes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def steps(self) -> list[str]:
        return _in_order(self.folder, (name for name in files.list_folders(self.folder)))

    def begin(self, step: int, token: str) -> None:
        beside = self._beside(step)
        try:
            files.remove_tree(beside)
            (beside / "state").mkdir(parents=True)
            _marker(beside, token).touch()
        except OSError as error:
            raise disk_error(error, beside) from error

    def stage(self, step: int, token: str) -> Path:
        beside = self._beside(step)
        if not _marker(beside, token).exists():
            raise PunaError(
                f"{self.folder} is not shared between nodes: what rank 0 wrote there is not seen here",
                "set out to a folder on a shared disk, or to s3://bucket/run",
            )
        return beside

    def hand_in(self, step: int, stage: Path, names: Iterable[str]) -> None:
        try:
            for name in names:
                sync_file(stage / name)
            for folder in {(stage / name).parent for name in names}:
                sync_folder(folder)
        except OSError as error:
            raise disk_error(error, stage) from error

    def seal(self, step: int, stage: Path, manifest: bytes) -> str:
        target = self.folder / step_name(step)
        for marker in stage.glob(".shared-*"):
            marker.unlink()
        write_atomic(stage / MANIFEST, manifest)
        swap_in(stage, target)
        return str(target)

    def leave(self, stage: Path) -> None:
        """The stage is everybody's: `seal` or `abandon` takes it away."""

    def abandon(self, step: int) -> None:
        shutil.rmtree(self._beside(step), ignore_errors=True)

    def point(self, step: int) -> None:
        point_latest(self.folder / "latest", self.folder / step_name(step))

    def drop(self, save: str) -> None:
        # First renamed: a kill half-way leaves no save with holes.
        hidden = self.folder / f".{files.name_of(save)}.gone"
        files.remove_tree(hidden)
        Path(save).rename(hidden)
        shutil.rmtree(hidden)

    def clean(self) -> None:
        for old in self.folder.glob(".step-*.old"):  # killed while a save replaced one of the same step
            target = self.folder / old.name.removeprefix(".").removesuffix(".old")
            if not target.exists() and (old / MANIFEST).exists():
                old.rename(target)
        for pattern in (".step-*.tmp", ".step-*.old", ".step-*.gone"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def _beside(self, step: int) -> Path:
        return self.folder / f".{step_name(step)}.tmp"


class BucketRun:
    """Saves below a URL. Each rank writes into a temporary folder of its own node and puts its own files."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def steps(self) -> list[str]:
        return _in_order(self.url, files.list_folders(self.url))

    def begin(self, step: int, token: str) -> None:
        self.drop(self._target(step))

    def stage(self, step: int, token: str) -> Path:
        try:
            _sweep(Path(tempfile.gettempdir()))
            made = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{os.getpid()}-"))
            (made / "state").mkdir()
        except OSError as error:
            raise disk_error(error, Path(tempfile.gettempdir())) from error
        return made

    def hand_in(self, step: int, stage: Path, names: Iterable[str]) -> None:
        for name in names:
            files.upload(files.join(self._target(step), name), stage / name)

    def seal(self, step: int, stage: Path, manifest: bytes) -> str:
        files.write_file(files.join(self._target(step), MANIFEST), manifest)
        return self._target(step)

    def leave(self, stage: Path) -> None:
        shutil.rmtree(stage, ignore_errors=True)

    def abandon(self, step: int) -> None:
        self.drop(self._target(step))

    def point(self, step: int) -> None:
        files.write_file(files.join(self.url, "latest"), step_name(step).encode())

    def drop(self, save: str) -> None:
        files.remove([files.join(save, MANIFEST)])
        files.remove_tree(save)

    def clean(self) -> None:
        complete = {files.name_of(save) for save in self.steps()}
        for name in files.list_folders(self.url):
            if _STEP.fullmatch(name) and name not in complete:
                files.remove_tree(files.join(self.url, name))

    def _target(self, step: int) -> str:
        return files.join(self.url, step_name(step))


_STEP = re.compile(r"step-\d{6,}")


_TEMPORARY = "puna-save-"


def _sweep(folder: Path) -> None:
    """Remove what the savers of dead processes of this user left on this node."""
    for stage in folder.glob(f"{_TEMPORARY}*"):
        pid = stage.name.removeprefix(_TEMPORARY).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(stage, ignore_errors=True)


def _in_order(run: str | Path, names: Iterable[str]) -> list[str]:
    saves = [files.join(run, name) for name in names if _STEP.fullmatch(name)]
    return sorted((save for save in saves if files.stat(files.join(save, MANIFEST))), key=step_of)


def _marker(stage: Path, token: str) -> Path:
    return stage / f".shared-{token}"
