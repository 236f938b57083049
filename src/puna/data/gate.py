"""Where ranks wait for each other's data: outside of collectives, whose time-outs are for broken networks.

A rank that reads from slow storage would otherwise let all others wait inside an all-reduce, until its time-out tears
the whole job down (torchtitan #3338). Here each rank says when its batch is there; the last one opens the gate.
"""

from __future__ import annotations

import time
from datetime import timedelta

from torch.distributed import DistStoreError, Store

from puna.base.console import PunaError, say

_FAILED = "failed: "


class StoreGate:
    """A gate for `world` ranks on the job's key-value store (torchrun's). Costs one round trip or two a step.

    `patience`: seconds after which a rank gives up. `report`: seconds between lines about the wait.
    """

    def __init__(self, store: Store, world: int, patience: float = 3600.0, report: float = 30.0):
        self._store, self._world, self._patience, self._report = store, world, patience, report

    def __call__(self, step: int) -> None:
        """Return once every rank has called with this step. Raises PunaError if one failed or none came in time."""
        if self._store.add(f"data/here/{step}", 1) == self._world:
            self._store.set(f"data/go/{step}", "")
            self._store.delete_key(f"data/here/{step - 1}")  # all have left the gate of the step before
            self._store.delete_key(f"data/go/{step - 1}")
        else:
            self._wait(step)
        opened = self._store.get(f"data/go/{step}").decode()
        if opened.startswith(_FAILED):
            raise PunaError(
                f"another rank has no data for step {step}: {opened.removeprefix(_FAILED)}",
                "this rank has stopped with it; the same command continues from the last save",
            )

    def fail(self, step: int, reason: str) -> None:
        """Tell the others that this rank will not come, so that they stop now and with the reason."""
        self._store.set(f"data/go/{step}", _FAILED + reason)

    def _wait(self, step: int) -> None:
        started = time.monotonic()
        while True:
            try:
                self._store.wait([f"data/go/{step}"], timedelta(seconds=min(self._report, self._patience)))
                return
            except DistStoreError as error:
                waited = time.monotonic() - started
                missing = self._world - self._store.add(f"data/here/{step}", 0)
                if waited >= self._patience:
                    raise PunaError(
                        f"{missing} of {self._world} ranks have no data for step {step} after {waited:.0f} s",
                        "look at their logs for the storage they read from",
                    ) from error
                say(f"step {step}: {waited:.0f} s so far, waiting for the data of {missing} of {self._world} ranks")
