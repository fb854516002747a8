"""Secrets that are given, and passwords that are made."""

import json
import stat
import sys
import threading
from pathlib import Path

import pytest

from helpers.server import credentials
from helpers.server.credentials import AccessError, password_of
from helpers.workspace import PROJECT_ROOT
from tests.doubles.colab import BATCH, PAGE, VS_CODE, ColabMachine

TOKEN = "2token0123456789abcdefghijk_secret"


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A kernel of Colab; what it runs can look secrets up."""
    folder = tmp_path_factory.mktemp("colab")
    secrets = {"NGROK_AUTHTOKEN": TOKEN, "NGROK_DOMAIN": None}
    machine = ColabMachine(Path(sys.executable), folder / "disk", folder / "drive", secrets)
    machine.run(f"import os, sys; sys.path.insert(0, {str(PROJECT_ROOT)!r})")
    machine.run("from helpers import server, workspace; workspace.PATIENCE = 0.5")
    machine.run("from helpers.server.credentials import find_secret")
    yield machine
    machine.vanish()


@pytest.fixture
def look_up(machine):
    """Return what a cell finds under a name, and what it says besides."""

    def run(name, front_end, **environment):
        machine.front_end = front_end
        machine.run(f"os.environ |= {environment}")
        found, error = machine.run(f"print(find_secret({name!r}))")
        machine.run(f"for name in {list(environment)}: del os.environ[name]")
        machine.front_end = PAGE
        assert error is None, error
        *said, value = found.splitlines()
        return value, "\n".join(said)

    return run


def test_colab_secret_wins_over_the_environment(look_up):
    given = {"NGROK_AUTHTOKEN": " from the environment\n"}
    assert look_up("NGROK_AUTHTOKEN", PAGE, **given) == (TOKEN, "")
    assert look_up("SCORING_PASSWORD", PAGE, SCORING_PASSWORD=" given ") == ("given", "")
    assert look_up("SCORING_PASSWORD", PAGE) == ("None", "")


@pytest.mark.parametrize(("front_end", "asked"), [(BATCH, []), (VS_CODE, [False])])
def test_without_colabs_page_the_environment_has_the_secrets(machine, look_up, front_end, asked):
    before = len(machine.requests)
    given = {"NGROK_AUTHTOKEN": " from the environment\n"}
    assert look_up("NGROK_AUTHTOKEN", front_end, **given) == ("from the environment", "")
    # Whether somebody is there is asked for a moment, and only where somebody may be.
    assert [answered for _, answered, _ in machine.requests[before:]] == asked
    assert all(seconds < 1 for _, _, seconds in machine.requests[before:])


def test_colab_secret_that_the_notebook_may_not_read_is_said(look_up):
    value, said = look_up("NGROK_DOMAIN", PAGE, NGROK_DOMAIN="mine.ngrok.app")
    assert value == "mine.ngrok.app"
    assert "NGROK_DOMAIN" in said
    assert "Notebook access" in said


def test_secrets_are_handed_on_to_what_a_cell_starts_and_not_shown(machine):
    shown, error = machine.run("server.hand_on_secrets()")
    assert error is None, error
    assert "NGROK_AUTHTOKEN" in shown
    assert TOKEN not in shown
    code = f"import os, sys; sys.exit(os.environ.get('NGROK_AUTHTOKEN') != {TOKEN!r})"
    done = machine.run(f"import subprocess; subprocess.call([sys.executable, '-c', {code!r}])")
    assert done == ("0\n", None)
    machine.run("del os.environ['NGROK_AUTHTOKEN']")


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
