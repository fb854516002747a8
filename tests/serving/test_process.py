import signal
import sqlite3

import psutil
import pytest

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
def test_killed_server_is_started_again_with_nothing_lost(served):
    rows, database = served.split.X_test.head(3), served.workspace.scored_rows
    killed = processes.read_state(served.workspace.scoring)
    answer = serving.ask(served.client, SVM, rows)
    assert scored_rows.wait_for(database, answer.index[-1])
    psutil.Process(killed.pid).send_signal(signal.SIGKILL)
    assert wait_for(lambda: processes.read_state(served.workspace.scoring) is None)
    with pytest.raises(serving.ServingError, match="does not answer"):
        serving.ask(served.client, SVM, rows)
    again = serving.start(served.workspace, keep=False)
    assert processes.read_state(served.workspace.scoring).pid != killed.pid
    assert len(serving.ask(again, SVM, rows)) == 3
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert scored_rows.known_rows(database, answer.index) == set(answer.index)
