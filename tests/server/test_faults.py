"""The MLflow server when its process, or its disk, goes away under load."""

import sqlite3
import subprocess
import threading
from contextlib import closing

import psutil
import pytest
import requests

from helpers import server
from helpers.server.http import local_session
from helpers.workspace import WorkspaceError, open_workspace
from tests.series import wait_for

API = "/api/2.0/mlflow"


def started(workspace):
    process = server.start_server(workspace, keep=False)
    server.service(workspace).wait(process)
    return process


class Load:
    """Threads that log parameters; what was answered with 200 is in `kept`."""

    def __init__(self, url, run_id):
        self.kept, self._stop = set(), threading.Event()
        self._threads = [
            threading.Thread(target=self._log, args=(url, run_id, number)) for number in range(4)
        ]

    def _log(self, url, run_id, number):
        session, count = local_session(), 0
        while not self._stop.is_set():
            count += 1
            content = {"run_id": run_id, "key": f"p{number}_{count}", "value": "x"}
            try:
                answer = session.post(f"{url}{API}/runs/log-parameter", json=content, timeout=10)
            except requests.RequestException:
                return
            if answer.ok:
                self.kept.add(content["key"])

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        assert wait_for(lambda: len(self.kept) > 20)
        return self

    def __exit__(self, *error):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def new_run(url):
    content = {"experiment_id": "0"}
    return requests.post(f"{url}{API}/runs/create", json=content).json()["run"]["info"]["run_id"]


def logged(url, run_id):
    run = requests.get(f"{url}{API}/runs/get", params={"run_id": run_id}).json()["run"]
    return {each["key"] for each in run["data"].get("params", [])}


@pytest.mark.slow
def test_server_that_is_killed_under_load_loses_nothing_that_it_answered(workspace):
    try:
        process = started(workspace)
        run_id = new_run(process.url)
        with Load(process.url, run_id) as load:
            psutil.Process(process.pid).kill()
        again = started(workspace)
        assert logged(again.url, run_id) >= load.kept
        with closing(sqlite3.connect(workspace.tracking_db)) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finally:
        server.stop_server(workspace)


@pytest.fixture
def used(small_disk):
    """A server with its workspace on a small disk, and a run of it."""
    workspace = open_workspace(small_disk[0] / "ws")
    try:
        url = started(workspace).url
        yield workspace, url, new_run(url)
        assert (workspace.server / "log.txt").stat().st_size < 6_000_000
    finally:
        server.stop_server(workspace)


@pytest.mark.slow
def test_full_disk_is_an_error_and_afterwards_all_goes_on(used):
    workspace, url, run_id = used
    with Load(url, run_id) as load:
        filler = workspace.root.with_name("filler")
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
            while True:
                file.write(bytes(4096))
        before = len(load.kept)
        content = {"run_id": run_id, "key": "big", "value": "x" * 500_000}
        address = f"{url}{API}/runs/set-tag"
        assert wait_for(lambda: requests.post(address, json=content).status_code >= 400)
        assert server.answers(url)
        filler.unlink()
        assert wait_for(lambda: len(load.kept) > before + 20)
    assert logged(url, run_id) >= load.kept
    with closing(sqlite3.connect(workspace.tracking_db)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_disk_that_is_read_only_is_said_and_stays_as_it_is(small_disk):
    folder, mount = small_disk
    workspace = open_workspace(folder / "ws")
    workspace.tracking_db.write_bytes(b"kept")
    assert mount("remount,ro")
    with pytest.raises(WorkspaceError, match="is not writable"):
        open_workspace(workspace.root)
    assert workspace.tracking_db.read_bytes() == b"kept"


@pytest.mark.slow
def test_disk_that_becomes_read_only_is_an_error_and_afterwards_all_goes_on(used):
    workspace, url, run_id = used
    root = workspace.root
    with Load(url, run_id) as load:
        # What is opened from now on lies on it; a disk in use is not mounted anew.
        subprocess.run(["mount", "--bind", root, root], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", root], check=True)
        try:
            content = {"run_id": run_id, "key": "a", "value": "x"}
            address = f"{url}{API}/runs/set-tag"
            assert wait_for(lambda: requests.post(address, json=content).status_code >= 400)
            file = f"{url}/api/2.0/mlflow-artifacts/artifacts/0/{run_id}/artifacts/a.txt"
            assert requests.put(file, data=b"x").status_code >= 400
            assert server.answers(url)
            assert logged(url, run_id) >= load.kept
        finally:
            subprocess.run(["umount", "-l", root], check=True)
        before = len(load.kept)
        assert wait_for(lambda: len(load.kept) > before + 20)
    assert logged(url, run_id) >= load.kept
