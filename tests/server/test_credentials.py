"""Secrets that are given, and passwords that are made."""

import json
import stat
import sys
import threading
import types

import pytest

from helpers.server import credentials
from helpers.server.credentials import AccessError, find_secret, password_of

TOKEN = "2token0123456789abcdefghijk_secret"


@pytest.fixture
def colab(monkeypatch):
    """Make this a Colab runtime; ``colab(get)`` answers for ``userdata.get``."""

    def make(get):
        package, userdata = types.ModuleType("google.colab"), types.ModuleType("userdata")
        userdata.SecretNotFoundError = type("SecretNotFoundError", (Exception,), {})
        userdata.NotebookAccessError = type("NotebookAccessError", (Exception,), {})
        userdata.TimeoutException = type("TimeoutException", (Exception,), {})
        userdata.get = lambda name: get(userdata, name)
        package.userdata = userdata
        monkeypatch.setitem(sys.modules, "google.colab", package)
        monkeypatch.setitem(sys.modules, "google.colab.userdata", userdata)

    return make


def failing(error):
    """Return a ``get`` that raises the error of that name."""

    def get(userdata, name):
        raise getattr(userdata, error)(name)

    return get


def test_colab_secret_wins_over_the_environment_but_not_in_a_batch_run(colab, monkeypatch):
    monkeypatch.setenv("NGROK_AUTHTOKEN", " from the environment\n")
    assert find_secret("NGROK_AUTHTOKEN") == "from the environment"
    colab(lambda userdata, name: {"NGROK_AUTHTOKEN": TOKEN}[name])
    assert find_secret("NGROK_AUTHTOKEN") == TOKEN
    monkeypatch.setattr(credentials, "is_batch", lambda: True)
    assert find_secret("NGROK_AUTHTOKEN") == "from the environment"


@pytest.mark.parametrize("error", ["SecretNotFoundError", "TimeoutException"])
def test_secret_that_colab_does_not_give_is_looked_for_in_the_environment(
    colab, monkeypatch, error
):
    colab(failing(error))
    assert find_secret("NGROK_AUTHTOKEN") is None
    monkeypatch.setenv("NGROK_AUTHTOKEN", TOKEN)
    assert find_secret("NGROK_AUTHTOKEN") == TOKEN


def test_colab_secret_that_the_notebook_may_not_read_is_said(colab, capsys):
    colab(failing("NotebookAccessError"))
    assert find_secret("NGROK_AUTHTOKEN") is None
    shown = capsys.readouterr().out
    assert "NGROK_AUTHTOKEN" in shown
    assert "Notebook access" in shown


def test_nobody_is_asked_where_nobody_can_answer(capsys):
    assert credentials.ask_secret("NGROK_AUTHTOKEN", "Get one.") is None
    assert capsys.readouterr().out == ""


def test_made_password_is_long_kept_and_readable_by_its_owner_only(workspace):
    made = password_of(workspace, "ana")
    assert len(made) >= 20
    assert password_of(workspace, "ana") == made
    assert password_of(workspace, "luis") != made
    assert stat.S_IMODE(workspace.passwords.stat().st_mode) == 0o600
    assert json.loads(workspace.passwords.read_text())["ana"] == made


def test_password_from_a_secret_is_used_and_not_written_down(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_PASSWORD_ANA_MARIA", "correct horse battery")
    assert password_of(workspace, "ana-maria") == "correct horse battery"
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "another long password")
    assert password_of(workspace, "admin") == "another long password"
    assert not workspace.passwords.exists()


def test_password_that_is_too_short_is_refused_by_name(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_PASSWORD_ANA", "short")
    with pytest.raises(AccessError, match="MLFLOW_PASSWORD_ANA is too short") as caught:
        password_of(workspace, "ana")
    assert "'short'" not in str(caught.value)


def test_passwords_made_at_the_same_time_are_all_kept(workspace):
    names = [f"user{number}" for number in range(20)]
    threads = [threading.Thread(target=password_of, args=(workspace, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(credentials.stored_secrets(workspace)) == set(names)
