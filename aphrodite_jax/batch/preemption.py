"""SIGTERM and the first Ctrl-C: rows that run come to their end, nothing new begins, and the process leaves in time."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["Preemption"]

LEAVES_WITHIN = 29.0
"""Seconds from the signal to the end of the process, whatever it is at: machines are taken away after 30."""


class Preemption:
    """Takes signals while it is entered; to be made in the main thread.

    Before rows run, and at a second signal, SIGTERM raises `SystemExit` and Ctrl-C `KeyboardInterrupt`. A program that
    compiles or runs can hold that up, as can what Python and JAX wait for at their end, and so a thread ends the
    process after ``leaves_within`` seconds: answers are in journals at any moment.
    """

    def __init__(self, leaves_within: float = LEAVES_WITHIN):
        self._leaves_within = leaves_within
        self._is_set = threading.Event()
        self._is_running = False
        self._signal = 0

    @property
    def status(self) -> int:
        """Exit status of the signal that came."""
        return 128 + self._signal

    def is_set(self) -> bool:
        """Whether a signal came."""
        return self._is_set.is_set()

    @contextlib.contextmanager
    def rows_run(self) -> Iterator[None]:
        """While this is entered the first signal only sets `is_set`."""
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False

    def __enter__(self) -> "Preemption":
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        self._old_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="preemption", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._write.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self._signal = not self._is_set.is_set(), number
        self._is_set.set()
        if first and self._is_running:
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(self.status)

    def _watch(self) -> None:
        """Read the numbers of signals as they come, which Python's own handlers may do late, until it is left."""
        armed = False
        with self._read:
            while data := self._read.recv(1):
                if not armed and data[0] in (signal.SIGTERM, signal.SIGINT):
                    armed = True
                    timer = threading.Timer(self._leaves_within, os._exit, [128 + data[0]])
                    timer.daemon = True
                    timer.start()  # and is never taken back: the process is to end
