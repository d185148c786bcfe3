"""What a run does when it is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import jax

# Seconds after a signal in which the main thread can leave by itself, and in which a signal that comes twice is one.
GRACE = 5.0


POLL = 0.2


class Signals:
    """Notes SIGTERM and SIGINT so that the loop can save first; a second SIGINT interrupts at once.

    Python runs handlers in the main thread between two bytecodes: a signal would wait for the end of a compilation. In a process
    of the run's own a thread sees it when it comes, and ends the process where that loses nothing: when all steps are saved and
    the main thread has not left by itself for `GRACE` seconds, as it would between two steps. The same signal again after these
    ends it at once.

    Attributes:
      received: the signal that the loop should leave after, or 0.
      unsaved: whether there are steps that no checkpoint has; the loop says so.
      saving: whether a checkpoint is being written in the background.
    """

    def __init__(self, saving: Callable[[], bool], own_process: bool):
        self.received, self.unsaved, self.saving, self.own_process = 0, False, saving, own_process

    def __enter__(self):
        self.old, self.over = {}, threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.old[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread, where Python allows no handlers
                return self
        if not self.own_process:
            return self
        self.seen, written = socket.socketpair()
        written.setblocking(False)
        self.written, self.old_written = written, signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self

    def _note(self, number, frame):
        del frame
        if self.received == signal.SIGINT == number and not self.own_process:
            raise KeyboardInterrupt
        self.received = number

    def _watch(self) -> None:
        """Waits for the first signal, then for a moment at which to leave."""
        self.seen.settimeout(POLL)
        number, at = 0, 0.0
        while not self.over.is_set():
            try:
                came = self.seen.recv(64)
            except TimeoutError:
                came = b""
            came = [byte for byte in came if byte in self.old]
            now = time.monotonic()
            # While Orbax runs its event loop in the main thread signals are told to that: the handler has noted this one.
            if first := not number and (came[0] if came else self.received):
                number, at = first, now
            elif number and now - at > GRACE:
                if came:
                    _leave(
                        number, "Ended at once by a second signal; the same command continues from the last checkpoint."
                    )
                # One process of several would leave the others waiting.
                if jax.process_count() == 1 and not self.unsaved and not self.saving():
                    _leave(number, "Ended by a signal, with all steps saved; the same command continues.")

    def __exit__(self, *error):
        if self.over.is_set():
            return
        self.over.set()
        if self.own_process and len(self.old) == 2:
            self.watcher.join()
            signal.set_wakeup_fd(self.old_written)
            self.seen.close()
            self.written.close()
        for number, handler in self.old.items():
            signal.signal(number, handler)


def _leave(number: int, sentence: str) -> NoReturn:
    """Ends the process where it is, as `kill -9` would, and says so."""
    print(f"\n{sentence}", file=sys.stderr, flush=True)
    os._exit(128 + number)
