"""What a connection to one of the servers may cost, and what its process may write to its log.

uvicorn waits for ever for a request's headers and body, and keeps as many connections open as
there are descriptors.
"""

import io
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 200  # a process may have 256 files open on macOS, 1,024 on Linux
REQUEST_TIMEOUT = 20  # seconds for the headers of a request, from the connection or the first byte
STALLED = 30  # seconds without a byte of a body, or with an answer that is not taken
MOST_LOGGED = 5_000_000  # bytes of log.txt; one older file is kept


class Connection(H11Protocol):
    """A connection that is closed when its client keeps it waiting.

    An upload goes on for as long as it moves. When there are too many connections, that one is
    closed which has waited longest for a request.
    """

    def connection_made(self, transport) -> None:
        """Start to watch it, in the place of another one if there are too many."""
        self.transport = transport
        if len(self.connections) >= MOST_CONNECTIONS:
            waiting = [each for each in self.connections if not each.is_busy]
            oldest = min(waiting, key=lambda each: each.since, default=None)
            self.connections.discard(oldest)
            (oldest or self).transport.abort()
        super().connection_made(transport)
        self.since, self._begun, self._blocked = self.loop.time(), False, None
        self._watch()

    @property
    def is_busy(self) -> bool:
        """Whether there is a request that is not answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Note that something came."""
        cycle = self.cycle
        if self.is_busy or not self._begun:
            self.since, self._begun = self.loop.time(), True
        super().data_received(data)
        if self.cycle is not cycle:
            self._begun = False

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.since, self._begun = self.loop.time(), False
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Note since when the client takes no answer."""
        self._blocked = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that it takes it again."""
        self._blocked = None
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop to watch it."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        now = self.loop.time()
        if self.flow.read_paused:
            self.since = now  # The server is not ready for more.
        limit, since = REQUEST_TIMEOUT, self.since
        if self.is_busy:
            limit, since = STALLED, self.since if self.cycle.more_body else self._blocked
        if since is not None and now - since > limit:
            self.transport.abort()
        self._timer = self.loop.call_later(1, self._watch)


class RotatingStream(io.TextIOBase):
    """What a process prints, written into a file that is set aside when it is large."""

    def __init__(self, path: Path):
        self._file = RotatingFileHandler(path, maxBytes=MOST_LOGGED, backupCount=1)
        self._file.terminator = ""
        # A full disk is no reason to stop, and there is nowhere to say it.
        self._file.handleError = lambda record: None

    def write(self, text: str) -> int:
        """Write a text as it is."""
        self._file.handle(logging.makeLogRecord({"msg": text}))
        return len(text)
