"""Work on the latest request only, on one thread, and use idle time ahead of need."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable
from typing import Any

IDLE_SECONDS = 0.15
"""Pause after the last request before the worker looks for work ahead of need."""


class LatestWins:
    """Runs ``work(item)`` for the newest item asked for; older ones are dropped.

    A slider asks faster than a network answers. There is no queue: a request replaces
    the one still waiting. ``done(item, outcome)`` is told the result, or the exception,
    of everything that ran.

    Args:
        work: Called with an item, on the worker thread.
        done: Called after it with the item and the result or the exception.
        ahead: Called when idle; returns an item worth preparing, or None.
        background: False runs ``work`` and ``done`` inside :meth:`request` and
            prepares nothing ahead.
    """

    def __init__(
        self,
        work: Callable[[Hashable], Any],
        done: Callable[[Hashable, Any], None],
        ahead: Callable[[], Hashable | None] = lambda: None,
        *,
        background: bool = True,
    ) -> None:
        """Keep the callables; the thread starts with the first request."""
        self._work, self._done, self._ahead = work, done, ahead
        self._background = background
        self._changed = threading.Condition()
        self._wanted: Hashable | None = None
        self._running: Hashable | None = None
        self._may_prepare = True
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def request(self, item: Hashable) -> None:
        """Ask for ``item`` instead of whatever is still waiting; never blocks.

        Args:
            item: Anything hashable except None. After :meth:`close` it is ignored.
        """
        if self._background:
            self._wake(item)
        elif not self._closed:
            self._run(item)

    def wake(self) -> None:
        """Drop the waiting request and look for work ahead of need."""
        if self._background:
            self._wake(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until no request is waiting or running.

        Args:
            timeout: Seconds; None waits without limit.

        Returns:
            Whether that was reached in time.
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: (
                    self._closed or (self._wanted is None and self._running is None)
                ),
                timeout,
            )

    def close(self, timeout: float = 10.0) -> None:
        """Stop the thread after the item it is working on; may be called again.

        Args:
            timeout: Seconds to wait for the thread to end. It is a daemon thread and
                ends with the process in any case.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # Garbage collection can call this on the worker thread itself.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _wake(self, item: Hashable | None) -> None:
        with self._changed:
            if self._closed:
                return
            self._wanted, self._may_prepare = item, True
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._loop, name="cpnb-latest-wins", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def _loop(self) -> None:
        while True:
            with self._changed:
                # Woken without a request: something moved, so the pause begins anew.
                while self._wanted is None and not self._closed:
                    if not self._changed.wait(self._pause()):
                        break
                if self._closed:
                    return
                item, self._wanted = self._wanted, None
                self._running = item
                idle = item is None
                if idle and not self._may_prepare:
                    continue
                # Claimed before looking, so that a wake-up meanwhile is not lost.
                self._may_prepare = not idle
            # The condition is released here: ahead, work and done take other locks.
            try:
                if not idle or (item := self._ahead()) is not None:
                    self._run(item)
                    self._may_prepare = True
            except Exception:  # of done or ahead: said as any thread's, and gone on
                seen = (*sys.exc_info(), threading.current_thread())
                threading.excepthook(threading.ExceptHookArgs(seen))
            finally:
                with self._changed:
                    self._running = None
                    self._changed.notify_all()

    def _pause(self) -> float | None:
        return IDLE_SECONDS if self._may_prepare else None

    def _run(self, item: Hashable) -> None:
        try:
            outcome = self._work(item)
        except Exception as error:  # shown by done; a thread has nobody to raise to
            outcome = error
        if not self._closed:
            self._done(item, outcome)
