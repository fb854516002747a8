"""Runs: whose server they are on, how they end, how they are found; and what a row's hash is."""

import os
import signal
import subprocess

import mlflow
import numpy as np
import pandas as pd
import pytest

from helpers import tracking
from helpers.server import credentials
from helpers.tracking import runs
from helpers.workspace import open_workspace
from tests.series import start_python


def status(run):
    return mlflow.MlflowClient().get_run(run.info.run_id).info.status


# --- connecting -------------------------------------------------------------------------------


def test_named_server_is_used_instead_of_an_own_one(workspace, running_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running_server.url)
    assert tracking.connect(workspace) == running_server.url
    assert mlflow.get_tracking_uri() == running_server.url
    assert os.environ["MLFLOW_TRACKING_URI"] == running_server.url
    assert not workspace.server.exists()


def test_connecting_leaves_no_variable_that_would_name_a_server(running_server):
    # MLflow sets it wherever the address is another one than before.
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    del os.environ["MLFLOW_TRACKING_URI"]
    tracking.connect(running_server.workspace, keep=False)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert os.environ[runs.USER] == credentials.NOTEBOOKS


# --- how runs end -----------------------------------------------------------------------------


def test_run_is_finished_after_the_block(tracking_server):
    with tracking.start_run("endings", "good") as run:
        assert status(run) == "RUNNING"
    assert status(run) == "FINISHED"
    assert mlflow.active_run() is None


@pytest.mark.parametrize(
    ("error", "ending"),
    [(ValueError, "FAILED"), (SystemExit, "FAILED"), (KeyboardInterrupt, "KILLED")],
)
def test_run_says_how_it_ended_and_the_error_goes_on(tracking_server, error, ending):
    with pytest.raises(error), tracking.start_run("endings", error.__name__) as run:
        raise error
    assert status(run) == ending
    assert mlflow.active_run() is None


def test_run_left_open_before_is_closed_by_the_next(tracking_server):
    left = mlflow.start_run(experiment_id=runs.open_experiment("endings"))
    with tracking.start_run("endings", "next") as run:
        assert run.info.run_id != left.info.run_id
        assert "mlflow.parentRunId" not in run.data.tags
    assert status(left) != "RUNNING"


def test_signal_handler_of_the_process_is_put_back(tracking_server):
    before = signal.getsignal(signal.SIGTERM)
    with tracking.start_run("endings", "handler"):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_deleted_experiment_is_restored(tracking_server):
    first = runs.open_experiment("deleted once")
    mlflow.MlflowClient().delete_experiment(first)
    assert runs.open_experiment("deleted once") == first
    assert mlflow.get_experiment(first).lifecycle_stage == "active"


TRAINING = """
import sys, time
from helpers import tracking
from helpers.workspace import open_workspace
tracking.connect(open_workspace(sys.argv[1]), keep=False)
with tracking.start_run("endings", "signal") as run:
    print(run.info.run_id, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def training(tracking_server):
    """A process in the middle of a run, and the run."""
    root = tracking_server.workspace.root
    process = start_python("-c", TRAINING, root, stderr=subprocess.PIPE)
    run = mlflow.MlflowClient().get_run(process.stdout.readline().strip())
    yield process, run
    process.kill()
    process.communicate()


def test_terminated_process_marks_its_run_as_killed(training):
    process, run = training
    assert status(run) == "RUNNING"
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert status(run) == "KILLED"


def test_run_of_a_vanished_process_is_marked_as_killed_by_the_next_connection(
    training, tracking_server
):
    process, run = training
    tracking.connect(tracking_server.workspace, keep=False)
    assert status(run) == "RUNNING"
    process.kill()
    process.communicate(timeout=120)
    assert status(run) == "RUNNING"
    tracking.connect(tracking_server.workspace, keep=False)
    assert status(run) == "KILLED"


def test_run_of_another_machine_is_left_alone(tracking_server):
    experiment = runs.open_experiment("endings")
    tags = {"process.host": "elsewhere", "process.pid": "1", "process.created": "0"}
    run = mlflow.MlflowClient().create_run(experiment, tags=tags)
    tracking.connect(tracking_server.workspace, keep=False)
    assert status(run) == "RUNNING"
    mlflow.MlflowClient().set_terminated(run.info.run_id)


def test_connecting_keeps_the_open_run_of_this_process(tracking_server):
    with tracking.start_run("endings", "own") as run:
        tracking.connect(open_workspace(tracking_server.workspace.root), keep=False)
        assert status(run) == "RUNNING"
    assert status(run) == "FINISHED"


# --- finding runs -----------------------------------------------------------------------------


def test_run_of_the_own_workspace_comes_before_a_newer_one_of_another(
    tracking_server, workspace, monkeypatch
):
    assert tracking.latest_run("shared", "one") is None
    with tracking.start_run("shared", "one") as mine:
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server.url)
    tracking.connect(workspace)
    assert not tracking.is_own(tracking.latest_run("shared", "one"))
    with tracking.start_run("shared", "one") as theirs:
        pass
    assert tracking.latest_run("shared", "one").info.run_id == theirs.info.run_id
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracking_server.connect()
    found = tracking.latest_run("shared", "one")
    assert found.info.run_id == mine.info.run_id
    assert tracking.is_own(found)


def test_run_that_is_kept_is_written_again_only_if_its_tags_change(tracking_server):
    client, keys = mlflow.MlflowClient(), {"period": "today"}
    written = []
    for content, rows in (("a", 1), ("a", 2), ("b", 3)):
        tags = {**keys, "content": content}
        tracking.keep_run(client, "kept", "one", keys, tags, {"rows": rows})
        (run,) = mlflow.search_runs(experiment_names=["kept"], output_format="list")
        written.append((run.data.tags["content"], run.data.metrics["rows"]))
    assert written == [("a", 1), ("a", 1), ("b", 3)]


# --- rows -------------------------------------------------------------------------------------


def test_hash_of_a_row_depends_on_its_values_alone():
    frame = pd.DataFrame(
        {"n": [1, 2, 0], "x": [0.5, np.nan, 0.0], "b": [True, False, True], "t": ["é", None, "é"]}
    )
    frame["t"] = frame["t"].astype(object)
    hashes = tracking.row_hashes(frame)
    assert hashes.is_unique
    assert hashes.str.fullmatch("[0-9a-f]{16}").all()
    other = frame.astype({"n": "float64", "b": "int64"}).set_axis([7, 8, 9])[list("txbn")]
    other.loc[9, "n"] = -0.0
    other.loc[8, "t"] = np.nan
    assert tracking.row_hashes(other).tolist() == hashes.tolist()
    assert tracking.row_hashes(other).index.tolist() == [7, 8, 9]
    renamed = frame.rename(columns={"n": "x", "x": "n"})
    assert not set(tracking.row_hashes(renamed.iloc[:2])) & set(hashes)
