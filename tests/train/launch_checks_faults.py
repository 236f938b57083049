"""Jobs that must fail, and how: what is wrong, in which rank, and the words that a person reads once.

`observe` runs one; the quirks here are called in each rank before puna starts.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.launch_checks import Job, Quirk, losses, send, until, write_recipe


@dataclass(frozen=True)
class Fault:
    """`says`: parts of the one message; `changes`: of the recipe; `words`: more of the command line."""

    says: tuple[str, ...]
    ranks: int = 2
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    quirk: Quirk | None = None
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What a job left: `code` of torchrun (None: it hung), `errors` in its output, `gone`: seconds from the first to the end."""

    code: int | None
    errors: list[str]
    output: str
    gone: float
    run: Path


def observe(folder: Path, name: str, fault: Fault) -> Seen:
    """Run a job to its end."""
    recipe = write_recipe(folder, name, **fault.changes)
    words = ["train", str(recipe), *fault.words]
    job = Job(
        folder / "logs" / name, ["--standalone", f"--nproc_per_node={fault.ranks}"], words, fault.quirk, **fault.env
    )
    try:
        until(lambda: "error: " in job.err or not job.processes(), 60)
        failed = time.monotonic()
        until(lambda: not set(job.processes()) - stopped(job) - {job.agent}, 25)
        for pid in stopped(job):  # torchrun gives a rank 30 s after SIGTERM, and this one cannot hear it
            send(pid, signal.SIGKILL)
        until(lambda: not job.processes(), 25)
        gone = time.monotonic() - failed
        code = job.wait(20)
        output = job.out + job.err
        return Seen(
            code, [line for line in output.splitlines() if line.startswith("error: ")], output, gone, folder / name
        )
    finally:
        job.end()


def stopped(job: Job) -> set[int]:
    """Ranks that stand still after SIGSTOP."""
    return {pid for pid in job.processes() if _state(pid) == "T"}


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def in_rank_1(change: Callable[[], None]) -> Quirk:
    """A quirk cannot be a lambda: it travels by its name. This is for the bodies below."""

    def quirk(rank: int) -> None:
        if rank == 1:
            change()

    quirk.__module__, quirk.__qualname__ = change.__module__, change.__name__.removeprefix("_")
    return quirk


def _other_recipe() -> None:
    import sys

    sys.argv += ["--optim.lr", "0.5"]


def _other_torch() -> None:
    import torch

    torch.__version__ = "2.11.0"


def _dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _elsewhere() -> None:
    os.chdir("/")


def _later() -> None:
    """An hour ahead of the others."""
    honest = time.time
    time.time = lambda: honest() + 3600.0


def _full_disk() -> None:
    """As disks do that take a write and find no room for it later."""
    fsync = os.fsync

    def refuse(file: int) -> None:
        if ".step-" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    os.fsync = refuse


def _hangs() -> None:
    """Stands still in its fourth step."""
    from puna.train.loop import Trainer

    step = Trainer.step

    def stand_still(self: Trainer, batches: list[Any]) -> Any:
        if self.step_done == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return step(self, batches)

    Trainer.step = stand_still


other_recipe, other_torch, dies, elsewhere = map(in_rank_1, (_other_recipe, _other_torch, _dies, _elsewhere))
later, full_disk, hangs = map(in_rank_1, (_later, _full_disk, _hangs))


def faults(folder: Path) -> dict[str, Fault]:
    """Every one, by name. In `folder` are text, tokenizer and shards; ranks start there."""
    here = {"data": {"tokenizer": "tokenizer"}}
    return {
        "product": Fault(
            ("dp_shard 2", "tp 2", "makes 4 ranks, there are 2", "or 4 ranks"),
            changes={"parallel": {"tp": 2, "dp_shard": 2}},
        ),
        "heads": Fault(("num_attention_heads 4", "tp 3"), 3, {"parallel": {"tp": 3}}),
        "layers": Fault(("2 layers", "4 pipeline stages"), 4, {"parallel": {"pp": 4}}),
        "sequence_tp": Fault(("seq_len 33", "tp 2"), changes={"data": {"seq_len": 33}, "parallel": {"tp": 2}}),
        "sequence_cp": Fault(("seq_len 33", "cp 2"), changes={"data": {"seq_len": 33}, "parallel": {"cp": 2}}),
        "cuda": Fault(("cuda",), changes={"train": {"device": "cuda"}}),
        "recipe": Fault(("recipe of rank 1", "optim.lr 0.5"), quirk=other_recipe),
        "software": Fault(("software of rank 1", "torch 2.11.0"), quirk=other_torch),
        "dies": Fault(("rank      : 1", "SIGKILL"), quirk=dies),
        "tokenizer": Fault(("rank 1", "tokenizer"), changes=here, quirk=elsewhere),
        "shards": Fault(("rank 1", "shards"), changes={"data": {"text": [], "shards": ["shards"]}}, quirk=elsewhere),
        "disk": Fault(("rank 1", "the disk is full"), quirk=full_disk),
        "hang": Fault(
            ("waited in vain", "flight"), 3, {"parallel": {"timeout": 3.0}, "train": {"batch_size": 6}}, quirk=hangs
        ),
    }


def losses_with_skew(folder: Path) -> dict[int, float]:
    """Of a run whose rank 1 lives an hour ahead."""
    seen = observe(folder, "skew", Fault((), quirk=later))
    assert seen.code == 0, seen.output
    return losses(seen.run)
