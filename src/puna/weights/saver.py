"""Saves a run while it trains: a copy to host memory on the caller's thread, then everything else in another one.

A save of step 100 goes through these phases; after each all ranks know whether all succeeded, so none waits for ever:

    begin    rank 0 makes room; every rank sees it                                        .step-000100.tmp
    weights  every owner collects its files' tensors, one at a time, and writes them      model-*.safetensors
    state    every rank writes its boxes of the optimizer's state (DCP)                   state/
    extras   rank 0: config, tokenizer, index, trainer.json
    hand in  every rank: its files are on the disk, or in the bucket
    seal     rank 0: the manifest with every file's sha256, then the rename               step-000100
    keep     rank 0: `latest` moves, old saves go

Ideas: snapshot, then persist (CheckFreq, Mohan et al., FAST 2021); parallel writers (FastPersist, arXiv:2406.13768).
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from puna.base.console import PunaError
from puna.base.storage import disk_error, sync_folder, write_atomic, write_json
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.text.tokenizer import Tokenizer
from puna.weights.agree import Ranks, lost_rank
from puna.weights.folder import write_configs, write_index
from puna.weights.manifest import MANIFEST, Digests, digest_file, manifest_bytes
from puna.weights.runs import open_run, to_drop
from puna.weights.shards import LARGEST, SMALLEST, WeightFile, plan_files, queues
from puna.weights.snapshot import HostMemory, Layout, Snapshot, Whole
from puna.weights.state import TRAINER, save_state
from puna.weights.tensor_file import write_files


@dataclass(frozen=True)
class _Job:
    """A save to be written: the step, what this rank copied, and how the parameters are cut."""

    step: int
    snapshot: Snapshot
    parameters: Mapping[str, Tensor]
    trainer: bytes


@dataclass(frozen=True)
class _Plan:
    """What stays from save to save: the weight files and their owners, bytes of every parameter."""

    files: list[WeightFile]
    sizes: dict[str, int]

    @property
    def owners(self) -> dict[str, int]:
        return {name: file.owner for file in self.files for name in file.parameters}


class Saver:
    """Saves of one run, on every rank alike. One save is in flight at a time.

    `run`: a folder that all ranks see, or s3:// gs:// az://. `group`: see `agree.saver_group`; None: one process.
    `layout`: puna.parallel.pieces, or None where nothing is cut. `keep_last` 0 keeps all; `keep_every` N keeps, beyond
    the last, the saves of every N-th step; 0: none. `extras`: JSON files of every save, by name.
    """

    def __init__(
        self,
        run: str | Path,
        spec: Spec,
        tokenizer: Tokenizer | None,
        keep_last: int,
        keep_every: int = 0,
        group: ProcessGroup | None = None,
        layout: Layout | None = None,
        asynchronous: bool = True,
        file_bytes: tuple[int, int] = (SMALLEST, LARGEST),
        extras: Mapping[str, Any] | None = None,
    ):
        assert group is None or layout is not None, "several ranks need to know how tensors are cut"
        self._run, self._spec, self._tokenizer = open_run(run), spec, tokenizer
        self._keep, self._file_bytes = (keep_last, keep_every), file_bytes
        self._ranks, self._layout, self._asynchronous = Ranks(group), layout or Whole(), asynchronous
        self._extras = extras or {}
        self._memory = HostMemory(self._layout)
        self._plan: _Plan | None = None
        self._thread: threading.Thread | None = None
        self._saved: str | None = None
        self._failed: BaseException | None = None

    def save(
        self, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, trainer: dict[str, Any]
    ) -> None:
        """Save this rank's `parameters` (by the whole model's names), the optimizer's state and rank 0's `trainer`.

        Waits for the previous save. When it returns, all may change: the rest is written from copies. Every rank must
        call it. Raises PunaError as `wait` does.
        """
        self.wait()
        self._plan = self._plan or self._make_plan(parameters)
        snapshot = self._memory.take(parameters, self._plan.owners, optimizer, self._ranks.rank)
        text = json.dumps({"step": step, **trainer}, indent=2, ensure_ascii=False) + "\n"
        job = _Job(step, snapshot, dict(parameters), text.encode())
        # A daemon: a program that fails elsewhere ends at once, and what is half-written is no save.
        self._thread = threading.Thread(target=self._work, args=(job,), name="puna-save", daemon=True)
        if self._asynchronous:
            self._thread.start()
        else:
            self._thread = None
            self._work(job)
            self.wait()

    def wait(self) -> str | None:
        """Wait for the save in flight; the path of the last complete one. Raises PunaError if it failed on any rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        return self._saved

    def check(self) -> str | None:
        """As `wait`, without waiting: an error of a save is raised by the first call after it happened."""
        return self._saved if self._thread is not None and self._thread.is_alive() else self.wait()

    def _work(self, job: _Job) -> None:
        try:
            self._saved = self._write(job)
        except BaseException as error:  # whatever it is, it belongs to the thread that waits
            self._failed = error

    def _make_plan(self, parameters: Mapping[str, Tensor]) -> _Plan:
        """Who holds what, once: each rank tells the bytes per number of what it holds, 0 for what it does not."""
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in Transformer(self._spec).named_parameters()}
        told = self._ranks.each(lambda: _widths(parameters, shapes))
        sizes, holders = {}, {}
        for place, (name, shape) in enumerate(shapes.items()):
            holders[name] = [rank for rank, widths in enumerate(told) if widths[place]]
            if not holders[name]:
                raise PunaError(f"no rank holds {name}", "hand every parameter of the model to the save")
            sizes[name] = shape.numel() * told[holders[name][0]][place]
        smallest, largest = self._file_bytes
        return _Plan(plan_files(sizes, holders, largest, smallest), sizes)

    def _write(self, job: _Job) -> str:
        token = self._ranks.first(lambda: uuid.uuid4().hex)
        stage: Path | None = None
        try:
            self._ranks.first(lambda: self._run.begin(job.step, token))
            stage = self._ranks.each(lambda: self._run.stage(job.step, token))[self._ranks.rank]
            saved = self._fill(job, stage)
        except BaseException:
            if self._ranks.rank == 0:
                self._try_to_abandon(job.step)
            raise
        finally:
            if stage is not None:
                self._run.leave(stage)
        self._ranks.first(lambda: self._keep_some(job.step))
        return saved

    def _fill(self, job: _Job, stage: Path) -> str:
        assert self._plan is not None
        rank, digests = self._ranks.rank, Digests()
        self._ranks.each(lambda: digests.update(self._write_weights(job, stage)))
        names = save_state(job.snapshot.state, stage / "state", self._ranks.group)
        if rank == 0:
            names.append(TRAINER)
        self._ranks.first(lambda: self._write_extras(job, stage))
        state = [f"state/{name}" for name in names]
        extras = [p.name for p in stage.iterdir() if _is_extra(p)] if rank == 0 else []

        def hand_in() -> Digests:
            digests.update({name: digest_file(stage / name) for name in [*state, *extras]})
            self._run.hand_in(job.step, stage, digests)
            return digests

        everything = Digests()
        for part in self._ranks.each(hand_in):
            everything |= part
        return self._ranks.first(lambda: self._run.seal(job.step, stage, manifest_bytes(everything)))

    def _write_weights(self, job: _Job, stage: Path) -> Digests:
        assert self._plan is not None
        mine = [file for file in self._plan.files if file.owner == self._ranks.rank]
        entries = {
            name: (job.parameters[name].dtype, tuple(job.parameters[name].shape))
            for file in mine
            for name in file.parameters
        }
        try:
            return write_files(mine, self._arriving(job), entries, stage)
        except OSError as error:
            raise disk_error(error, stage) from error

    def _arriving(self, job: _Job) -> Iterator[Tensor]:
        """The whole tensors that this rank writes, in its order, as rounds: in each every owner collects its next."""
        assert self._plan is not None
        parts, waiting = job.snapshot.weights, queues(self._plan.files)
        for turn in range(max(map(len, waiting.values()))):
            names = {owner: names[turn] for owner, names in waiting.items() if turn < len(names)}
            wanted = [(job.parameters[name], owner, parts[name]) for owner, name in names.items() if name in parts]
            try:
                whole = self._layout.collect(wanted, self._ranks.group)
            except RuntimeError as error:
                raise lost_rank(error) from error
            if whole is not None:
                yield whole

    def _write_extras(self, job: _Job, stage: Path) -> None:
        assert self._plan is not None
        dtype = job.parameters[self._plan.files[0].parameters[0]].dtype
        write_configs(self._spec, dtype, stage, self._tokenizer)
        write_index(self._plan.files, self._plan.sizes, stage)
        for name, payload in self._extras.items():
            write_json(stage / name, payload)
        write_atomic(stage / "state" / TRAINER, job.trainer)
        sync_folder(stage / "state")

    def _keep_some(self, step: int) -> None:
        self._run.point(step)
        for save in to_drop(self._run.steps(), *self._keep):
            self._run.drop(save)

    def _try_to_abandon(self, step: int) -> None:
        """Clean up after a failure. What failed, disk or bucket, may fail here, too; the first error counts."""
        try:
            self._run.abandon(step)
        except (PunaError, OSError):
            return


def _is_extra(path: Path) -> bool:
    """What rank 0 alone wrote beside weights and state."""
    weights = path.suffix == ".safetensors"
    return path.is_file() and not weights and path.name != MANIFEST and not path.name.startswith(".")


def _widths(parameters: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> bytes:
    """Bytes per number of each parameter of the model, 0 for one that is not here."""
    for name, parameter in parameters.items():
        if shapes.get(name) != parameter.shape:
            expected = list(shapes[name]) if name in shapes else "no such parameter"
            hint = "hand in the spec that the model was built of"
            raise PunaError(f"{name} is {list(parameter.shape)}, the spec says {expected}", hint)
    return bytes(parameters[name].itemsize if name in parameters else 0 for name in shapes)
