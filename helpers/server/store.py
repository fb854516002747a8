"""MLflow's database file: made whole or not at all, and brought up to date when MLflow is newer.

MLflow makes and changes its tables in many steps; a machine that vanishes in the middle would
leave a file that no MLflow opens again. So these steps happen in a file beside it.
"""

import shutil
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from helpers.server.processes import is_running
from helpers.workspace import ProjectError, atomic_path


class StoreError(ProjectError):
    """A database is damaged, or was made by a newer MLflow than the one installed."""


def check(path: Path, way_out: str) -> None:
    """Look whether a database, if it is there, can be read; nothing in it is changed.

    Raises
    ------
    StoreError
        If it is damaged; names it and the way out.
    """
    if not path.is_file():
        return
    try:
        with closing(sqlite3.connect(path)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        raise  # Such as a full disk: the database is not to blame.
    except sqlite3.DatabaseError as error:
        found, tables = str(error), 0
    if found != "ok" or not tables:
        reason = "it is empty" if found == "ok" else found.split("\n")[-1]
        raise StoreError(f"{path} is damaged ({reason}) and stays as it is. {way_out}")


def schema_version(path: Path) -> str | None:
    """Return the version of a database's tables, or None if it has none."""
    with closing(sqlite3.connect(path)) as connection:
        known = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
        if connection.execute(known).fetchone() is None:
            return None
        return connection.execute("SELECT version_num FROM alembic_version").fetchone()[0]


def prepare(path: Path) -> None:
    """Make the database if it is missing; change one of an older MLflow to today's tables.

    The older one is kept beside it, with its version in the name.

    Raises
    ------
    StoreError
        If a newer MLflow made it; names the way out.
    """
    from mlflow.store.db import utils

    if not path.is_file():
        with atomic_path(path) as temporary:
            _change(temporary, utils._initialize_tables)
        return
    version = schema_version(path)
    if version == utils._get_latest_schema_revision():
        return
    if version not in _known_versions():
        raise StoreError(
            f"{path} was made by a newer version of MLflow than the one installed here. Update "
            "it (pip install -U mlflow), then start again; nothing was changed."
        )
    with atomic_path(path) as temporary:
        shutil.copy2(path, temporary)
        _change(temporary, utils._upgrade_db)
        shutil.copy2(path, path.with_name(f"{path.name}.{version}"))


def close_abandoned_runs(client) -> None:
    """Mark runs as KILLED whose process on this machine is gone.

    Parameters
    ----------
    client : mlflow.MlflowClient
    """
    every = [experiment.experiment_id for experiment in client.search_experiments()]
    here = f"tags.`process.host` = '{socket.gethostname()}'"
    for run in client.search_runs(every, f"attributes.status = 'RUNNING' and {here}"):
        tags = run.data.tags
        if not is_running(int(tags["process.pid"]), float(tags["process.created"])):
            client.set_terminated(run.info.run_id, "KILLED")


def _known_versions() -> set[str]:
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils

    script = ScriptDirectory.from_config(utils._get_alembic_config(""))
    return {each.revision for each in script.walk_revisions()}


def _change(path: Path, action: Callable) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(f"sqlite:///{path.as_posix()}")
    try:
        action(engine)
    finally:
        engine.dispose()
