"""Being asked to stop: by a person at the keyboard, or by a scheduler that wants the machine back."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any

from puna.base.console import say


class Interrupt:
    """Ctrl-C and SIGTERM finish the current step, save and return; a second Ctrl-C stops at once.

    After SIGTERM that may take `grace` seconds (0: any time): schedulers kill what has not ended by then, and a rank
    whose neighbour is dead may wait for it inside a collective, where no Python of the main thread runs. So a thread
    hears of signals, too, by way of `signal.set_wakeup_fd`.
    """

    def __init__(self, grace: float = 0.0):
        self.seen = False
        self._grace = grace
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        try:
            self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the embedding program handles its own signals
            return self
        self._bell, listener = socket.socketpair()
        self._bell.setblocking(False)
        self._bell_before = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(listener,), name="puna-signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._bell_before)
        self._bell.close()  # with it ends the thread

    def _catch(self, number: int, _: object) -> None:
        self.seen = True

    def _listen(self, listener: socket.socket) -> None:
        deadline, keyboard = 0.0, 0
        with listener:
            while True:
                try:
                    listener.settimeout(max(0.001, deadline - time.monotonic()) if deadline else None)
                    heard = listener.recv(1)
                except TimeoutError:
                    self._give_up()
                if not heard:
                    return
                keyboard += heard[0] == signal.SIGINT
                if keyboard > 1:
                    os._exit(130)
                if heard[0] == signal.SIGTERM and self._grace and not deadline:
                    deadline = time.monotonic() + self._grace
                say("stopping after this step and saving (Ctrl-C again to stop at once)")

    def _give_up(self) -> None:
        say(f"not done {self._grace:g} s after SIGTERM: ending without this save; the one before it is whole")
        os._exit(143)
