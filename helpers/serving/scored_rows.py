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
from contextlib import closing, contextmanager

import pandas as pd

MOST_ROWS = 200_000  # rows kept; some 10 bytes per number, compressed
MOST_WAITING = 1_000  # requests that wait to be written; more are counted, not kept
GATHER = 0.05  # seconds in which requests are gathered and then written together
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


def _open(path):
    # Rows may be about persons: only the owner may read them.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(path, timeout=TIMEOUT)
    connection.execute("PRAGMA journal_mode = WAL")
    # A process that is killed loses nothing; a machine without power, the last moments.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.executescript(SCHEMA)
    return connection


@contextmanager
def connect(path):
    """Open the file, made if missing; commit at the end of the block.

    Parameters
    ----------
    path : pathlib.Path

    Yields
    ------
    sqlite3.Connection
    """
    with closing(_open(path)) as connection, connection:
        yield connection


def row_ids(request_id, n_rows):
    """Return the id of each row of a request: the request's and the position from 0."""
    return [f"{request_id}-{number}" for number in range(n_rows)]


class Recorder:
    """Writes scored requests from a thread of its own, so that no client waits for the disk.

    Parameters
    ----------
    path : pathlib.Path
    most_rows : int
        When there are more, the oldest requests go.
    """

    def __init__(self, path, most_rows=MOST_ROWS):
        self.path, self.most_rows, self.dropped = path, most_rows, 0
        self._queue = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def write(self, request_id, served, rows, predictions, probabilities):
        """Keep a request; where too many wait already, only count it in `dropped`.

        Parameters
        ----------
        request_id : str
        served : helpers.serving.app.Served
            That answered.
        rows : pandas.DataFrame, shape (n_rows, n_columns)
            The columns that the model knows.
        predictions : list, shape (n_rows,)
        probabilities : list of list of float, shape (n_rows, n_classes)
        """
        request = (request_id, time.time(), served, rows, predictions, probabilities)
        try:
            self._queue.put_nowait(request)
        except queue.Full:
            self.dropped += 1

    @property
    def alive(self):
        """Whether `close` was not called yet."""
        return self._thread.is_alive()

    def close(self):
        """Write what waits and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self):
        with closing(_open(self.path)) as connection:
            query = "SELECT coalesce(sum(n_rows), 0) FROM requests"
            self._rows = connection.execute(query).fetchone()[0]
            open_ = True
            while open_:
                batch = [self._queue.get()]
                # Together, many requests cost little more than one.
                time.sleep(GATHER if batch[0] is not None else 0)
                while not self._queue.empty():
                    batch.append(self._queue.get())
                open_ = None not in batch
                requests = [_packed(*each) for each in batch if each is not None]
                try:
                    self._store(connection, requests)
                except sqlite3.Error:
                    # A full disk, for example: answering goes on.
                    self.dropped += len(requests)

    def _store(self, connection, requests):
        with connection:
            connection.executemany("INSERT OR IGNORE INTO requests VALUES (?,?,?,?,?,?)", requests)
            self._rows += sum(request[4] for request in requests)
            if self._rows > self.most_rows:
                self._rows -= _make_room(connection, self._rows - self.most_rows)


def _packed(request_id, when, served, rows, predictions, probabilities):
    names = [f"probability_{label}" for label in served.labels]
    by_class = map(list, zip(*probabilities, strict=True))
    content = {
        "rows": {name: rows[name].tolist() for name in rows.columns},
        "answer": {"prediction": predictions, **dict(zip(names, by_class, strict=True))},
    }
    blob = zlib.compress(json.dumps(content).encode(), level=1)
    return request_id, when, served.name, served.version, len(rows), blob


def _make_room(connection, too_many):
    """Delete the oldest requests until so many rows are gone; return how many went."""
    gone, n_gone = [], 0
    for request_id, n_rows in connection.execute("SELECT id, n_rows FROM requests ORDER BY time"):
        if n_gone >= too_many:
            break
        gone.append((request_id,))
        n_gone += n_rows
    connection.executemany("DELETE FROM requests WHERE id = ?", gone)
    prefixes = [(f"{request_id}-%",) for (request_id,) in gone]
    connection.executemany("DELETE FROM labels WHERE id LIKE ?", prefixes)
    return n_gone


# --- reading ----------------------------------------------------------------------------------


def read_rows(path, model, version=None, since=0.0):
    """Return scored rows with their answers and labels, the oldest first.

    Parameters
    ----------
    path : pathlib.Path
    model : str
    version : str, optional
        Only those answered by this version.
    since : float
        Only those scored at or after this time, seconds since the epoch.

    Returns
    -------
    rows : pandas.DataFrame
        The model's columns; index: the ids of the rows.
    answers : pandas.DataFrame
        Same index; ``time`` (UTC), ``version``, ``prediction``, ``probability_<label>`` and
        ``label`` (None where not known yet).
    """
    if not path.is_file():
        return pd.DataFrame(), pd.DataFrame()
    query = "SELECT id, time, version, n_rows, content FROM requests WHERE model = ? AND time >= ?"
    values = [model, since]
    if version is not None:
        query, values = f"{query} AND version = ?", [*values, version]
    with connect(path) as connection:
        found = connection.execute(f"{query} ORDER BY time", values).fetchall()
        labels = dict(connection.execute("SELECT id, label FROM labels"))
    rows, answers = [], []
    for request_id, when, number, n_rows, blob in found:
        content = json.loads(zlib.decompress(blob))
        ids = row_ids(request_id, n_rows)
        rows.append(pd.DataFrame(content["rows"], index=ids))
        answer = pd.DataFrame(content["answer"], index=ids)
        known = [json.loads(labels[each]) if each in labels else None for each in ids]
        answers.append(
            answer.assign(time=when, version=number, label=pd.Series(known, ids, object))
        )
    if not rows:
        return pd.DataFrame(), pd.DataFrame()
    answer = pd.concat(answers)
    answer["time"] = pd.to_datetime(answer["time"], unit="s", utc=True)
    return pd.concat(rows), answer


def write_labels(path, labels):
    """Keep labels of scored rows; a label given again takes the place of the earlier one.

    Parameters
    ----------
    path : pathlib.Path
    labels : dict
        Label (as in the CSV) by id of the row.
    """
    now = time.time()
    rows = [(name, now, json.dumps(label)) for name, label in labels.items()]
    with connect(path) as connection:
        connection.executemany("INSERT OR REPLACE INTO labels VALUES (?,?,?)", rows)


def known_rows(path, ids):
    """Return those of some ids that belong to scored rows that are still kept.

    Parameters
    ----------
    path : pathlib.Path
    ids : sequence of str

    Returns
    -------
    set of str
    """
    if not path.is_file():
        return set()
    with connect(path) as connection:
        sizes = dict(connection.execute("SELECT id, n_rows FROM requests"))
    known = set()
    for name in ids:
        request_id, _, number = str(name).rpartition("-")
        if number.isdecimal() and int(number) < sizes.get(request_id, 0):
            known.add(name)
    return known


def is_known(path, model, version):
    """Tell whether rows are kept that this version answered."""
    if not path.is_file():
        return False
    query = "SELECT 1 FROM requests WHERE model = ? AND version = ? LIMIT 1"
    with connect(path) as connection:
        return connection.execute(query, (model, version)).fetchone() is not None


def wait_for(path, row_id, seconds=30.0):
    """Wait until a row that was just scored is written.

    Parameters
    ----------
    path : pathlib.Path
    row_id : str
    seconds : float
        At most.

    Returns
    -------
    bool
        Whether it is there.
    """
    end = time.monotonic() + seconds
    while not known_rows(path, [row_id]):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
