"""The safe copy: machines that vanish, work side by side, or are killed while they save."""

import json
import multiprocessing
import shutil
import sqlite3
import time
import zipfile
from contextlib import closing

import mlflow
import numpy as np
import pytest

from helpers import data, server, tracking
from helpers.colab import safe_copy
from helpers.colab.safe_copy import SafeCopy, SafeCopyError
from helpers.data import load_split, save_split
from helpers.server import store
from helpers.serving import scored_rows
from helpers.workspace import open_workspace
from tests.conftest import split_table
from tests.series import wait_for


@pytest.fixture(scope="session", autouse=True)
def _template(tmp_path_factory):
    """Make MLflow's tables once; to make them takes a second."""
    Machine.template = tmp_path_factory.mktemp("template") / "tracking.db"
    store.prepare(Machine.template)


class Machine:
    """A machine with a disk of its own; MLflow writes to its file without a server."""

    def __init__(self, disk, folder):
        self.workspace = open_workspace(disk)
        self.copy = SafeCopy(self.workspace, folder)
        self.taken = self.copy.restore()
        if not self.workspace.tracking_db.exists():
            shutil.copyfile(self.template, self.workspace.tracking_db)
        uri = f"sqlite:///{self.workspace.tracking_db}"
        # Both: other tests leave the registry of their server as the default.
        self.client = mlflow.MlflowClient(uri, uri)

    def log_run(self, experiment="conv_network", name="default_logistic", finished=True, **params):
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        run_id = self.client.create_run(number, run_name=name).info.run_id
        self.client.log_metric(run_id, "accuracy", 0.75)
        for key, value in params.items():
            self.client.log_param(run_id, key, value)
        if finished:
            self.client.set_terminated(run_id)
        file = self.workspace.artifacts / number / run_id / "artifacts" / "model.txt"
        file.parent.mkdir(parents=True)
        file.write_text(run_id)
        return run_id

    def register(self, run_id, name="model_svm_rbf"):
        if not self.client.search_registered_models(f"name = '{name}'"):
            self.client.create_registered_model(name)
        version = self.client.create_model_version(name, f"runs:/{run_id}/model", run_id)
        return str(version.version)

    def promote(self, version, name="model_svm_rbf"):
        """As `helpers.registry` does it."""
        run_id = self.log_run("promotions", f"{name}: version – → {version}", finished=False)
        for key, value in {"model": name, "from_version": "none", "to_version": version}.items():
            self.client.log_param(run_id, key, value)
        self.client.transition_model_version_stage(name, version, "Production", True)
        self.client.set_registered_model_alias(name, "production", version)
        self.client.set_terminated(run_id)
        return run_id

    def runs(self):
        every = [each.experiment_id for each in self.client.search_experiments()]
        return {run.info.run_id: run for run in self.client.search_runs(every)}

    def version_of(self, run_id):
        (found,) = self.client.search_model_versions(f"run_id = '{run_id}'")
        return found


@pytest.fixture
def machine(tmp_path):
    """Start a machine: ``machine("a")``. The same letter is the same machine."""

    def start(name, folder=tmp_path / "drive"):
        return Machine(tmp_path / name, folder)

    return start


def integrity(path):
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall()


def test_next_machine_has_what_the_one_before_made(machine, small_split):
    first = machine("a")
    save_split(small_split, first.workspace)
    run_id = first.log_run()
    assert first.copy.save() is not None
    second = machine("b")
    assert list(second.runs()) == [run_id]
    assert load_split(second.workspace).manifest == small_split.manifest
    artifact = next(second.workspace.artifacts.rglob("model.txt"))
    assert artifact.read_text() == run_id
    assert integrity(second.workspace.tracking_db) == [("ok",)]
    # What is the same needs no other snapshot, and no other machine asks for it again.
    assert second.copy.save() is None
    assert machine("b").taken == []


def test_each_save_brings_only_what_is_new(machine, tmp_path):
    first = machine("a")
    first.log_run()
    big = first.workspace.artifacts / "big.bin"
    big.write_bytes(bytes(range(256)) * 4000)
    first.copy.save()
    first.log_run()
    second = first.copy.save()
    with zipfile.ZipFile(tmp_path / "drive" / "packs" / f"{second.name}.zip") as pack:
        assert "tracking.db" in pack.namelist()
        assert "mlruns/big.bin" not in pack.namelist()
    assert (machine("b").workspace.artifacts / "big.bin").read_bytes() == big.read_bytes()


def test_secrets_logs_and_the_servers_users_stay_on_the_machine(machine, tmp_path):
    first = machine("a")
    first.workspace.passwords.write_text('{"admin": "do-not-copy-this"}')
    first.workspace.server.mkdir()
    (first.workspace.server / "users.db").write_text("do-not-copy-this")
    first.log_run()
    first.copy.save()
    copied = b"".join(path.read_bytes() for path in (tmp_path / "drive").rglob("*.json"))
    (pack,) = (tmp_path / "drive" / "packs").glob("*.zip")
    with zipfile.ZipFile(pack) as archive:
        copied += b"".join(archive.read(name) for name in archive.namelist())
    assert b"do-not-copy-this" not in copied


def test_machines_that_worked_side_by_side_come_together(machine):
    first = machine("a")
    common = first.log_run()
    first.copy.save()
    left, right = machine("b"), machine("c")
    # The same experiment gets different ids on both.
    left.log_run("only_left")
    by_left, by_right = left.log_run("svc_model", "svm"), right.log_run("svc_model", "svm")
    left.client.set_tag(common, "looked_at", "left")
    left.copy.save()
    right.copy.save()
    both = machine("d")
    assert {common, by_left, by_right} <= set(both.runs())
    experiment = both.client.get_experiment_by_name("svc_model").experiment_id
    assert {both.runs()[each].info.experiment_id for each in (by_left, by_right)} == {experiment}
    assert both.runs()[common].data.tags["looked_at"] == "left"
    assert len(list(both.workspace.artifacts.rglob("model.txt"))) == 4
    merged = both.copy.save()
    assert len(merged.parents) == 2
    # A machine that was there all the time catches up.
    again = machine("b")
    assert set(again.runs()) == set(both.runs())
    assert integrity(again.workspace.tracking_db) == [("ok",)]


def test_versions_made_side_by_side_get_numbers_of_their_own(machine):
    first = machine("a")
    start = first.log_run("svc_model", "svm")
    first.promote(first.register(start))
    first.copy.save()
    left, right = machine("b"), machine("c")
    run_left, run_right = left.log_run("svc_model", "svm"), right.log_run("svc_model", "svm")
    assert left.register(run_left) == right.register(run_right) == "2"
    promoted_left = left.promote("2")
    time.sleep(0.01)
    promoted_right = right.promote("2")
    scored = (("r1", 1.0, "model_svm_rbf", "2", 0, b""),)
    with scored_rows.connect(right.workspace.scored_rows) as connection:
        connection.executemany("INSERT INTO requests VALUES (?,?,?,?,?,?)", scored)
    with scored_rows.connect(left.workspace.scored_rows) as connection:
        connection.execute("INSERT INTO labels VALUES ('r0-0', 1.0, '\"x\"')")
    left.copy.save()
    right.copy.save()
    both = machine("d")
    numbers = {str(both.version_of(each).version) for each in (start, run_left, run_right)}
    assert numbers == {"1", "2", "3"}
    # What was promoted last is in Production, and nothing else is.
    newest = both.version_of(run_right)
    assert newest.current_stage == "Production"
    found = both.client.get_model_version_by_alias("model_svm_rbf", "production")
    assert found.run_id == run_right
    staged = [v for v in both.client.search_model_versions() if v.current_stage == "Production"]
    assert [each.run_id for each in staged] == [run_right]
    # The history names the versions as they are called now.
    for promotion, run_id in ((promoted_left, run_left), (promoted_right, run_right)):
        run = both.runs()[promotion]
        number = str(both.version_of(run_id).version)
        assert run.data.params["to_version"] == number
        assert run.info.run_name == f"model_svm_rbf: version – → {number}"
    with scored_rows.connect(both.workspace.scored_rows) as connection:
        rows = connection.execute("SELECT id, version FROM requests").fetchall()
        assert rows == [("r1", str(newest.version))]
        assert connection.execute("SELECT count(*) FROM labels").fetchone() == (1,)


def test_what_was_deleted_on_one_machine_does_not_come_back(machine):
    first = machine("a")
    for _ in range(2):
        first.register(first.log_run())
    first.client.set_registered_model_alias("model_svm_rbf", "candidate", "2")
    first.copy.save()
    other = machine("b")
    other.client.delete_registered_model_alias("model_svm_rbf", "candidate")
    other.client.delete_model_version("model_svm_rbf", "1")
    other.copy.save()
    back = machine("a")
    assert back.client.get_registered_model("model_svm_rbf").aliases == {}
    (left,) = back.client.search_model_versions("name = 'model_svm_rbf'")
    assert str(left.version) == "2"
    # Its number is not given again, as on a machine that was alone.
    assert back.register(back.log_run()) == "3"
    back.copy.save()
    later = other.register(other.log_run())
    assert later == "3"
    other.copy.save()
    both = machine("c")
    numbers = {str(v.version) for v in both.client.search_model_versions()}
    assert numbers == {"2", "3", "4"}


def test_run_of_a_machine_that_is_gone_is_closed_and_one_that_lives_is_not(machine, monkeypatch):
    first = machine("a")
    open_run = first.log_run(finished=False)
    first.client.set_tag(open_run, "process.host", "colab-a")
    monkeypatch.setattr("helpers.colab.safe_copy.socket.gethostname", lambda: "colab-a")
    first.copy.save()
    first.copy.touch("02_cnn_training")
    monkeypatch.setattr("helpers.colab.safe_copy.socket.gethostname", lambda: "colab-b")
    assert machine("b").runs()[open_run].info.status == "RUNNING"
    later = time.time() + safe_copy.GONE + 1
    monkeypatch.setattr("helpers.colab.safe_copy.time.time", lambda: later)
    assert machine("c").runs()[open_run].info.status == "KILLED"
    # It was alive after all: what it says counts.
    first.client.set_terminated(open_run)
    first.copy.save()
    assert machine("b").runs()[open_run].info.status == "FINISHED"


def test_split_of_the_machine_that_made_a_new_one_wins_and_the_other_is_kept(
    machine, small_split, small_csv
):
    first = machine("a")
    save_split(small_split, first.workspace)
    first.copy.save()
    left, right = machine("b"), machine("c")
    table = data.load_table(str(small_csv()), left.workspace, categorical=["course"])
    other = split_table(table, seed=1)
    save_split(other, left.workspace)
    left.copy.save()
    right.log_run()
    right.copy.save()
    # The right one saved later, but it did not touch the split.
    both = machine("d")
    assert load_split(both.workspace).manifest["seed"] == 1
    previous = both.workspace.data / "previous"
    kept = [json.loads(each.read_text()) for each in previous.glob("*/manifest.json")]
    assert [each["split_digest"] for each in kept] == [small_split.manifest["split_digest"]]


def test_split_made_on_both_machines_is_the_later_one(machine, small_csv, tmp_path):
    splits = []
    for name, seed in (("a", 1), ("b", 2)):
        one = machine(name, tmp_path / "apart" / name)
        table = data.load_table(str(small_csv()), one.workspace, categorical=["course"])
        splits.append((one, split_table(table, seed=seed)))
    for one, split in splits:
        one.copy = SafeCopy(one.workspace, tmp_path / "common")
        save_split(split, one.workspace)
        one.copy.save()
        time.sleep(0.01)
    third = machine("c", tmp_path / "common")
    assert load_split(third.workspace).manifest["seed"] == 2
    kept = next((third.workspace.data / "previous").glob("*/manifest.json"))
    assert json.loads(kept.read_text())["seed"] == 1


def test_copy_that_was_cut_off_leaves_the_one_before(machine, tmp_path, monkeypatch):
    first = machine("a")
    run_id = first.log_run()
    first.copy.save()
    first.log_run()

    def full(source, target):
        target.with_suffix(".half").write_bytes(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safe_copy, "_move", full)
    with pytest.raises(SafeCopyError, match="No space left on device.*as it was"):
        first.copy.save()
    assert list(machine("b").runs()) == [run_id]
    monkeypatch.undo()
    assert first.copy.save() is not None
    assert len(machine("c").runs()) == 2


def test_damaged_pack_is_named_and_nothing_is_half_restored(machine, tmp_path):
    first = machine("a")
    first.log_run()
    first.copy.save()
    (pack,) = (tmp_path / "drive" / "packs").glob("*.zip")
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 0xFF
    pack.write_bytes(content)
    with pytest.raises(SafeCopyError, match=pack.name):
        machine("b")
    assert not open_workspace(tmp_path / "b").tracking_db.exists()


def test_folder_that_cannot_be_used_is_named(workspace, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SafeCopyError, match=r"file/copy is not writable.*DRIVE_FOLDER"):
        SafeCopy(workspace, tmp_path / "file" / "copy")
    with pytest.raises(SafeCopyError, match="inside the workspace"):
        SafeCopy(workspace, workspace.root / "copy")


@pytest.mark.slow
def test_old_snapshots_go_and_what_newer_ones_need_stays(machine, tmp_path, monkeypatch):
    first = machine("a")
    first.log_run()
    first.copy.save()
    start = time.time()
    for day in range(1, 31):
        monkeypatch.setattr(
            "helpers.colab.safe_copy.time.time", lambda day=day: start + day * 86400
        )
        first.workspace.artifacts.joinpath("note.txt").write_text(str(day))
        first.copy.save()
    monkeypatch.undo()
    snapshots = list((tmp_path / "drive" / "snapshots").iterdir())
    assert 8 <= len(snapshots) <= safe_copy.KEPT + 2
    assert len(list((tmp_path / "drive" / "packs").iterdir())) <= len(snapshots) + 1
    later = machine("b")
    assert len(later.runs()) == 1
    assert later.workspace.artifacts.joinpath("note.txt").read_text() == "30"


def test_unfinished_parts_are_there_on_the_next_machine_until_they_are_finished(machine):
    first = machine("a")
    part, checkpoint = first.workspace.search / "k" / "0-0.json", first.workspace.training / "t.npz"
    for path in (part, checkpoint):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    first.copy.mirror()
    second = machine("b")
    assert (second.workspace.search / "k" / "0-0.json").read_text() == "1"
    assert (second.workspace.training / "t.npz").read_text() == "1"
    second.copy.mirror()
    checkpoint.unlink()
    first.copy.mirror()
    second.copy.mirror()
    third = machine("c")
    assert not (third.workspace.training / "t.npz").exists()
    assert (third.workspace.search / "k" / "0-0.json").exists()


def test_change_between_two_steps_is_saved_after_a_while(machine, monkeypatch):
    monkeypatch.setattr(safe_copy, "SAVE_EVERY", 0.1)
    monkeypatch.setattr(safe_copy, "MIRROR_EVERY", 0.05)
    first = machine("a")
    first.copy.hold("04_registry_promotion")
    run_id = first.log_run()
    try:
        assert wait_for(lambda: any(first.copy.folder.glob("snapshots/*.json")), 20)
        assert wait_for(lambda: run_id in machine("b").runs(), 20)
    finally:
        first.copy.release()


def test_other_machine_is_told_of_until_it_is_gone(machine, workspace, tmp_path, capsys):
    first = machine("a")
    first.copy.touch("03_svm_grid_search")
    safe_copy.start(workspace, str(tmp_path / "drive"), "02_cnn_training").release()
    assert "03_svm_grid_search on another machine" in capsys.readouterr().out
    (note,) = (tmp_path / "drive" / "machines").iterdir()
    content = json.loads(note.read_text())
    note.write_text(json.dumps({**content, "seen": time.time() - 2 * safe_copy.GONE}))
    safe_copy.start(workspace, str(tmp_path / "drive"), "02_cnn_training").release()
    assert "ended without a word" in capsys.readouterr().out
    safe_copy.start(workspace, str(tmp_path / "drive"), "02_cnn_training").release()
    assert "another machine" not in capsys.readouterr().out


@pytest.mark.slow
def test_machine_catches_up_while_its_server_runs(tracking_server, tmp_path):
    here = tracking_server.workspace
    copy = SafeCopy(here, tmp_path / "drive")
    copy.restore()
    copy.save()
    other = Machine(tmp_path / "other", tmp_path / "drive")
    run_id = other.log_run("from_elsewhere", model="none")
    other.copy.save()
    assert [each.name for each in copy.restore()]
    found = mlflow.MlflowClient().get_run(run_id)
    assert found.data.metrics == {"accuracy": 0.75}
    assert run_id in [path.read_text() for path in here.artifacts.rglob("model.txt")]
    # The server goes on writing as before.
    with tracking.start_run("after_merge", "one"):
        mlflow.log_metric("m", 1.0)
    assert server.answers(tracking_server.url)


def _work(disk, folder, ledger):
    """Log runs and save them until killed; note each run in the ledger once it is safe."""
    one = Machine(disk, folder)
    while True:
        run_id = one.log_run(tries=0)
        one.copy.save()
        with ledger.open("a") as file:
            file.write(f"{run_id}\n")


@pytest.mark.slow
def test_nothing_that_was_saved_is_lost_in_fifty_kills(tmp_path):
    random, ledger, folder = np.random.default_rng(0), tmp_path / "ledger", tmp_path / "drive"
    ledger.touch()
    context = multiprocessing.get_context("fork")
    Machine(tmp_path / "first", folder).copy.save()
    unsaved = 0
    for number in range(50):
        # Every third time a machine that was there before comes back, with what it had.
        disk = tmp_path / f"disk{number if number % 3 else number // 2}"
        worker = context.Process(target=_work, args=(disk, folder, ledger))
        worker.start()
        time.sleep(random.uniform(0.05, 1.5))
        worker.kill()
        worker.join()
        fresh = open_workspace(tmp_path / f"fresh{number}")
        SafeCopy(fresh, folder).restore()
        assert integrity(fresh.tracking_db) == [("ok",)]
        with closing(sqlite3.connect(fresh.tracking_db)) as connection:
            query = "SELECT run_uuid, status FROM runs"
            found = dict(connection.execute(query).fetchall())
        promised = ledger.read_text().split()
        assert {found[each] for each in promised} <= {"FINISHED"}
        unsaved += len(found) > len(promised)
        for run_id in promised:
            assert next(fresh.artifacts.glob(f"*/{run_id}/artifacts/model.txt")).read_text()
    assert len(promised) > 50
    # Some of the kills were in the few moments between a save and its note.
    assert unsaved


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
