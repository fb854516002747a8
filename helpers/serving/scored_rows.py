"""What production was asked and answered, and the labels that arrive later: a SQLite file.

The scoring server writes here (`helpers.serving.recorder`), `helpers.monitoring` reads. Of a
request only the columns that the model knows are kept, no address and no user; names that clients
send along in other columns are not. The oldest rows go when there are too many. What was asked for
a demo is marked by its ids and never read together with the rest.
"""

import json
import os
import re
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from reprlib import repr as shortened

import pandas as pd

from helpers.workspace import ProjectError

TIMEOUT = 30  # seconds to wait for another process that writes
ROW_ID = re.compile(r"\S+-[0-9]{1,9}")
DEMO = "demo-"  # the ids of a demo start with it

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


class ScoredRowsError(ProjectError):
    """The file of scored rows cannot be used, or what is no id of a row was asked for."""


def is_damage(error: Exception) -> bool:
    """Tell whether an error of SQLite says that the file is damaged."""
    # What is wrong with the file itself has no class of its own, such as OperationalError.
    return type(error) is sqlite3.DatabaseError


def open_file(path: Path) -> sqlite3.Connection:
    """Open the file, made if missing."""
    # Rows may be about persons: only the owner may read them.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    connection = sqlite3.connect(path, timeout=TIMEOUT, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    # A process that is killed loses nothing; a machine without power, the last moments.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.executescript(SCHEMA)
    return connection


@contextmanager
def connect(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the file, made if missing; commit at the end of the block.

    Raises
    ------
    ScoredRowsError
        If it is damaged; says the way out.
    """
    try:
        with closing(open_file(path)) as connection, connection:
            yield connection
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        raise ScoredRowsError(
            f"{path} is damaged ({error}). Ask the scoring server for a prediction: it sets the "
            "file aside, whole, and goes on in a new one. Or put a copy in its place."
        ) from None


def row_ids(request_id: str, n_rows: int) -> list[str]:
    """Return the id of each row of a request: the request's and the position from 0."""
    return [f"{request_id}-{number}" for number in range(n_rows)]


# --- reading ----------------------------------------------------------------------------------


def read_rows(path: Path, model: str, demo: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return scored rows, real ones or those of a demo, with answers and labels, oldest first.

    Returns
    -------
    rows : pandas.DataFrame
        The model's columns; index: the ids of the rows.
    answers : pandas.DataFrame
        Same index; ``time`` (UTC), ``version``, ``prediction``, ``probability_<label>`` and
        ``label`` (None where not known yet).
    """
    query = (
        "SELECT id, time, version, n_rows, content FROM requests "
        "WHERE model = ? AND (id GLOB ?) = ? ORDER BY time"
    )
    with connect(path) as connection:
        found = connection.execute(query, (model, f"{DEMO}*", demo)).fetchall()
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
    """Return those of some ids that belong to scored rows that are still kept.

    Raises
    ------
    ScoredRowsError
        If one is no id of a row.
    """
    ids = list(ids)
    strange = next((name for name in ids if not ROW_ID.fullmatch(str(name))), None)
    if strange is not None:
        raise ScoredRowsError(
            f"{shortened(strange)} is no id of a scored row. An id is the X-Request-Id of the "
            "answer and the position of the row, from 0, joined by a hyphen."
        )
    with connect(path) as connection:
        sizes = dict(connection.execute("SELECT id, n_rows FROM requests"))
    known = set()
    for name in ids:
        request_id, _, number = str(name).rpartition("-")
        if int(number) < sizes.get(request_id, 0):
            known.add(name)
    return known


def date_demo(path: Path, model: str, version: str, times: Sequence[float]) -> int:
    """Give the requests of a version's demo their times, in order; return how many there are."""
    query = "SELECT id FROM requests WHERE model = ? AND version = ? AND id GLOB ? ORDER BY rowid"
    with connect(path) as connection:
        found = connection.execute(query, (model, version, f"{DEMO}*")).fetchall()
        dated = [(when, *key) for when, key in zip(times, found, strict=False)]
        connection.executemany("UPDATE requests SET time = ? WHERE id = ?", dated)
    return len(found)


def wait_for(path: Path, row_id: str, seconds: float = 30.0) -> bool:
    """Wait until a row that was just scored is written; tell whether it is there."""
    end = time.monotonic() + seconds
    while not known_rows(path, [row_id]):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
