"""MLflow's database file: made whole, brought up to date, or refused untouched."""

import sqlite3
from contextlib import closing

import mlflow
import pytest

from helpers.server import store


def _older(path):
    """Make the tables as the MLflow before had them."""
    from alembic import command
    from mlflow.store.db import utils
    from mlflow.store.tracking.dbmodels.initial_models import Base

    def make(engine):
        Base.metadata.create_all(engine)
        config = utils._get_alembic_config(str(engine.url))
        command.upgrade(config, "head-1")

    store._change(path, make)


def test_database_of_an_older_mlflow_is_brought_up_to_date_and_kept(tmp_path):
    path = tmp_path / "tracking.db"
    _older(path)
    before = store.schema_version(path)
    store.prepare(path)
    assert store.schema_version(path) != before
    assert store.schema_version(tmp_path / f"tracking.db.{before}") == before
    mlflow.MlflowClient(f"sqlite:///{path}").create_experiment("works")


def test_database_of_a_newer_mlflow_is_refused_untouched(tmp_path):
    path = tmp_path / "tracking.db"
    store.prepare(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'from_the_future'")
    content = path.read_bytes()
    with pytest.raises(store.StoreError, match="newer version of MLflow.*pip install -U mlflow"):
        store.prepare(path)
    assert path.read_bytes() == content
