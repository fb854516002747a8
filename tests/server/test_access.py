import json
import stat
import sys
import threading
import types

import pandas as pd
import psutil
import pytest

from helpers import plots
from helpers.server import activity, credentials, users
from helpers.server.credentials import AccessError
from helpers.server.users import AccessRules
from helpers.settings import check_parameters
from helpers.workspace import ParameterError

TOKEN = "2token0123456789abcdefghijk_secret"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


class FakeUserdata(types.ModuleType):
    """Colab's `userdata`: the secrets of an account, of which a notebook may read some."""

    class SecretNotFoundError(Exception):
        pass

    class NotebookAccessError(Exception):
        pass

    def __init__(self, **secrets):
        super().__init__("google.colab.userdata")
        self.secrets = secrets

    def get(self, name):
        if name not in self.secrets:
            raise self.SecretNotFoundError(name)
        if self.secrets[name] is None:
            raise self.NotebookAccessError(name)
        return self.secrets[name]


@pytest.fixture
def colab(monkeypatch):
    """Make this a Colab runtime with the given secrets."""

    def make(**secrets):
        package, userdata = types.ModuleType("google.colab"), FakeUserdata(**secrets)
        package.userdata = userdata
        monkeypatch.setitem(sys.modules, "google.colab", package)
        monkeypatch.setitem(sys.modules, "google.colab.userdata", userdata)

    return make


# --- secrets and passwords ---------------------------------------------------------------------


def test_colab_secret_wins_over_the_environment(colab, monkeypatch):
    monkeypatch.setenv("NGROK_AUTHTOKEN", "from the environment")
    assert credentials.find_secret("NGROK_AUTHTOKEN") == "from the environment"
    colab(NGROK_AUTHTOKEN=TOKEN)
    assert credentials.find_secret("NGROK_AUTHTOKEN") == TOKEN


def test_secret_that_colab_does_not_know_is_looked_for_in_the_environment(colab, monkeypatch):
    colab()
    assert credentials.find_secret("NGROK_AUTHTOKEN") is None
    monkeypatch.setenv("NGROK_AUTHTOKEN", f" {TOKEN}\n")
    assert credentials.find_secret("NGROK_AUTHTOKEN") == TOKEN


def test_batch_run_in_colab_asks_the_environment_alone(colab, monkeypatch):
    colab(NGROK_AUTHTOKEN="of the front end")
    monkeypatch.setattr(credentials, "is_batch", lambda: True)
    assert credentials.find_secret("NGROK_AUTHTOKEN") is None


def test_front_end_that_does_not_answer_has_no_secrets(colab, monkeypatch):
    colab()
    userdata = sys.modules["google.colab.userdata"]
    userdata.TimeoutException = TimeoutError

    def get(name):
        raise TimeoutError(name)

    monkeypatch.setattr(userdata, "get", get)
    assert credentials.find_secret("NGROK_AUTHTOKEN") is None


def test_colab_secret_that_the_notebook_may_not_read_is_said(colab, capsys):
    colab(NGROK_AUTHTOKEN=None)
    assert credentials.find_secret("NGROK_AUTHTOKEN") is None
    shown = capsys.readouterr().out
    assert "NGROK_AUTHTOKEN" in shown
    assert "Notebook access" in shown


def test_nobody_is_asked_where_nobody_can_answer(capsys):
    assert credentials.ask_secret("NGROK_AUTHTOKEN", "Get one.") is None
    assert capsys.readouterr().out == ""


def test_made_password_is_long_kept_and_readable_by_its_owner_only(workspace):
    made = credentials.password_of(workspace, "ana")
    assert len(made) >= 20
    assert credentials.password_of(workspace, "ana") == made
    assert credentials.password_of(workspace, "luis") != made
    assert mode(workspace.passwords) == 0o600
    assert json.loads(workspace.passwords.read_text())["ana"] == made


def test_password_from_a_secret_is_used_and_not_written_down(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_PASSWORD_ANA_MARIA", "correct horse battery")
    assert credentials.password_of(workspace, "ana-maria") == "correct horse battery"
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "another long password")
    assert credentials.password_of(workspace, "admin") == "another long password"
    assert not workspace.passwords.exists()


def test_password_that_is_too_short_is_refused_by_name(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_PASSWORD_ANA", "short")
    with pytest.raises(AccessError, match="MLFLOW_PASSWORD_ANA is too short") as caught:
        credentials.password_of(workspace, "ana")
    assert "'short'" not in str(caught.value)


def test_passwords_made_at_the_same_time_are_all_kept(workspace):
    names = [f"user{number}" for number in range(20)]
    threads = [
        threading.Thread(target=credentials.password_of, args=(workspace, name)) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(json.loads(workspace.passwords.read_text())) == set(names)


# --- users and rules ---------------------------------------------------------------------------


def test_table_of_users_is_read_and_always_has_the_admin():
    assert users.parse_users(["ana:reader", " luis : editor "]) == {
        "admin": "admin",
        "ana": "reader",
        "luis": "editor",
    }


@pytest.mark.parametrize(
    "entry",
    ["ana", "ana:", ":reader", "ana:boss", "1ana:reader", "a na:reader", "../x:reader"],
)
def test_entry_that_is_no_user_is_refused_with_the_roles(entry):
    with pytest.raises(ParameterError, match="reader, editor, admin"):
        users.parse_users([entry])


@pytest.mark.parametrize(
    "entries",
    [["notebooks:reader"], ["local:admin"], ["admin:reader"], ["ana:reader", "ana:editor"]],
)
def test_user_that_the_series_needs_or_named_twice_is_refused(entries):
    with pytest.raises(ParameterError, match="UI_USERS"):
        users.parse_users(entries)


@pytest.mark.parametrize("value", ["auto", True, False])
def test_allowed_values_of_expose_ui(value):
    assert check_parameters(EXPOSE_UI=value)["EXPOSE_UI"] is value


@pytest.mark.parametrize("value", ["yes", "true", None, 2])
def test_other_value_of_expose_ui_is_refused_with_those_allowed(value):
    with pytest.raises(ParameterError, match="EXPOSE_UI must be one of 'auto', True, False"):
        check_parameters(EXPOSE_UI=value)


@pytest.mark.parametrize("text", ["ana:reader, luis:editor", '["ana:reader", "luis:editor"]'])
def test_users_are_named_in_the_environment(monkeypatch, text):
    monkeypatch.setenv("UI_USERS", text)
    expected = {"admin": "admin", "ana": "reader", "luis": "editor"}
    assert users.users_of_environment() == expected


def test_without_the_setting_the_users_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("UI_USERS", " ")
    assert users.users_of_environment() is None


@pytest.mark.parametrize("text", ["[broken", "[1]", "ana"])
def test_users_that_cannot_be_read_are_refused(monkeypatch, text):
    monkeypatch.setenv("UI_USERS", text)
    with pytest.raises(ParameterError, match="UI_USERS"):
        users.users_of_environment()


def test_everyone_is_let_in_only_where_that_is_said_clearly(monkeypatch):
    said = {"": False, "0": False, "False": False, "1": True, "true": True}
    for text, expected in said.items():
        monkeypatch.setenv("ALLOW_UI_WITHOUT_PASSWORD", text)
        assert users.is_open_to_all() is expected
    monkeypatch.setenv("ALLOW_UI_WITHOUT_PASSWORD", "perhaps")
    with pytest.raises(ParameterError, match="ALLOW_UI_WITHOUT_PASSWORD must be true or false"):
        users.is_open_to_all()


def test_rules_are_kept_and_changed_one_by_one(workspace):
    assert users.read_rules(workspace.access_rules) == AccessRules()
    users.change_rules(workspace, public=["a.example"])
    users.change_rules(workspace, sign_in=True)
    rules = users.read_rules(workspace.access_rules)
    assert rules == AccessRules(sign_in=True, public=["a.example"])
    assert mode(workspace.access_rules) == 0o600


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sign_in": false, "extra": 1}'])
def test_rules_that_cannot_be_read_admit_nobody_without_a_password(workspace, content):
    users.change_rules(workspace, public=["a.example"], without_password=True)
    workspace.access_rules.write_text(content)
    rules = users.read_rules(workspace.access_rules)
    assert rules.sign_in
    assert not rules.public
    assert not rules.without_password


# --- the activity log --------------------------------------------------------------------------


def request(**changes):
    return {
        "time": 1_800_000_000.5,
        "user": "ana",
        "method": "GET",
        "path": "/",
        "status": 200,
        "duration": 3.5,
        "address": "203.0.113.7",
        "host": "x.ngrok-free.app",
        "outcome": "ok",
        **changes,
    }


@pytest.fixture
def log(workspace):
    workspace.server.mkdir(parents=True, exist_ok=True)
    return activity.ActivityLog(workspace.activity)


def test_kinds_of_requests(workspace, log):
    api = "/ajax-api/2.0/mlflow"
    expected = {
        ("GET", "/"): "page",
        ("GET", f"{api}/runs/get"): "look",
        ("POST", f"{api}/runs/search"): "look",
        ("POST", f"{api}/experiments/search-datasets"): "look",
        ("POST", "/graphql"): "look",
        ("POST", f"{api}/runs/create"): "change",
        ("PATCH", f"{api}/model-versions/update"): "change",
        ("DELETE", f"{api}/registered-models/delete"): "change",
        ("POST", f"{api}/runs/search-and-delete/now"): "change",
        ("GET", "/get-artifact"): "artifact",
        ("PUT", "/api/2.0/mlflow-artifacts/artifacts/1/a.txt"): "artifact",
    }
    for method, path in expected:
        log.write(**request(method=method, path=path))
    table = activity.read_activity(workspace)
    assert table["kind"].tolist() == list(expected.values())


def test_requests_are_counted_by_user_and_outcome(workspace, log):
    log.write(**request())
    log.write(**request(user="luis", method="POST", path="/api/2.0/mlflow/runs/create"))
    log.write(**request(user="luis", status=500, outcome="error", path="/api/2.0/mlflow/runs/get"))
    log.write(**request(user="eve", status=401, outcome="sign-in"))
    log.write(**request(user=None, status=403, outcome="host", host="evil.example"))
    log.write(**request(user=None, status=403, outcome="origin"))
    table = activity.read_activity(workspace)
    counts = activity.summarize_activity(table)
    assert counts.loc["ana", "page"] == 1
    assert counts.loc["luis", ["look", "change", "errors"]].tolist() == [1, 1, 1]
    assert counts.loc["eve", "rejected: sign-in"] == 1
    assert counts.loc["(none)", ["rejected: host", "rejected: origin"]].tolist() == [1, 1]
    assert counts.to_numpy().sum() == len(table) + 1  # the error is counted as a look as well
    figure = plots.activity(table)
    shown = {text.get_text() for text in figure.axes[0].get_yticklabels()}
    assert shown == set(counts.index)


def test_log_that_is_empty_is_shown_as_empty(workspace):
    table = activity.read_activity(workspace)
    assert table.empty
    assert activity.summarize_activity(table).empty
    assert plots.activity(table) is None


def test_log_rotates_and_is_read_back_in_order(workspace, monkeypatch):
    monkeypatch.setattr(activity, "MAX_BYTES", 2_000)
    workspace.server.mkdir(parents=True)
    log = activity.ActivityLog(workspace.activity)
    for number in range(90):
        log.write(**request(time=1_800_000_000 + number, path=f"/{number}"))
    files = sorted(workspace.server.glob("activity.jsonl*"))
    assert len(files) == activity.FILES
    assert {mode(file) for file in files} == {0o600}
    assert all(file.stat().st_size <= 2_000 for file in files)
    table = activity.read_activity(workspace)
    assert table["path"].tolist() == [f"/{number}" for number in range(90 - len(table), 90)]
    assert activity.read_activity(workspace, last=3)["path"].tolist() == ["/87", "/88", "/89"]


def test_line_breaks_in_what_a_client_sends_stay_inside_their_line(workspace, log):
    log.write(**request(user='eve\n{"user": "admin"}', path="/\r\n\u2028x"))
    table = activity.read_activity(workspace)
    assert len(table) == 1
    assert table["user"].iloc[0].startswith("eve\n")


def test_times_are_utc(workspace, log):
    log.write(**request(time=1_800_000_000.5))
    assert activity.read_activity(workspace)["time"].iloc[0] == pd.Timestamp("2027-01-15 08:00Z")


# --- what belongs to others --------------------------------------------------------------------


def test_server_folder_is_closed_to_others(running_server):
    assert mode(running_server.workspace.server) == 0o700
    assert mode(running_server.workspace.activity) == 0o600
    assert mode(running_server.workspace.passwords) == 0o600


def test_password_is_no_argument_of_the_server(running_server):
    state = json.loads((running_server.workspace.server / "state.json").read_text())
    line = " ".join(psutil.Process(state["pid"]).cmdline())
    for password in json.loads(running_server.workspace.passwords.read_text()).values():
        assert password not in line
