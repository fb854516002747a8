"""Put two workspaces' databases together that machines made side by side.

A three-way merge, row by row, as version control does it with lines: what only one side
changed since they parted is taken over, what both changed is decided by what is newer. Runs and
logged models have names that no other machine gives; experiments are matched by name, versions
by the run that they were registered from. A version whose number is taken by another run's gets
the next one, here and wherever it is named.
"""

import re
import sqlite3
import time
from collections import defaultdict
from contextlib import closing

from helpers.server import store

PRODUCTION = "production"  # the alias
TIMEOUT = 60  # seconds to wait for a server that writes

# What belongs to one machine's server, or is computed from the rest, is not merged.
OF_A_SERVER = {"alembic_version", "jobs", "job_locks", "scheduler_leases", "workspaces"}
COMPUTED = "sql_"  # how the names of such tables begin
# Only ever added to: nothing to compare, and there may be many.
APPENDED = {"metrics", "logged_model_metrics"}
STATUS = {"RUNNING": -1, "FINISHED": 1}  # of a run that another machine took for killed
NEWER = ("last_updated_time", "last_updated_timestamp_ms", "end_time", "timestamp", "time")


def merge_tracking(own, theirs, base=None):
    """Bring what another MLflow database has into this one: runs, models, versions, tags.

    Parameters
    ----------
    own : pathlib.Path
        SQLite file; changed in one transaction, also while a server uses it.
    theirs : pathlib.Path
        SQLite file; where an older MLflow made it, it is brought up to date.
    base : pathlib.Path, optional
        SQLite file as it was when the two parted; without it, what differs counts as changed
        on both sides.

    Returns
    -------
    dict of (str, int) to int
        Number here of each of their versions that has another number, by (model, number).

    Raises
    ------
    helpers.server.store.StoreError
        If one was made by a newer MLflow than the one installed.
    """
    every = [path for path in (own, theirs, base) if path is not None]
    if len({store.schema_version(path) for path in every}) > 1:
        for path in every:
            store.prepare(path)
    with closing(sqlite3.connect(own, timeout=TIMEOUT)) as connection:
        connection.row_factory = sqlite3.Row
        connection.execute("ATTACH ? AS theirs", (str(theirs),))
        if base is not None:
            connection.execute("ATTACH ? AS base", (str(base),))
        connection.execute("BEGIN IMMEDIATE")
        with connection:
            return _Merge(connection, base is not None).run()


def merge_scored(own, theirs, numbers):
    """Bring scored rows, labels and alerts of another database into this one.

    Parameters
    ----------
    own, theirs : pathlib.Path
        SQLite files of `helpers.serving.scored_rows`.
    numbers : dict of (str, int) to int
        From `merge_tracking`.
    """
    with closing(sqlite3.connect(own, timeout=TIMEOUT)) as connection:
        connection.row_factory = sqlite3.Row
        connection.execute("ATTACH ? AS theirs", (str(theirs),))
        connection.execute("BEGIN IMMEDIATE")
        with connection:
            for table in ("requests", "alerts"):
                for row in _rows(connection, "theirs", table):
                    key = (row["model"], int(row["version"]))
                    row["version"] = str(numbers.get(key, key[1]))
                    _insert(connection, table, row)
            # A label given again takes the place of the earlier one, here too.
            connection.execute(
                "INSERT INTO labels SELECT * FROM theirs.labels WHERE true ON CONFLICT (id) "
                "DO UPDATE SET time = excluded.time, label = excluded.label "
                "WHERE excluded.time > time"
            )


def close_runs(path, alive):
    """Mark runs as KILLED that are open on machines which are gone.

    Parameters
    ----------
    path : pathlib.Path
        SQLite file of MLflow.
    alive : set of str
        Host names of the machines that are not.
    """
    with closing(sqlite3.connect(path, timeout=TIMEOUT)) as connection, connection:
        marks = ", ".join("?" * len(alive))
        connection.execute(
            "UPDATE runs SET status = 'KILLED', end_time = ? WHERE status = 'RUNNING' AND run_uuid "
            f"IN (SELECT run_uuid FROM tags WHERE key = 'process.host' AND value NOT IN ({marks}))",
            [int(time.time() * 1000), *alive],
        )


# --- rows ---------------------------------------------------------------------------------------


def _rows(connection, side, table):
    return [dict(row) for row in connection.execute(f'SELECT * FROM {side}."{table}"')]


def _insert(connection, table, row, instead="IGNORE"):
    names, marks = ", ".join(f'"{name}"' for name in row), ", ".join("?" * len(row))
    connection.execute(
        f'INSERT OR {instead} INTO main."{table}" ({names}) VALUES ({marks})', list(row.values())
    )


def _newer(row, other):
    """Tell whether a row was changed after another, where the table has a time of change."""
    rank, rank_of_other = (STATUS.get(each.get("status"), 0) for each in (row, other))
    if rank != rank_of_other:
        return rank > rank_of_other
    name = next((name for name in NEWER if name in row), None)
    return name is not None and (row[name] or 0) > (other[name] or 0)


def _origin(row):
    """Return what a version was registered from, or None if it was deleted (MLflow blots it)."""
    deleted = row["current_stage"] == "Deleted_Internal"
    return None if deleted else (row["run_id"], row["source"])


class _Side:
    """Rows of one of the databases, with ids as the own database has them."""

    def __init__(self, connection, side, own=None, base=None):
        self._connection, self._side = connection, side
        self._versions = {
            (row["name"], row["version"]): _origin(row) for row in self.read("model_versions")
        }
        self.experiments = self._by_name() if own is None else self._map_experiments(own)
        self.versions = self._by_run() if own is None else self._map_versions(own, base)
        self.datasets = self._by_digest() if own is None else self._map_datasets(own)

    def read(self, table):
        return _rows(self._connection, self._side, table)

    # The own side: what to match others with.

    def _by_name(self):
        return {(row["workspace"], row["name"]): row["experiment_id"] for row in self._all()}

    def _all(self):
        return sorted(self.read("experiments"), key=lambda row: row["experiment_id"])

    def _by_run(self):
        return {
            (name, origin): number for (name, number), origin in self._versions.items() if origin
        }

    def _by_digest(self):
        return {
            (row["experiment_id"], row["name"], row["digest"]): row["dataset_uuid"]
            for row in self.read("datasets")
        }

    # Another side: its ids to the own ones.

    def _map_experiments(self, own):
        mapped = {}
        for row in self._all():
            key, taken = (row["workspace"], row["name"]), set(own.experiments.values())
            if key not in own.experiments:
                free = row["experiment_id"]
                own.experiments[key] = free if free not in taken else max(taken) + 1
            mapped[row["experiment_id"]] = own.experiments[key]
        return mapped

    def _map_versions(self, own, base):
        mapped = {}
        for place, origin in sorted(self._versions.items(), key=lambda item: item[0]):
            name, number = place
            if (name, origin) in own.versions:
                mapped[place] = own.versions[name, origin]
            elif base is None and own.has_deleted(place):
                mapped[place] = number
            elif base and place in base.versions and origin in (None, base._versions[place]):
                # Known to the base, and deleted here or there: the same version.
                mapped[place] = base.versions[place]
            else:
                taken = {each for of, each in own._versions if of == name}
                taken |= {each for (of, _), each in own.versions.items() if of == name}
                mapped[place] = number if number not in taken else max(taken) + 1
                if origin:
                    own.versions[name, origin] = mapped[place]
        return mapped

    def has_deleted(self, place):
        """Tell whether the version of this model and number was deleted here."""
        return place in self._versions and self._versions[place] is None

    def _map_datasets(self, own):
        mapped = {}
        for row in self.read("datasets"):
            key = (self.experiments[row["experiment_id"]], row["name"], row["digest"])
            mapped[row["dataset_uuid"]] = own.datasets.setdefault(key, row["dataset_uuid"])
        return mapped

    def translated(self, table):
        """Return the rows of a table with the own ids."""
        rows = self.read(table)
        for row in rows:
            if "experiment_id" in row:
                row["experiment_id"] = self.experiments.get(row["experiment_id"])
            if "dataset_uuid" in row:
                row["dataset_uuid"] = self.datasets.get(row["dataset_uuid"], row["dataset_uuid"])
            if table == "inputs" and row["source_type"] == "DATASET":
                row["source_id"] = self.datasets.get(row["source_id"], row["source_id"])
            if table.startswith(("model_version", "registered_model_aliases")) and "version" in row:
                row["version"] = self.versions[row["name"], row["version"]]
        return rows


class _Merge:
    def __init__(self, connection, has_base):
        self._connection = connection
        self._own = _Side(connection, "main")
        # The base first: what both sides had keeps its number.
        self._base = _Side(connection, "base", self._own) if has_base else None
        self._theirs = _Side(connection, "theirs", self._own, self._base)
        self._new_runs, self._fought_over = set(), set()

    def run(self):
        before = {row["run_uuid"] for row in self._own.read("runs")}
        for table in self._tables():
            if table in APPENDED:
                for row in self._theirs.translated(table):
                    _insert(self._connection, table, row)
            else:
                self._merge_table(table)
        self._new_runs = {row["run_uuid"] for row in self._theirs.read("runs")} - before
        numbers = {key: number for key, number in self._theirs.versions.items() if key[1] != number}
        self._renumber(numbers)
        self._settle_production()
        return numbers

    def _tables(self):
        names = [
            {
                row["name"]
                for row in self._connection.execute(
                    f"SELECT name FROM {side}.sqlite_master WHERE type = 'table'"
                )
            }
            for side in ("main", "theirs")
        ]
        both = (names[0] & names[1]) - OF_A_SERVER
        return sorted(name for name in both if not name.startswith(COMPUTED))

    def _merge_table(self, table):
        keys = [
            row["name"]
            for row in self._connection.execute(f'PRAGMA main.table_info("{table}")')
            if row["pk"]
        ]

        def by_key(rows):
            return {tuple(row[name] for name in keys): row for row in rows}

        own = by_key(self._own.read(table))
        theirs = by_key(self._theirs.translated(table))
        base = by_key(self._base.translated(table)) if self._base else {}
        for key, row in theirs.items():
            mine, was = own.get(key), base.get(key)
            if row in (mine, was):
                continue  # the same, or changed here only
            if mine is not None and mine != was:
                if table in ("registered_model_aliases", "model_versions"):
                    self._fought_over.add((row["name"], row.get("alias")))
                if not _newer(row, mine):
                    continue
            _insert(self._connection, table, row, "REPLACE")
        for key, was in base.items():
            if key not in theirs and own.get(key) == was:
                where = " AND ".join(f'"{name}" = ?' for name in keys)
                self._connection.execute(f'DELETE FROM main."{table}" WHERE {where}', key)

    # --- versions whose number is another here ------------------------------------------------

    def _renumber(self, numbers):
        """Let runs that came along name the versions by their numbers here."""
        models = {name for name, _ in numbers}
        for run_id in self._new_runs:
            params, tags = self._pairs("params", run_id), self._pairs("tags", run_id)
            model = params.get("model") or tags.get("model")
            if model not in models:
                continue
            for table, pairs in (("params", params), ("tags", tags)):
                for key in ("from_version", "to_version", "version"):
                    value = pairs.get(key, "")
                    if value.isdecimal() and (model, int(value)) in numbers:
                        self._set(table, run_id, key, str(numbers[model, int(value)]))
            self._rename(run_id, model, numbers)

    def _pairs(self, table, run_id):
        query = f"SELECT key, value FROM main.{table} WHERE run_uuid = ?"
        return {row["key"]: row["value"] for row in self._connection.execute(query, (run_id,))}

    def _set(self, table, run_id, key, value):
        self._connection.execute(
            f"UPDATE main.{table} SET value = ? WHERE run_uuid = ? AND key = ?",
            (value, run_id, key),
        )

    def _rename(self, run_id, model, numbers):
        """Correct the name of a run, such as ``model_svm_rbf: version 1 → 2``."""
        query = "SELECT name FROM main.runs WHERE run_uuid = ?"
        before = self._connection.execute(query, (run_id,)).fetchone()["name"] or ""
        head, found, tail = before.partition("version ")

        def own(match):
            return str(numbers.get((model, int(match.group())), match.group()))

        # What follows a comma is a period, not a version.
        tail, comma, rest = tail.partition(",")
        after = head + found + re.sub(r"\d+", own, tail) + comma + rest
        self._connection.execute(
            "UPDATE main.runs SET name = ? WHERE run_uuid = ?", (after, run_id)
        )
        self._set("tags", run_id, "mlflow.runName", after)

    # --- one version in Production ------------------------------------------------------------

    def _settle_production(self):
        """Let an alias that both sides moved name what was promoted last; one stage for it."""
        promoted = defaultdict(list)
        for row in self._connection.execute(
            "SELECT r.end_time AS at, m.value AS model, v.value AS version FROM main.runs AS r "
            "JOIN main.params AS m ON m.run_uuid = r.run_uuid AND m.key = 'model' "
            "JOIN main.params AS v ON v.run_uuid = r.run_uuid AND v.key = 'to_version' "
            "WHERE r.status = 'FINISHED' AND r.lifecycle_stage = 'active'"
        ):
            promoted[row["model"]].append((row["at"] or 0, int(row["version"])))
        for name, alias in self._fought_over:
            if alias == PRODUCTION and promoted[name]:
                self._connection.execute(
                    "UPDATE main.registered_model_aliases SET version = ? "
                    "WHERE name = ? AND alias = ?",
                    (max(promoted[name])[1], name, alias),
                )
        for name in {name for name, _ in self._fought_over}:
            found = self._connection.execute(
                "SELECT version FROM main.registered_model_aliases WHERE name = ? AND alias = ?",
                (name, PRODUCTION),
            ).fetchone()
            if found is not None:
                self._set_stage(name, found["version"])

    def _set_stage(self, name, version):
        """Archive what else is in the stage Production, where the server has stages at all."""
        done = self._connection.execute(
            "UPDATE main.model_versions SET current_stage = 'Archived' WHERE name = ? AND "
            "version <> ? AND current_stage = 'Production'",
            (name, version),
        )
        if done.rowcount:
            self._connection.execute(
                "UPDATE main.model_versions SET current_stage = 'Production' WHERE name = ? AND "
                "version = ?",
                (name, version),
            )
