"""Work that succeeds on every rank or is one error on every rank: nobody waits for a rank that gave up."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from puna.base.console import PunaError
from puna.base.storage import disk_error

T = TypeVar("T")


def saver_group(timeout: timedelta = timedelta(minutes=30)) -> ProcessGroup | None:
    """A gloo group of all ranks for a Saver's thread alone; None in a single process. Every rank must call it.

    `timeout`: for how long the other ranks wait for one that is still writing, or frozen. One that died is noticed at
    once, as its connection breaks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timeout)


class LostRank(PunaError):
    """Another rank died or does not answer: there is nobody left to agree with."""


class Ranks:
    """The ranks of a group, or the one process there is."""

    def __init__(self, group: ProcessGroup | None):
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def each(self, work: Callable[[], T]) -> list[T]:
        """Run `work` here and on all other ranks; every rank's result, in order of ranks.

        Raises PunaError on every rank if it failed on one: the message says on which. Every rank must call it.
        """
        try:
            result, failed = work(), None
        except LostRank:
            raise  # to wait for the others' answers would be to wait for the dead
        except OSError as error:
            result, failed = None, disk_error(error, Path(error.filename or tempfile.gettempdir()))
        except PunaError as error:
            result, failed = None, error
        except Exception as error:
            if self.group is None:
                raise
            result, failed = None, PunaError(f"{type(error).__name__}: {error}", "see the log of that rank")
        if self.group is not None:
            return self._agree(result, failed)
        if failed is not None:
            raise failed
        return [result]  # type: ignore[list-item]

    def first(self, work: Callable[[], T]) -> T:
        """`work` on rank 0 alone; its result, or its error, on every rank."""
        results: list[Any] = self.each(lambda: work() if self.rank == 0 else None)
        return results[0]

    def _agree(self, result: Any, error: PunaError | None) -> list[Any]:
        told: list[Any] = [None] * self.size
        failure = None if error is None else (error.message, error.hint)
        try:
            dist.all_gather_object(told, (result, failure), group=self.group)
        except (RuntimeError, ValueError) as broken:  # gloo's own error, with addresses and line numbers
            raise lost_rank(broken) from broken
        failed = {rank: failure for rank, (_, failure) in enumerate(told) if failure is not None}
        if failed:
            rank, (message, hint) = next(iter(failed.items()))
            more = f" (and {len(failed) - 1} more of {self.size} ranks)" if len(failed) > 1 else ""
            raise PunaError(f"rank {rank}{more}: {message}", hint)
        return [result for result, _ in told]


def lost_rank(error: Exception) -> LostRank:
    """What a broken or timed-out collective of the saver's group means to a person."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return LostRank(
        f"another rank died or does not answer: {text[:200]}", "start the job again: earlier saves are complete"
    )
