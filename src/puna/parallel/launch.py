"""Ranks before and beside torch.distributed: who is there, do all want the same, and what if one fails.

A job's ranks meet at a key-value store in rank 0. torchrun's own store outlives a restart and then still holds the dead
ranks' addresses (pytorch #135712, #167288), so it only says where the new one is: a store that answers is of ranks
that live.

    a rank is killed -> its neighbours miss its process -> write `failed` for it
    a rank fails     -> writes `failed` -> every rank's watch sees it -> rank 0 says it -> all leave, within seconds
    rank 0 is gone   -> the watches' connections break -> all leave
    torchrun dies    -> its ranks have another parent -> they leave: nobody would ever end them, and a new job begins

Nothing here compares clocks of two machines.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError, HashStore, Store, TCPStore

from puna.base.console import PunaError, print_error

MEET = 300.0  # seconds in which all ranks must have come
LOOK = 1.0  # seconds between two looks at whether a rank has failed
UNWIND = 5.0  # seconds that a rank has to end by itself after another one failed
_LOST = (DistError, RuntimeError)  # what a store raises when its server is gone


class LostRank(PunaError):
    """A collective that failed here because of what another rank did, or did not do."""


@dataclass(frozen=True)
class Place:
    """A rank and its neighbours, as torchrun says in the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """Raises PunaError for an environment that is only half there."""
        if "WORLD_SIZE" not in environment:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in environment]
        if missing:
            raise PunaError(
                f"WORLD_SIZE is set, but {', '.join(missing)} not", "start with torchrun, or unset WORLD_SIZE"
            )
        return cls(*(int(environment[name]) for name in names[:4]))


class Meeting:
    """All ranks of a job. Leave it with `leave`; work inside `together`, so that one rank's failure ends all."""

    def __init__(self, place: Place | None = None, patience: float = MEET):
        self.place = Place.of(os.environ) if place is None else place
        self.store: Store = HashStore()
        self._spoken = threading.Lock()  # held by whoever tells this rank's person what went wrong
        self._leaving, self._heard = threading.Event(), threading.Event()
        self._failure = PunaError("")
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._watcher = threading.Thread(target=self._watch, name="puna-watch", daemon=True)
        self._neighbours: dict[int, int] = {}
        if self._torchrun:
            threading.Thread(target=self._watch_torchrun, name="puna-parent", daemon=True).start()
        if self.place.size > 1:
            self.store = self._meet(patience)
            self.store.set(f"process/{self.place.rank}", str(os.getpid()))
            self._watcher.start()

    def agree(self, name: str, value: str, hint: str) -> None:
        """Refuse, on every rank, to go on where ranks do not have the same `value`."""
        if self.place.size == 1:
            return
        if self.place.rank == 0:
            self.store.set(f"agree/{name}", value)
        elif (theirs := self.store.get(f"agree/{name}").decode()) != value:
            difference = f"{name} of rank {self.place.rank} differs from rank 0's: {_first_difference(theirs, value)}"
            self.store.set(f"differs/{name}", difference)
        self.barrier(f"agree/{name}/all")
        if self.store.check([f"differs/{name}"]):
            raise PunaError(self.store.get(f"differs/{name}").decode(), hint)

    def barrier(self, name: str, patience: float = MEET) -> None:
        """Return once every rank has called with this name; each name serves once."""
        here = self.store.add(f"barrier/{name}/here", 1)
        if here == self.place.size:
            self.store.set(f"barrier/{name}/go", "")
        try:
            self.store.wait([f"barrier/{name}/go"], timedelta(seconds=patience))
        except DistError as error:
            came = self.store.add(f"barrier/{name}/here", 0)
            raise PunaError(
                f"{came} of {self.place.size} ranks came to {name} within {patience:.0f} s",
                "look at the logs of the others: they died, hang, or were never started",
            ) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that all ranks do. What one of them raises, all hear of; rank 0 says it, once."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            own = isinstance(error, PunaError) and not isinstance(error, LostRank)
            if not own and (cause := self._told_by_another()) is not None:  # most likely another rank's doing
                raise cause from error
            self._fail(error if isinstance(error, PunaError) else PunaError(f"{type(error).__name__}: {error}"))
            raise

    def leave(self) -> None:
        """The orderly end: the store goes when every rank has left it."""
        self._leaving.set()
        if self.place.size == 1:
            return
        self._watcher.join()
        with suppress(*_LOST):
            self.store.set(f"left/{self.place.rank}", "")
            if self.store.add("left", 1) == self.place.size:
                self.store.set("all-left", "")
            if self.place.rank == 0:
                self.store.wait(["all-left"], timedelta(seconds=60))

    def _meet(self, patience: float) -> Store:
        place, host, port = self.place, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=patience)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self._port = port
            try:
                return TCPStore(host, port, place.size, place.rank == 0, timeout, wait_for_workers=False)
            except _LOST as error:
                what = "cannot serve at" if place.rank == 0 else "finds nobody at"
                raise PunaError(f"rank {place.rank} {what} {host}:{port}: {_first_line(error)}",
                                "check --master_addr and --master_port, and that rank 0 runs") from error  # fmt: skip
        try:  # it is there before any rank is
            agent = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=min(30.0, patience)))
        except _LOST as error:
            raise PunaError(
                f"torchrun does not answer at {host}:{port}: {_first_line(error)}",
                "look whether it has died, and whether this node can reach that address",
            ) from error
        agent.set_timeout(timeout)
        if place.rank == 0:
            store = TCPStore(host, 0, place.size, True, timeout, wait_for_workers=False)
            self._port = store.port
            agent.set("puna/store", str(self._port))
            return store
        deadline = time.monotonic() + patience
        while True:
            self._port = int(agent.get("puna/store"))
            try:
                socket.create_connection((host, self._port), 5.0).close()  # a store's client would ask for 5 s and more
                return self._connect(5.0, patience)
            except (OSError, *_LOST) as error:  # the address of a rank 0 that was restarted: the new one comes soon
                if time.monotonic() > deadline:
                    raise PunaError(f"rank 0 did not answer within {patience:.0f} s", "look at its log") from error
                self._leaving.wait(LOOK / 10)

    def _connect(self, wait: float, timeout: float) -> Store:
        store = TCPStore(os.environ["MASTER_ADDR"], self._port, is_master=False, timeout=timedelta(seconds=wait))
        store.set_timeout(timedelta(seconds=timeout))
        return store

    def _fail(self, error: PunaError) -> None:
        """Say it where a person looks: rank 0 for all, unless it cannot."""
        if self.place.size == 1 or error.told:
            return
        error.told = True
        mine = json.dumps([self.place.rank, error.message, error.hint])
        try:
            first = self.store.compare_set("failed", "", mine).decode() == mine
            if self.place.rank == 0:
                self._speak(error, self.store)
                self._wait_until_heard()
            elif first:  # where another rank was first, most likely with the same, that one waits
                self.store.wait(["told"], timedelta(seconds=UNWIND))
        except _LOST:
            print_error(_read_failure(mine.encode()))

    def _wait_until_heard(self) -> None:
        """The store ends with rank 0: the others read it first."""
        deadline = time.monotonic() + UNWIND
        while self.store.add("heard", 0) < self.place.size - 1 and time.monotonic() < deadline:
            self._leaving.wait(LOOK / 10)

    def _speak(self, failure: PunaError, store: Store) -> None:
        """Rank 0's first thread that hears of a failure says it, at once: torchrun may end this rank any moment."""
        if self.place.rank == 0 and self._spoken.acquire(blocking=False):
            print_error(failure)
            store.set("told", "")

    def _told_by_another(self) -> PunaError | None:
        """The failure that broke a collective here, if a rank has written one; a killed rank writes nothing."""
        return self._failure if self._heard.wait(3 * LOOK) else None

    def _watch(self) -> None:
        """Look once a second, on a connection of its own: a call that waits blocks all others of its connection.

        A thread that stands in torch while Python ends would abort the process, so this one mostly stands in Python.
        """
        try:
            store = self._connect(MEET, MEET)
            while not self._leaving.wait(LOOK):
                self._look_for_dead(store)
                if store.check(["failed"]):
                    self._failure = _read_failure(store.get("failed"))
                    self._heard.set()  # the main thread finds it as the reason why its collective broke
                    self._speak(self._failure, store)
                    store.add("heard", int(self.place.rank != 0))
                    break
        except _LOST:
            self._failure = LostRank(f"rank {self.place.rank} lost the connection to rank 0", "rank 0's log says why")
            self._failure.told = self.place.local_rank != 0
            self._heard.set()
        if self._heard.is_set() and not self._leaving.wait(UNWIND):
            if not self._failure.told:
                print_error(self._failure)
            os._exit(2)  # the main thread is stuck in a collective without its partner

    def _look_for_dead(self, store: Store) -> None:
        """A killed rank writes nothing, and who waits for it outside of a collective would wait long."""
        first = self.place.rank - self.place.local_rank
        for rank in range(first, first + self.place.local_size) if self._torchrun else ():
            if rank not in self._neighbours and store.check([f"process/{rank}"]):
                self._neighbours[rank] = int(store.get(f"process/{rank}"))
            if not _exists(self._neighbours.get(rank, 0)) and not store.check([f"left/{rank}"]):
                hint = "torchrun names the signal below; SIGKILL is often the kernel, out of memory (see dmesg)"
                store.compare_set("failed", "", json.dumps([rank, "its process is gone", hint]))

    def _watch_torchrun(self) -> None:
        """End at once without it: while this rank still writes a save, the job that takes its place may begin one."""
        while not self._leaving.wait(LOOK):
            if os.getppid() != self._torchrun:
                if self.place.local_rank == 0:
                    print_error(
                        PunaError("torchrun has died, and its ranks end with it", "start the same command again")
                    )
                os._exit(2)


def _exists(process: int) -> bool:
    """Of this machine; 0 stands for one not known yet."""
    with suppress(PermissionError):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _read_failure(raw: bytes) -> PunaError:
    rank, message, hint = json.loads(raw)
    failure = PunaError(f"rank {rank}: {message}" if rank else message, hint)
    failure.told = True  # by rank 0, or by the rank itself
    return failure


def _first_difference(theirs: str, mine: str) -> str:
    """Of two flat JSON objects, the first key that differs, with both values; of other texts, both."""
    try:
        a, b = json.loads(theirs), json.loads(mine)
        key = next(key for key in {**a, **b} if a.get(key) != b.get(key))
        return f"{key} {b.get(key)} instead of {a.get(key)}"
    except (ValueError, StopIteration, AttributeError):
        return f"{mine[:80]!r} instead of {theirs[:80]!r}"
