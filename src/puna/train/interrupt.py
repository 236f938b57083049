"""Being asked to stop: by a person at the keyboard, or by a scheduler that wants the machine back."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from puna.base.console import say


class Interrupt:
    """Ctrl-C and SIGTERM finish the current step, save and return; a second Ctrl-C stops at once.

    After SIGTERM that may take `grace` seconds (0: any time): schedulers kill what has not ended by then, and a rank
    whose neighbour is dead may wait for it inside a collective, where no Python runs.
    """

    def __init__(self, grace: float = 0.0):
        self.seen = False
        self._grace = grace
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Interrupt:
        try:
            self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the embedding program handles its own signals
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _: object) -> None:
        if self.seen and number == signal.SIGINT:
            os._exit(130)
        if number == signal.SIGTERM and self._grace and not self.seen:
            self._timer = threading.Timer(self._grace, self._give_up)
            self._timer.daemon = True
            self._timer.start()
        self.seen = True
        say("stopping after this step and saving (Ctrl-C again to stop at once)")

    def _give_up(self) -> None:
        say(f"not done {self._grace:g} s after SIGTERM: ending without this save; the one before it is whole")
        os._exit(143)
