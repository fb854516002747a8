"""What the safe copy holds of a workspace, and how databases that are in use are read and written.

Passwords, the server's users and logs are not copied: put passwords into Colab Secrets.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path, PurePath

from helpers.workspace import ProjectError, file_digest

DATABASES = {  # and the tables that each must have
    "tracking.db": {"alembic_version", "experiments", "runs", "registered_models"},
    "scored.db": {"requests", "labels", "alerts"},
}
FILES = ("series",)
UNFINISHED = ("search", "training")  # is deleted when it is finished, or goes on
FOLDERS = ("data", "mlruns", "executed", "batch", *UNFINISHED)


class SafeCopyError(ProjectError):
    """The folder of the safe copy cannot be used, or it or a database here is damaged."""


def top(path: str) -> str:
    """Return the first part of a path."""
    return path.split("/")[0]


def belongs(path: str) -> bool:
    """Tell whether a path in the workspace is one that the safe copy may hold."""
    parts = path.split("/")
    known = FOLDERS if len(parts) > 1 else (*FILES, *DATABASES)
    plain = PurePath(path).parts == tuple(parts) and "\0" not in path
    return parts[0] in known and plain and not any(part.startswith(".") for part in parts)


def list_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Give the files to be copied, without databases and links, by path in the workspace."""
    found = [root / name for name in FILES]
    for name in FOLDERS:
        for folder, _, names in os.walk(root / name):
            found += [Path(folder, each) for each in names]
    for source in sorted(found):
        path = source.relative_to(root).as_posix()
        if belongs(path) and source.is_file() and not source.is_symlink():
            yield path, source


def stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is written to."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def back_up(database: Path, target: Path) -> str:
    """Copy a database as of one moment, and check it; return the copy's SHA-256.

    Raises
    ------
    SafeCopyError
        If it is damaged, or lacks a table.
    """
    try:
        with closing(sqlite3.connect(database)) as live, closing(sqlite3.connect(target)) as copy:
            live.backup(copy)
            # One file: the copy must not depend on a journal beside it.
            copy.execute("PRAGMA journal_mode = DELETE")
            (found,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
            tables = copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            missing = DATABASES[database.name] - {name for (name,) in tables}
    except sqlite3.OperationalError:
        raise  # Such as a full disk: the database is not to blame.
    except sqlite3.DatabaseError as error:
        found, missing = error, set()
    if missing or str(found) != "ok":
        reason = f"without {', '.join(sorted(missing))}" if missing else str(found).split("\n")[-1]
        raise SafeCopyError(
            f"{database} is damaged ({reason}). It was not saved, and the safe copy is as it was. "
            "Stop the server (python -m helpers.server --stop), move the file out of the "
            "workspace, and run the notebook again from the top: what was saved of it is fetched."
        )
    return file_digest(target)


def write_into(source: Path, database: Path) -> None:
    """Give a database the content of another in one transaction, under a server that uses it."""
    database.touch(mode=0o600)
    with closing(sqlite3.connect(source)) as new, closing(sqlite3.connect(database)) as live:
        new.backup(live)
