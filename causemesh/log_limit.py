"""Libraries that say the same thing hundreds of times a second are counted instead.

While a broker is away its client logs every attempt of every connection. What matters is that it
began, that it goes on, and how often.
"""

from __future__ import annotations

import copy
import logging
import threading
from dataclasses import dataclass

Site = tuple[str, int, str, int]
"""A logger's name, the level, and the file and line that logged."""


@dataclass
class _Window:
    shown: int
    held: int
    last: logging.LogRecord


class RepeatLimit(logging.Handler):
    """Passes on the first `first` lines of each place in the code, then one every `every_s` seconds
    that is the last of them and says how many there were. A place that was silent for so long
    begins anew. Nothing is lost uncounted: closing says what was held.
    """

    def __init__(self, to: logging.Handler, *, first: int = 3, every_s: float = 10.0) -> None:
        super().__init__()
        self._to = to
        self._first = first
        self._every_s = every_s
        self._windows: dict[Site, _Window] = {}
        self._timers: dict[Site, threading.Timer] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the handler's lock held."""
        site = (record.name, record.levelno, record.pathname, record.lineno)
        window = self._windows.get(site)
        if window is None:
            window = self._windows[site] = _Window(0, 0, record)
            self._set_timer(site)
        if window.shown < self._first:
            window.shown += 1
            self._to.handle(record)
        else:
            window.held += 1
            window.last = record

    def _set_timer(self, site: Site) -> None:
        timer = threading.Timer(self._every_s, self._over, [site])
        timer.daemon = True
        timer.start()
        self._timers[site] = timer

    def _over(self, site: Site) -> None:
        """A window's time is over."""
        self.acquire()
        try:
            window = self._windows.get(site)
            if window is None:  # closed meanwhile
                return
            if window.held:
                self._summarise(window)
                self._set_timer(site)
            else:
                del self._windows[site], self._timers[site]
        finally:
            self.release()

    def _summarise(self, window: _Window) -> None:
        told = copy.copy(window.last)
        told.msg = f"{told.getMessage()} (the last of {window.held} such lines that were held back)"
        told.args = None
        window.held = 0
        self._to.handle(told)

    def close(self) -> None:
        """Say what is held, and close the handler behind."""
        self.acquire()
        try:
            for timer in self._timers.values():
                timer.cancel()
            for window in self._windows.values():
                if window.held:
                    self._summarise(window)
            self._windows.clear()
            self._timers.clear()
        finally:
            self.release()
        self._to.close()
        super().close()
