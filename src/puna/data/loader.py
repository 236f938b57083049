"""Batches made ahead of the step that needs them, and how long the step had to wait for them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from puna.base.console import PunaError
from puna.data.gate import StoreGate
from puna.data.pack import Batch
from puna.data.stream import Stream, share

# Steps are made several at a time, up to this many tokens: a step of a small model is over sooner than its 16 shards
# are looked at.
_TOKENS_AT_ONCE, _STEPS_AT_ONCE = 1 << 16, 16
_PATIENCE = 5.0  # seconds that the end of a run waits for a thread that is reading from storage
# Shards that are fetched, checked and opened at once. Reading one from a bucket uses several connections by itself.
_FETCHERS = 4


class Loader:
    """One rank's micro-batches, step by step. `waited`: seconds the last `step` call stood still for data.

    A thread makes up to `ahead` steps in advance, others open the shards that come next. `gate` lets ranks wait for
    each other's storage outside of collectives.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        micro_batch_size: int = 0,
        rank: int = 0,
        world: int = 1,
        ahead: int = 2,
        gate: StoreGate | None = None,
    ):
        share(0, batch_size, rank, world)  # refuse now what cannot be shared
        self._stream, self._rows, self._micro = stream, batch_size, micro_batch_size
        self._rank, self._world, self._ahead, self._gate = rank, world, ahead, gate
        self._worker: _Worker | None = None
        self.waited = 0.0

    def step(self, number: int) -> list[Batch]:
        """This rank's micro-batches of step `number`. Raises what reading them raised."""
        started = time.perf_counter()
        if self._worker is None or self._worker.next != number:
            self.close()
            self._worker = _Worker(self.make, self._touch, number, self._ahead, self._at_once())
        try:
            batches = self._worker.take()
        except PunaError as error:
            if self._gate is not None:
                self._gate.fail(number, error.message)
            raise
        if self._gate is not None:
            self._gate(number)
        self.waited = time.perf_counter() - started
        return batches

    def make(self, number: int, steps: int = 1) -> list[list[Batch]]:
        """The micro-batches of any steps, made here and now."""
        ranges: list[tuple[int, int]] = []
        for step in range(number, number + steps):
            first, rows = share(step * self._rows, self._rows, self._rank, self._world)
            micro = self._micro or rows
            ranges += [(first + i, min(micro, rows - i)) for i in range(0, rows, micro)]
        batches = self._stream.batches(ranges)
        each = len(batches) // steps
        return [batches[i * each : (i + 1) * each] for i in range(steps)]

    def _at_once(self) -> int:
        tokens = self._rows // self._world * self._stream.width
        return max(1, min(_STEPS_AT_ONCE, _TOKENS_AT_ONCE // tokens))

    def _touch(self, number: int, pool: ThreadPoolExecutor, seen: dict[tuple[int, int], None]) -> None:
        """Have the shards opened that come next. What goes wrong there is said when the shard is really needed."""
        for lane, shard in self._stream.upcoming(number * self._rows):
            if (id(lane), shard) not in seen:
                pool.submit(lane.open, shard)
            seen.pop((id(lane), shard), None)
            seen[id(lane), shard] = None
        while len(seen) > 4096:
            del seen[next(iter(seen))]

    def close(self) -> None:
        """Stop the threads; the next `step` starts new ones."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


class _Worker:
    """The thread behind a loader: the steps from `first` on into a queue of `ahead` places, `most` made at a time."""

    def __init__(
        self,
        make: Callable[[int, int], list[list[Batch]]],
        touch: Callable[[int, ThreadPoolExecutor, dict[tuple[int, int], None]], None],
        first: int,
        ahead: int,
        most: int,
    ):
        self.next, self._most = first, most
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._make, self._touch = make, touch
        self._thread = threading.Thread(target=self._run, args=(first,), name="puna-data", daemon=True)
        self._thread.start()

    def take(self) -> list[Batch]:
        result = self._ready.get()
        if isinstance(result, BaseException):
            self.next = -1  # the thread has ended; asked again, a new one begins
            raise result
        self.next += 1
        return result

    def stop(self) -> None:
        self._stopped.set()
        deadline = time.monotonic() + _PATIENCE
        while self._thread.is_alive() and time.monotonic() < deadline:  # it may stand before a full queue
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                self._thread.join(0.05)

    def _run(self, number: int) -> None:
        seen: dict[tuple[int, int], None] = {}
        pool = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="puna-shards")
        steps = 1
        try:
            while not self._stopped.is_set():
                self._touch(number, pool, seen)
                for batches in self._make(number, steps):
                    self._ready.put(batches)
                number += steps
                steps = min(2 * steps, self._most)  # the first is wanted now
        except BaseException as error:
            self._ready.put(error)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
