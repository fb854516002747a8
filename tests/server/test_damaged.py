"""Damaged files of the MLflow server: a sentence names the file, and nothing is overwritten."""

import sqlite3
from contextlib import closing

import pytest

from helpers import server
from helpers.resume import Record
from helpers.server import credentials, users
from helpers.workspace import ProjectError

GARBAGE = (b"", b"this is no database or JSON " * 100)


def half_a_database(path):
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE runs (name TEXT)")
        database.executemany("INSERT INTO runs VALUES (?)", [("x" * 1000,)] * 100)
    return path.read_bytes()[:40_000]


def start(workspace):
    return server.start_server(workspace, keep=False)


FILES = {
    "tracking.db": start,
    ".server/users.db": start,
    ".server/state.json": start,
    "passwords.json": lambda workspace: credentials.password_of(workspace, "ana"),
    ".server/access.json": lambda workspace: users.change_rules(workspace, sign_in=True),
    "executed/state.json": lambda workspace: Record(workspace).set("01", "x"),
}


@pytest.mark.parametrize("content", [*GARBAGE, None], ids=["empty", "garbage", "torn"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_named_with_the_way_out_and_stays_as_it_is(workspace, name, content):
    workspace.server.mkdir()
    path = workspace.root / name
    if content is None:
        content = half_a_database(path) if name.endswith(".db") else b'{"a": "b'
        path.unlink(missing_ok=True)
    path.write_bytes(content)
    with pytest.raises(ProjectError) as caught:
        FILES[name](workspace)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path} is damaged")
    assert "run this again" in sentence or "every step runs again" in sentence
    assert "\n" not in sentence
    assert path.read_bytes() == content
    assert not (workspace.server / "log.txt").exists()
