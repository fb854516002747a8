import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import psutil
import pytest
import requests

from helpers import series, serving
from helpers.server import processes
from helpers.serving import process, scored_rows
from helpers.workspace import MissingStepError
from tests.scoring import SVM
from tests.series import wait_for


def test_outside_address_gets_a_password(workspace, monkeypatch):
    assert process.service(workspace).environment == {}
    made = process.service(workspace, "0.0.0.0").environment["SCORING_PASSWORD"]
    assert len(made) >= 20
    assert oct(workspace.passwords.stat().st_mode)[-3:] == "600"
    monkeypatch.setenv("SCORING_PASSWORD", "a password that was given")
    chosen = process.service(workspace, "0.0.0.0").environment["SCORING_PASSWORD"]
    assert chosen == "a password that was given"


def test_without_production_the_notebook_to_run_is_named(tracking_server, monkeypatch):
    monkeypatch.setattr(series, "MODELS", {"model_that_is_not_there": series.MODELS[SVM]})
    with pytest.raises(MissingStepError, match="04_registry_promotion"):
        serving.start(tracking_server.workspace)


@pytest.mark.slow
def test_server_killed_under_load_is_started_again_with_nothing_lost(served):
    rows, database = served.split.X_test.head(3), served.workspace.scored_rows
    killed = processes.read_state(served.workspace.scoring)
    answered = []

    def ask():
        with suppress(serving.ServingError), closing(served.client.session()) as session:
            while True:
                answered.append(serving.ask(served.client, SVM, rows, session).index[-1])

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(ask)
        assert wait_for(lambda: len(answered) > 50)
        kept = scored_rows.known_rows(database, answered)
        psutil.Process(killed.pid).send_signal(signal.SIGKILL)
    assert wait_for(lambda: processes.read_state(served.workspace.scoring) is None)
    with pytest.raises(serving.ServingError, match="does not answer"):
        serving.ask(served.client, SVM, rows)
    again = serving.start(served.workspace, keep=False)
    assert processes.read_state(served.workspace.scoring).pid != killed.pid
    assert len(serving.ask(again, SVM, rows)) == 3
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert kept
    assert scored_rows.known_rows(database, kept) == kept


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="needs Linux")
def test_server_whose_disk_is_full_answers_and_says_so(served):
    rows, address = served.split.X_test.head(1), f"{served.client.url}/models"
    process = psutil.Process(processes.read_state(served.workspace.scoring).pid)
    before = requests.get(address, timeout=30).json()
    _, most = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (0, most))
    try:
        assert len(serving.ask(served.client, SVM, rows)) == 1
        lost = before["not_recorded"] + 1
        assert wait_for(lambda: requests.get(address, timeout=30).json()["not_recorded"] == lost)
        assert "not recorded" in requests.get(address, timeout=30).json()["recording"]
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, (most, most))
    answer = serving.ask(served.client, SVM, rows)
    assert scored_rows.wait_for(served.workspace.scored_rows, answer.index[0])
    assert requests.get(address, timeout=30).json()["recording"] == before["recording"]


def test_file_of_scored_rows_that_is_damaged_is_told_in_models_at_once(served):
    path = served.workspace.scored_rows
    path.write_bytes(b"no database " * 1000)
    told = requests.get(f"{served.client.url}/models", timeout=30).json()["recording"]
    (aside,) = path.parent.glob("scored.damaged-*.db")
    assert aside.name in told
    answer = serving.ask(served.client, SVM, served.split.X_test.head(1))
    assert scored_rows.wait_for(path, answer.index[0])
    aside.unlink()
