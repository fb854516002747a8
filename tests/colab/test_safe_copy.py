"""The safe copy: machines that vanish, find their number taken, or meet a damaged folder."""

import json
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import zipfile
from contextlib import closing
from pathlib import Path

import mlflow
import numpy as np
import pytest

from helpers import server, tracking
from helpers.colab import safe_copy
from helpers.colab.history import KEPT
from helpers.colab.safe_copy import SafeCopyError
from helpers.data import load_split, save_split
from helpers.workspace import PROJECT_ROOT, open_workspace
from tests.series import connected


@pytest.fixture(scope="session", autouse=True)
def _template(tmp_path_factory):
    """Make MLflow's tables once; to make them takes a second."""
    Machine.template = tmp_path_factory.mktemp("template") / "tracking.db"
    mlflow.MlflowClient(f"sqlite:///{Machine.template}").search_experiments()


class Machine:
    """A machine with a disk of its own; MLflow writes to its file without a server."""

    def __init__(self, disk, folder):
        self.workspace = open_workspace(disk)
        self.copy = safe_copy.start(self.workspace, str(folder), disk.name)
        if not self.workspace.tracking_db.exists():
            shutil.copyfile(self.template, self.workspace.tracking_db)
        uri = f"sqlite:///{self.workspace.tracking_db}"
        # Both: other tests leave the registry of their server as the default.
        self.client = mlflow.MlflowClient(uri, uri)

    def log_run(self):
        found = self.client.get_experiment_by_name("svc_model")
        number = found.experiment_id if found else self.client.create_experiment("svc_model")
        run_id = self.client.create_run(number, run_name="svm").info.run_id
        self.client.log_metric(run_id, "accuracy", 0.75)
        self.client.set_terminated(run_id)
        self.write(f"mlruns/{number}/{run_id}/artifacts/model.txt", run_id)
        return run_id

    def save_run(self):
        run_id = self.log_run()
        self.copy.save()
        return run_id

    def write(self, path, text):
        (self.workspace.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.workspace.root / path).write_text(text)

    def runs(self):
        """Return the runs of the database, which have to be those with artifacts."""
        every = [each.experiment_id for each in self.client.search_experiments()]
        found = {run.info.run_id for run in self.client.search_runs(every)}
        artifacts = list(self.workspace.artifacts.rglob("model.txt"))
        assert {path.read_text() for path in artifacts} == found
        assert {path.parts[-3] for path in artifacts} == found
        return found


@pytest.fixture
def drive(tmp_path):
    return tmp_path / "drive"


@pytest.fixture
def machine(tmp_path, drive):
    """Start a machine: ``machine("a")``. The same letter is the same machine."""
    yield lambda name: Machine(tmp_path / name, drive)
    safe_copy._running.clear()


def content(folder):
    """Return what is in a folder, by path."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".gitignore")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def names_in(pack):
    with zipfile.ZipFile(pack) as archive:
        return archive.namelist()


def the_one(folder, pattern="*"):
    (found,) = folder.glob(pattern)
    return found


# --- one after the other ----------------------------------------------------------------------


def test_next_machine_has_what_the_one_before_made(machine, drive, small_split, capsys):
    first = machine("a")
    assert capsys.readouterr().out == f"Safe copy: {drive}\n"
    save_split(small_split, first.workspace)
    name, run_id = first.workspace.id, first.save_run()
    assert f"Saved to {drive} (number 1)\n" in capsys.readouterr().out
    second = machine("b")
    assert "Restored what was saved at 20" in capsys.readouterr().out
    assert second.runs() == {run_id}
    assert second.workspace.id == name
    assert load_split(second.workspace).manifest == small_split.manifest
    assert second.workspace.tracking_db.stat().st_mode & 0o077 == 0


def test_nothing_is_written_where_nothing_changed(machine, drive, capsys):
    first = machine("a")
    first.save_run()
    before = content(drive)
    first.copy.save()
    again, second = machine("a"), machine("b")
    capsys.readouterr()
    again.copy.save()
    second.copy.save()
    assert content(drive) == before
    assert capsys.readouterr().out == ""


def test_each_save_brings_only_what_is_new(machine, drive):
    first = machine("a")
    first.write("mlruns/big.bin", "big" * 100_000)
    first.save_run()
    first.save_run()
    new = names_in(the_one(drive / "packs", "00002-*.zip"))
    assert "tracking.db" in new
    assert "mlruns/big.bin" not in new
    assert (machine("b").workspace.artifacts / "big.bin").stat().st_size == 300_000


def test_secrets_logs_and_the_servers_users_stay_on_the_machine(machine, drive):
    first = machine("a")
    for path in ("passwords.json", ".server/users.db", "data/.hidden", "notes.txt"):
        first.write(path, "not to be copied")
    first.save_run()
    assert {name.split("/")[0] for name in names_in(the_one(drive / "packs"))} == {
        "mlruns",
        "tracking.db",
    }


def test_five_machines_one_after_the_other_and_back_again_never_notice(machine, drive, capsys):
    names = ["a", "b", "c", "d", "e", "b", "a"]
    made = {machine(name).save_run() for name in names}
    assert machine("c").runs() == made
    assert "Run the cell again" not in capsys.readouterr().out
    assert not (drive / "aside").exists()


def test_notebooks_in_one_workspace_save_side_by_side(machine, drive):
    left, right = machine("a"), machine("a")
    made = {left.save_run(), right.save_run(), left.save_run()}
    assert machine("b").runs() == made
    assert not (drive / "aside").exists()


def test_parts_of_what_is_not_finished_come_along_until_it_is(machine):
    first = machine("a")
    first.write("search/k/0.json", "part")
    os.utime(first.workspace.search / "k/0.json", (1_700_000_000, 1_700_000_000))
    first.write("training/backup", "network")
    first.save_run()
    second = machine("b")
    part = second.workspace.search / "k/0.json"
    assert (part.read_text(), part.stat().st_mtime) == ("part", 1_700_000_000)
    (second.workspace.training / "backup").unlink()
    second.save_run()
    back = machine("a")
    assert not (back.workspace.training / "backup").exists()
    assert (back.workspace.search / "k/0.json").exists()


def test_interrupted_step_saves_on_the_way_out(machine, tmp_path, drive):
    code = f"""if True:
        from helpers.colab import safe_copy
        from helpers.workspace import open_workspace
        ws = open_workspace({str(tmp_path / "a")!r})
        safe_copy.start(ws, {str(drive)!r}, "03")
        (ws.data / "part").write_text("done")
        raise KeyboardInterrupt
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True)
    assert b"KeyboardInterrupt" in done.stderr
    assert (machine("b").workspace.data / "part").read_text() == "done"


def test_copy_in_another_folder_is_a_new_one(machine, drive, tmp_path):
    run_id = machine("a").save_run()
    before = content(drive)
    Machine(tmp_path / "a", tmp_path / "other").copy.save()
    assert Machine(tmp_path / "b", tmp_path / "other").runs() == {run_id}
    assert content(drive) == before


# --- two at once ------------------------------------------------------------------------------


def test_work_goes_aside_whole_where_the_number_is_taken(machine, drive, tmp_path, capsys):
    common = machine("a").save_run()
    left, right = machine("b"), machine("c")
    by_left, by_right = left.save_run(), right.log_run()
    right.write("search/0.json", "part")
    with pytest.raises(SafeCopyError, match="b saved number 2 .*Run the cell again") as failed:
        right.copy.save()
    aside = the_one(drive / "aside")
    assert str(aside) in str(failed.value)
    # It is a workspace of its own.
    zipfile.ZipFile(aside).extractall(tmp_path / "aside")
    assert Machine(tmp_path / "aside", "off").runs() == {common, by_right}
    # The cell is run again, and the search goes on from its parts.
    assert right.runs() == {common, by_left}
    assert (right.workspace.search / "0.json").read_text() == "part"
    again = right.save_run()
    assert machine("d").runs() == {common, by_left, again}
    assert the_one(drive / "aside") == aside


def test_what_was_not_saved_goes_aside_where_the_copy_has_gone_on(machine, drive, capsys):
    first = machine("a")
    common = first.save_run()
    by_other = machine("b").save_run()
    unsaved = first.log_run()
    capsys.readouterr()
    back = machine("a")
    aside = the_one(drive / "aside")
    said = capsys.readouterr().out
    assert str(aside) in said
    assert "Run the cell again" in said
    assert back.runs() == {common, by_other}
    assert any(unsaved in name for name in names_in(aside))
    machine("a")
    assert the_one(drive / "aside") == aside


def test_workspace_of_its_own_goes_aside_before_the_copy_takes_its_place(machine, drive, tmp_path):
    run_id = machine("a").save_run()
    own = Machine(tmp_path / "b", "off").log_run()
    assert machine("b").runs() == {run_id}
    assert any(own in name for name in names_in(the_one(drive / "aside")))


def test_database_stays_where_the_copy_has_none_yet(machine, drive):
    first, second = machine("a"), machine("b")
    first.workspace.tracking_db.unlink()
    first.write("data/table.csv", "1")
    first.copy.save()
    run_id = second.log_run()
    with pytest.raises(SafeCopyError, match="Run the cell again"):
        second.copy.save()
    assert second.runs() == {run_id}
    second.copy.save()
    assert machine("c").runs() == {run_id}


@pytest.mark.parametrize("links", [True, False])
def test_number_taken_at_the_last_moment(machine, drive, monkeypatch, links):
    first, second = machine("a"), machine("b")
    runs = []

    def slowly(handle, fsync=os.fsync):
        fsync(handle)
        if not runs:
            runs.append(None)
            runs[0] = second.save_run()

    def no_links(*_):
        raise PermissionError

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "fsync", slowly)
    first.log_run()
    with pytest.raises(SafeCopyError, match="b saved number 1 .*Run the cell again"):
        first.copy.save()
    assert machine("c").runs() == first.runs() == set(runs)
    assert len(list((drive / "packs").iterdir())) == 1


# --- a damaged folder -------------------------------------------------------------------------


def _change_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def _encrypt(path):
    """Set the mark of encryption on the entries of a zip."""
    head, *entries = path.read_bytes().split(b"PK\x01\x02")
    marked = [entry[:4] + bytes([entry[4] | 1]) + entry[5:] for entry in entries]
    path.write_bytes(b"PK\x01\x02".join([head, *marked]))


def _become_another_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tracking.db", "[1, 2]")


def _become_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "changed": _change_a_byte,
    "foreign": lambda path: path.write_bytes(b"%PDF-1.7 \xe2\xe3\xcf\xd3"),
    "list": lambda path: path.write_text("[1, 2]"),
    "zip": _become_another_zip,
    "encrypted": _encrypt,
    "folder": _become_a_folder,
}
# A snapshot damaged so is no snapshot any more: the one before is the newest.
AWAY = ("missing", "encrypted")


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        *(("packs/00002-*.zip", name) for name in DAMAGE),
        *(("snapshots/00002.json", name) for name in DAMAGE if name not in AWAY),
    ],
)
def test_damage_is_named_repaired_and_an_older_snapshot_is_offered(
    machine, drive, tmp_path, pattern, damage, capsys
):
    first = machine("a")
    run_id = first.save_run()
    newer = first.save_run()
    damaged = the_one(drive, pattern)
    DAMAGE[damage](damaged)
    before = content(drive)
    with pytest.raises(SafeCopyError, match=f"{damaged.name} .*newest whole snapshot is number 1"):
        machine("b")
    assert list(content(tmp_path / "b")) in ([], [".copy/lock"])
    assert content(drive) == before
    # As it was advised: the newer one is moved away.
    shutil.copytree(drive, tmp_path / "advised")
    shutil.move(tmp_path / "advised/snapshots/00002.json", tmp_path / "moved")
    advised = Machine(tmp_path / "c", tmp_path / "advised")
    assert advised.runs() == {run_id}
    advised.save_run()
    # The machine that has everything repairs it, though it has nothing new.
    capsys.readouterr()
    machine("a").copy.save()
    assert damaged.name in capsys.readouterr().out
    assert machine("b").runs() == {run_id, newer}


def test_no_older_snapshot_is_whole(machine, drive):
    machine("a").save_run()
    DAMAGE["truncated"](the_one(drive / "packs"))
    with pytest.raises(SafeCopyError, match="No older snapshot is whole.*DRIVE_FOLDER"):
        machine("b")


@pytest.mark.parametrize(
    "path",
    [
        *("../out.txt", "/out.txt", "data/../../out.txt", "data/./x", "data//x", "data"),
        *("passwords.json", ".server/users.db", "data/.x/y", ".copy/base.json", "data/\0", ""),
    ],
)
def test_path_outside_the_workspace_is_refused(machine, drive, tmp_path, path):
    first = machine("a")
    first.write("data/table.csv", "1")
    first.copy.save()
    snapshot = the_one(drive / "snapshots")
    text = json.loads(snapshot.read_text())
    text["files"][path] = text["files"]["data/table.csv"]
    snapshot.write_text(json.dumps(text))
    with pytest.raises(SafeCopyError, match=f"{snapshot.name} .*no file of a workspace"):
        machine("b")
    assert list(content(tmp_path / "b")) == [".copy/lock"]


@pytest.mark.parametrize(
    "put",
    [
        lambda part, outside: part.symlink_to(outside),
        lambda part, outside: part.mkdir() or (part / "table.csv").symlink_to(outside / "mine"),
        lambda part, outside: (part / "table.csv").mkdir(parents=True),
        lambda part, outside: part.write_text("mine"),
    ],
    ids=["linked folder", "linked file", "folder", "file"],
)
def test_nothing_is_written_through_a_link_or_over_a_folder(machine, tmp_path, put):
    first = machine("a")
    first.write("data/part/table.csv", "new")
    first.save_run()
    workspace, outside = open_workspace(tmp_path / "b"), tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    put(workspace.data / "part", outside)
    with pytest.raises(SafeCopyError, match=r"data/part.* is in the way"):
        machine("b")
    assert content(outside) == {"mine": b"mine"}
    assert not workspace.tracking_db.exists()


def test_conflict_copies_and_other_files_are_named_and_left_alone(machine, drive, capsys):
    run_id = machine("a").save_run()
    for path in ("snapshots/00001 (1).json", "snapshots/00002 (1).json", "packs/notes.zip"):
        (drive / path).write_text("x")
    capsys.readouterr()
    other = machine("b")
    assert other.runs() == {run_id}
    said = capsys.readouterr().out
    assert "left alone" in said
    assert "snapshots/00001 (1).json, snapshots/00002 (1).json, packs/notes.zip" in said
    for _ in range(KEPT + 2):
        other.save_run()
    assert (drive / "snapshots/00001 (1).json").read_text() == "x"
    assert (drive / "packs/notes.zip").read_text() == "x"


def test_two_machines_that_both_got_one_number_lose_nothing(machine, drive, tmp_path):
    """Drive can show both that it is free, and then keeps the file of one of them."""
    late = Machine(tmp_path / "b", tmp_path / "as if it were drive")
    run_id, lost = machine("a").save_run(), late.save_run()
    assert machine("b").runs() == {run_id}
    assert any(lost in name for name in names_in(the_one(drive / "aside")))


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("reason", ["No space left on device", "Read-only file system"])
def test_save_that_is_cut_off_leaves_what_was_there(machine, drive, monkeypatch, when, reason):
    first = machine("a")
    run_id = first.save_run()
    newer = first.log_run()
    before, calls = content(drive), []

    def full(handle):
        calls.append(handle)
        if len(calls) > when:
            raise OSError(28, reason)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SafeCopyError, match=f"{reason}.*as it was.*run this cell again"):
        first.copy.save()
    assert content(drive) == before
    assert machine("b").runs() == {run_id}
    monkeypatch.undo()
    first.copy.save()
    assert machine("c").runs() == {run_id, newer}


@pytest.mark.parametrize("name", ["", "snapshots", "packs"])
def test_folder_that_cannot_be_used_is_named(workspace, drive, name):
    (drive / name).parent.mkdir(exist_ok=True)
    (drive / name).write_text("")
    with pytest.raises(SafeCopyError, match=r"drive is not writable.*DRIVE_FOLDER"):
        safe_copy.start(workspace, str(drive), "02")


def test_folder_inside_the_workspace_is_refused(workspace):
    with pytest.raises(SafeCopyError, match="inside the workspace"):
        safe_copy.start(workspace, str(workspace.root / "copy"), "02")


def test_copy_of_the_version_before_is_refused_and_stays_as_it_is(machine, drive):
    name = "00001-" + "0f" * 16
    for path in (f"snapshots/{name}.json", f"packs/{name}.zip", "machines/1.json"):
        (drive / path).parent.mkdir(parents=True, exist_ok=True)
        (drive / path).write_text('{"format": 1}')
    before = sorted(drive.rglob("*")), content(drive)
    with pytest.raises(SafeCopyError, match="earlier version .*DRIVE_FOLDER, such as drive_2"):
        machine("a")
    assert (sorted(drive.rglob("*")), content(drive)) == before


def test_copy_of_a_newer_version_is_refused(machine, drive):
    machine("a").save_run()
    snapshot = the_one(drive / "snapshots")
    snapshot.write_text(snapshot.read_text().replace('"format": 2', '"format": 3'))
    for name in ("a", "b"):
        with pytest.raises(SafeCopyError, match="newer version of this project. Update"):
            machine(name)


def test_old_snapshots_go_and_what_newer_ones_need_stays(machine, drive):
    first = machine("a")
    run_id = first.save_run()
    for day in range(25):
        first.write("data/note.txt", str(day))
        first.copy.save()
    (drive / "packs" / ".00003-1f.zip.5d.tmp").write_bytes(b"cut off long ago")
    first.write("data/note.txt", "last")
    first.copy.save()
    assert len(list((drive / "snapshots").iterdir())) == KEPT
    assert len(list((drive / "packs").iterdir())) == KEPT + 1
    later = machine("b")
    assert later.runs() == {run_id}
    assert (later.workspace.data / "note.txt").read_text() == "last"


# --- a damaged database -----------------------------------------------------------------------


def _without_tables(path):
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE runs (id)")


def _zero_pages(path):
    data = path.read_bytes()
    path.write_bytes(data[:4096] + bytes(8192) + data[12288:])


@pytest.mark.parametrize(
    "damage", [DAMAGE["empty"], DAMAGE["foreign"], _without_tables, _zero_pages]
)
def test_damaged_database_is_not_saved_and_fetched_when_it_is_away(machine, drive, damage):
    first = machine("a")
    run_id = first.save_run()
    before, database = content(drive), first.workspace.tracking_db
    damage(database)
    for step in (first.copy.save, lambda: machine("a")):
        with pytest.raises(SafeCopyError, match=r"tracking.db is damaged .*move the file out"):
            step()
    database.rename(first.workspace.root / "damaged.db")
    with pytest.raises(SafeCopyError, match=r"tracking.db is gone.*from the top"):
        first.copy.save()
    assert content(drive) == before
    machine("a")
    # Not with MLflow, which has the other file open.
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT run_uuid FROM runs").fetchall() == [(run_id,)]


# --- with a server, and kills -----------------------------------------------------------------


@pytest.mark.slow
def test_machine_catches_up_while_its_server_runs(workspace, machine, drive):
    with connected(workspace.root) as client:
        with tracking.start_run("before", "one") as run:
            mlflow.log_metric("m", 1.0)
        copy = safe_copy.start(workspace, str(drive), "03")
        copy.save()
        by_other = machine("b")
        run_id = by_other.save_run()
        # The server wrote nothing meanwhile: nothing is unsaved.
        copy = safe_copy.start(workspace, str(drive), "03")
        assert not (drive / "aside").exists()
        assert client.get_run(run_id).data.metrics == {"accuracy": 0.75}
        # The server goes on writing as before.
        with tracking.start_run("after", "two") as later:
            mlflow.log_metric("m", 1.0)
        copy.save()
        assert server.answers(mlflow.get_tracking_uri())
    last = machine("c").client
    for each in (run.info.run_id, run_id, later.info.run_id):
        assert last.get_run(each).info.status == "FINISHED"


def _work(disk, folder, ledger):
    """Log runs and save them until killed; note each run in the ledger once it is safe."""
    one = Machine(disk, folder)
    while True:
        run_id = one.save_run()
        with ledger.open("a") as file:
            file.write(f"{run_id}\n")


@pytest.mark.slow
def test_nothing_that_was_saved_is_lost_in_thirty_kills(tmp_path, drive):
    random, ledger = np.random.default_rng(0), tmp_path / "ledger"
    ledger.touch()
    context = multiprocessing.get_context("fork")
    unsaved = 0
    for number in range(30):
        # Every third time a machine that was there before comes back, with what it had.
        disk = tmp_path / f"disk{number if number % 3 else number // 2}"
        worker = context.Process(target=_work, args=(disk, drive, ledger))
        worker.start()
        time.sleep(random.uniform(0.05, 1.5))
        worker.kill()
        worker.join()
        fresh = Machine(tmp_path / f"fresh{number}", drive)
        found, promised = fresh.runs(), set(ledger.read_text().split())
        assert promised <= found
        unsaved += len(found) > len(promised)
    assert len(promised) > 30
    # Some of the kills were in the few moments between a save and its note.
    assert unsaved
    safe_copy._running.clear()
