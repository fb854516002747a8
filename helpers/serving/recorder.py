"""Writing what production was asked and answered, beside the answering."""

import json
import logging
import os
import queue
import sqlite3
import threading
import time
import zlib
from collections.abc import Sequence
from contextlib import closing, suppress
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.serving.scored_rows import TIMEOUT, is_damage, open_file, row_ids

MOST_ROWS = 200_000  # rows kept; some 10 bytes per number, compressed
MOST_WAITING = 1_000  # requests that wait to be written; more are counted, not kept
LOOK = 30.0  # seconds without a request until the recorder looks after its file
SLICE = 1_000  # values that become JSON at once; other threads get their turn in between
MAGIC = b"SQLite format 3\0"  # how a file of SQLite begins

log = logging.getLogger("serving")


def _check(path: Path) -> None:
    """Raise sqlite3.DatabaseError if a page of the file is damaged."""
    with closing(sqlite3.connect(path, timeout=TIMEOUT)) as connection:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(found)


class Recorder:
    """Writes scored requests from a thread of its own, so that no client waits for the disk.

    A file that is damaged is set aside, whole, and recording goes on in a new one.

    Parameters
    ----------
    most_rows : int
        When there are more, the oldest requests go. So many wait to be written, too.

    Attributes
    ----------
    dropped : int
        Requests that were not kept: too large, too many waited, or the disk was full.
    """

    def __init__(self, path: Path, most_rows: int = MOST_ROWS):
        self.path, self.most_rows, self.dropped = path, most_rows, 0
        self._set_aside, self._faults = None, {}
        self._connection, self._file, self._kept = None, None, 0
        self._queue, self._waiting = queue.Queue(MOST_WAITING), 0
        self._counting, self._using = threading.Lock(), threading.Lock()
        # Made here, before anyone reads: two that make a file at once lock each other out.
        self._try(self._ready)
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def write(
        self,
        request_id: str,
        model,
        rows: pd.DataFrame,
        predictions: list,
        probabilities: Sequence[Sequence[float]],
    ) -> None:
        """Keep a request.

        Parameters
        ----------
        model : helpers.serving.models.LoadedModel
            That answered.
        rows : pandas.DataFrame, shape (n_rows, n_columns)
            The columns that the model knows.
        predictions : list, shape (n_rows,)
        probabilities : array-like, shape (n_rows, n_classes)
        """
        with self._counting:
            if self._waiting + len(rows) > self.most_rows or self._queue.full():
                self.dropped += 1
                return
            self._waiting += len(rows)
        self._queue.put((request_id, time.time(), model, rows, predictions, probabilities))

    def state(self) -> str:
        """Look after the file now; return ``ok``, or what is wrong or was set aside."""
        self._try(self._look)
        return next(iter([*self._faults.values()]), None) or self._set_aside or "ok"

    def close(self) -> None:
        """Write what waits and end the thread."""
        self._queue.put(None)
        self._thread.join()
        self._close()

    def _work(self) -> None:
        self._try(self._look)
        while True:
            try:
                request = self._queue.get(timeout=LOOK)
            except queue.Empty:
                self._try(self._look)
                continue
            if request is None:
                return
            if not self._try(self._insert, *request):
                self.dropped += 1
            with self._counting:
                self._waiting -= len(request[3])

    def _try(self, action, *arguments) -> bool:
        """Do something with the file; tell whether it was done, if need be in a new file."""
        writing = action == self._insert
        with self._using:
            for attempt in range(2):
                try:
                    action(*arguments)
                except (sqlite3.Error, OSError) as error:
                    # A full disk, for example: answering goes on.
                    fault = f"Requests are not recorded: {self.path}: {error}"
                    if attempt or not is_damage(error) or not self._move(error):
                        self._faults[writing] = fault
                        log.error("%s", fault)
                        return False
                else:
                    # What can be read can still be on a full disk.
                    self._faults.pop(writing, None)
                    return True
        return False

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _ready(self) -> None:
        """Open the file if it is not, or if another one or none lies in its place."""
        if self._connection is not None:
            with suppress(FileNotFoundError):
                if os.path.samestat(self.path.stat(), os.fstat(self._file)):
                    os.lseek(self._file, 0, os.SEEK_SET)
                    if os.read(self._file, len(MAGIC)) != MAGIC:
                        raise sqlite3.DatabaseError("file is not a database")
                    return
        self._close()
        self._connection = open_file(self.path)
        # Stays open as long as the connection: a file that is closed loses the locks that SQLite
        # has on it in this process.
        self._file = os.open(self.path, os.O_RDONLY)
        query = "SELECT total(n_rows) FROM requests"
        (self._kept,) = self._connection.execute(query).fetchone()

    def _look(self) -> None:
        self._ready()
        _check(self.path)

    def _move(self, error: sqlite3.Error) -> bool:
        """Set the file aside with what SQLite keeps beside it; tell whether that worked."""
        now = datetime.now(timezone.utc)
        aside = self.path.with_name(f"{self.path.stem}.damaged-{now:%Y%m%d-%H%M%S-%f}.db")
        try:
            for ending in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    Path(f"{self.path}{ending}").rename(f"{aside}{ending}")
            self._close()
        except (sqlite3.Error, OSError):
            return False
        self._set_aside = (
            f"{self.path.name} was damaged ({error}) and is now {aside.name}; recording goes on "
            "in a new file, without the rows and labels before."
        )
        log.error("%s", self._set_aside)
        return True

    def _insert(self, request_id, when, model, rows, predictions, probabilities) -> None:
        self._ready()
        names = [f"probability_{label}" for label in model.labels]
        by_class = dict(zip(names, np.asarray(probabilities).T.tolist(), strict=True))
        parts = {
            "rows": {name: rows[name].tolist() for name in rows.columns},
            "answer": {"prediction": predictions, **by_class},
        }
        values = (request_id, when, model.name, model.version, len(rows), _packed(parts))
        with self._connection as connection:
            connection.execute("INSERT INTO requests VALUES (?,?,?,?,?,?)", values)
            kept = self._kept + len(rows)
            while kept > self.most_rows:
                kept -= _delete_oldest(connection)
        self._kept = kept


def _packed(tables: dict[str, dict[str, list]]) -> bytes:
    """Return lists by column by table as JSON, compressed."""
    packer, packed = zlib.compressobj(level=1), []
    for opening, (title, table) in zip("{,", tables.items(), strict=True):
        packed.append(packer.compress(f"{opening} {json.dumps(title)}: {{".encode()))
        for number, (name, values) in enumerate(table.items()):
            comma = ", " * bool(number)
            packed.append(packer.compress(f"{comma}{json.dumps(name)}: [".encode()))
            for start in range(0, len(values), SLICE):
                text = ", " * bool(start) + json.dumps(values[start : start + SLICE])[1:-1]
                packed.append(packer.compress(text.encode()))
            packed.append(packer.compress(b"]"))
        packed.append(packer.compress(b"}"))
    return b"".join([*packed, packer.compress(b"}"), packer.flush()])


def _delete_oldest(connection: sqlite3.Connection) -> int:
    """Delete the oldest request and its labels; return its number of rows."""
    # The order of writing needs no index.
    query = "SELECT id, n_rows FROM requests ORDER BY rowid LIMIT 1"
    request_id, n_rows = connection.execute(query).fetchone()
    connection.execute("DELETE FROM requests WHERE id = ?", (request_id,))
    ids = [(each,) for each in row_ids(request_id, n_rows)]
    connection.executemany("DELETE FROM labels WHERE id = ?", ids)
    return n_rows
