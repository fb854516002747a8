"""What production was asked and answered, and the labels that arrive later: a SQLite file.

The scoring server writes here (`Recorder`), `helpers.monitoring` reads. Of a request only the
columns that the model knows are kept, no address and no user; names that clients send along in
other columns are not. The oldest rows go when there are too many.
"""

import json
import os
import queue
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pandas as pd

MOST_ROWS = 200_000  # rows kept; some 10 bytes per number, compressed
MOST_WAITING = 1_000  # requests that wait to be written; more are counted, not kept
TIMEOUT = 30  # seconds to wait for another process that writes

SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, time REAL NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL,
    n_rows INTEGER NOT NULL, content BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS requests_by_time ON requests (model, version, time);
CREATE TABLE IF NOT EXISTS labels (
    id TEXT PRIMARY KEY, time REAL NOT NULL, label TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS alerts (
    model TEXT, version TEXT, metric TEXT, period TEXT, time REAL NOT NULL, value REAL,
    threshold REAL, message TEXT NOT NULL, PRIMARY KEY (model, version, metric, period));
"""


def _open(path: Path) -> sqlite3.Connection:
    # Rows may be about persons: only the owner may read them.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(path, timeout=TIMEOUT, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    # A process that is killed loses nothing; a machine without power, the last moments.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.executescript(SCHEMA)
    return connection


@contextmanager
def connect(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the file, made if missing; commit at the end of the block."""
    with closing(_open(path)) as connection, connection:
        yield connection


def row_ids(request_id: str, n_rows: int) -> list[str]:
    """Return the id of each row of a request: the request's and the position from 0."""
    return [f"{request_id}-{number}" for number in range(n_rows)]


class Recorder:
    """Writes scored requests from a thread of its own, so that no client waits for the disk.

    Parameters
    ----------
    most_rows : int
        When there are more, the oldest requests go.

    Attributes
    ----------
    dropped : int
        Requests that were not kept: too many waited, or the disk was full.
    """

    def __init__(self, path: Path, most_rows: int = MOST_ROWS):
        self.path, self.most_rows, self.dropped = path, most_rows, 0
        self._queue = queue.Queue(MOST_WAITING)
        # Made here, before anyone reads: two that make a file at once lock each other out.
        self._connection = _open(path)
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def write(
        self,
        request_id: str,
        model,
        rows: pd.DataFrame,
        predictions: list,
        probabilities: list[list[float]],
    ) -> None:
        """Keep a request.

        Parameters
        ----------
        model : helpers.serving.models.LoadedModel
            That answered.
        rows : pandas.DataFrame, shape (n_rows, n_columns)
            The columns that the model knows.
        predictions : list, shape (n_rows,)
        probabilities : list of list of float, shape (n_rows, n_classes)
        """
        try:
            self._queue.put_nowait(
                (request_id, time.time(), model, rows, predictions, probabilities)
            )
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what waits and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        with closing(self._connection) as connection:
            (kept,) = connection.execute("SELECT total(n_rows) FROM requests").fetchone()
            for request in iter(self._queue.get, None):
                try:
                    with connection:
                        now_kept = kept + _insert(connection, *request)
                        while now_kept > self.most_rows:
                            now_kept -= _delete_oldest(connection)
                    kept = now_kept
                except sqlite3.Error:
                    # A full disk, for example: answering goes on.
                    self.dropped += 1


def _insert(connection, request_id, when, model, rows, predictions, probabilities) -> int:
    """Write a request; return its number of rows."""
    names = [f"probability_{label}" for label in model.labels]
    by_class = map(list, zip(*probabilities, strict=True))
    content = {
        "rows": {name: rows[name].tolist() for name in rows.columns},
        "answer": {"prediction": predictions, **dict(zip(names, by_class, strict=True))},
    }
    blob = zlib.compress(json.dumps(content).encode(), level=1)
    values = (request_id, when, model.name, model.version, len(rows), blob)
    connection.execute("INSERT INTO requests VALUES (?,?,?,?,?,?)", values)
    return len(rows)


def _delete_oldest(connection: sqlite3.Connection) -> int:
    """Delete the oldest request and its labels; return its number of rows."""
    # The order of writing needs no index.
    query = "SELECT id, n_rows FROM requests ORDER BY rowid LIMIT 1"
    request_id, n_rows = connection.execute(query).fetchone()
    connection.execute("DELETE FROM requests WHERE id = ?", (request_id,))
    ids = [(each,) for each in row_ids(request_id, n_rows)]
    connection.executemany("DELETE FROM labels WHERE id = ?", ids)
    return n_rows


# --- reading ----------------------------------------------------------------------------------


def read_rows(path: Path, model: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return scored rows with their answers and labels, the oldest first.

    Returns
    -------
    rows : pandas.DataFrame
        The model's columns; index: the ids of the rows.
    answers : pandas.DataFrame
        Same index; ``time`` (UTC), ``version``, ``prediction``, ``probability_<label>`` and
        ``label`` (None where not known yet).
    """
    query = "SELECT id, time, version, n_rows, content FROM requests WHERE model = ? ORDER BY time"
    with connect(path) as connection:
        found = connection.execute(query, (model,)).fetchall()
        labels = {
            row_id: json.loads(label)
            for row_id, label in connection.execute("SELECT id, label FROM labels")
        }
    if not found:
        return pd.DataFrame(), pd.DataFrame()
    rows, answers = [], []
    for request_id, when, version, n_rows, blob in found:
        content, ids = json.loads(zlib.decompress(blob)), row_ids(request_id, n_rows)
        rows.append(pd.DataFrame(content["rows"], index=ids))
        known = pd.Series([labels.get(each) for each in ids], ids, object)
        answer = pd.DataFrame(content["answer"], index=ids)
        answers.append(answer.assign(time=when, version=version, label=known))
    table = pd.concat(answers)
    table["time"] = pd.to_datetime(table["time"], unit="s", utc=True)
    return pd.concat(rows), table


def write_labels(path: Path, labels: dict) -> None:
    """Keep labels (as in the CSV) by id of the row; a later one replaces the earlier."""
    now = time.time()
    rows = [(name, now, json.dumps(label)) for name, label in labels.items()]
    with connect(path) as connection:
        connection.executemany("INSERT OR REPLACE INTO labels VALUES (?,?,?)", rows)


def known_rows(path: Path, ids: Iterable[str]) -> set[str]:
    """Return those of some ids that belong to scored rows that are still kept."""
    with connect(path) as connection:
        sizes = dict(connection.execute("SELECT id, n_rows FROM requests"))
    known = set()
    for name in ids:
        request_id, _, number = str(name).rpartition("-")
        if number.isdecimal() and int(number) < sizes.get(request_id, 0):
            known.add(name)
    return known


def is_known(path: Path, model: str, version: str) -> bool:
    """Tell whether rows are kept that this version answered."""
    query = "SELECT 1 FROM requests WHERE model = ? AND version = ? LIMIT 1"
    with connect(path) as connection:
        return connection.execute(query, (model, version)).fetchone() is not None


def wait_for(path: Path, row_id: str, seconds: float = 30.0) -> bool:
    """Wait until a row that was just scored is written; tell whether it is there."""
    end = time.monotonic() + seconds
    while not known_rows(path, [row_id]):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
