"""A team's MLflow server with PostgreSQL: two series at once, and nothing gets mixed up."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest

from helpers import registry, server, tracking
from helpers.workspace import open_workspace
from tests.series import (
    ONE_PAIR,
    RUNS,
    clean_environment,
    run_series,
    start_python,
    wait_for,
)

pytestmark = pytest.mark.slow

QUICK = (*ONE_PAIR, "-p", "EPOCHS", "3", "-p", "ATTACKED_ROWS", "5")


def _find(program):
    """Find a program of PostgreSQL; Debian keeps it out of the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(program) or shutil.which(program, path=os.pathsep.join(map(str, folders)))


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextmanager
def _postgres():
    if _find("initdb") is None:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    # Not in pytest's folder, which is closed to others: PostgreSQL refuses to run as root.
    with tempfile.TemporaryDirectory() as folder:
        port, data, as_user = _free_port(), Path(folder) / "data", []
        if getpass.getuser() == "root":
            as_user = ["runuser", "-u", "postgres", "--"]
            shutil.chown(folder, "postgres")

        def run(program, *arguments):
            command = [*as_user, _find(program), "-D", data, *arguments]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)

        run("initdb", "--auth=trust", "--username=mlflow", "--no-sync")
        places = f"-c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        run("pg_ctl", "-l", f"{folder}/log", "-o", f"{places} -c port={port}", "-w", "start")
        try:
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")


@pytest.fixture(scope="module")
def team_server(tmp_path_factory):
    """An MLflow server as a team would start it; yields its address."""
    folder = tmp_path_factory.mktemp("team")
    with _postgres() as store:
        port = _free_port()
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "2"),
            *("--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=clean_environment(), start_new_session=True
            )
        url = f"http://127.0.0.1:{port}"
        try:
            assert wait_for(lambda: process.poll() is not None or server.answers(url), 120), (
                folder / "log"
            ).read_text()
            yield url
        finally:
            os.killpg(process.pid, 15)
            process.wait(30)


@pytest.fixture
def client(team_server, workspace, monkeypatch):
    """This process as one more workspace of the team."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team_server)
    tracking.connect(workspace)
    return mlflow.MlflowClient()


def in_production(client, name):
    """Return the versions with the alias, and those with the stage."""
    aliased = client.get_model_version_by_alias(name, "production").version
    every = client.search_model_versions(f"name = '{name}'")
    return str(aliased), [str(v.version) for v in every if v.current_stage == "Production"]


def test_two_series_at_once_on_one_server_keep_apart(team_server, tmp_path, client):
    folders = [tmp_path / "ana", tmp_path / "luis"]
    arguments = ("--data", "sample", "--only", "01,02,03,04", *QUICK)
    with ThreadPoolExecutor() as pool:
        done = list(
            pool.map(
                lambda folder: run_series(folder, *arguments, MLFLOW_TRACKING_URI=team_server),
                folders,
            )
        )
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    ids = {open_workspace(folder).id for folder in folders}
    for name, (experiment, run_name) in RUNS.items():
        # The same data and seed: only the series tells the runs apart.
        versions = client.search_model_versions(f"name = '{name}'")
        runs = [client.get_run(version.run_id) for version in versions]
        assert {run.data.tags["series"] for run in runs} == ids
        assert len({run.data.tags["split_digest"] for run in runs}) == 1
        assert len(versions) == 2
        assert {run.info.run_name for run in runs} == {run_name}
        assert {client.get_experiment(run.info.experiment_id).name for run in runs} == {experiment}
        aliased, staged = in_production(client, name)
        assert staged == [aliased]
        events = registry.history(name)
        assert sorted(events["to_version"]) == ["1", "2"]
        assert set(events["result"]) == {"FINISHED"}
        for folder, each in zip(folders, done, strict=True):
            own = open_workspace(folder).id
            (mine,) = (run for run in runs if run.data.tags["series"] == own)
            assert mine.info.run_id in each.stdout
    for folder in folders:
        # Artifacts go through the server, and nothing of MLflow's is on the machine.
        assert not open_workspace(folder).tracking_db.exists()


def test_promotions_at_the_same_moment_leave_one_version_in_production(client, tmp_path):
    name = "model_promoted_by_many"
    client.create_registered_model(name)
    with tracking.start_run("many", "one") as run:
        mlflow.log_metric("f1_macro", 0.5)
    versions = [
        str(
            client.create_model_version(
                name, f"runs:/{run.info.run_id}/model", run.info.run_id
            ).version
        )
        for _ in range(4)
    ]
    start = threading.Barrier(len(versions))
    code = (
        "import sys; from helpers import registry, tracking; "
        "from helpers.workspace import open_workspace; "
        "tracking.connect(open_workspace(sys.argv[1])); print('ready', flush=True); "
        "sys.stdin.readline(); registry.promote(sys.argv[2], sys.argv[3], 'race')"
    )

    def promote(version):
        process = start_python("-c", code, tmp_path / version, name, version)
        assert process.stdout.readline() == "ready\n"
        start.wait()
        process.communicate("go\n")
        return process.returncode

    with ThreadPoolExecutor(len(versions)) as pool:
        assert list(pool.map(promote, versions)) == [0] * len(versions)
    aliased, staged = in_production(client, name)
    assert staged == [aliased]
    events = registry.history(name)
    assert sorted(events["to_version"]) == versions
    assert set(events["result"]) == {"FINISHED"}
